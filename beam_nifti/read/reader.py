"""Datasets as tf.data pipelines. Loads no Beam for paths on the local disk.

Either of two engines gives the same elements, bit for bit: `sequential` reads shards from end to end,
`indexed` single records, by the index.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import tensorflow as tf

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read import sequential
from beam_nifti.read.columns import Batching
from beam_nifti.read.indexed import read_indexed
from beam_nifti.read.layouts import LAYOUTS, read_files
from beam_nifti.read.order import Order, whole_number
from beam_nifti.read.random_access import Dataset, default_columns, read_info
from beam_nifti.read.split_spec import SplitPart, parse_split
from beam_nifti.read.state import check_state, describe_state
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.example import label_feature
from beam_nifti.storage import paths as storage

_INDEX_FOLDER: Final = "index"
_SEED_BITS: Final = 64


def load_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    batch_size: int | None = None,
    *,
    target: str = "label",
    shuffle: bool = False,
    seed: int | None = None,
    drop_remainder: bool = False,
    label: str | Sequence[str] | None = None,
    repeat: bool | int = False,
    start: int = 0,
    shard: tuple[int, int] | tf.distribute.InputContext | None = None,
    where: str | None = None,
    as_dict: bool = False,
    columns: Sequence[str] | None = None,
    pad: bool = False,
    ragged: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    engine: Literal["indexed", "sequential"] | None = None,
    start_state: Mapping[str, Any] | None = None,
    layout: Literal["plain", "nobrainer"] | None = None,
) -> tf.data.Dataset:
    """Open one split of a complete dataset, or, with `layout`, files of others.

    Args:
        path: the dataset's folder, or a URL; with `layout` a glob.
        split: such as "train"; with the indexed engine also a part, such as `train[:80%]`, or several,
            `train+test`, as `random_access.Dataset` takes them.
        batch_size: examples a batch; None gives single examples, without the axis B. A batch ends with its
            epoch.
        target: what y is: "label", or "mask".
        shuffle: put the examples into another order in every epoch. The indexed engine shuffles all of them,
            and holds their numbers for it, 8 bytes each; the sequential one shuffles shards, and the
            examples of a window of 64 (of fewer if those had more than 4 GiB of voxels).
        seed: makes the sequence of orders that `shuffle` gives the same in every run; with the indexed engine
            on every machine, as (seed, epoch) alone decides an order. Without, `tf.random.set_seed` does.
        drop_remainder: leave out a last batch that is not full, so that B is static.
        label: the column of the manifest that y is; several give a dictionary of them; None gives the
            first label as a number.
        repeat: how many epochs there are; True means without end. With the indexed engine and `shuffle`, a
            further pass over the dataset goes on with the epochs that follow those of the pass before;
            without end, every pass begins with epoch 0.
        start: elements (batches, if there are such) that were consumed already, since the beginning and
            across epochs: the elements are those of `.skip(start)`, but what is skipped is not read.
        shard: (i, n): of n hosts this is the i-th, from 0, which reads the i-th of every n examples of an
            epoch. All hosts have to have the same seed. A `tf.distribute.InputContext` says the same.
        where: a condition on columns of the index, such as "age > 60 and site == 'A'", as
            `random_access.Dataset` takes it.
        as_dict: give dictionaries of `columns`.
        columns: what those have, as `random_access.Dataset` takes it: "image", "mask", "label", "id",
            "affine", "zooms", and any other column of the index or feature of the records; None means image,
            label (where there are any), id, affine and zooms.
        pad: fill volumes, or other columns, of different shapes with zeros, at their ends, up to the largest
            of a batch, as `padded_batch` does; else they cannot be batched.
        ragged: instead make batches of them that are `tf.RaggedTensor`, as `ragged_batch` does.
        on_error: "skip" skips records that are damaged and warns of each, once, by `logging`.
            Cardinality is unknown then, and `start` also counts the batches of which nothing was left.
        engine: "indexed" reads records by their places in the index, with threads of Python; "sequential"
            reads shards from end to end, all in TensorFlow, and takes none of `start`, `start_state`,
            `shard`, `where`, `on_error`, parts of splits, and columns that only the index has. None means
            indexed where the dataset is on the local disk with its index, or where one of those is asked for,
            or `as_dict` of a URL, and for URLs whose scheme TensorFlow does not know; else sequential. The
            indexed engine takes about half of the CPU time (docs/reading.md). As it calls Python, its
            datasets can neither be saved in a graph nor go to another process, such as that of a tf.data
            service.
        start_state: instead of `start`: what `state_after` says of the run that is to go on. It is refused
            where that run read another dataset, or in another order.
        layout: of TFRecords that others wrote, whose glob `path` is: "nobrainer", of nobrainer 1.x, or
            "plain", of records with the features `image_raw`, a serialized tensor, and `label`, a number. All
            volumes have the shape of the first, unless `pad` or `ragged` lets them differ. X is float32 as it
            is stored, y a number or, of label maps, a volume, in its stored dtype; the cardinality is
            unknown. None is for datasets of beam-nifti.

    Returns:
        A dataset of known cardinality. Its elements are X, float32 of shape (B, x, y, z, 1), or
        (B, x, y, z, c) where records have c frames, components or images, and y. That is of shape (B,):
        float32; int64 for a label that is a class; tf.string for one that is a string; NaN, -1 or "" where
        it is missing. Or it is the labels of the mask, int32 of shape (B, x, y, z, 1). X alone where the
        dataset has no labels. All axes but B are static, unless the volumes have different shapes.
        X is what `--rescale` made of the images: in [0, 1] as a rule, in the images' own units with
        `--rescale none`.
        With `as_dict` X is "image", the mask as above "mask", and others have their names; strings and
        bytes are tf.string.
        Without `shuffle` the order is the same in every epoch and on every machine: that of the index, or,
        from the sequential engine, one example of each of eight shards in turn.

    Raises:
        DatasetError: there is no complete dataset, no such split, or a shard is missing; while reading, as an
            error of TensorFlow that quotes it, that a record is damaged.
        UsageError: the arguments do not fit together or to the dataset, or volumes of different shapes are to
            be batched.
    """
    batching = Batching(batch_size, drop_remainder, pad, ragged)
    _check_choice("target", target, "label", "mask")
    _check_choice("on_error", on_error, "raise", "skip")
    _check_choice("engine", engine or "indexed", "indexed", "sequential")
    _check_seed(shuffle, seed)
    if columns is not None and not as_dict:
        raise UsageError("columns requires as_dict=True")
    seed = None if seed is None else whole_number("seed", seed)
    epochs, start, folder = _count_epochs(repeat), whole_number("start", start), storage.absolute(path)
    parts = parse_split(split)
    asked = {
        "start": start != 0,
        "start_state": start_state is not None,
        "shard": shard is not None,
        "where": where is not None,
        "on_error": on_error != "raise",
        f"split {split!r}": parts != (SplitPart(parts[0].name),),
    }
    if layout is not None:
        _check_choice("layout", layout, *LAYOUTS)
        asked |= {
            f"split {split!r}": split != "train",
            "target": target != "label",
            "label": label is not None,
            "as_dict": as_dict,
            "engine='indexed'": engine == "indexed",
        }
        _refuse(asked, f"needs a dataset_info.json, and files of layout={layout!r} have none; leave it out")
        return read_files(folder, layout, batching, shuffle=shuffle, seed=seed, repeat=epochs)
    if (engine or _choose_engine(folder, any(asked.values()), as_dict)) == "sequential":
        _refuse(asked, "needs the index, and engine is 'sequential'; leave engine out")
        info, content = sequential.read_info(folder)
        names, pack = _choose_elements(folder, info, target, label, as_dict, columns)
        examples = sequential.read_examples(
            folder, info, content, split, names, batching, shuffle=shuffle, seed=seed, repeat=epochs
        )
    else:
        skips = on_error == "skip"
        info = read_info(folder)
        names, pack = _choose_elements(folder, info, target, label, as_dict, columns)
        records = Dataset.of_info(folder, info, split, where=where, columns=names)
        resumes = "start" if start else "start_state" if start_state is not None else None
        order = _make_order(len(records), batching, shuffle, seed, shard, resumes)
        if start_state is not None:
            _check_start_alone(start, skips)
            start = check_state(folder, start_state, describe_state(info, split, where, order, 0))
        reopen = partial(Dataset, folder, split, where=where, columns=names)
        examples = read_indexed(
            records, order, batching, reopen=reopen, repeat=epochs, start=start, skips=skips
        )
    return examples.map(pack)


def state_after(
    step: int,
    path: str | os.PathLike[str],
    split: str = "train",
    batch_size: int | None = None,
    *,
    shuffle: bool = False,
    seed: int | None = None,
    drop_remainder: bool = False,
    shard: tuple[int, int] | tf.distribute.InputContext | None = None,
    where: str | None = None,
) -> dict[str, Any]:
    """What `load_dataset(…, start_state=…)` takes to go on where a run stood.

    A dataset reads ahead of the training that it feeds, so only the training knows how far it came: count its
    steps, as Keras does in `optimizer.iterations`. Nothing but that count changes while a run lasts, so that
    `state | {"step": step}` is the state of another step.

    Args:
        step: elements (batches, if there are such) that were consumed, since the beginning and across epochs.
        path: as `load_dataset` takes it, like all that follow: what decides which examples come when.
        split: see there.
        batch_size: see there.
        shuffle: see there.
        seed: see there; `shuffle` needs one.
        drop_remainder: see there.
        shard: see there.
        where: see there.

    Returns:
        Numbers, strings and lists, for JSON. `steps_per_epoch` is among them.

    Raises:
        DatasetError: as `load_dataset`.
        UsageError: as `load_dataset`; `step` is below 0.
    """
    step = whole_number("step", step)
    if step < 0:
        raise UsageError(f"step is {step}; give how many elements were consumed, from 0")
    _check_seed(shuffle, seed)
    seed = None if seed is None else whole_number("seed", seed)
    records = Dataset(path, split, where=where, columns=["id"])
    batching = Batching(batch_size, drop_remainder)
    order = _make_order(len(records), batching, shuffle, seed, shard, "state_after")
    return describe_state(records.info, split, where, order, step)


def _choose_elements(
    folder: str,
    info: DatasetInfo,
    target: str,
    label: str | Sequence[str] | None,
    as_dict: bool,
    columns: Sequence[str] | None,
) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """The columns that are read, and what makes an element of their cells."""
    if as_dict:
        names = default_columns(info) if columns is None else tuple(dict.fromkeys(columns))
        return names, lambda *cells: dict(zip(names, cells, strict=True))
    targets = _choose_targets(folder, info, target, label)
    names = ("image", *targets.values())
    if not targets:
        return names, lambda image: image
    if label is None or isinstance(label, str):
        return names, lambda *cells: cells
    return names, lambda image, *cells: (image, dict(zip(targets, cells, strict=True)))


def _choose_targets(
    folder: str, info: DatasetInfo, target: str, label: str | Sequence[str] | None
) -> dict[str, str]:
    """What y is made of: by name the columns, or features, of the records."""
    if target == "mask":
        if info.mask_labels is None:
            raise UsageError(f"target is 'mask', but {folder} has no masks; build it with --mask-column")
        if label is not None:
            raise UsageError(f"label is {label!r}, but y is the mask; leave target or label out")
        return {"mask": "mask"}
    if label is None:
        if info.labels and info.labels[0].kind == "string":
            raise UsageError(
                f"{folder}: the first label is a string and no number; choose y with label=, one of: "
                f"{', '.join(column.name for column in info.labels)}"
            )
        return {"label": "label"} if info.labelled else {}
    known = {column.name: label_feature(column.name) for column in info.labels}
    if info.labelled and not known:
        known = {info.config["columns"]["label"]: "label"}
    names = [label] if isinstance(label, str) else label
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wanted = ", ".join(map(repr, unknown)) or "none"
        raise UsageError(f"{folder}: label is {wanted}; the dataset has {', '.join(known) or 'no labels'}")
    return {name: known[name] for name in names}


def get_batched_dataset(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], batch_size: int
) -> tf.data.Dataset:
    """Read GZIP TFRecords of float32 volumes from the files alone, in order.

    `load_dataset` is faster and knows shapes and cardinality; this needs no dataset_info.json and reads
    what any writer of `image_raw` and `label` made.

    Args:
        files: a glob, or a list of files.
        batch_size: examples a batch, which must have one shape.

    Returns:
        A dataset of X, float32 of shape (B, x, y, z, 1), and y, float32 of shape (B,). No axis but the
        last is static. Records of 4-D images end it with an error: `load_dataset` reads them.

    Raises:
        DatasetError: a file is missing, or the glob matches none.
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


def _choose_engine(folder: str, needs_index: bool, as_dict: bool) -> str:
    """The faster engine, where it can be had without another way to reach the files."""
    if storage.is_remote(folder):
        is_known = storage.scheme_of(folder) in tf.io.gfile.get_registered_schemes()
        return "indexed" if needs_index or as_dict or not is_known else "sequential"
    return "indexed" if needs_index or Path(folder, _INDEX_FOLDER).is_dir() else "sequential"


def _choose_seed(seed: int | None) -> int:
    """A seed of at least 0; where none is given one that TensorFlow's global seed decides, if that is set."""
    if seed is None:
        found = tf.compat.v1.get_seed(None)
        seed = secrets.randbits(_SEED_BITS) if found[0] is None else found[0] << 32 | found[1]
    return seed % (1 << _SEED_BITS)


def _count_epochs(repeat: bool | int) -> int | None:
    """How many there are; None where they have no end."""
    if isinstance(repeat, bool | np.bool_):
        return None if repeat else 1
    epochs = whole_number("repeat", repeat)
    if epochs < 1:
        raise UsageError(f"repeat is {epochs}; give a number of epochs from 1, or True for no end")
    return epochs


def _place_of_host(shard: tuple[int, int] | tf.distribute.InputContext | None) -> tuple[int, int]:
    """Which host this is, and of how many."""
    if shard is None:
        return 0, 1
    if isinstance(shard, tf.distribute.InputContext):
        return shard.input_pipeline_id, shard.num_input_pipelines
    host, num_hosts = (whole_number("shard", number) for number in shard)
    if not 0 <= host < num_hosts:
        raise UsageError(f"shard is {shard}; give (i, n): host i, counted from 0, of n")
    return host, num_hosts


def _make_order(
    count: int,
    batching: Batching,
    shuffle: bool,
    seed: int | None,
    shard: tuple[int, int] | tf.distribute.InputContext | None,
    resumes: str | None,
) -> Order:
    """The order of so many records; `resumes` names the argument that needs to know it beforehand."""
    host, num_hosts = _place_of_host(shard)
    if shuffle and seed is None and (resumes or num_hosts > 1):
        raise UsageError(
            f"{resumes or 'shard'} needs an order that is known beforehand; give a seed, the same in every "
            "run and on every host"
        )
    chosen = _choose_seed(seed) if shuffle else None
    return Order(count, batching.size or 1, batching.drop_remainder, chosen, host, num_hosts)


def _check_start_alone(start: int, skips: bool) -> None:
    """Refuse, beside `start_state`, what says otherwise where to start."""
    if start or skips:
        other = "start" if start else "on_error='skip', which leaves batches uncounted,"
        raise UsageError(f"start_state and {other} do not go together; leave one of them out")


def _refuse(asked: Mapping[str, bool], reason: str) -> None:
    """Raise a UsageError for the first argument that was asked for."""
    for name, is_asked in asked.items():
        if is_asked:
            raise UsageError(f"{name} {reason}")


def _check_seed(shuffle: bool, seed: int | None) -> None:
    if seed is not None and not shuffle:
        raise UsageError(f"seed is {seed}, but nothing is shuffled; add shuffle=True")


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; choose {' or '.join(map(repr, choices))}")
