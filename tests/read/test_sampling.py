"""Random patches of records by number."""

from __future__ import annotations

import math
import pickle
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.errors import UsageError
from tests.build_helpers import build
from tests.datasets import edit_index, edit_info
from tests.images import write_cohort
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


@given(
    st.floats(0, 1) | st.sampled_from([0.1, 0.33, 1 / 3, 0.5]),
    st.integers(0, 2**64),
    st.integers(0, 9),
    st.integers(0, 2**40),
    st.integers(1, 50),
)
def test_the_share_of_any_successive_patches_is_exact(
    share: float, seed: int, epoch: int, first: int, count: int
) -> None:
    patches = bn.Patches((1, 1, 1), foreground=share)
    found = sum(patches.is_foreground(seed, epoch, first + i) for i in range(count))
    assert abs(found - Fraction(share) * count) < 1


def test_each_epoch_has_other_patches_around_labels() -> None:
    patches, count = bn.Patches((1, 1, 1), foreground=0.25), 400
    for number in range(4):
        found = sum(patches.is_foreground(1, epoch, number) for epoch in range(count))
        assert abs(found - count / 4) < 5 * np.sqrt(count / 4)


def test_labels_and_their_voxels_are_equally_likely() -> None:
    volume, count = (60, 50, 40), 2000
    voxels = [(30, 25, 20), (0, 49, 39), (31, 24, 19), (31, 24, 18)]
    flat = np.ravel_multi_index(np.transpose(voxels), volume).astype(np.int32)
    positions = {1: flat[[0, 0, 0, 1]], 4: flat[2:]}
    corners = [bn.Patches((1, 1, 1)).draw(volume, 7, 1, number, positions) for number in range(count)]
    found = np.array([corners.count(voxel) for voxel in voxels])
    assert found.sum() == count
    assert np.abs(found - count / 4).max() <= 5 * np.sqrt(count / 4)


def test_the_voxel_is_anywhere_in_the_middle_half_of_its_patch() -> None:
    volume, count = (60, 50, 40), 2000
    position = {1: np.array([np.ravel_multi_index((30, 25, 20), volume)], np.int32)}
    corners = [bn.Patches((4, 8, 3)).draw(volume, 7, 1, number, position) for number in range(count)]
    places, counts = np.unique(np.array((30, 25, 20)) - corners, axis=0, return_counts=True)
    assert places.tolist() == [[x, y, 1] for x in (1, 2, 3) for y in (2, 3, 4, 5, 6)]
    assert np.abs(counts - count / 15).max() < 5 * np.sqrt(count / 15)


weights = st.dictionaries(
    st.integers(1, 9), st.sampled_from([0, 1, 3, 0.1, 1e-300, 1e300]) | st.floats(0, 1e9), min_size=1
)


@given(st.sets(st.integers(1, 9)), weights, st.integers(0, 9))
def test_weights_choose_the_label(labels: set[int], weights: dict[int, float], number: int) -> None:
    """Each label has one voxel, whose number along x is the label."""
    assume(any(weights.values()))
    patches = bn.Patches((1, 1, 1), foreground=1, label_weights=weights)
    positions = {label: np.array([label], np.int32) for label in sorted(labels)}
    found = patches.draw((10, 1, 1), 3, 2, number, positions)[0]
    raw = np.random.PCG64(np.random.SeedSequence(3, spawn_key=(2, number))).random_raw(4)[3]
    exact = {label: Fraction(weights.get(label, 0)) for label in sorted(labels)}
    place = sum(exact.values()) * Fraction(int(raw), 2**64)
    for label, weight in exact.items():
        if place < weight:
            assert found == label
            break
        place -= weight
    else:
        assert not any(exact.values())
        assert found == bn.Patches((1, 1, 1)).draw((10, 1, 1), 3, 2, number)[0]


@given(shapes, shapes, st.integers(0, 9), st.data())
def test_a_patch_has_its_labelled_voxel(
    volume: tuple[int, ...], shape: tuple[int, ...], number: int, data: st.DataObject
) -> None:
    voxel = tuple(data.draw(st.integers(0, size - 1)) for size in volume)
    position = {1: np.array([np.ravel_multi_index(voxel, volume)], np.int32)}
    patches = bn.Patches(shape)
    corner = patches.draw(volume, 1, 0, number, position)
    at_random = patches.draw(volume, 1, 0, number)
    for at, start, length, size, other in zip(voxel, corner, shape, volume, at_random, strict=True):
        assert start <= at < start + length
        assert 0 <= start <= size - length or (size < length and start == other)


def test_labels_are_found_by_the_index(records: bn.Dataset) -> None:
    """The last record has none, and the third is smaller than a patch."""
    patches = bn.PatchDataset(records, bn.Patches(PATCH, per_volume=40, foreground=1), seed=4)
    for number, shape in enumerate(SHAPES[:-1]):
        mask = records[number]["mask"][..., 0]
        positions = records.positions_of(number)
        assert [(label, len(found)) for label, found in positions.items()] == [(2, 64), (7, 64)]
        for label, found in positions.items():
            assert (mask[np.unravel_index(found, shape)] == label).all()
        masks = [patches[40 * number + i]["mask"] for i in range(5)]
        assert all(mask.any() for mask in masks)
    assert records.positions_of(-1) == {}
    assert len({patches.place(i) for i in range(160, 200)}) > 30


@pytest.mark.parametrize("weights", [None, {7: 1}, {2: 1, 7: 0.5}])
def test_patches_are_those_of_the_index(records: bn.Dataset, weights: dict[int, float] | None) -> None:
    """In any five volumes of three patches, 6 of the 15 are drawn around a voxel of a label with a weight."""
    shape, per_volume = (1, 1, 1), 3
    chosen = bn.Patches(shape, per_volume, foreground=0.4, label_weights=weights)
    patches, anywhere = (
        bn.PatchDataset(records, each, seed=3, epoch=1) for each in (chosen, bn.Patches(shape, per_volume))
    )
    moved = {i for i in range(len(patches)) if patches.place(i) != anywhere.place(i)}
    is_chosen = [chosen.is_foreground(3, 1, i) for i in range(len(patches))]
    assert sum(is_chosen) == 6
    assert moved == {i for i in range(12) if is_chosen[i]}  # the last volume has no labels
    labels = {int(patches[i]["mask"].item()) for i in moved}
    assert labels <= set(weights or {2, 7})


def test_indexes_without_positions_are_said_to_lack_them(records: bn.Dataset, tmp_path: Path) -> None:
    patches = bn.Patches(PATCH, foreground=0.25)
    older = shutil.copytree(records.path, tmp_path / "older")
    for shard in range(2):
        edit_index(older, lambda table: table.drop_columns("mask_positions"), shard)
    edit_info(older, lambda facts: facts["format_features"].remove("positions"))
    assert len(bn.PatchDataset(bn.Dataset(older), bn.Patches(PATCH), seed=1)) == len(SHAPES)
    with pytest.raises(
        UsageError, match=r"foreground is 0\.25, but the index of .*older, which an .*beam-nifti convert"
    ):
        bn.PatchDataset(bn.Dataset(older), patches, seed=1)
    build(write_cohort(tmp_path / "cohort", 2), tmp_path / "plain")
    with pytest.raises(
        UsageError, match=r"foreground is 0\.25, but .*plain has no masks; build it with --mask-"
    ):
        bn.PatchDataset(bn.Dataset(tmp_path / "plain"), patches, seed=1)


def test_a_patch_is_a_part_of_its_record(records: bn.Dataset) -> None:
    records = bn.Dataset(records.path, columns=["id", "image", "mask", "affine"])
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
        moved = np.eye(4)
        moved[:3, 3] = corner
        assert np.allclose(patch["affine"], whole[number]["affine"] @ moved)
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


@pytest.mark.parametrize("number", [np.float32(3), np.float16(3), np.float64(3), np.int8(3), Fraction(3), 3])
def test_a_weight_is_any_number(number: Any) -> None:
    assert weighted({1: number}) == weighted({1: 3.0})


def weighted(weights: Any) -> bn.Patches:
    return bn.Patches(PATCH, foreground=0.5, label_weights=weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda r: bn.Patches((9, 9)),
            r"the shape of a patch is \(9, 9\); give three integers of at least 1",
        ),
        (
            lambda r: bn.Patches((1 << 40, 9, 9)),
            r"the shape of a patch is \(1099511627776, 9, 9\), which does not fit into memory; give a",
        ),
        (lambda r: bn.Patches((1 << 70, 9, 9)), "does not fit into memory"),
        (lambda r: bn.Patches((9, 0, 9)), "the shape of a patch is"),
        (lambda r: bn.Patches((9, 9, 9), per_volume=0), "patches_per_volume is 0; it must be at least 1"),
        (lambda r: bn.Patches(PATCH, foreground=1.5), "foreground is 1.5; give a share from 0 to 1"),
        (lambda r: bn.Patches(PATCH, foreground=float("nan")), "foreground is nan"),
        (lambda r: bn.Patches(PATCH, foreground="all"), "foreground is 'all'"),
        (lambda r: weighted([1, 2]), r"label_weights is \[1, 2\]; give a dictionary, such as \{1: 1, 2: 3\}"),
        (lambda r: weighted({"1": 2}), "a label in label_weights is '1'; give a whole number"),
        (lambda r: weighted({0: 1}), "label_weights has the label 0; give labels from 1, because"),
        (lambda r: weighted({1: -1}), "gives label 1 the weight -1; give a finite number of at least 0"),
        (lambda r: weighted({1: math.inf}), "gives label 1 the weight inf"),
        (lambda r: weighted({1: math.nan}), "gives label 1 the weight nan"),
        (lambda r: weighted({1: 10**400}), "gives label 1 the weight 1000"),
        (lambda r: weighted({1: True}), "gives label 1 the weight True"),
        (lambda r: weighted({1: "1"}), "gives label 1 the weight '1'"),
        (lambda r: weighted({1: 0, 2: 0}), r"is \{1: 0.0, 2: 0.0\}; give at least one label a weight above"),
        (lambda r: bn.PatchDataset("ds", bn.Patches(PATCH), seed=1), "records is 'ds'; give a Dataset, such"),  # type: ignore[arg-type]
        (lambda r: bn.PatchDataset(r, PATCH, seed=1), r"patches is \(.*; give Patches, such as"),  # type: ignore[arg-type]
        (lambda r: weighted({}), r"label_weights is \{\}; give at least one label"),
        (lambda r: bn.Patches(PATCH, label_weights={1: 1}), "but foreground is 0, so no patch is drawn"),
        (
            lambda r: bn.PatchDataset(r, weighted({2: 1, 9: 1, 8: 0}), seed=1),
            "label_weights has the label 8, but the labels in masks of .* are 2, 7; drop it, or correct it",
        ),
        (lambda r: bn.PatchDataset(r, bn.Patches(PATCH), seed=-1), "seed is -1; it must be at least 0"),
        (lambda r: bn.PatchDataset(r, bn.Patches(PATCH), seed=1).epoch(-1), "epoch is -1"),
        (lambda r: bn.PatchDataset(r, bn.Patches(PATCH), seed=0.5), "seed is 0.5; give a whole number"),
    ],
)
def test_what_is_no_patch_is_refused(records: bn.Dataset, make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(records)
    with pytest.raises(TypeError, match="give the number of one patch"):
        bn.PatchDataset(records, bn.Patches(PATCH), seed=1)[0:3]  # type: ignore[index]
    with pytest.raises(IndexError, match="there is no patch 5"):
        bn.PatchDataset(records, bn.Patches(PATCH), seed=1)[5]
