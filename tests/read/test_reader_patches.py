"""Random patches by `load_dataset`."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.errors import UsageError
from tests.read.patch_cohort import PATCH, SHAPES, build_patch_cohort

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import load_dataset, state_after  # noqa: E402

pytestmark = pytest.mark.tf


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_patch_cohort(tmp_path_factory.mktemp("cohort"))


def images(elements: Any) -> list[bytes]:
    """The patches, one after the other."""
    return [patch.tobytes() for x, _ in elements.as_numpy_iterator() for patch in x]


@pytest.mark.parametrize("channels_first", [False, True])
def test_batches_are_the_patches_of_patch_dataset(dataset: Path, channels_first: bool) -> None:
    drawn: dict[str, Any] = {"foreground": 0.4, "label_weights": {7: 1, 2: 0.1}} if channels_first else {}
    elements = load_dataset(
        dataset,
        batch_size=3,
        patch=PATCH,
        patches_per_volume=2,
        **drawn,
        seed=8,
        target="mask",
        repeat=2,
        channels_first=channels_first,
    )
    shape = (1, *PATCH) if channels_first else (*PATCH, 1)
    assert [(spec.shape, spec.dtype) for spec in elements.element_spec] == [
        ((None, *shape), tf.float32),
        ((None, *shape), tf.int32),
    ]
    records = bn.Dataset(dataset, columns=["image", "mask"], channels_first=channels_first)
    patches = bn.PatchDataset(records, bn.Patches(PATCH, per_volume=2, **drawn), seed=8)
    expected = [patch for epoch in range(2) for patch in patches.epoch(epoch)]
    found = list(elements.as_numpy_iterator())
    assert len(found) == len(elements) == 8
    for at, name in enumerate(("image", "mask")):
        whole = np.concatenate([batch[at] for batch in found])
        assert np.array_equal(whole, np.stack([patch[name] for patch in expected]))


def test_one_argument_says_what_several_say(dataset: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "shuffle": True, "seed": 1}
    short = load_dataset(dataset, patch=PATCH, patches_per_volume=3, **options)
    long = load_dataset(dataset, patches=bn.Patches(PATCH, per_volume=3), **options)
    assert images(short) == images(long)
    assert len(set(images(short))) == 3 * len(SHAPES)
    assert images(load_dataset(dataset, patch=PATCH, **options)) != images(short)


def test_patches_are_drawn_around_labels(dataset: Path) -> None:
    options: dict[str, Any] = {"batch_size": 1, "seed": 1, "target": "mask", "split": "train[:4]"}
    options |= {"patch": (3, 3, 3), "patches_per_volume": 9}
    masks = {
        share: [
            mask.any() for _, mask in load_dataset(dataset, foreground=share, **options).as_numpy_iterator()
        ]
        for share in (None, 0.5, 1.0)
    }
    assert sum(masks[None]) < sum(masks[0.5]) < sum(masks[1.0]) == 4 * 9


def test_patches_of_one_seed_are_the_same_and_each_epoch_has_others(dataset: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "patch": PATCH}
    passes = load_dataset(dataset, seed=1, **options)
    first, second = images(passes), images(passes)
    assert not set(first) & set(second)
    assert images(load_dataset(dataset, seed=1, repeat=2, **options)) == first + second
    assert images(load_dataset(dataset, seed=2, **options)) != first
    assert images(load_dataset(dataset, **options)) != images(load_dataset(dataset, **options))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_rest_is_that_of_the_uninterrupted_run(dataset: Path, data: st.DataObject) -> None:
    num_hosts = data.draw(st.integers(1, 3), "hosts")
    order: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 4), "batch"),
        "shuffle": data.draw(st.booleans(), "shuffle"),
        "seed": data.draw(st.integers(0, 2**64 - 1), "seed"),
        "shard": (data.draw(st.integers(0, num_hosts - 1), "host"), num_hosts),
        "patch": PATCH,
        "patches_per_volume": data.draw(st.integers(1, 3), "patches"),
        **data.draw(
            st.sampled_from([{}, {"foreground": 0.5}, {"foreground": 0.5, "label_weights": {7: 1, 2: 3}}])
        ),
    }
    whole = [x.tobytes() for x, _ in load_dataset(dataset, repeat=2, **order).as_numpy_iterator()]
    step = data.draw(st.integers(0, len(whole)), "step")
    state = json.loads(json.dumps(state_after(step, dataset, **order)))
    assert 2 * state["steps_per_epoch"] == len(whole)
    resumed = load_dataset(dataset, repeat=2, start_state=state, **order)
    assert [x.tobytes() for x, _ in resumed.as_numpy_iterator()] == whole[step:]


def test_hosts_share_the_patches_of_an_epoch(dataset: Path) -> None:
    options: dict[str, Any] = {
        "batch_size": 2,
        "shuffle": True,
        "seed": 3,
        "patch": PATCH,
        "patches_per_volume": 2,
        "foreground": 0.6,
        "label_weights": {7: 1},
    }
    hosts = [images(load_dataset(dataset, shard=(i, 3), **options)) for i in range(3)]
    assert sorted(itertools.chain(*hosts)) == sorted(images(load_dataset(dataset, **options)))


def test_damaged_records_are_skipped(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = build_patch_cohort(tmp_path)
    shard = min(output.glob("*.tfrecord.gz"))
    data = bytearray(shard.read_bytes())
    start = bn.Dataset(output).index(["offset"])["offset"][1].as_py()
    data[start + 200 : len(data)] = bytes(len(data) - start - 200)
    shard.write_bytes(data)
    options: dict[str, Any] = {"batch_size": 1, "patch": PATCH, "patches_per_volume": 2, "seed": 1}
    found = images(load_dataset(output, on_error="skip", **options))
    assert set(found) < set(images(load_dataset(dataset, **options)))
    assert "of 5 records so far" in caplog.text
    with pytest.raises(tf.errors.OpError, match="cannot be read"):
        images(load_dataset(output, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patch": PATCH, "patches": bn.Patches(PATCH)},
            "patches and patch are two ways to request patches; drop one of them",
        ),
        ({"patches": (9, 9, 9)}, r"patches is \(9, 9, 9\); give Patches, such as beam_nifti.Patches"),
        ({"patches_per_volume": 2}, "patches_per_volume is 2, but volumes are read as a whole; give a patch"),
        ({"patch": (9, 9)}, "the shape of a patch is"),
        ({"patch": PATCH, "patches_per_volume": 0}, "patches_per_volume is 0; it must be at least 1"),
        ({"foreground": 0.5}, "foreground is 0.5, but volumes are read as a whole; give a patch"),
        (
            {"label_weights": {1: 1}},
            r"label_weights is \{1: 1\}, but volumes are read as a whole; give a patch",
        ),
        ({"patch": PATCH, "engine": "sequential"}, "patch requires the index, but engine is 'sequential'"),
        ({"patch": PATCH, "layout": "plain"}, "patch requires a dataset_info.json"),
        ({"patch": PATCH, "shard": (0, 2)}, "shard requires an order that is known beforehand; give a seed"),
        ({"batch_size": 2}, "have different shapes; use batch_size=1 or None, .* or ragged=True"),
    ],
)
def test_arguments_that_do_not_fit(dataset: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, **options)


def test_a_state_of_other_patches_is_refused(dataset: Path) -> None:
    run: dict[str, Any] = {"patch": PATCH, "seed": 1, "foreground": 0.5, "label_weights": {2: 1}}
    state = state_after(1, dataset, **run)
    for changes in (
        {"seed": 2},
        {"patch": (9, 9, 9)},
        {"foreground": 0.4},
        {"label_weights": {2: 1, 7: 1}},
        {"label_weights": None},
        dict.fromkeys(run),
    ):
        options = run | changes
        with pytest.raises(UsageError, match=r"start_state is of a run with patches \{'seed': 1"):
            load_dataset(dataset, start_state=state, **options)
