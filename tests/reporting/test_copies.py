"""Records with the same image are found among volumes that resemble each other, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from beam_nifti.reporting import copies
from beam_nifti.reporting.copies import CopiedImage, Copies, Sample, describe, find_copies
from beam_nifti.reporting.thumbnail import block_means

SHAPE = (48, 56, 44)
PLACES = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
TEMPLATE = 100 * np.exp(-3 * (PLACES**2).sum(0)) * (1 + np.cos(9 * PLACES[0]) * np.cos(7 * PLACES[1]))
NOISE = np.random.default_rng(99).normal(0, 4, SHAPE)


def person(seed: int) -> Any:
    """A volume registered to a template, a quarter of whose contrast is its own."""
    rng = np.random.default_rng(seed)
    own = np.zeros(SHAPE)
    for _ in range(24):
        waves, phases = rng.uniform(-9, 9, 3), rng.uniform(0, 6, 1)
        own += np.cos(np.tensordot(waves, PLACES, 1) + phases)
    return TEMPLATE + TEMPLATE.std() * own / own.std() / 4 * np.exp(-2 * (PLACES**2).sum(0))


def standardized(volumes: Sequence[Any]) -> Any:
    grids = np.stack([block_means(volume).ravel() for volume in volumes])
    grids -= grids.mean(1, keepdims=True)
    return grids / grids.std(1, keepdims=True)


def search(volumes: Sequence[Any], splits: Sequence[str], rows: Sequence[int | None] | None = None) -> Copies:
    """The copies among volumes whose ids are their numbers, without digests."""
    grids, sample = standardized(volumes), Sample()
    sample.add(grids)
    described = describe(grids, sample.common(grids.mean(0)))
    return find_copies(table(splits, rows), [()] * len(splits), described)


def table(splits: Sequence[str], rows: Sequence[int | None] | None = None) -> pa.Table:
    ids = [str(number) for number in range(len(splits))]
    numbers = pa.array(rows or range(len(splits)), pa.int64())
    return pa.table({"example_id": ids, "split": list(splits), "row": numbers})


PEOPLE = [person(seed) for seed in range(16)]


def test_people_registered_to_a_template_are_no_copies() -> None:
    raw = np.corrcoef(standardized(PEOPLE))
    assert raw[np.triu_indices(16, 1)].min() > 0.9, "the cohort is too easy"
    found = search(PEOPLE, ["train", "test"] * 8)
    assert (found.num_across, found.num_within, found.is_complete) == (0, 0, True)


@pytest.mark.parametrize(
    "change",
    [
        lambda volume: volume + NOISE,
        lambda volume: np.roll(volume, 1, 0),
        lambda volume: np.roll(volume, 1, 1),
        lambda volume: np.roll(volume, -1, 2),
        lambda volume: 1.7 * volume + 30,
        lambda volume: np.round(255 * volume / volume.max()),
        lambda volume: ndimage.zoom(volume, 0.75, order=1),
        lambda volume: np.clip(volume, *np.percentile(volume, [1, 99])),
    ],
    ids=["noise", "shift_x", "shift_y", "shift_z", "scaled", "8bit", "resampled", "clipped"],
)
def test_nearly_the_same_image_is_found(change: Callable[[Any], Any]) -> None:
    found = search([*PEOPLE, change(PEOPLE[3])], ["train"] * 16 + ["test"])
    (pair,) = found.across
    assert (pair.ids, pair.splits, pair.is_exact) == (("3", "16"), ("train", "test"), False)
    assert pair.is_leak
    assert str(pair) == f"3 (train) and 16 (test) have nearly the same image ({pair.similarity:.2f})"
    assert (found.within, found.num_within) == ((), 0)


def test_frames_of_one_image_are_not_compared() -> None:
    volumes, splits = [*PEOPLE, PEOPLE[3] + NOISE], ["train"] * 17
    assert search(volumes, splits, [*range(16), 3]).num_within == 0
    assert search(volumes, splits, [None] * 17).num_within == 1


def test_the_number_of_records_decides_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = [*PEOPLE[:8], PEOPLE[3] + NOISE]
    assert not search(volumes, ["train"] * 9).is_complete
    monkeypatch.setattr(copies, "MOST_COMPARED", 16)
    found = search([*PEOPLE, PEOPLE[3] + NOISE], ["train"] * 17)
    assert (found.is_complete, found.num_within) == (False, 0)


def test_pairs_are_counted_beyond_those_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MAX_PAIRS", 2)
    found = find_copies(table(["train"] * 12), [[b"same"]] * 12, np.zeros((12, 8), np.int8))
    assert (len(found.within), found.num_within) == (2, 11)
    assert found.within[0] == CopiedImage(("0", "1"), ("train", "train"), True, 1.0)


RECORDS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.sets(st.sampled_from([b"1", b"2", b"3"]))),
    min_size=10,
    max_size=24,
)


@given(RECORDS, st.integers(0, 5))
def test_pairs_are_those_of_a_comparison_of_each_with_each(records: Any, seed: int) -> None:
    """As long as each image has one digest, and rows are not repeated."""
    splits, _, digests = zip(*records, strict=True)
    digests = [sorted(own)[:1] for own in digests]
    vectors = np.random.default_rng(seed).integers(-127, 128, (len(records), 3)).astype(np.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_TILE", 4)
        found = find_copies(table(splits), digests, vectors)
    units = vectors / np.maximum(np.linalg.norm(vectors.astype(float), axis=1, keepdims=True), 1)
    firsts, exact, near = dict[Any, int](), set(), set()
    for number, own in enumerate(digests):
        first = firsts.setdefault(own[0] if own else number, number)
        if first != number:
            exact.add((str(first), str(number)))
    shown = dict[Any, int]()  # the first record of each image in each split
    for number, (split, own) in enumerate(zip(splits, digests, strict=True)):
        shown.setdefault((split, own[0] if own else number), number)
    for a, b in ((a, b) for a in shown.values() for b in shown.values() if a < b):
        is_same = digests[a] and digests[a] == digests[b]
        if not is_same and units[a] @ units[b] > copies.LIMIT:
            near.add((str(a), str(b)))
    pairs = [*found.across, *found.within]
    assert {pair.ids for pair in pairs if pair.is_exact} == exact
    assert {pair.ids for pair in pairs if not pair.is_exact} == near
    assert all(pair.is_leak for pair in found.across)
    assert not any(pair.is_leak for pair in found.within)


def test_a_sample_is_spread_over_all_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_SAMPLE", 4)
    sample = Sample()
    for number in range(100):
        sample.add(np.full((1, 24**3), float(number)))
    values = [grid[0] for grid in sample._grids]
    assert 4 <= len(values) <= 8
    assert np.ptp(np.diff(values)) == 0
    assert values[-1] >= 80
