"""How a build differs from what its output was built with, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns, LabelColumn
from beam_nifti.manifest.labels import name_classes
from beam_nifti.manifest.manifest import Manifest, frame_id
from beam_nifti.pipeline.configure import DERIVED, NOT_GIVEN, content_options, value_text
from beam_nifti.pipeline.failures import PEOPLE, listed_cells, own_cells
from beam_nifti.pipeline.options import flag_of
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.index import extra_column
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted, first_few, one_line

_SHOWN_ROWS: Final = 5

_COMES_ALONG: Final = {"--mask-dtype": "uint8", "--split-seed": "0"}
"""Defaults of options that another option brings along, so that nobody has to have given them."""


def find_differences(
    was: DatasetInfo,
    now: DatasetInfo,
    manifest: Manifest,
    indexes: Iterable[tuple[str, pa.Table]],
    failed: Callable[[], Manifest | None] = lambda: None,
) -> list[str]:
    """What differs between two builds of one output, one text for each difference.

    Rows that were appended to the manifest are no difference.

    Args:
        was: the earlier dataset, finished or not.
        now: the dataset to build.
        manifest: manifest of that.
        indexes: split and table of each index of what the earlier build has finished.
        failed: reads the list of its failures, if it has one that can be read.
    """
    before = was.config
    if not manifest.lacks_labels(was.manifest["num_rows"]):
        # None of its rows was kept or skipped for want of a label, so the option is free to change.
        missing_label = now.config["columns"]["missing_label"]
        before = {**before, "columns": {**before["columns"], "missing_label": missing_label}}
    if not manifest.lacks_masks(was.manifest["num_rows"]):
        missing_mask = now.config["columns"].get("missing_mask")
        before = {**before, "columns": {**before["columns"], "missing_mask": missing_mask}}
    differences = _option_differences(before, now.config)
    differences += _class_differences(was.labels, now.labels)
    if not differences and was.config["fingerprint"] != now.config["fingerprint"]:
        differences.append("this version of beam-nifti makes different records from the same options")
    if None not in (was.shape, now.shape) and was.shape != now.shape:
        differences.append(f"the first image had shape {was.shape}, now {now.shape}")
    is_fixed = was.config.get("max_frames") is None and now.config.get("max_frames") is None
    if is_fixed and was.num_frames and now.num_frames not in (None, was.num_frames):
        differences.append(
            f"the number of frames of the first image was {was.num_frames}, now {now.num_frames}"
        )
    if now.config["voxel_dtype"] == was.config["voxel_dtype"] == "native" and was.dtype != now.dtype:
        differences.append(f"the first image had {was.dtype} voxels, now {now.dtype}")
    known = was.manifest
    if len(manifest) < known["num_rows"] or manifest.digest(known["num_rows"]) != known["digest"]:
        differences.append(_row_difference(was, manifest, indexes, failed))
    return differences


def image_folder(info: DatasetInfo) -> str:
    """What relative paths of a dataset's manifest are relative to."""
    return storage.dirname(info.manifest["path"])


def _option_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, after = (_COMES_ALONG | _flags(config) for config in (was, now))
    if "--num-shards" in after:
        # The build may have chosen it, and without either option, a build keeps the shards that there are.
        before.pop("--examples-per-shard", None)
    if "--rescale-stats" not in after:  # nobody has to give them, and options that need others differ too
        before.pop("--rescale-stats", None)
    return [
        f"{flag} was {before.get(flag, NOT_GIVEN)}, now {after.get(flag, NOT_GIVEN)}"
        for flag in dict.fromkeys([*after, *before])
        if before.get(flag) != after.get(flag)
    ]


def _flags(config: Mapping[str, Any]) -> dict[str, str]:
    """The options of a dataset that were given, by flag."""
    values = content_options(config)
    return {_flag(name): value_text(value) for name, value in values.items() if name not in DERIVED}


def _flag(name: str) -> str:
    return "sha256 of the file of --preprocess" if name == "preprocess_sha256" else flag_of(name)


def _class_differences(was: Sequence[LabelColumn], now: Sequence[LabelColumn]) -> Iterator[str]:
    """Classes of a label that are others than those that the records have the numbers of."""
    known = {column.name: column.classes for column in was}
    for column in now:
        classes, others = known.get(column.name), column.classes
        if classes is not None and others is not None and classes != others:
            changes = [("new", set(others) - set(classes)), ("gone", set(classes) - set(others))]
            named = "; ".join(f"{what}: {name_classes(sorted(found))}" for what, found in changes if found)
            yield (
                f"the classes of {column.name} were {name_classes(classes)}, now "
                f"{name_classes(others)} ({named}), so the stored class numbers would change"
            )


def _row_difference(
    was: DatasetInfo,
    manifest: Manifest,
    indexes: Iterable[tuple[str, pa.Table]],
    failed: Callable[[], Manifest | None],
) -> str:
    known = was.manifest
    key_check = known.get("key_check")
    if key_check != manifest.key_check:
        if key_check is None:
            return "its ids are not anonymous, but --anonymous-ids was given"
        other = "another key" if manifest.key_check else "no key"
        return f"its ids are anonymous, but {other} was given with --anonymous-ids"
    if list(known["columns"]) != manifest.table.column_names:
        was_named, now_named = (", ".join(names) for names in (known["columns"], manifest.table.column_names))
        return f"the manifest's columns were {was_named}, now {now_named}"
    then = _known_images(was, indexes)
    found = _moved(then, manifest, known) or _changed(then, manifest, Columns(**was.config["columns"]))
    if found:
        return found
    num_rows = counted(known["num_rows"], "row")
    if len(manifest) < known["num_rows"]:
        gone = [*range(len(manifest) + 1, known["num_rows"] + 1)]
        ids = then.filter(pc.greater(then["row"], len(manifest)))["example_id"].combine_chunks()
        return f"{_rows_were(gone, ids, manifest)} dropped"
    if (listed := failed()) is not None:
        rows = _failed_rows(listed, manifest, known["num_rows"], image_folder(was))
        if found := _changed(rows, manifest, Columns(**was.config["columns"])):
            return found
    others = sorted({*range(1, known["num_rows"] + 1)}.difference(then["row"].to_pylist()))
    if len(others) == 1:
        return f"row {others[0]}, which had no record, was changed"
    without = f"; {_rows(others)} had no record" if others else ""
    return f"some of the manifest's first {num_rows} were changed{without}"


def _known_images(was: DatasetInfo, indexes: Iterable[tuple[str, pa.Table]]) -> pa.Table:
    """The splits of images, and what the indexes have of their rows of the manifest, in its order."""
    fields = [("row", pa.int64()), ("label", pa.float64()), ("example_id", pa.string())]
    tables = [pa.schema(fields).empty_table()]  # also where there are no indexes
    for split, table in indexes:
        if was.num_frames:
            frames = zip(table["example_id"].to_pylist(), table["frame"].to_pylist(), strict=True)
            ids = pa.array([name.removesuffix(frame_id("", frame)) for name, frame in frames], pa.string())
            table = table.set_column(table.column_names.index("example_id"), "example_id", ids)
        kept = [f.name for f in table.schema if f.name in ("row", "label") or pa.types.is_string(f.type)]
        splits = pa.array([split] * len(table), pa.string())
        tables.append(table.select(kept).replace_schema_metadata().append_column("split", splits))
    found = pa.concat_tables(tables, promote_options="default").sort_by("row").combine_chunks()
    return found.filter(pa.array(np.diff(found["row"].to_numpy(), prepend=0) > 0))


def _failed_rows(listed: Manifest, manifest: Manifest, num_rows: int, folder: str) -> pa.Table:
    """What a list of failures has of the first `num_rows` rows of the manifest, like `_known_images`.

    Its paths were relative to `folder`.
    """
    table, as_they_were = listed.table, {"split", *(column.name for column in listed.columns.labels)}
    numbers = [int(text) if re.fullmatch("[0-9]{1,18}", text) else 0 for text in own_cells(listed, "row")]
    kept = [at for at, number in enumerate(numbers) if 1 <= number <= num_rows]
    rows = pa.array([numbers[at] for at in kept], pa.int64())
    cells: dict[str, Any] = {"row": rows, "example_id": manifest.ids.take(pc.subtract(rows, 1))}
    if listed.numbers is not None:
        cells["label"] = pa.array(listed.numbers[kept])
    for name in manifest.table.column_names:
        known = (
            table[name]
            if name in as_they_were & {*table.column_names}
            else listed_cells(listed, name, manifest, folder)
        )
        if known is not None:
            own = "source" if name == listed.columns.paths[0] else name
            place = own if own in ("source", "split", *PEOPLE) else extra_column(name)
            cells[place] = known.take(kept)
    return pa.table(cells).sort_by("row")


def _moved(then: pa.Table, manifest: Manifest, known: Mapping[str, Any]) -> str:
    """The rows that were inserted or dropped before others, or the row that has moved; "" if none has."""
    rows, ids = then["row"].to_numpy(), then["example_id"].combine_chunks()
    now = pc.fill_null(pc.index_in(ids, value_set=manifest.ids), -1).to_numpy() + 1
    moved = np.flatnonzero((now != rows) & (now > 0))
    if not moved.size:
        return ""
    at = int(moved[0])
    row, place = int(rows[at]), int(now[at])
    first = int(max(rows[:at][now[:at] == rows[:at]], default=0)) + 1
    if place > row:
        came = np.setdiff1d(np.arange(first, place), now)
        rest = manifest.table.filter(pa.array(~np.isin(np.arange(1, len(manifest) + 1), came)))
        before = replace(manifest, table=rest)
        if len(before) >= known["num_rows"] and before.digest(known["num_rows"]) == known["digest"]:
            return f"{_rows_were(came.tolist(), manifest.ids.take(pa.array(came - 1)), manifest)} inserted"
    else:
        gone = np.setdiff1d(np.arange(first, row), rows[now > 0])
        num_gone, is_all = row - place, known["num_rows"] - len(manifest) == row - place
        if len(gone) == num_gone and (is_all or np.isin(gone, rows).all()):
            names = ids.filter(pa.array(np.isin(rows, gone)))
            return f"{_rows_were(gone.tolist(), names, manifest)} dropped"
        if is_all:
            return f"{num_gone} of {_rows(gone.tolist())} {'was' if num_gone == 1 else 'were'} dropped"
    return f"{_named(row, ids[at].as_py(), manifest)} is now row {place}"


def _changed(then: pa.Table, manifest: Manifest, columns: Columns) -> str:
    """The changed cells of the first changed row; "" if none is known to have changed."""
    then = then.filter(pc.less_equal(then["row"], len(manifest)))
    at = then["row"].to_numpy() - 1
    now = manifest.table.take(pa.array(at))
    hidden = {columns.id, *columns.files, "participant_id", "session_id"} if manifest.key_check else set()
    own = {columns.paths[0]: "source", columns.id: "example_id", "split": "split"}
    own |= {name: name for name in ("participant_id", "session_id")}
    changes = dict[str, tuple[npt.NDArray[np.bool_], Any, Any]]()
    for name in now.column_names:
        place = own.get(name, extra_column(name))
        if name == columns.label == manifest.columns.label and manifest.numbers is not None:
            was, cells = then["label"].to_numpy(), manifest.numbers[at]
            changes[name] = ~((was == cells) | (np.isnan(was) & np.isnan(cells))), was, cells
        elif place in then.column_names:
            differs = pc.fill_null(pc.not_equal(then[place], now[name]), False)
            changes[name] = differs.to_numpy(), then[place], now[name]
    is_changed = np.any([differs for differs, _, _ in changes.values()], axis=0)
    if not is_changed.any():
        return ""
    first = int(np.argmax(is_changed))
    cells = [
        f"{name} was changed"
        if name in hidden
        else f"{name} was {_cell(was[first])}, now {_cell(cells[first])}"
        for name, (differs, was, cells) in changes.items()
        if differs[first]
    ]
    num_more = int(is_changed.sum()) - 1
    more = f"; {counted(num_more, 'more row')} changed" if num_more else ""
    named = _named(int(at[first]) + 1, then["example_id"][first].as_py(), manifest)
    return f"{named}: {', '.join(cells)}{more}"


def _cell(value: Any) -> str:
    if isinstance(value, pa.Scalar):
        return repr(value.as_py())
    return "missing" if np.isnan(value) else value_text(float(value))


def _named(row: int, example_id: str, manifest: Manifest) -> str:
    return f"row {row}" if manifest.key_check else f"row {row} ({one_line(example_id)})"


def _rows(numbers: Sequence[int]) -> str:
    return f"row{'' if len(numbers) == 1 else 's'} {first_few(numbers, _SHOWN_ROWS)}"


def _rows_were(numbers: Sequence[int], ids: pa.Array, manifest: Manifest) -> str:
    """The beginning of a sentence about rows. A single row is named if its id is known."""
    is_one = len(numbers) == 1
    named = _named(numbers[0], ids[0].as_py(), manifest) if is_one and len(ids) else _rows(numbers)
    return f"{named} {'was' if is_one else 'were'}"
