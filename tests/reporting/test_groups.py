"""Groups of records, such as sites, and how their intensities differ."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from beam_nifti.reporting import groups
from beam_nifti.reporting.groups import compare_groups
from beam_nifti.reporting.outliers import Measure

MEAN = Measure("mean", 0.001)


def rows_of(names: list[str | None], quantiles: np.ndarray) -> pa.Table:
    return pa.table({"group": pa.array(names, pa.string()), "quantiles": list(quantiles)})


def test_percentiles_and_what_differs() -> None:
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.normal(10, 1, 20), rng.normal(20, 1, 6), rng.normal(99, 1, 3)])
    names: list[str | None] = ["Oslo"] * 20 + ["Bonn"] * 6 + [None] * 3
    quantiles = means[:, np.newaxis] + np.linspace(0, 1, 33)
    found, num_more = compare_groups(rows_of(names, quantiles), {MEAN: means})
    assert ([group.name for group in found], [group.count for group in found]) == (
        ["Bonn", "Oslo", "none"],
        [6, 20, 3],
    )
    assert num_more == 0
    bonn, oslo, none = found
    np.testing.assert_allclose(oslo.percentiles, np.percentile(quantiles[:20], groups.PERCENTILES))
    apart = (np.median(means[20:26]) - np.median(np.r_[means[:20], means[26:]])) / np.median(
        np.abs(np.r_[means[:20], means[26:]] - np.median(np.r_[means[:20], means[26:]]))
    )
    assert bonn.notes == (f"mean {apart:.1f} MADs above the median of the others",)
    assert none.notes == (), "too few volumes"


def test_alike_groups_have_no_notes_and_the_largest_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MAX_GROUPS", 2)
    names: list[str | None] = ["a"] * 9 + ["b"] * 6 + ["c"] * 7
    means = np.random.default_rng(1).normal(10, 1, 22)
    found, num_more = compare_groups(rows_of(names, means[:, np.newaxis] + np.zeros(33)), {MEAN: means})
    assert [group.name for group in found] == ["a", "c"]
    assert num_more == 1
    assert all(group.notes == () for group in found)
