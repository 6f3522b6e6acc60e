"""Removes participants from a dataset whose consent was withdrawn."""

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
from beam_nifti.manifest.pseudonyms import PATTERN, Pseudonyms
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.manifest.tables import Problems, read_table
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.rewrite import Rewrite, options_of, pseudonyms_of
from beam_nifti.pipeline.rewrite_target import end_rewriting, holding, refuse_unknown_files
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
    """The participants to withdraw, as the dataset writes them, and their rows in the manifest."""

    names: tuple[str, ...]
    is_theirs: pa.Array


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
        ManifestError: there are such rows.
    """
    if not published.withdrawals:
        return
    people = people_of(manifest)
    names = pc.unique(people).to_pylist()
    found = find_withdrawn(names, published.withdrawn, published.withdrawals)
    if not found:
        return
    problems = Problems(manifest.path)
    for at, name in enumerate(people.to_pylist()):
        if name in found:
            named = "" if manifest.key_check else f" ({name})"
            problems.add(f"row {at + 1}{named}: was withdrawn from the dataset in OUTPUT; drop the row")
    problems.stop()


def withdraw_people(
    output: str,
    participants: Sequence[str],
    manifest: str,
    *,
    rows: bytes | None = None,
    anonymous_ids: str | None = None,
    overwrite: bool = False,
) -> DatasetInfo:
    """Remove participants, as `beam_nifti.withdraw`, which documents arguments and errors.

    `rows` is the Parquet file of a manifest in memory.
    """
    if not participants or not all(participants):
        raise UsageError("no participant is named, or one by an empty id; give their ids")
    content = read_content(output)
    info = DatasetInfo.from_json(content, storage.join(output, FILE_NAME))
    Rewrite.require_rewritable(output, info)
    pseudonyms = pseudonyms_of(output, info, anonymous_ids)
    written = _as_written(info, pseudonyms)
    names = {written(name): name for name in participants}
    gone = find_withdrawn(names, info.withdrawn, info.withdrawals)
    if gone == names.keys():
        with holding(output):
            end_rewriting(output, info)
            refuse_unknown_files(output, info)
        logs.LOGGER.info("%s: without these participants already", output)
        return info
    path = storage.absolute(manifest)
    columns, splitting = options_of(info)
    if rows is None and storage.exists(path):
        rows = storage.read(path)
    known = read_manifest(path, columns, splitting, pseudonyms, content=rows, is_of_dataset=True)
    if known.digest() != info.manifest["digest"]:
        raise UsageError(
            f"{path}: is not the manifest that {output} was built from; give that one, which still has the "
            "rows of the participants"
        )
    people = _find(known, {name: text for name, text in names.items() if name not in gone})
    rest = _without(path, rows, people, info, pseudonyms)
    rewrite = Rewrite(output, content, info, rest)
    with rewrite.opened(overwrite=overwrite, is_strict=True):
        finish = _stated(rewrite, people)
        made = rewrite.run(finish, current_progress())
    _tell(path, people, output, made)
    return made


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


def _find(manifest: Manifest, names: Mapping[str, str]) -> _People:
    """Participants and their rows; `names` has the text that was given for each name in the dataset."""
    people = people_of(manifest)
    present = set(pc.unique(people).to_pylist())
    if unknown := [text for name, text in names.items() if name not in present]:
        what = "participant" if "participant_id" in manifest.table.column_names else "example"
        raise UsageError(
            f"{manifest.path}: has no {what} {first_few(unknown, _SHOWN)}; give ids exactly as they are there"
        )
    is_theirs = pc.is_in(people, value_set=pa.array([*names], pa.string()))
    if pc.all(is_theirs).as_py():
        raise UsageError(f"{manifest.path}: has no other participants; delete the dataset instead")
    return _People(tuple(names), is_theirs)


def _without(
    path: str, rows: bytes | None, people: _People, info: DatasetInfo, pseudonyms: Pseudonyms | None
) -> Manifest:
    """The manifest without the rows of the participants."""
    columns, splitting = options_of(info)
    table = read_table(path, content=rows).filter(pc.invert(people.is_theirs))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    beside = storage.join(storage.dirname(path), "manifest.parquet")
    try:
        return read_manifest(
            beside, columns, splitting, pseudonyms, content=sink.getvalue(), is_of_dataset=True
        )
    except ManifestError as e:
        raise ManifestError(path, e.problems, "not usable without the participants") from e


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
    num_rows = int(pc.sum(people.is_theirs).as_py())
    facts = rewrite.facts
    num_volumes = info.num_examples + info.num_failures
    num_left = rewrite.plan.num_examples
    statement = Withdrawal(
        revision=facts.revision,
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        num_people=len(people.names),
        num_rows=num_rows,
        num_examples=num_examples,
        num_failures=num_volumes - num_left - num_examples,
        info_sha256=hashlib.sha256(rewrite.content).hexdigest(),
        shards=tuple(shards),
    )
    withdrawals = (*info.withdrawals, statement)
    hashes = sorted(hash_person(name, withdrawals) for name in people.names)
    return replace(facts, withdrawn=(*info.withdrawn, *hashes), withdrawals=withdrawals)


def _tell(path: str, people: _People, output: str, info: DatasetInfo) -> None:
    """Say what is left to do."""
    rows = [at + 1 for at, is_theirs in enumerate(people.is_theirs.to_pylist()) if is_theirs]
    logs.LOGGER.warning(
        "%s: drop %s %s; builds of %s refuse %s",
        path,
        "row" if len(rows) == 1 else "rows",
        first_few(rows, _SHOWN),
        output,
        "it" if len(rows) == 1 else "them",
    )
    if storage.exists(storage.join(output, CROISSANT_FILE)):
        logs.LOGGER.warning("%s describes the dataset as it was: run beam-nifti card again", CROISSANT_FILE)
