"""Summarizes the sheets of a dataset's records, one sheet at a time.

There are three passes: over the grids for the mean volume, over the grids for the correlation of each with
it and for what distinguishes each, and over the pictures to show. About 3 KB are kept per record.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns
from beam_nifti.errors import unreadable
from beam_nifti.pipeline.failures import PEOPLE, own_key
from beam_nifti.record.dataset_files import read_failures_list
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.reporting.appearance import SCHEMA
from beam_nifti.reporting.copies import Copies, Sample, describe, find_copies
from beam_nifti.reporting.outliers import Measure, Numbers, Ranking, rank
from beam_nifti.reporting.sheets import read_problems, read_sheets
from beam_nifti.reporting.thumbnail import GRID, draw_slices
from beam_nifti.storage import paths as storage
from beam_nifti.support.json_types import require_type
from beam_nifti.support.outcomes import may_pass
from beam_nifti.support.strict_json import load_json
from beam_nifti.support.wording import counted

MAX_OUTLIERS: Final = 1000  # outliers to show; all are counted
MAX_FAILURES: Final = 500  # failures to list; all are counted
MAX_PROBLEMS: Final = 200  # problems to list, of all shards; all are counted
_SHOWN_OF_FAILURE: Final = ("row", "participant_id", "stage", "message")
_PICTURES: Final = ("picture", "overlay")
_HEAVY: Final = ("digests", "mask_labels", "mask_counts", "num_labelled", "grid", *_PICTURES)
_FLOOR: Final = 0.001  # negligible deviation of a share; of mean and std, times the median std


@dataclass(frozen=True, eq=False)
class MaskTotals:
    """Totals of the masks of all records.

    Attributes:
        records: number of records that have a label, by split and label.
        voxels: number of voxels that have a label, by split and label; those of 0 have no other one.
        labelled: number of voxels that have any label but 0, by split.
    """

    records: Counter[tuple[str, int]] = field(default_factory=Counter)
    voxels: Counter[tuple[str, int]] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)

    def add(self, split: str, table: pa.Table) -> None:
        """Add the masks of a sheet."""
        self.labelled[split] += pc.sum(table["num_labelled"]).as_py() or 0
        labels, counts = (pc.list_flatten(table[name]) for name in ("mask_labels", "mask_counts"))
        found = pa.table({"label": labels, "count": counts}).group_by("label", use_threads=False)
        for row in found.aggregate([("count", "sum"), ("count", "count")]).to_pylist():
            self.voxels[split, row["label"]] += row["count_sum"]
            self.records[split, row["label"]] += row["count_count"]


@dataclass(frozen=True, eq=False)
class Summary:
    """Summary of the records.

    Attributes:
        rows: one row per record, with its split and the columns of `appearance.SCHEMA` that are not _HEAVY.
        measures: values of each measure by record.
        ranking: how unusual each record is.
        outliers: numbers of outliers, the most unusual first.
        pictures: WebPs of the records to show, by number: the slices, and the labels of the mask or None.
        mean_picture: picture of the mean volume; None without records.
        masks: totals of the masks.
        copies: records that have the same image.
        problems: problems of damaged records, which have no row.
    """

    rows: pa.Table
    measures: dict[Measure, Numbers]
    ranking: Ranking
    outliers: npt.NDArray[np.int64]
    pictures: dict[int, tuple[bytes, bytes | None]]
    mean_picture: bytes | None
    masks: MaskTotals
    copies: Copies
    problems: tuple[str, ...]


def summarize(folder: str, num_pictures: int) -> Summary:
    """Read the sheets of a dataset."""
    rows, mean, sample, masks = _mean_volume(folder)
    correlations, copies = _compare(folder, rows, mean, sample)
    measures = _measures(rows, correlations)
    ranking = rank(measures)
    outliers = ranking.outliers()
    total = rows.num_rows
    # Exactly num_pictures of the numbers below total, evenly spread.
    shown = {n for n in range(total) if n * num_pictures % total < num_pictures}
    shown.update(outliers[:MAX_OUTLIERS].tolist())
    mean_picture = None
    if total:
        extents = np.median(rows["extents"].to_pylist(), axis=0)
        mean_picture = draw_slices(mean.reshape(GRID, GRID, GRID), (extents / GRID).tolist())
    problems = tuple(read_problems(folder))
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        problems = (*problems[:MAX_PROBLEMS], f"and {counted(more, 'more problem')}")
    return Summary(
        rows=rows,
        measures=measures,
        ranking=ranking,
        outliers=outliers,
        pictures=_pictures(folder, shown),
        mean_picture=mean_picture,
        masks=masks,
        copies=copies,
        problems=problems,
    )


def _mean_volume(folder: str) -> tuple[pa.Table, Numbers, Sample, MaskTotals]:
    """The rows of all records; the mean, and a sample, of their standardized grids; and their masks."""
    light = [name for name in SCHEMA.names if name not in _HEAVY]
    schema = pa.schema([SCHEMA.field(name) for name in light]).append(pa.field("split", pa.string()))
    tables, total, sample, masks = [schema.empty_table()], np.zeros(GRID**3), Sample(), MaskTotals()
    for split, table in read_sheets(folder, [*light, "mask_labels", "mask_counts", "num_labelled", "grid"]):
        grids = _standardized(table["grid"])
        total += grids.sum(0)
        sample.add(grids)
        masks.add(split, table)
        tables.append(
            table.select(light).append_column("split", pa.array([split] * table.num_rows, pa.string()))
        )
    rows = pa.concat_tables(tables)
    return rows, total / max(rows.num_rows, 1), sample, masks


def _compare(folder: str, rows: pa.Table, mean: Numbers, sample: Sample) -> tuple[Numbers, Copies]:
    """Pearson's correlation of each record's grid with the mean volume, and records with the same image.

    The correlation of a volume without contrast is 0.
    """
    direction, common = _unit_deviation(mean[np.newaxis])[0] / mean.size, sample.common(mean)
    correlations, described, digests = [np.zeros(0)], list[npt.NDArray[np.int8]](), list[list[bytes]]()
    for _, table in read_sheets(folder, ["grid", "digests"]):
        grids = _standardized(table["grid"])
        correlations.append(grids @ direction)
        described.append(describe(grids, common))
        digests += (own or [] for own in table["digests"].to_pylist())
    copies = find_copies(rows, digests, np.concatenate(described) if described else np.zeros((0, 1), np.int8))
    return np.concatenate(correlations), copies


def _standardized(grids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    values = np.frombuffer(b"".join(grids.to_pylist()), np.uint8).reshape(-1, GRID**3)
    return _unit_deviation(values.astype(np.float64))


def _unit_deviation(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each row with mean 0 and standard deviation 1; a constant one becomes 0."""
    values = values - values.mean(1, keepdims=True)
    deviation = values.std(1, keepdims=True)
    deviation[deviation == 0] = 1
    scaled: npt.NDArray[np.float64] = values / deviation
    return scaled


def _measures(rows: pa.Table, correlations: Numbers) -> dict[Measure, Numbers]:
    mean, std, foreground = (rows[name].to_numpy() for name in ("mean", "std", "foreground"))
    floor = max(_FLOOR * float(np.median(std)) if std.size else 0.0, np.finfo(float).tiny)
    return {
        Measure("mean", floor): mean,
        Measure("std", floor): std,
        Measure("foreground", _FLOOR): foreground,
        Measure("correlation", _FLOOR, only_low=True): correlations,
    }


def _pictures(folder: str, shown: set[int]) -> dict[int, tuple[bytes, bytes | None]]:
    pictures = dict[int, tuple[bytes, bytes | None]]()
    start = 0
    for _, table in read_sheets(folder, _PICTURES):
        for number in sorted(shown.intersection(range(start, start + table.num_rows))):
            pictures[number] = tuple(table[name][number - start].as_py() for name in _PICTURES)
        start += table.num_rows
    return pictures


def read_failures(output: str, info: DatasetInfo) -> list[dict[str, Any]]:
    """Row, participant, stage and message of the first MAX_FAILURES failures of a dataset.

    Raises:
        DatasetError: their list is missing, damaged or too large.
    """
    if info.failures is None:
        return []
    path = storage.join(output, info.failures)
    try:
        lines = io.BytesIO(read_failures_list(output, info.failures, info.num_failures))
        return [_shown_of(line, info.columns) for line in itertools.islice(lines, MAX_FAILURES)]
    except (OSError, ValueError) as e:
        if may_pass(e):
            raise
        raise unreadable(f"{path}:", e) from e


def _shown_of(line: bytes, columns: Columns) -> dict[str, Any]:
    """What to show of a line; a ValueError if a build has not written it."""
    failure = load_json(line, is_modest=True)
    require_type(failure, dict, "a line")
    keys = {name: name if name in PEOPLE else own_key(name, columns) for name in _SHOWN_OF_FAILURE}
    shown = {name: failure.get(key, "") for name, key in keys.items()}
    for name, value in shown.items():
        if not isinstance(value, int):
            require_type(value, str, name)
    return shown
