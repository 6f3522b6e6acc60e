"""Removes participants who withdrew their consent from a dataset."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.manifest import Manifest, frame_id
from beam_nifti.manifest.pseudonyms import PATTERN, Pseudonyms, read_pseudonyms
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.manifest.tables import Problems, read_table
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.rewrite import Rewrite
from beam_nifti.pipeline.rewrite_target import end_rewriting, holding, refuse_unknown_files, require_workers
from beam_nifti.record.dataset_files import CROISSANT_FILE, FILE_NAME, read_content
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.record.withdrawals import RemovedShard, Withdrawal, find_withdrawn, hash_person
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.wording import first_few

PEOPLE_COLUMNS: Final = ("example_id", "participant_id", "frame")
"""Columns of an index that tell whose a record is."""

_SHOWN: Final = 20


@dataclass(frozen=True)
class _People:
    """The participants to withdraw, as the dataset writes them, and their rows and images in the manifest.

    Rows that were appended since the dataset was built are not among them.
    """

    names: tuple[str, ...]
    is_theirs: pa.Array
    image_ids: tuple[str, ...]


def people_of(manifest: Manifest) -> pa.Array:
    """The participant of each row as the dataset writes it: the example's id if there are no participants."""
    has_people = "participant_id" in manifest.table.column_names
    return manifest.table["participant_id"].combine_chunks() if has_people else manifest.ids


def people_in(table: pa.Table, info: DatasetInfo) -> pa.ChunkedArray | pa.Array:
    """As `people_of`, of the records of an index with PEOPLE_COLUMNS."""
    if "participant_id" in info.manifest["columns"]:
        return table["participant_id"]
    ids = table["example_id"]
    if "frame" not in table.column_names:
        return ids
    frames = zip(ids.to_pylist(), table["frame"].to_pylist(), strict=True)
    return pa.array([name.removesuffix(frame_id("", frame)) for name, frame in frames], pa.string())


def refuse_withdrawn(manifest: Manifest, published: DatasetInfo) -> None:
    """Refuse rows of participants who were withdrawn from the dataset in the output.

    Raises:
        ManifestError: there are such rows, or participants have other names than in the dataset, whose hashes
            then cannot be compared.
    """
    if not published.withdrawals:
        return
    problems = Problems(manifest.path)
    if _naming_of(manifest.table.column_names, manifest.columns.id, manifest.key_check) != _naming_of(
        published.manifest["columns"], published.config["columns"]["id"], published.manifest.get("key_check")
    ):
        problems.add(
            "participants were withdrawn from the dataset in OUTPUT, and cannot be recognized by other ids; "
            "keep the columns of ids and the key, or choose another OUTPUT and drop their rows"
        )
        problems.stop()
    people = people_of(manifest)
    names = pc.unique(people).to_pylist()
    found = find_withdrawn(names, published.withdrawn, published.withdrawals)
    if not found:
        return
    for at, name in enumerate(people.to_pylist()):
        if name in found:
            named = "" if manifest.key_check else f" ({name})"
            problems.add(f"row {at + 1}{named}: was withdrawn from the dataset in OUTPUT; drop the row")
    problems.stop()


def _naming_of(columns: Sequence[str], id_column: str | None, key_check: str | None) -> tuple[object, ...]:
    """What decides how a dataset names a participant."""
    has_people = "participant_id" in columns
    return has_people, None if has_people else id_column, key_check


def withdraw_people(
    output: str,
    participants: Sequence[str],
    manifest: str,
    *,
    rows: bytes | None = None,
    anonymous_ids: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> DatasetInfo:
    """Remove participants, as `beam_nifti.withdraw`, which documents arguments and errors.

    `rows` is the Parquet file of a manifest in memory.
    """
    if not participants or not all(participants):
        raise UsageError("no participant is named, or one by an empty id; give their ids")
    content, info, pseudonyms = read_rewritable(output, anonymous_ids, workers)
    written = _as_written(info, pseudonyms)
    names = {written(name): name for name in participants}
    gone = find_withdrawn(names, info.withdrawn, info.withdrawals)
    if gone == names.keys():
        with holding(output):
            end_rewriting(output, info)
            refuse_unknown_files(output, info)
        logs.LOGGER.info("%s: these participants were already withdrawn", output)
        return info
    path = storage.absolute(manifest)
    if rows is None and storage.exists(path):
        rows = storage.read(path)
    given = known = _read(path, rows, info, pseudonyms)
    present = people_of(known)
    if was := find_withdrawn(pc.unique(present).to_pylist(), info.withdrawn, info.withdrawals):
        rows = _drop(path, rows, pc.is_in(present, value_set=pa.array([*was], pa.string())))
        path = storage.join(storage.dirname(path), "manifest.parquet")
        known = _read(path, rows, info, pseudonyms)
    num_rows = info.manifest["num_rows"]
    if len(known) < num_rows or known.digest(num_rows) != info.manifest["digest"]:
        raise UsageError(
            f"{given.path}: is not the manifest that {output} was built from; give that one, with the rows "
            "of the participants; rows may have been appended"
        )
    left = {name: text for name, text in names.items() if name not in gone}
    people = _find(known, left, num_rows, output)
    rest = _without(path, rows, people, info, pseudonyms)
    rewrite = Rewrite(output, content, info, rest)
    with rewrite.opened(overwrite=overwrite, is_strict=True):
        finish = _stated(rewrite, people)
        made = rewrite.run(finish, current_progress(), workers)
    _tell(given, people, output)
    return made


def read_rewritable(
    output: str, anonymous_ids: str | None, workers: int
) -> tuple[bytes, DatasetInfo, Pseudonyms | None]:
    """The dataset to rewrite: its dataset_info.json, as bytes too, and its pseudonyms.

    Raises:
        UsageError: `workers` or the key is not one that the rewriting can use.
        DatasetError: there is no complete dataset, or it cannot be rewritten.
    """
    require_workers(workers)
    content = read_content(output)
    info = DatasetInfo.from_json(content, storage.join(output, FILE_NAME))
    Rewrite.require_rewritable(output, info)
    return content, info, _pseudonyms_of(output, info, anonymous_ids)


def _pseudonyms_of(output: str, info: DatasetInfo, key: str | None) -> Pseudonyms | None:
    """The pseudonyms of a dataset with anonymous ids, by the file of their key.

    Raises:
        UsageError: the key is missing, another one, or not needed.
    """
    check = info.manifest.get("key_check")
    if check is None and key is not None:
        raise UsageError(f"{output}: its ids are not anonymous; drop --anonymous-ids")
    if check is not None and key is None:
        raise UsageError(f"{output}: its ids are anonymous; give the file of their key with --anonymous-ids")
    pseudonyms = read_pseudonyms(key) if key else None
    if pseudonyms and pseudonyms.check != check:
        raise UsageError(f"{key}: not the key that {output} was built with; give that key")
    return pseudonyms


def _as_written(info: DatasetInfo, pseudonyms: Pseudonyms | None) -> Callable[[str], str]:
    """How a dataset writes a participant, whose id or pseudonym is given."""
    if pseudonyms is None:
        return str
    has_people, columns = "participant_id" in info.manifest["columns"], info.config["columns"]

    def written(name: str) -> str:
        if re.fullmatch(PATTERN, name):
            return name
        if not has_people and columns["id"] is None:
            return pseudonyms.of_path(name)
        return pseudonyms.of(name, "participant_id" if has_people else "id")

    return written


def _find(manifest: Manifest, names: Mapping[str, str], num_rows: int, output: str) -> _People:
    """Participants and their rows among the first `num_rows`, of which the dataset was built.

    `names` has the text that was given for each name in the dataset.
    """
    people = people_of(manifest).slice(0, num_rows)
    present = set(pc.unique(people).to_pylist())
    if unknown := [text for name, text in names.items() if name not in present]:
        what = "participant" if "participant_id" in manifest.table.column_names else "example"
        raise UsageError(
            f"{output}: has no {what} {first_few(unknown, _SHOWN)}; give ids exactly as in {manifest.path}"
        )
    is_theirs = pc.is_in(people, value_set=pa.array([*names], pa.string()))
    if pc.all(is_theirs).as_py():
        raise UsageError(f"{output}: has no other participants; delete it instead")
    ids = manifest.ids.slice(0, num_rows).filter(is_theirs).to_pylist()
    return _People(tuple(names), is_theirs, tuple(ids))


def _without(
    path: str, rows: bytes | None, people: _People, info: DatasetInfo, pseudonyms: Pseudonyms | None
) -> Manifest:
    """The manifest that the dataset was built from, without the rows of the participants."""
    beside = storage.join(storage.dirname(path), "manifest.parquet")
    try:
        return _read(beside, _drop(path, rows, people.is_theirs), info, pseudonyms)
    except ManifestError as e:
        raise ManifestError(path, e.problems, "not usable without the participants") from e


def _read(path: str, rows: bytes | None, info: DatasetInfo, pseudonyms: Pseudonyms | None) -> Manifest:
    return read_manifest(path, info.columns, info.splitting, pseudonyms, content=rows, options=())


def _drop(path: str, rows: bytes | None, is_dropped: pa.BooleanArray) -> bytes:
    """As many rows of a manifest as `is_dropped` has, without those that it marks, as a Parquet file."""
    sink = io.BytesIO()
    table = read_table(path, content=rows).slice(0, len(is_dropped)).filter(pc.invert(is_dropped))
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def _stated(rewrite: Rewrite, people: _People) -> DatasetInfo:
    """The dataset to make, with the statement on what is removed."""
    info, output = rewrite.info, rewrite.output
    shards, num_examples = list[RemovedShard](), 0
    for shard in info.shards:
        ids = people_in(read_shard_index(output, info, shard, PEOPLE_COLUMNS), info)
        count = int(pc.sum(pc.is_in(ids, value_set=pa.array(people.names, pa.string()))).as_py() or 0)
        if count:
            shards.append(RemovedShard(shard.name, shard.sha256))
            num_examples += count
    facts = rewrite.facts
    statement = Withdrawal(
        revision=facts.revision,
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        num_people=len(people.names),
        num_rows=len(people.image_ids),
        num_examples=num_examples,
        num_failures=rewrite.count_failures(people.image_ids),
        info_sha256=hashlib.sha256(rewrite.content).hexdigest(),
        shards=tuple(shards),
    )
    withdrawals = (*info.withdrawals, statement)
    hashes = sorted(hash_person(name, withdrawals) for name in people.names)
    return replace(facts, withdrawn=(*info.withdrawn, *hashes), withdrawals=withdrawals)


def _tell(manifest: Manifest, people: _People, output: str) -> None:
    """Say what is left to do."""
    theirs = {*people.names}
    rows = [at + 1 for at, name in enumerate(people_of(manifest).to_pylist()) if name in theirs]
    logs.LOGGER.warning(
        "%s: drop %s %s; builds into %s refuse %s",
        manifest.path,
        "row" if len(rows) == 1 else "rows",
        first_few(rows, _SHOWN),
        output,
        "it" if len(rows) == 1 else "them",
    )
    if storage.exists(storage.join(output, CROISSANT_FILE)):
        logs.LOGGER.warning("%s describes the dataset as it was: run beam-nifti card again", CROISSANT_FILE)
