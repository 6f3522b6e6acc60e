"""What a conversion writes: the records of another dataset, in the current format.

Shards, their records and the order of these stay. Records are cut into members, whose lengths are in the
index. One thread writes a shard from front to back, so there are no part files: after an interruption,
finished shards are kept, and the others are written again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO, Final

import pyarrow as pa

from beam_nifti.config import FORMAT_FEATURES, FORMAT_VERSION, RecordConfig
from beam_nifti.errors import DatasetError, OutputBusyError, OutputError, ShardError, UsageError
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.failures import check_failures
from beam_nifti.pipeline.merge import describe_shard
from beam_nifti.pipeline.parts import BUILD_FOLDER, RecordFile, file_facts, is_intact, shard_at
from beam_nifti.pipeline.publish import (
    clean_up,
    find_info,
    publish_info,
    refuse_foreign,
    remove_files,
    require_writable_output,
)
from beam_nifti.pipeline.saved_plan import SAVED_FILES, SavedPlan, SavedWrite
from beam_nifti.record.dataset_files import FAILURES_FILE, FILE_NAME, read_content, read_failures_list
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo, SplitInfo
from beam_nifti.record.example import MASK_FEATURE, decode_example, decode_tensor, scaling_of
from beam_nifti.record.index import Limits, read_bytes, scaling_cells, schema_of, write_index
from beam_nifti.record.index_checks import check_members
from beam_nifti.record.shard_index import read_sound_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tfrecord import EMPTY_MEMBER
from beam_nifti.record.tiles import encode_record
from beam_nifti.record.versions import (
    Versions,
    all_versions,
    is_written_here,
    record_versions,
    versions_fact,
)
from beam_nifti.storage import paths as storage
from beam_nifti.volume.label_map import positions_of

CONVERTED_FACT: Final = "converted_from"
"""Key, in the metadata of an index, of the sha256 of the dataset_info.json that was converted."""

_BATCH_ROWS: Final = 1024


@dataclass(frozen=True)
class Conversion:
    """The conversion of a dataset.

    Attributes:
        old: folder of the dataset.
        output: folder of the converted one.
        source: the dataset.
        digest: sha256 of its dataset_info.json, in hex.
        failures: content of its list of failures; None if it has none.
    """

    old: str
    output: str
    source: DatasetInfo
    digest: str
    failures: bytes | None

    @classmethod
    def of(cls, old: str, output: str) -> Conversion:
        """The conversion of the dataset in a folder.

        Args:
            old: absolute path or URL of the dataset.
            output: absolute path or URL of the converted one.

        Raises:
            DatasetError: there is no complete dataset.
            UsageError: it has the current format, or one folder is in the other.
        """
        content = read_content(old)
        source = DatasetInfo.from_json(content, storage.join(old, FILE_NAME))
        if any(storage.is_within(storage.join(a, FILE_NAME), b) for a, b in ((old, output), (output, old))):
            raise UsageError(
                f"OUTPUT is {output}, and the dataset is in {old}; choose a folder outside the dataset that "
                "does not contain it"
            )
        conversion = cls(old, output, source, hashlib.sha256(content).hexdigest(), _failures_of(old, source))
        if {*source.format_features} >= {*conversion.config.format_features}:
            raise UsageError(f"{old}: already has the current format; there is nothing to convert")
        return conversion

    @cached_property
    def config(self) -> RecordConfig:
        """Configuration of the converted records."""
        known = self.source.format_features
        # Images are not read, so what their files were remains unknown.
        features = tuple(name for name in FORMAT_FEATURES if name != "sources" or name in known)
        return replace(self.source.record_config, format_version=FORMAT_VERSION, format_features=features)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the converted dataset."""
        was, now = (
            (record.fingerprint, *record.earlier_fingerprints)
            for record in (self.source.record_config, self.config)
        )
        said = self.source.config["fingerprint"]
        if said not in was:
            raise DatasetError(
                f"{self.old}: the fingerprint is {said}, that of its options is {was[0]}; run beam-nifti "
                "verify"
            )
        return now[was.index(said)]

    @property
    def token(self) -> str:
        """16 hex digits that identify the conversion."""
        return self.digest[:16]

    @staticmethod
    def name_of(shard: ShardInfo) -> ShardName:
        """Name of the converted shard."""
        name = ShardName.parse(shard.name)
        assert name is not None
        return replace(name, revision=0)

    def refuse_rebuilt(self) -> None:
        """Discard what is not published if the dataset has been replaced meanwhile.

        Raises:
            OutputBusyError: it has been.
        """
        try:
            is_same = hashlib.sha256(read_content(self.old)).hexdigest() == self.digest
        except DatasetError:
            is_same = False
        if not is_same:
            if find_info(self.output) is None:
                saved = SavedWrite.read(self.output)
                remove_files(self.output, saved.written if saved else (), keep=())
                SavedPlan.remove(self.output)
            raise OutputBusyError(
                f"{self.old}: was rebuilt while it was converted; run the same command again"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[dict[str, ShardInfo]]:
        """Prepare the output, to which nothing else can write during the block; the finished shards, by name.

        Raises:
            OutputError: it holds something else than this conversion, or cannot be written.
            OutputBusyError: another build is writing there.
        """
        output = self.output
        storage.refuse_unwritable(output, "OUTPUT")
        if not storage.is_remote(output):
            require_writable_output(output)
        with lock.hold(output):
            published, saved = find_info(output), SavedWrite.read(output)
            kept = {
                shard.name: found
                for shard in self.source.shards
                if (found := self._find(shard, any_versions=published is not None))
            }
            self._refuse_other(published, saved, kept)
            if published is None and saved is None:
                files = [str(self.name_of(shard)) for shard in self.source.shards]
                files += [FAILURES_FILE] if self.failures is not None else []
                SavedWrite(self.token, BUILD_FOLDER, 1, shards=tuple(files)).write(output)
            yield kept

    def _refuse_other(
        self, published: DatasetInfo | None, saved: SavedWrite | None, kept: Mapping[str, ShardInfo]
    ) -> None:
        output = self.output
        if published is not None:
            is_same = len(kept) == len(self.source.shards) and published == replace(
                self.describe(kept), versions=published.versions
            )
            if not is_same:
                if damaged := self._find_damaged(published):
                    raise OutputError(
                        f"{output}: {damaged} is missing or damaged; convert {self.old} again, and choose "
                        "another OUTPUT, or delete this one first"
                    )
                raise OutputError(
                    f"{output}: holds a dataset that was not converted from {self.old}; choose another OUTPUT"
                )
            return
        is_other = saved is not None and saved.token != self.token
        if is_other or SavedPlan.read(output) or storage.list_folders(storage.join(output, BUILD_FOLDER)):
            raise OutputError(
                f"{output}: holds an unfinished build, or a conversion of another dataset, or of {self.old} "
                "before it changed; choose another OUTPUT, or delete this one"
            )
        if saved is None:
            refuse_foreign(output, overwrite=None)

    def _find_damaged(self, published: DatasetInfo) -> str | None:
        """The first file of the published dataset that is not as it was, if that was this conversion."""
        names = [(str(self.name_of(shard)), shard.num_examples) for shard in self.source.shards]
        is_same = replace(published, splits={}, versions={}) == replace(self._facts, splits={}, versions={})
        if not is_same or names != [(shard.name, shard.num_examples) for shard in published.shards]:
            return None
        for shard in published.shards:
            name, limits = shard.name, Limits(shard.num_examples, shard.num_bytes)
            try:
                facts = file_facts(storage.join(self.output, name), self.output)
                if is_sound := facts == {"sha256": shard.sha256, "num_bytes": str(shard.num_bytes)}:
                    name = shard.index
                    index = read_bytes(storage.join(self.output, name), limits, self.output)
                    is_sound = hashlib.sha256(index).hexdigest() == shard.index_sha256
            except (FileNotFoundError, ShardError):
                is_sound = False
            if not is_sound:
                return name
        return None

    def _find(self, shard: ShardInfo, *, any_versions: bool) -> ShardInfo | None:
        """The converted shard, if it is finished."""
        name = self.name_of(shard)
        try:
            part = shard_at(self.output, name)
            limits = Limits.of_data(part.data, self.output)
            table, facts = read_sound_index(part.index, self._facts, limits, self.output)
            is_usable = not [*check_members(table)] and (any_versions or is_written_here(facts))
            is_same = self._making.items() <= facts.items() and table.num_rows == shard.num_examples
            if not (is_same and is_usable and "sha256" in facts and is_intact(part, facts)):
                return None
        except (FileNotFoundError, ShardError):
            return None
        return describe_shard(self.output, name, shard.num_examples, facts)

    @property
    def _making(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint, CONVERTED_FACT: self.digest}

    @contextlib.contextmanager
    def writing(self, shard: ShardInfo, columns: Sequence[str]) -> Iterator[ShardWriter]:
        """Write a shard, which appears at the end of the block; `columns` are those of its old index."""
        name = self.name_of(shard)
        # An index that was not kept does not describe the file to come.
        storage.delete(storage.join(self.output, name.index_file), self.output)
        path = storage.join(self.output, str(name))
        known = schema_of(self.source.record_config).names
        schema = schema_of(self.config)
        for extra in (column for column in columns if column not in known):
            schema = schema.append(pa.field(extra, pa.string()))
        with storage.create(path, self.output) as handle:
            writer = ShardWriter(handle, self.config, schema)
            yield writer
            writer.end()

    def finish(self, shard: ShardInfo, writer: ShardWriter, earlier: Iterable[Versions]) -> ShardInfo:
        """Write the index of a shard that is written; `earlier` are the versions in its old index."""
        # A dataset from before shards had versions has those of its last build.
        said = {k: v for k, v in self.source.versions.items() if k in record_versions()}
        facts = {**self._making, **versions_fact(v or said for v in earlier), **writer.file.facts}
        name = self.name_of(shard)
        write_index(storage.join(self.output, name.index_file), writer.table, facts, self.output)
        return describe_shard(self.output, name, shard.num_examples, facts)

    def describe(self, shards: Mapping[str, ShardInfo]) -> DatasetInfo:
        """The converted dataset, by its shards, which are named as the old ones are."""
        splits = {
            name: SplitInfo(tuple(shards[shard.name] for shard in split.shards))
            for name, split in self.source.splits.items()
        }
        return replace(self._facts, splits=splits)

    @cached_property
    def _facts(self) -> DatasetInfo:
        """The converted dataset without its shards."""
        source, failures = self.source, self.failures
        return replace(
            source,
            config={**source.config, "fingerprint": self.fingerprint},
            splits={},
            failures=None if failures is None else FAILURES_FILE,
            failures_sha256=None if failures is None else hashlib.sha256(failures).hexdigest(),
            revision=max([1, *(withdrawal.revision for withdrawal in source.withdrawals)]),
            versions=all_versions(),
            format_version=self.config.format_version,
            format_features=self.config.format_features,
        )

    def publish(self, shards: Mapping[str, ShardInfo]) -> DatasetInfo:
        """Write dataset_info.json, unless it is there, and remove what only the conversion needed."""
        output = self.output
        lock.require_held(output)
        info = find_info(output)
        if info is None:
            if self.failures is not None:
                storage.write(storage.join(output, FAILURES_FILE), self.failures, output)
            info = self.describe(shards)
            publish_info(info, output)
        if saved := SavedWrite.read(output):
            clean_up(output, saved, info)
        # A run that was killed here has left it empty, or with a plan that a loss of power has damaged.
        storage.delete(storage.join(output, SAVED_FILES[1]), output)
        storage.delete_folder(storage.join(output, BUILD_FOLDER), output)
        return info


def _failures_of(old: str, source: DatasetInfo) -> bytes | None:
    """The list of failures of a dataset."""
    if source.failures is None:
        return None
    path = storage.join(old, source.failures)
    try:
        content = read_failures_list(old, source.failures, source.num_failures)
    except FileNotFoundError as e:
        raise DatasetError(f"{path}: is missing; copy it again, or run `beam-nifti build` again") from e
    if source.failures_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise DatasetError(f"{path}: is not the file that {FILE_NAME} describes; copy it again")
    check_failures(content, path, source)
    return content


class ShardWriter:
    """Writes the records of one shard.

    Args:
        handle: file of the shard.
        config: configuration of the records.
        schema: schema of the index.

    Attributes:
        file: the file.
    """

    def __init__(self, handle: BinaryIO, config: RecordConfig, schema: pa.Schema) -> None:
        self.file, self._config, self._schema = RecordFile(handle), config, schema
        self._is_compressed = config.compression == "gzip"
        self._rows, self._tables = list[dict[str, Any]](), [schema.empty_table()]

    def write(self, cells: Mapping[str, Any], payload: bytes) -> int:
        """Write the next record, by its row of the old index and its Example; its number of bytes."""
        config = self._config
        level = config.compression_level if self._is_compressed else None
        encoded = encode_record(payload, level)
        offset, length = self.file.write(*encoded.pieces)
        row = {**cells, "offset": offset, "length": length, "member_lengths": encoded.lengths}
        features = decode_example(payload) if config.has_positions or config.voxel_dtype == "native" else {}
        if config.has_positions:
            row["mask_positions"] = positions_of(decode_tensor(features[MASK_FEATURE]))  # type: ignore[arg-type]
        if config.voxel_dtype == "native":
            row |= scaling_cells(scaling_of(features))
        self._rows.append(row)
        if len(self._rows) == _BATCH_ROWS:
            self._flush()
        return length

    def end(self) -> None:
        """Complete the file."""
        if not self.file.size and self._is_compressed:
            self.file.write(EMPTY_MEMBER)
        self._flush()

    @property
    def table(self) -> pa.Table:
        """The index of the shard."""
        return pa.concat_tables(self._tables)

    def _flush(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()
