"""Outliers are ranked by the median and the MAD, and named in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.reporting.outliers import FEWEST, LIMIT, Measure, rank

MEAN = Measure("mean", floor=1e-6)
CORRELATION = Measure("correlation", floor=0.001, only_low=True)


def test_deviations_are_in_mads_of_all_and_said_in_words() -> None:
    numbers = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 36])
    ranking = rank({MEAN: numbers})
    median = np.median(numbers)
    mad = np.median(np.abs(numbers - median))
    np.testing.assert_allclose(ranking.scores, np.abs(numbers - median) / mad)
    assert ranking.outliers().tolist() == [11]
    assert ranking.reasons(11) == ["mean 9.8 MADs above the median"]
    assert ranking.reasons(0) == []


def test_the_most_unusual_comes_first_by_its_largest_deviation() -> None:
    mean, correlation = np.tile([-1.0, 1.0], 10), np.tile([0.94, 0.96], 10)
    mean[3], correlation[7], mean[7], correlation[11] = 9.0, 0.1, 8.0, 0.99999
    ranking = rank({MEAN: mean, CORRELATION: correlation})
    assert ranking.outliers().tolist() == [7, 3]
    assert ranking.reasons(7) == ["correlation 84.0 MADs below the median", "mean 8.0 MADs above the median"]


def test_high_correlation_is_no_reason() -> None:
    correlation = np.full(20, 0.5)
    correlation[4] = 0.9
    assert rank({CORRELATION: correlation}).outliers().size == 0


def test_equal_numbers_leave_the_floor() -> None:
    correlation = np.full(50, 0.9)
    correlation[[4, 5]] = 0.8999, 0.2
    ranking = rank({CORRELATION: correlation})
    assert ranking.outliers().tolist() == [5]
    assert ranking.reasons(5) == ["correlation more than 100 MADs below the median"]


def test_few_volumes_have_no_outliers() -> None:
    numbers = np.zeros(FEWEST)
    numbers[0] = 100.0
    assert rank({MEAN: numbers}).outliers().tolist() == [0]
    few = rank({MEAN: numbers[:-1]})
    assert few.outliers().size == 0
    assert few.reasons(0) == []
    assert rank({MEAN: np.zeros(0)}).outliers().size == 0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=FEWEST, max_size=40), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3)
)
def test_outliers_do_not_depend_on_the_unit(numbers: list[float], scale: float, shift: float) -> None:
    values: Any = np.round(np.array(numbers))
    # A floor that is far below every MAD but 0, which has no unit.
    if np.median(np.abs(values - np.median(values))) == 0:
        return
    one = rank({Measure("mean", 1e-300): values})
    other = rank({Measure("mean", 1e-300): scale * values + shift})
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-4)
    beyond = {int(n) for n in np.flatnonzero(one.scores > LIMIT)}
    assert set(one.outliers().tolist()) == beyond
    assert all(bool(one.reasons(n)) == (n in beyond) for n in range(len(values)))


def test_scores_never_fall_for_a_further_measure() -> None:
    rng = np.random.default_rng(0)
    mean, correlation = rng.random(30), rng.random(30)
    both = rank({MEAN: mean, CORRELATION: correlation}).scores
    assert (both >= rank({MEAN: mean}).scores).all()
    assert both == pytest.approx(
        np.maximum(rank({MEAN: mean}).scores, rank({CORRELATION: correlation}).scores)
    )
