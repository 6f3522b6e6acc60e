"""One image, from bytes to an array."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti import storage
from beam_nifti.config import RecordConfig, threshold_of
from beam_nifti.errors import VolumeError
from beam_nifti.formats import parse_header
from beam_nifti.header import (
    RecordLayout,
    VolumeHeader,
    record_layout,
    require_dtype,
    require_frames,
    require_shape,
    require_storable,
)
from beam_nifti.image import Image, open_image, read_header
from beam_nifti.intensity import find_ends, rescale_voxels, select_voxels
from beam_nifti.manifest import VolumeRow
from beam_nifti.rescale import Ends, Intensity, Scaling, Voxels, measure, require_range

_TILE: Final = 32
_TILE_ROWS: Final = 8
_TILE_FRAMES: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """One image in memory.

    Attributes:
        row: its row of the manifest.
        voxels: (X, Y, Z), or (X, Y, Z, C) of C frames or components; C order, native byte order; as stored
            until it is rescaled.
        scaling: from `voxels` to the image's units.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+.
        zooms: voxel size along each axis.
        dtype: name of the dtype on disk, such as "int16" or "rgb24".
        source: size and time of the file it was read from, or of the pair.
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
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
    record: RecordConfig | None = None,
) -> Volume:
    """Read one image.

    Args:
        row: names the image.
        folder: what a relative path is relative to: the manifest's folder.
        shape: that its record must have, None for axes of any length; None accepts any. What the header
            cannot tell, `prepare_volume` looks at.
        dtype: that it must have on disk; None accepts any.
        record: configuration of the record that is to be made of it; None means the default one.

    Returns:
        The voxels as stored, in C order and native byte order. `scaling.apply(voxels)` are the values
        that `nibabel.load(path).dataobj` gives; what is computed of them is float64, in the image's units.

    Raises:
        VolumeError: the file is missing, is no image of a known format, or does not hold what its header
            promises, or is not of that shape or dtype, or has no place in a record.
    """
    record = record or RecordConfig()
    parse = partial(_parse, row, shape, dtype, record)
    with open_image(row.path, storage.join(folder, row.path), parse) as image:
        layout = record_layout(row.path, image.header, record)
        voxels = _take(image, layout, _PARTS.get(record.complex))
    return _volume(row, voxels, image, layout)


def _parse(
    row: VolumeRow,
    shape: tuple[int | None, ...] | None,
    dtype: str | None,
    record: RecordConfig,
    head: bytes,
) -> VolumeHeader:
    """The header of an image that is what every image of the dataset has to be."""
    header = parse_header(row.path, head)
    layout = require_storable(row.path, header, record)
    if record.frames == "each":
        require_frames(row.path, header, row.num_frames)
    if layout.stored_shape is not None:
        require_shape(row.path, layout.stored_shape, shape)
    require_dtype(row.path, header, dtype)
    return header


def _volume(row: VolumeRow, voxels: Voxels, image: Image, layout: RecordLayout) -> Volume:
    header = image.header
    is_computed = header.is_complex or layout.frame == "mean"
    return Volume(
        row=row,
        voxels=voxels,
        scaling=Scaling() if is_computed else header.scaling,
        affine=header.affine,
        zooms=header.zooms,
        dtype=header.dtype_name,
        source=image.source,
    )


def load_frames(
    row: VolumeRow,
    folder: str = "",
    shape: tuple[int | None, ...] | None = None,
    dtype: str | None = None,
    record: RecordConfig | None = None,
) -> Iterator[Volume]:
    """Read one image, to hand out its frames one after the other as volumes of their own.

    Args:
        row: names the image, and says how many frames it must have and which are wanted.
        folder: as for `load_volume`.
        shape: as for `load_volume`, of a frame's record.
        dtype: as for `load_volume`.
        record: as for `load_volume`; its `frames` is "each".

    Returns:
        What `load_volume` gives of each frame where its number is the configuration's `frames`, made when it
        is asked for: so memory is that of the image's voxels, as they are in the file, and of one frame.

    Raises:
        VolumeError: as `load_volume`, for damage anywhere in the file, before there is a frame; or the
            image has another number of frames.
    """
    record = record or RecordConfig(frames="each")
    part = _PARTS.get(record.complex)
    parse = partial(_parse, row, shape, dtype, record)
    with open_image(row.path, storage.join(folder, row.path), parse) as image:
        layout = record_layout(row.path, image.header, record)
        content = image.read_all()
    size, frames = image.header.frame_bytes, image.header.num_frames

    def of_frame(frame: int) -> Volume:
        starts = range(frame * size, len(content), frames * size)
        components = (content[start : start + size] for start in starts)
        voxels = _join_components(components, image.header, layout, part)
        return _volume(row.of_frame(frame), voxels, image, layout)

    return map(of_frame, row.frames)  # which, unlike a generator, keeps no frame that it has handed out


def load_header(row: VolumeRow, folder: str = "", record: RecordConfig | None = None) -> VolumeHeader:
    """Read only the header of an image: the first kilobytes of its file.

    Args:
        row: names the image.
        folder: as for `load_volume`.
        record: as for `load_volume`.

    Raises:
        VolumeError: as `load_volume`, as far as the header tells.
    """

    def parse(head: bytes) -> VolumeHeader:
        header = parse_header(row.path, head)
        require_storable(row.path, header, record or RecordConfig())
        return header

    return read_header(row.path, storage.join(folder, row.path), parse)


_Part = Callable[[npt.NDArray[np.complex128]], npt.NDArray[np.float64]]
_PARTS: Final[dict[str | None, _Part]] = {
    "magnitude": np.abs,
    "phase": np.angle,
    "real-imag": lambda voxels: np.stack([voxels.real, voxels.imag], -1),
}


def _take(image: Image, layout: RecordLayout, part: _Part | None) -> Voxels:
    """What a record wants of an image's voxels, in C order and native byte order."""
    header, frame = image.header, layout.frame
    if frame is None:
        rest = tuple(n for n in header.shape[3:] if n > 1)
        return _arrange(image.read_all(), header, rest, layout, part)
    frames, components = header.num_frames, header.num_components
    wanted = range(frames) if frame == "mean" else [int(frame)]
    numbers = [v * frames + t for v in range(components) for t in wanted]
    # Strict, so that the image is asked for more than there is, and reads a packed file to its end.
    contents = zip(numbers, image.read_frames(numbers), strict=True)
    if frame != "mean":
        return _join_components((content for _, content in contents), header, layout, part)
    out = np.zeros(layout.shape, layout.dtype)
    for number, content in contents:
        target = out[..., number // frames] if components > 1 else out
        target += _arrange(content, header, (), layout, part)
    out /= frames
    return out if header.is_complex else header.scaling.apply(out)


def _join_components(
    contents: Iterable[memoryview], header: VolumeHeader, layout: RecordLayout, part: _Part | None
) -> Voxels:
    """One frame, of the bytes of each of its components; arguments as of `_arrange`."""
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
    """Voxels as they lie in the file, in C order and native byte order.

    Args:
        content: their bytes.
        header: of the image.
        rest: lengths of the axes that follow the spatial three.
        layout: of the record.
        part: what is made of complex voxels.
    """
    if header.dtype.names:  # the colours of a voxel lie side by side
        colours = np.frombuffer(content, np.uint8).reshape((header.num_colours, *header.grid), order="F")
        return _in_c_order(np.moveaxis(colours, 0, -1), layout.dtype)
    voxels = np.frombuffer(content, header.dtype).reshape((*header.grid, *rest), order="F")
    if part is None or not header.is_complex:
        return _in_c_order(voxels, layout.dtype)
    slope = header.scaling.slope
    slices = (voxels[:, :, z].astype(np.complex128) for z in range(header.grid[2]))
    return np.stack([part(s if slope == 1 else s * slope) for s in slices], 2)


def _in_c_order(voxels: Voxels, dtype: np.dtype[Any]) -> Voxels:
    """Turn a volume's axes from the file's order (x fastest) to C order, in a dtype of native byte order.

    In tiles whose cache lines stay in a core's cache until they are used up: at 256×256×256 voxels
    five times faster than numpy's copy in one go, at 91×109×91 as fast, and in 4-D, where the axis that
    was slowest becomes the fastest, at 64×64×40×1500 seven times and more.
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
