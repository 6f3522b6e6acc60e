"""Headers of NIfTI-1, NIfTI-2, ANALYZE 7.5 and MGH, read by nibabel."""

from __future__ import annotations

import logging
from typing import Any, Final

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHHeader, header_dtype
from nibabel.nifti2 import Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError
from nibabel.spm2analyze import Spm2AnalyzeHeader

from beam_nifti.errors import VolumeError
from beam_nifti.manifest.image_names import HALF
from beam_nifti.storage.signatures import other_format, stand_in
from beam_nifti.volume.geometry import place_voxels, stated_sizes
from beam_nifti.volume.header import PADDING_BYTES, VolumeHeader
from beam_nifti.volume.rescale import Scaling

HEAD_BYTES: Final = 544  # of every header: NIfTI-1 has 352 bytes with its extension flag, NIfTI-2 has 544
_MAX_OFFSET: Final = 64 << 20  # largest start of the voxels: header and its extensions
_MGH_MAGIC: Final = b"\x00\x00\x00\x01"
_MGH_FOOTER: Final = 1 << 20  # bytes of commands and a table of colours, at most

_VECTOR_INTENTS: Final = frozenset([1004, 1005, 1006, 1007])
"""Matrix, symmetric matrix, displacement, vector: the fifth axis holds their components. Source: nifti1.h."""

_CIFTI_INTENTS: Final = range(3000, 3100)
_NIFTI1: Final = {b"n+1\0": nib.Nifti1Header, b"ni1\0": nib.Nifti1Pair.header_class}  # by magic string
_quiet = logging.getLogger(f"{__name__}.nibabel")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


@np.errstate(all="ignore")  # numpy warns of a NaN in a field, which is said below
def parse_header(name: str, head: bytes) -> VolumeHeader:
    """Parse the header in the first HEAD_BYTES of an uncompressed file of an image of 3 to 5 dimensions."""
    kind = _header_class(name, head)
    is_mgh = kind is MGHHeader
    try:
        # Its from_fileobj would read the header's extensions too, which may be long and damaged.
        header = kind(head[: header_dtype.itemsize if is_mgh else kind.sizeof_hdr], check=False)
        sizes = stated_sizes(header)
        header.check_fix(logger=_quiet)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = DATA_OFFSET if is_mgh else int(header.get_data_offset())
        slope, inter = (None, None) if is_mgh else header.get_slope_inter()
        intent = int(header["intent_code"]) if "intent_code" in header else 0
    except KeyError as e:
        raise VolumeError(f"{name}: data type {e} is not known; repair or convert the image") from e
    except (HeaderDataError, nib.wrapstruct.WrapStructError, ValueError, OverflowError) as e:
        raise VolumeError(f"{name}: header is not valid: {e}; repair or convert the image") from e
    if intent in _CIFTI_INTENTS:
        raise VolumeError(
            f"{name}: a CIFTI-2 file, whose values are not on a grid; extract a volume of it with "
            "wb_command -cifti-separate, or leave it out"
        )
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 3 <= len(shape) <= 5:
        remedy = "leave it out" if len(shape) < 3 else "extract one volume of it"
        raise VolumeError(f"{name}: expected a 3-D image, got shape {shape}; {remedy}")
    if min(shape) < 1:
        raise VolumeError(f"{name}: shape {shape} has no voxels; leave it out")
    if not 0 <= offset <= _MAX_OFFSET:
        where = "before the file" if offset < 0 else "beyond any header extension"
        raise VolumeError(f"{name}: voxels start at byte {offset}, {where}; repair vox_offset")
    affine, zooms, notes = place_voxels(name, header, sizes, shape)
    scaling = Scaling()
    if slope is not None and not dtype.names:  # NIfTI has no scaling of colours, whatever the fields hold
        scaling = Scaling(float(slope), float(inter or 0.0))
    return VolumeHeader(
        shape=shape,
        dtype=dtype,
        offset=offset,
        scaling=scaling,
        affine=affine,
        zooms=zooms,
        notes=notes,
        is_vector=intent in _VECTOR_INTENTS,
        is_pair=not is_mgh and not getattr(header, "is_single", False),
        header_bytes=DATA_OFFSET if is_mgh else kind.sizeof_hdr,
        is_analyze=kind is Spm2AnalyzeHeader,
        max_trailing=_MGH_FOOTER if is_mgh else PADDING_BYTES,
    )


def _header_class(name: str, head: bytes) -> Any:
    size = {head[:4], head[:4][::-1]}
    if (348).to_bytes(4, "little") in size and len(head) >= 348:
        # As nibabel.load does, take every ANALYZE header for SPM2's, which knows the fields of the others.
        return _NIFTI1.get(head[344:348], Spm2AnalyzeHeader)
    if (540).to_bytes(4, "little") in size and len(head) >= 540:
        return nib.Nifti2Header if head[4:8] == b"n+2\0" else Nifti2PairHeader
    if head.startswith(_MGH_MAGIC) and len(head) >= DATA_OFFSET:
        return MGHHeader
    if kind := _NIFTI1.get(head[344:348]):  # nibabel does not need the size of the header
        return kind
    if what := stand_in(head):
        raise VolumeError(f"{name}: {what}")
    if (match := HALF.fullmatch(name)) and match["half"].lower() == "img":
        raise VolumeError(f"{name}: voxels without their header; copy the .hdr file beside them")
    if what := other_format(head):
        raise VolumeError(f"{name}: {what}")
    if len(head) < 348:
        raise VolumeError(f"{name}: {len(head)} bytes are less than a NIfTI header; copy it again")
    raise VolumeError(
        f"{name}: not a NIfTI, ANALYZE or MGH image; convert it to .nii or .nii.gz, or leave it out"
    )
