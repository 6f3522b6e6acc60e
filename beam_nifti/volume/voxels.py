"""The voxels of an image that is open: from the order of its file to C order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.volume.files import Image
from beam_nifti.volume.header import RecordLayout, VolumeHeader
from beam_nifti.volume.rescale import Voxels

_TILE: Final = 32
_TILE_ROWS: Final = 8
_TILE_FRAMES: Final = 16
_Part = Callable[[npt.NDArray[np.complex128]], npt.NDArray[np.float64]]
_PARTS: Final[dict[str | None, _Part]] = {
    "magnitude": np.abs,
    "phase": np.angle,
    "real-imag": lambda voxels: np.stack([voxels.real, voxels.imag], -1),
}


def take_voxels(image: Image, layout: RecordLayout, complex_part: str | None = None) -> Voxels:
    """The voxels of an open image for a record of this layout, in C order and native byte order."""
    part = _PARTS.get(complex_part)
    header, frame = image.header, layout.frame
    if frame is None:
        rest = tuple(n for n in header.shape[3:] if n > 1)
        return _arrange(image.read_all(), header, rest, layout, part)
    frames, components = header.num_frames, header.num_components
    wanted = range(frames) if frame == "mean" else [int(frame)]
    numbers = [v * frames + t for v in range(components) for t in wanted]
    # Strict, so that the image is asked for more than there is, and reads a compressed file to its end.
    contents = zip(numbers, image.read_frames(numbers), strict=True)
    if frame != "mean":
        return _join_components((content for _, content in contents), header, layout, part)
    out = np.zeros(layout.shape, layout.dtype)
    for number, content in contents:
        target = out[..., number // frames] if components > 1 else out
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # of infinite voxels, which are refused or replaced
            target += _arrange(content, header, (), layout, part)
    out /= frames
    return out if header.is_complex else header.scaling.apply(out)


def cut_frame(
    content: memoryview, frame: int, header: VolumeHeader, layout: RecordLayout, complex_part: str | None
) -> Voxels:
    """One frame, by its number from 0, of an image that was read whole: as `take_voxels`."""
    size = header.frame_bytes
    starts = range(frame * size, len(content), header.num_frames * size)
    components = (content[start : start + size] for start in starts)
    return _join_components(components, header, layout, _PARTS.get(complex_part))


def cut_clip(
    content: memoryview, first: int, header: VolumeHeader, layout: RecordLayout, complex_part: str | None
) -> Voxels:
    """Consecutive frames as channels, as many as the layout has, from the first one; as `cut_frame`."""
    clip = np.empty(layout.shape, layout.dtype)
    for number in range(layout.shape[3]):
        clip[..., number] = cut_frame(content, first + number, header, layout, complex_part)
    return clip


def _join_components(
    contents: Iterable[memoryview], header: VolumeHeader, layout: RecordLayout, part: _Part | None
) -> Voxels:
    """One frame, from the bytes of each of its components; arguments as for `_arrange`."""
    volumes = (_arrange(content, header, (), layout, part) for content in contents)
    if header.num_components == 1:
        (voxels,) = volumes
        return voxels
    out = np.empty(layout.shape, layout.dtype)
    for number, voxels in enumerate(volumes):
        out[..., number] = voxels
    return out


def _arrange(
    content: memoryview, header: VolumeHeader, rest: tuple[int, ...], layout: RecordLayout, part: _Part | None
) -> Voxels:
    """Voxels of a record, in C order and native byte order, from their bytes in the order of the file.

    The axes that follow the spatial three have the lengths `rest`; `part` is what is made of complex voxels.
    """
    if header.dtype.names:  # the colours of a voxel lie side by side
        colours = np.frombuffer(content, np.uint8).reshape((header.num_colours, *header.space), order="F")
        return _in_c_order(np.moveaxis(colours, 0, -1), layout.dtype)
    voxels = np.frombuffer(content, header.dtype).reshape((*header.space, *rest), order="F")
    if part is None or not header.is_complex:
        return _in_c_order(voxels, layout.dtype)
    slope = header.scaling.slope
    slices = (voxels[:, :, z].astype(np.complex128) for z in range(header.space[2]))
    return np.stack([part(s if slope == 1 else s * slope) for s in slices], 2)


def _in_c_order(voxels: Voxels, dtype: np.dtype[Any]) -> Voxels:
    """Turn a volume's axes from the file's order (x fastest) to C order, in a dtype of native byte order.

    Copies tiles whose cache lines stay in a core's cache: at 256×256×256 voxels five times faster than
    numpy's copy, at 91×109×91 as fast, and in 4-D at 64×64×40×1500 at least seven times faster.
    """
    out = np.empty(voxels.shape, dtype)
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
