"""Compares the intensities of groups of records, such as sites: their percentiles, and how groups differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.reporting.outliers import Measure, Numbers, deviation_text, deviations

LIMIT: Final = 3.0  # median absolute deviations (MADs) of the other records; 2 standard deviations if normal
FEWEST: Final = 5  # records of a group, and of all others, for a median that is meaningful
MAX_GROUPS: Final = 30  # groups to show, those with the most records
PERCENTILES: Final = (5, 25, 50, 75, 95)


@dataclass(frozen=True, slots=True)
class Group:
    """Records with one value of a column.

    Attributes:
        name: the value, or "none".
        count: number of records.
        percentiles: PERCENTILES of the voxels of all records, each with the same weight.
        notes: how the group differs strongly from the other records; empty if it does not.
    """

    name: str
    count: int
    percentiles: tuple[float, ...]
    notes: tuple[str, ...]


def compare_groups(rows: pa.Table, measures: Mapping[Measure, Numbers]) -> tuple[list[Group], int]:
    """The largest groups, in order of their names, and the number of those that are not shown.

    Args:
        rows: `group` and `quantiles` of each record.
        measures: values of each measure by record.
    """
    names = np.array(["none" if name is None else name for name in rows["group"].to_pylist()], object)
    counts = Counter(names.tolist())
    shown = [name for name, _ in sorted(counts.items(), key=lambda of: (-of[1], of[0]))[:MAX_GROUPS]]
    quantiles = pc.list_flatten(rows["quantiles"]).to_numpy().reshape(len(names), -1)
    groups = []
    for name in sorted(shown):
        inside = names == name
        percentiles = np.percentile(quantiles[inside], PERCENTILES)
        are_enough = FEWEST <= counts[name] <= len(names) - FEWEST
        notes = tuple(_notes(inside, measures)) if are_enough else ()
        groups.append(Group(name, counts[name], tuple(percentiles.tolist()), notes))
    return groups, len(counts) - len(shown)


def _notes(inside: npt.NDArray[np.bool_], measures: Mapping[Measure, Numbers]) -> Iterator[str]:
    for measure, values in measures.items():
        by = float(np.median(deviations(values, measure.floor, values[~inside])[inside]))
        if abs(by) > LIMIT and not measure.only_low:
            yield f"{deviation_text(measure, by)} of the others"
