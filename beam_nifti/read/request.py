"""The arguments of `reader.load_dataset`, in groups that are validated."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Final, SupportsIndex, TypeAlias

import numpy as np
import tensorflow as tf

from beam_nifti.errors import UsageError
from beam_nifti.read.columns import Column, with_bounded_padding
from beam_nifti.read.drawing import Drawing
from beam_nifti.read.opening import Opened
from beam_nifti.read.order import Numbers, Order, whole_number
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.sampling import PatchDataset, Patches, require_patches
from beam_nifti.record.example import TENSOR_FEATURES, label_feature

Shard: TypeAlias = tuple[int, int] | tf.distribute.InputContext | None

_SEED_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class Elements:
    """The contents of an element; the fields are arguments of `load_dataset`."""

    target: str = "label"
    label: str | Sequence[str] | None = None
    as_dict: bool = False
    columns: Sequence[str] | None = None
    channels_first: bool = False

    def __post_init__(self) -> None:
        require_choice("target", self.target, "label", "mask", "target")
        if self.columns is not None and not self.as_dict:
            raise UsageError(f"columns is {self.columns!r}, but elements are X and y; add as_dict=True")
        if self.columns is not None and not self.columns:
            raise UsageError("columns is empty; give at least one, or None for the default ones")

    def choose(self, opened: Opened) -> tuple[tuple[str, ...], Callable[..., Any]]:
        """The columns to read, and a function that makes an element of their cells.

        Raises:
            UsageError: the dataset does not have these labels or masks.
        """
        if self.as_dict:
            names = opened.choose_columns(self.columns)
            return names, lambda *cells: dict(zip(names, cells, strict=True))
        targets = self._targets(opened)
        names = ("image", *targets.values())
        if not targets:
            return names, lambda image: image
        if self.label is None or isinstance(self.label, str):
            return names, lambda *cells: cells
        return names, lambda image, *cells: (image, dict(zip(targets, cells, strict=True)))

    def _targets(self, opened: Opened) -> dict[str, str]:
        """The columns or features that make up y, by name."""
        info, label = opened.info, self.label
        if self.target != "label":
            is_there = info.mask_labels is not None if self.target == "mask" else opened.has_tensor("target")
            if not is_there:
                raise UsageError(
                    f"target is {self.target!r}, but {opened.path} has no {self.target}s; build it with "
                    f"--{self.target}-column"
                )
            if label is not None:
                raise UsageError(f"label is {label!r}, but y is the {self.target}; drop target or label")
            return {self.target: self.target}
        if label is None:
            if info.labels and info.labels[0].kind == "string":
                raise UsageError(
                    f"{opened.path}: the first label is a string, not a number; choose y with label=, one "
                    f"of: {', '.join(column.name for column in info.labels)}"
                )
            return {"label": "label"} if info.labelled else {}
        known = {column.name: label_feature(column.name) for column in info.labels}
        if info.labelled and not known:
            known = {info.config["columns"]["label"]: "label"}
        names = [label] if isinstance(label, str) else label
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            wanted = ", ".join(map(repr, unknown)) or "none"
            raise UsageError(
                f"{opened.path}: label is {wanted}; the dataset has {', '.join(known) or 'no labels'}"
            )
        return {name: known[name] for name in names}


@dataclass(frozen=True, slots=True)
class Batching:
    """How examples become batches.

    Attributes:
        size: examples per batch; None gives single examples.
        drop_remainder: whether to drop a last batch that is not full.
        pad: whether to pad cells of different shapes with zeros.
        ragged: whether to put cells of different shapes into ragged tensors.
    """

    size: int | None = None
    drop_remainder: bool = False
    pad: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", whole_number("batch_size", self.size))
            if self.size < 1:
                raise UsageError(f"batch_size is {self.size}; it must be at least 1")
        elif self.drop_remainder:
            raise UsageError("drop_remainder requires batches; give a batch_size")
        elif self.ragged:
            raise UsageError("ragged requires batches; give a batch_size")
        if self.ragged and self.pad:
            raise UsageError("pad and ragged are two ways to batch volumes of different shapes; choose one")

    def makes_ragged(self, column: Column) -> bool:
        """Whether batches of a column are ragged tensors."""
        return self.ragged and column.varies

    def check(self, folder: str, columns: Sequence[Column]) -> None:
        """Refuse batches of cells of different shapes without `pad` or `ragged`.

        Raises:
            UsageError: a column has cells of different shapes.
        """
        varying = [column.name for column in columns if column.varies]
        if varying and not (self.pad or self.ragged or self.size in (None, 1)):
            what = "the volumes" if varying[0] in TENSOR_FEATURES else varying[0]
            raise UsageError(
                f"batch_size is {self.size}, but {what} of {folder} have different shapes; use batch_size=1 "
                "or None, or pad=True, or ragged=True"
            )

    def apply(self, examples: tf.data.Dataset) -> tf.data.Dataset:
        """Batch a dataset of examples."""
        if self.size is None:
            return examples
        if self.ragged:
            return examples.ragged_batch(self.size, self.drop_remainder)
        if self.pad:
            examples = with_bounded_padding(examples, self.size)
            return examples.padded_batch(self.size, drop_remainder=self.drop_remainder)
        return examples.batch(self.size, drop_remainder=self.drop_remainder)


@dataclass(frozen=True, slots=True)
class Passes:
    """The order of the examples, and the epochs; the first four fields are arguments of `load_dataset`.

    Attributes:
        patches: patches to draw of each example; None to read it as a whole.
        drawing: by what examples are drawn; None to read each once.
        epochs: number of epochs of an iteration; None if there is no end.
        host: number of this host, from 0, and number of hosts.
    """

    shuffle: bool = False
    seed: int | None = None
    repeat: bool | int = False
    shard: Shard = None
    patches: Patches | None = None
    drawing: Drawing | None = None
    epochs: int | None = field(init=False)
    host: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        if self.drawing is not None and not self.shuffle:
            name, column = next((n, c) for n, c in self.drawing.describe().items() if c is not None)
            raise UsageError(f"{name} is {column!r}, which draws at random; add shuffle=True")
        if self.seed is not None:
            if not self.is_random:
                raise UsageError(f"seed is {self.seed}, but nothing is shuffled; add shuffle=True")
            object.__setattr__(self, "seed", whole_number("seed", self.seed))
        if self.has_count:
            object.__setattr__(self, "epochs", _require_epochs(self.repeat))
        else:
            object.__setattr__(self, "epochs", None if self.repeat else 1)
        object.__setattr__(self, "host", _place_of_host(self.shard))

    @property
    def has_count(self) -> bool:
        """Whether `repeat` is a number of epochs, not a switch."""
        return not isinstance(self.repeat, bool | np.bool_)

    @property
    def is_random(self) -> bool:
        """Whether a seed has an effect."""
        return self.shuffle or self.patches is not None

    def describe(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """What determines the patches of a run with a seed, and its draws of records, as JSON values.

        None stands for no patches, and for no draws.
        """
        seed = {"seed": choose_seed(self.seed)}
        patches = None if self.patches is None else {**seed, **self.patches.describe()}
        return patches, None if self.drawing is None else self.drawing.describe()

    def draw(self) -> Callable[[Dataset], PatchDataset] | None:
        """A function that draws patches of records; None if records are read as a whole."""
        if self.patches is None:
            return None
        return partial(PatchDataset, patches=self.patches, seed=choose_seed(self.seed))

    def draw_records(self) -> Callable[[Dataset], Callable[[int], Numbers]] | None:
        """A function from records to a function from an epoch to the numbers of the records to read.

        None if each record is read once. The function raises a UsageError if records have no such weights.
        """
        drawing, seed = self.drawing, choose_seed(self.seed)
        if drawing is None:
            return None
        return lambda records: lru_cache(maxsize=2)(partial(records.weigh(drawing).draw, seed))

    def order(self, count: int, batching: Batching, resumes: str | None) -> Order:
        """The order of some records, or of the patches of them.

        Args:
            count: number of records.
            batching: how they become batches.
            resumes: name of the argument that requires an order that is known beforehand; None if there is
                none.

        Raises:
            UsageError: the order is not known beforehand, because there is no seed.
        """
        host, num_hosts = self.host
        if self.patches:
            count *= self.patches.per_volume
        if self.is_random and self.seed is None and (resumes or num_hosts > 1):
            raise UsageError(
                f"{resumes or 'shard'} requires an order that is known beforehand; give a seed, the same in "
                "every run and on every host"
            )
        seed = choose_seed(self.seed) if self.shuffle else None
        return Order(count, batching.size or 1, batching.drop_remainder, seed, host, num_hosts)


def group_patches(
    patches: Patches | None,
    patch: Sequence[SupportsIndex] | None,
    patches_per_volume: int | None,
    foreground: float | None,
    label_weights: Mapping[int, float] | None,
) -> Patches | None:
    """The patches that these arguments of `load_dataset` request.

    Raises:
        UsageError: both forms are given, options without a patch, or `patches` is something else.
    """
    if patches is not None:
        require_patches(patches)
    options = {
        "patches_per_volume": patches_per_volume,
        "foreground": foreground,
        "label_weights": label_weights,
    }
    options = {name: value for name, value in options.items() if value is not None}
    given = next(iter({"patch": patch, **options} if patch is not None else options), None)
    if patches is not None and given:
        raise UsageError(f"patches and {given} are two ways to request patches; drop one of them")
    if patch is None and given:
        raise UsageError(f"{given} is {options[given]}, but volumes are read as a whole; give a patch")
    fields = {name.removeprefix("patches_"): value for name, value in options.items()}
    return patches if patch is None else Patches(patch, **fields)  # type: ignore[arg-type]  # it checks them


def require_choice(name: str, value: str, *choices: str) -> None:
    """Check that an argument is one of its possible values.

    Raises:
        UsageError: it is another value.
    """
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; choose {' or '.join(map(repr, choices))}")


def _require_epochs(repeat: int) -> int:
    epochs = whole_number("repeat", repeat)
    if epochs < 1:
        raise UsageError(f"repeat is {epochs}; give a number of epochs from 1, or True to repeat without end")
    return epochs


def _place_of_host(shard: Shard) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    if isinstance(shard, tf.distribute.InputContext):
        return shard.input_pipeline_id, shard.num_input_pipelines
    host, num_hosts = (whole_number("shard", number) for number in shard)
    if not 0 <= host < num_hosts:
        raise UsageError(f"shard is {shard}; give (i, n): host i, counted from 0, of n")
    return host, num_hosts


def choose_seed(seed: int | None) -> int:
    """A seed of at least 0. By default it is TensorFlow's global seed if that is set, otherwise random."""
    if seed is None:
        found = tf.compat.v1.get_seed(None)
        seed = secrets.randbits(_SEED_BITS) if found[0] is None else found[0] << 32 | found[1]
    return seed % (1 << _SEED_BITS)
