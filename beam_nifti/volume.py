"""One NIfTI image, from bytes to an array."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from beam_nifti import storage
from beam_nifti.config import RecordConfig, threshold_of
from beam_nifti.errors import VolumeError
from beam_nifti.header import (
    HEAD_BYTES,
    VolumeHeader,
    parse_header,
    require_dtype,
    require_shape,
    require_storable,
    stored_shape,
)
from beam_nifti.intensity import find_ends, rescale_voxels, select_voxels
from beam_nifti.manifest import VolumeRow
from beam_nifti.rescale import Ends, Intensity, Scaling, Voxels, measure, require_range
from beam_nifti.tfrecord import INFLATE_ERRORS

_TRAILING_BYTES: Final = 4096
"""Bytes after the voxels that are taken for padding; more is not what the header promises."""

_LARGE_FILE: Final = 64 << 20
"""Bytes of a file from which on its header is looked at before the rest is read."""

_HEAD_OF_FILE: Final = 1 << 16
"""Bytes of a file, perhaps packed, in which its header is looked for."""

_GZIP_MAGIC: Final = b"\x1f\x8b"
_DEFLATE_RATIO: Final = 1032
"""No deflate stream inflates to more than 1,032 times its size. Source: zlib's technical notes."""

_TILE: Final = 32
_TILE_ROWS: Final = 8
_TILE_FRAMES: Final = 16
_STREAM_ERRORS: Final[tuple[type[Exception], ...]] = (EOFError, *INFLATE_ERRORS)


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """One image in memory.

    Attributes:
        row: its row of the manifest.
        voxels: (X, Y, Z) or (X, Y, Z, T), C order, native byte order; as stored until it is rescaled.
        scaling: from `voxels` to the image's units.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+.
        zooms: voxel size along each axis.
        dtype: name of the dtype on disk, such as "int16".
        source: size and time of the file it was read from.
        intensity: its range, mean and standard deviation in the image's units; None until measured.
        ends: what of it becomes 0 and 1; None where its range says it.
    """

    row: VolumeRow
    voxels: Voxels
    scaling: Scaling
    affine: npt.NDArray[np.float64]
    zooms: tuple[float, float, float]
    dtype: str
    source: storage.Stat
    intensity: Intensity | None = None
    ends: Ends | None = None

    def release(self) -> None:
        """Let go of the voxels: for a step that has made the next thing of them and hands on only that.

        Beam holds an element until every step that follows is done with what was made of it.
        """
        object.__setattr__(self, "voxels", np.empty(0, self.voxels.dtype))


def load_volume(
    row: VolumeRow,
    folder: str = "",
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    record: RecordConfig | None = None,
) -> Volume:
    """Read one image.

    Args:
        row: names the image.
        folder: what a relative path is relative to: the manifest's folder.
        shape: that its record must have; None accepts any. What the header cannot tell, `prepare_volume`
            looks at.
        dtype: that it must have on disk; None accepts any.
        record: configuration of the record that is to be made of it; None means the default one.

    Returns:
        The voxels as stored, in C order and native byte order. `scaling.apply(voxels)` are the values
        that `nibabel.load(path).dataobj` gives.

    Raises:
        VolumeError: the file is missing, is no single-file NIfTI of real voxels, or does not hold
            what its header promises, or is not of that shape or dtype, or has no place in a record.
    """

    def read_header(head: bytes) -> VolumeHeader:
        header = _read_header(row.path, head, record)
        stored = stored_shape(row.path, header, record or RecordConfig())
        if stored is not None:
            require_shape(row.path, stored, shape)
        require_dtype(row.path, header, dtype)
        return header

    try:
        handle, source = storage.open_with_stat(storage.join(folder, row.path))
        with handle:
            data = _read(row.path, handle, source.size, read_header)
    except (OSError, ValueError) as e:
        raise _unreadable(row.path, e) from e
    read = _inflate if data[:2] == _GZIP_MAGIC else _plain
    header, content = read(row.path, data, read_header)
    del data  # packed, it is not needed any more; of a large volume that is much
    voxels = np.frombuffer(content, header.dtype, math.prod(header.shape), header.offset)
    voxels = voxels.reshape(header.shape, order="F")
    return Volume(
        row=row,
        voxels=_in_c_order(voxels),
        scaling=header.scaling,
        affine=header.affine,
        zooms=header.zooms,
        dtype=header.dtype.name,
        source=source,
    )


def _in_c_order(voxels: Voxels) -> Voxels:
    """Turn a volume's axes from the file's order (x fastest) to C order, in native byte order.

    In tiles whose cache lines stay in a core's cache until they are used up: at 256×256×256 voxels
    five times faster than numpy's copy in one go, at 91×109×91 as fast, and in 4-D, where the axis that
    was slowest becomes the fastest, at 64×64×40×1500 seven times and more.
    """
    out = np.empty(voxels.shape, voxels.dtype.newbyteorder("="))
    if voxels.ndim == 4:
        _, rows, slices, frames = voxels.shape
        starts = range(0, rows, _TILE_ROWS), range(slices), range(0, frames, _TILE_FRAMES)
        for y, z, t in itertools.product(*starts):
            tile = np.s_[:, y : y + _TILE_ROWS, z, t : t + _TILE_FRAMES]
            out[tile] = voxels[tile]
        return out
    _, rows, slices = voxels.shape
    for y in range(rows):
        for z in range(0, slices, _TILE):
            out[:, y, z : z + _TILE] = voxels[:, y, z : z + _TILE]
    return out


def load_header(row: VolumeRow, folder: str = "", record: RecordConfig | None = None) -> VolumeHeader:
    """Read only the header of an image: the first kilobytes of its file.

    Args:
        row: names the image.
        folder: as for `load_volume`.
        record: as for `load_volume`.

    Raises:
        VolumeError: as `load_volume`, as far as the header tells.
    """
    try:
        head = storage.read_head(storage.join(folder, row.path), _HEAD_OF_FILE)
    except (OSError, ValueError) as e:
        raise _unreadable(row.path, e) from e
    return _parse_head(row.path, head, lambda head: _read_header(row.path, head, record))


def _read_header(name: str, head: bytes, record: RecordConfig | None) -> VolumeHeader:
    header = parse_header(name, head)
    require_storable(name, header, record or RecordConfig())
    return header


def _parse_head(name: str, head: bytes, read_header: Callable[[bytes], VolumeHeader]) -> VolumeHeader:
    """The header, from the first kilobytes of a file."""
    if head[:2] == _GZIP_MAGIC:
        buffer = bytearray(HEAD_BYTES)
        try:
            size = _fill(isal_zlib._GzipReader(io.BytesIO(head)), memoryview(buffer))
        except _STREAM_ERRORS as e:
            raise VolumeError(f"{name}: {_damage(e)}") from e
        head = bytes(buffer[:size])
    return read_header(head)


def _read(
    name: str, handle: BinaryIO, size: int, read_header: Callable[[bytes], VolumeHeader]
) -> bytes | memoryview:
    """The whole of a file, unless it is large and its header disowns it."""
    if size <= _LARGE_FILE:
        return handle.read()
    head = handle.read(_HEAD_OF_FILE)
    _refuse_oversized(name, _parse_head(name, head, read_header), size)
    data = memoryview(np.empty(size, np.uint8)).cast("B")
    data[: len(head)] = head
    return data[: len(head) + _fill(handle, data[len(head) :])]


def _unreadable(name: str, error: OSError | ValueError) -> VolumeError:
    reason = error.strerror if isinstance(error, OSError) else None
    # A store that keeps failing is no fault of the image.
    remedy = "build again" if isinstance(error, TimeoutError) else "check the path and its rights"
    return VolumeError(f"{name}: cannot be read: {reason or error}; {remedy}")


def _refuse_oversized(name: str, header: VolumeHeader, size: int) -> None:
    """Spare the memory of a file that its header disowns, such as a run of fMRI or a wrong download."""
    promised = header.offset + header.num_bytes
    # What deflate cannot compress it stores, with 5 bytes a block of 16 KiB.
    if size > promised + promised // 1000 + _LARGE_FILE // 2:
        raise _disowned(name, header)


def _plain(
    name: str, data: bytes | memoryview, read_header: Callable[[bytes], VolumeHeader]
) -> tuple[VolumeHeader, memoryview]:
    header = read_header(bytes(data[:HEAD_BYTES]))
    _check_size(name, header, len(data))
    return header, memoryview(data)


def _inflate(
    name: str, packed: bytes | memoryview, read_header: Callable[[bytes], VolumeHeader]
) -> tuple[VolumeHeader, memoryview]:
    """Inflate into one buffer of the size that the header promises, and no further."""
    # isal offers reading into a buffer (a third of the CPU of growing one) only under this name.
    reader = isal_zlib._GzipReader(packed)  # type: ignore[arg-type]  # its stub knows files only
    head = bytearray(HEAD_BYTES)
    try:
        got = _fill(reader, memoryview(head))
        header = read_header(bytes(head[:got]))
        promised = header.offset + header.num_bytes
        if promised > _DEFLATE_RATIO * len(packed):
            raise VolumeError(
                f"{name}: the header promises {promised} bytes, more than {len(packed)} bytes of gzip "
                "can hold; copy the file again"
            )
        content = memoryview(np.empty(promised + _TRAILING_BYTES + 1, np.uint8)).cast("B")
        content[:got] = head[:got]
        got += _fill(reader, content[got:])
    except _STREAM_ERRORS as e:
        raise VolumeError(f"{name}: {_damage(e)}") from e
    _check_size(name, header, got)
    return header, content


def _fill(reader: Any, buffer: memoryview) -> int:
    size = 0
    while size < len(buffer) and (count := reader.readinto(buffer[size:])):
        size += count
    return size


def _damage(error: Exception) -> str:
    truncated = isinstance(error, EOFError)
    return f"{'truncated' if truncated else 'damaged'} gzip stream ({error}); copy the file again"


def _check_size(name: str, header: VolumeHeader, size: int) -> None:
    promised = header.offset + header.num_bytes
    if size < promised:
        raise VolumeError(
            f"{name}: truncated: {size} bytes where shape {header.shape} of {header.dtype.name} needs "
            f"{promised}; copy the file again"
        )
    if size > promised + _TRAILING_BYTES:
        raise _disowned(name, header)


def _disowned(name: str, header: VolumeHeader) -> VolumeError:
    return VolumeError(
        f"{name}: holds more than the {header.offset + header.num_bytes} bytes that shape "
        f"{header.shape} of {header.dtype.name} needs; repair its header or convert it again"
    )


def rescale_volume(volume: Volume, config: RecordConfig) -> Volume:
    """Measure a volume, and make its voxels what the record stores.

    Raises:
        VolumeError: it has NaN or infinite voxels, or no range where one is needed, or its voxels would
            be beyond what their dtype holds.
    """
    voxels, scaling = volume.voxels, volume.scaling
    try:
        intensity = measure(voxels, scaling)
        if config.method == "minmax" and intensity.min == intensity.max:
            raise VolumeError(
                f"all voxels are {intensity.min:g}: a constant image has no range to rescale; "
                "leave it out, or use --rescale none"
            )
        selection = None
        if config.rescale_within is not None:
            selection = select_voxels(voxels, scaling, threshold_of(config.rescale_within))
        ends = find_ends(voxels, scaling, intensity, config, selection)
        del selection  # it is not needed any more, and as large as the voxels of a mask
        if not config.is_bounded:
            require_range(intensity, ends, config.rescaled_dtype)
        measured = replace(volume, intensity=intensity, ends=ends)
        if config.voxel_dtype == "native":
            return measured
        rescaled = rescale_voxels(voxels, scaling, intensity, ends, config)
    except VolumeError as e:
        raise VolumeError(f"{volume.row.path}: {e}") from e
    return replace(measured, voxels=rescaled, scaling=Scaling())
