"""Errors about options, in the words of a call in Python: parameters instead of flags."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from beam_nifti.config import RESCALE_METHODS, SELECTIONS
from beam_nifti.errors import BeamNiftiError
from beam_nifti.pipeline.options import FLAG, OPTIONS, read_switch
from beam_nifti.support.rules import name_of_form

_FLAG: Final = re.compile(FLAG + r"(?: ([^\s;(-][^\s;]*(?<![.,:)])))?")
"""A flag, and the word after it."""

_FORMS: Final = {
    form: f'("{name_of_form(form)}", {form.rpartition(":")[2].replace(",", ", ")})'
    for form in (*RESCALE_METHODS, *SELECTIONS)[::-1]  # a form may end with another one
    if form != name_of_form(form)
}
"""Forms of values on the command line, such as "percentile:LO,HI", with the tuples that stand for them."""

OUTPUT: Final = re.compile(r"(?<![^ ])OUTPUT(?![^ /,;:.)])")
"""The output of a build, in a sentence; not a part of a path."""

_EXAMPLE: Final = re.compile(r"(?<=such as )[\w.=]+(?:,[\w.=]+)+$")
"""A value of an option with several parts, at the end of an error."""

_NUMBERS: Final = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?){0,2}")
_CALL: Final = r"""--preprocess (?:(?:'[^']*'|"[^"]*")+|[\w.]+:\w+(?![\w(:]))"""  # as shlex.quote writes it
_CALLS: Final = re.compile(f"{_CALL}(?: {_CALL})*")


def as_parameters(text: str, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """An error's text for a call in Python: parameters, which may have other names, replace flags.

    >>> as_parameters("--clip cannot be used with --rescale minmax; drop it")
    'clip=True cannot be used with rescale="minmax"; drop it'
    >>> as_parameters("--clip is 5; give True or False")
    'clip is 5; give True or False'
    >>> as_parameters("--spacing is (1, 2); give three sizes in mm, such as 1,1,1.5")
    'spacing is (1, 2); give three sizes in mm, such as (1, 1, 1.5)'
    """

    def parameter(found: re.Match[str]) -> str:
        name, word = found[1].replace("-", "_"), found[2]
        value = _literal(name, word) if word else None
        shown = names.get(name, name) if name in OPTIONS else f"--{found[1]}"
        if value is not None:
            return f"{shown}={value}"
        is_on = name in OPTIONS and OPTIONS[name].read is read_switch and word != "is"
        return f"{shown}{'=True' if is_on else ''}{f' {word}' if word else ''}"

    text = _FLAG.sub(parameter, _CALLS.sub(_assignment_of_calls, text))
    for form, parts in _FORMS.items():
        text = text.replace(form, parts)
    return _EXAMPLE.sub(_value_of_example, text)


def _literal(name: str, word: str) -> str | None:
    """The word after a flag as Python writes it; None if it is no value of the option."""
    if _NUMBERS.fullmatch(word):
        return f"({word.replace(',', ', ')})" if "," in word else word
    named = word.replace("-", "_").split(",")
    if name == "without" and set(named) <= OPTIONS.keys():
        return f'"{",".join(named)}"'
    heads = {choice.partition(":")[0] for choice in OPTIONS[name].choices} if name in OPTIONS else ()
    is_value = word.partition(":")[0] in heads or (name == "split" and re.search("=|^kfold:", word))
    return f'"{word}"' if is_value else None


def _value_of_example(found: re.Match[str]) -> str:
    cells = found[0].split(",")
    if all(map(_NUMBERS.fullmatch, cells)):
        return f"({', '.join(cells)})"
    if all("=" in cell for cell in cells):
        return (
            f"{{{', '.join(f'{name!r}: {share}' for name, _, share in (c.partition('=') for c in cells))}}}"
        )
    return str(cells)


def _assignment_of_calls(found: re.Match[str]) -> str:
    calls = [word for word in shlex.split(found[0]) if word != "--preprocess"]
    return f"--preprocess={calls if calls[1:] else repr(calls[0])}"


@contextlib.contextmanager
def naming_parameters(**names: str) -> Iterator[None]:
    """Have errors of a block name parameters instead of flags and of OUTPUT, by `as_parameters`."""
    try:
        yield
    except BeamNiftiError as e:
        e.reword(lambda text: OUTPUT.sub("output", as_parameters(text, names)))
        raise
