"""What a cohort's images are, and what a build would make of them, by their headers alone."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from beam_nifti import storage
from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.grid import orientation_of
from beam_nifti.header import require_storable
from beam_nifti.image import image_files
from beam_nifti.manifest import VolumeRow
from beam_nifti.notes import TEXTS
from beam_nifti.plan import SHARD_BYTES, record_bytes, stored_itemsize
from beam_nifti.volume import load_header
from beam_nifti.wording import format_rows, size_text

MAX_PROBLEMS: Final = 1000
"""Images that a report names one by one; all are counted."""

_HEAD_BYTES: Final = 1 << 16
"""Of a file, by which suspected twins are told, together with its size."""

_PROCESS_BYTES: Final = 0.3e9
"""What a worker process takes before it loads anything. Source: docs/large-volumes.md."""

_COPIES: Final = 2
"""Of a volume that a thread holds at a time. Source: docs/large-volumes.md."""

_SHOWN: Final = 5
"""Lines of a kind that a table shows."""


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """An image that the build would leave out.

    Attributes:
        row: of the manifest, from 1.
        example_id: of its example.
        message: what is wrong, and what to do.
    """

    row: int
    example_id: str
    message: str


@dataclass
class Noted:
    """Images of a survey that have a note.

    Attributes:
        num_images: that have it.
        images: row and id of the first MAX_PROBLEMS of those.
    """

    num_images: int = 0
    images: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Noted) -> None:
        """Count what another survey has counted."""
        self.num_images += other.num_images
        self.images = sorted([*self.images, *other.images])[:MAX_PROBLEMS]


@dataclass
class Survey:
    """Counts over some images. Those of disjoint rows add up.

    Attributes:
        num_images: looked at.
        num_bad: that the build would leave out, as far as headers tell.
        problems: of the first MAX_PROBLEMS of those, by row.
        shapes: on disk, such as "91×109×91".
        spacings: voxel sizes, such as "2×2×2", to a thousandth.
        orientations: such as "RAS".
        dtypes: on disk.
        records: shapes of the records; "?" where headers cannot tell.
        frames: numbers of them an image, where each becomes a record.
        num_examples: records of the images that are not left out.
        source_bytes: of the files.
        record_bytes: that the records are expected to take in shards.
        largest_bytes: of the voxels of the largest volume, on disk or stored, uncompressed.
        notes: what a user should know of some images, by the keys of `notes.TEXTS`.
    """

    num_images: int = 0
    num_bad: int = 0
    problems: list[ImageProblem] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    spacings: Counter[str] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    num_examples: int = 0
    source_bytes: int = 0
    record_bytes: float = 0.0
    largest_bytes: int = 0
    notes: dict[str, Noted] = field(default_factory=dict)

    def add(self, other: Survey) -> None:
        """Count what another survey has counted."""
        self.num_images += other.num_images
        self.num_bad += other.num_bad
        self.problems = sorted([*self.problems, *other.problems], key=lambda p: p.row)[:MAX_PROBLEMS]
        self.num_examples += other.num_examples
        for name in ("shapes", "spacings", "orientations", "dtypes", "records", "frames"):
            getattr(self, name).update(getattr(other, name))
        self.source_bytes += other.source_bytes
        self.record_bytes += other.record_bytes
        self.largest_bytes = max(self.largest_bytes, other.largest_bytes)
        for note, noted in other.notes.items():
            self.notes.setdefault(note, Noted()).add(noted)


def look_at(row: VolumeRow, folder: str, record: RecordConfig) -> tuple[Survey, str | None]:
    """Look at one example: the first 64 KB of each of its files.

    Args:
        row: names them.
        folder: what a relative path is relative to.
        record: configuration of the records that a build would make.

    Returns:
        Its survey, of the first image where there are several; and what it shares with copies of it, None if
        it cannot be read.
    """
    found = Survey(num_images=1)
    try:
        # Frames that are not asked for are counted before they are refused.
        header = load_header(row, folder, replace(record, frames=record.frames or "all"))
        examined = [image_files(storage.join(folder, path)) for path in row.files]
        size = sum(storage.stat(file).size for files in examined for file in files)
        # The files of the voxels: headers of pairs are often alike.
        heads = [storage.read_head(files[-1], _HEAD_BYTES) for files in examined]
    except (OSError, VolumeError) as e:
        return _refused(found, row, str(e)), None
    found.notes = {note: Noted(1, [(row.row, row.example_id)]) for note in header.notes}
    found.shapes[size_text(header.shape)] = 1
    found.spacings[size_text(round(zoom, 3) for zoom in header.zooms)] = 1
    found.orientations[orientation_of(header.affine)] = 1
    found.dtypes[header.dtype_name] = 1
    found.source_bytes = size
    twin = f"{size}-{hashlib.sha256(b''.join(heads)).hexdigest()}"
    try:
        layout = require_storable(row.path, header, record)
    except VolumeError as e:
        return _refused(found, row, str(e)), twin
    shape = layout.stored_shape
    found.records["?" if shape is None else size_text(shape)] = 1
    voxels = math.prod(shape or layout.shape)
    itemsize = layout.dtype.itemsize
    found.num_examples = 1
    if layout.frame == "each":
        found.num_examples = header.num_frames
        found.frames[str(header.num_frames)] = 1
    found.record_bytes = found.num_examples * record_bytes(voxels, itemsize, record)
    on_disk = header.num_bytes * record.num_channels
    found.largest_bytes = max(voxels * stored_itemsize(record.voxel_dtype, itemsize), on_disk)
    return found, twin


def _refused(found: Survey, row: VolumeRow, message: str) -> Survey:
    found.num_bad = 1
    found.problems = [ImageProblem(row.row, row.example_id, message)]
    return found


def suggest_flags(survey: Survey, record: RecordConfig) -> list[str]:
    """Flags of `build` that would make the records of a cohort alike: its most frequent kinds.

    Args:
        survey: of all its images.
        record: the configuration that the survey was made with.
    """
    flags = []
    depths = {shape.split("×", 3)[3] if shape.count("×") > 2 else "1" for shape in survey.shapes}
    if record.frames in (None, "all") and len(depths) > 1:
        flags.append("--frames first")  # that is the same of each, however many it has
    elif record.frames is None and depths - {"1"}:
        flags.append("--frames all")
    if record.orientation is None and len(survey.orientations) > 1:
        flags.append(f"--orientation {_most_frequent(survey.orientations)}")
    if record.spacing is None and len(survey.spacings) > 1:
        flags.append(f"--spacing {_most_frequent(survey.spacings)}")
    grids = Counter[str]()
    for shape, count in (survey.shapes if "?" in survey.records else survey.records).items():
        grids["×".join(shape.split("×")[:3])] += count
    is_unlike = len(survey.records) > 1 and (len(grids) > 1 or "?" in survey.records)
    if record.shape is None and is_unlike:
        flags.append(f"--shape {_most_frequent(grids)}")
    return flags


def _most_frequent(counter: Counter[str]) -> str:
    return counter.most_common(1)[0][0].replace("×", ",")


def make_report(
    survey: Survey, twins: Sequence[Sequence[str]], record: RecordConfig, manifest: str
) -> dict[str, Any]:
    """What `beam-nifti check` says, as JSON.

    Args:
        survey: of all images.
        twins: ids of images that are probably one, in groups.
        record: the configuration that the survey was made with.
        manifest: its path.
    """
    facts = {
        name: dict(value.most_common()) if isinstance(value, Counter) else value
        for name, value in vars(survey).items()
    }
    num_shards = math.ceil(survey.record_bytes / SHARD_BYTES)
    return {
        "manifest": manifest,
        **facts,
        "problems": [asdict(problem) for problem in survey.problems],
        "notes": {
            note: {
                "message": text,
                "num_images": survey.notes[note].num_images,
                "images": [{"row": row, "example_id": name} for row, name in survey.notes[note].images],
            }
            for note, text in TEXTS.items()
            if note in survey.notes
        },
        "record_bytes": round(survey.record_bytes),
        "num_shards": num_shards,
        "worker_bytes": round(_PROCESS_BYTES + _COPIES * survey.largest_bytes),
        "twins": [list(group) for group in twins],
        "suggested_flags": suggest_flags(survey, record),
    }


def format_report(report: Mapping[str, Any], *, is_mixed: bool) -> str:
    """A report as text for the screen.

    Args:
        report: of `make_report`.
        is_mixed: whether a build would leave out images for being unlike the first one.
    """
    return format_rows(_report_rows(report, is_mixed), 14)


def _report_rows(r: Mapping[str, Any], is_mixed: bool) -> Iterator[tuple[str, str]]:
    yield "images", f"{r['num_images']:,} in {r['source_bytes'] / 1e6:,.1f} MB: {r['manifest']}"
    for title, name in (
        ("shapes", "shapes"),
        ("spacings, mm", "spacings"),
        ("orientations", "orientations"),
        ("dtypes", "dtypes"),
        ("records", "records"),
        ("frames", "frames"),
    ):
        yield from _listed(title, [f"{kind}: {count:,}" for kind, count in r[name].items()])
    if is_mixed:
        yield "", "a build leaves out those that are unlike the first image"
    bad = [f"row {p['row']} ({p['example_id']}): {p['message']}" for p in r["problems"]]
    yield from _listed("left out", bad, r["num_bad"])
    for noted in r["notes"].values():
        yield (
            "warning",
            f"{noted['num_images']:,} image{'s' * (noted['num_images'] != 1)}: {noted['message']}",
        )
        named = [f"row {image['row']} ({image['example_id']})" for image in noted["images"]]
        yield from _listed("", named, noted["num_images"])
    yield from _listed("same twice?", [" = ".join(group) for group in r["twins"]])
    shards = f"{r['num_shards']:,} shard{'s' * (r['num_shards'] != 1)}"
    yield "would make", f"{r['num_examples']:,} examples, {shards}, {r['record_bytes'] / 1e6:,.1f} MB"
    yield "memory", f"about {r['worker_bytes'] / 1e9:.1f} GB for a worker of one thread"
    if r["suggested_flags"]:
        yield "to make alike", " ".join(["add", *r["suggested_flags"]])


def _listed(title: str, lines: Sequence[str], total: int | None = None) -> Iterator[tuple[str, str]]:
    total = len(lines) if total is None else total
    for number, line in enumerate(lines[:_SHOWN]):
        yield "" if number else title, line
    if total > _SHOWN:
        yield "", f"and {total - _SHOWN:,} more"
