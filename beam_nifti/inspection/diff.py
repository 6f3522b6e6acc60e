"""The examples and options that differ between two datasets, from dataset_info.json and the indexes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.inspection.description import read_indexes
from beam_nifti.manifest.labels import name_classes
from beam_nifti.pipeline.configure import DERIVED, NOT_GIVEN, content_options, value_text
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.record.example import SCALING_FEATURES
from beam_nifti.record.index import OWN_NAMES, SOURCE_LISTS, comparable_sources
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted, first_few, format_rows, one_line

# Columns that are not compared. If the scaling differs, the statistics do.
_PLACES: Final = ("example_id", "position", "offset", "length", "member_lengths", "row", *SCALING_FEATURES)
_OF_FEATURES: Final = (
    *("mask_labels", "mask_positions", "mapped_labels", "num_nonfinite"),
    *("target_min", "target_max", "target_mean", "target_std", "target_nonfinite"),
)
"""Columns that are not compared if only one dataset has them."""

_SOURCE: Final = ("source", "source_size", "source_mtime", *SOURCE_LISTS)
_PERSON: Final = ("participant_id", "session_id")
_PRINTED: Final = ("before", "after", "added", "removed", "config", "the same", "voxels")
"""Names that a comparison prints, and that may also be names of extra columns."""

_SHOWN: Final = 5  # ids to show of each kind


@dataclass(frozen=True, repr=False)
class Difference:
    """How two datasets differ; falsy if they do not differ. `print(difference)` shows it as a table.

    Ids are in the order of the datasets' indexes.

    Attributes:
        before: path of the first dataset.
        after: path of the second dataset.
        num_before: number of records of the first.
        num_after: number of records of the second.
        added: ids of records that only the second has.
        removed: ids of records that only the first has.
        changed: ids of records that both have, by what differs: "split", "label", "source" (path, size or
            time of an image), "voxels" (shape, dtype, affine, voxel sizes, statistics, labels of the mask,
            statistics of the target), or the name of an extra column; `manifest_{name}` if the table shows
            something else under that name, such as "voxels".
        config: options that differ, by name: the value in the first, the value in the second; None if it is
            not given. "labels" has the kinds and classes of the labels, "preprocess_sha256" the files of
            functions.
    """

    before: str
    after: str
    num_before: int
    num_after: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    config: Mapping[str, tuple[Any, Any]]

    @property
    def is_empty(self) -> bool:
        """Whether the datasets do not differ."""
        return not (self.added or self.removed or self.changed or self.config)

    def __bool__(self) -> bool:
        return not self.is_empty

    def __repr__(self) -> str:
        names = ", ".join([*self.changed, *(f"config {name}" for name in self.config)]) or "nothing"
        counts = f"{len(self.added):,} added, {len(self.removed):,} removed"
        return f"<Difference: {counts}, changed: {one_line(names)}>"

    def __str__(self) -> str:
        rows = list(_lines(self))
        return format_rows(rows, max(10, *(len(name) + 2 for name, _ in rows)))


def compare_datasets(before: str, after: str) -> Difference:
    """Compare two datasets by dataset_info.json and the indexes, without reading a shard.

    If only one keeps what each file of an example was, sizes of files are compared, but not their times.
    """
    before, after = storage.absolute(before), storage.absolute(after)
    (old_info, old), (new_info, new) = _read(before), _read(after)
    if old_info.record_config.has_sources != new_info.record_config.has_sources:
        # What only the later format stores is not a difference in the data.
        old, new = comparable_sources(old), comparable_sources(new)
    old_ids, new_ids = old["example_id"], new["example_id"]
    at = pc.index_in(new_ids, value_set=old_ids)
    both, theirs = new.filter(pc.is_valid(at)), old.take(pc.drop_null(at))
    is_removed = pc.invert(pc.is_in(old_ids, value_set=new_ids))
    changed = dict[str, list[bool]]()
    ours, others = (dict(zip(table.column_names, table.columns, strict=True)) for table in (both, theirs))
    for column in ours | others:
        is_in_one = column not in ours or column not in others
        if column in _PLACES or (is_in_one and column in _OF_FEATURES):
            continue
        missing = pa.nulls(len(both))
        now, then = (cells.get(column, missing).to_pylist() for cells in (ours, others))
        differs = [a != b for a, b in zip(now, then, strict=True)]
        kind = _kind_of(column)
        known = changed.get(kind, [False] * len(differs))
        changed[kind] = [a or b for a, b in zip(known, differs, strict=True)]
    return Difference(
        before,
        after,
        len(old),
        len(new),
        added=tuple(new_ids.filter(pc.is_null(at)).to_pylist()),
        removed=tuple(old_ids.filter(is_removed).to_pylist()),
        changed={
            kind: tuple(both["example_id"].filter(pa.array(differs)).to_pylist())
            for kind, differs in changed.items()
            if any(differs)
        },
        config=_config_differences(old_info, new_info),
    )


def _read(output: str) -> tuple[DatasetInfo, pa.Table]:
    info = read_info(output)
    tables = []
    for split, _, table in read_indexes(output, info):
        # No build keeps an extra column of this name, but another program may.
        names = ["manifest_split" if name == "split" else name for name in table.column_names]
        splits = pa.array([split] * table.num_rows, pa.string())
        tables.append(table.rename_columns(names).append_column("split", splits))
    joined = pa.concat_tables(tables, promote_options="default").combine_chunks()
    return info, joined.replace_schema_metadata()


def _kind_of(column: str) -> str:
    if column in _SOURCE:
        return "source"
    if column in _PRINTED:
        return f"manifest_{column}"
    return column if column in (*_PERSON, "label", "frame") or column not in OWN_NAMES else "voxels"


def _config_differences(before: DatasetInfo, after: DatasetInfo) -> dict[str, tuple[Any, Any]]:
    one, other = (content_options(info.config) | {"labels": info.label_facts()} for info in (before, after))
    return {
        name: (one.get(name), other.get(name))
        for name in sorted((one.keys() | other.keys()) - DERIVED)
        if one.get(name) != other.get(name)
    }


def diff_as_json(diff: Difference) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        **vars(diff),
        "changed": dict(diff.changed),
        "config": {name: {"before": was, "after": now} for name, (was, now) in diff.config.items()},
    }


def _lines(diff: Difference) -> Iterator[tuple[str, str]]:
    yield "before", f"{counted(diff.num_before, 'example')}: {diff.before}"
    yield "after", f"{counted(diff.num_after, 'example')}: {diff.after}"
    for name, ids in (("added", diff.added), ("removed", diff.removed), *diff.changed.items()):
        if ids:
            yield name, f"{len(ids):,}: {first_few(ids, _SHOWN)}"
    for number, line in enumerate(_config_lines(diff.config)):
        yield "" if number else "config", line
    if diff.is_empty:
        yield "the same", "no example was added, removed or changed"


def _config_lines(config: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for name, (was, now) in config.items():
        if name == "labels":
            for label in dict.fromkeys([*was, *now]):
                before, after = (_label_text(labels.get(label)) for labels in (was, now))
                if before != after:
                    yield f"label {label!r} was {before}, now {after}"
        else:
            before, after = (NOT_GIVEN if value is None else value_text(value) for value in (was, now))
            yield f"{name.replace('_', '-')} was {before}, now {after}"


def _label_text(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "absent"
    return f"{facts['kind']} ({name_classes(facts['classes'])})" if "classes" in facts else facts["kind"]
