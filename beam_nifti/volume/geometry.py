"""Affine, voxel sizes and spatial unit of a header."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from beam_nifti.errors import VolumeError
from beam_nifti.support.wording import size_text
from beam_nifti.volume.grid import SAME_PLACE, Affine, Grid, agreed_zooms, is_usable

_NIFTI_UNITS: Final = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""Millimetres in the units of xyzt_units: unknown, metre, millimetre, micrometre. Source: nifti1.h."""

_SPATIAL: Final = 7  # bits of xyzt_units that have the spatial unit
_ANALYZE_UNITS: Final = {
    b"": 1.0,
    b"m": 1e3,
    b"cm": 10.0,
    b"mm": 1.0,
    b"um": 1e-3,
}  # millimetres in those of vox_units


def stated_sizes(header: Any) -> npt.NDArray[np.float64]:
    """The voxel sizes in a header of nibabel, float64 (3,); call it before `check_fix`.

    Without their sign, which has no meaning; 0, NaN or infinite where there is no usable one.
    """
    sizes = header["pixdim"][1:4] if "pixdim" in header else header["delta"]
    return np.abs(np.asarray(sizes, np.float64))


def place_voxels(
    name: str, header: Any, sizes: npt.NDArray[np.float64], shape: Sequence[int]
) -> tuple[Affine, tuple[float, float, float], tuple[str, ...]]:
    """Affine, voxel sizes in mm and notes of a nibabel header, whose defects are repaired.

    As in nibabel, the sform takes precedence over the qform, and that over the voxel sizes (of
    `stated_sizes`). One that is singular or not finite is ignored. The affine is finite and not singular.
    Voxel sizes are those of the affine, or the stated ones if these differ only by rounding.
    """
    if "sform_code" in header:
        affine, notes = _nifti_affine(name, header, sizes, shape)
    else:
        affine, notes = np.asarray(header.get_best_affine(), np.float64), []
        if "pixdim" in header:  # of ANALYZE, which has no directions
            _require_sizes(name, sizes, shape)
        elif not is_usable(affine):
            _refuse(name, affine, "direction cosines")
    unit, of_unit = _unit_of(header)
    affine[:3] *= unit
    zooms = agreed_zooms(affine, sizes * unit)
    is_unset = (sizes == 0) & (np.asarray(shape[:3]) == 1)
    if not np.all(is_unset | (zooms == sizes * unit)):
        notes.append("pixdim-disagrees")
    x, y, z = zooms.tolist()
    return affine, (x, y, z), (*notes, *of_unit)


def _nifti_affine(
    name: str, header: Any, sizes: npt.NDArray[np.float64], shape: Sequence[int]
) -> tuple[Affine, list[str]]:
    has_sform, has_qform = header["sform_code"] != 0, header["qform_code"] != 0
    has_sizes = _are_usable(sizes, shape)  # the qform needs them; nibabel has put 1 for 0
    affine = np.asarray(header.get_sform(), np.float64)
    if has_sform and is_usable(affine):
        differ = has_qform and has_sizes and _differs_from_qform(affine, header, shape)
        return affine, ["sform-qform-disagree"] if differ else []
    if not has_sform:
        _require_sizes(name, sizes, shape)
    if has_qform and has_sizes:
        qform = _qform_of(header)
        if is_usable(qform):
            return qform, ["sform-unusable"] if has_sform else []
        affine = affine if has_sform else qform
    if has_sform or has_qform:
        _refuse(name, affine, "sform or qform")
    return np.asarray(header.get_base_affine(), np.float64), []


def _differs_from_qform(affine: Affine, header: Any, shape: Sequence[int]) -> bool:
    # Rounding makes up to 0.002 of a voxel in real headers, whose quaternions are float32.
    grid = Grid.of(shape, affine)
    return not grid.distance(Grid.of(shape, _qform_of(header))) <= SAME_PLACE * min(grid.zooms)


def _qform_of(header: Any) -> Affine:
    """NaN if its quaternion is not valid."""
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (HeaderDataError, ValueError):
        return np.full((4, 4), np.nan)


def _are_usable(sizes: npt.NDArray[np.float64], shape: Sequence[int]) -> bool:
    # Along an axis of one voxel there is nothing to measure, and many programs write 0.
    return bool(np.all(np.isfinite(sizes) & ((sizes > 0) | (np.asarray(shape[:3]) == 1))))


def _require_sizes(name: str, sizes: npt.NDArray[np.float64], shape: Sequence[int]) -> None:
    if not _are_usable(sizes, shape):
        raise VolumeError(
            f"{name}: the voxel sizes in the header (pixdim) are {size_text(sizes)}, and it has no sform; "
            "repair them, or convert the image to NIfTI with an sform"
        )


def _refuse(name: str, affine: Affine, fields: str) -> NoReturn:
    problem = "singular" if np.isfinite(affine).all() else "not finite"
    raise VolumeError(f"{name}: the affine is {problem}; repair its {fields}")


def _unit_of(header: Any) -> tuple[float, list[str]]:
    """The header's spatial unit in millimetres, and notes."""
    if "xyzt_units" in header:
        unit = _NIFTI_UNITS.get(int(header["xyzt_units"]) & _SPATIAL)
    elif "vox_units" in header:
        unit = _ANALYZE_UNITS.get(bytes(header["vox_units"].item()).strip(b"\0 ").lower())
    else:
        unit = 1.0  # of MGH
    if unit is None:
        return 1.0, ["units-unknown"]
    return unit, [] if unit == 1.0 else ["units-converted"]
