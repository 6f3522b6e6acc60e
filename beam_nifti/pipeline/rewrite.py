"""Makes the dataset that a build of another manifest would give, of the records of the present one.

The images are not needed. Records are copied as they are, unless their labels change. One thread writes a
shard from front to back, so there are no part files: after an interruption, finished shards are kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO, Final

import pyarrow as pa

from beam_nifti.config import BuildConfig, Sharding
from beam_nifti.errors import DatasetError, OutputBusyError, ShardError, UsageError
from beam_nifti.manifest.labels import label_of
from beam_nifti.manifest.manifest import Manifest, VolumeRow, frame_id
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.failures import Failure, failed_frames, ids_are_paths, own_cells, write_failures
from beam_nifti.pipeline.merge import describe_shard
from beam_nifti.pipeline.parts import (
    BUILD_FOLDER,
    RecordFile,
    file_facts,
    is_intact,
    shard_at,
)
from beam_nifti.pipeline.plan import MAX_UNIT_ROWS, BuildPlan
from beam_nifti.pipeline.progress import Progress
from beam_nifti.pipeline.publish import (
    files_of,
    next_revision,
    publish_info,
    remove_files,
)
from beam_nifti.pipeline.rewrite_target import (
    discard_unfinished,
    end_rewriting,
    holding,
    refuse_unknown_files,
)
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.record.dataset_files import (
    FILE_NAME,
    failures_file,
    read_content,
    read_failures_list,
)
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo, SplitInfo
from beam_nifti.record.example import (
    FeatureValue,
    decode_example,
    encode_example,
    label_feature,
    label_values,
)
from beam_nifti.record.index import (
    Limits,
    extra_column,
    mask_labels,
    read_index,
    row_cells,
    schema_of,
    write_index,
)
from beam_nifti.record.shard_index import read_shard_index, read_sound_index
from beam_nifti.record.sharding import ShardName
from beam_nifti.record.tfrecord import EMPTY_MEMBER, decode_record, encode_members
from beam_nifti.record.tiles import find_cuts, kept_members
from beam_nifti.record.versions import all_versions, record_versions, versions_fact, versions_in
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted, first_few
from beam_nifti.volume.files import frames_of

_REWRITTEN_FACT: Final = "rewritten_for"
"""Key, in the metadata of an index, of the token of the rewriting that wrote it."""

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record is: number of its shard, in the order of the dataset, and its number in the shard.

    `num_frames` is that of its image, if images differ in it.
    """

    shard: int
    ordinal: int
    num_frames: int = 1


@dataclass(frozen=True)
class _NewShard:
    """A shard to write: its split and name, and row and present place of each record."""

    split: str
    name: ShardName
    rows: tuple[VolumeRow, ...]
    places: tuple[_Place, ...]


@dataclass(frozen=True, eq=False)
class Rewrite:
    """The records of a dataset, arranged and labelled as another manifest says.

    Attributes:
        output: folder of the dataset, an absolute path or a URL.
        content: its dataset_info.json, as it was read.
        info: the same, parsed.
        manifest: manifest of the dataset to make. Each of its rows must be in the
            dataset, as a record or as a failure, with the same images.
        path: path of its file, if that becomes the dataset's; None to keep the one in `info`.
    """

    output: str
    content: bytes
    info: DatasetInfo
    manifest: Manifest
    path: str | None = None

    @classmethod
    def require_rewritable(cls, output: str, info: DatasetInfo) -> None:
        """Refuse a dataset whose records have no manifest, or whose format is too old.

        Raises:
            UsageError: it is one of these.
        """
        if info.format_version == 1:
            raise UsageError(
                f"{output}: has format version 1; make a new one of it with `beam-nifti convert`"
            )
        if not info.has_manifest:
            raise UsageError(
                f"{output}: was written by WriteToTFRecord, without a manifest; write it again with the "
                "records that it should have"
            )

    @cached_property
    def plan(self) -> BuildPlan:
        """The plan of a build of the manifest, as far as its records are concerned."""
        info, manifest = self.info, self.manifest
        config = BuildConfig(
            manifest=self.path or info.manifest["path"],
            output=self.output,
            record=replace(info.record_config, labels=manifest.label_columns or None),
            columns=manifest.columns,
            splitting=info.splitting,
            sharding=Sharding(**info.config["sharding"]),
            shuffle_seed=info.config.get("shuffle_seed"),
            allow_mixed_shapes=info.config.get("allow_mixed_shapes", False),
        )
        return BuildPlan(
            config=config,
            num_rows=len(manifest),
            column_names=tuple(manifest.table.column_names),
            extra_columns=manifest.extra_columns,
            split_sizes=manifest.split_sizes(),
            shape=info.shape,
            source_dtype="",
            loaded_dtype=info.dtype,
            key_check=manifest.key_check,
            manifest_name=manifest.name if self.path else info.manifest["path"],
            num_skipped=manifest.num_skipped,
            num_frames=info.num_frames,
            digest=manifest.digest(),
            unit_rows=MAX_UNIT_ROWS,
            revision=next_revision(self.output, info, None),
        )

    @cached_property
    def token(self) -> str:
        """16 hex digits that identify the rewriting."""
        described = self.plan.describe()
        facts = (self.content, dump_json([described.config, described.manifest], sort_keys=True).encode())
        return hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]

    @cached_property
    def facts(self) -> DatasetInfo:
        """The dataset to make, without its shards and failures."""
        record, described = self.info.record_config, self.plan.describe()
        was, now = (
            (each.fingerprint, *each.earlier_fingerprints) for each in (record, self.plan.config.record)
        )
        said = self.info.config["fingerprint"]
        if said not in was:
            raise DatasetError(
                f"{self.output}: the fingerprint is {said}, that of its options is {was[0]}; run beam-nifti "
                "verify"
            )
        columns = described.config["columns"]
        config = {**self.info.config, "columns": columns, "fingerprint": now[was.index(said)]}
        return replace(described, config=config, versions=all_versions())

    @cached_property
    def _places(self) -> dict[str, _Place]:
        found = dict[str, _Place]()
        for number, shard in enumerate(self.info.shards):
            names = ["example_id", "source_shape"] if self._may_lack_frames else ["example_id"]
            table = read_shard_index(self.output, self.info, shard, names)
            ids = table["example_id"].to_pylist()
            shapes = table["source_shape"].to_pylist() if self._may_lack_frames else [()] * len(ids)
            found |= {
                name: _Place(number, ordinal, frames_of(shape))
                for ordinal, (name, shape) in enumerate(zip(ids, shapes, strict=True))
            }
        return found

    @property
    def _may_lack_frames(self) -> bool:
        """Whether images may have fewer frames than the dataset has positions for."""
        return self.info.record_config.max_frames is not None

    @cached_property
    def _failed(self) -> dict[str, tuple[str, str, str, tuple[int, ...] | None]]:
        """Stage, error, message and frames of each failure, by the id of its image."""
        info, name = self.info, self.info.failures
        if name is None:
            return {}
        path = storage.join(self.output, name)
        try:
            content = read_failures_list(self.output, name, info.num_failures)
        except FileNotFoundError as e:
            raise DatasetError(f"{path}: is missing; copy it again") from e
        if info.failures_sha256 != hashlib.sha256(content).hexdigest():
            raise DatasetError(f"{path}: is not the file that {FILE_NAME} describes; copy it again")
        columns = info.columns
        listed = read_manifest(path, columns, content=content, is_list=True)
        frames: Sequence[tuple[int, ...] | None] = [None] * len(listed)
        if info.num_frames and (cells := own_cells(listed, "frames")):
            of_lines = zip(
                cells,
                failed_frames(listed, info.num_frames, info.record_config.clip_frames),
                strict=True,
            )
            frames = [tuple(numbers) if cell else None for cell, numbers in of_lines]
        prefix = ""
        if ids_are_paths(columns, info.manifest["columns"]):
            prefix = f"{storage.dirname(info.manifest['path'])}/"
        texts = (own_cells(listed, key) for key in ("stage", "error", "message"))
        return {
            name.removeprefix(prefix): (stage, error, message, numbers)
            for name, stage, error, message, numbers in zip(
                listed.ids.to_pylist(), *texts, frames, strict=True
            )
        }

    def count_failures(self, image_ids: Iterable[str]) -> int:
        """Failed volumes of some images of the dataset."""
        frames = range(self.info.num_frames or 1)
        found = (self._failed[name] for name in image_ids if name in self._failed)
        return sum(len(frames if numbers is None else numbers) for *_, numbers in found)

    def _shards(self, failures: list[Failure]) -> Iterator[_NewShard]:
        """The shards to write; adds the failures of their rows."""
        plan = self.plan
        names = {
            split: plan.layout.names(
                split, compressed=plan.config.record.compression == "gzip", revision=plan.revision
            )
            for split in plan.split_sizes
        }
        for split in plan.split_sizes:
            order = plan.row_order(self.manifest, split)
            frames = plan.num_frames or 1
            for name, positions in zip(names[split], plan.shard_ranges(split), strict=True):
                images = order[positions.start // frames : positions.stop // frames].tolist()
                records, places = list[VolumeRow](), list[_Place]()
                clip = plan.config.record.clip_frames
                for row in self.manifest.rows(images, positions.start, str(name), 0, plan.num_frames, clip):
                    missing = [each for each in row.records() if each.example_id not in self._places]
                    found = [each for each in row.records() if each.example_id in self._places]
                    records += found
                    places += (self._places[each.example_id] for each in found)
                    if missing := list(self._existing(row, found, missing)):
                        failures.append(self._failure_of(row, [each.frame for each in missing]))
                yield _NewShard(split, name, tuple(records), tuple(places))

    def _existing(
        self, row: VolumeRow, found: Sequence[VolumeRow], missing: Sequence[VolumeRow]
    ) -> Sequence[VolumeRow]:
        """Those of the missing records of a row whose frames its image has."""
        if not self._may_lack_frames:
            return missing
        if found:
            num_frames = self._places[found[0].example_id].num_frames
            return [each for each in missing if (each.frame or 0) + row.clip_frames <= num_frames]
        known = self._failed.get(row.example_id)
        wanted = known[3] if known else None
        return [each for each in missing if wanted is None or each.frame in wanted]

    def require_all(self) -> None:
        """Refuse a manifest that lacks images of the dataset.

        Raises:
            UsageError: it does.
        """
        ids = {*self._failed, *self._places}
        if self.info.num_frames:
            ids = {*self._failed, *(name.rpartition(frame_id("", 0)[:-4])[0] for name in self._places)}
        kept = self.manifest.ids.take(pa.array(self.manifest.kept_rows()))
        if lost := sorted(ids.difference(kept.to_pylist())):
            named = "" if self.manifest.key_check else f" ({first_few(lost, _SHOWN)})"
            raise UsageError(
                f"{self.manifest.path}: lacks {counted(len(lost), 'example')} of {self.output}{named}, as "
                "rows are absent or skipped; keep all rows, with --missing-label nan if they have no label"
            )

    def _failure_of(self, row: VolumeRow, frames: Sequence[int | None]) -> Failure:
        known = self._failed.get(row.example_id)
        if known is None or tuple(known[3] or row.frames) != tuple(f or 0 for f in frames):
            name = row.example_id if frames[0] is None else frame_id(row.example_id, frames[0])
            raise DatasetError(
                f"{self.output}: has neither a record nor a failure of row {row.row} of the manifest"
                + ("" if row.pseudonyms else f" ({name})")
                + "; build it first, or run beam-nifti verify"
            )
        stage, error, message, wanted = known
        return Failure(replace(row, wanted=wanted), stage, error, message)

    # Writing

    def run(self, finish: DatasetInfo, progress: Progress, workers: int) -> DatasetInfo:
        """Write and publish the dataset; `opened` must have been entered.

        Args:
            finish: `facts`, completed.
            progress: gets what is written.
            workers: number of threads, each of which writes one shard at a time.

        Raises:
            UsageError: a row has other images than its record.
            DatasetError: the present dataset is damaged.
            OutputBusyError: another build has taken the output.
        """
        splits: dict[str, list[ShardInfo]] = {split: [] for split in self.plan.split_sizes}
        failures, labels = list[Failure](), set[int]()
        for split, made, found in self._made(failures, workers):
            splits[split].append(made)
            labels |= found
            progress.add(shards=1, volumes=made.num_examples, num_bytes=made.num_bytes)
        lock.require_held(self.output)
        name, sha256 = self._write_failures(failures)
        info = replace(
            finish,
            splits={split: SplitInfo(tuple(shards)) for split, shards in splits.items()},
            num_failures=sum(len(failure.row.positions) for failure in failures),
            failures=name,
            failures_sha256=sha256,
            mask_labels=tuple(sorted(labels)) if self.plan.config.record.mask_dtype else None,
        )
        publish_info(info, self.output)
        end_rewriting(self.output, info)
        return info

    def _made(self, failures: list[Failure], workers: int) -> Iterator[tuple[str, ShardInfo, set[int]]]:
        """Split, shard, and labels of masks of each new shard, in order; adds the failures of their rows."""
        waiting = deque[tuple[str, Future[tuple[ShardInfo, set[int]]]]]()
        with ThreadPoolExecutor(workers, thread_name_prefix="rewrite") as pool:
            try:
                for shard in self._shards(failures):
                    waiting.append((shard.split, pool.submit(self._make, shard)))
                    if len(waiting) > 2 * workers:  # rows are made for these, not for the whole dataset
                        split, done = waiting.popleft()
                        yield split, *done.result()
                for split, done in waiting:
                    yield split, *done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _write_failures(self, failures: Sequence[Failure]) -> tuple[str | None, str | None]:
        if not failures:
            return None, None
        plan = self.plan
        name = failures_file(plan.revision)
        path = storage.join(self.output, name)
        folder = storage.dirname(plan.config.manifest)
        write_failures(path, failures, folder, plan.config.columns, plan.extra_columns, self.output)
        return name, hashlib.sha256(storage.read(path, self.output)).hexdigest()

    def _make(self, shard: _NewShard) -> tuple[ShardInfo, set[int]]:
        """A new shard, or the present one if it is the same; and the labels of its masks."""
        has_masks = self.plan.config.record.mask_dtype is not None
        if finished := self._find(shard):
            return finished[0], mask_labels(finished[1]) if has_masks else set()
        tables = {number: self._table(number) for number in {place.shard for place in shard.places}}
        columns = {number: table.to_pylist() for number, table in tables.items()}
        old = [columns[place.shard][place.ordinal] for place in shard.places]
        extras = self.plan.extra_columns
        cells = [{**was, **row_cells(row, extras)} for was, row in zip(old, shard.rows, strict=True)]
        changed = [self._is_changed(was, row) for was, row in zip(old, shard.rows, strict=True)]
        for was, row in zip(old, shard.rows, strict=True):
            self._require_same_images(was, row)
        schema = schema_of(self.plan.config.record, extras)
        source = None if any(changed) else self._whole_shard(shard.places)
        if source is not None:
            table = pa.Table.from_pylist(cells, schema=schema)
            labels = mask_labels(table) if has_masks else set[int]()
            if self._is_unchanged(shard, source, table):
                return source, labels
            facts = self._link(shard, source)
        else:
            facts = self._write(shard, cells, changed)
            table = pa.Table.from_pylist(cells, schema=schema)
            labels = mask_labels(table) if has_masks else set()
        facts = self._making(tables) | facts
        write_index(storage.join(self.output, shard.name.index_file), table, facts, self.output)
        return describe_shard(self.output, shard.name, len(cells), facts), labels

    def _is_unchanged(self, shard: _NewShard, source: ShardInfo, table: pa.Table) -> bool:
        """Whether a present shard, whose records the new one has, can stay with its index."""
        name, old = ShardName.parse(source.name), self._table(shard.places[0].shard)
        is_like = self.facts.config["fingerprint"] == self.info.config["fingerprint"]
        is_same_place = name is not None and name.is_same_place(shard.name)
        return is_like and is_same_place and table.equals(old.replace_schema_metadata())

    def _link(self, shard: _NewShard, source: ShardInfo) -> dict[str, str]:
        """Give the file of a present shard the name of the new one; facts of the file."""
        self._delete_index(shard.name)
        old, new = (storage.join(self.output, name) for name in (source.name, str(shard.name)))
        storage.link(old, new, self.output, self.output)
        return {"sha256": source.sha256, "num_bytes": str(source.num_bytes)}

    def _making(self, numbers: Mapping[int, object]) -> dict[str, str]:
        # A dataset from before shards had versions has those of its last build.
        said = {k: v for k, v in self.info.versions.items() if k in record_versions()}
        earlier = itertools.chain.from_iterable(self._versions(number) for number in sorted(numbers))
        versions = versions_fact(each or said for each in earlier)
        return {
            "fingerprint": str(self.facts.config["fingerprint"]),
            **versions,
            _REWRITTEN_FACT: self.token,
        }

    def _versions(self, number: int) -> list[dict[str, str]]:
        path = storage.join(self.output, self.info.shards[number].index)
        return versions_in(read_index(path, columns=[], below=self.output)[1])

    def _whole_shard(self, places: Sequence[_Place]) -> ShardInfo | None:
        """The shard that these are all records of, in their order; None if there is none."""
        if not places:
            return None
        shard = self.info.shards[places[0].shard]
        whole = [_Place(places[0].shard, ordinal) for ordinal in range(shard.num_examples)]
        return shard if whole == [*places] else None

    def _write(
        self, shard: _NewShard, cells: Sequence[dict[str, Any]], changed: Sequence[bool]
    ) -> dict[str, str]:
        """Write the file of a shard, and complete the cells of its index; facts of the file."""
        self._delete_index(shard.name)
        with contextlib.ExitStack() as stack:
            handles = dict[int, BinaryIO]()
            for number in {place.shard for place in shard.places}:
                self._require_intact(number)
                path = storage.join(self.output, self.info.shards[number].name)
                handles[number] = stack.enter_context(storage.open_read(path, self.output))
            path = storage.join(self.output, str(shard.name))
            file = RecordFile(stack.enter_context(storage.create(path, self.output)))
            for row, place, of_record, is_changed in zip(
                shard.rows, shard.places, cells, changed, strict=True
            ):
                handles[place.shard].seek(of_record["offset"])
                data = handles[place.shard].read(of_record["length"])
                if is_changed:
                    pieces, of_record["member_lengths"] = self._encode(data, row)
                    of_record["offset"], of_record["length"] = file.write(*pieces)
                else:
                    of_record["offset"], _ = file.write(data)
            if not shard.places and shard.name.compressed:
                file.write(EMPTY_MEMBER)
        return file.facts

    def _encode(self, data: bytes, row: VolumeRow) -> tuple[Sequence[bytes | memoryview], tuple[int, ...]]:
        """A record with the labels of a row."""
        config = self.plan.config.record
        is_compressed = config.compression == "gzip"
        was = decode_record(data, is_compressed)
        stored = decode_example(was)
        labels = {label_feature(column.name) for column in self.info.labels}
        features: dict[str, FeatureValue] = {
            name: (value,) if isinstance(value, memoryview) else value  # type: ignore[misc]
            for name, value in stored.items()
            if name not in labels
        }
        payload = encode_example(features | label_values(row))
        level = config.compression_level if is_compressed else None
        cuts = find_cuts(payload, is_compressed) if config.has_members else []
        kept = kept_members(data, was, payload) if is_compressed and cuts else {}
        encoded = encode_members((payload,), level, cuts, kept)
        return encoded.pieces, encoded.lengths

    def _is_changed(self, was: Mapping[str, Any], row: VolumeRow) -> bool:
        """Whether a record states other labels than its row."""
        columns = self.info.labels
        stated = [
            was["label"],
            *((column.name, label_of(was[extra_column(column.name)], column)) for column in columns),
        ]
        # By their texts, as NaN is not equal to itself.
        return repr(stated) != repr([row.label, *row.labels])

    def _require_same_images(self, was: Mapping[str, Any], row: VolumeRow) -> None:
        names = self.plan.config.columns.files[1:]
        now = [row.source, *(row.extras[self.plan.extra_columns.index(name)] for name in names)]
        if [was["source"], *(was[extra_column(name)] for name in names)] != now:
            named = "" if row.pseudonyms else f" ({row.example_id})"
            raise UsageError(
                f"row {row.row}{named} has other images than its record in {self.output}; run a build instead"
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019 - of an object that lives as long as the command
    def _table(self, number: int) -> pa.Table:
        return read_shard_index(self.output, self.info, self.info.shards[number])

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def _require_intact(self, number: int) -> None:
        """Refuse to copy from a shard that has changed, as the copy would have a sha256 that matches."""
        shard = self.info.shards[number]
        path = storage.join(self.output, shard.name)
        try:
            is_same = file_facts(path, self.output)["sha256"] == shard.sha256
        except FileNotFoundError as e:
            raise DatasetError(f"{path}: is missing; copy it again") from e
        if not is_same:
            raise DatasetError(
                f"{path}: is damaged, so no records of it are copied; restore it from a copy, or build the "
                "dataset again with --recheck"
            )

    def _find(self, shard: _NewShard) -> tuple[ShardInfo, pa.Table] | None:
        """A shard that an interrupted run has finished, and its index."""
        part = shard_at(self.output, shard.name)
        try:
            limits = Limits.of_data(part.data, self.output)
            table, facts = read_sound_index(part.index, self.facts, limits, self.output)
            is_same = facts.get(_REWRITTEN_FACT) == self.token and table.num_rows == len(shard.rows)
            if not (is_same and "sha256" in facts and is_intact(part, facts)):
                return None
        except (FileNotFoundError, ShardError):
            return None
        return describe_shard(self.output, shard.name, table.num_rows, facts), table

    def _delete_index(self, name: ShardName) -> None:
        """An index that was not kept does not describe the file to come."""
        storage.delete(storage.join(self.output, name.index_file), self.output)

    # The output

    @contextlib.contextmanager
    def opened(self, *, overwrite: bool, is_strict: bool = False) -> Iterator[None]:
        """Prepare the output, to which nothing else can write during the block.

        Args:
            overwrite: whether to discard an unfinished build in it.
            is_strict: whether to `refuse_unknown_files`.

        Raises:
            OutputError: it has an unfinished build or unknown files, or cannot be written.
            OutputBusyError: another build is writing there, or has replaced the dataset.
        """
        output = self.output
        with holding(output):
            if read_content(output) != self.content:
                raise OutputBusyError(f"{output}: was rebuilt meanwhile; run the same command again")
            self._take_over(overwrite=overwrite, is_strict=is_strict)
            yield

    def _take_over(self, *, overwrite: bool, is_strict: bool) -> None:
        """Remove what unfinished builds have left, and write down what this one may write."""
        output, info = self.output, self.info
        names = [
            str(name)
            for split in self.plan.split_sizes
            for name in self.plan.layout.names(
                split, compressed=self.plan.config.record.compression == "gzip", revision=self.plan.revision
            )
        ]
        ours = SavedWrite(
            self.token,
            BUILD_FOLDER,
            self.plan.revision,
            files_of(info),
            (*names, failures_file(self.plan.revision)),
        )
        is_continued = SavedWrite.read(output) == ours and SavedPlan.read(output) is None
        if not is_continued:
            discard_unfinished(output, info, overwrite=overwrite)
        remove_files(output, (), keep={*ours.written} if is_continued else files_of(info))
        if is_strict:
            refuse_unknown_files(output, info)
        ours.write(output)
