"""`beam-nifti check`: a survey of a manifest's images on any runner.

Create([manifest])   str
CutRows              tuple of VolumeRow
Reshuffle            tuple of VolumeRow
LookAtImages         Tally; (what copies share, (example id, split)); of voxels, ImageFacts and CohortFacts
FindUnusual          Tally, of ImageFacts when all images are measured
WriteReport          one file
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import apache_beam as beam
from apache_beam.pvalue import AsList, AsSingleton, TaggedOutput

from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.outputs import read_result
from beam_nifti.pipeline.plan import CheckPlan, read_build_manifest
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.survey import Survey, Tally, make_report, survey_image
from beam_nifti.pipeline.voxel_survey import CohortFacts, Comparison, ImageFacts
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import keep_buffers
from beam_nifti.support.strict_json import dump_json
from beam_nifti.volume.user_function import load_functions

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

send_whole_elements()

_COPIES: Final = "copies"
_FACTS: Final = "facts"
_COHORT: Final = "cohort"

_FREE_BYTES: Final = 64 << 20
_ROW_BYTES: Final = 4 << 10
"""Most bytes of a report: a constant, and an amount per row, whose id it may name twice."""


class CutRows(beam.DoFn):
    """Cut a manifest into pieces of work."""

    def __init__(self, plan: CheckPlan) -> None:
        self._plan = plan

    def process(self, path: str) -> Iterable[tuple[VolumeRow, ...]]:
        """Yield its rows, some at a time."""
        config, build, step = self._plan.config, self._plan.build, self._plan.unit_rows
        manifest = read_build_manifest(path, config)
        kept, num_frames = manifest.kept_rows().tolist(), build.num_frames if build else None
        for start in range(0, len(kept), step):
            some = kept[start : start + step]
            yield tuple(manifest.rows(some, num_frames=num_frames, clip_frames=config.record.clip_frames))


class LookAtImages(beam.DoFn):
    """Read the headers of some images, and their voxels if the plan says so."""

    def __init__(self, plan: CheckPlan) -> None:
        self._folder, self._plan = storage.dirname(plan.config.manifest), plan
        self._progress = current_progress()

    def setup(self) -> None:
        """Import the user's functions, and prepare a thread."""
        if self._plan.voxels:
            load_functions(self._plan.config.record)
            keep_buffers()

    def process(self, rows: tuple[VolumeRow, ...]) -> Iterable[Any]:
        """Yield one Tally, and (what copies of an image share, (example id, split)).

        With voxels, also the ImageFacts of each image, and the CohortFacts of all.
        """
        survey, facts = Tally(), list[ImageFacts]()
        for row in rows:
            found, content, measured = survey_image(row, self._folder, self._plan)
            survey.add(found)
            self._progress.add(volumes=1 - found.bad.num, failed=found.bad.num)
            if content is not None:
                yield TaggedOutput(_COPIES, (content, (row.example_id, row.split)))
            if measured is not None and measured.facts is not None:
                facts.append(measured.facts)
                yield TaggedOutput(_FACTS, measured.facts)
        yield survey
        yield TaggedOutput(_COHORT, CohortFacts.of(facts))


def _add_up(surveys: Iterable[Tally]) -> Tally:
    total = Tally()
    for survey in surveys:
        total.add(survey)
    return total


def _add_cohorts(cohorts: Iterable[CohortFacts]) -> CohortFacts:
    total = CohortFacts()
    for cohort in cohorts:
        total.add(cohort)
    return total


def _find_unusual(image: ImageFacts, comparison: Comparison) -> Iterable[Tally]:
    for finding in comparison.findings(image):
        found = Tally()
        found.note(finding)
        yield found


def _several(group: tuple[str, Iterable[tuple[str, str]]]) -> Iterable[list[tuple[str, str]]]:
    copies = sorted(group[1])
    if len(copies) > 1:
        yield copies


def _write_report(
    survey: Tally,
    copies: Iterable[list[tuple[str, str]]],
    path: str,
    plan: CheckPlan,
    unusual: Tally | None = None,
) -> None:
    if unusual is not None:
        survey = _add_up([survey, unusual])
    report = make_report(survey, sorted(copies), plan)
    storage.write(path, dump_json(report, indent=2, ensure_ascii=False).encode() + b"\n")


def check_images(plan: CheckPlan, options: PipelineOptions, out: str | None = None) -> Survey:
    """Read the headers of a manifest's images, or their voxels too, and report what was found.

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
            | "LookAtImages"
            >> beam.ParDo(LookAtImages(plan)).with_outputs(_COPIES, _FACTS, _COHORT, main="surveys")
        )
        copies = (
            looked_at[_COPIES]
            | "GroupByKey" >> beam.GroupByKey()  # (what copies of an image share, (id, split)s)
            | "Several" >> beam.FlatMap(_several)  # (id, split)s
        )
        further = []
        if plan.voxels:
            comparison = (
                looked_at[_COHORT]
                | "AddCohorts" >> beam.CombineGlobally(_add_cohorts)  # CohortFacts
                | "Compare" >> beam.Map(Comparison.of)  # Comparison
            )
            unusual = (
                looked_at[_FACTS]
                | "FindUnusual" >> beam.FlatMap(_find_unusual, AsSingleton(comparison))  # Tally
                | "AddUnusual" >> beam.CombineGlobally(_add_up)  # Tally
            )
            further.append(AsSingleton(unusual))
        (
            looked_at.surveys
            | "AddUp" >> beam.CombineGlobally(_add_up)  # Tally
            | "WriteReport" >> beam.Map(_write_report, AsList(copies), path, plan, *further)
        )
        pipeline.run().wait_until_finish()
        return Survey(read_result(path, _FREE_BYTES + _ROW_BYTES * plan.num_rows), plan)
