"""Summarizes the sheets of a dataset's records, one sheet at a time.

There are three passes: over the grids for the mean volume, over the grids for the correlation of each with
it, and over the pictures to show. About 1 KB is kept per record.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_nifti.config import Columns
from beam_nifti.errors import unreadable
from beam_nifti.pipeline.failures import PEOPLE, own_key
from beam_nifti.record.dataset_files import read_failures_list
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.reporting.appearance import SCHEMA
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
_HEAVY: Final = ("grid", "picture")
_FLOOR: Final = 0.001  # negligible deviation of a share; of mean and std, times the median std


@dataclass(frozen=True, eq=False)
class Summary:
    """Summary of the records.

    Attributes:
        rows: one row per record, as `appearance.SCHEMA` without grid and picture, with its split.
        measures: values of each measure by record.
        ranking: how unusual each record is.
        outliers: numbers of outliers, the most unusual first.
        pictures: WebPs of the records to show, by number.
        mean_picture: picture of the mean volume; None without records.
        problems: problems of damaged records, which have no row.
    """

    rows: pa.Table
    measures: dict[Measure, Numbers]
    ranking: Ranking
    outliers: npt.NDArray[np.int64]
    pictures: dict[int, bytes]
    mean_picture: bytes | None
    problems: tuple[str, ...]


def summarize(folder: str, num_pictures: int) -> Summary:
    """Read the sheets of a dataset."""
    rows, mean = _mean_volume(folder)
    measures = _measures(rows, _correlations(folder, mean))
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
        problems=problems,
    )


def _mean_volume(folder: str) -> tuple[pa.Table, npt.NDArray[np.float64]]:
    """The rows of all records, and the mean of their grids, each of mean 0 and deviation 1."""
    light = [name for name in SCHEMA.names if name not in _HEAVY]
    schema = pa.schema([SCHEMA.field(name) for name in light]).append(pa.field("split", pa.string()))
    tables, total = [schema.empty_table()], np.zeros(GRID**3)
    for split, table in read_sheets(folder, [*light, "grid"]):
        total += _standardized(table["grid"]).sum(0)
        tables.append(
            table.select(light).append_column("split", pa.array([split] * table.num_rows, pa.string()))
        )
    rows = pa.concat_tables(tables)
    return rows, total / max(rows.num_rows, 1)


def _correlations(folder: str, mean: npt.NDArray[np.float64]) -> Numbers:
    """Pearson's correlation of each record's grid with the mean volume; 0 for a volume without contrast."""
    direction = _unit_deviation(mean[np.newaxis])[0] / mean.size
    found = [_standardized(table["grid"]) @ direction for _, table in read_sheets(folder, ["grid"])]
    return np.concatenate([np.zeros(0), *found])


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


def _pictures(folder: str, shown: set[int]) -> dict[int, bytes]:
    pictures = dict[int, bytes]()
    start = 0
    for _, table in read_sheets(folder, ["picture"]):
        here = [number for number in range(start, start + table.num_rows) if number in shown]
        pictures |= {number: table["picture"][number - start].as_py() for number in here}
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
