"""Verifies a dataset: files against checksums, and records against the index and dataset_info.json.

Shards are read front to back, once. Each thread holds one record; several may take records of one shard in
turn.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Final, Protocol, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Columns, RecordConfig, Sharding, spell_steps
from beam_nifti.errors import DatasetError, ManifestError, OutputBusyError, UsageError
from beam_nifti.inspection.croissant import check_croissant
from beam_nifti.inspection.problems import Problems, Scope
from beam_nifti.inspection.rebuilding import require_functions, require_same_content
from beam_nifti.inspection.record_checks import RecordSpec, RoundingNote, check_source
from beam_nifti.inspection.shard_pass import ShardPass, StoredRecord
from beam_nifti.inspection.table_checks import (
    ANEW,
    check_columns,
    check_info,
    check_mask_labels,
    check_numbers,
    check_positions,
    check_rows,
    compare_rows,
    failure_rows,
    find_removed,
    find_strays,
    frame_rows,
    manifest_rows,
    no_rows,
    relative_ids,
)
from beam_nifti.manifest.manifest import Manifest
from beam_nifti.manifest.pseudonyms import Pseudonyms, read_pseudonyms
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.failures import MAX_FAILED_FRAMES, failed_frames, ids_are_paths, own_cells
from beam_nifti.pipeline.resume import unfinished_names
from beam_nifti.pipeline.withdrawal import people_of, refuse_withdrawn
from beam_nifti.record.dataset_files import (
    CROISSANT_FILE,
    FILE_NAME,
    MAX_INFO_BYTES,
    path_of,
    read_failures_list,
)
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.record.index import extra_column
from beam_nifti.record.sharding import INDEX_FOLDER, Layout
from beam_nifti.record.versions import record_versions, version_changes
from beam_nifti.record.withdrawals import find_withdrawn
from beam_nifti.storage import paths as storage
from beam_nifti.support.cells import parse_integer
from beam_nifti.support.process import keep_buffers
from beam_nifti.support.wording import counted, first_few

ALL: Final = 2**63 - 1  # for `deep`: every record
_SHOWN: Final = 3  # names in a problem
_ROW: Final = re.compile("[0-9]{1,18}")


class OnProgress(Protocol):
    """Called, from any thread, for every record that was checked."""

    def __call__(self, *, volumes: int, num_bytes: int) -> object:
        """Count some records, and the bytes that they take in their shards."""


@dataclass(frozen=True, repr=False)
class Verification:
    """What was checked and what is wrong; falsy if anything is wrong. `print` shows all of it.

    Attributes:
        num_examples: records checked.
        num_shards: shards named by dataset_info.json.
        num_bytes: size of the records checked.
        num_deep: records rebuilt from their images.
        problems: one sentence per problem, those of whole files first.
        notes: one sentence per shard that differs only by rounding, as other versions of software built it.
    """

    num_examples: int
    num_shards: int
    num_bytes: int
    num_deep: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def reworded(self, words: Callable[[str], str]) -> Verification:
        """A copy with every sentence changed by a function."""
        problems, notes = (tuple(map(words, each)) for each in (self.problems, self.notes))
        return replace(self, problems=problems, notes=notes)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        examples, shards = counted(self.num_examples, "example"), counted(self.num_shards, "shard")
        return f"<Verification of {examples} in {shards}: {counted(len(self.problems), 'problem')}>"

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"  {line}" for line in (*self.problems, *self.notes))])


def verify_dataset(
    output: str,
    *,
    manifest: str | None = None,
    rows: bytes | None = None,
    anonymous_ids: str | None = None,
    deep: SupportsIndex | str | None = None,
    preprocess: str | Sequence[str] | None = None,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Check every byte of a dataset, as `beam_nifti.verify`, which documents arguments, result and errors.

    Nothing of the dataset is executed, and only images that `manifest` names are opened. `rows` is the
    Parquet file of a manifest in memory, and `on_progress` is called for every record.
    """
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it must be at least 1")
    deep = _number_of(deep)
    if preprocess is not None and not deep:
        raise UsageError("--preprocess is for --deep, which rebuilds records; add --deep, or drop it")
    output = storage.absolute(output)
    info = read_info(output)
    columns, splitting = info.columns, info.splitting
    record = info.record_config
    if deep:
        require_same_content(output, info, "--deep rebuilds records", ", or drop --deep")
        require_functions(output, record, spell_steps(preprocess), "--deep")
    pseudonyms = _read_pseudonyms(output, info, manifest, anonymous_ids, deep)
    if deep and manifest is None:
        raise UsageError(
            f"--deep opens only images that you name; add --manifest with the manifest that {output} was "
            f"built from (according to the dataset, {info.manifest['path']})"
        )
    wanted = None
    if manifest is not None:
        built_from = storage.absolute(manifest)
        wanted = read_manifest(built_from, columns, splitting, pseudonyms, content=rows, options=())
        if wanted.labels and not record.labels:
            problem = f"{columns.label} holds texts, but the labels of {output} are numbers"
            raise ManifestError(built_from, [f"{problem}; give the manifest that it was built from"])
    verifier = _Verifier(output, info, columns, wanted, on_progress)
    keep_buffers()
    verifier.check_files()
    verifier.check_shards(workers, min(deep or 0, info.num_examples))
    verifier.check_tables()
    verifier.check_columns()
    _refuse_rebuilt(output, info)
    return verifier.report()


def _number_of(deep: SupportsIndex | str | None) -> int | None:
    """How many records to rebuild; None for none."""
    if deep == "all":
        return ALL
    try:
        number = parse_integer(deep) if isinstance(deep, str) else deep if deep is None else index(deep)
    except (ValueError, TypeError):
        number = -1
    if number is not None and number < 0:
        raise UsageError(f"--deep is {deep!r}; give a number of records, or all")
    return number


def _compared_cells(info: DatasetInfo, columns: Columns, wanted: Manifest) -> dict[str, str]:
    """Columns of both manifests other than ids, labels and splits, with their names in the index."""
    others = {columns.id, *_labels_and_split(columns, info.record_config)}
    names = [n for n in info.manifest["columns"] if n in wanted.table.column_names and n not in others]
    own = {name: name for name in ("participant_id", "session_id")} | {columns.files[0]: "source"}
    return {name: own.get(name, extra_column(name)) for name in names}


def _labels_and_split(columns: Columns, record: RecordConfig) -> set[str | None]:
    """Columns of a manifest that are compared by meaning, not as written."""
    return {columns.label, "split", *(label.name for label in record.labels or ())}


def _refuse_rebuilt(output: str, info: DatasetInfo) -> None:
    """Refuse a dataset that was replaced meanwhile, because the build explains apparent problems."""
    try:
        is_same = read_info(output) == info
    except DatasetError:
        is_same = False
    if not is_same:
        raise OutputBusyError(f"{output}: was rebuilt while it was verified; run the same command again")


def _read_pseudonyms(
    output: str, info: DatasetInfo, manifest: str | None, key: str | None, deep: int | None
) -> Pseudonyms | None:
    """The pseudonyms of a dataset, if it has any and is compared with a manifest."""
    check = info.manifest.get("key_check")
    if check is None and key is not None:
        raise UsageError(f"{output}: its ids are not anonymous; drop --anonymous-ids")
    if (manifest or key or deep) and check is not None and not (manifest and key):
        raise UsageError(
            f"{output}: its ids and paths are anonymous; to compare it with a manifest or with its images, "
            "give both --manifest and --anonymous-ids"
        )
    pseudonyms = read_pseudonyms(key) if key else None
    if pseudonyms and pseudonyms.check != check:
        raise UsageError(f"{key}: not the key that {output} was built with; give that key")
    return pseudonyms


class _Verifier:
    """One run of `verify_dataset`."""

    def __init__(
        self,
        output: str,
        info: DatasetInfo,
        columns: Columns,
        wanted: Manifest | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._output, self._info, self._spec = output, info, RecordSpec(info)
        self._columns, self._wanted, self._on_progress = columns, wanted, on_progress
        self._cells = {} if wanted is None else _compared_cells(info, columns, wanted)
        self._problems = Problems()
        self._passes = list[ShardPass]()
        self._people = list[str]()  # of failures
        self._lock = threading.Lock()
        self._num_examples = self._num_bytes = self._num_deep = 0
        self._num_rounded: Counter[int] = Counter()
        self._failed_rows: list[tuple[str, int, Sequence[int]]] = []

    def report(self) -> Verification:
        info = self._info
        return Verification(
            num_examples=self._num_examples,
            num_shards=len(info.shards),
            num_bytes=self._num_bytes,
            num_deep=self._num_deep,
            problems=self._problems.texts(),
            notes=tuple(
                f"{info.shards[shard].name}: {counted(count, 'record', 'differ')} only by rounding from "
                f"those rebuilt here; the versions differ: {self._versions_of(shard)}"
                for shard, count in sorted(self._num_rounded.items())
            ),
        )

    def _versions_of(self, shard: int) -> str:
        """How the versions that built a shard's records differ from those here, in words."""
        now = record_versions()
        # A dataset from before shards had versions has those of its last build.
        found = [v or {k: self._info.versions.get(k, "") for k in now} for v in self._passes[shard].versions]
        return " and ".join(dict.fromkeys(version_changes(was, now) for was in found if was != now))

    def check_files(self) -> None:
        """dataset_info.json agrees with itself and with the folder."""
        problems = list(check_info(self._info))
        if storage.can_list(self._output):
            files = storage.list_files(self._output, "*.tfrecord*")
            indexes = storage.list_files(storage.join(self._output, INDEX_FOLDER), "*.parquet")
            files += (f"{INDEX_FOLDER}/{name}" for name in indexes)
            # Looked for afterwards: a build that begins in between has made none of the files.
            problems += find_strays(files, self._info, unfinished_names(self._output))
            problems += find_removed(files, self._info)
        try:
            description = path_of(self._output, CROISSANT_FILE)
            if storage.exists(description):
                content = storage.read_bounded(description, MAX_INFO_BYTES)
                problems += check_croissant(content, self._info)
        except (TimeoutError, ConnectionError):
            raise
        except OSError as e:
            problems.append(f"{CROISSANT_FILE}: cannot be read: {e}; delete it")
        for problem in problems:
            self._problems.add(Scope.DATASET, problem)

    def check_shards(self, workers: int, num_deep: int) -> None:
        """Every shard, its index and its records."""
        info = self._info
        shards = [(split, s) for split, found in info.splits.items() for s in found.shards]
        self._passes = passes = [
            ShardPass(self._output, shard, split, number, self._spec, self._problems, cells=self._cells)
            for number, (split, shard) in enumerate(shards)
        ]
        starts = list(itertools.accumulate((s.num_examples for _, s in shards), initial=0))
        stop = threading.Event()

        def work(first: int) -> None:
            for number in itertools.chain(range(first, len(passes)), range(first)):
                while not stop.is_set() and (record := passes[number].take()) is not None:
                    at = starts[number] + record.ordinal
                    # Exactly num_deep of the numbers below num_examples, evenly spread.
                    is_deep = at * num_deep % max(info.num_examples, 1) < num_deep
                    self._check(record, number, is_deep=is_deep)

        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            try:
                firsts = (worker * len(passes) // workers for worker in range(workers))
                for done in as_completed([pool.submit(work, first) for first in firsts]):
                    done.result()
            finally:
                stop.set()

    def _check(self, record: StoredRecord, shard: int, *, is_deep: bool) -> None:
        def tell(problem: str) -> None:
            if isinstance(problem, RoundingNote):
                with self._lock:
                    self._num_rounded[shard] += 1
            else:
                self._problems.add(Scope.RECORD, f"{record.name}: {problem}", shard, record.ordinal)

        def rebuild(payload: bytes) -> Iterable[str]:
            return self._rebuild(payload, record.cells, shard) if is_deep else ()

        record.check(self._spec, tell, rebuild)
        with self._lock:
            self._num_examples += 1
            self._num_bytes += len(record.data)
            self._num_deep += is_deep
        if self._on_progress:
            self._on_progress(volumes=1, num_bytes=len(record.data))

    def _rebuild(self, payload: bytes, cells: Mapping[str, Any], shard: int) -> Iterator[str]:
        """Rebuild a record from its image, as `check_source`."""
        assert self._wanted is not None
        others = (cells[extra_column(name)] for name in self._columns.files[1:])
        row = self._wanted.row_of((cells["source"], *others))
        if row is None:
            yield f"its image, {cells['source']}, is not in the manifest; give the one it was built from"
            return
        # The id may be that of one of its frames; another label is reported by `compare_rows`.
        row = replace(row, example_id=cells["example_id"], label=cells["label"])
        versions = self._versions_of(shard)
        yield from check_source(payload, cells, row, self._wanted.folder, self._spec.config, versions)

    def check_tables(self) -> None:
        """All indexes and the list of failures together; and the manifest, if there is one to compare."""
        info, columns, wanted = self._info, self._columns, self._wanted
        cells = [*self._cells]
        nothing = no_rows(self._spec.config, cells)
        records = pa.concat_tables([nothing, *(found.rows for found in self._passes)])
        failures = self._read_failures()
        mask_labels = {label for found in self._passes for label in found.mask_labels}
        of_columns = check_columns(info.shards, [found.columns for found in self._passes])
        of_labels = check_mask_labels(mask_labels, info)
        self._check_withdrawn()
        for problem in itertools.chain(of_columns, of_labels, self._check_positions(failures)):
            self._problems.add(Scope.DATASET, problem)
        if info.has_manifest:
            numbers = np.concatenate([np.zeros(0, np.int64), *(found.numbers for found in self._passes)])
            for problem in check_numbers(numbers, info.manifest["num_rows"], are_unique=not info.num_frames):
                self._problems.add(Scope.ROWS, problem)
        rows = None if wanted is None else manifest_rows(wanted, self._spec.config, cells)
        if wanted is not None and rows is not None and info.withdrawn:
            rows = rows.filter(pc.invert(self._are_withdrawn(wanted)))  # which are problems already
        if wanted is not None and rows is not None and (frames := info.num_frames):
            numbers = wanted.kept_rows() + 1
            if info.withdrawn:
                numbers = numbers[~self._are_withdrawn(wanted).to_numpy(zero_copy_only=False)]
            per_row = self._frames_of_rows(numbers.tolist(), frames)
            if sum(map(len, per_row)) > records.num_rows + failures.num_rows + MAX_FAILED_FRAMES:
                self._problems.add(
                    Scope.ROWS,
                    f"{FILE_NAME}: num_frames is {frames}, too many for the {records.num_rows} records",
                )
                return
            rows = frame_rows(rows, per_row)
        if ids_are_paths(columns, info.manifest["columns"]):
            folder = storage.dirname(info.manifest["path"])
            records, failures = (relative_ids(t, folder) for t in (records, failures))
            rows = None if rows is None else relative_ids(rows, folder)
        for problem in check_rows(records, failures, info.failures):
            self._problems.add(Scope.ROWS, problem)
        if wanted is not None:
            known = pa.concat_tables([records, failures], promote_options="default")
            for problem in compare_rows(known, rows):
                self._problems.add(Scope.ROWS, f"{wanted.path}: {problem}")

    def _are_withdrawn(self, manifest: Manifest) -> pa.BooleanArray:
        """Which of the kept rows of a manifest are of participants who were withdrawn."""
        people = people_of(manifest).take(pa.array(manifest.kept_rows()))
        names = pc.unique(people).to_pylist()
        found = find_withdrawn(names, self._info.withdrawn, self._info.withdrawals)
        return pc.is_in(people, value_set=pa.array([*found], pa.string()))

    def _check_withdrawn(self) -> None:
        """Nothing here is of a participant who was withdrawn, nor in the manifest, if there is one."""
        info, wanted = self._info, self._wanted
        if not info.withdrawn:
            return
        people = {*self._people, *(name for found in self._passes for name in found.people)}
        if found := find_withdrawn(people, info.withdrawn, info.withdrawals):
            named = first_few(sorted(found), _SHOWN)
            what = f"has records or failures of {counted(len(found), 'withdrawn participant')} ({named})"
            self._problems.add(
                Scope.DATASET, f"{FILE_NAME}: {what}; run beam-nifti withdraw on an undamaged copy"
            )
        if wanted is not None:
            try:
                refuse_withdrawn(wanted, info)
            except ManifestError as e:
                for problem in e.problems:
                    self._problems.add(Scope.ROWS, f"{wanted.path}: {problem}")

    def _frames_of_rows(self, numbers: Sequence[int], num_frames: int) -> list[Sequence[int]]:
        """The frames of the image of each row that must be records or failures."""
        clip, most = self._spec.config.clip_frames, num_frames * self._spec.config.clip_frames
        if self._spec.config.max_frames is None:
            return [range(0, most, clip)] * len(numbers)
        lengths = {n: min(length, most) for each in self._passes for n, length in each.lengths.items()}
        # Of an image without a record, the failures tell; without these, its first frame is missing.
        failed = {number: frames for _, number, frames in self._failed_rows}
        return [
            range(0, lengths[n] - clip + 1, clip) if n in lengths else failed.get(n, range(1))
            for n in numbers
        ]

    def _check_positions(self, failures: pa.Table) -> Iterator[str]:
        """Every split is cut into shards as config.sharding says, if its list of failures tells its rows."""
        info, frames = self._info, self._info.num_frames or 1
        if failures.num_rows != info.num_failures:
            return  # which is a problem of its own
        failed, passes = Counter(failures["split"].to_pylist()), iter(self._passes)
        sizes = {name: (split.num_examples + failed[name]) // frames for name, split in info.splits.items()}
        if self._spec.config.max_frames is not None:
            rows = {name: {n for split, n, _ in self._failed_rows if split == name} for name in info.splits}
            for name, split in info.splits.items():
                for found in itertools.islice(passes, len(split.shards)):
                    rows[name].update(found.lengths)
            sizes, passes = {name: len(numbers) for name, numbers in rows.items()}, iter(self._passes)
        layout = Layout(sizes, Sharding(**info.config["sharding"]), frames)
        for name, split in info.splits.items():
            positions = [found.positions for found in itertools.islice(passes, len(split.shards))]
            if split.shards:
                yield from check_positions(split.shards, positions, layout.ranges(name))

    def check_columns(self) -> None:
        """Compare the columns of a manifest, if any, except labels and splits."""
        if (wanted := self._wanted) is None:
            return
        was, now = ({*names} for names in (self._info.manifest["columns"], wanted.table.column_names))
        compared = {wanted.columns.label, *_labels_and_split(self._columns, self._spec.config)}
        for what, names in (("lacks columns", was - now), ("has new columns", now - was)):
            if names - compared:
                named = ", ".join(sorted(names - compared))
                self._problems.add(Scope.DATASET, f"{wanted.path}: {what}: {named}; {ANEW}")

    def _read_failures(self) -> pa.Table:
        """Id, labels, split and cells of failed volumes; without rows if they cannot be read."""
        name, count, frames = self._info.failures, self._info.num_failures, self._info.num_frames
        found, problems = no_rows(self._spec.config, [*self._cells]), []
        if name is None:
            return found
        path = storage.join(self._output, name)
        try:
            content = read_failures_list(self._output, name, self._info.num_failures)
            if self._info.failures_sha256 not in (None, hashlib.sha256(content).hexdigest()):
                problems.append(f"is not the file that {FILE_NAME} describes; copy it again")
            listed = read_manifest(path, self._columns, content=content, is_list=True)
            folder = storage.dirname(self._info.manifest["path"])
            found = failure_rows(listed, self._spec.config, [*self._cells], self._wanted, folder)
            self._people = pc.unique(people_of(listed)).to_pylist()
            if frames:
                failed = failed_frames(listed, frames, self._spec.config.clip_frames)
                texts = own_cells(listed, "row")
                numbers = (int(text) if _ROW.fullmatch(text) else 0 for text in texts)
                self._failed_rows = list(zip(listed.splits.to_pylist(), numbers, failed, strict=False))
                found = frame_rows(found, failed)
            if found.num_rows != count:
                has = counted(found.num_rows, "frame" if frames else "line")
                problems.append(
                    f"has {has}, but {FILE_NAME} gives {counted(count, 'failure')}; copy it again"
                )
        except FileNotFoundError:
            problems.append(f"is missing, but {FILE_NAME} gives {counted(count, 'failure')}; copy it again")
        except ManifestError as e:
            problems.append("; ".join(e.problems))
        except DatasetError as e:
            problems.append(str(e).removeprefix(f"{path}: "))
        except (TimeoutError, ConnectionError):
            raise  # a store that keeps failing is no fault of the dataset
        except OSError as e:
            problems.append(f"cannot be read: {e}; copy it again")
        for problem in problems:
            self._problems.add(Scope.ROWS, f"{name}: {problem}")
        return found
