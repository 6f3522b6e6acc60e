"""Flags that would make the records of a cohort alike, by the headers of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from beam_nifti.config import ORIENTATIONS, RESAMPLING_DETAILS, RecordConfig
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.support.wording import size_text
from beam_nifti.volume.grid import Grid, axes_to, keeps_spacing, orientation_of, prepared_shape, turn
from beam_nifti.volume.header import VolumeHeader, record_layout, require_storable
from beam_nifti.volume.rescale import Scaling

_UNSPACED: Final[Mapping[str, Any]] = dict.fromkeys(("spacing", *RESAMPLING_DETAILS))
Zooms = tuple[float, float, float]
_Made = str | tuple[tuple[int, ...] | None, str | None, int | None]

_DIGITS: Final = 7  # significant digits that voxel sizes are counted by: headers hold float32
_SIZES_TRIED: Final = 200  # number of most frequent voxel sizes among which the suggested one is chosen
_DIRECTIONS: Final = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Axis in space, and sign, of each letter of an orientation."""


class ImageKind(NamedTuple):
    """What determines the record that an image becomes, as far as its header shows.

    Shape and dtype, in native byte order, are those on disk; the voxel size is in mm, to 7 digits.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    zooms: Zooms
    orientation: str
    is_vector: bool = False

    @classmethod
    def of(cls, header: VolumeHeader) -> ImageKind:
        """The kind of an image with this header."""
        x, y, z = (float(f"{zoom:.{_DIGITS}g}") for zoom in header.zooms)
        dtype = header.dtype.newbyteorder("=")
        return cls(header.shape, dtype, (x, y, z), orientation_of(header.affine), header.is_vector)

    @property
    def dtype_name(self) -> str:
        """As `VolumeHeader.dtype_name`."""
        return self.header().dtype_name

    def header(self) -> VolumeHeader:
        """A header of an image of this kind, along the axes of space."""
        affine = np.zeros((4, 4))
        affine[3, 3] = 1.0
        for axis, (letter, zoom) in enumerate(zip(self.orientation, self.zooms, strict=True)):
            if letter in _DIRECTIONS:
                row, sign = _DIRECTIONS[letter]
                affine[row, axis] = sign * zoom
        return VolumeHeader(self.shape, self.dtype, 0, Scaling(), affine, self.zooms, self.is_vector)


Counts = Mapping[ImageKind, int]
_Key = TypeVar("_Key")


def tally(kinds: Counts, key: Callable[[ImageKind], _Key]) -> Counter[_Key]:
    """The number of images for each value of a property of their kinds."""
    counts = Counter[_Key]()
    for kind, count in kinds.items():
        counts[key(kind)] += count
    return counts


class Advice(NamedTuple):
    """Flags for a cohort, and those that would be among them but for one image.

    Attributes:
        flags: flags with which `build` accepts every image that can be made to match the others.
        dropped: flags that are not suggested because of the kind of image `against`, if any.
        reason: what would become of it, such as "would fail: …".
    """

    flags: list[str]
    dropped: list[str]
    against: ImageKind | None = None
    reason: str = ""


def suggest_flags(kinds: Counts, record: RecordConfig) -> Advice:
    """Flags with which `build` accepts every image that can be made to match the others.

    An image that has the most frequent orientation and voxel size keeps its voxels as they are, and no image
    is cropped. Images that nothing makes like the most frequent ones, such as RGB among scalars, are not
    considered. What would make an image fail that is accepted without it is not suggested.

    The kinds are in the order of the manifest; `record` is the configuration that they were checked with.
    """
    wanted, suggested = _suggest(kinds, record, None)
    against, reason = _objection(kinds, record, suggested)
    if against is None:
        return Advice(wanted, [])
    for step in (_suggest_spacing, _suggest_shape, _suggest_numbers, _suggest_orientation, _suggest_frames):
        flags, suggested = _suggest(kinds, record, step)
        if _objection(kinds, record, suggested)[0] is None:
            break
    else:
        flags = []
    names = {flag.split()[0] for flag in flags}
    return Advice(flags, [flag for flag in wanted if flag.split()[0] not in names], against, reason)


def _suggest(
    kinds: Counts, record: RecordConfig, omitted: Callable[..., Any] | None
) -> tuple[list[str], RecordConfig]:
    """Flags, and the configuration that they make, without those of one of the steps."""
    flags = []
    for step in (_suggest_numbers, _suggest_frames, _suggest_orientation, _suggest_spacing, _suggest_shape):
        if step is omitted:
            continue
        changes = step(kinds, record)
        try:
            record = replace(record, **changes)
        except UsageError:  # native voxels cannot be resampled
            changes["voxel_dtype"] = "float32"
            record = replace(record, **changes)
        flags += [f"--{name.replace('_', '-')} {_text(value)}" for name, value in changes.items()]
        if step is not _suggest_numbers:
            kinds = _alike(kinds, record) or kinds
    return flags, record


def _objection(kinds: Counts, before: RecordConfig, after: RecordConfig) -> tuple[ImageKind | None, str]:
    """The first kind that a build accepts with one configuration, but not with another one, and why."""
    was, now = ({kind: _made_of(kind, record) for kind in kinds} for record in (before, after))
    accepted = {kind: made for kind, made in was.items() if not isinstance(made, str)}
    for kind in accepted:
        if isinstance(reason := now[kind], str):
            return kind, reason
    most = _most_frequent(tally({kind: kinds[kind] for kind in accepted}, was.__getitem__))
    alike = {kind: kinds[kind] for kind, made in accepted.items() if made == most}
    usual = _most_frequent(tally(alike, now.__getitem__))
    for kind in alike:
        if now[kind] != usual:
            return kind, "would differ from the others, which it matches now"
    return None, ""


def _most_frequent(counts: Counter[_Key]) -> _Key | None:
    return max(counts, key=lambda each: counts[each], default=None)


def _made_of(kind: ImageKind, record: RecordConfig) -> _Made:
    """What the records of a build share, of an image; why it has none, if it would fail or lose an axis."""
    try:
        header = kind.header()
        layout = require_storable("", header, record)
        if record.spacing is not None:  # whatever a shape crops and pads it to
            whole = replace(record, shape=None, crop_foreground=None, preprocess=None)
            spaced = require_storable("", header, whole).stored_shape or ()
            unspaced = record_layout("", header, replace(whole, **_UNSPACED)).stored_shape or ()
            if any(now == 1 < was for was, now in zip(unspaced, spaced, strict=True)):
                return f"would shrink from {size_text(unspaced)} to {size_text(spaced)} voxels"
    except VolumeError as e:
        return f"would fail: {str(e).removeprefix(': ')}"
    frames = header.num_frames // record.clip_frames if record.splits_frames else None
    return layout.stored_shape, kind.dtype_name if record.voxel_dtype == "native" else None, frames


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{n:.{_DIGITS}g}" for n in value)


def _alike(kinds: Counts, record: RecordConfig) -> Counts:
    """The kinds whose records have as many channels as most have."""
    channels = dict[tuple[int, ...], dict[ImageKind, int]]()
    for kind, count in kinds.items():
        try:
            layout = require_storable("", kind.header(), record)
        except VolumeError:
            continue
        channels.setdefault(layout.shape[3:], {})[kind] = count
    return max(channels.values(), key=lambda of: sum(of.values()), default={})


def _suggest_numbers(kinds: Counts, record: RecordConfig) -> dict[str, Any]:
    """What becomes of voxels that are complex, or whose dtypes differ."""
    changes = dict[str, Any]()
    dtypes = {kind.dtype for kind in kinds}
    if len(dtypes) > 1 or any(dtype.kind == "f" and dtype.itemsize > 8 for dtype in dtypes):
        changes["voxel_dtype"] = "float32"
    if record.complex is None and any(dtype.kind == "c" for dtype in dtypes):
        changes |= {"complex": "magnitude", "voxel_dtype": "float32"}
    if record.voxel_dtype != "native":
        changes.pop("voxel_dtype", None)
    return changes


def _suggest_frames(kinds: Counts, record: RecordConfig) -> dict[str, Any]:
    """The frames with which most images are alike: all of them, or the first, which every image has."""
    if record.frames not in (None, "all"):
        return {}
    choices = dict.fromkeys((record.frames, "all", "first"))
    numbers = {each: sum(_alike(kinds, replace(record, frames=each)).values()) for each in choices}
    best = max(numbers, key=lambda each: numbers[each])
    return {} if best == record.frames else {"frames": best}


def _suggest_orientation(kinds: Counts, record: RecordConfig) -> dict[str, Any]:
    found = tally(kinds, lambda kind: kind.orientation)
    known = [code for code, _ in found.most_common() if code in ORIENTATIONS]
    if any(getattr(record, name) is not None for name in ("preprocess", "orientation", "reference")):
        return {}
    if not 2 <= len(known) == len(found):
        return {}
    return {"orientation": known[0]}


def _suggest_spacing(kinds: Counts, record: RecordConfig) -> dict[str, Any]:
    """The voxel size that most images have, in as few digits as keep those from being resampled."""
    if any(getattr(record, name) is not None for name in ("preprocess", "reference", "spacing", "resize")):
        return {}
    found = tally(kinds, lambda kind: _turned(kind, record).zooms)
    sizes, counts = np.array(list(found)), np.array(list(found.values()))

    def having(spacing: Zooms) -> npt.NDArray[np.bool_]:
        return np.asarray(keeps_spacing(sizes, spacing).all(axis=1))

    tried = [zooms for zooms, _ in found.most_common(_SIZES_TRIED)]
    best = max(tried, key=lambda zooms: counts[having(zooms)].sum(), default=None)
    if best is None or having(best).all():
        return {}
    for digits in range(1, _DIGITS):
        x, y, z = (float(f"{zoom:.{digits}g}") for zoom in best)
        if np.array_equal(having((x, y, z)), having(best)):
            return {"spacing": (x, y, z)}
    return {"spacing": best}


def _turned(kind: ImageKind, record: RecordConfig) -> Grid:
    grid = kind.header().grid
    return grid if record.orientation is None else turn(grid, axes_to(grid, record.orientation))


def _suggest_shape(kinds: Counts, record: RecordConfig) -> dict[str, Any]:
    """A shape that holds all images, and what is left of those that are cropped to their foreground."""
    if record.shape is not None or record.preprocess is not None or not kinds:
        return {}
    uncropped = replace(record, crop_foreground=None)
    headers = [kind.header() for kind in kinds]
    shapes = {(prepared_shape(h.space, h.affine, uncropped) or h.space)[:3] for h in headers}
    if len(shapes) < 2 and record.crop_foreground is None:
        return {}
    largest = tuple(map(max, zip(*shapes, strict=True)))
    suggested = replace(record, shape=largest)
    return {"shape": largest} if _alike(kinds, suggested) else {}
