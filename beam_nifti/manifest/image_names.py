"""Names of image files: their endings, and the two of a pair."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

COMPRESSED: Final = (".gz", ".bz2", ".zst")  # after the ending of a compressed file
_COMPRESSED: Final = "|".join(map(re.escape, COMPRESSED))
ENDING: Final = rf"\.(?:(?:nii|hdr|img|mgh)(?:{_COMPRESSED})?|mgz)"
"""Pattern of the ending of an image's name, in lower case, for Python and Arrow."""

_IMAGE: Final = re.compile(rf"(?P<stem>.+){ENDING}", re.I | re.S)
HALF: Final = re.compile(rf"(?P<stem>.+\.)(?P<half>hdr|img)(?P<compressed>|{_COMPRESSED})", re.I | re.S)
"""A file of a pair."""


def stem_of(path: str) -> str | None:
    """The path of an image without its ending; None where it ends otherwise.

    >>> stem_of("sub-01_T1w.nii.gz"), stem_of("mri/aseg.mgz"), stem_of("sub-01_T1w.json")
    ('sub-01_T1w', 'mri/aseg', None)
    """
    match = _IMAGE.fullmatch(path)
    return match["stem"] if match else None


def is_of_macos(path: str) -> bool:
    """Whether a file is one of macOS, which stores attributes of NAME in ._NAME where a disk has none.

    >>> is_of_macos("imagesTr/._la_003.nii.gz")
    True
    """
    return path.rpartition("/")[2].startswith("._")


def drop_second_halves(paths: Iterable[str]) -> list[str]:
    """Leave out the .img files whose .hdr files are among the paths, so that a pair is there once.

    >>> drop_second_halves(["a.hdr", "a.img.gz", "b.img", "c.nii"])
    ['a.hdr', 'b.img', 'c.nii']
    """
    paths = list(paths)
    headers = {_pair_of(path, "hdr") for path in paths} - {None}
    return [path for path in paths if _pair_of(path, "img") not in headers]


def _pair_of(path: str, half: str) -> tuple[str, bool] | None:
    """What the two files of a pair have in common; None where the path is not this half of one."""
    match = HALF.fullmatch(path)
    return (match["stem"], match["half"].isupper()) if match and match["half"].lower() == half else None
