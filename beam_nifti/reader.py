"""Datasets as tf.data pipelines. Loads no Beam for paths on the local disk.

Either of two engines gives the same elements, bit for bit: `reader_graph` reads shards from end to end,
`reader_indexed` single records, by the index.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import tensorflow as tf

from beam_nifti import reader_graph, storage
from beam_nifti.dataset_info import DatasetInfo
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.example import label_feature
from beam_nifti.order import Order
from beam_nifti.random_access import Dataset, read_info
from beam_nifti.reader_indexed import describe_columns, read_indexed
from beam_nifti.split_spec import SplitPart, parse_split

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
    on_error: Literal["raise", "skip"] = "raise",
    engine: Literal["indexed", "sequential"] | None = None,
) -> tf.data.Dataset:
    """Open one split of a complete dataset.

    Args:
        path: the dataset's folder, or a URL.
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
        on_error: "skip" leaves out records that are damaged and warns of each, once, by `logging`.
            Cardinality is unknown then, and `start` also counts the batches of which nothing was left.
        engine: "indexed" reads records by their places in the index, with threads of Python; "sequential"
            reads shards from end to end, all in TensorFlow, and takes none of `start`, `shard`, `where`,
            `as_dict`, `on_error`, or parts of splits. None means indexed where the dataset is on the local
            disk with its index, or where one of those is asked for; else sequential. The indexed engine
            takes about half of the CPU time (docs/reading.md). As it calls Python, its datasets can neither
            be saved in a graph nor go to another process, such as that of a tf.data service.

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
    _check_batching(batch_size, drop_remainder)
    _check_choice("target", target, "label", "mask")
    _check_choice("on_error", on_error, "raise", "skip")
    _check_choice("engine", engine or "indexed", "indexed", "sequential")
    if seed is not None and not shuffle:
        raise UsageError(f"seed is {seed}, but nothing is shuffled; add shuffle=True")
    if columns is not None and not as_dict:
        raise UsageError("columns are those of dictionaries; add as_dict=True")
    epochs = _count_epochs(repeat)
    host, num_hosts = _place_of_host(shard)
    if shuffle and seed is None and (start or num_hosts > 1):
        raise UsageError(
            f"{'start' if start else 'shard'} needs an order that is known beforehand; give a seed, the same "
            "in every run and on every host"
        )
    folder, parts = os.fspath(path).rstrip("/"), parse_split(split)
    asked = {
        "start": start != 0,
        "shard": shard is not None,
        "where": where is not None,
        "as_dict": as_dict,
        "on_error": on_error != "raise",
        f"split {split!r}": parts != (SplitPart(parts[0].name),),
    }
    of_index = [name for name, is_asked in asked.items() if is_asked]
    if (engine or _choose_engine(folder, bool(of_index))) == "sequential":
        if of_index:
            raise UsageError(f"{of_index[0]} needs the index, and engine is 'sequential'; leave engine out")
        info = reader_graph.read_info(folder)
        targets = _choose_targets(folder, info, target, label)
        examples = reader_graph.read_examples(
            folder, info, split, list(targets.values()), shuffle=shuffle, seed=seed
        )
        if batch_size is not None:
            _check_shapes(folder, batch_size, pad, [] if info.shape else ["image"])
            batch = examples.padded_batch if pad else examples.batch
            examples = batch(batch_size, drop_remainder=drop_remainder)
        examples = _pack(examples.repeat(epochs), targets, label)
        return examples.prefetch(tf.data.AUTOTUNE)
    output = storage.absolute(folder)
    info = read_info(output)
    if not as_dict:
        targets = _choose_targets(output, info, target, label)
        columns = ["image", *targets.values()]
    records = Dataset(output, split, where=where, columns=columns)
    described = describe_columns(records)
    _check_shapes(output, batch_size, pad, [c.name for c in described if None in c.shape])
    order = Order(
        len(records),
        batch_size or 1,
        drop_remainder,
        _choose_seed(seed) if shuffle else None,
        host,
        num_hosts,
    )
    total = None if epochs is None else order.num_steps * epochs
    if start < 0 or (total is not None and start > total):
        raise UsageError(
            f"start is {start}, and there are {total} elements in all epochs; raise repeat, or start at 0"
        )
    examples = read_indexed(
        records,
        described,
        order,
        is_batched=batch_size is not None,
        repeat=epochs,
        start=start,
        skips=on_error == "skip",
    )
    if as_dict:
        return examples.map(lambda *cells: dict(zip(records.columns, cells, strict=True)))
    return _pack(examples, targets, label)


def _pack(
    examples: tf.data.Dataset, targets: Mapping[str, str], label: str | Sequence[str] | None
) -> tf.data.Dataset:
    """From tuples of X and all targets to elements."""
    if not targets:
        return examples.map(lambda image: image)
    if label is None or isinstance(label, str):
        return examples
    return examples.map(lambda image, *cells: (image, dict(zip(targets, cells, strict=True))))


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
            choices = ", ".join(column.name for column in info.labels)
            raise UsageError(
                f"the first label is a string and no number; choose y with label=, one of: {choices}"
            )
        return {"label": "label"} if info.labelled else {}
    known = {column.name: label_feature(column.name) for column in info.labels}
    if info.labelled and not known:
        known = {info.config["columns"]["label"]: "label"}
    names = [label] if isinstance(label, str) else label
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wanted = ", ".join(map(repr, unknown)) or "none"
        raise UsageError(f"label is {wanted}; the dataset has {', '.join(known) or 'no labels'}")
    return {name: known[name] for name in names}


def get_batched_dataset(files: str | Sequence[str], batch_size: int) -> tf.data.Dataset:
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
    _check_batching(batch_size, drop_remainder=False)
    if isinstance(files, str):
        found = sorted(tf.io.gfile.glob(files))
        if not found:
            raise DatasetError(f"{files}: no file matches; check the folder and the ending")
    else:
        found = list(files)
        for name in found:
            if not tf.io.gfile.exists(name):
                raise DatasetError(f"{name}: no such file; check the list of files")
        if not found:
            raise DatasetError("the list of files is empty; give at least one file")

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        features = tf.io.parse_single_example(record, {**reader_graph.IMAGE, **reader_graph.LABEL})
        voxels = tf.io.parse_tensor(features["image_raw"], tf.float32)
        return tf.expand_dims(tf.ensure_shape(voxels, [None] * 3), 3), features["label"]

    records = tf.data.TFRecordDataset(found, "GZIP")
    examples = records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def _choose_engine(folder: str, needs_index: bool) -> str:
    """The faster engine, where it can be had without another way to reach the files."""
    has_index = not storage.is_remote(folder) and Path(folder, _INDEX_FOLDER).is_dir()
    return "indexed" if has_index or needs_index else "sequential"


def _choose_seed(seed: int | None) -> int:
    """A seed of at least 0; where none is given one that TensorFlow's global seed decides, if that is set."""
    if seed is None:
        found = tf.compat.v1.get_seed(None)
        seed = secrets.randbits(_SEED_BITS) if found[0] is None else found[0] << 32 | found[1]
    return seed % (1 << _SEED_BITS)


def _count_epochs(repeat: bool | int) -> int | None:
    """How many there are; None where they have no end."""
    if repeat is True:
        return None
    if repeat < 0 or (repeat == 0 and repeat is not False):
        raise UsageError(f"repeat is {repeat}; give a number of epochs from 1, or True for no end")
    return int(repeat) or 1


def _place_of_host(shard: tuple[int, int] | tf.distribute.InputContext | None) -> tuple[int, int]:
    """Which host this is, and of how many."""
    if shard is None:
        return 0, 1
    if isinstance(shard, tf.distribute.InputContext):
        return shard.input_pipeline_id, shard.num_input_pipelines
    host, num_hosts = shard
    if not 0 <= host < num_hosts:
        raise UsageError(f"shard is {shard}; give (i, n), of n hosts the i-th, from 0")
    return host, num_hosts


def _check_shapes(folder: str, batch_size: int | None, pad: bool, varying: Sequence[str]) -> None:
    """Refuse to put into a batch what has different shapes."""
    if varying and not pad and batch_size not in (None, 1):
        what = "the volumes" if varying[0] in ("image", "mask") else varying[0]
        raise UsageError(
            f"batch_size is {batch_size}, but {what} of {folder} have different shapes; use batch_size=1 or "
            "None, or pad=True"
        )


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; choose {' or '.join(map(repr, choices))}")


def _check_batching(batch_size: int | None, drop_remainder: bool) -> None:
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
    if drop_remainder and batch_size is None:
        raise UsageError("drop_remainder leaves out a batch, but there are none; give a batch_size")
