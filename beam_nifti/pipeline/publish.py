"""The last step: dataset_info.json, whose presence means that the dataset is complete."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Final

from beam_nifti.config import BuildConfig
from beam_nifti.errors import (
    BuildSummary,
    DatasetError,
    FailureGroup,
    NewerFormatError,
    OutputError,
    PartsChangedError,
    ShardError,
    TooManyFailures,
)
from beam_nifti.pipeline.failures import (
    Failure,
    accepting_fraction,
    format_groups,
    group_failures,
    read_failures,
    write_failures,
)
from beam_nifti.pipeline.lock import LOCK_FILE
from beam_nifti.pipeline.outputs import read_result
from beam_nifti.pipeline.parts import BUILD_FOLDER, parts_root, remove_parts
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.pipeline.saved_plan import SAVED_FILES, SUMMARY_NAME, SavedPlan, SavedWrite
from beam_nifti.record.dataset_files import (
    FAILURES_FILE,
    FILE_NAME,
    MAX_INFO_BYTES,
    failures_file,
    revision_of_failures,
)
from beam_nifti.record.dataset_info import LAST_REVISION, DatasetInfo, ShardInfo, SplitInfo, read_info
from beam_nifti.record.index import Limits, read_index
from beam_nifti.record.sharding import INDEX_FOLDER, ShardName
from beam_nifti.record.totals import RecordTotals
from beam_nifti.record.versions import all_versions
from beam_nifti.storage import disk
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted

ROWS_FILE: Final = "rows.parquet"
"""Beside the parts: the rows of a manifest that is a table in memory, for workers on other machines."""

_REVISION: Final = re.compile(r"-r(\d{1,9})\.")
_REVISION_KEY: Final = re.compile(r'"revision": *(\d{1,9})\b')
_SUMMARY_FILE: Final = f"{BUILD_FOLDER}/{SUMMARY_NAME}"
_MOST_SUMMARY: Final = 1 << 24
"""Bytes of it: numbers, and a few reasons with the names of a few files."""


def too_many_failures(summary: BuildSummary, config: BuildConfig) -> TooManyFailures:
    """The error that reports how many volumes of how many failed, why, and what would accept them."""
    failed, total = summary.num_failed, summary.num_failed + summary.num_written
    head = f"{failed} of {counted(total, 'volume')} failed, more than --max-bad-fraction allows"
    accept = f"--max-bad-fraction {accepting_fraction(failed, total)} accepts them"
    message = "\n  ".join([f"{head}:", *format_groups(summary.reasons, failed), accept])
    volumes = read_failures(summary.failures_path, failed, config.columns, config.output)
    return TooManyFailures(message, summary, volumes)


def find_info(output: str) -> DatasetInfo | None:
    """The info of a complete dataset, if there is one.

    Raises:
        DatasetError: it is damaged.
    """
    if not storage.exists(storage.join(output, FILE_NAME)):
        return None
    return read_info(output)


def find_replaceable(output: str, *, overwrite: bool) -> DatasetInfo | None:
    """As `find_info`, but a damaged dataset is none if it may be overwritten.

    Raises:
        OutputError: it has a later format, whose files this version does not know.
        DatasetError: it is damaged.
    """
    try:
        return find_info(output)
    except NewerFormatError as e:
        raise OutputError(
            f"{e}; --overwrite does not replace it either, because this version does not know which "
            "files it has"
        ) from e
    except DatasetError:
        if overwrite:
            return None
        raise


def refuse_foreign(output: str, written: Collection[str] = (), *, overwrite: bool | None = False) -> None:
    """Refuse an output without a dataset that holds files with the names of shards or of their indexes.

    Args:
        output: folder of the dataset.
        written: names of files that unfinished builds of this output may have written, which are accepted.
        overwrite: whether shards that have their indexes, which builds remove, are accepted too; None if
            nothing can be overwritten.

    Raises:
        OutputError: it holds one.
    """
    files = [*filter(ShardName.parse, storage.list_files(output, "*.tfrecord*"))]
    indexes = storage.list_files(storage.join(output, INDEX_FOLDER), "*.parquet")
    ours = {*written, *(name for name in files if name not in written and _is_indexed(output, name, indexes))}
    accepted = ours if overwrite else {*written}
    known = {shard.index_file for shard in map(ShardName.parse, accepted) if shard}
    found = [name for name in files if name not in accepted]
    found += [
        name
        for stem in (index.removesuffix(".parquet") for index in indexes)
        if ShardName.parse(f"{stem}.tfrecord") and (name := f"{INDEX_FOLDER}/{stem}.parquet") not in known
    ]
    if found:
        is_replaceable = overwrite is not None and found[0] in ours
        remedy = "use --overwrite to replace it" if is_replaceable else "delete it first"
        raise OutputError(
            f"{output}: holds {found[0]} but no {FILE_NAME}; choose another OUTPUT, or {remedy}"
        )


def require_writable_output(output: str) -> None:
    """Refuse, before any work, a local folder that cannot take the files of a dataset.

    Raises:
        OutputError: it cannot be written; or a folder is where a file must go, or a file where a folder must;
            or a symbolic link, FIFO or device is where a file or folder of a build must go.
        OSError: it cannot be written now, but that may pass.
    """
    for name in ("", INDEX_FOLDER, BUILD_FOLDER):
        storage.require_writable(
            storage.join(output, name).rstrip("/"), f"OUTPUT/{name}".rstrip("/"), is_folder=True
        )
    for path in _links(output):
        raise disk.linked(path)
    files = [LOCK_FILE, *SAVED_FILES, FILE_NAME, FAILURES_FILE]
    files += filter(ShardName.parse, storage.list_folders(output))
    files += (
        f"{INDEX_FOLDER}/{n}"
        for n in storage.list_folders(storage.join(output, INDEX_FOLDER))
        if n.endswith(".parquet")
    )
    for name in files:
        storage.require_writable(storage.join(output, name), f"OUTPUT/{name}")


def _links(output: str) -> Iterator[str]:
    """Symbolic links in an output that have names of files or folders of a build."""
    for name in storage.list_links(output):
        is_ours = name in (INDEX_FOLDER, BUILD_FOLDER, LOCK_FILE, FILE_NAME) or revision_of_failures(name)
        if is_ours or ShardName.parse(name):
            yield storage.join(output, name)
    index, parts = storage.join(output, INDEX_FOLDER), storage.join(output, BUILD_FOLDER)
    yield from (storage.join(index, name) for name in storage.list_links(index) if name.endswith(".parquet"))
    for folder in (parts, *(storage.join(parts, name) for name in storage.list_folders(parts))):
        yield from (storage.join(folder, name) for name in storage.list_links(folder))


def publish_info(info: DatasetInfo, output: str) -> None:
    """Write dataset_info.json, if it is one that readers accept.

    Raises:
        OutputError: no reader would accept it. What was published stays as it is.
    """
    path, content = storage.join(output, FILE_NAME), info.to_json().encode()
    try:
        DatasetInfo.from_json(content, path)
    except DatasetError as e:
        raise OutputError(
            f"{output}: the new dataset is not published, because no reader would accept its {FILE_NAME}: "
            f"{e.__cause__ or e}; correct the options or records that this names, or report a bug"
        ) from e
    storage.write(path, content, output)


def publish_dataset(
    plan: BuildPlan,
    shards: Sequence[ShardInfo],
    failures: Sequence[Failure],
    totals: RecordTotals | None = None,
    num_absent: int = 0,
) -> BuildSummary:
    """Write the list of failures and, if they are within the limit, dataset_info.json.

    If they are not, nothing is lost by it: the next run loads only what failed.

    Their order has no effect. One failure may be of an image whose frames are volumes; `num_absent` frames
    are not there, because images may have fewer than others.

    Raises:
        PartsChangedError: a shard or a row is unaccounted for.
    """
    config, totals = plan.config, totals or RecordTotals()
    by_place = {(n.split, n.index): s for s in shards if (n := ShardName.parse(s.name))}
    splits = {split: [(split, i) for i in range(total)] for split, total in plan.shard_totals().items()}
    missing = {place for places in splits.values() for place in places} - by_place.keys()
    num_written, num_failed = sum(s.num_examples for s in shards), sum(len(f.row.positions) for f in failures)
    num_expected = plan.num_examples - num_absent
    if missing or num_written + num_failed != num_expected:
        raise PartsChangedError(
            f"{counted(len(missing), 'shard', 'are')} missing, and {counted(num_written, 'record')} and "
            f"{counted(num_failed, 'failure')} do not make {counted(num_expected, 'volume')}; run the "
            "build again"
        )
    complete = config.allows_failures(num_failed, num_expected)
    published = find_info(config.output)
    failures_path = _write_failures(plan, failures, published, complete)
    summary = BuildSummary(
        num_written=num_written,
        num_failed=num_failed,
        num_bytes=sum(s.num_bytes for s in shards),
        num_shards=len(shards),
        complete=complete,
        failures_path=failures_path,
        failures=_count_failures(failures),
        reasons=tuple(group_failures(failures)),
        num_nonfinite=totals.num_nonfinite,
        num_made_finite=totals.num_made_finite,
        unmapped_labels=tuple(sorted(config.record.label_map.keys() - totals.mapped_labels)),
    )
    _write_summary(config.output, summary)
    if not summary.complete:
        return summary
    info = replace(
        plan.describe(),
        splits={
            split: SplitInfo(tuple(by_place[place] for place in places)) for split, places in splits.items()
        },
        num_failures=num_failed,
        failures=failures_path.rpartition("/")[2] or None,
        failures_sha256=_digest_of(failures_path, config.output)
        if config.record.format_version > 1
        else None,
        mask_labels=tuple(sorted(totals.mask_labels)) if config.record.mask_dtype else None,
        versions=all_versions(),
    )
    if published is None or not _is_same(info, published):
        publish_info(info, config.output)
    lists = {failures_file(plan.revision, config.record.format_version)}
    lists |= {published.failures} if published and published.failures else set()
    for name in lists - {info.failures}:
        storage.delete(storage.join(config.output, name), config.output)
    return summary


def _is_same(info: DatasetInfo, published: DatasetInfo) -> bool:
    """Whether a dataset is the published one, whatever the manifest's file is called in the same folder."""
    names = [storage.dirname(each.manifest["path"]) for each in (info, published)]
    known = replace(
        published,
        revision=info.revision,
        versions=info.versions,
        manifest={**published.manifest, "path": info.manifest["path"]},
    )
    return info == known and names[0] == names[1]


def _digest_of(path: str, below: str) -> str | None:
    """sha256 of a file; None of ""."""
    return hashlib.sha256(storage.read(path, below)).hexdigest() if path else None


def _write_failures(
    plan: BuildPlan, failures: Sequence[Failure], published: DatasetInfo | None, complete: bool
) -> str:
    """Write the list of failures, beside the dataset only if it is about that dataset; its path, or ""."""
    output, config = plan.config.output, plan.config
    if not failures:
        return ""
    if complete or published is None:
        path = storage.join(output, failures_file(plan.revision, config.record.format_version))
    else:
        path = storage.join(output, BUILD_FOLDER, FAILURES_FILE)
    folder = storage.dirname(config.manifest)
    write_failures(path, failures, folder, config.columns, plan.extra_columns, output)
    if complete and published is not None and published.failures:
        known = storage.join(output, published.failures)
        if storage.exists(known) and storage.holds(known, storage.read(path, output), output):
            return known  # nothing has changed, so the dataset keeps its revision
    return path


def _count_failures(failures: Sequence[Failure]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for failure in sorted(failures, key=lambda f: (f.stage, f.error)):
        of_stage = counts.setdefault(failure.stage, {})
        of_stage[failure.error] = of_stage.get(failure.error, 0) + len(failure.row.positions)
    return counts


def _write_summary(output: str, summary: BuildSummary) -> None:
    text = dump_json(asdict(summary))
    storage.write(storage.join(output, _SUMMARY_FILE), text.encode(), output)


def forget_summary(output: str) -> None:
    """Remove what an earlier build said of how it ended."""
    storage.delete(storage.join(output, _SUMMARY_FILE), output)


def take_summary(output: str) -> BuildSummary | None:
    """How the last build in this output ended, if it got that far; forgets it."""
    path = storage.join(output, _SUMMARY_FILE)
    try:
        facts = read_result(path, _MOST_SUMMARY, output)
        groups = (group | {"examples": tuple(group["examples"])} for group in facts["reasons"])
        reasons = tuple(FailureGroup(**group) for group in groups)
        unmapped_labels = tuple(facts["unmapped_labels"])
        summary = BuildSummary(**facts | {"reasons": reasons, "unmapped_labels": unmapped_labels})
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as e:
        raise OutputError(
            f"{path}: differs from what the pipeline wrote: {e!r}; run the command again"
        ) from e
    storage.delete(path, output)
    return summary


def files_of(info: DatasetInfo) -> tuple[str, ...]:
    """Names of the shards of a dataset, and of its list of failures."""
    return (*(shard.name for shard in info.shards), *([info.failures] if info.failures else []))


def next_revision(output: str, published: DatasetInfo | None, dead: int | None) -> int:
    """The revision to make: a later one than any whose files an output holds or has held.

    Args:
        output: folder of the dataset.
        published: the dataset that it holds.
        dead: the revision that an unfinished build in it was to make; None if there is none.

    Raises:
        OutputError: there is no later one.
    """
    if published is None and dead is not None:
        return dead
    last = _last_revision(output) if published is None else published.revision
    if last >= LAST_REVISION:
        raise OutputError(
            f"{output}: holds files of revision {last:,}, and there can be none after it; choose another "
            "OUTPUT"
        )
    return last + 1


def _last_revision(output: str) -> int:
    """The last revision of which an output has files or a damaged dataset_info.json; 0 if it has none."""
    names = [*storage.list_files(output), *storage.list_files(storage.join(output, INDEX_FOLDER))]
    found = [int(match[1]) for match in map(_REVISION.search, names) if match]
    found += [1 for name in names if ShardName.parse(name)]
    with contextlib.suppress(FileNotFoundError):
        text = storage.read_head(storage.join(output, FILE_NAME), MAX_INFO_BYTES).decode(errors="replace")
        found += [1, *(int(digits) for digits in _REVISION_KEY.findall(text))]
    return max(found, default=0)


def remove_files(output: str, written: Collection[str], keep: Collection[str]) -> None:
    """Remove shards, their indexes, and lists of failures that are not among `keep`.

    Files of other programs stay, whatever they are called. The temporary files of dead processes go too.
    `written` has the names of files that builds of this output have written, or may have. A shard is also
    known by its index.
    """
    keep = frozenset(keep)
    index = storage.join(output, INDEX_FOLDER)
    at_top, indexes = storage.list_files(output), set(storage.list_files(index))
    ours = {*written, *keep}
    ours |= {name for name in at_top if name not in ours and _is_indexed(output, name, indexes)}
    stems = {shard.stem: name in keep for name in ours if (shard := ShardName.parse(name))}
    stems |= {shard.stem: True for name in keep if (shard := ShardName.parse(name))}
    for name in sorted(indexes):
        whole = storage.temporary_of(name)
        stem, _, ending = (whole or name).rpartition(".")
        if ending == "parquet" and stem in stems and (whole or not stems[stem]):
            storage.delete(storage.join(index, name), output)
    for name in at_top:
        whole = storage.temporary_of(name)
        if whole in {FILE_NAME, *ours} or (name in ours and name not in keep):
            storage.delete(storage.join(output, name), output)


def clean_up(output: str, saved: SavedPlan | SavedWrite, info: DatasetInfo) -> None:
    """Remove what only a build needed, and the files of the dataset that it has replaced."""
    remove_files(output, saved.written, keep=files_of(info))
    own_root = parts_root(output, None)
    for root in {*saved.parts_roots(output), own_root}:
        remove_parts(root)
        storage.delete(storage.join(root, ROWS_FILE), storage.dirname(root))
        if root != own_root:
            storage.delete_folder(root, storage.dirname(root))
    SavedPlan.remove(output)  # last, because it names the folders of the parts


def _is_indexed(output: str, name: str, indexes: Collection[str]) -> bool:
    """Whether a file is a shard that an index of ours describes."""
    shard = ShardName.parse(name)
    if shard is None or f"{shard.stem}.parquet" not in indexes:
        return False
    try:
        limits = Limits.of_data(storage.join(output, name), output)
        path = storage.join(output, shard.index_file)
        _, facts = read_index(path, columns=[], limits=limits, below=output)
    except (FileNotFoundError, ShardError):
        return False
    return "fingerprint" in facts and facts.get("num_bytes") == str(limits.data_bytes)
