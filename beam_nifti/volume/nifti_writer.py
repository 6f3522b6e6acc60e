"""Write a NIfTI image. Its header is new: it has no text, and nothing from the header that was read."""

from __future__ import annotations

import itertools
from typing import Final

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from beam_nifti.errors import UsageError
from beam_nifti.storage import paths as storage
from beam_nifti.volume.compression import compress_gzip
from beam_nifti.volume.grid import Affine
from beam_nifti.volume.rescale import Scaling, Voxels

_ALIGNED: Final = 2  # NIFTI_XFORM_ALIGNED_ANAT, as nibabel sets it in new images
_MAX_NIFTI1_AXIS: Final = 2**15 - 1
_GZIP_LEVEL: Final = 2
_NO_EXTENSION: Final = 4  # bytes behind a header that say that nothing follows it but the voxels
_ZOOMS_TOLERANCE: Final = 1e-4  # relative; beyond it a header's voxel sizes are not those of its affine


def write_nifti(
    path: str, voxels: Voxels, scaling: Scaling, affine: Affine, zooms: tuple[float, float, float]
) -> None:
    """Write a single-file NIfTI image, which appears whole or not at all.

    The format is NIfTI-1, or NIfTI-2 if an axis has more than 32,767 voxels or the scaling does not fit
    float32. The affine becomes the sform, and also the qform if it has no shears and the voxel sizes `zooms`
    (mm).

    Args:
        path: ends in .nii or .nii.gz; local or a URL.
        voxels: (X, Y, Z) or (X, Y, Z, T), any real dtype of NIfTI.
        scaling: scaling from `voxels` to the image's units.
        affine: (4, 4), voxel indices to millimetres in RAS+.
        zooms: voxel sizes in millimetres.
    """
    require_nifti_name(path)
    in_file_order = _in_file_order(voxels)
    header = _binary(_make_header(voxels, scaling, affine, zooms))
    with storage.create(path) as handle:
        if not path.endswith(".gz"):
            handle.write(header)
            handle.write(in_file_order.data.cast("B"))
            return
        parts = (part.data.cast("B") for part in in_file_order)
        for packed in compress_gzip(itertools.chain([header], parts), _GZIP_LEVEL):
            handle.write(packed)


def make_image(
    voxels: Voxels, scaling: Scaling, affine: Affine, zooms: tuple[float, float, float]
) -> nib.Nifti1Image | nib.Nifti2Image:
    """The image that nibabel loads of the file that `write_nifti` writes with these arguments."""
    header = _make_header(voxels, scaling, affine, zooms)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind.from_bytes(_binary(header) + _in_file_order(voxels).tobytes())


def require_nifti_name(path: str) -> None:
    """Refuse, with a UsageError, a file name that does not end in .nii or .nii.gz."""
    if not path.endswith((".nii", ".nii.gz")):
        raise UsageError(f"{path}: not the name of a NIfTI image; use a name that ends in .nii or .nii.gz")


def _in_file_order(voxels: Voxels) -> Voxels:
    """Little-endian voxels whose last axis is x."""
    return np.ascontiguousarray(voxels.astype(voxels.dtype.newbyteorder("<"), copy=False).T)


def _binary(header: nib.Nifti1Header) -> bytes:
    return bytes(header.binaryblock) + bytes(_NO_EXTENSION)


def _make_header(
    voxels: Voxels, scaling: Scaling, affine: Affine, zooms: tuple[float, float, float]
) -> nib.Nifti1Header:
    """A little-endian header of a single file."""
    factors = np.array([scaling.slope, scaling.inter])
    with np.errstate(over="ignore", under="ignore"):
        fits = np.array_equal(factors.astype(np.float32), factors)
    is_small = fits and max(voxels.shape) <= _MAX_NIFTI1_AXIS
    kind: type[nib.Nifti1Header] = nib.Nifti1Header if is_small else nib.Nifti2Header
    header = kind(endianness="<")
    header.set_data_dtype(voxels.dtype.newbyteorder("="))
    header.set_data_shape(voxels.shape)
    header.set_sform(affine, code=_ALIGNED)
    if not _set_qform(header, affine, zooms):
        header.set_qform(np.eye(4), code=0)
    header["pixdim"][1:4] = zooms
    header["pixdim"][4] = 0  # of a time step that no record keeps
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = factors
    header["vox_offset"] = kind.sizeof_hdr + _NO_EXTENSION
    return header


def _set_qform(header: nib.Nifti1Header, affine: Affine, zooms: tuple[float, float, float]) -> bool:
    """Give the header a qform; whether the affine can be one: a rotation, perhaps a flip, and the zooms."""
    try:
        header.set_qform(affine, code=_ALIGNED, strip_shears=False)
    except HeaderDataError:
        return False
    return np.allclose(header["pixdim"][1:4], zooms, rtol=_ZOOMS_TOLERANCE, atol=0)
