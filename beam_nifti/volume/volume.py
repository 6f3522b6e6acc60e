"""One example, from its image files to an array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.storage import paths as storage
from beam_nifti.volume.align import align_labels, align_voxels, loses_labels
from beam_nifti.volume.files import FileStats, ReadHeader, Source, open_image, read_header
from beam_nifti.volume.formats import parse_header
from beam_nifti.volume.grid import (
    Affine,
    Grid,
    covers,
    overlaps,
    require_overlap,
    require_same_grid,
    turn_voxels,
    turns_between,
)
from beam_nifti.volume.header import (
    VolumeHeader,
    record_layout,
    require_dtype,
    require_frames,
    require_shape,
    require_storable,
)
from beam_nifti.volume.intensity import find_rescale_range, rescale_voxels, select_voxels, stored_range
from beam_nifti.volume.mask import PLAIN, load_mask, parse_plain_header
from beam_nifti.volume.nonfinite import replace_nonfinite
from beam_nifti.volume.notes import join_notes
from beam_nifti.volume.resample import Interpolation
from beam_nifti.volume.rescale import (
    FINITE_REMEDY,
    NO_SCALING,
    Intensity,
    RescaleRange,
    Scaling,
    Voxels,
    constant_image,
    measure,
    require_range,
)
from beam_nifti.volume.target import in_own_units, is_rounded
from beam_nifti.volume.voxels import cut_clip, cut_frame, take_voxels

_AFTER_REPLACEMENT: Final = (
    "they came with the preparation, which --nonfinite precedes; repair the function or the image"
)
"""Remedy for voxels that are not finite although `nonfinite` has replaced all."""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """One example in memory: its image, or its images, one per channel.

    Attributes:
        row: row of the manifest.
        voxels: (X, Y, Z), or (X, Y, Z, C) of C frames, components or images; C order, native byte order; as
            in the file until they are rescaled.
        scaling: scaling from `voxels` to the image's units.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+.
        zooms: voxel size along each axis, in millimetres.
        dtype: name of the dtype on disk, such as "int16" or "rgb24"; if images differ, all of their dtypes,
            separated by commas.
        source: files that it was read from, and shape and affine of the first image before any preparation.
        mask: labels of the voxels: uint8 or uint16 of shape (X, Y, Z), C order, or (X, Y, Z, C) if the
            manifest has several columns of masks; None if it has no masks.
        mapped_labels: labels in the files of masks that were mapped to others, ascending; None if no labels
            are mapped.
        target: values to predict, in the units of their file: float32 of shape (X, Y, Z), C order; None if
            the manifest has no targets.
        target_intensity: range, mean and standard deviation of the target; None before they are measured.
        target_nonfinite: voxels of the target that were NaN or infinite and were replaced.
        intensities: range, mean and standard deviation of each image, in its units; empty before they
            are measured.
        rescale_ranges: intensities of each image that become 0 and 1; empty if they are its range.
        num_nonfinite: voxels of each image that were NaN or infinite and were replaced; empty if they are an
            error.
        notes: keys of `notes.TEXTS` for what a user should know about its files and their processing; a build
            counts them.
        config: options of the steps that processed it, as the configuration of its record; None before the
            first step.
    """

    row: VolumeRow
    voxels: Voxels
    scaling: Scaling
    affine: Affine
    zooms: tuple[float, float, float]
    dtype: str
    source: Source
    mask: Voxels | None = None
    mapped_labels: tuple[int, ...] | None = None
    intensities: tuple[Intensity, ...] = ()
    rescale_ranges: tuple[RescaleRange, ...] = ()
    num_nonfinite: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    config: RecordConfig | None = None
    target: Voxels | None = None
    target_intensity: Intensity | None = None
    target_nonfinite: int = 0

    def release(self) -> None:
        """Drop voxels and target. Only for the graph of a build, in which no other step uses this volume.

        Beam holds an element until every following step has processed its results.
        """
        object.__setattr__(self, "voxels", np.empty(0, self.voxels.dtype))
        object.__setattr__(self, "target", None)


def load_volume(
    row: VolumeRow,
    folder: str = "",
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
    record: RecordConfig | None = None,
) -> Volume:
    """Read the images of one example, its masks and its target.

    Args:
        row: row of the manifest that names them.
        folder: folder that relative paths are relative to: the manifest's.
        shape: required shape of the record, with None for axes of any length; None accepts any. A shape that
            the header does not determine is checked by `prepare_volume`.
        dtype: required dtype of the images on disk; None accepts any.
        record: configuration of the record to make; None means the default one.

    Returns:
        The voxels as stored, in C order and native byte order. `scaling.apply(voxels)` are the values
        of `nibabel.load(path).dataobj`. Computed voxels are float64, in the image's units.

    Raises:
        VolumeError: a file is missing, is not an image of a known format, is inconsistent with its header,
            does not have that shape or dtype, or does not fit into a record; or the files have different
            grids.
    """
    record = record or RecordConfig()
    require_target(row, record)
    of_one = record if record.channels is None else replace(record, channels=None)
    images = list[_LoadedImage]()
    for number, path in enumerate(row.files[: record.num_channels]):
        parse = _parser(row, number, record, images[0].header if images else None, shape, dtype)
        with open_image(path, storage.join(folder, path), parse) as image:
            header = image.header
            layout = record_layout(path, header, of_one)
            voxels = take_voxels(image, layout, record.complex)
        is_computed = header.is_complex or layout.frame == "mean"
        scaling = Scaling() if is_computed else header.scaling
        count = 0
        if record.nonfinite is not None:  # here, as an image may be interpolated onto the first one's grid
            voxels, scaling, count = _make_finite(path, voxels, scaling, record)
        if images:
            voxels, scaling = _bring_onto(images[0].header, voxels, scaling, header, record)
        images.append(_LoadedImage(header, voxels, scaling, image.stats, num_nonfinite=count))
    first = images[0]
    others = _load_others(row, folder, record, first.header)
    voxels, scaling = (first.voxels, first.scaling) if len(images) == 1 else _stack(row, images, record)
    return _assemble(row, images, others, voxels, scaling, record)


def require_target(row: VolumeRow, record: RecordConfig) -> None:
    """Refuse a row without a target where records have one."""
    if record.has_target and not row.files[-1]:
        raise VolumeError(f"{row.path}: the row has no target; give the path of one, or drop the row")


def _make_finite(
    path: str, voxels: Voxels, scaling: Scaling, record: RecordConfig
) -> tuple[Voxels, Scaling, int]:
    is_native = record.voxel_dtype == "native"
    try:
        made, now, (count,) = replace_nonfinite(voxels, scaling, record.nonfinite or "", is_native=is_native)
    except VolumeError as e:
        raise VolumeError(f"{path}: {e}") from e
    return made, now, count


def load_frames(
    row: VolumeRow,
    folder: str = "",
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
    record: RecordConfig | None = None,
) -> Iterator[Volume]:
    """Read an image of many frames, and return each wanted frame as a volume of its own.

    Arguments and errors are those of `load_volume` for the record of a frame. Damage is found before the
    first frame is returned. Frames are made on request, so memory is that of the stored voxels and one frame.
    """
    record = record or RecordConfig(frames="each")
    require_target(row, record)
    parse = _parser(row, 0, record, None, shape, dtype)
    with open_image(row.path, storage.join(folder, row.path), parse) as image:
        header, layout = image.header, record_layout(row.path, image.header, record)
        require_frames(row.path, header, row.num_frames, record)
        content = image.read_all()
    others = _load_others(row, folder, record, header)
    scaling = Scaling() if header.is_complex else header.scaling
    loaded = _LoadedImage(header, np.empty(0), scaling, image.stats)

    clip = record.clip_frames
    last = header.num_frames // clip * clip - clip

    def of_frame(frame: int) -> Volume:
        cut = cut_frame if clip == 1 else cut_clip
        voxels = cut(content, frame, header, layout, record.complex)
        volume = _assemble(row.of_frame(frame), [loaded], others, voxels, scaling, record)
        # One example of the image has the note, so that images are counted.
        notes = _notes_of_frames(header, record) if frame == last else ()
        return replace(volume, notes=join_notes([volume.notes, notes]))

    frames = [frame for frame in row.frames if frame <= last]
    if not frames:
        which = (
            f"frame {row.frames[0]}" if clip == 1 else f"frames {row.frames[0]} to {row.frames[0] + clip - 1}"
        )
        raise VolumeError(
            f"{row.path}: no {which}: number of frames is {header.num_frames}; choose others, or build with "
            "--recheck if the image had more before"
        )
    return map(of_frame, frames)  # unlike a generator, it keeps no frame that it has returned


def _notes_of_frames(header: VolumeHeader, record: RecordConfig) -> tuple[str, ...]:
    return ("frames-dropped",) if header.num_frames % record.clip_frames else ()


@dataclass(frozen=True, slots=True, eq=False)
class _LoadedImage:
    """One of the images of an example, a mask with the labels that were mapped, or its target."""

    header: VolumeHeader
    voxels: Voxels
    scaling: Scaling
    stats: FileStats
    mapped: tuple[int, ...] = ()
    num_nonfinite: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Others:
    """The files of an example besides its images.

    Attributes:
        masks: its masks; the voxels of each are the labels of all.
        target: its target, if any.
    """

    masks: list[_LoadedImage]
    target: _LoadedImage | None

    @property
    def files(self) -> list[_LoadedImage]:
        """All of them, in the order of the row."""
        return [*self.masks, *([] if self.target is None else [self.target])]


def _load_others(row: VolumeRow, folder: str, record: RecordConfig, image: VolumeHeader) -> _Others:
    """The masks and the target of an example whose image has this header, if any."""
    return _Others(_load_masks(row, folder, record, image), _load_target(row, folder, record, image))


def _load_masks(row: VolumeRow, folder: str, record: RecordConfig, image: VolumeHeader) -> list[_LoadedImage]:
    numbers = range(record.num_channels, record.num_channels + record.num_masks)
    if record.masks is None:
        return [_load_mask(row, number, folder, record, image) for number in numbers]
    labels, masks = np.empty((*image.space, *record.mask_axes), record.mask_dtype), list[_LoadedImage]()
    for channel, number in enumerate(numbers):
        mask = _load_mask(row, number, folder, record, image)
        labels[..., channel] = mask.voxels
        masks.append(replace(mask, voxels=labels))
    return masks


def _load_target(
    row: VolumeRow, folder: str, record: RecordConfig, image: VolumeHeader
) -> _LoadedImage | None:
    """The target of an example, if any; its voxels are in its own units."""
    if not record.has_target:
        return None
    path = row.files[-1]
    parse = _parser(row, record.num_files - 1, record, image)
    with open_image(path, storage.join(folder, path), parse) as opened:
        header = opened.header
        voxels = take_voxels(opened, record_layout(path, header, PLAIN))
    scaling, count = header.scaling, 0
    if record.nonfinite is not None:  # its dtype need not stay, as it becomes float32
        voxels, scaling, count = _make_finite(
            path, voxels, scaling, replace(PLAIN, nonfinite=record.nonfinite)
        )
    voxels, scaling = _bring_onto(image, voxels, scaling, header, record)
    values = in_own_units(path, voxels, scaling)
    if is_rounded(voxels, scaling, values):
        header = replace(header, notes=join_notes([header.notes, ["rounded-target"]]))
    return _LoadedImage(header, values, NO_SCALING, opened.stats, num_nonfinite=count)


def _load_mask(
    row: VolumeRow, number: int, folder: str, record: RecordConfig, image: VolumeHeader
) -> _LoadedImage:
    """A mask of an example whose image has this header, by its number among the files; its voxels are labels.

    It has no label if the row does not have the mask. Its files are none then.
    """
    path = row.files[number]
    if not path:
        return _LoadedImage(image, np.zeros(image.space, record.mask_dtype), Scaling(), ())
    parse = _parser(row, number, record, image)
    mask = load_mask(path, storage.join(folder, path), parse, record)
    labels, _ = _bring_onto(image, mask.labels, Scaling(), mask.header, record, is_mask=True)
    header = mask.header
    if record.align is not None and loses_labels(mask.labels, header.grid, image.grid):
        header = replace(header, notes=join_notes([header.notes, ["labels-lost-to-align"]]))
    return _LoadedImage(header, labels, Scaling(), mask.stats, mask.mapped)


def _assemble(
    row: VolumeRow,
    images: list[_LoadedImage],
    others: _Others,
    voxels: Voxels,
    scaling: Scaling,
    record: RecordConfig,
) -> Volume:
    """The volume of these voxels, which were loaded from the files of an example."""
    header, target, files = images[0].header, others.target, [*images, *others.files]
    mapped = {label for mask in others.masks for label in mask.mapped}
    dtypes = [image.header.dtype_name for image in images]
    stats, affine = tuple(file.stats for file in files if file.stats), tuple(header.affine.ravel().tolist())
    return Volume(
        row=row,
        voxels=voxels,
        scaling=scaling,
        affine=header.affine,
        zooms=header.zooms,
        dtype=",".join(dtypes if len(set(dtypes)) > 1 else dtypes[:1]),
        source=Source(stats, header.shape, affine),
        mask=others.masks[0].voxels if others.masks else None,
        mapped_labels=tuple(sorted(mapped)) if others.masks and record.map_labels is not None else None,
        num_nonfinite=() if record.nonfinite is None else tuple(image.num_nonfinite for image in images),
        notes=join_notes(file.header.notes for file in files),
        config=record,
        target=target.voxels if target else None,
        target_nonfinite=target.num_nonfinite if target else 0,
    )


def _bring_onto(
    first: VolumeHeader,
    voxels: Voxels,
    scaling: Scaling,
    header: VolumeHeader,
    record: RecordConfig,
    *,
    is_mask: bool = False,
) -> tuple[Voxels, Scaling]:
    """The voxels of an image on the grid of the first image, C order, and their scaling."""
    turns = turns_between(header.grid, first.grid)
    if turns is not None:
        return np.ascontiguousarray(turn_voxels(voxels, turns)), scaling
    assert record.align is not None  # or it has been refused
    how = Interpolation.of(record)
    if is_mask:
        return align_labels(voxels, header.grid, first.grid, how), scaling
    return align_voxels(voxels, scaling, header.grid, first.grid, how)


def _parser(
    row: VolumeRow,
    number: int,
    record: RecordConfig,
    first: VolumeHeader | None,
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
    *,
    is_any: bool = False,
) -> ReadHeader:
    """Parses the header of one of an example's files, and refuses it if it does not fit the record.

    Other images must fit `first`, the first one's header. With `is_any`, the image only has to fit a record
    of some configuration.
    """
    path, is_image = row.files[number], number < record.num_channels
    kind = "mask" if number < record.num_channels + record.num_masks else "target"

    def parse(head: bytes) -> VolumeHeader:
        header = parse_header(path, head) if is_image else parse_plain_header(path, head, kind)
        if is_image and not is_any:
            is_aligned = number > 0 and record.align is not None  # so its own shape makes no difference
            layout = (record_layout if is_aligned else require_storable)(path, header, record)
            if layout.stored_shape is not None and not is_aligned:
                require_shape(path, layout.stored_shape, shape)
            require_dtype(path, header, dtype)
            if record.reference is not None and record.preprocess is None and number == 0:
                try:
                    require_overlap(header.grid, record.reference)
                except VolumeError as e:
                    raise VolumeError(f"{path}: {e}") from e
        if first is not None and record.align is not None:
            return _require_aligned(path, header, row.path, first)
        if first is not None:
            may_turn = is_any or record.orientation is not None
            require_same_grid(path, header.grid, row.path, first.grid, may_turn=may_turn)
        return header

    return parse


def _require_aligned(path: str, header: VolumeHeader, first_path: str, first: VolumeHeader) -> VolumeHeader:
    """Refuse a header of nothing at the positions of the first image; otherwise return it, with a note."""
    if not overlaps(header.grid, first.grid):
        raise VolumeError(
            f"{path}: its field of view does not meet that of {first_path}; correct its affine, or leave the "
            "example out"
        )
    if covers(header.grid, first.grid) or turns_between(header.grid, first.grid) is not None:
        return header
    return replace(header, notes=(*header.notes, "beyond-other-image"))


def _stack(row: VolumeRow, images: list[_LoadedImage], record: RecordConfig) -> tuple[Voxels, Scaling]:
    """The images as channels: as stored if all have one dtype and scaling, otherwise in their units."""
    first = images[0]
    kinds = {(i.voxels.dtype, i.scaling) for i in images}
    _require_alike(row, kinds, record)
    alike = len(kinds) == 1
    dtype = first.voxels.dtype if alike else np.float64
    stacked = np.empty((*first.voxels.shape, len(images)), dtype)
    for number, image in enumerate(images):
        stacked[..., number] = image.voxels if alike else image.scaling.apply(image.voxels)
    return stacked, first.scaling if alike else Scaling()


def _require_alike(row: VolumeRow, kinds: set[tuple[np.dtype[Any], Scaling]], record: RecordConfig) -> None:
    """Refuse images of an example that have several dtypes and scalings, where a record has one."""
    if len(kinds) > 1 and record.voxel_dtype == "native":
        raise VolumeError(
            f"{row.path}: the images of this example have different dtypes or scalings, but a record "
            "of native voxels has only one; use --voxel-dtype float32"
        )


def load_header(
    row: VolumeRow,
    folder: str = "",
    record: RecordConfig | None = None,
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
    *,
    is_any: bool = False,
) -> VolumeHeader:
    """Read only the headers of an example's files, from their first kilobytes.

    Arguments and errors are those of `load_volume`; with `is_any` images for another configuration are
    accepted. Returns the header of the first image, with the notes of all.
    """
    record = record or RecordConfig()
    headers = list[VolumeHeader]()
    require_target(row, record)
    for number, path in enumerate(row.files):
        if not path:
            continue
        parse = _parser(row, number, record, headers[0] if headers else None, shape, dtype, is_any=is_any)
        headers.append(read_header(path, storage.join(folder, path), parse))
    if not is_any:
        images = headers[: record.num_channels]
        _require_alike(row, {(h.dtype.newbyteorder("="), h.scaling) for h in images}, record)
    of_frames = () if is_any else _notes_of_frames(headers[0], record)
    return replace(headers[0], notes=join_notes([*(header.notes for header in headers), of_frames]))


def read_grid(path: str) -> tuple[Grid, tuple[str, ...]]:
    """The voxel grid of any image, from its header, and keys of `notes.TEXTS` for what to know about it.

    Raises:
        VolumeError: the file is missing, or is not an image of a known format.
    """
    header = read_header(path, path, lambda head: parse_header(path, head))
    return header.grid, header.notes


def rescale_volume(volume: Volume, config: RecordConfig) -> Volume:
    """Measure a volume, and make its voxels what the record stores; each channel by itself.

    Raises:
        VolumeError: voxels are NaN or infinite, have no range, or do not fit their dtype.
    """
    intensities, ranges, stored = list[Intensity](), list[RescaleRange](), volume.voxels
    target = None if volume.target is None else measure_target(volume, config)
    notes = list[str]()
    is_native = config.voxel_dtype == "native"
    for number, voxels in enumerate(images_of(volume, config)):
        try:
            intensity, found, rescaled = _rescale(voxels, volume, config, number)
        except VolumeError as e:
            raise VolumeError(f"{volume.row.files[number]}: {e}") from e
        if _is_far_from_cohort(voxels, volume, config, intensity, number):
            notes.append("far-from-cohort")
        intensities.append(intensity)
        ranges += [found] if found else []
        if config.channels is None:
            stored = rescaled
        elif not is_native:
            if number == 0:
                stored = np.empty(stored.shape, rescaled.dtype)
            stored[..., number] = rescaled
    return replace(
        volume,
        voxels=stored,
        scaling=volume.scaling if is_native else Scaling(),
        intensities=tuple(intensities),
        rescale_ranges=tuple(ranges),
        notes=join_notes([volume.notes, notes]),
        config=config,
        target_intensity=target,
    )


def measure_target(volume: Volume, config: RecordConfig) -> Intensity:
    """The range, mean and standard deviation of the target of a volume that has one.

    Raises:
        VolumeError: voxels are NaN or infinite.
    """
    assert volume.target is not None
    remedy = FINITE_REMEDY if config.nonfinite is None else _AFTER_REPLACEMENT
    try:
        return measure(volume.target, NO_SCALING, remedy)
    except VolumeError as e:
        raise VolumeError(f"{volume.row.files[-1]}: the target: {e}") from e


def _is_far_from_cohort(
    voxels: Voxels, volume: Volume, config: RecordConfig, intensity: Intensity, number: int
) -> bool:
    if config.rescale_stats is None or (config.rescale_within == "mask" and volume.mask is None):
        return False
    if config.rescale_within is not None:
        voxels = voxels[select_voxels(voxels, volume.scaling, config.rescale_within, volume.mask)]
        if voxels.size == 0:
            return False
        intensity = measure(voxels, volume.scaling)
    return config.rescale_stats.is_far(number, intensity.mean)


def require_rescaled(volume: Volume) -> None:
    """Refuse a volume whose voxels have another dtype or range than `rescale_volume` gave them."""
    config = volume.config or RecordConfig()
    remedy = "put steps that change voxels before Rescale"
    if config.voxel_dtype not in ("native", volume.voxels.dtype.name):
        raise VolumeError(
            f"{volume.row.path}: its voxels are {volume.voxels.dtype}, but Rescale made them "
            f"{config.voxel_dtype}; {remedy}"
        )
    if volume.target is not None:
        found = np.array([volume.target.min(), volume.target.max()])
        measured = volume.target_intensity
        if measured is None or found.tolist() != [measured.min, measured.max]:
            raise VolumeError(
                f"{volume.row.path}: its target is no longer the one that Rescale measured; put steps that "
                "change targets before Rescale"
            )
    for number, voxels in enumerate(images_of(volume, config)):
        intensity = volume.intensities[number]
        found = np.array([voxels.min(), voxels.max()])
        if config.voxel_dtype == "native":
            found = np.sort(volume.scaling.apply(found))
        expected = stored_range(
            intensity, volume.rescale_ranges[number] if volume.rescale_ranges else None, config
        )
        if not np.array_equal(found, expected):
            raise VolumeError(
                f"{volume.row.files[number]}: its voxels range from {found[0]:g} to {found[1]:g}, but "
                f"Rescale made them range from {expected[0]:g} to {expected[1]:g}; {remedy}"
            )


def images_of(volume: Volume, config: RecordConfig) -> Iterator[Voxels]:
    """The voxels of each image, C order."""
    if config.channels is None:
        yield volume.voxels
        return
    for number in range(len(config.channels)):
        yield np.ascontiguousarray(volume.voxels[..., number])


def _rescale(
    voxels: Voxels, volume: Volume, config: RecordConfig, number: int
) -> tuple[Intensity, RescaleRange | None, Voxels]:
    scaling = volume.scaling
    remedy = FINITE_REMEDY if config.nonfinite is None else _AFTER_REPLACEMENT
    intensity = measure(voxels, scaling, remedy)
    if config.method == "minmax" and intensity.min == intensity.max:
        raise constant_image(intensity.min)
    rescale_range = find_rescale_range(voxels, scaling, intensity, config, volume.mask, number)
    if not config.is_bounded:
        require_range(intensity, rescale_range, config.rescaled_dtype)
    if config.voxel_dtype == "native":
        return intensity, rescale_range, voxels
    return intensity, rescale_range, rescale_voxels(voxels, scaling, intensity, rescale_range, config)
