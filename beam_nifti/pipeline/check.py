"""`beam-nifti check`: a survey of a manifest's images on any runner.

Create([manifest])   str
CutRows              tuple of VolumeRow
Reshuffle            tuple of VolumeRow
LookAtImages         Tally, and (signature of an image, (example id, split))
WriteReport          one file
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import apache_beam as beam
from apache_beam.pvalue import AsList, TaggedOutput

from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.outputs import read_result
from beam_nifti.pipeline.plan import CheckPlan, read_build_manifest
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.survey import Survey, Tally, make_report, survey_image
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

send_whole_elements()

_ROWS_AT_A_TIME: Final = 256
_COPIES: Final = "copies"

_FREE_BYTES: Final = 64 << 20
_ROW_BYTES: Final = 4 << 10
"""Most bytes of a report: a constant, and an amount per row, whose id it may name twice."""


class CutRows(beam.DoFn):
    """Cut a manifest into pieces of work."""

    def __init__(self, plan: CheckPlan) -> None:
        self._config = plan.config

    def process(self, path: str) -> Iterable[tuple[VolumeRow, ...]]:
        """Yield its rows, some at a time."""
        manifest = read_build_manifest(path, self._config)
        kept = manifest.kept_rows().tolist()
        for start in range(0, len(kept), _ROWS_AT_A_TIME):
            yield tuple(manifest.rows(kept[start : start + _ROWS_AT_A_TIME]))


class LookAtImages(beam.DoFn):
    """Read the headers of some images."""

    def __init__(self, plan: CheckPlan) -> None:
        self._folder, self._plan = storage.dirname(plan.config.manifest), plan
        self._progress = current_progress()

    def process(self, rows: tuple[VolumeRow, ...]) -> Iterable[Any]:
        """Yield one Tally; and (what copies of an image share, (example id, split))."""
        survey = Tally()
        for row in rows:
            found, content = survey_image(row, self._folder, self._plan)
            survey.add(found)
            self._progress.add(volumes=1 - found.bad.num, failed=found.bad.num)
            if content is not None:
                yield TaggedOutput(_COPIES, (content, (row.example_id, row.split)))
        yield survey


def _add_up(surveys: Iterable[Tally]) -> Tally:
    total = Tally()
    for survey in surveys:
        total.add(survey)
    return total


def _several(group: tuple[str, Iterable[tuple[str, str]]]) -> Iterable[list[tuple[str, str]]]:
    copies = sorted(group[1])
    if len(copies) > 1:
        yield copies


def _write_report(survey: Tally, copies: Iterable[list[tuple[str, str]]], path: str, plan: CheckPlan) -> None:
    report = make_report(survey, sorted(copies), plan)
    storage.write(path, dump_json(report, indent=2, ensure_ascii=False).encode() + b"\n")


def check_images(plan: CheckPlan, options: PipelineOptions, out: str | None = None) -> Survey:
    """Read the headers of a manifest's images, and report what was found.

    Args:
        plan: plan of the build that would contain them.
        options: Beam's.
        out: file of the report, within the workers' reach; None where they are this process.
    """
    with ExitStack() as stack:
        path = out or f"{stack.enter_context(tempfile.TemporaryDirectory())}/report.json"
        pipeline = beam.Pipeline(options=options)
        looked_at = (
            pipeline
            | "Create" >> beam.Create([plan.config.manifest], reshuffle=False)  # str
            | "CutRows" >> beam.ParDo(CutRows(plan))  # tuple of VolumeRow
            | "Reshuffle" >> beam.Reshuffle()  # tuple of VolumeRow
            | "LookAtImages" >> beam.ParDo(LookAtImages(plan)).with_outputs(_COPIES, main="surveys")
        )
        copies = (
            looked_at[_COPIES]
            | "GroupByKey" >> beam.GroupByKey()  # (what copies of an image share, (id, split)s)
            | "Several" >> beam.FlatMap(_several)  # (id, split)s
        )
        (
            looked_at.surveys
            | "AddUp" >> beam.CombineGlobally(_add_up)  # Tally
            | "WriteReport" >> beam.Map(_write_report, AsList(copies), path, plan)
        )
        pipeline.run().wait_until_finish()
        return Survey(read_result(path, _FREE_BYTES + _ROW_BYTES * plan.num_rows), plan)
