"""Parse the splits to read: `train`, `train[:80%]+test`, in the notation of TensorFlow Datasets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from beam_nifti.config import FOLD_PARTS, SPLIT_PATTERN
from beam_nifti.errors import UsageError
from beam_nifti.read.order import whole_number
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.support.wording import counted

_PART: Final = re.compile(rf"(?P<name>{SPLIT_PATTERN.pattern})(?:\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")
_BOUND: Final = re.compile(r"-?\d+|-?\d+(?:\.\d+)?%", re.ASCII)


@dataclass(frozen=True, slots=True)
class SplitPart:
    """A split, or a slice of it.

    Attributes:
        name: name of the split.
        start: first record of the slice: a number such as "10", or a percentage such as "80%"; a negative one
            counts from the end; "" is the beginning.
        stop: end of the slice, in the same notation; "" is the end of the split.
    """

    name: str
    start: str = ""
    stop: str = ""

    def __str__(self) -> str:
        """The split in this notation."""
        return f"{self.name}[{self.start}:{self.stop}]" if self.start or self.stop else self.name

    def positions(self, count: int) -> range:
        """The positions of its records in the split.

        A percentage is rounded to the nearest record, halves to even, so that `[:80%]` and `[80%:]` together
        are the whole split.

        Raises:
            UsageError: a bound is beyond the split.

        >>> SplitPart("train", "-20%").positions(10)
        range(8, 10)
        """
        start = self._position(self.start, count) if self.start else 0
        stop = self._position(self.stop, count) if self.stop else count
        return range(start, max(start, stop))

    def _position(self, bound: str, count: int) -> int:
        is_share, number = bound.endswith("%"), Fraction(bound.removesuffix("%"))
        found = round(number * count / 100) if is_share else int(number)
        if abs(number) > (100 if is_share else count):
            raise UsageError(
                f"split {str(self)!r} reaches beyond the {counted(count, 'record')} of {self.name!r}; give "
                f"numbers up to {count}, or up to 100%"
            )
        return found + count if bound.startswith("-") else found


def parse_split(spec: str) -> tuple[SplitPart, ...]:
    """The parts that are joined by `+`.

    Raises:
        TypeError: `spec` is not a string.
        UsageError: `spec` does not follow the notation.

    >>> [str(part) for part in parse_split("train[:80%]+test")]
    ['train[:80%]', 'test']
    """
    if not isinstance(spec, str):
        raise TypeError(f"split is {spec!r}; give text, such as 'train', 'train[:80%]' or 'train+test'")
    return tuple(_parse_part(text.strip(), spec) for text in spec.split("+"))


def _parse_part(text: str, spec: str) -> SplitPart:
    match = _PART.fullmatch(text)
    bounds = [(match[side] or "").strip() for side in ("start", "stop")] if match else []
    if match is None or not all(bound == "" or _BOUND.fullmatch(bound) for bound in bounds):
        raise UsageError(
            f"split is {spec!r}; write the name of a split, with or without a slice such as train[:80%] or "
            "train[10:20], or several joined by +"
        )
    return SplitPart(match["name"], *bounds)


def choose_fold(path: str, info: DatasetInfo, split: str, fold: object) -> str:
    """The splits of a fold's training or validation set, in this notation.

    Args:
        path: path of the dataset, for errors.
        info: its dataset_info.json.
        split: "train" for all folds but one, or "validation" for that one.
        fold: number of that fold, from 0.

    Raises:
        UsageError: the dataset has no such fold, or `split` is something else.
    """
    folds, number = info.folds, whole_number("fold", fold)
    if not folds:
        raise UsageError(
            f"fold is {number}, but {path} has no folds fold0, fold1 and so on, only "
            f"{', '.join(info.splits)}; build it with --split kfold:5, or drop fold"
        )
    if split not in FOLD_PARTS:
        raise UsageError(
            f"split is {split!r}, but fold is {number}; use split='train' or 'validation', or drop fold"
        )
    if split in info.splits:
        raise UsageError(
            f"fold is {number}, but {path} has a split {split!r} besides its folds; drop fold, and name the "
            "folds, such as 'fold0+fold1'"
        )
    if not 0 <= number < len(folds):
        raise UsageError(f"fold is {number}, but {path} has the folds 0 to {len(folds) - 1}")
    return "+".join(name for at, name in enumerate(folds) if (at == number) == (split == "validation"))
