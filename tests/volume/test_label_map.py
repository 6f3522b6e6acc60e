"""Labels of masks, and where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from beam_nifti.volume import label_map
from beam_nifti.volume.label_map import labels_of, positions_of

# fmt: off
SPREAD = [
    182, 185, 186, 193, 194, 195, 202, 204, 211, 212, 213, 220, 222, 263, 266, 267, 274, 275, 281, 284, 285,
    292, 293, 294, 302, 303, 344, 347, 348, 355, 357, 362, 366, 371, 372, 380, 381, 384, 425, 426, 429, 435,
    438, 443, 444, 447, 452, 454, 461, 462, 465, 506, 508, 515, 516, 519, 524, 525, 533, 534, 535, 542, 543,
    546,
]
# fmt: on
masks = arrays.arrays(
    st.sampled_from([np.uint8, np.uint16]),
    arrays.array_shapes(min_dims=3, max_dims=3),
    elements=st.integers(0, 9),
)


@given(masks, st.integers(1, 50))
def test_positions_are_of_every_label_and_spread_over_it(mask: np.ndarray, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_map, "_CHUNK", chunk)
        assert labels_of(mask) == np.unique(mask).tolist()
        positions = np.array(positions_of(mask), int)
    labels = np.setdiff1d(mask, [0])
    for label, found in zip(labels, positions.reshape(len(labels), 64 if len(labels) else 0), strict=True):
        places = np.flatnonzero(mask == label)
        ranks = np.searchsorted(places, found)
        assert np.array_equal(places[ranks], found)
        parts = np.arange(64) * len(places)
        assert ((ranks + 1) * 64 > parts).all()
        assert (ranks * 64 < parts + len(places)).all()
        assert len(places) > 32 or np.array_equal(np.unique(found), places)


def test_positions_do_not_follow_the_grid() -> None:
    mask = np.ones((64, 64, 64), np.uint8)
    for axis in np.unravel_index(positions_of(mask), mask.shape):
        assert len(np.unique(axis)) > 30


def test_masks_of_many_labels_have_fewer_positions_of_each() -> None:
    mask = np.arange(5001 * 2, dtype=np.uint16).reshape(2, 3, -1) // 2
    positions = positions_of(mask)
    assert np.array_equal(mask.reshape(-1)[positions], np.arange(1, 5001))
    assert len(positions_of(mask % 101)) == 100 * 40


def test_positions_are_the_same_in_every_version() -> None:
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[2:7, 2:7, 2:7] = 3
    mask[4, 4, 4] = 1
    positions = positions_of(mask)
    assert positions[:64] == [364] * 64
    assert positions[64:] == SPREAD
