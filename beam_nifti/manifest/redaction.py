"""Errors of builds with anonymous ids, without anything that identifies an image or a person.

Messages of this package name an image by its path, which `redact` replaces by its pseudonym. Other exceptions
may quote what foreign code has read, so only their class and line of code are kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Final
from urllib.parse import quote

from beam_nifti.errors import UsageError, VolumeError, printable
from beam_nifti.manifest.image_names import stem_of
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json

_FOLDER: Final = "…"  # stands for a folder
_SHORTEST: Final = 3  # letters of a name that is replaced also where nothing says that it is part of a path
_SHORTEST_ID: Final = 4  # likewise of an id of letters or digits: "1" and "all" are also words of messages

_DOTS: Final = str.maketrans("\u0130\u0131", "ii")  # all that `str.casefold` keeps apart

_LIBRARIES: Final = (
    sysconfig.get_path("purelib"),
    sysconfig.get_path("platlib"),
    sysconfig.get_path("stdlib"),
)

_HTTP: Final = re.compile(r"HTTP \d{3}(?: \w+)?")


def redact(text: str, row: VolumeRow, folder: str) -> str:
    """Replace the paths of a row's files, names in them, and its ids by their pseudonyms, if it has any.

    Its paths are relative to the folder.
    """
    if not row.pseudonyms:
        return text
    words = dict[str, str]()
    for path, pseudonym in zip(row.files, row.pseudonyms, strict=True):
        for name, word in _names(path, folder) if path else ():
            for spelling in _spellings(name) - {""}:
                words.setdefault(spelling, pseudonym if word is None else word)
    ids = {spelling: word for name, word in row.names for spelling in _spellings(name) - {""}}
    folded = _folded(text)  # most spellings are not in it, and a pattern of all would take long to compile
    words = {name: word for name, word in (ids | words).items() if _folded(name) in folded}
    if not words:
        return text
    longest_first = sorted(words, key=len, reverse=True)  # one may begin like another
    patterns = (_pattern(name, is_id=name in ids) for name in longest_first)
    names = re.compile("|".join(patterns), re.IGNORECASE)
    by_lower = {name.lower(): word for name, word in words.items()}
    return names.sub(lambda match: by_lower.get(match[0].lower(), _FOLDER), text)


def _folded(text: str) -> str:
    """A text with every letter as one of those that `re.IGNORECASE` takes for it."""
    return text.translate(_DOTS).casefold()


def _names(path: str, folder: str) -> Iterator[tuple[str, str | None]]:
    """Parts of a path to hide, and their replacements; None for the pseudonym."""
    for whole in {storage.join(folder, path), path}:
        yield whole, None
        yield stem_of(whole) or whole, None
        above = storage.dirname(whole)
        while above.strip("/") and not above.endswith(":/"):
            yield above, _FOLDER
            above = storage.dirname(above)
    *folders, name = path.rpartition("://")[2].split("/")
    yield name, None
    yield stem_of(name) or name, None
    for each in folders:
        yield each, _FOLDER


def _spellings(name: str) -> set[str]:
    """A name as it is, percent-encoded as by servers, and escaped as in errors, by `repr` and JSON."""
    forms = {name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))}
    spell: tuple[Callable[[str], str], ...] = (
        str,
        printable,
        quote,
        lambda form: quote(form, safe=""),
        lambda form: repr(form)[1:-1],
        lambda form: ascii(form)[1:-1],
        lambda form: dump_json(form)[1:-1],
    )
    return {of(form) for form in forms for of in spell}


def _pattern(name: str, *, is_id: bool) -> str:
    """Matches a path anywhere, and a name or an id as a whole word; plain or short ones only in a path."""
    escaped = re.escape(name)
    if "/" in name or "%2F" in name:
        return escaped
    word = rf"(?:(?<![^\W_])|(?<=%[\da-f]{{2}})){escaped}(?![^\W_])"
    is_plain = name.isascii() and (name.isalpha() or name.isdigit())
    if (len(name) >= _SHORTEST and not is_plain) or (len(name) >= _SHORTEST_ID and is_id):
        return word
    return rf"(?<=[/\\]){escaped}(?![^\W_])|{word}(?=[/\\]|\.[a-z])"


def describe(error: BaseException, *, is_anonymous: bool) -> str:
    """The class of an exception of foreign code, and its text; where ids are anonymous, its line of code."""
    kind = type(error).__name__
    if not is_anonymous:
        return f"{kind}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    places = [f" at {PurePath(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in own[-1:]]
    return "".join([kind, *places])


@contextlib.contextmanager
def redacting(row: VolumeRow, folder: str) -> Iterator[None]:
    """Where ids are anonymous, let no exception or warning of the block name a file of a row or its server.

    The row is that which the block is about; its paths are relative to the folder.

    Raises:
        Exception: of the same kind where the package or the system raised it, else a RuntimeError; without
            its cause.
    """
    try:
        with storage.hiding_hosts(bool(row.pseudonyms)):
            yield
    except Exception as e:
        if not row.pseudonyms:
            raise
        raise _redacted(e, row, folder) from None


def _redacted(error: Exception, row: VolumeRow, folder: str) -> Exception:
    if isinstance(error, VolumeError | UsageError):
        return type(error)(redact(str(error), row, folder))
    about = f"row {row.row} of the manifest"
    if isinstance(error, OSError) and error.errno is not None:
        said = _HTTP.search(error.strerror or "")
        reason = os.strerror(error.errno) + (f" ({redact(said[0], row, folder)})" if said else "")
        return OSError(error.errno, f"{reason}, in {about}")
    if isinstance(error, OSError) and isinstance(error.__cause__, ImportError):
        return OSError(f"{redact(str(error), row, folder)}, in {about}")  # names what is to be installed
    kinds = (MemoryError, TimeoutError, ConnectionError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind(f"{describe(error, is_anonymous=True)}, in {about}")
