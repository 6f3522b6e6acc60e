"""What a NIfTI header says."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from beam_nifti.config import RecordConfig
from beam_nifti.errors import VolumeError
from beam_nifti.grid import prepared_shape
from beam_nifti.rescale import Scaling

HEAD_BYTES: Final = 544
"""Enough for either header: NIfTI-1 has 352 bytes with its extension flag, NIfTI-2 has 544."""

MAX_VOLUME_BYTES: Final = 2**31 - 2**16
"""Most bytes of voxels in a record: with the rest of it they must stay below protobuf's 2 GiB."""

_MAX_OFFSET: Final = 64 << 20
"""Largest start of the voxels: header and its extensions."""

_quiet = logging.getLogger(f"{__name__}.nibabel")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


@dataclass(frozen=True, slots=True)
class VolumeHeader:
    """What an image's header says of its voxels.

    Attributes:
        shape: (X, Y, Z) or (X, Y, Z, T), the file's own axis order; T is at least 2.
        dtype: of the voxels on disk, with its byte order.
        offset: byte at which the voxels start.
        scaling: from stored voxels to the image's units.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+.
        zooms: voxel size along each axis, in the header's spatial unit (millimetres as a rule).
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    scaling: Scaling
    affine: npt.NDArray[np.float64]
    zooms: tuple[float, float, float]

    @property
    def num_bytes(self) -> int:
        """Bytes of the voxels on disk, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize


@np.errstate(all="ignore")  # numpy warns of a NaN in a field, which is said below
def parse_header(name: str, head: bytes) -> VolumeHeader:
    """What the first bytes of an uncompressed NIfTI file say.

    Args:
        name: the image's path, for errors.
        head: at least 352 bytes of a NIfTI-1 file, 544 of a NIfTI-2 file.

    Raises:
        VolumeError: they are not the header of a single-file 3-D or 4-D NIfTI image of real voxels.
    """
    kind = _header_class(name, head)
    try:
        # Its from_fileobj would read the header's extensions too, which may be long and damaged.
        header = kind(head[: kind.sizeof_hdr], check=False)
        header.check_fix(logger=_quiet)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header.get_data_offset())
        slope, inter = header.get_slope_inter()
        affine = np.asarray(header.get_best_affine(), np.float64)
        zooms = tuple(float(z) for z in header.get_zooms()[:3])
    except (HeaderDataError, nib.wrapstruct.WrapStructError, ValueError, OverflowError) as e:
        raise VolumeError(f"{name}: header is not valid: {e}; repair or convert the image") from e
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 3 <= len(shape) <= 4:
        remedy = "leave it out" if len(shape) < 3 else "extract one volume of it, with fslroi, say"
        raise VolumeError(f"{name}: expected a 3-D image, got shape {shape}; {remedy}")
    if min(shape) < 1:
        raise VolumeError(f"{name}: shape {shape} has no voxels; leave it out")
    if dtype.kind not in "iuf":
        what = "RGB" if dtype.names else "complex" if dtype.kind == "c" else str(dtype)
        raise VolumeError(f"{name}: {what} voxels; convert the image to one real number a voxel")
    if dtype.kind == "f" and dtype.itemsize > 8:
        raise VolumeError(f"{name}: {dtype.name} voxels; convert the image to float64 or float32")
    if not kind.sizeof_hdr <= offset <= _MAX_OFFSET:
        where = "inside the header" if offset < kind.sizeof_hdr else "beyond any header extension"
        raise VolumeError(f"{name}: voxels start at byte {offset}, {where}; repair vox_offset")
    if not np.isfinite(affine).all():
        raise VolumeError(f"{name}: the affine is not finite; repair its sform or qform")
    return VolumeHeader(
        shape=shape,
        dtype=dtype,
        offset=offset,
        scaling=Scaling() if slope is None else Scaling(float(slope), float(inter)),
        affine=affine,
        zooms=(zooms[0], zooms[1], zooms[2]),
    )


def _header_class(name: str, head: bytes) -> type[nib.Nifti1Header]:
    size = {head[:4], head[:4][::-1]}
    if (348).to_bytes(4, "little") in size and len(head) >= 348:
        if head[344:348] == b"n+1\0":
            return nib.Nifti1Header
        if head[344:348] == b"ni1\0":
            raise VolumeError(f"{name}: the header of an .hdr/.img pair; convert it to one .nii file")
        raise VolumeError(f"{name}: an ANALYZE 7.5 header; convert it to NIfTI")
    if (540).to_bytes(4, "little") in size and len(head) >= 540:
        if head[4:8] == b"n+2\0":
            return nib.Nifti2Header
        raise VolumeError(f"{name}: the header of a NIfTI-2 pair; convert it to one .nii file")
    if len(head) < 348:
        raise VolumeError(f"{name}: {len(head)} bytes are less than a NIfTI header; copy it again")
    if name.endswith((".img", ".img.gz")):
        raise VolumeError(f"{name}: the voxels of an .hdr/.img pair; convert the pair to one .nii file")
    raise VolumeError(f"{name}: not a NIfTI file; convert it to .nii or .nii.gz")


def require_storable(name: str, header: VolumeHeader, record: RecordConfig) -> None:
    """Refuse an image that no record of a configuration can hold.

    Args:
        name: the image's path, for errors.
        header: of the image.
        record: the configuration.

    Raises:
        VolumeError: it has frames and none were asked for, or more voxels than a record can hold.
    """
    if len(header.shape) > 3 and record.frames is None:
        raise VolumeError(
            f"{name}: expected a 3-D image, got shape {header.shape}; choose frames with --frames all, "
            "or extract one volume of it, with fslroi, say"
        )
    stored = stored_shape(name, header, record)
    if stored is not None:
        require_size(name, stored, header.dtype, record)


def stored_shape(name: str, header: VolumeHeader, record: RecordConfig) -> tuple[int, ...] | None:
    """The shape that a record of an image will have; None where its header cannot tell.

    Args:
        name: the image's path, for errors.
        header: of the image.
        record: the configuration.

    Raises:
        VolumeError: the affine does not allow the preparation.
    """
    try:
        return prepared_shape(header.shape, header.affine, record)
    except VolumeError as e:
        raise VolumeError(f"{name}: {e}") from e


def require_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], record: RecordConfig) -> None:
    """Refuse a volume with more voxels than a record can hold.

    Args:
        name: the image's path, for errors.
        shape: of the volume, prepared.
        dtype: of its voxels.
        record: the configuration.

    Raises:
        VolumeError: they take more bytes, as they are stored.
    """
    count = math.prod(shape)
    exact = {"float32": 4 * count, "native": dtype.itemsize * count}
    sizes = {**exact, "float16": 2 * count, "bfloat16": 2 * count, "uint8": count}
    size = sizes[record.voxel_dtype]
    if size <= MAX_VOLUME_BYTES:
        return
    remedies = [
        f"use --voxel-dtype {other}, which takes {exact[other]:,}"
        for other in exact
        if exact[other] <= MAX_VOLUME_BYTES
    ]
    if len(shape) > 3:
        remedies.append("split the image along time, with fslroi, say")
    remedies.append("crop or resample it with --shape or --spacing")
    stored = dtype.name if record.voxel_dtype == "native" else record.voxel_dtype
    raise VolumeError(
        f"{name}: shape {shape} takes {size:,} bytes as {stored}, more than a record can hold "
        f"({MAX_VOLUME_BYTES:,}: protobuf ends at 2 GiB); {', or '.join(remedies)}"
    )


def require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
    """Refuse a volume that has another shape than the dataset's first.

    Args:
        name: the image's path, for errors.
        shape: of the volume, prepared.
        wanted: that all volumes share; None where they may differ.

    Raises:
        VolumeError: the shape differs.
    """
    if wanted is not None and shape != wanted:
        raise VolumeError(
            f"{name}: shape {shape} where the first image has {wanted}; "
            "crop and pad all images with --shape, or use --allow-mixed-shapes"
        )


def require_dtype(name: str, header: VolumeHeader, dtype: str | None) -> None:
    """Refuse an image that has another dtype on disk than the dataset's first.

    Args:
        name: the image's path, for errors.
        header: of the image.
        dtype: that all images share; None where they may differ.

    Raises:
        VolumeError: the dtype differs.
    """
    if dtype is not None and header.dtype.name != dtype:
        raise VolumeError(
            f"{name}: {header.dtype.name} voxels where the first image has {dtype}; use --voxel-dtype float32"
        )
