"""Random patches of records by number."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.errors import UsageError
from tests.read.patch_cohort import PATCH, SHAPES, build_patch_cohort

shapes = st.tuples(*[st.integers(1, 40)] * 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_patch_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def records(dataset: Path) -> bn.Dataset:
    return bn.Dataset(dataset, columns=["id", "image", "mask"])


@given(shapes, shapes, st.integers(0, 2**64), st.integers(0, 9), st.integers(0, 9))
def test_a_patch_is_inside_its_volume_or_around_it(
    volume: tuple[int, ...], shape: tuple[int, ...], seed: int, epoch: int, number: int
) -> None:
    for corner, size, length in zip(
        bn.Patches(shape).draw(volume, seed, epoch, number), volume, shape, strict=True
    ):
        if size >= length:
            assert 0 <= corner <= size - length
        else:
            assert (before := -corner) + size <= length
            assert length - size - before in (before, before + 1)


def test_every_corner_is_as_likely_as_another() -> None:
    patches, count = bn.Patches((5, 7, 9)), 2000
    corners = [patches.draw((8, 7, 12, 3), 1, 0, number) for number in range(count)]
    found, counts = np.unique(corners, axis=0, return_counts=True)
    assert len(found) == 4 * 4
    assert np.abs(counts - count / 16).max() < 5 * np.sqrt(count / 16)


def test_patches_are_the_same_on_every_machine() -> None:
    """Neither the version of numpy nor the processor may change them."""
    corners = [bn.Patches((4, 4, 4)).draw((99, 99, 99), 5, 3, number) for number in range(3)]
    assert corners == [(73, 28, 12), (18, 7, 14), (60, 80, 90)]


def test_a_patch_is_a_part_of_its_record(records: bn.Dataset) -> None:
    whole = list(records)
    patches = bn.PatchDataset(records, bn.Patches(PATCH, per_volume=3), seed=4)
    assert len(patches) == len(list(patches)) == 3 * len(SHAPES)
    for i, patch in enumerate(patches):
        number, corner = patches.place(i)
        assert (number, patch["id"]) == (i // 3, f"sub-{number}")
        pads = [
            (max(-c, 0), max(c + n - size, 0))
            for c, n, size in zip(corner, PATCH, SHAPES[number], strict=True)
        ]
        box = tuple(slice(max(c, 0), max(c, 0) + n) for c, n in zip(corner, PATCH, strict=True))
        for name, padding in (("image", whole[number]["image"].min()), ("mask", 0)):
            expected = np.pad(whole[number][name][box], [*pads, (0, 0)], constant_values=padding)
            assert np.array_equal(patch[name], expected)
    assert np.array_equal(patches[-1]["image"], patches[len(patches) - 1]["image"])


def test_seed_and_epoch_decide_the_patches(records: bn.Dataset) -> None:
    def places(seed: int, epoch: int) -> list[Any]:
        patches = bn.PatchDataset(records, bn.Patches(PATCH, per_volume=2), seed=seed).epoch(epoch)
        return [pickle.loads(pickle.dumps(patches)).place(i) for i in range(len(patches))]

    assert places(1, 0) == places(1, 0)
    assert len({str(places(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.torch
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_pytorch_give_the_same_patches(records: bn.Dataset, method: str) -> None:
    torch = pytest.importorskip("torch.utils.data", reason="PyTorch is not installed")
    patches = bn.PatchDataset(records, bn.Patches(PATCH, per_volume=2), seed=1)
    loader = torch.DataLoader(patches, batch_size=5, num_workers=2, multiprocessing_context=method)
    images = np.concatenate([batch["image"].numpy() for batch in loader])
    assert np.array_equal(images, np.stack([patch["image"] for patch in patches]))


def test_grain_takes_the_patches_of_several_epochs(records: bn.Dataset) -> None:
    grain = pytest.importorskip("grain", reason="Grain is not installed; pip install beam-nifti[grain]")
    patches = bn.PatchDataset(records, bn.Patches(PATCH), seed=1)
    assert isinstance(patches, grain.sources.RandomAccessDataSource)
    source = grain.MapDataset.concatenate([grain.MapDataset.source(patches.epoch(e)) for e in range(2)])
    assert np.array_equal(source[7]["image"], patches.epoch(1)[2]["image"])
    first, *_ = source.batch(5)
    assert first["image"].shape == (5, *PATCH, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda r: bn.Patches((9, 9)),
            r"the shape of a patch is \(9, 9\); give three integers of at least 1",
        ),
        (lambda r: bn.Patches((9, 0, 9)), "the shape of a patch is"),
        (lambda r: bn.Patches((9, 9, 9), per_volume=0), "patches_per_volume is 0; it must be at least 1"),
        (lambda r: bn.PatchDataset(r, bn.Patches(PATCH), seed=-1), "seed is -1; it must be at least 0"),
        (lambda r: bn.PatchDataset(r, bn.Patches(PATCH), seed=1).epoch(-1), "epoch is -1"),
        (lambda r: bn.PatchDataset(r, bn.Patches(PATCH), seed=0.5), "seed is 0.5; give a whole number"),
    ],
)
def test_what_is_no_patch_is_refused(records: bn.Dataset, make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(records)
    with pytest.raises(IndexError, match="there is no patch 5"):
        bn.PatchDataset(records, bn.Patches(PATCH), seed=1)[5]
