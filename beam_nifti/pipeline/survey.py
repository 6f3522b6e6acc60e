"""The kinds of images, and what a build would make of them: from headers, and from voxels if wanted."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from beam_nifti.config import LEAST_COMPARED, RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.manifest.redaction import redacting
from beam_nifti.pipeline.advice import ImageKind, suggest_flags, tally
from beam_nifti.pipeline.failures import accepting_fraction
from beam_nifti.pipeline.plan import CheckPlan, record_bytes, stored_itemsize
from beam_nifti.pipeline.voxel_survey import TEXTS as VOXEL_TEXTS
from beam_nifti.pipeline.voxel_survey import Finding, MeasuredImage, measure_image
from beam_nifti.storage import paths as storage
from beam_nifti.support.document import Document
from beam_nifti.support.wording import bytes_text, counted, format_rows, size_text
from beam_nifti.volume.files import image_files, reading
from beam_nifti.volume.header import RecordLayout, VolumeHeader, require_frames, require_storable
from beam_nifti.volume.notes import TEXTS, of_unmapped
from beam_nifti.volume.volume import load_header

MAX_PROBLEMS: Final = 1000
"""Images that a report names one by one; all are counted."""

_HEAD_BYTES: Final = 1 << 16  # of a file, by which suspected copies are told, together with its size
_PROCESS_BYTES: Final = 0.3e9
"""What a worker process takes before it loads anything. Source: docs/large-volumes.md."""

_COPIES: Final = 2
"""Copies of a volume that a thread holds at a time. Source: docs/large-volumes.md."""

_SHOWN: Final = 5  # lines of a kind that a table shows
_FACTS: Final[Mapping[str, Callable[[ImageKind], str]]] = {
    "shapes": lambda kind: size_text(kind.shape),
    "spacings": lambda kind: size_text(kind.zooms),
    "orientations": lambda kind: kind.orientation,
    "dtypes": lambda kind: kind.dtype_name,
}
"""What a report counts of the kinds of images, such as "91×109×91", "2×2×2", "RAS" and "int16"."""


class NamedImage(NamedTuple):
    """An image that a report names, by its row from 1, and what is wrong with it."""

    row: int
    example_id: str
    message: str = ""


@dataclass
class NamedImages:
    """Images of a survey that have something in common; the first MAX_PROBLEMS of them, by row, are named."""

    num: int = 0
    first: list[NamedImage] = field(default_factory=list)

    def add(self, other: NamedImages) -> None:
        """Count what another tally has counted."""
        self.num += other.num
        self.first = sorted([*self.first, *other.first])[:MAX_PROBLEMS]


@dataclass
class Tally:
    """Counts over some images. Those of disjoint rows add up.

    Attributes:
        num_images: all images.
        bad: images of which the build would skip a record, as far as is known.
        num_failed: records that it would skip.
        kinds: kinds on disk of the first images of examples, also of those that other options would accept.
        first: the first image of each kind.
        records: shapes of the records of the same images; "?" if headers do not determine them.
        frames: numbers of frames of the same images, if each becomes a record.
        num_measured: images whose voxels were compared with those of others.
        num_examples: records of the images that would not fail.
        splits: records of each split.
        source_bytes: size of the files.
        record_bytes: expected size of the records in shards.
        largest_bytes: size of the voxels of the largest volume, on disk or stored, uncompressed.
        notes: what a user should know of some images, by the keys of `notes.TEXTS` and `voxel_survey.TEXTS`.
        mapped_labels: labels of measured masks that were mapped to others.
    """

    num_images: int = 0
    bad: NamedImages = field(default_factory=NamedImages)
    num_failed: int = 0
    num_measured: int = 0
    kinds: Counter[ImageKind] = field(default_factory=Counter)
    first: dict[ImageKind, NamedImage] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    num_examples: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    source_bytes: int = 0
    record_bytes: float = 0.0
    largest_bytes: int = 0
    notes: dict[str, NamedImages] = field(default_factory=dict)
    mapped_labels: set[int] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        """Count what another tally has counted."""
        self.num_images += other.num_images
        self.bad.add(other.bad)
        self.num_failed += other.num_failed
        self.num_measured += other.num_measured
        self.num_examples += other.num_examples
        for name in ("kinds", "records", "frames", "splits"):
            getattr(self, name).update(getattr(other, name))
        for kind, image in other.first.items():
            self.first[kind] = min(self.first.get(kind, image), image)
        self.source_bytes += other.source_bytes
        self.record_bytes += other.record_bytes
        self.largest_bytes = max(self.largest_bytes, other.largest_bytes)
        self.mapped_labels |= other.mapped_labels
        for note, images in other.notes.items():
            self.notes.setdefault(note, NamedImages()).add(images)

    def note(self, found: Finding) -> None:
        """Count an image that has a note."""
        image = NamedImage(found.row, found.example_id, found.message)
        self.notes.setdefault(found.key, NamedImages()).add(NamedImages(1, [image]))


def survey_image(
    row: VolumeRow, folder: str, plan: CheckPlan
) -> tuple[Tally, str | None, MeasuredImage | None]:
    """Look at one example: the first 64 KB of each of its files, and their voxels if the plan says so.

    Returns:
        Its survey, of the first image if there are several; what it shares with copies of it, None if it
        cannot be read; and what was measured of its voxels, if they were read.

    Raises:
        OSError: the disk, the network or a store failed, which does not concern the image.
    """
    found, record = Tally(num_images=1), plan.config.record
    header = measured = None
    try:
        with redacting(row, folder):
            header = _require_usable(row, folder, plan)
    except VolumeError as e:
        found.bad = NamedImages(1, [NamedImage(row.row, row.example_id, str(e))])
        found.num_failed = len(row.positions)
    if header is not None and plan.build is not None and plan.voxels:
        measured = measure_image(row, folder, header, plan.build)
        found.num_failed = measured.num_failed
        found.mapped_labels = set(measured.mapped_labels)
        found.num_measured = int(measured.facts is not None)
        if measured.problem:
            found.bad = NamedImages(1, [NamedImage(row.row, row.example_id, measured.problem)])
    try:
        with redacting(row, folder), reading(row.path):
            # An image that the build would make with other options counts too.
            header = header or load_header(row, folder, record, is_any=True)
            examined = [image_files(storage.join(folder, path)) for path in row.existing_files]
            found.source_bytes = sum(storage.stat(file).size for files in examined for file in files)
            # The files of the voxels: headers of pairs are often alike.
            heads = [storage.read_head(files[-1], _HEAD_BYTES) for files in examined]
    except VolumeError:
        if found.bad.num:
            return found, None, measured
        raise
    content = f"{found.source_bytes}-{hashlib.sha256(b''.join(heads)).hexdigest()}"
    image, kind = NamedImage(row.row, row.example_id), ImageKind.of(header)
    notes = measured.notes if measured and measured.num_volumes else header.notes
    found.notes = {note: NamedImages(1, [image]) for note in notes}
    for finding in measured.findings if measured else ():
        found.note(finding)
    found.kinds[kind], found.first[kind] = 1, image
    with contextlib.suppress(VolumeError):
        layout = require_storable(row.path, header, record)
        _count_records(found, header, layout, record, measured)
        found.splits[row.split] = found.num_examples
    return found, content, measured


def _require_usable(row: VolumeRow, folder: str, plan: CheckPlan) -> VolumeHeader:
    """Refuse an image that the build would refuse by its header."""
    record, build = plan.config.record, plan.build
    if build is None:
        return load_header(row, folder, record)
    header = load_header(row, folder, record, build.required_shape, build.required_dtype)
    if record.splits_frames:
        require_frames(row.path, header, build.num_frames, record)
    return header


def _count_records(
    found: Tally,
    header: VolumeHeader,
    layout: RecordLayout,
    record: RecordConfig,
    measured: MeasuredImage | None,
) -> None:
    """Count the records of an image, whether or not they match those of others."""
    shape, itemsize = (measured and measured.shape) or layout.stored_shape, layout.dtype.itemsize
    voxels = math.prod(shape or layout.shape)
    found.records["?" if shape is None else size_text(shape)] = 1
    if layout.frame == "each":
        found.frames[str(header.num_frames)] = 1
    if measured:
        found.num_examples = measured.num_volumes
    elif not found.bad.num:
        found.num_examples = header.num_frames // record.clip_frames if layout.frame == "each" else 1
    if not found.num_examples:
        return
    each = record_bytes(voxels, itemsize, record)
    found.record_bytes = found.num_examples * each
    on_disk = header.num_bytes * record.num_channels
    found.largest_bytes = max(voxels * stored_itemsize(record.voxel_dtype, itemsize), on_disk)


def make_report(
    survey: Tally, copies: Sequence[Sequence[tuple[str, str]]], plan: CheckPlan
) -> dict[str, Any]:
    """What `beam-nifti check` reports, as JSON.

    `copies` are the ids and splits of images that are probably one, in groups.
    """
    build = plan.build
    kinds = {kind: survey.kinds[kind] for kind in sorted(survey.first, key=lambda kind: survey.first[kind])}
    advice = suggest_flags(kinds, plan.config.record)
    not_suggested = None
    if advice.against is not None:
        image = _reference(survey.first[advice.against])
        not_suggested = {"flags": advice.dropped, **image, "reason": advice.reason}
    return {
        "manifest": plan.config.manifest,
        "num_images": survey.num_images,
        "voxels": plan.voxels,
        "num_bad": survey.bad.num,
        "num_failed": survey.num_failed,
        "problems": [image._asdict() for image in survey.bad.first],
        "records": dict(survey.records.most_common()),
        "frames": dict(survey.frames.most_common()),
        "num_examples": survey.num_examples if build else 0,
        "splits": {name: survey.splits[name] for name in build.split_sizes} if build else {},
        "source_bytes": survey.source_bytes,
        "record_bytes": round(survey.record_bytes) if build else 0,
        "largest_bytes": survey.largest_bytes,
        "notes": {
            note: {"message": text, "num_images": of.num, "images": [*map(_reference, of.first)]}
            for note, text in {**TEXTS, **VOXEL_TEXTS}.items()
            if (of := survey.notes.get(note))
        },
        **_not_compared(survey, plan),
        **_unmapped(survey, plan),
        **{name: dict(tally(survey.kinds, fact).most_common()) for name, fact in _FACTS.items()},
        "num_shards": build.num_shards if build else 0,
        **_measured_first(survey, plan),
        "worker_bytes": round(_PROCESS_BYTES + _COPIES * survey.largest_bytes),
        "twins": [[name for name, _ in group] for group in copies],
        "twins_across_splits": [dict(group) for group in copies if len({split for _, split in group}) > 1],
        "suggested_flags": advice.flags,
        "not_suggested": not_suggested,
    }


def _not_compared(survey: Tally, plan: CheckPlan) -> dict[str, str]:
    """That too few images were measured to compare them, if so."""
    if not plan.voxels or plan.build is None or survey.num_measured >= LEAST_COMPARED:
        return {}
    what = "size or voxel size" if survey.num_examples >= LEAST_COMPARED else "image"  # many frames each
    images = counted(survey.num_measured, "image", "are")
    return {"not_compared": f"no {what} is called unusual: {images} too few, {LEAST_COMPARED} are required"}


def _unmapped(survey: Tally, plan: CheckPlan) -> dict[str, list[int]]:
    """The labels that would become others, but that no measured mask has."""
    record = plan.config.record
    if not plan.voxels or plan.build is None or record.map_labels is None:
        return {}
    return {"unmapped_labels": sorted(record.label_map.keys() - survey.mapped_labels)}


def _measured_first(survey: Tally, plan: CheckPlan) -> dict[str, Any]:
    """What a build measures before its records, if its output holds no statistics."""
    record = plan.config.record
    if plan.build is None or not record.is_of_cohort or record.rescale_stats is not None:
        return {}
    splits = record.measured_splits
    return {"measured": {"splits": list(splits), "num_volumes": sum(survey.splits[s] for s in splits)}}


def _reference(image: NamedImage) -> dict[str, Any]:
    message = {"message": image.message} if image.message else {}
    return {"row": image.row, "example_id": image.example_id, **message}


class Survey(Document):
    """The kinds of images, and what a build would make of them; `print(survey)` shows it as a table.

    Its items are those of `beam-nifti check --json`, whose texts name flags.

    Attributes:
        problems: a sentence for each of the first images that would fail.
        refusal: why the build would write nothing; "" if it would write a dataset.
        ok: whether the build would be complete, as far as headers show, or voxels if they were read; also the
            truth value of the survey.
    """

    def __init__(self, facts: Mapping[str, Any], plan: CheckPlan) -> None:
        super().__init__(facts)
        self.problems = tuple(map(_problem_text, facts["problems"]))
        self.refusal = plan.refusal
        self._words: Callable[[str], str] = str
        total = facts["num_failed"] + facts["num_examples"]
        self.ok = not plan.refusal and plan.config.allows_failures(facts["num_failed"], total)

    def reworded(self, words: Callable[[str], str]) -> Survey:
        """The survey with its sentences and its table changed; the items stay those of the JSON."""
        survey = copy.copy(self)
        survey.problems, survey.refusal = tuple(map(words, self.problems)), words(self.refusal)
        survey._words = words
        return survey

    def __bool__(self) -> bool:
        """Whether the build would be complete."""
        return self.ok

    def __repr__(self) -> str:
        """On one line."""
        images, examples = counted(self["num_images"], "image"), counted(self["num_examples"], "example")
        manifest = self._words(self["manifest"])
        return f"<Survey of {manifest}: {images}, {self['num_bad']:,} would fail, {examples}>"

    def __str__(self) -> str:
        """As a table."""
        return self._words(format_report(self, accept=not (self.ok or self.refusal)))


def format_report(report: Mapping[str, Any], *, accept: bool = False) -> str:
    """A report of `make_report` as text for the screen; with `accept`, how to accept the failures."""
    return format_rows(_report_rows(report, accept), 14)


def _report_rows(r: Mapping[str, Any], accept: bool) -> Iterator[tuple[str, str]]:
    yield "images", f"{r['num_images']:,} in {bytes_text(r['source_bytes'])}: {r['manifest']}"
    for name in (*_FACTS, "records", "frames"):
        title = "spacings, mm" if name == "spacings" else name
        yield from _listed(title, [f"{kind}: {count:,}" for kind, count in r[name].items()])
    if "?" in r["records"]:
        yield "", "?: headers do not determine the shape after --preprocess or --crop-foreground"
    bad = [*map(_problem_text, r["problems"])]
    yield from _listed("would fail", bad, r["num_bad"])
    if accept:
        failed, total = r["num_failed"], r["num_failed"] + r["num_examples"]
        yield "", f"--max-bad-fraction {accepting_fraction(failed, total)} accepts them"
    for noted in r["notes"].values():
        yield "warning", f"{counted(noted['num_images'], 'image')}: {noted['message']}"
        named = [_named(image) for image in noted["images"]]
        yield from _listed("", named, noted["num_images"])
    if unmapped := r.get("unmapped_labels"):
        yield "warning", of_unmapped(unmapped)
    if "not_compared" in r:
        yield "not compared", r["not_compared"]
    yield from _listed("duplicates?", [" = ".join(group) for group in r["twins"]])
    across = (" = ".join(f"{name} ({split})" for name, split in g.items()) for g in r["twins_across_splits"])
    yield from _listed("in two splits", list(across))
    examples, shards = counted(r["num_examples"], "example"), counted(r["num_shards"], "shard")
    yield "would make", f"{examples}, {shards}, {bytes_text(r['record_bytes'])}"
    if len(r["splits"]) > 1:
        yield "splits", ", ".join(f"{name} {count:,}" for name, count in r["splits"].items())
    if measured := r.get("measured"):
        volumes = counted(measured["num_volumes"], "volume")
        yield (
            "measure first",
            f"{volumes} of {', '.join(measured['splits'])}, unless the output has statistics",
        )
    yield "memory", f"about {bytes_text(r['worker_bytes'])} for a worker of one thread"
    if r["suggested_flags"]:
        yield "suggestion", " ".join(["use", *r["suggested_flags"]])
    if (found := r["not_suggested"]) and found["flags"]:
        image = _named(found)
        yield "not suggested", f"{' '.join(found['flags'])}, with which {image} {found['reason']}"


def _named(image: Mapping[str, Any]) -> str:
    message = f": {image['message']}" if "message" in image else ""
    return f"row {image['row']} ({image['example_id']}){message}"


def _problem_text(problem: Mapping[str, Any]) -> str:
    """What is wrong with an image; its path is not repeated where it is the id."""
    example_id = problem["example_id"]
    return f"row {problem['row']} ({example_id}): {problem['message'].removeprefix(f'{example_id}: ')}"


def _listed(title: str, lines: Sequence[str], total: int | None = None) -> Iterator[tuple[str, str]]:
    total = len(lines) if total is None else total
    for number, line in enumerate(lines[:_SHOWN]):
        yield "" if number else title, line
    if total > _SHOWN:
        yield "", f"and {total - _SHOWN:,} more"
