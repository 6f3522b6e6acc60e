"""Describes a dataset or a record from dataset_info.json and the indexes."""

from __future__ import annotations

import difflib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import PREPARATIONS, Columns, LabelColumn, ReferenceGrid
from beam_nifti.errors import DatasetError, ManifestError
from beam_nifti.manifest.labels import SHOWN_CLASSES, comparable
from beam_nifti.manifest.manifest import frame_id
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.failures import failed_frames, own_key
from beam_nifti.pipeline.statistics_file import statistics_rows
from beam_nifti.record.dataset_files import read_failures_list
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo, read_info
from beam_nifti.record.index import extra_column
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.record.totals import RecordTotals
from beam_nifti.storage import paths as storage
from beam_nifti.support.document import Document
from beam_nifti.support.outcomes import may_pass
from beam_nifti.support.wording import bytes_text, counted, format_rows, one_line, size_text

_COMPARED_IDS: Final = 50_000  # ids to compare with an unknown one, which takes about a second
_NAME_WIDTH: Final = 14
_SHOWN_SHAPES: Final = 5


class Description(Document):
    """A description of a dataset or of a record; `print(description)` shows it as a table.

    Its items are those of `beam-nifti inspect --json`.
    """

    def __repr__(self) -> str:
        if "example_id" in self:
            return f"<Description of record {self['example_id']!r} in {self['shard']}>"
        return f"<Description of {one_line(self['path'])}: {counted(self['num_examples'], 'example')}>"

    def __str__(self) -> str:
        return format_description(self)


def describe_dataset(output: str) -> dict[str, Any]:
    """The contents of a dataset as JSON values.

    Among them are `splits` (examples, shards and bytes of each), `shape` (None if shapes are mixed; `shapes`
    counts them), `labels` (None if there are none), `label_columns` (of labels with features of their own)
    and `intensities`, in the images' units. If these options were given, there are also `targets` (as
    `intensities`, in the targets' units), `nonfinite`
    (`num_voxels` that were replaced, `num_examples` that had them), `mapped_labels` (`old`, `new`, and the
    `num_examples` that had the old label) and, with `--missing-mask empty`, `num_unmasked`.
    """
    output = storage.absolute(output)
    return describe(output, read_info(output))


def describe(output: str, info: DatasetInfo) -> dict[str, Any]:
    """As `describe_dataset`, for an absolute path and its info."""
    channels = info.config.get("channels") or ("",)
    labels, of_labels = _Numbers(), [_LabelTotals(column) for column in info.labels]
    intensities = defaultdict[str, _Numbers](_Numbers)
    targets = {name: _Numbers() for name in ("min", "max", "mean") if info.record_config.has_target}
    columns, num_unmasked = info.columns, 0
    dtypes, shapes, totals = Counter[str](), Counter[str](), RecordTotals()
    for _, _, table in read_indexes(output, info):
        totals += RecordTotals.of(table)
        masks = [name for name in map(extra_column, columns.masks) if name in table.column_names]
        if columns.missing_mask == "empty" and masks:
            rows = zip(*(table[name].to_pylist() for name in masks), strict=True)
            num_unmasked += sum(not all(cells) for cells in rows)
        labels.add(table["label"])
        for of_label in of_labels:
            of_label.add(table)
        for name in targets:
            targets[name].add(table[f"target_{name}"])
        for (number, channel), name in itertools.product(enumerate(channels), ("min", "max", "mean")):
            column = pc.list_element(table[name], number) if channel and len(table) else table[name]
            intensities[f"{channel} {name}".strip()].add(column)
        dtypes.update(table["dtype"].to_pylist())
        shapes.update(map(size_text, table["shape"].to_pylist()))
    return {
        "path": output,
        "format_version": info.format_version,
        "revision": info.revision,
        "num_examples": info.num_examples,
        "num_bytes": info.num_bytes,
        "splits": {
            name: {
                "num_examples": split.num_examples,
                "num_shards": len(split.shards),
                "num_bytes": split.num_bytes,
            }
            for name, split in info.splits.items()
        },
        "shape": None if info.shape is None else list(info.shape),
        "shapes": dict(shapes.most_common()),
        "dtype": info.dtype,
        "source_dtypes": dict(dtypes.most_common()),
        "labels": labels.summary() if info.labelled else None,
        "label_columns": {of.column.name: of.summary() for of in of_labels},
        "intensities": {name: numbers.summary() for name, numbers in intensities.items()},
        **({"targets": {name: numbers.summary() for name, numbers in targets.items()}} if targets else {}),
        "mask_labels": None if info.mask_labels is None else list(info.mask_labels),
        **({"num_unmasked": num_unmasked} if columns.missing_mask == "empty" else {}),
        **({"mapped_labels": totals.mapped(info.record_config)} if info.config.get("map_labels") else {}),
        **({"nonfinite": totals.nonfinite()} if info.config.get("nonfinite") else {}),
        "failures": {
            "count": info.num_failures,
            "path": storage.join(output, info.failures) if info.failures else None,
        },
        "config": dict(info.config),
        "withdrawals": list(map(asdict, info.withdrawals)),
        "manifest": dict(info.manifest),
        "versions": dict(info.versions),
    }


def describe_record(output: str, example_id: str) -> dict[str, Any]:
    """The index's row of one record, with its split, shard and 0-based number in the shard."""
    return describe_records(output, [example_id])[0]


def describe_records(output: str, example_ids: Sequence[str]) -> list[dict[str, Any]]:
    """As `describe_record`, for several records; each index is read once, until all records are found.

    Returns:
        The descriptions in the order of the ids.

    Raises:
        DatasetError: there is no complete dataset, or it lacks one of the records.
    """
    output = storage.absolute(output)
    info = read_info(output)
    ids: list[pa.ChunkedArray] = []
    found: dict[str, dict[str, Any]] = {}
    for split, shard, table in read_indexes(output, info):
        for example_id in set(example_ids) - found.keys():
            ordinal = pc.index(table["example_id"], example_id).as_py()
            if ordinal >= 0:
                (cells,) = table.slice(ordinal, 1).to_pylist()
                place = {"split": split, "shard": shard.name, "number_in_shard": ordinal}
                cells = {f"manifest_{name}" if name in place else name: cell for name, cell in cells.items()}
                found[example_id] = {"example_id": example_id, **place, **cells}
        if all(example_id in found for example_id in example_ids):
            return [found[example_id] for example_id in example_ids]
        ids.append(table["example_id"])
    missing = next(example_id for example_id in example_ids if example_id not in found)
    raise DatasetError(f"{output}: no record {missing!r}{_hint(output, info, missing, ids)}")


def _hint(output: str, info: DatasetInfo, example_id: str, ids: Sequence[pa.ChunkedArray]) -> str:
    reason = _failure_reason(output, info, info.failures, example_id) if info.failures else None
    if reason is not None:
        return f"; it failed: {reason}"
    known = itertools.chain.from_iterable(column.to_pylist() for column in ids)
    close = difflib.get_close_matches(example_id, itertools.islice(known, _COMPARED_IDS), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the ids of its {info.num_examples} records are in the column example_id of index/*.parquet"


def _failure_reason(output: str, info: DatasetInfo, file: str, example_id: str) -> str | None:
    columns, path = Columns(**info.config["columns"]), storage.join(output, file)
    try:
        content = read_failures_list(output, file, info.num_failures)
        failures = read_manifest(path, columns, content=content, is_list=True)
        clip = info.record_config.clip_frames
        failed = failed_frames(failures, info.num_frames, clip) if info.num_frames else []
    except (ManifestError, OSError) as e:
        if may_pass(e):
            raise
        raise DatasetError(f"{path}: cannot be read ({e}); run beam-nifti verify") from e
    # Where paths are the ids, the list of failures holds them with the manifest's folder.
    in_folder = storage.join(storage.dirname(info.manifest["path"]), example_id)
    lines = {image_id: line for line, image_id in enumerate(failures.ids.to_pylist())}
    if info.num_frames:
        lines = {frame_id(name, t): line for name, line in lines.items() for t in failed[line]}
    for wanted in (example_id, in_folder):
        if wanted in lines:
            cells = failures.table.slice(lines[wanted], 1).to_pylist()[0]
            stage, message = (cells.get(own_key(key, columns)) for key in ("stage", "message"))
            return f"{stage}: {message} (see {file})"
    return None


def read_indexes(output: str, info: DatasetInfo) -> Iterator[tuple[str, ShardInfo, pa.Table]]:
    """The split, the shard and the index of each shard."""
    for split, found in info.splits.items():
        for shard in found.shards:
            yield split, shard, read_shard_index(output, info, shard)


@dataclass
class _Numbers:
    """Count, range and mean of numbers, added column by column."""

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, column: pa.ChunkedArray) -> None:
        count = len(column) - column.null_count
        if count:
            self.count += count
            self.total += pc.sum(column).as_py()
            self.low = min(self.low, pc.min(column).as_py())
            self.high = max(self.high, pc.max(column).as_py())

    def summary(self) -> dict[str, float | None]:
        if not self.count:
            return {"count": 0, "min": None, "max": None, "mean": None}
        mean = self.total / self.count
        return {"count": self.count, "min": self.low, "max": self.high, "mean": mean}


@dataclass
class _LabelTotals:
    """Totals of one label over all indexes."""

    column: LabelColumn
    numbers: _Numbers = field(default_factory=_Numbers)
    values: Counter[str] = field(default_factory=Counter)
    missing: int = 0

    def add(self, table: pa.Table) -> None:
        values = comparable(table[extra_column(self.column.name)], self.column)
        self.missing += values.null_count
        if self.column.kind == "float":
            self.numbers.add(values)
        else:
            counts = pc.value_counts(values.drop_null()).to_pylist()
            self.values.update({c["values"]: c["counts"] for c in counts})

    def summary(self) -> dict[str, Any]:
        """Of a float as `_Numbers`; of a class the count of each class; of a string the number of values."""
        kind = self.column.kind
        if kind == "float":
            found: dict[str, Any] = self.numbers.summary()
        elif kind == "class":
            found = {"classes": {name: self.values[name] for name in self.column.classes or ()}}
        else:
            found = {"count": self.values.total(), "different": len(self.values)}
        return {"kind": kind, **found, "missing": self.missing}


def format_description(description: Mapping[str, Any]) -> str:
    """A description, of a dataset or of a record, as text for the screen."""
    if "example_id" in description:
        width = max(_NAME_WIDTH, *(len(name) + 2 for name in description))
        lines = ((name, enumerate(_value_lines(name, value))) for name, value in description.items())
        return format_rows((("" if i else name, text) for name, texts in lines for i, text in texts), width)
    return format_rows(_dataset_rows(description), _NAME_WIDTH)


def _dataset_rows(d: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    config, manifest, failures = d["config"], d["manifest"], d["failures"]
    yield "dataset", f"{d['path']}  (format {d['format_version']}, revision {d['revision']})"
    yield "examples", f"{d['num_examples']:,} in {bytes_text(d['num_bytes'])}"
    for name, split in d["splits"].items():
        shards = counted(split["num_shards"], "shard")
        yield f"  {name}", f"{split['num_examples']:,} in {shards}, {bytes_text(split['num_bytes'])}"
    if drawn := config.get("splitting"):
        shares = ", ".join(f"{name} {share:g}" for name, share in drawn["shares"].items())
        within = f", within each {drawn['stratify']}" if drawn["stratify"] else ""
        yield "  drawn", f"{shares}{within}, seed {drawn['seed']}"
    for number, (shape, count) in enumerate(itertools.islice(d["shapes"].items(), _SHOWN_SHAPES)):
        text = f"{shape} {d['dtype']}"
        yield "" if number else "voxels", text if d["shape"] else f"{text}: {counted(count, 'volume')}"
    if len(d["shapes"]) > _SHOWN_SHAPES:
        yield "", f"and {counted(len(d['shapes']) - _SHOWN_SHAPES, 'more shape')}"
    yield "on disk", ", ".join(f"{dtype} ({count:,})" for dtype, count in d["source_dtypes"].items())
    level = f" level {config['compression_level']}" if config["compression"] == "gzip" else ""
    frames = "".join(
        f", {name} {config[name]}" for name in ("frames", "complex", "align") if config.get(name)
    )
    within = f" within {config['rescale_within']}" if config.get("rescale_within") else ""
    rescale = f"rescale {config['rescale']}{within}{', clipped' if config.get('clip') else ''}"
    yield "written with", f"{rescale}, compression {config['compression']}{level}{frames}"
    if config.get("rescale_stats"):
        found = config["rescale_stats"]
        yield "statistics", f"{counted(found['num_volumes'], 'volume')} of {', '.join(found['splits'])}"
        for name, text in statistics_rows(found):
            yield f"  {name}" if name else "", text
    if config.get("channels"):
        yield "channels", ", ".join(config["channels"])
    prepared = [_option_text(name, config[name]) for name in PREPARATIONS if config.get(name) is not None]
    if prepared:
        yield "prepared with", ", ".join(prepared)
    if d["label_columns"]:
        for number, (name, label) in enumerate(d["label_columns"].items()):
            yield "" if number else "labels", f"{name}: {_label_text(label)}"
    else:
        yield "labels", _numbers_text(d["labels"]) if d["labels"] else "none"
    for number, (name, numbers) in enumerate(d["intensities"].items()):
        width = max(map(len, d["intensities"])) + 1
        yield "" if number else "intensities", f"{name:<{width}}{_numbers_text(numbers)}"
    for number, (name, numbers) in enumerate(d.get("targets", {}).items()):
        yield "" if number else "targets", f"{name:<5}{_numbers_text(numbers)}"
    if replaced := d.get("nonfinite"):
        voxels, examples = (
            counted(replaced["num_voxels"], "voxel"),
            counted(replaced["num_examples"], "example"),
        )
        yield "not finite", f"{voxels} of {examples}, replaced"
    if config.get("masks"):
        yield "masks", ", ".join(config["masks"])
    if d["mask_labels"] is not None:
        yield "mask labels", " ".join(map(str, d["mask_labels"])) or "none"
    if "num_unmasked" in d:
        yield "  empty", f"in {counted(d['num_unmasked'], 'example')} without a mask"
    for number, mapped in enumerate(d.get("mapped_labels", ())):
        text = f"{mapped['old']} to {mapped['new']} in {counted(mapped['num_examples'], 'example')}"
        yield "" if number else "  mapped", text
    yield (
        "failed",
        f"{counted(failures['count'], 'volume')}: {failures['path']}" if failures["count"] else "none",
    )
    skipped = manifest.get("num_skipped", 0)
    lacking = Columns(**config["columns"]).lacking
    yield "skipped", f"{counted(skipped, 'row')} without a {lacking}" if skipped else "none"
    for number, withdrawal in enumerate(d["withdrawals"]):
        yield "" if number else "withdrawn", withdrawal_text(withdrawal)
    anonymous = ", anonymous ids" if manifest.get("key_check") else ""
    up_to = "up to " if config.get("max_frames") else ""
    what = "clips" if ":" in (config.get("frames") or "") else "frames"
    of_frames = f" of {up_to}{manifest['num_frames']} {what}" if "num_frames" in manifest else ""
    yield "manifest", f"{manifest['path']}  ({counted(manifest['num_rows'], 'row')}{of_frames}{anonymous})"
    yield "versions", ", ".join(f"{name} {version}" for name, version in d["versions"].items())


def withdrawal_text(withdrawal: Mapping[str, Any]) -> str:
    """What was removed with participants who were withdrawn, given the fields of a `Withdrawal`."""
    counts = (counted(withdrawal[f"num_{noun}s"], noun) for noun in ("example", "failure"))
    people = counted(withdrawal["num_people"], "participant")
    return (
        f"{people} with {' and '.join(counts)}, in revision {withdrawal['revision']} ({withdrawal['time']})"
    )


def _option_text(name: str, value: str | bool | float | Sequence[str | float] | Mapping[str, Any]) -> str:
    """An option as on the command line."""
    if isinstance(value, Mapping):
        return f"{name} {ReferenceGrid(**value)}"
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    text = "" if value is True else " " + ",".join(n if isinstance(n, str) else f"{n:g}" for n in items)
    return f"{name.replace('_', '-')}{text}"


def _value_lines(name: str, value: Any) -> Iterator[str]:
    if value is None:
        yield ""
    elif name in ("shape", "source_shape"):
        yield size_text(value)
    elif name in ("affine", "source_affine"):
        for i in range(0, 16, 4):
            yield " ".join(f"{n:>12.6g}" for n in value[i : i + 4])
    elif name in ("source_mtime", "source_mtimes"):
        for time in value if isinstance(value, list) else [value]:
            try:
                yield datetime.fromtimestamp(time, UTC).isoformat(" ", "seconds")
            except (ValueError, OverflowError, OSError):  # of no year that a date can have
                yield f"{time:g}"
    elif name == "source_versions":
        yield ", ".join(version or "none" for version in value)
    elif isinstance(value, list):
        yield " ".join(str(n) if isinstance(n, int) else f"{n:g}" for n in value)
    else:
        yield str(value)


def _label_text(label: Mapping[str, Any]) -> str:
    if label["kind"] == "float":
        text = _numbers_text(label)
    elif label["kind"] == "class":
        counts = list(label["classes"].items())
        text = ", ".join(
            f"{number} = {name} ({count:,})" for number, (name, count) in enumerate(counts[:SHOWN_CLASSES])
        )
        text += f", and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
    else:
        text = f"{label['count']:,}, {label['different']:,} different"
    missing = f", {label['missing']:,} missing" if label["missing"] else ""
    return f"{label['kind']}, {text}{missing}"


def _numbers_text(numbers: Mapping[str, float | None]) -> str:
    if not numbers["count"]:
        return "none"
    return f"{numbers['min']:g} to {numbers['max']:g}, mean {numbers['mean']:g}"
