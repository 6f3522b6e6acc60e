"""Datasets as tf.data pipelines. Beam is not loaded for paths on the local disk.

Two engines return the same elements, bit for bit: `sequential` reads whole shards, and `indexed` reads single
records, located by the index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, SupportsIndex

import tensorflow as tf

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read import sequential
from beam_nifti.read.drawing import Drawing
from beam_nifti.read.indexed import read_indexed
from beam_nifti.read.layouts import LAYOUTS, read_files
from beam_nifti.read.opening import open_dataset
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.request import Batching, Elements, Passes, Shard, group_patches, require_choice
from beam_nifti.read.sampling import Patches
from beam_nifti.read.split_spec import SplitPart, choose_fold, parse_split
from beam_nifti.read.state import check_state, describe_state, require_step
from beam_nifti.storage import paths as storage

_INDEX_FOLDER: Final = "index"


def load_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    batch_size: int | None = None,
    *,
    target: Literal["label", "mask", "target"] = "label",
    shuffle: bool = False,
    seed: int | None = None,
    drop_remainder: bool = False,
    label: str | Sequence[str] | None = None,
    repeat: bool | int = False,
    start: int = 0,
    shard: Shard = None,
    where: str | None = None,
    as_dict: bool = False,
    columns: Sequence[str] | None = None,
    channels_first: bool = False,
    pad: bool = False,
    ragged: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    engine: Literal["indexed", "sequential"] | None = None,
    start_state: Mapping[str, Any] | None = None,
    layout: Literal["plain", "nobrainer", "medicai"] | None = None,
    patch: Sequence[SupportsIndex] | None = None,
    patches_per_volume: int | None = None,
    foreground: float | None = None,
    label_weights: Mapping[int, float] | None = None,
    patches: Patches | None = None,
    fold: int | None = None,
    balance: str | None = None,
    weights: str | None = None,
) -> tf.data.Dataset:
    """Open the examples of a dataset for training; docs/reading.md describes the arguments in more detail.

    Args:
        path: folder or URL of the dataset; with `layout`, a glob of files.
        split: split to read, such as "train"; with the indexed engine, also `train[:80%]` or `train+test`.
        batch_size: examples per batch; None gives single examples, without the axis B.
        target: "label", "mask" or "target", which becomes y.
        shuffle: whether to shuffle the examples, differently in every epoch.
        seed: seed of the shuffling and of random patches, which makes every run the same.
        drop_remainder: whether to drop a last batch that is not full, so that B is static.
        label: label that becomes y, or several, for a dictionary; None means the first one as a number.
        repeat: number of epochs; True repeats without end.
        start: number of elements to skip, counted over all epochs, without reading them. Within an epoch, it
            requires `repeat`.
        shard: (i, n), to read the i-th of every n examples, from 0; or a `tf.distribute.InputContext`.
        where: condition on columns of the index, such as "age > 60 and site == 'A'".
        as_dict: whether elements are dictionaries of `columns`.
        columns: columns of `random_access.Dataset`; None means image, label (if any), id, affine and zooms.
        channels_first: whether volumes have the shape (B, c, x, y, z).
        pad: whether to pad volumes, or other cells, of different shapes with zeros to the largest of a batch.
        ragged: whether to make a `tf.RaggedTensor` of them instead.
        on_error: "skip" skips damaged records, with a warning for each; the cardinality is then unknown.
        engine: "indexed" (Python threads) or "sequential" (TensorFlow's graph); None selects one.
        start_state: result of `state_after` for the run to continue, instead of `start`.
        layout: layout of TFRecords of other programs: "nobrainer", "medicai" (of its tutorial on BraTS), or
            "plain" for `image_raw` and `label`.
        patch: (x, y, z) in voxels of random patches to read instead of whole volumes.
        patches_per_volume: number of patches per volume and epoch; None means 1.
        foreground: share of the patches that are drawn around a labelled voxel of the mask; None means 0.
        label_weights: weight of each label of the mask among these patches, such as {1: 1, 2: 3}; labels that
            are not given have the weight 0. None means that all labels except 0 have the same weight.
        patches: the four arguments above, as one `Patches`.
        fold: fold to leave out of "train", or to read as "validation", of a dataset that was built with
            `--split kfold:N`; from 0.
        balance: column of the index, such as "sex", whose values are drawn equally often. An epoch keeps its
            length, so some examples occur several times. Requires `shuffle`.
        weights: column of the index with the weight of each example in such a draw.

    Returns:
        A dataset whose elements are X and y, X alone if there are no labels, or a dictionary. X is float32 of
        shape (B, x, y, z, c), rescaled by `--rescale`; c is 1 unless records have several frames, components
        or images. y is float32, int64 (a class) or tf.string of shape (B,); a missing one is NaN, -1 or "". A
        mask is int32, and a target float32, of shape (B, x, y, z, 1). All axes except B are static, unless
        volumes differ in shape.

    Raises:
        DatasetError: the dataset is incomplete or has no such split. Damage that is found later is an error
            of TensorFlow that quotes a DatasetError.
        UsageError: arguments cannot be combined, or do not match the dataset; volumes of a batch differ.
    """
    folder = storage.absolute(storage.path_text("path", path))
    drawn = group_patches(patches, patch, patches_per_volume, foreground, label_weights)
    split = _split_of_fold(folder, split, fold, layout)
    source = _Source(folder, split, where, start, start_state, on_error, engine, layout)
    return source.read(
        Elements(target, label, as_dict, columns, channels_first),
        Batching(batch_size, drop_remainder, pad, ragged),
        Passes(shuffle, seed, repeat, shard, drawn, Drawing.of(balance, weights)),
    )


def state_after(
    step: int,
    path: str | os.PathLike[str],
    split: str = "train",
    batch_size: int | None = None,
    *,
    shuffle: bool = False,
    seed: int | None = None,
    drop_remainder: bool = False,
    shard: Shard = None,
    where: str | None = None,
    patch: Sequence[SupportsIndex] | None = None,
    patches_per_volume: int | None = None,
    foreground: float | None = None,
    label_weights: Mapping[int, float] | None = None,
    patches: Patches | None = None,
    fold: int | None = None,
    balance: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """The state of a run after some steps, from which `load_dataset(…, start_state=…)` continues.

    A dataset reads ahead, so only the training loop knows how many batches it has consumed: count its steps,
    as Keras does in `optimizer.iterations`. Only that count changes during a run, so
    `state | {"step": step}` is the state of another step.

    Args:
        step: elements (batches, with `batch_size`) that were consumed, counted over all epochs.
        path: same as for `load_dataset`, like the arguments below, which determine the order of the examples.
        split: same as for `load_dataset`.
        batch_size: same as for `load_dataset`.
        shuffle: same as for `load_dataset`; requires a seed.
        seed: same as for `load_dataset`.
        drop_remainder: same as for `load_dataset`.
        shard: same as for `load_dataset`.
        where: same as for `load_dataset`.
        patch: same as for `load_dataset`; requires a seed.
        patches_per_volume: same as for `load_dataset`.
        foreground: same as for `load_dataset`.
        label_weights: same as for `load_dataset`.
        patches: same as for `load_dataset`.
        fold: same as for `load_dataset`.
        balance: same as for `load_dataset`.
        weights: same as for `load_dataset`.

    Returns:
        A dictionary of values for JSON, with `steps_per_epoch` among them.

    Raises:
        DatasetError: as for `load_dataset`.
        UsageError: as for `load_dataset`, or `step` is below 0.
    """
    step = require_step("step", step)
    drawn = group_patches(patches, patch, patches_per_volume, foreground, label_weights)
    passes = Passes(shuffle, seed, shard=shard, patches=drawn, drawing=Drawing.of(balance, weights))
    folder = storage.absolute(storage.path_text("path", path))
    split = _split_of_fold(folder, split, fold)
    records = Dataset(folder, split, where=where, columns=["id"])
    order = passes.order(len(records), Batching(batch_size, drop_remainder), "state_after")
    return describe_state(records.info, split, where, order, step, *passes.describe())


def _split_of_fold(folder: str, split: str, fold: int | None, layout: str | None = None) -> str:
    """The split to read; that of a fold, if one is given, names the folds that make it up."""
    if fold is None:
        return split
    if layout is not None:
        raise UsageError(
            f"fold requires a dataset_info.json, but layout={layout!r} has none; drop one of the two"
        )
    return choose_fold(folder, open_dataset(folder).info, split, fold)


@dataclass(frozen=True, slots=True)
class _Source:
    """The records to read, and the engine; the fields are arguments of `load_dataset`."""

    path: str
    split: str
    where: str | None
    start: int
    start_state: Mapping[str, Any] | None
    on_error: str
    engine: str | None
    layout: str | None

    def __post_init__(self) -> None:
        require_choice("on_error", self.on_error, "raise", "skip")
        require_choice("engine", self.engine or "indexed", "indexed", "sequential")
        require_choice("layout", self.layout or "plain", *LAYOUTS)
        object.__setattr__(self, "start", require_step("start", self.start))

    def read(self, elements: Elements, batching: Batching, passes: Passes) -> tf.data.Dataset:
        """The dataset that `load_dataset` returns."""
        parts = parse_split(self.split)
        needs_index = {
            "start": self.start != 0,
            "start_state": self.start_state is not None,
            "shard": passes.shard is not None,
            "patch": passes.patches is not None,
            **{name: column is not None for name, column in (passes.describe()[1] or {}).items()},
            "where": self.where is not None,
            "on_error": self.on_error != "raise",
            f"split {self.split!r}": parts != (SplitPart(parts[0].name),),
        }
        if self.layout is not None:
            needs_info = {
                f"split {self.split!r}": self.split != "train",
                "target": elements.target != "label",
                "label": elements.label is not None,
                "as_dict": elements.as_dict,
                "engine='indexed'": self.engine == "indexed",
            }
            _refuse(
                needs_index | needs_info,
                f"requires a dataset_info.json, but layout={self.layout!r} has none; drop one of the two",
            )
            return read_files(self.path, self.layout, batching, passes, elements.channels_first)
        if self._choose_engine(any(needs_index.values()), elements.as_dict) == "indexed":
            return self._read_indexed(elements, batching, passes)
        _refuse(needs_index, "requires the index, but engine is 'sequential'; drop engine")
        opened = sequential.open_dataset(self.path)
        names, pack = elements.choose(opened)
        examples = sequential.read_examples(
            opened, self.split, names, batching, passes, elements.channels_first
        )
        return examples.map(pack)

    def _choose_engine(self, needs_index: bool, as_dict: bool) -> str:
        """The engine that was chosen, or the faster one that can read these files."""
        if self.engine:
            return self.engine
        if storage.is_remote(self.path):
            is_known = storage.scheme_of(self.path) in tf.io.gfile.get_registered_schemes()
            return "indexed" if needs_index or as_dict or not is_known else "sequential"
        return "indexed" if needs_index or Path(self.path, _INDEX_FOLDER).is_dir() else "sequential"

    def _read_indexed(self, elements: Elements, batching: Batching, passes: Passes) -> tf.data.Dataset:
        opened, skips, start = open_dataset(self.path), self.on_error == "skip", self.start
        names, pack = elements.choose(opened)
        chosen: dict[str, Any] = {
            "where": self.where,
            "columns": names,
            "channels_first": elements.channels_first,
        }
        records = Dataset.of_opened(opened, self.split, **chosen)
        resumes = "start" if start else "start_state" if self.start_state is not None else None
        order = passes.order(len(records), batching, resumes)
        if self.start_state is not None:
            if start or skips:
                other = "start" if start else "on_error='skip', which does not count every batch,"
                raise UsageError(f"start_state and {other} cannot be combined; drop one of them")
            state = describe_state(opened.info, self.split, self.where, order, 0, *passes.describe())
            start = check_state(self.path, self.start_state, state)
        reopen = partial(Dataset, self.path, self.split, **chosen)
        examples = read_indexed(
            records,
            order,
            batching,
            passes,
            reopen=reopen,
            start=start,
            resumes=resumes,
            skips=skips,
        )
        return examples.map(pack)


def _refuse(asked: Mapping[str, bool], reason: str) -> None:
    """Raise a UsageError for the first of some arguments that was given."""
    for name, is_asked in asked.items():
        if is_asked:
            raise UsageError(f"{name} {reason}")


def get_batched_dataset(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], batch_size: int
) -> tf.data.Dataset:
    """Read GZIP TFRecords of float32 volumes, in order, without a dataset_info.json.

    The files may come from any program that writes `image_raw` and `label`. `load_dataset` is faster, and
    knows shapes and cardinality.

    Args:
        files: a glob, or a list of files.
        batch_size: examples per batch, which must all have the same shape.

    Returns:
        A dataset of X, float32 of shape (B, x, y, z, 1), and y, float32 of shape (B,). Only the last axis is
        static. Records of 4-D images are an error; `load_dataset` reads them.

    Raises:
        DatasetError: a file is missing, or no file matches the glob.
        UsageError: batch_size is below 1.
    """
    batching = Batching(batch_size)
    if isinstance(files, str | os.PathLike):
        found = sorted(tf.io.gfile.glob(storage.absolute(files)))
        if not found:
            raise DatasetError(f"{files}: no file matches; check the folder and the ending")
    else:
        found = list(map(storage.absolute, files))
        for name in found:
            if not tf.io.gfile.exists(name):
                raise DatasetError(f"{name}: no such file; check the list of files")
        if not found:
            raise DatasetError("the list of files is empty; give at least one file")

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        features = tf.io.parse_single_example(record, {**sequential.IMAGE, **sequential.LABEL})
        voxels = tf.io.parse_tensor(features["image_raw"], tf.float32)
        return tf.expand_dims(tf.ensure_shape(voxels, [None] * 3), 3), features["label"]

    records = tf.data.TFRecordDataset(found, "GZIP")
    examples = records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    return batching.apply(examples).prefetch(tf.data.AUTOTUNE)
