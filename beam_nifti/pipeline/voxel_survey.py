"""What `beam-nifti check --voxels` finds besides: volumes unlike the others, and voxels that tell nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from beam_nifti.config import FAR, LEAST_COMPARED, RecordConfig, is_far
from beam_nifti.errors import VolumeError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.manifest.redaction import redacting
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.support.wording import counted, first_few
from beam_nifti.volume.cohort import EMPTY, Histogram, measure_volume
from beam_nifti.volume.grid import orientation_of
from beam_nifti.volume.header import VolumeHeader
from beam_nifti.volume.notes import join_notes
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.rescale import Scaling
from beam_nifti.volume.volume import (
    Volume,
    images_of,
    load_frames,
    load_volume,
    measure_target,
    rescale_volume,
)

_LEAST_SPREAD: Final = 0.05
"""Interquartile range of sizes that is assumed at least, as a part of their median: most are often equal."""

_RARE: Final = 100
"""A label is rare if at most one mask in so many has it."""

_SHOWN: Final = 10  # labels in a message
_SIZES: Final = frozenset({"unusual-size", "unusual-spacing"})
_AXES: Final = {"left-right": "LR", "posterior-anterior": "PA", "inferior-superior": "IS"}

_FAR: Final = f"is more than {FAR} interquartile ranges from the quartiles of all"
TEXTS: Final = {
    "unusual-intensity": (
        f"the mean of the voxels {_FAR} volumes; look for other units or another kind of image"
    ),
    "unusual-size": f"the field of view {_FAR} images",
    "unusual-spacing": f"the voxel size {_FAR} images",
    "unusual-target": (
        f"the mean of the target {_FAR} targets; look for other units or another kind of image"
    ),
    "constant": "all voxels are equal",
    "constant-target": "all voxels of the target are equal",
    "nonfinite": "voxels are NaN or infinite; --nonfinite replaces them",
    "empty-mask": "no voxel of the mask has a label other than 0",
    "rare-label": (
        f"the mask has labels that at most one in {_RARE} masks has; if they are wrong, replace them with "
        "--map-labels"
    ),
}
"""A sentence for each finding, as `notes.TEXTS`."""

Measure: TypeAlias = tuple[str, str]
"""Key of the finding that a strange value is, and the channel or the axis that it is of."""

Value: TypeAlias = tuple[str, Measure, float]
"""Id of an example, what was measured of it, and the number."""


class Finding(NamedTuple):
    """A finding, by its key in TEXTS, and the example that it is of."""

    key: str
    row: int
    example_id: str
    message: str = ""


class ImageFacts(NamedTuple):
    """What is compared of the examples of one row.

    Attributes:
        row: number of the row, from 1.
        example_id: id of the image.
        values: the measured numbers.
        labels: labels of the mask but 0; None if the row has no mask.
    """

    row: int
    example_id: str
    values: tuple[Value, ...]
    labels: tuple[int, ...] | None


class MeasuredImage(NamedTuple):
    """What the voxels of one row show.

    Attributes:
        num_volumes: number of its examples that a build would write.
        num_failed: number of those that it would not.
        problem: why, of the first of these; "" if there is none.
        shape: shape of its records; None if there is none.
        notes: as of `Volume`.
        findings: findings that do not depend on other images.
        facts: what is compared with other images; None if all failed.
        mapped_labels: labels of its mask that were mapped to others.
    """

    num_volumes: int = 0
    num_failed: int = 0
    problem: str = ""
    shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    facts: ImageFacts | None = None
    mapped_labels: tuple[int, ...] = ()


@dataclass
class CohortFacts:
    """What images are compared with. Those of disjoint images add up, in any order and grouping.

    Attributes:
        values: counts of the numbers of each kind.
        labels: masks that have each label.
        num_masks: masks that have any.
    """

    values: dict[Measure, Histogram] = field(default_factory=dict)
    labels: Counter[int] = field(default_factory=Counter)
    num_masks: int = 0

    @classmethod
    def of(cls, images: Sequence[ImageFacts]) -> CohortFacts:
        """Those of some images."""
        values = dict[Measure, list[float]]()
        for image in images:
            for _, measure, value in image.values:
                values.setdefault(measure, []).append(value)
        counts = {measure: Histogram.of(np.array(some), Scaling()) for measure, some in values.items()}
        labels = Counter(label for image in images for label in image.labels or ())
        return cls(counts, labels, sum(bool(image.labels) for image in images))

    def add(self, other: CohortFacts) -> None:
        """Add other images."""
        for measure, counts in other.values.items():
            self.values[measure] = self.values.get(measure, EMPTY).plus(counts)
        self.labels.update(other.labels)
        self.num_masks += other.num_masks

    def quartiles(self) -> dict[Measure, tuple[float, float, float]]:
        """The quartiles of the numbers of each kind of which there are enough."""
        found = dict[Measure, tuple[float, float, float]]()
        for measure, counts in self.values.items():
            if int(counts.counts.sum()) >= LEAST_COMPARED:
                low, middle, high = counts.percentiles((25, 50, 75))
                found[measure] = low, middle, high
        return found


class Comparison(NamedTuple):
    """What an image is compared with: quartiles, and the number of masks that have each rare label."""

    quartiles: dict[Measure, tuple[float, float, float]]
    rare_labels: dict[int, int]

    @classmethod
    def of(cls, cohort: CohortFacts) -> Comparison:
        """The comparison with all images."""
        most = max(1, cohort.num_masks // _RARE) if cohort.num_masks >= LEAST_COMPARED else 0
        rare = {label: count for label, count in cohort.labels.items() if count <= most}
        return cls(cohort.quartiles(), rare)

    def findings(self, image: ImageFacts) -> list[Finding]:
        """What is unlike the others."""
        found = list[Finding]()
        for example_id, measure, value in image.values:
            key, what = measure
            low, middle, high = self.quartiles.get(measure, (value,) * 3)
            is_size = key in _SIZES
            if is_far(value, (low, middle, high), least_width=_LEAST_SPREAD * middle if is_size else 0.0):
                unit = " mm" if is_size else ""
                shown = f"{f'{what} ' if what else ''}{value:.6g}{unit}"
                message = f"{shown} (middle half of all: {low:.3g} to {high:.3g})"
                found.append(Finding(key, image.row, example_id, message))
        if rare := [label for label in image.labels or () if label in self.rare_labels]:
            counts = [f"{label} (in {counted(self.rare_labels[label], 'mask')})" for label in rare]
            found.append(Finding("rare-label", image.row, image.example_id, first_few(counts, _SHOWN)))
        return _joined(found)


def _joined(findings: list[Finding]) -> list[Finding]:
    """The findings, with one message for the channels or axes of an example."""
    messages = dict[tuple[str, int, str], list[str]]()
    for key, row, example_id, message in findings:
        messages.setdefault((key, row, example_id), []).append(message)
    return [Finding(*of, "; ".join(texts)) for of, texts in messages.items()]


def measure_image(row: VolumeRow, folder: str, header: VolumeHeader, plan: BuildPlan) -> MeasuredImage:
    """Read the voxels of a row, and process them as a build does that writes nothing.

    Args:
        row: the row.
        folder: folder that its paths are relative to.
        header: header of its first image.
        plan: plan of the build.
    """
    record = plan.config.record
    arguments = row, folder, plan.required_shape, plan.required_dtype, record
    try:
        with redacting(row, folder):
            loaded = load_frames(*arguments) if record.splits_frames else iter([load_volume(*arguments)])
    except VolumeError as e:
        return MeasuredImage(num_failed=len(row.positions), problem=str(e))
    found, values, labels = MeasuredImage(notes=header.notes), list[Value](), None
    for volume in loaded:
        try:
            with redacting(row, folder):
                one = _measure(volume, record, plan.required_shape)
        except VolumeError as e:
            found = found._replace(num_failed=found.num_failed + 1, problem=found.problem or str(e))
            continue
        labels, values = one.labels, [*values, *one.values]
        found = found._replace(
            num_volumes=found.num_volumes + 1,
            shape=one.shape,
            notes=join_notes([found.notes, one.notes]),
            findings=(*found.findings, *one.findings),
            mapped_labels=one.mapped_labels,
        )
    if found.num_volumes:
        values += [(row.example_id, measure, size) for measure, size in _sizes(header)]
        empty = [Finding("empty-mask", row.row, row.example_id)] if labels == () else []
        facts = ImageFacts(row.row, row.example_id, tuple(values), labels)
        found = found._replace(facts=facts, findings=(*found.findings, *empty))
    return found


class _MeasuredVolume(NamedTuple):
    values: list[Value]
    labels: tuple[int, ...] | None
    findings: list[Finding]
    shape: tuple[int, ...]
    notes: tuple[str, ...]
    mapped_labels: tuple[int, ...]


def _measure(volume: Volume, record: RecordConfig, shape: tuple[int | None, ...] | None) -> _MeasuredVolume:
    """What is found in one volume, which is emptied; a VolumeError if a build would not write it."""
    if record.prepares:
        volume = prepare_volume(volume, record, shape, release=True)
    cohort, row, names = measure_volume(volume, record), volume.row, record.channels or ("",)
    values = [
        (row.example_id, ("unusual-intensity", name), channel.mean)
        for name, channel in zip(names, cohort.channels, strict=True)
        if channel.count
    ]
    findings = [
        Finding("constant", row.row, row.example_id, name)
        for name, voxels in zip(names, images_of(volume, record), strict=True)
        if voxels.min() == voxels.max()
    ]
    if volume.target is not None:
        values.append((row.example_id, ("unusual-target", ""), measure_target(volume, record).mean))
        if volume.target.min() == volume.target.max():
            findings.append(Finding("constant-target", row.row, row.example_id, f"{volume.target.flat[0]:g}"))
    if num_nonfinite := sum(volume.num_nonfinite) + volume.target_nonfinite:
        findings.append(Finding("nonfinite", row.row, row.example_id, counted(num_nonfinite, "voxel")))
    masks = row.files[record.num_channels : record.num_channels + record.num_masks]
    labels = tuple(sorted(cohort.labels)) if any(masks) else None
    notes, shape_of_record = volume.notes, volume.voxels.shape
    if not record.is_of_cohort or record.rescale_stats is not None:
        notes = rescale_volume(volume, record).notes
    return _MeasuredVolume(
        values, labels, _joined(findings), shape_of_record, notes, volume.mapped_labels or ()
    )


def _sizes(header: VolumeHeader) -> Iterator[tuple[Measure, float]]:
    """Field of view and voxel size along the axes of the body, in mm."""
    orientation = orientation_of(header.affine)
    for name, letters in _AXES.items():
        axis = next((axis for axis, letter in enumerate(orientation) if letter in letters), None)
        if axis is not None:
            yield ("unusual-size", name), header.zooms[axis] * header.space[axis]
            yield ("unusual-spacing", name), header.zooms[axis]
