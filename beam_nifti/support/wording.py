"""Texts for people: rows, counts, lists and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from beam_nifti.errors import printable

_OF_ONE: Final = {
    "are": "is",
    "differ": "differs",
    "do": "does",
    "have": "has",
    "occur": "occurs",
}  # verbs in the singular


def format_rows(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Format rows of a name and a text, one line per row."""
    return "\n".join(f"{one_line(name):<{width}}{one_line(text)}".rstrip() for name, text in rows)


def one_line(text: str) -> str:
    r"""Escape line breaks and control characters, as Python does.

    >>> print(one_line("left\nright"))
    left\nright
    """
    return printable(text, keep="")


def counted(number: int, noun: str, verb: str = "") -> str:
    """A number of things, with an optional verb, in the singular or plural.

    >>> counted(1, "row"), counted(1200, "row"), counted(1, "example", "have"), counted(0, "image", "are")
    ('1 row', '1,200 rows', '1 example has', '0 images are')
    """
    is_one = number == 1
    ending = f" {_OF_ONE[verb] if is_one else verb}" if verb else ""
    return f"{number:,} {noun}{'' if is_one else 's'}{ending}"


def first_few(items: Sequence[object], most: int) -> str:
    """The first items of a list on one line, followed by "…" if there are more.

    >>> first_few(["a", "b"], 2), first_few([1, 2, 3], 2)
    ('a, b', '1, 2, …')
    """
    return ", ".join(one_line(str(item)) for item in items[:most]) + (", …" if len(items) > most else "")


def size_text(sizes: Iterable[float]) -> str:
    """A size along several axes, such as a shape or voxel sizes.

    >>> size_text((91, 109, 91)), size_text((2.0, 2.0, 2.5))
    ('91×109×91', '2×2×2.5')
    """
    return "×".join(str(size) if isinstance(size, int) else f"{size:g}" for size in sizes)


def bytes_text(size: float) -> str:
    """A number of bytes, in the unit that fits.

    >>> bytes_text(999), bytes_text(1536), bytes_text(9.3e6)
    ('999 bytes', '1.5 kB', '9.3 MB')
    """
    value, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def with_beside(mask: object, target: object) -> str:
    """What a volume has besides its voxels, if anything.

    >>> with_beside(None, 0), with_beside(0, 0)
    (', with a target', ', with a mask and a target')
    """
    given = [f"a {name}" for name, one in (("mask", mask), ("target", target)) if one is not None]
    return f", with {' and '.join(given)}" if given else ""
