"""Preparation of a volume between loading and rescaling. Conventions: docs/preparation.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import MASK_DTYPES, RecordConfig
from beam_nifti.errors import UsageError, VolumeError, is_of_machine
from beam_nifti.manifest.redaction import describe
from beam_nifti.volume.grid import (
    UNTURNED,
    Grid,
    Shape3,
    agreed_zooms,
    axes_to,
    is_usable,
    respace,
    turn,
    turn_voxels,
    turn_zooms,
)
from beam_nifti.volume.header import MAX_VOLUME_BYTES, require_shape, require_size
from beam_nifti.volume.intensity import describe_rule, select_voxels
from beam_nifti.volume.label_map import pick_nearest
from beam_nifti.volume.nonfinite import replace_nonfinite
from beam_nifti.volume.notes import join_notes
from beam_nifti.volume.rescale import Scaling, Voxels
from beam_nifti.volume.user_function import Function, load_functions
from beam_nifti.volume.volume import Volume

if TYPE_CHECKING:
    from scipy import sparse

_SLAB_VOXELS: Final = 1 << 11
_STORED_DTYPES: Final = ("float16", "bfloat16")  # only of rescaled voxels


def prepare_volume(
    volume: Volume,
    record: RecordConfig,
    shape: tuple[int | None, ...] | None = None,
    *,
    release: bool = False,
) -> Volume:
    """Prepare a volume by a configuration; the result must have the `shape`, if given.

    With `release`, the voxels are taken from the volume, which is empty afterwards, so that there are never
    more than two copies of them.

    Raises:
        VolumeError: the volume cannot be prepared, or has another shape, or does not fit a record.
        UsageError: the user's function cannot be imported, is not the dataset's, or ended the process.
    """
    prepared = replace(volume, config=record)
    if release:
        volume.release()
    elif record.preprocess is not None or (record.nonfinite is not None and volume.voxels.dtype.kind == "f"):
        prepared = replace(prepared, voxels=volume.voxels.copy())  # which these change in place
    path = volume.row.path
    try:
        for step in _steps(record):
            prepared = step(prepared)
    except VolumeError as e:
        raise VolumeError(f"{path}: {e}") from e
    require_shape(path, prepared.voxels.shape, shape)
    require_size(path, prepared.voxels.shape, prepared.voxels.dtype, record)
    return prepared


def _steps(record: RecordConfig) -> list[Callable[[Volume], Volume]]:
    steps: list[Callable[[Volume], Volume]] = []
    count = record.num_channels if record.channels else None
    if record.nonfinite is not None:
        steps.append(partial(make_finite, record=record))
    for name, function in load_functions(record):
        steps.append(partial(apply_function, function=function, name=name, num_channels=count))
    if record.orientation is not None:
        steps.append(partial(orient, code=record.orientation))
    if record.spacing is not None:
        steps.append(partial(resample, spacing=record.spacing))
    if record.crop_foreground is not None:
        steps.append(partial(crop_foreground, rule=record.crop_foreground))
    if record.shape is not None:
        steps.append(partial(crop_or_pad, shape=record.shape, each=record.channels is not None))
    return steps


def make_finite(volume: Volume, record: RecordConfig) -> Volume:
    """Replace NaN and infinite voxels of each image in place, by `RecordConfig.nonfinite`, and count them.

    Raises:
        VolumeError: an image has no finite voxel, or native voxels cannot hold the value.
    """
    is_native = record.voxel_dtype == "native"
    voxels, scaling, counts = replace_nonfinite(
        volume.voxels, volume.scaling, record.nonfinite or "", record.channels, is_native=is_native
    )
    earlier = volume.num_nonfinite or (0,) * len(counts)  # another step may have replaced some already
    return replace(
        volume,
        voxels=voxels,
        scaling=scaling,
        num_nonfinite=tuple(was + now for was, now in zip(earlier, counts, strict=True)),
    )


def apply_function(volume: Volume, function: Function, name: str, num_channels: int | None = None) -> Volume:
    """Call the user's function, which may change the voxels, and check its result.

    Voxels, scaling, affine and mask are taken from the result, voxel sizes from its affine. The function gets
    copies of mask and affine, which frames of an image share. The result must have `num_channels` channels;
    None accepts any.

    Raises:
        VolumeError: it raised an exception, or its result is not a volume.
        MemoryError: as the function raised it, like other errors of the machine.
        UsageError: it ended the process.
    """
    own = replace(
        volume, affine=volume.affine.copy(), mask=None if volume.mask is None else volume.mask.copy()
    )
    try:
        made = function(own)
    except SystemExit as e:
        raise UsageError(f"--preprocess {name} called sys.exit(); raise an exception instead") from e
    except Exception as e:
        if is_of_machine(e):
            raise
        said = describe(e, is_anonymous=bool(volume.row.pseudonyms))
        raise VolumeError(f"--preprocess {name} failed: {said}; repair it, or leave the image out") from e
    masks = () if volume.mask is None else (volume.mask.dtype.name,)
    problem = _wrong_with(made) or _wrong_beside(made, masks, num_channels)
    if problem:
        raise VolumeError(f"--preprocess {name} {problem}")
    grid = Grid.of(made.voxels.shape, np.asarray(made.affine, np.float64))
    return replace(
        volume,
        voxels=made.voxels,
        scaling=made.scaling,
        affine=grid.affine,
        zooms=grid.zooms,
        mask=None if volume.mask is None else made.mask,
    )


def require_volume(volume: Volume, step: str) -> Volume:
    """Check the volume from a user's own step, as `apply_function` checks a result.

    Returns the volume with an affine of float64 and the voxel sizes of that affine.
    """
    name = f"the step before {step}"
    if not isinstance(volume, Volume):
        raise VolumeError(f"{name} {_wrong_with(volume)}")
    config = volume.config or RecordConfig()
    masks: Collection[str] = () if volume.mask is None else MASK_DTYPES
    if config.mask_dtype is not None:
        masks = (config.mask_dtype,)
    num_channels = config.num_channels if config.channels else None
    problem = _wrong_with(volume, _STORED_DTYPES if volume.intensities else ())
    problem = problem or _wrong_beside(volume, masks, num_channels)
    if problem:
        raise VolumeError(f"{volume.row.path}: {name} {problem}")
    affine = np.asarray(volume.affine, np.float64)
    x, y, z = agreed_zooms(affine, volume.zooms).tolist()
    if affine is volume.affine and (x, y, z) == volume.zooms:
        return volume
    return replace(volume, affine=affine, zooms=(x, y, z))


def _wrong_with(made: object, dtypes: Collection[str] = ()) -> str | None:
    """What is wrong with a volume, whose voxels may also be of some further dtypes."""
    if not isinstance(made, Volume):
        return f"returned a {type(made).__name__}; return dataclasses.replace(volume, voxels=…)"
    voxels: object = made.voxels
    if not isinstance(voxels, np.ndarray):
        return f"returned voxels that are a {type(voxels).__name__}; return a numpy array"
    if isinstance(voxels, np.ma.MaskedArray):
        return "returned masked voxels; fill them, such as with voxels.filled(0)"
    if voxels.dtype.kind not in "iu" and voxels.dtype.name not in ("float32", "float64", *dtypes):
        return f"returned {voxels.dtype} voxels; return integers, float32 or float64"
    if voxels.ndim not in (3, 4) or voxels.size == 0:
        return f"returned voxels of shape {voxels.shape}; return (X, Y, Z) or (X, Y, Z, channels)"
    if not (voxels.flags.c_contiguous and voxels.dtype.isnative):
        return "returned voxels in another order; return numpy.ascontiguousarray of them, in native bytes"
    scaling: object = made.scaling
    if not isinstance(scaling, Scaling):
        return f"returned a scaling that is a {type(scaling).__name__}; return the Scaling that it got"
    affine: object = made.affine
    if not isinstance(affine, np.ndarray):
        return f"returned an affine that is a {type(affine).__name__}; return a finite (4, 4) array"
    is_affine = affine.shape == (4, 4) and affine.dtype.kind in "iuf" and affine[3].tolist() == [0, 0, 0, 1]
    if not is_affine or not is_usable(affine.astype(np.float64)):
        return (
            f"returned the affine {affine.tolist()}; return a finite (4, 4) array that is not singular and "
            "whose last row is 0, 0, 0, 1"
        )
    return None


def _wrong_beside(made: Volume, masks: Collection[str], num_channels: int | None = None) -> str | None:
    """What is wrong with a volume's channels, and with its mask, which must have one of some dtypes."""
    shape = made.voxels.shape
    if num_channels not in (None, *shape[3:]):
        return f"returned voxels of shape {shape}; return all {num_channels} channels that it got"
    found: object = made.mask
    if not masks:
        return None
    if not isinstance(found, np.ndarray) or found.dtype.name not in masks or not found.dtype.isnative:
        what = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
        return f"returned a mask of {what}; return an array of {' or '.join(masks)}"
    if found.shape != shape[:3] or not found.flags.c_contiguous:
        return (
            f"returned a mask of shape {found.shape} for voxels of {shape}; transform both, and return "
            "numpy.ascontiguousarray of each"
        )
    return None


def orient(volume: Volume, code: str) -> Volume:
    """Reorder and flip the axes to an orientation, exactly; an oblique image stays oblique."""
    grid = Grid.of(volume.voxels.shape, volume.affine)
    turns = axes_to(grid, code)
    if np.array_equal(turns, UNTURNED):
        return volume

    def turned(voxels: Voxels) -> Voxels:
        return np.ascontiguousarray(turn_voxels(voxels, turns))

    return replace(
        volume,
        voxels=turned(volume.voxels),
        affine=turn(grid, turns).affine,
        zooms=turn_zooms(volume.zooms, turns),
        mask=None if volume.mask is None else turned(volume.mask),
    )


def resample(volume: Volume, spacing: Sequence[float]) -> Volume:
    """Interpolate linearly to another voxel size (mm) around the same centre, without smoothing first.

    Outside the outermost voxel centres, the nearest voxel counts. Frames are resampled one by one. A mask
    gets the label of the nearest voxel. The voxels become float32 in the image's units, unless every axis
    already has that voxel size.

    Raises:
        VolumeError: the affine gives voxels no size along an axis, or a record cannot hold the result.
    """
    old = Grid.of(volume.voxels.shape, volume.affine)
    new, starts, steps = respace(old, spacing)
    if steps == [1.0] * 3:
        return replace(volume, zooms=old.zooms)
    _require_grid(new.shape, volume.voxels.shape[3:], spacing)
    # As sparse matrices, one axis after the other: what scipy.ndimage.affine_transform gives, in a ninth
    # of its time (docs/preparation.md), and no more than a slice in float64, or several small ones.
    first, second, third = map(interpolation_weights, old.shape, new.shape, starts, steps)
    channels = volume.voxels.shape[3:]
    frames = volume.voxels.reshape(*old.shape, -1)
    voxels = np.empty((*new.shape, frames.shape[3]), np.float32)
    # Rescaling refuses what comes of infinite voxels, and of those that float32 cannot hold.
    with np.errstate(over="ignore", invalid="ignore"):
        for xs in _slabs(new.shape[0], max(math.prod(old.shape[1:]), math.prod(new.shape[1:]))):
            for frame in range(frames.shape[3]):
                between = _weighted(first, xs, frames[..., frame], volume.scaling)
                along_y = second @ between.swapaxes(0, 1).reshape(old.shape[1], -1)
                turned = along_y.reshape(new.shape[1], -1, old.shape[2]).T
                along_z = third @ turned.reshape(old.shape[2], -1)
                voxels[xs, ..., frame] = along_z.reshape(new.shape[2], -1, new.shape[1]).transpose(1, 2, 0)
    return replace(
        volume,
        voxels=voxels.reshape(new.shape + channels),
        scaling=Scaling(),
        affine=new.affine,
        zooms=new.zooms,
        mask=None if volume.mask is None else pick_nearest(volume.mask, new.shape, starts, steps),
    )


def _weighted(
    weights: sparse.csr_array, rows: slice, slices: Voxels, scaling: Scaling
) -> npt.NDArray[np.float64]:
    """Sums of one or two slices each, by some rows of their weights, as float64 (rows, Y, Z)."""
    begins = weights.indptr[rows.start : rows.stop + 1]
    counts, begins = np.diff(begins), begins[:-1]
    totals = np.zeros((len(begins), *slices.shape[1:]))
    if len(begins) == 1:  # without copies of large slices
        for at in range(begins[0], begins[0] + counts[0]):
            totals[0] += weights.data[at] * scaling.apply(slices[weights.indices[at]])
        return totals
    for which in range(counts.max()):
        places = np.flatnonzero(counts > which)
        at = begins[places] + which
        values = scaling.apply(slices[weights.indices[at]])
        totals[places] += weights.data[at, np.newaxis, np.newaxis] * values
    return totals


def _slabs(num_slices: int, slice_voxels: int) -> Iterator[slice]:
    """Slices to handle at once: one, or several where they are small, as calls take longer than those."""
    step = max(1, _SLAB_VOXELS // slice_voxels)
    return (slice(start, start + step) for start in range(0, num_slices, step))


def _require_grid(shape: Shape3, channels: tuple[int, ...], spacing: Sequence[float]) -> None:
    # Though they may be cropped afterwards: an affine that is wrong by a thousand asks for terabytes.
    made = (*shape, *channels)
    if 4 * math.prod(made) > MAX_VOLUME_BYTES:
        raise VolumeError(
            f"--spacing {','.join(f'{n:g}' for n in spacing)} would make shape {made}, more than "
            f"{MAX_VOLUME_BYTES:,} bytes of float32; repair the affine, or use a larger --spacing"
        )


def interpolation_weights(old_size: int, new_size: int, start: float, step: float) -> sparse.csr_array:
    """The weights of a linear interpolation, float64 (new_size, old_size), as `numpy.interp`, bit for bit.

    `start` is the index in the line of the first new voxel, and `step` the distance to the next one.
    """
    from scipy import sparse  # 0.15 s, which no other build shall wait for

    places = np.clip(start + step * np.arange(new_size), 0, old_size - 1)
    below = np.floor(places)
    shares = places - below
    rows = np.tile(np.arange(new_size, dtype=np.int32), 2)
    columns = np.concatenate([below, np.minimum(below + 1, old_size - 1)]).astype(np.int32)
    weights = sparse.coo_array((np.concatenate([1 - shares, shares]), (rows, columns)), (new_size, old_size))
    matrix = weights.tocsr()
    matrix.eliminate_zeros()
    return matrix


def crop_foreground(volume: Volume, rule: str) -> Volume:
    """Crop to the bounding box of the foreground, of all frames together."""
    shape, mask = volume.voxels.shape[:3], volume.mask
    along = [np.zeros(size, bool) for size in shape]
    for xs in _slabs(shape[0], math.prod(volume.voxels.shape[1:])):
        slab = volume.voxels[xs]
        selected = select_voxels(slab, volume.scaling, rule, None if mask is None else mask[xs])
        found = np.any(selected.reshape(*slab.shape[:3], -1), axis=3)
        along[0][xs] = found.any(axis=(1, 2))
        along[1] |= found.any(axis=(0, 2))
        along[2] |= found.any(axis=(0, 1))
    if not along[0].any():
        lower = "lower the threshold, or " if rule.startswith("above") else ""
        raise VolumeError(
            f"no voxel is {describe_rule(rule)} (--crop-foreground {rule}); {lower}leave the image out"
        )
    starts, stops = zip(*((int(i[0]), int(i[-1]) + 1) for i in map(np.flatnonzero, along)), strict=True)
    box = tuple(map(slice, starts, stops))
    voxels = np.ascontiguousarray(volume.voxels[box])
    grid = Grid.of(shape, volume.affine)
    cropped = replace(
        volume,
        voxels=voxels,
        affine=grid.part(starts, voxels.shape[:3]).affine,
        mask=None if mask is None else np.ascontiguousarray(mask[box]),
    )
    return _noting_lost_labels(cropped, mask, "labels-lost-to-crop")


def _noting_lost_labels(volume: Volume, mask: Voxels | None, note: str) -> Volume:
    """A volume with a note if its mask has fewer labelled voxels than `mask`, from which it was made."""
    if mask is None or volume.mask is None or np.count_nonzero(volume.mask) == np.count_nonzero(mask):
        return volume
    return replace(volume, notes=join_notes([volume.notes, [note]]))


def crop_or_pad(volume: Volume, shape: Shape3, *, each: bool = False) -> Volume:
    """Crop and pad each axis around its centre; if the number is odd, with one voxel more at the end.

    Padding has the volume's own least value, so its range stays; that of a mask is 0.
    """
    old = Grid.of(volume.voxels.shape, volume.affine)
    if old.shape == shape:
        return volume
    voxels = volume.voxels
    cut = [max(0, size - wanted) // 2 for size, wanted in zip(old.shape, shape, strict=True)]
    missing = [max(0, wanted - size) for size, wanted in zip(old.shape, shape, strict=True)]
    widths = [(n // 2, n - n // 2) for n in missing]
    least = None
    if any(missing):
        # NaN voxels that are cropped away shall not come back as padding.
        ufunc = np.fmin if volume.scaling.slope > 0 else np.fmax
        least = ufunc.reduce(voxels, axis=(0, 1, 2) if each else None)
    starts = [start - n // 2 for start, n in zip(cut, missing, strict=True)]
    fitted = replace(
        volume,
        voxels=_fit(voxels, shape, cut, widths, least),
        affine=old.part(starts, shape).affine,
        mask=None if volume.mask is None else _fit(volume.mask, shape, cut, widths, 0),
    )
    return _noting_lost_labels(fitted, volume.mask, "labels-lost-to-shape")


def _fit(
    voxels: Voxels, shape: Shape3, cut: Sequence[int], widths: Sequence[tuple[int, int]], padding: Any
) -> Voxels:
    """Voxels from `cut` on, with `padding` of these widths around them: a number, or one per channel."""
    cropped = voxels[tuple(slice(start, start + size) for start, size in zip(cut, shape, strict=True))]
    if not any(map(any, widths)):
        return np.ascontiguousarray(cropped)
    out = np.empty((*shape, *voxels.shape[3:]), voxels.dtype)
    out[...] = padding
    inside = (slice(before, before + size) for (before, _), size in zip(widths, cropped.shape, strict=False))
    out[tuple(inside)] = cropped
    return out
