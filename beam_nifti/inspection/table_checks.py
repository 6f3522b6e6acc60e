"""Checks of the tables of a dataset: dataset_info.json, indexes, the list of failures, the manifest.

Every check yields one sentence per problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import RecordConfig
from beam_nifti.manifest.labels import comparable
from beam_nifti.manifest.manifest import Manifest, frame_id
from beam_nifti.pipeline.failures import listed_cells
from beam_nifti.record.dataset_files import FILE_NAME
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.record.example import label_feature
from beam_nifti.record.index import extra_column, record_name, schema_of
from beam_nifti.record.index_checks import check_table
from beam_nifti.storage.paths import temporary_of
from beam_nifti.support.wording import counted

ANEW: Final = "give the manifest that it was built from, or run the build again with --overwrite"
"""The remedy if a manifest is not that of a dataset."""
_CELL: Final = "manifest/"  # prefix of extra columns, whose names may be those of labels
_SHOWN: Final = 3  # examples to name in a problem


def check_info(info: DatasetInfo) -> Iterator[str]:
    """Find where dataset_info.json contradicts itself."""
    said, record = info.config["fingerprint"], info.record_config
    expected = record.fingerprint
    if said not in (expected, *record.earlier_fingerprints):
        yield f"{FILE_NAME}: the fingerprint is {said}, but its options give {expected}"
    if (info.failures is None) != (info.num_failures == 0):
        yield f"{FILE_NAME}: num_failures is {info.num_failures}, but failures is {info.failures}"
    num_rows, num_frames = info.manifest.get("num_rows"), info.num_frames
    wanted = ((num_rows or 0) - info.num_skipped) * (num_frames or 1)
    most, found = wanted, info.num_examples + info.num_failures
    if record.max_frames is not None:  # of which images may have fewer
        wanted //= num_frames or 1
    if not wanted <= found <= most:
        up_to = "up to " if record.max_frames is not None else ""
        of_frames = f" of {up_to}{num_frames} frames" if num_frames else ""
        skipped = f", {info.num_skipped} without a {info.columns.lacking}" if info.num_skipped else ""
        yield (
            f"{FILE_NAME}: {counted(info.num_examples, 'example')} and "
            f"{counted(info.num_failures, 'failure')} do not make the manifest's "
            f"{counted(num_rows or 0, 'row')}{of_frames}{skipped}"
        )


def check_mask_labels(found: Collection[int], info: DatasetInfo) -> Iterator[str]:
    """Find where the labels in dataset_info.json are not those of the indexes."""
    if info.mask_labels is not None and set(info.mask_labels) != set(found):
        yield f"{FILE_NAME}: mask_labels are {list(info.mask_labels)}, but the indexes have {sorted(found)}"


def check_index(
    table: pa.Table,
    facts: Mapping[str, str],
    shard: ShardInfo,
    record: RecordConfig,
    *,
    is_sparse: bool = False,
    may_lack_masks: bool = False,
) -> Iterator[str]:
    """Find what makes an index unusable: its columns, or the shard that it describes."""
    labels = [label.name for label in record.labels or ()]
    names = schema_of(record, labels).names
    yield from check_table(table, names, record, is_sparse=is_sparse, may_lack_masks=may_lack_masks)
    if facts.get("sha256") != shard.sha256:
        yield (f"written for a file of sha256 {facts.get('sha256')}, but {FILE_NAME} gives {shard.sha256}")


def check_columns(shards: Sequence[ShardInfo], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    """Find indexes that have other columns than the first; `columns` are those of each, none if unusable."""
    known = [(shard.index, names) for shard, names in zip(shards, columns, strict=True) if names]
    for index, names in known[1:]:
        if names != known[0][1]:
            yield f"{index}: has other columns than {known[0][0]}; copy both again"


def check_people(table: pa.Table) -> Iterator[str]:
    """Find records of a sound index whose ids do not consist of their participant, session and frame."""
    people, sessions = table["participant_id"], table["session_id"]
    both = pc.binary_join_element_wise(people, sessions, "_")
    ids = pc.if_else(pc.equal(sessions, ""), people, both)
    if "frame" in table.column_names:
        frames = pc.utf8_lpad(table["frame"].cast(pa.string()), 4, "0")
        ids = pc.binary_join_element_wise(ids, frames, frame_id("", 0).removesuffix("0000"))
    wrong = np.flatnonzero(pc.not_equal(ids, table["example_id"]).to_numpy(zero_copy_only=False))
    if wrong.size:
        at = int(wrong[0])
        person = f"participant {people[at].as_py()!r}, session {sessions[at].as_py()!r}"
        yield f"{record_name(at, table)} is of {person}, whose id is {ids[at].as_py()!r}"


def check_numbers(numbers: npt.NDArray[np.int64], num_rows: int, *, are_unique: bool) -> Iterator[str]:
    """Find rows that the manifest does not have, or, if `are_unique`, that are in the indexes twice."""
    wrong = numbers[(numbers < 1) | (numbers > num_rows)]
    if wrong.size:
        yield f"index: row {wrong[0]} is not one of the manifest's {num_rows}"
    found, counts = np.unique(numbers, return_counts=True)
    twice = found[counts > 1]
    if are_unique and twice.size:
        yield f"index: row {twice[0]} occurs more than once"


def check_places(table: pa.Table, file_bytes: int) -> Iterator[str]:
    """Find where the rows of a sound index, which is not empty, do not tile the shard's file."""
    offsets, lengths = table["offset"].to_numpy(), table["length"].to_numpy()
    ends = np.concatenate([[0], np.cumsum(lengths)])
    wrong = np.flatnonzero((offsets != ends[:-1]) | (lengths <= 0))
    if wrong.size:
        at = int(wrong[0])
        yield (
            f"its rows do not tile the shard: {record_name(at, table)} has {lengths[at]} bytes at offset "
            f"{offsets[at]}, but the one before it ends at {ends[at]}"
        )
    elif ends[-1] != file_bytes:
        yield f"its rows end at byte {ends[-1]}, but the shard's file ends at {file_bytes}"
    steps = np.flatnonzero(np.diff(table["position"].to_numpy()) <= 0)
    if steps.size:
        yield f"its positions do not ascend at {record_name(int(steps[0]) + 1, table)}"


def check_positions(
    shards: Sequence[ShardInfo], positions: Sequence[tuple[int, int] | None], cut: Sequence[range]
) -> Iterator[str]:
    """Find where a split is not cut into shards as its rows and config.sharding require.

    Args:
        shards: of the split.
        positions: of the first and last record of each, by a sound index.
        cut: positions that each should have.
    """
    if len(shards) != len(cut):
        yield f"{FILE_NAME}: there are {len(shards)} shards like {shards[0].name}, expected {len(cut)}"
        return
    for shard, found, expected in zip(shards, positions, cut, strict=True):
        if found is not None and not (found[0] in expected and found[1] in expected):
            wanted = f"{expected.start} to {expected.stop - 1}"
            yield f"{shard.index}: its positions are {found[0]} to {found[1]}, expected some of {wanted}"


def no_rows(record: RecordConfig, cells: Sequence[str] = ()) -> pa.Table:
    """An empty table of ids, labels, splits and these columns of a manifest."""
    labels = {
        label_feature(c.name): pa.float64() if c.kind == "float" else pa.string() for c in record.labels or ()
    }
    labels = labels or {"label": pa.float64()}
    texts = {_CELL + name: pa.string() for name in cells}
    return pa.schema({"id": pa.string(), **labels, "split": pa.string(), **texts}).empty_table()


def index_rows(table: pa.Table, split: str, record: RecordConfig, cells: Mapping[str, str]) -> pa.Table:
    """Id, labels, split and cells of the records of a shard, from its sound index."""
    columns = [comparable(table[extra_column(c.name)], c) for c in record.labels or ()]
    columns = columns or [table["label"]]
    splits = pa.array([split] * table.num_rows, pa.string())
    texts = [pc.fill_null(table[name], "") for name in cells.values()]
    schema = no_rows(record, [*cells]).schema
    return pa.table([table["example_id"], *columns, splits, *texts], schema=schema)


def manifest_rows(manifest: Manifest, record: RecordConfig, cells: Sequence[str] = ()) -> pa.Table:
    """Id, labels, split and cells of the rows of a manifest, without those that are skipped."""
    return _rows_with(manifest, record, {name: pc.fill_null(manifest.table[name], "") for name in cells})


def _rows_with(manifest: Manifest, record: RecordConfig, texts: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    numbers = manifest.numbers
    columns = [comparable(manifest.table[c.name], c) for c in record.labels or ()]
    if numbers is None:
        columns = [pa.nulls(len(manifest), pa.float64())]
    elif not columns:
        columns = [pa.array(numbers, from_pandas=True)]  # null where there is none, as in the index
    schema = no_rows(record, [*texts]).schema
    rows = pa.table([manifest.ids, *columns, manifest.splits, *texts.values()], schema=schema)
    return rows.filter(rows["split"].is_valid())


def failure_rows(
    listed: Manifest, record: RecordConfig, cells: Sequence[str], manifest: Manifest | None, folder: str
) -> pa.Table:
    """As `manifest_rows`, of failed rows; cells that their list does not hold unchanged are null."""
    unknown = pa.nulls(len(listed), pa.string())
    known = {name: listed_cells(listed, name, manifest, folder) for name in cells if manifest is not None}
    return _rows_with(listed, record, {n: unknown if c is None else c for n, c in known.items()})


def frame_rows(rows: pa.Table, frames: Sequence[Sequence[int]]) -> pa.Table:
    """A row for each of these frames of each image: id, labels and split of its record."""
    counts = [len(numbers) for numbers in frames]
    repeated = rows.take(pa.array(np.repeat(np.arange(len(counts)), counts)))
    ids = map(frame_id, repeated["id"].to_pylist(), itertools.chain.from_iterable(frames))
    return repeated.set_column(0, "id", pa.array(ids, pa.string()))


def relative_ids(rows: pa.Table, folder: str) -> pa.Table:
    """The same rows without the folder in ids that are paths in it."""
    ids, prefix = rows["id"], f"{folder}/"
    cut = pc.utf8_slice_codeunits(ids, len(prefix))
    return rows.set_column(0, "id", pc.if_else(pc.starts_with(ids, prefix), cut, ids))


def check_rows(records: pa.Table, failures: pa.Table, failures_file: str | None) -> Iterator[str]:
    """Find ids that occur twice in the dataset, or both in it and in its file of failures."""
    counts = pa.Table.from_struct_array(pc.value_counts(records["id"].combine_chunks()))
    twice = counts.filter(pc.greater(counts["counts"], 1)).rename_columns(["id", "times"])
    if twice.num_rows:
        yield f"index: {counted(twice.num_rows, 'id', 'occur')} more than once: {_named(twice, ['times'])}"
    both = failures.filter(_is_in(failures, records))
    if both.num_rows:
        found = counted(both.num_rows, "example", "are")
        yield f"{failures_file}: {found} also in the shards: {_named(both)}"


def compare_rows(known: pa.Table, wanted: pa.Table) -> Iterator[str]:
    """Find where the rows of a dataset and of a manifest differ."""
    at = pc.index_in(known["id"], value_set=wanted["id"].combine_chunks())
    surplus = known.filter(pc.is_null(at))
    if surplus.num_rows:
        named = _named(surplus)
        yield f"{counted(surplus.num_rows, 'example', 'are')} not in the manifest: {named}; {ANEW}"
    missing = wanted.filter(pc.invert(_is_in(wanted, known)))
    if missing.num_rows:
        yield (
            f"{counted(missing.num_rows, 'manifest row', 'are')} neither in the shards nor in "
            f"the list of failures: {_named(missing)}; run the build again, which adds new rows"
        )
    both, theirs = known.filter(pc.is_valid(at)), wanted.take(pc.drop_null(at))
    for column in known.column_names[1:]:
        was, now = both[column], theirs[column]
        equal = pc.fill_null(pc.equal(was, now), False)
        none = pc.is_null(was)
        if not column.startswith(_CELL):  # of which a list of failures may lack some
            none = pc.and_(none, pc.is_null(now))
        compared = pa.table([both["id"], was, now], ["id", column, "now"])
        different = compared.filter(pc.invert(pc.or_(equal, none)))
        if different.num_rows:
            name = column.removeprefix(_CELL)
            yield (
                f"{counted(different.num_rows, 'example', 'have')} another {name} in the manifest "
                f"(dataset's, manifest's): {_named(different, [column, 'now'])}; {ANEW}"
            )


def _is_in(rows: pa.Table, others: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(rows["id"], value_set=others["id"].combine_chunks())


def _named(rows: pa.Table, columns: Sequence[str] = ()) -> str:
    """The first few rows: `sub-01 (3.0, 4.0), sub-02 (…), …`."""
    texts = []
    for row in rows.slice(0, _SHOWN).to_pylist():
        values = ", ".join(str(row[c]) for c in columns)
        texts.append(f"{row['id']} ({values})" if columns else row["id"])
    return ", ".join(texts) + (", …" if rows.num_rows > _SHOWN else "")


def find_strays(files: Collection[str], info: DatasetInfo, written: Collection[str]) -> Iterator[str]:
    """Find files in the folder that are neither the dataset's nor an unfinished build's (`written`)."""
    known = {name for shard in info.shards for name in (shard.name, shard.index)}
    for file in files:
        if file not in known and (temporary_of(file) or file) not in written:
            yield f"{file}: not in {FILE_NAME}, but a program that reads all shards reads it too; delete it"


def find_removed(files: Collection[str], info: DatasetInfo) -> Iterator[str]:
    """Find shards that withdrawals say are removed: files that are left, or shards of the same bytes."""
    known, present = (
        {shard.sha256: shard.name for shard in info.shards},
        {shard.name for shard in info.shards},
    )
    for withdrawal in info.withdrawals:
        for shard in withdrawal.shards:
            is_left = shard.name in files and shard.name not in present  # a conversion uses names again
            name = shard.name if is_left else known.get(shard.sha256)
            if name is not None:
                yield (
                    f"{name}: holds records of withdrawn participants, and is not removed; run the same "
                    "`beam-nifti withdraw` again"
                )
