"""`beam-nifti check`: a survey of a manifest's images on any runner.

Create([manifest])   str
CutRows              tuple of VolumeRow
Reshuffle            tuple of VolumeRow
LookAtImages         Survey, and (what twins share, example id)
WriteReport          one file
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, cast

import apache_beam as beam
from apache_beam.pvalue import AsList, TaggedOutput

from beam_nifti import storage
from beam_nifti.config import Columns, RecordConfig
from beam_nifti.local_runner import whole_elements
from beam_nifti.manifest import VolumeRow, read_manifest
from beam_nifti.progress import METER
from beam_nifti.strict_json import dump_json
from beam_nifti.survey import Survey, look_at, make_report

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

_ROWS_AT_A_TIME: Final = 256
_TWINS: Final = "twins"


class CutRows(beam.DoFn):
    """Cut a manifest into pieces of work."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def process(self, path: str) -> Iterable[tuple[VolumeRow, ...]]:
        """Yield its rows, some at a time."""
        manifest = read_manifest(path, self._columns)
        kept = manifest.kept_rows().tolist()
        for start in range(0, len(kept), _ROWS_AT_A_TIME):
            yield tuple(manifest.rows(kept[start : start + _ROWS_AT_A_TIME]))


class LookAtImages(beam.DoFn):
    """Read the headers of some images."""

    def __init__(self, folder: str, record: RecordConfig) -> None:
        self._folder, self._record = folder, record

    def process(self, rows: tuple[VolumeRow, ...]) -> Iterable[Any]:
        """Yield one Survey; and (what twins share, example id)."""
        survey = Survey()
        for row in rows:
            found, twin = look_at(row, self._folder, self._record)
            survey.add(found)
            METER.add(volumes=1 - found.num_bad, failed=found.num_bad)
            if twin is not None:
                yield TaggedOutput(_TWINS, (twin, row.example_id))
        yield survey


def _add_up(surveys: Iterable[Survey]) -> Survey:
    total = Survey()
    for survey in surveys:
        total.add(survey)
    return total


def _several(group: tuple[str, Iterable[str]]) -> Iterable[list[str]]:
    ids = sorted(group[1])
    if len(ids) > 1:
        yield ids


def _write_report(
    survey: Survey, twins: Iterable[list[str]], path: str, record: RecordConfig, manifest: str
) -> None:
    report = make_report(survey, sorted(twins), record, manifest)
    storage.write(path, dump_json(report, indent=2, ensure_ascii=False).encode() + b"\n")


def check_images(
    manifest: str,
    columns: Columns,
    record: RecordConfig,
    options: PipelineOptions,
    out: str | None = None,
) -> dict[str, Any]:
    """Read the headers of a manifest's images.

    Args:
        manifest: its absolute path or URL.
        columns: which of its columns mean what.
        record: configuration of the records that a build would make.
        options: Beam's.
        out: file of the report, within the workers' reach; None where they are this process.

    Returns:
        `survey.make_report`.
    """
    with ExitStack() as stack:
        stack.enter_context(whole_elements())
        path = out or f"{stack.enter_context(tempfile.TemporaryDirectory())}/report.json"
        pipeline = beam.Pipeline(options=options)
        looked_at = (
            pipeline
            | "Create" >> beam.Create([manifest], reshuffle=False)  # str
            | "CutRows" >> beam.ParDo(CutRows(columns))  # tuple of VolumeRow
            | "Reshuffle" >> beam.Reshuffle()  # tuple of VolumeRow
            | "LookAtImages"
            >> beam.ParDo(LookAtImages(storage.dirname(manifest), record)).with_outputs(
                _TWINS, main="surveys"
            )
        )
        twins = (
            looked_at[_TWINS]
            | "GroupByKey" >> beam.GroupByKey()  # (what twins share, ids)
            | "Several" >> beam.FlatMap(_several)  # ids
        )
        (
            looked_at.surveys
            | "AddUp" >> beam.CombineGlobally(_add_up)  # Survey
            | "WriteReport" >> beam.Map(_write_report, AsList(twins), path, record, manifest)
        )
        pipeline.run().wait_until_finish()
        return cast(dict[str, Any], json.loads(storage.read(path)))
