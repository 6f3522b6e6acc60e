"""`beam-nifti report`: reads every record of a dataset, on any runner, and makes a page.

Create([output])     str
CutShards            (number, split, ShardInfo)
Reshuffle            (number, split, ShardInfo)
LookAtShard          nothing: workers write sheets, files of some rows each

Then this process reads the sheets, one at a time.
"""

from __future__ import annotations

import difflib
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import pyarrow as pa

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.inspection.problems import Problems, Scope
from beam_nifti.inspection.record_checks import RecordSpec
from beam_nifti.inspection.shard_pass import ShardPass, StoredRecord
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.outputs import require_apart
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo, read_info
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.reporting.appearance import look_at_record
from beam_nifti.reporting.copies import CopiedImage
from beam_nifti.reporting.page import make_page
from beam_nifti.reporting.sheets import write_problems, write_sheets
from beam_nifti.reporting.summary import read_failures, summarize
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import keep_buffers

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

send_whole_elements()


def _cut_shards(output: str) -> Iterable[tuple[int, str, ShardInfo]]:
    """The shards of a dataset, each with its number and split."""
    numbers = itertools.count()
    for split, found in read_info(output).splits.items():
        yield from ((next(numbers), split, shard) for shard in found.shards)


class LookAtShard(beam.DoFn):
    """Read a shard once, check its bytes, and write down what its records look like."""

    def __init__(self, output: str, spec: RecordSpec, folder: str, by: str | None) -> None:
        self._output, self._spec, self._folder, self._by = output, spec, folder, by
        self._progress = current_progress()

    def setup(self) -> None:
        """Reuse the buffers of one record for the next."""
        keep_buffers()

    def process(self, element: tuple[int, str, ShardInfo]) -> None:
        """Hold one record at a time, and a sheet."""
        number, split, shard = element
        problems = Problems()
        records = ShardPass(self._output, shard, split, number, self._spec, problems)
        write_sheets(self._folder, number, split, self._rows(records, problems, number))
        write_problems(self._folder, number, problems.texts())

    def _rows(self, records: ShardPass, problems: Problems, number: int) -> Iterator[dict[str, Any]]:
        while (record := records.take()) is not None:
            row = self._look_at(record, problems, number)
            self._progress.add(volumes=1, num_bytes=len(record.data))
            if row is not None:
                yield row

    def _look_at(self, record: StoredRecord, problems: Problems, number: int) -> dict[str, Any] | None:
        wrong = list[str]()
        payload = record.check(self._spec, wrong.append)
        for problem in wrong:
            problems.add(Scope.RECORD, f"{record.name}: {problem}", number, record.ordinal)
        if wrong or payload is None:
            return None
        return look_at_record(payload, record.cells, self._spec, self._by)


@dataclass(frozen=True, repr=False)
class ReportSummary:
    """Summary of a report.

    Attributes:
        num_examples: records shown.
        num_outliers: outliers among them.
        num_failures: volumes that failed in the build.
        num_skipped: rows that were skipped because they lack a label or a mask.
        copies: pairs of records that have the same image, or nearly the same one, those in different splits
            first; at most 500 of these, and 500 of those in one split.
        num_leaks: number of all pairs in different splits.
        problems: one sentence per problem; none for a sound dataset.
        num_bytes: size of the page.
    """

    num_examples: int
    num_outliers: int
    num_failures: int
    num_skipped: int
    copies: tuple[CopiedImage, ...]
    num_leaks: int
    problems: tuple[str, ...]
    num_bytes: int

    def __repr__(self) -> str:
        found = {"examples": self.num_examples, "outliers": self.num_outliers, "copies": len(self.copies)}
        counts = ", ".join(f"{count:,} {name}" for name, count in found.items())
        return f"<ReportSummary: {counts}, {len(self.problems):,} problems>"

    def reworded(self, words: Callable[[str], str]) -> ReportSummary:
        """A copy with every sentence changed by a function."""
        return replace(self, problems=tuple(map(words, self.problems)))


def write_report(
    output: str,
    info: DatasetInfo,
    out: str,
    options: PipelineOptions,
    *,
    num_pictures: int,
    by: str | None = None,
) -> ReportSummary:
    """Write a page about all records of a dataset.

    Arguments and errors are those of `beam_nifti.report`; `options` are Beam's.
    """
    output, out = storage.absolute(output), storage.absolute(out)
    spec = RecordSpec(info)
    if by is not None:
        _require_column(by, output, info)
    require_apart(out, "--out")
    storage.require_writable(out, "--out")
    failures = read_failures(output, info)
    folder = f"{out}.{uuid.uuid4().hex}.tmp"
    try:
        _look_at_shards(output, spec, folder, options, by)
        summary = summarize(folder, num_pictures)
    finally:
        storage.delete_tree(folder, storage.dirname(out))
    page = make_page(output.rpartition("/")[2], info, spec, summary, failures, by).encode()
    storage.write(out, page)
    return ReportSummary(
        num_examples=summary.rows.num_rows,
        num_outliers=len(summary.outliers),
        num_failures=info.num_failures,
        num_skipped=info.num_skipped,
        copies=(*summary.copies.across, *summary.copies.within),
        num_leaks=summary.copies.num_across,
        problems=summary.problems,
        num_bytes=len(page),
    )


def _require_column(by: str, output: str, info: DatasetInfo) -> None:
    """Refuse a column by which records cannot be grouped, by the first index that can be read."""
    for shard in info.shards:
        try:
            schema = read_shard_index(output, info, shard).schema
        except DatasetError:
            continue  # which the pass over its shard reports
        names = [field.name for field in schema if not pa.types.is_list(field.type)]
        if by not in names:
            close = difflib.get_close_matches(by, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(sorted(names))}"
            raise UsageError(
                f"--by is {by!r}, which is no column of the index with one value per record; {hint}"
            )
        return


def _look_at_shards(
    output: str, spec: RecordSpec, folder: str, options: PipelineOptions, by: str | None
) -> None:
    pipeline = beam.Pipeline(options=options)
    (
        pipeline
        | "Create" >> beam.Create([output], reshuffle=False)  # str
        | "CutShards" >> beam.FlatMap(_cut_shards)  # (number, split, ShardInfo)
        | "Reshuffle" >> beam.Reshuffle()  # (number, split, ShardInfo)
        | "LookAtShard" >> beam.ParDo(LookAtShard(output, spec, folder, by))  # nothing
    )
    pipeline.run().wait_until_finish()
