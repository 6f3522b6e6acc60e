"""The roles of the manifest's columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from beam_nifti.config.choices import choose
from beam_nifti.errors import UsageError

LABEL_KINDS: Final = ("float", "class", "string")
MISSING_LABELS: Final = ("nan", "skip")
MISSING_MASKS: Final = ("empty", "skip")

LATER_COLUMNS: Final = ("missing_mask", "target")
"""Fields of `Columns` that dataset_info.json contains only if they are given, as for `LATER_OPTIONS`."""


@dataclass(frozen=True)
class LabelColumn:
    """A column of the manifest whose values are labels.

    Attributes:
        name: name of the column.
        kind: "float", a number; "class", one of several values, stored as its number; "string"; None to
            derive the kind from the values.
        classes: all values by number, for the kind "class"; None before the manifest was read.
    """

    name: str
    kind: str | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> LabelColumn:
        """From NAME or NAME:KIND.

        Raises:
            UsageError: the kind is unknown, or the name is empty.
        """
        name, colon, kind = text.partition(":")
        if not name:
            raise UsageError("--label-column names an empty column; was a variable not set?")
        if colon and kind not in LABEL_KINDS:
            raise UsageError(
                f"--label-column gives {name} the kind {kind!r}; choose one of: {', '.join(LABEL_KINDS)}"
            )
        return cls(name, kind if colon else None)

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}" if self.kind else self.name

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.classes or ())}


@dataclass(frozen=True)
class Columns:
    """The roles of the manifest's columns.

    Attributes:
        path: column of image paths, relative to the manifest's folder, absolute, or URLs. Several columns,
            separated by commas, are the channels of an example.
        label: NAME or NAME:KIND of a column of finite numbers or texts, or several separated by commas, such
            as "age:float,sex"; None uses the column `label` if there is one.
        id: column of example ids; None means `participant_id` (with `session_id`), otherwise the path.
        mask: column of paths of label maps; None if there are no masks. Several columns, separated by commas,
            are the channels of an example's mask.
        missing_label: how to handle a row without a label: "nan" stores NaN, the class -1, or an empty
            string; "skip" skips the row; None refuses it.
        missing_mask: how to handle a row whose cell of a mask is empty, n/a or NaN: "empty" stores zeros in
            its place; "skip" skips the row; None refuses it.
        target: column of paths of images of real values to predict; None if there are none.
    """

    path: str = "path"
    label: str | None = None
    id: str | None = None
    mask: str | None = None
    missing_label: str | None = None
    missing_mask: str | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        """Refuse empty names, unknown kinds, and a column with two roles."""
        files = self.files
        if "" in self.paths:
            raise UsageError(
                f"--path-column is {self.path!r}; give the name of each column, such as T1w,FLAIR"
            )
        if "" in self.masks:
            raise UsageError(
                f"--mask-column is {self.mask!r}; give the name of each column, such as organs,lesions"
            )
        for name in {name for name in files if files.count(name) > 1}:
            flags = "--path-column, --mask-column and --target-column"
            raise UsageError(f"{flags} name {name!r} twice; drop one")
        labels = [column.name for column in self.labels]
        for name in labels:
            if labels.count(name) > 1:
                raise UsageError(f"--label-column names {name!r} twice; drop one")
        if self.missing_label is not None:
            choose("--missing-label", self.missing_label, MISSING_LABELS)
        if self.missing_mask is not None:
            choose("--missing-mask", self.missing_mask, MISSING_MASKS)
            if self.mask is None:
                raise UsageError("--missing-mask requires --mask-column, which names the column of the masks")

    @property
    def paths(self) -> tuple[str, ...]:
        """The columns of the images."""
        return tuple(self.path.split(","))

    @property
    def masks(self) -> tuple[str, ...]:
        """The columns of the masks; empty if there are none."""
        return () if self.mask is None else tuple(self.mask.split(","))

    @property
    def files(self) -> tuple[str, ...]:
        """The columns of all files of an example: its images, its masks and its target."""
        return (*self.paths, *self.masks, *([] if self.target is None else [self.target]))

    @property
    def labels(self) -> tuple[LabelColumn, ...]:
        """The columns of labels; empty if no label was requested."""
        return tuple(map(LabelColumn.parse, self.label.split(","))) if self.label is not None else ()

    @property
    def lacking(self) -> str:
        """What rows that are skipped lack: "label", "mask", or "label or mask"."""
        given = {"label": self.missing_label, "mask": self.missing_mask}
        return " or ".join(what for what, rule in given.items() if rule == "skip") or "label"

    @property
    def has_label_features(self) -> bool:
        """Whether each label has a feature of its own, besides `label`."""
        return len(self.labels) > 1 or any(column.kind for column in self.labels)
