"""An image's header as far as voxels depend on it, and what a record will contain.

In errors, which are VolumeErrors, `name` is the image's path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.volume.grid import Affine, Grid, prepared_shape
from beam_nifti.volume.rescale import Scaling, numpy_dtype

MAX_VOLUME_BYTES: Final = 2**31 - 2**16  # of voxels in a record, which protobuf limits to 2 GiB

COLOURS: Final = {3: "rgb24", 4: "rgba32"}
"""Names of the dtypes of colours, by bytes per voxel. numpy has structured dtypes for them."""

PADDING_BYTES: Final = 4096  # most bytes of padding after the voxels


@dataclass(frozen=True, slots=True)
class VolumeHeader:
    """The facts in an image's header that determine its voxels.

    Attributes:
        shape: (X, Y, Z), (X, Y, Z, T) or (X, Y, Z, T, V), in the file's axis order, without axes of length 1
            at the end.
        dtype: dtype of the voxels on disk, with its byte order.
        offset: byte at which the voxels start.
        scaling: scaling from stored voxels to the image's units.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+; never singular.
        zooms: voxel size along each axis, in millimetres, according to the affine.
        is_vector: whether the fifth axis holds the components of a voxel.
        is_pair: whether the voxels are in a file of their own, according to the header.
        header_bytes: bytes at the start of a single file that cannot be voxels.
        is_analyze: whether it is an ANALYZE header, which cannot hold a rotation.
        max_trailing: bytes of padding or a footer that may follow the voxels.
        notes: keys of `notes.TEXTS`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    scaling: Scaling
    affine: Affine
    zooms: tuple[float, float, float]
    is_vector: bool = False
    is_pair: bool = False
    header_bytes: int = 0
    is_analyze: bool = False
    max_trailing: int = PADDING_BYTES
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the voxels on disk, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Byte at which the voxels end: the smallest size of the uncompressed file."""
        return self.offset + self.num_bytes

    @property
    def size_limit(self) -> int:
        """Smallest size of an uncompressed file that holds more than the header promises."""
        return self.end + self.max_trailing + 1

    @property
    def space(self) -> tuple[int, int, int]:
        """Voxels along the three spatial axes."""
        x, y, z = self.shape[:3]
        return x, y, z

    @property
    def grid(self) -> Grid:
        """The positions of the voxels."""
        return Grid(self.space, self.affine)

    @property
    def num_frames(self) -> int:
        """T, the number of frames."""
        return self.shape[3] if len(self.shape) > 3 else 1

    @property
    def num_components(self) -> int:
        """V, the number of components."""
        return self.shape[4] if len(self.shape) > 4 else 1

    @property
    def frame_bytes(self) -> int:
        """Bytes on disk of one component of one frame, which are contiguous."""
        return math.prod(self.space) * self.dtype.itemsize

    @property
    def num_colours(self) -> int:
        """Numbers per voxel: 3 for RGB, 4 for RGBA, otherwise 1."""
        return self.dtype.itemsize if self.dtype.names else 1

    @property
    def is_complex(self) -> bool:
        """Whether voxels are complex numbers."""
        return self.dtype.kind == "c"

    @property
    def dtype_name(self) -> str:
        """Name of the dtype of the voxels on disk, as in the index: "int16", "rgb24"."""
        return COLOURS[self.dtype.itemsize] if self.dtype.names else self.dtype.name


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """How an image is loaded for a record, and the shape of the record.

    Attributes:
        shape: shape of the loaded voxels: (X, Y, Z), or (X, Y, Z, C) if a voxel has several numbers.
        dtype: dtype of the loaded voxels.
        frame: number of the frame to load; "mean" of all frames; "each" by itself; None for the whole image.
        stored_shape: shape after preparation; None if the header does not determine it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    frame: int | str | None
    stored_shape: tuple[int, ...] | None


def record_layout(name: str, header: VolumeHeader, record: RecordConfig) -> RecordLayout:
    """How an image is loaded for its record, and the shape of the record."""
    is_wide = header.dtype.kind == "f" and header.dtype.itemsize > 8
    if record.voxel_dtype == "native" and (is_wide or header.is_complex):
        raise VolumeError(
            f"{name}: {header.dtype_name} voxels, which no record can hold as they are; use "
            "--voxel-dtype float32"
        )
    if header.is_complex:
        _require_part(name, header, record)
    frame = _choose_frame(name, header, record)
    numbers = [n for n in _numbers_of_voxel(header, record, frame) if n > 1]
    if len(numbers) > 1:
        choices = _frame_choices(header, record)
        remedy = f"choose frames with {choices}, or " if choices and frame is None else ""
        raise VolumeError(
            f"{name}: shape {header.shape} of {header.dtype_name} has {' × '.join(map(str, numbers))} "
            f"numbers per voxel, but a record has one axis for them; {remedy}extract one of the components"
        )
    dtype = header.dtype.newbyteorder("=")
    if header.dtype.names:
        dtype = np.dtype(np.uint8)
    if is_wide or header.is_complex or frame == "mean":
        dtype = np.dtype(np.float64)
    shape = (*header.space, *numbers)
    try:
        return RecordLayout(shape, dtype, frame, prepared_shape(shape, header.affine, record))
    except VolumeError as e:
        raise VolumeError(f"{name}: {e}") from e


def _numbers_of_voxel(header: VolumeHeader, record: RecordConfig, frame: int | str | None) -> Iterator[int]:
    yield header.num_frames if frame is None else record.clip_frames if frame == "each" else 1
    yield header.num_components
    yield header.num_colours
    yield 2 if header.is_complex and record.complex == "real-imag" else 1
    yield record.num_channels


def _require_part(name: str, header: VolumeHeader, record: RecordConfig) -> None:
    if record.complex is None:
        raise VolumeError(
            f"{name}: {header.dtype_name} voxels; choose how to store them with --complex magnitude, "
            "phase or real-imag"
        )
    if header.scaling.inter != 0:
        raise VolumeError(
            f"{name}: {header.dtype_name} voxels with an intercept of {header.scaling.inter:g}, which NIfTI "
            "adds to both parts and nibabel to the real one; repair the header"
        )


def _choose_frame(name: str, header: VolumeHeader, record: RecordConfig) -> int | str | None:
    frames, count = record.frames, header.num_frames
    if frames is None:
        if requires_frames(header, record):
            raise VolumeError(
                f"{name}: expected a 3-D image, got shape {header.shape}; choose frames with "
                f"{_frame_choices(header, record)}"
            )
        return None
    if frames == "all" or (count == 1 and frames in ("first", "mean")):
        return None
    if record.splits_frames:
        if count < record.clip_frames:
            raise VolumeError(
                f"{name}: number of frames is {count}, fewer than those of a clip of --frames {frames}; use "
                "shorter clips, or leave the image out"
            )
        return "each"
    if frames == "mean":
        return frames
    number = 0 if frames == "first" else int(frames)
    if number >= count:
        has = "1 frame, number 0" if count == 1 else f"{count} frames, numbers 0 to {count - 1}"
        raise VolumeError(
            f"{name}: no frame {number}: shape {header.shape} has {has}; choose another with --frames, or "
            "leave the image out"
        )
    return number


def requires_frames(header: VolumeHeader, record: RecordConfig) -> bool:
    """Whether an image is refused because its frames are several and the configuration chooses none."""
    is_vector = header.is_vector and header.num_frames == 1
    is_open = record.frames is None and len(header.shape) > 3 and not is_vector
    return is_open and bool(_frame_choices(header, record))


def _frame_choices(header: VolumeHeader, record: RecordConfig) -> str:
    """The values of --frames whose result fits into a record; "" if even one frame does not."""
    numbers = [n for n in _numbers_of_voxel(header, record, "first") if n > 1]
    if len(numbers) > 1:
        return ""
    choices = ["first"] if record.channels else ["each", "first"]
    if header.num_frames == 1 or not numbers:
        choices.insert(0, "all")
    if record.voxel_dtype != "native" and record.complex != "phase":
        choices.append("mean")
    return f"--frames {', '.join(choices)} or a number"


def require_storable(name: str, header: VolumeHeader, record: RecordConfig) -> RecordLayout:
    """Refuse an image that a record of a configuration cannot hold; otherwise return its layout."""
    layout = record_layout(name, header, record)
    if layout.stored_shape is not None:
        require_size(name, layout.stored_shape, layout.dtype, record)
    return layout


def require_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], record: RecordConfig) -> None:
    """Refuse a prepared volume of more bytes than a record can hold."""
    stored = dtype if record.voxel_dtype == "native" else numpy_dtype(record.voxel_dtype)
    size = math.prod(shape) * stored.itemsize
    if size <= MAX_VOLUME_BYTES:
        return
    exact = {"float32": 4 * math.prod(shape), "native": math.prod(shape) * dtype.itemsize}
    remedies = [
        f"use --voxel-dtype {other}, which takes {num_bytes:,}"
        for other, num_bytes in exact.items()
        if num_bytes <= MAX_VOLUME_BYTES
    ]
    if len(shape) > 3:
        remedies.append("split the image along time, for example with fslroi")
    remedies.append("crop or resample it with --shape or --spacing")
    raise VolumeError(
        f"{name}: shape {shape} takes {size:,} bytes as {stored.name}, more than a record can hold "
        f"({MAX_VOLUME_BYTES:,}: protobuf ends at 2 GiB); {', or '.join(remedies)}"
    )


def require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> None:
    """Refuse a prepared volume whose shape is not that of the dataset, in which None is any length."""
    if wanted is None:
        return
    if None in wanted and len(shape) != len(wanted):
        raise VolumeError(
            f"{name}: shape {shape} in a dataset of 3-D volumes of mixed shapes; leave it out, or use "
            "--frames all, which makes the last axis the channels"
        )
    if None not in wanted and shape != wanted:
        remedy = "crop and pad all images with --shape, or use --allow-mixed-shapes"
        if shape[3:] != wanted[3:]:
            remedy = (
                "if the last axis is frames, use --frames first, mean or a number; else use --frames all "
                "--allow-mixed-shapes"
            )
        raise VolumeError(f"{name}: shape {shape}, but the first image has {wanted}; {remedy}")


def require_frames(name: str, header: VolumeHeader, num_frames: int | None, record: RecordConfig) -> None:
    """Refuse an image that does not have the number of frames of the dataset's first image, or has too many.

    With `RecordConfig.max_frames`, it may have fewer. Of clips, `num_frames` is their number.
    """
    clip = record.clip_frames
    if record.max_frames is None and clip > 1 and header.num_frames // clip != num_frames:
        raise VolumeError(
            f"{name}: number of frames is {header.num_frames}, which does not give {num_frames} clips of "
            f"{clip}, as the first image does; use --max-frames with the largest number, or build the others "
            "into another dataset"
        )
    if clip == 1 and record.max_frames is None and header.num_frames != num_frames:
        raise VolumeError(
            f"{name}: number of frames is {header.num_frames}, but the first image has {num_frames}, and "
            "--frames each requires the same number of frames in every image; use --max-frames with the "
            "largest number, or build the others into another dataset"
        )
    if record.max_frames is not None and header.num_frames > record.max_frames:
        raise VolumeError(
            f"{name}: number of frames is {header.num_frames}, more than --max-frames {record.max_frames} "
            "allows; use a larger --max-frames, or leave the image out"
        )


def require_dtype(name: str, header: VolumeHeader, dtype: str | None) -> None:
    """Refuse an image that does not have the dtype on disk of the dataset's first image; None accepts any."""
    if dtype is not None and header.dtype_name != dtype:
        raise VolumeError(
            f"{name}: {header.dtype_name} voxels, but the first image has {dtype}; use --voxel-dtype float32"
        )
