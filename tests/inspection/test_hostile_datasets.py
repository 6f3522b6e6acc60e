"""Damaged and lying datasets: right values or an error that names the file, soon and in little memory.

500 cases run with the other tests; more at night, each time others:

    pytest tests/inspection/test_hostile_datasets.py --hypothesis-profile=nightly
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.errors import BeamNiftiError
from beam_nifti.inspection.description import describe_dataset, describe_record, format_description
from beam_nifti.inspection.diff import compare_datasets
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import verify_dataset
from beam_nifti.random_access import Dataset
from beam_nifti.record import shard_index
from beam_nifti.record.dataset_info import DatasetInfo, content_digest
from beam_nifti.record.index import read_index, write_index
from beam_nifti.record.tfrecord import decode_record, encode_members
from tests.build_helpers import build
from tests.datasets import info_of
from tests.images import write_cohort, write_image, write_manifest
from tests.peak import peak_growth

SHAPE = (48, 32, 32)
"""Large enough that the honest dataset takes more memory than chance does."""

BOX = (slice(10, 30), slice(3, 31), slice(0, 9))
"""Of a patch, which touches some of the members of a record."""

MOST_SECONDS = 10.0
MOST_GROWTH = 3.0
"""The most CPU time that a changed dataset may take, and the most memory relative to the honest one."""

FREE_BYTES = 16 << 20
"""Memory that differs from one reading of the same dataset to the next: of threads and allocators."""

KEPT = 16
"""Parsed indexes."""

OPTIONS: dict[str, dict[str, Any]] = {
    "gzip": {"columns": {"mask": "mask", "label": "label:float,site:string"}, "allow_mixed_shapes": True},
    "native": {"voxel_dtype": "native", "compression": "none", "rescale": "percentile:1,99"},
}
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2, 1 << 31, 1 << 62, 1 << 64, 10**400, 0.5, 1e308, "", "0", "../x", "/dev/zero"),
    *("a" * 1000, "\ud800", "é", "failures.jsonl", [], [1], [1 << 40] * 3, [None], {}, {"a": 1}, [[[]]]),
]
"""Values that are put in the place of others."""


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """Parse the same bytes once for all that reads a dataset: what comes of them depends on nothing else."""
    parse, parsed = shard_index.parse_index, dict[tuple[bytes, str], tuple[pa.Table, dict[str, str]]]()

    def parse_index(data: bytes, *arguments: object) -> tuple[pa.Table, dict[str, str]]:
        key = data, repr(arguments)
        if key not in parsed:
            if len(parsed) == KEPT:
                parsed.clear()
            parsed[key] = parse(data, *arguments)
        table, facts = parsed[key]
        return table, dict(facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_index, "parse_index", parse_index)
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name a dataset of four records in two shards, and of one failure."""
    folder = tmp_path_factory.mktemp("hostile")
    write_cohort(folder, 5, shape=SHAPE)
    (folder / "sub-0004.nii.gz").write_bytes(b"no image")
    write_image(folder / "mask.nii", (np.arange(math.prod(SHAPE)) % 3).astype(np.uint8).reshape(SHAPE))
    rows = [
        {
            "participant_id": f"sub-000{i}",
            "path": f"sub-000{i}.nii.gz",
            "mask": "mask.nii",
            "label": i,
            "site": "AB"[i % 2],
        }
        for i in range(5)
    ]
    manifest = write_manifest(folder / "manifest.tsv", rows)
    for name, options in OPTIONS.items():
        build(manifest, folder / name, num_shards=2, max_bad_fraction=0.5, **options)
    return {name: folder / name for name in OPTIONS}


class Changed:
    """A dataset that is changed, and as it was again afterwards.

    Args:
        folder: of the dataset.
        rng: decides what is changed.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self._held: dict[Path, bytes] = {}

    def __enter__(self) -> Changed:
        return self

    def __exit__(self, *_: object) -> None:
        for path, content in self._held.items():
            path.write_bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """Change a file."""
        path = self.folder / name
        self._held.setdefault(path, path.read_bytes())
        path.write_bytes(content)

    @property
    def is_changed(self) -> bool:
        """Whether a file has other bytes."""
        return any(path.read_bytes() != content for path, content in self._held.items())

    def change_bytes(self) -> None:
        """Damage a file."""
        names = [
            "dataset_info.json",
            "failures.jsonl",
            *(f for s in info_of(self.folder).shards for f in (s.name, s.index)),
        ]
        name = self.rng.choice(names)
        self.write(name, damage(self.folder.joinpath(name).read_bytes(), self.rng))

    def change_info(self, edit: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Change what dataset_info.json says, so that its digest is right."""
        facts = json.loads(self.folder.joinpath("dataset_info.json").read_text())
        (edit or self._change_value)(facts)
        if isinstance(facts, dict):
            facts["digest"] = content_digest(facts)
        self.write("dataset_info.json", json.dumps(facts).encode())

    def _change_value(self, facts: Any) -> None:
        while True:
            keys = list(facts) if isinstance(facts, dict) else range(len(facts))
            key = self.rng.choice(keys)
            if isinstance(facts[key], dict | list) and facts[key] and self.rng.random() < 0.8:
                facts = facts[key]
            elif self.rng.random() < 0.2:
                del facts[key]
                return
            else:
                facts[key] = self.rng.choice(ODD)
                return

    def _agree(self, shard: Any, **facts: object) -> None:
        def agree(info: dict[str, Any]) -> None:
            for split in info["splits"].values():
                for entry in split["shards"]:
                    entry |= facts if entry["name"] == shard.name else {}
                split["num_bytes"] = sum(entry["num_bytes"] for entry in split["shards"])

        self.change_info(agree)

    def change_index(self) -> None:
        """Change a cell, a column or the rows of an index, so that its checksum is right."""
        shard = self.rng.choice(info_of(self.folder).shards)
        table, facts = read_index(str(self.folder / shard.index))
        self._write_index(shard, change_table(table, self.rng), facts)

    def _write_index(self, shard: Any, table: pa.Table, facts: dict[str, str], **of_shard: object) -> None:
        made = self.folder.parent / "made.parquet"
        write_index(str(made), table, facts)
        self.write(shard.index, made.read_bytes())
        self._agree(shard, index_sha256=hashlib.sha256(made.read_bytes()).hexdigest(), **of_shard)

    def change_record(self) -> None:
        """Change the payload of a record, so that all checksums are right."""
        info = info_of(self.folder)
        shard = self.rng.choice(info.shards)
        compressed = info.config["compression"] == "gzip"
        table, facts = read_index(str(self.folder / shard.index))
        content = self.folder.joinpath(shard.name).read_bytes()
        places = list(zip(table["offset"].to_pylist(), table["length"].to_pylist(), strict=True))
        records = [content[offset : offset + length] for offset, length in places]
        if not records:
            return
        at = self.rng.randrange(len(records))
        payload = damage(decode_record(records[at], compressed), self.rng)
        places = range(1, max(len(payload), 1))
        cuts = sorted(self.rng.sample(places, min(self.rng.randrange(4), len(places))))
        encoded = encode_members([payload], 1 if compressed else None, cuts)
        records[at] = b"".join(encoded.pieces)
        members = table["member_lengths"].to_pylist()
        members[at] = encoded.lengths
        column = table.column_names.index("member_lengths")
        table = table.set_column(column, "member_lengths", pa.array(members, table.schema.types[column]))
        lengths = np.array([len(record) for record in records])
        for name, numbers in (("length", lengths), ("offset", np.cumsum(lengths) - lengths)):
            table = table.set_column(table.column_names.index(name), name, pa.array(numbers, pa.int64()))
        content = b"".join(records)
        new = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        self.write(shard.name, content)
        self._write_index(shard, table, facts | {key: str(value) for key, value in new.items()}, **new)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, put in, doubled, or all of another file."""
    changed, at = bytearray(content), rng.randrange(len(content) or 1)
    kind = rng.randrange(6)
    if kind == 0 and changed:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and changed:
        changed[at] = rng.choice([0, 0x7F, 0x80, 0xFF])
    elif kind == 2:
        del changed[at : at + rng.choice([1, 8, 1000])]
    elif kind == 3:
        changed[at:at] = rng.choice([b"\0", b"\xff" * 10, rng.randbytes(20), b"\x80" * 1000])
    elif kind == 4:
        changed[at : at + 8] = rng.choice([b"\xff" * 8, rng.randbytes(8), (1 << 40).to_bytes(8, "little")])
    else:
        changed *= rng.choice([0, 2])
    return bytes(changed)


def change_table(table: pa.Table, rng: random.Random) -> pa.Table:
    """A cell, a column, or the rows of a table changed."""
    name = rng.choice(table.column_names)
    column, kind = table.column_names.index(name), table.schema.field(name).type
    if (what := rng.random()) < 0.1:
        return table.drop_columns([name])
    if what < 0.2:
        return table.take(
            pa.array([rng.randrange(table.num_rows) for _ in range(rng.randrange(2000))], pa.int64())
        )
    if what < 0.3:
        other = rng.choice([pa.nulls(table.num_rows), pa.array([[{"a": 1}]] * table.num_rows), table[0]])
        return table.set_column(column, name, other)
    cells = table[name].to_pylist()
    at = rng.randrange(len(cells))
    held = cells[at]
    for odd in rng.sample(ODD, len(ODD)):
        cells[at] = odd
        if isinstance(held, list) and held and rng.random() < 0.5:
            cells[at] = [*held[:-1], odd]
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            return table.set_column(column, name, pa.array(cells, kind))
    return table


def values_of(path: str) -> dict[str, dict[str, Any]]:
    """What a reader gives, by the ids of the records."""
    features = info_of(Path(path)).features
    columns = ["label", "affine", "zooms", *(name.removesuffix("_raw") for name in features)]
    return {element["id"]: element for element in Dataset(path, columns=columns)}


def patches_of(path: str) -> dict[str, Any]:
    """A patch of each record, by the ids of the records."""
    records = Dataset(path, columns=["id", "image"])
    corner, shape = [part.start for part in BOX], [part.stop - part.start for part in BOX]
    elements = (records.patch(number, corner, shape) for number in range(len(records)))
    return {element["id"]: element["image"] for element in elements}


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values of a reader are the same."""
    if isinstance(one, str | bytes | None):
        return bool(one == other)
    return np.array_equal(one, other, equal_nan=True)


@contextlib.contextmanager
def refused(folder: Path) -> Iterator[list[str]]:
    """An error of this package or of the disk, that names a file; its text."""
    told: list[str] = []
    try:
        yield told
    except (BeamNiftiError, OSError) as e:
        told.append(f"{e} {getattr(e, 'filename', '')}")
        assert str(folder) in told[0], told


@dataclass(frozen=True, repr=False)
class Honest:
    """A dataset as it was built.

    Attributes:
        values: what a reader gives, by the ids of the records.
        info: the bytes of its dataset_info.json.
        growth: bytes of memory that it takes to read it in all ways.
    """

    values: dict[str, dict[str, Any]]
    info: bytes
    growth: int


@pytest.fixture(scope="module")
def honest(datasets: dict[str, Path]) -> dict[Path, Honest]:
    """What is known of each dataset before it is changed."""
    known = {}
    for folder in datasets.values():
        assert verify_dataset(str(folder)).ok
        found = Honest(values_of(str(folder)), folder.joinpath("dataset_info.json").read_bytes(), 0)
        growths = []
        for _ in range(3):
            with peak_growth() as growth:
                read_in_all_ways(folder, found, is_damaged=False)
            growths.append(growth())
        known[folder] = replace(found, growth=min(growths))  # what is loaded on first use is not of the data
    return known


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=max(500, settings().max_examples))
@given(seed=st.integers(0, 2**64))
def test_a_changed_dataset_is_right_or_refused(
    datasets: dict[str, Path], honest: dict[Path, Honest], seed: int
) -> None:
    rng = random.Random(seed)
    folder = datasets[rng.choice(list(OPTIONS))]
    with Changed(folder, rng) as changed:
        change = rng.choice(
            [changed.change_bytes, changed.change_info, changed.change_index, changed.change_record]
        )
        change()
        is_damaged = change == changed.change_bytes and changed.is_changed
        with peak_growth() as growth:
            started = time.process_time()  # CPU, whatever else this machine does
            read_in_all_ways(folder, honest[folder], is_damaged)
            assert time.process_time() - started < MOST_SECONDS
        assert growth() < MOST_GROWTH * honest[folder].growth + FREE_BYTES


def read_in_all_ways(folder: Path, honest: Honest, is_damaged: bool) -> None:
    """Read a dataset with all that reads one: each gives what is right, or an error that names a file."""
    found = {}
    with refused(folder) as told:
        found = values_of(str(folder))
    if is_damaged and not told:
        assert found.keys() == honest.values.keys()
        for example_id, element in found.items():
            right = honest.values[example_id]
            assert all(is_equal(right[name], value) for name, value in element.items())
    with refused(folder) as told:
        report = verify_dataset(str(folder), workers=1)
        assert not report.problems or all(re.match(r"[\w./-]+: ", problem) for problem in report.problems)
    if is_damaged and not told:
        assert report.problems or is_same(folder, honest)
    with refused(folder) as told:
        patches = patches_of(str(folder))
    if not told:
        for example_id in patches.keys() & found.keys():
            assert is_equal(found[example_id]["image"][BOX], patches[example_id])
    with refused(folder):
        assert format_description(describe_dataset(str(folder)))
    with refused(folder):
        assert format_description(describe_record(str(folder), "sub-0000"))
    with refused(folder):
        assert compare_datasets(str(folder), str(folder)).is_empty
    with refused(folder):
        assert read_volume(str(folder), "sub-0001").voxels.shape[:3] == SHAPE


def is_same(folder: Path, honest: Honest) -> bool:
    """Whether what changed is only how dataset_info.json is written."""
    text = folder.joinpath("dataset_info.json").read_bytes()
    if text == honest.info:
        return False
    return DatasetInfo.from_json(text, "x") == DatasetInfo.from_json(honest.info, "x")
