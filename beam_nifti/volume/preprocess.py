"""Preparation of a volume between loading and rescaling. Conventions: docs/preparation.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from beam_nifti.config import MASK_DTYPES, RecordConfig, ReferenceGrid
from beam_nifti.errors import UsageError, VolumeError, is_of_machine
from beam_nifti.manifest.redaction import describe
from beam_nifti.volume.align import align_labels, align_voxels, loses_labels
from beam_nifti.volume.grid import (
    UNTURNED,
    Grid,
    Resampling,
    Shape3,
    agreed_zooms,
    axes_to,
    covers,
    fit,
    is_usable,
    reference_grid,
    require_overlap,
    resize,
    resize_longest,
    respace,
    turn,
    turn_voxels,
    turn_zooms,
)
from beam_nifti.volume.header import MAX_VOLUME_BYTES, require_shape, require_size
from beam_nifti.volume.intensity import describe_rule, select_voxels
from beam_nifti.volume.label_map import of_each_mask
from beam_nifti.volume.nonfinite import replace_nonfinite
from beam_nifti.volume.notes import join_notes
from beam_nifti.volume.resample import LINEAR, Interpolation, resample_labels, resample_voxels, split_slices
from beam_nifti.volume.rescale import NO_SCALING, Scaling, Voxels
from beam_nifti.volume.target import TARGET_DTYPE, replace_in_target
from beam_nifti.volume.user_function import Function, load_functions
from beam_nifti.volume.volume import Volume

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
    how, each = Interpolation.of(record), record.channels is not None
    if record.nonfinite is not None:
        steps.append(partial(make_finite, record=record))
    for name, function in load_functions(record):
        steps.append(partial(apply_function, function=function, name=name, num_channels=count))
    if record.orientation is not None:
        steps.append(partial(orient, code=record.orientation))
    if record.reference is not None:
        steps.append(partial(align, reference=record.reference, how=how, each=each))
    if record.spacing is not None:
        steps.append(partial(resample, spacing=record.spacing, how=how))
    if record.resize is not None:
        steps.append(partial(resize_to, shape=record.resize, how=how))
    if record.resize_longest is not None:
        steps.append(partial(resize_longest_to, size=record.resize_longest, how=how, each=each))
    if record.crop_foreground is not None:
        steps.append(partial(crop_foreground, rule=record.crop_foreground))
    if record.shape is not None:
        steps.append(partial(crop_or_pad, shape=record.shape, each=each))
    return steps


def make_finite(volume: Volume, record: RecordConfig) -> Volume:
    """Replace NaN and infinite voxels by `RecordConfig.nonfinite`, and count them; those of images in place.

    Raises:
        VolumeError: an image or the target has no finite voxel, or native voxels cannot hold the value.
    """
    is_native = record.voxel_dtype == "native"
    voxels, scaling, counts = replace_nonfinite(
        volume.voxels, volume.scaling, record.nonfinite or "", record.channels, is_native=is_native
    )
    earlier = volume.num_nonfinite or (0,) * len(counts)  # another step may have replaced some already
    target, count = volume.target, 0
    if target is not None:
        try:
            target, count = replace_in_target(target, record.nonfinite or "")
        except VolumeError as e:
            raise VolumeError(f"the target: {e}") from e
    return replace(
        volume,
        voxels=voxels,
        scaling=scaling,
        num_nonfinite=tuple(was + now for was, now in zip(earlier, counts, strict=True)),
        target=target,
        target_nonfinite=volume.target_nonfinite + count,
    )


def apply_function(volume: Volume, function: Function, name: str, num_channels: int | None = None) -> Volume:
    """Call the user's function, which may change the voxels, and check its result.

    Voxels, scaling, affine, mask and target are taken from the result, voxel sizes from its affine. The
    function gets copies of affine, mask and target, which frames of an image share. The result must have
    `num_channels` channels; None accepts any.

    Raises:
        VolumeError: it raised an exception, or its result is not a volume.
        MemoryError: as the function raised it, like other errors of the machine.
        UsageError: it ended the process.
    """
    own = replace(
        volume,
        affine=volume.affine.copy(),
        mask=None if volume.mask is None else volume.mask.copy(),
        target=None if volume.target is None else volume.target.copy(),
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
    has_target = volume.target is not None
    axes = () if volume.mask is None else volume.mask.shape[3:]
    problem = _wrong_with(made) or _wrong_beside(made, masks, axes, num_channels, has_target=has_target)
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
        target=made.target if has_target else None,
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
    has_target = config.has_target is not None or volume.target is not None
    axes = config.mask_axes
    problem = problem or _wrong_beside(volume, masks, axes, num_channels, has_target=has_target)
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
        return (
            f"returned an object of type {type(made).__name__}; return dataclasses.replace(volume, voxels=…)"
        )
    voxels: object = made.voxels
    if not isinstance(voxels, np.ndarray):
        return f"returned voxels of type {type(voxels).__name__}; return a numpy array"
    if isinstance(voxels, np.ma.MaskedArray):
        return "returned masked voxels; fill them, such as with voxels.filled(0)"
    if voxels.dtype.kind not in "iu" and voxels.dtype.name not in ("float32", "float64", *dtypes):
        return f"returned {voxels.dtype} voxels; return integers, float32 or float64"
    if voxels.ndim not in (3, 4) or voxels.size == 0:
        return f"returned voxels of shape {voxels.shape}; return (X, Y, Z) or (X, Y, Z, channels)"
    if not (voxels.flags.c_contiguous and voxels.dtype.isnative):
        return (
            "returned voxels in another order; return numpy.ascontiguousarray of them, in native byte order"
        )
    scaling: object = made.scaling
    if not isinstance(scaling, Scaling):
        return f"returned a scaling of type {type(scaling).__name__}; return the Scaling that it got"
    affine: object = made.affine
    if not isinstance(affine, np.ndarray):
        return f"returned an affine of type {type(affine).__name__}; return a finite (4, 4) array"
    is_affine = affine.shape == (4, 4) and affine.dtype.kind in "iuf" and affine[3].tolist() == [0, 0, 0, 1]
    if not is_affine or not is_usable(affine.astype(np.float64)):
        return (
            f"returned the affine {affine.tolist()}; return a finite (4, 4) array that is not singular and "
            "whose last row is 0, 0, 0, 1"
        )
    return None


def _wrong_beside(
    made: Volume,
    masks: Collection[str],
    mask_axes: tuple[int, ...],
    num_channels: int | None = None,
    *,
    has_target: bool,
) -> str | None:
    """What is wrong with the channels, the mask, which must have one of some dtypes, and the target."""
    shape = made.voxels.shape
    if num_channels not in (None, *shape[3:]):
        return f"returned voxels of shape {shape}; return all {num_channels} channels that it got"
    beside: tuple[tuple[str, object, Collection[str], tuple[int, ...]], ...] = (
        ("mask", made.mask, masks, mask_axes),
        ("target", made.target, (TARGET_DTYPE,) if has_target else (), ()),
    )
    for name, found, dtypes, axes in beside:
        if not dtypes:
            if found is not None:
                remedy = f"name a column of {name}s with --{name}-column"
                return f"returned a {name}, but records have none; {remedy}"
            continue
        if not isinstance(found, np.ndarray) or found.dtype.name not in dtypes or not found.dtype.isnative:
            what = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
            return f"returned a {name} of {what}; return an array of {' or '.join(dtypes)}"
        if found.shape != shape[:3] + axes or not found.flags.c_contiguous:
            several = f" and {axes[0]} masks" if axes else ""
            return (
                f"returned a {name} of shape {found.shape} for voxels of {shape}{several}; transform both, "
                "and return numpy.ascontiguousarray of each"
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
        target=None if volume.target is None else turned(volume.target),
    )


def resample(volume: Volume, spacing: Sequence[float], how: Interpolation = LINEAR) -> Volume:
    """Resample to another voxel size (mm) around the same centre.

    Outside the outermost voxel centres, the nearest voxel counts. Frames are resampled one by one. The voxels
    become float32 in the image's units, unless every axis already has that voxel size, or they are those of
    nearest neighbours.

    Raises:
        VolumeError: the affine gives voxels no size along an axis, or a record cannot hold the result.
    """
    resampling = respace(Grid.of(volume.voxels.shape, volume.affine), spacing)
    return _resampled(volume, resampling, how, f"--spacing {','.join(f'{n:g}' for n in spacing)}")


def resize_to(volume: Volume, shape: Shape3, how: Interpolation = LINEAR) -> Volume:
    """Resample the whole field of view to so many voxels, as `resample`."""
    resampling = resize(Grid.of(volume.voxels.shape, volume.affine), shape)
    return _resampled(volume, resampling, how, f"--resize {','.join(map(str, shape))}")


def resize_longest_to(
    volume: Volume, size: int, how: Interpolation = LINEAR, *, each: bool = False
) -> Volume:
    """Resample so that the longest axis has `size` voxels, and pad to a cube, as `crop_or_pad`."""
    _require_grid((size, size, size), volume.voxels.shape[3:], f"--resize-longest {size}")
    resampling = resize_longest(Grid.of(volume.voxels.shape, volume.affine), size)
    resized = _resampled(volume, resampling, how, f"--resize-longest {size}")
    return crop_or_pad(resized, (size, size, size), each=each)


def _resampled(volume: Volume, resampling: Resampling, how: Interpolation, option: str) -> Volume:
    grid = resampling.grid
    if resampling.is_exact:
        return replace(volume, zooms=grid.zooms)
    _require_grid(grid.shape, volume.voxels.shape[3:], option)
    voxels, scaling = resample_voxels(volume.voxels, volume.scaling, resampling, how)
    target = volume.target
    return replace(
        volume,
        voxels=voxels,
        scaling=scaling,
        affine=grid.affine,
        zooms=grid.zooms,
        mask=None if volume.mask is None else resample_labels(volume.mask, resampling, how),
        target=None if target is None else resample_voxels(target, NO_SCALING, resampling, how)[0],
    )


def align(volume: Volume, reference: ReferenceGrid, how: Interpolation, *, each: bool = False) -> Volume:
    """Interpolate at the positions of the voxels of a reference, as `align_voxels`.

    Raises:
        VolumeError: the volume has nothing there, or a record cannot hold the result.
    """
    old, new = Grid.of(volume.voxels.shape, volume.affine), reference_grid(reference)
    require_overlap(old, reference)
    _require_grid(new.shape, volume.voxels.shape[3:], "--reference")
    voxels, scaling = align_voxels(volume.voxels, volume.scaling, old, new, how, each=each)
    mask, notes = None, [] if covers(old, new) else ["beyond-field-of-view"]
    if volume.mask is not None:
        mask = of_each_mask(volume.mask, lambda each: align_labels(each, old, new, how))
        notes += ["labels-lost-to-reference"] if loses_labels(volume.mask, old, new) else []
    target = None if volume.target is None else align_voxels(volume.target, NO_SCALING, old, new, how)[0]
    return replace(
        volume,
        voxels=voxels,
        scaling=scaling,
        affine=new.affine,
        zooms=new.zooms,
        mask=mask,
        target=target,
        notes=join_notes([volume.notes, notes]),
    )


def _require_grid(shape: Shape3, channels: tuple[int, ...], option: str) -> None:
    # Though they may be cropped afterwards: an affine that is wrong by a thousand asks for terabytes.
    made = (*shape, *channels)
    if 4 * math.prod(made) > MAX_VOLUME_BYTES:
        is_spacing = option.startswith("--spacing")
        remedy = "repair the affine, or use a larger --spacing" if is_spacing else "use fewer voxels"
        raise VolumeError(
            f"{option} would make shape {made}, more than {MAX_VOLUME_BYTES:,} bytes of float32; {remedy}"
        )


def crop_foreground(volume: Volume, rule: str) -> Volume:
    """Crop to the bounding box of the foreground, of all frames together."""
    shape, mask = volume.voxels.shape[:3], volume.mask
    along = [np.zeros(size, bool) for size in shape]
    for xs in split_slices(shape[0], math.prod(volume.voxels.shape[1:])):
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
        target=None if volume.target is None else np.ascontiguousarray(volume.target[box]),
    )
    return _noting_lost_labels(cropped, mask, "labels-lost-to-crop")


def _noting_lost_labels(volume: Volume, mask: Voxels | None, note: str) -> Volume:
    """A volume with a note if its mask has fewer labelled voxels than `mask`, from which it was made."""
    if mask is None or volume.mask is None or np.count_nonzero(volume.mask) == np.count_nonzero(mask):
        return volume
    return replace(volume, notes=join_notes([volume.notes, [note]]))


def crop_or_pad(volume: Volume, shape: Shape3, *, each: bool = False) -> Volume:
    """Crop and pad each axis around its centre; if the number is odd, with one voxel more at the end.

    Padding has the volume's own least value, so its range stays, and that of a target the target's; that of
    a mask is 0.
    """
    old = Grid.of(volume.voxels.shape, volume.affine)
    if old.shape == shape:
        return volume
    voxels = volume.voxels
    grid, starts = fit(old, shape)
    cut = [max(0, start) for start in starts]
    missing = [max(0, wanted - size) for size, wanted in zip(old.shape, shape, strict=True)]
    widths = [(n // 2, n - n // 2) for n in missing]
    least = None
    if any(missing):
        # NaN voxels that are cropped away shall not come back as padding.
        ufunc = np.fmin if volume.scaling.slope > 0 else np.fmax
        least = ufunc.reduce(voxels, axis=(0, 1, 2) if each else None)
    fitted = replace(
        volume,
        voxels=_fit(voxels, shape, cut, widths, least),
        affine=grid.affine,
        mask=None if volume.mask is None else _fit(volume.mask, shape, cut, widths, 0),
        target=None
        if volume.target is None
        else _fit(volume.target, shape, cut, widths, np.fmin.reduce(volume.target, axis=None)),
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
