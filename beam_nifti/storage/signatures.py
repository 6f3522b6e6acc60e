"""Recognizes, by its first bytes, what a file with a misleading name is."""

from __future__ import annotations

import re
from typing import Final

_DOWNLOAD: Final = "download the file again"
_DECOMPRESS: Final = "decompress it, or compress it with gzip instead"
_CONVERT_MINC: Final = (
    "convert it: nib-convert --out-dtype float32 IMAGE.mnc IMAGE.nii.gz (mnc2nii IMAGE.mnc if it has frames)"
)
_TO_NIFTI: Final = "convert it to .nii.gz"

_STAND_INS: Final = {
    rb"version https://(git-lfs|hawser)\.github\.com/spec/": "a Git LFS pointer; run `git lfs pull`",
    rb"(\.\./)*(\.git)?/annex/objects/": (
        "a git-annex pointer; run `git annex get` (or `datalad get`) on the file"
    ),
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head)\b": (
        f"an HTML page, as servers send for errors; {_DOWNLOAD}"
    ),
}
"""What version control and servers give in the place of a file."""

_OTHERS: Final = {
    rb"\Z": "an empty file; copy it again",
    rb"CDF[\x01\x02]": f"a MINC image; {_CONVERT_MINC}",
    rb"\x89HDF": f"an HDF5 file; if it is a MINC 2 image, install h5py, and {_CONVERT_MINC}",
    rb"# ==": "the header of a PAR/REC pair; convert it: parrec2nii --compressed IMAGE.PAR",
    rb"NRRD": f"an NRRD image; {_TO_NIFTI}, such as with SimpleITK or 3D Slicer",
    rb"mrtrix image": "an MRtrix image; convert it: mrconvert IMAGE.mif IMAGE.nii.gz",
    rb"MATRIX7": f"an ECAT image; {_TO_NIFTI}",
    rb"\0\x05\x16\x07": "metadata of macOS (a ._ file); leave it out",
    rb"([^\n=]+ = [^\n]*\n)*ObjectType = ": f"a MetaImage; {_TO_NIFTI}, such as with SimpleITK",
    rb".{128}DICM|[\x02\x08]\0[\0-\x1a]\0([A-Z]{2}|[\0-\x40]\0\0\0)": (
        "a DICOM file; convert its series to NIfTI with dcm2niix"
    ),
    rb"PK(\x03\x04|\x05\x06)": (
        "a zip archive; extract the image from it, or convert the DICOM files in it with dcm2niix"
    ),
    rb".{257}ustar": "a tar archive; extract the image from it",
    rb"\x1f\x8b|BZh[1-9]1AY|\x28\xb5\x2f\xfd": "compressed twice; decompress it once",
    rb"\xfd7zXZ\0": f"an xz file; {_DECOMPRESS}",
    rb"7z\xbc\xaf\x27\x1c": f"a 7z archive; {_DECOMPRESS}",
    rb"Rar!": f"a RAR archive; {_DECOMPRESS}",
    rb"\x04\x22M\x18": f"an LZ4 file; {_DECOMPRESS}",
    rb"\x1f\x9d": f"a .Z file; {_DECOMPRESS}",
    rb"\x93NUMPY": "a NumPy array; save it as NIfTI with nibabel",
    rb"MATLAB 5.0": "a MATLAB file; save its volume as NIfTI",
    rb"\x89PNG|\xff\xd8\xff|II\*\0|MM\0\*|GIF8": "a picture (PNG, JPEG, TIFF or GIF); leave it out",
    rb"%PDF": "a PDF document; leave it out",
    rb"\0+\Z": "zeros where a header should be, as after an interrupted copy; copy it again",
    rb"\s*<\?xml.*<(!DOCTYPE )?GIFTI": "a GIFTI file, whose values are not on a grid; leave it out",
    rb"(\xef\xbb\xbf)?\s*<\?xml": f"an XML file, as servers send for errors; {_DOWNLOAD}",
    rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z": "a text file; copy or download the image again",
}


def _compiled(signatures: dict[bytes, str]) -> dict[re.Pattern[bytes], str]:
    return {re.compile(pattern, re.I | re.S): what for pattern, what in signatures.items()}


_STAND_IN_PATTERNS: Final = _compiled(_STAND_INS)
_PATTERNS: Final = _compiled(_STAND_INS | _OTHERS)


def stand_in(head: bytes) -> str | None:
    """What a file is that stands for another one, and the remedy; None for all other files.

    >>> stand_in(b"version https://git-lfs.github.com/spec/v1")
    'a Git LFS pointer; run `git lfs pull`'
    """
    return _described(_STAND_IN_PATTERNS, head)


def other_format(head: bytes) -> str | None:
    """What a file is that is no image of a format that is read, and the remedy; None if that is unknown.

    >>> other_format(b"NRRD0004")
    'an NRRD image; convert it to .nii.gz, such as with SimpleITK or 3D Slicer'
    """
    return _described(_PATTERNS, head)


def _described(patterns: dict[re.Pattern[bytes], str], head: bytes) -> str | None:
    return next((what for pattern, what in patterns.items() if pattern.match(head)), None)
