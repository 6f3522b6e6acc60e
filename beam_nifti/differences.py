"""How a build differs from what its output was built with, in the words of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import pyarrow as pa

from beam_nifti import storage
from beam_nifti.config import Columns, LabelColumn, RecordConfig
from beam_nifti.dataset_info import DatasetInfo
from beam_nifti.labels import name_classes
from beam_nifti.manifest import Manifest

_SHOWN_CLASSES: Final = 20
"""Named where the classes of a label are not those of the dataset."""

_SAID_OTHERWISE: Final = frozenset({"fingerprint", "channels"})
"""Fields of a configuration that follow from others."""

_NOT_GIVEN: Final = "not given"
_COMES_ALONG: Final = {"--mask-dtype": "uint8", "--split-seed": "0"}
"""Defaults of options that another option brings along, so that nobody has to have given them."""


def find_differences(
    was: DatasetInfo, now: DatasetInfo, manifest: Manifest, indexes: Iterable[pa.Table]
) -> list[str]:
    """What differs between two builds of one output, a text each.

    Rows that were appended to the manifest are no difference.

    Args:
        was: the earlier dataset, finished or not.
        now: the dataset that is to be built.
        manifest: of which it is to be built.
        indexes: of what the earlier build has finished.
    """
    before = was.config
    if not manifest.lacks_labels(was.manifest["num_rows"]):
        # None of its rows was kept or skipped for want of a label, so the option is free to change.
        missing_label = now.config["columns"]["missing_label"]
        before = {**before, "columns": {**before["columns"], "missing_label": missing_label}}
    differences = _option_differences(before, now.config)
    differences += _class_differences(was.labels, now.labels)
    if not differences and was.config["fingerprint"] != now.config["fingerprint"]:
        differences.append("this version of beam-nifti makes other records of the same options")
    if None not in (was.shape, now.shape) and was.shape != now.shape:
        differences.append(f"the first image had shape {was.shape}, now {now.shape}")
    if was.num_frames and now.num_frames not in (None, was.num_frames):
        differences.append(f"the first image had {was.num_frames} frames, now {now.num_frames}")
    if now.config["voxel_dtype"] == was.config["voxel_dtype"] == "native" and was.dtype != now.dtype:
        differences.append(f"the first image had {was.dtype} voxels, now {now.dtype}")
    known = was.manifest
    if len(manifest) < known["num_rows"] or manifest.digest(known["num_rows"]) != known["digest"]:
        differences.append(_row_difference(was, manifest, indexes))
    return differences


def image_folder(info: DatasetInfo) -> str:
    """What relative paths of a dataset's manifest are relative to."""
    return storage.dirname(info.manifest["path"])


def _option_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = (_COMES_ALONG | _flags(config) for config in (was, now))
    return [
        f"{flag} was {before.get(flag, _NOT_GIVEN)}, now {after.get(flag, _NOT_GIVEN)}"
        for flag in dict.fromkeys([*after, *before])
        if before.get(flag) != after.get(flag)
    ]


def _flags(config: Mapping[str, Any]) -> dict[str, str]:
    """The options of a dataset, by flag; those that were not given are left out.

    A dataset that was built before there was an option has its default.
    """
    given = {**asdict(RecordConfig()), **config}
    columns = {**asdict(Columns()), **given.pop("columns")}
    splitting, sharding = given.pop("splitting", None) or {}, given.pop("sharding") or {}
    shares = sorted(splitting.get("shares", {}).items())  # their order makes no difference
    values = {
        **{name: value for name, value in given.items() if name not in _SAID_OTHERWISE},
        **{f"{name}_column": columns[name] for name in ("path", "label", "id", "mask")},
        "missing_label": columns["missing_label"],
        "split": ",".join(f"{name}={_value(share)}" for name, share in shares) or None,
        "split_seed": splitting.get("seed"),
        "stratify": splitting.get("stratify"),
        **sharding,
    }
    return {
        _flag(name): _value(value)
        for name, value in values.items()
        if value is not None and value is not False
    }


def _flag(name: str) -> str:
    if name == "preprocess_sha256":
        return "sha256 of the file of --preprocess"
    return f"--{name.replace('_', '-')}"


def _value(value: Any) -> str:
    if value is True:
        return "given"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_value, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _class_differences(was: Sequence[LabelColumn], now: Sequence[LabelColumn]) -> Iterator[str]:
    """Classes of a label that are others than those that the records have the numbers of."""
    known = {column.name: column.classes for column in was}
    for column in now:
        classes, others = known.get(column.name), column.classes
        if classes is not None and others is not None and classes != others:
            changes = [("new", set(others) - set(classes)), ("gone", set(classes) - set(others))]
            named = "; ".join(
                f"{what}: {name_classes(sorted(found), _SHOWN_CLASSES)}" for what, found in changes if found
            )
            yield (
                f"the classes of {column.name} were {name_classes(classes, _SHOWN_CLASSES)}, now "
                f"{name_classes(others, _SHOWN_CLASSES)} ({named}), so the stored class numbers would change"
            )


def _row_difference(was: DatasetInfo, manifest: Manifest, indexes: Iterable[pa.Table]) -> str:
    known = was.manifest
    key_check = known.get("key_check")
    if key_check != manifest.key_check:
        if key_check is None:
            return "its ids are not anonymous, but --anonymous-ids was given"
        other = "another key" if manifest.key_check else "no key"
        return f"its ids are anonymous, and {other} was given with --anonymous-ids"
    if list(known["columns"]) != manifest.table.column_names:
        return f"the manifest's columns were {known['columns']}, now {manifest.table.column_names}"
    for table in indexes:
        frame = ["frame"] if was.num_frames else []
        then = table.select(["row", "example_id", "source", "label", *frame]).to_pylist()
        then = [found for found in then if 0 < found["row"] <= len(manifest)]
        now = manifest.rows([found["row"] - 1 for found in then])
        for found, image in zip(then, now, strict=True):
            row = image.of_frame(found["frame"]) if frame else image
            cells = (found["example_id"], found["source"], found["label"])
            if cells != (row.example_id, row.source, row.label):
                return f"row {row.row} was {cells}, now {(row.example_id, row.source, row.label)}"
    if len(manifest) < known["num_rows"]:
        return f"the manifest had {known['num_rows']} rows, now {len(manifest)}"
    return f"among the manifest's first {known['num_rows']} rows some were changed"
