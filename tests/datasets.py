"""Tiny datasets, built for real, and ways to damage them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from beam_nifti.errors import ShardError
from beam_nifti.pipeline.build import open_build, run_build
from beam_nifti.record.dataset_info import DatasetInfo, content_digest, read_info
from beam_nifti.record.index import read_index, write_index
from beam_nifti.record.tfrecord import EncodedRecord, decode_record, encode_members
from beam_nifti.record.tiles import find_cuts
from beam_nifti.storage.paths import Stat
from beam_nifti.volume.files import Source
from tests.images import AFFINE

SOURCE = Source(((Stat(1, 1.0),),), (6, 5, 4), tuple(AFFINE.ravel().tolist()))
"""Of an example that was made of no file."""


def build_dataset(manifest: Path, output: Path, record: RecordConfig | None = None, **config: Any) -> Path:
    """Build in this process, by default two shards a split; the output."""
    config = {"sharding": Sharding(num_shards=2)} | config
    build = BuildConfig(str(manifest), str(output), record=record or RecordConfig(), **config)
    flags = [
        "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
        "--direct_running_mode=multi_threading",
        "--direct_num_workers=1",
    ]
    with open_build(build) as plan:
        run_build(plan, PipelineOptions(flags))
    return output


def info_of(output: Path) -> DatasetInfo:
    """The dataset's info."""
    return read_info(str(output))


def records_of(output: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The row of the index and the payload of each record, in the order of the dataset."""
    for shard in info_of(output).shards:
        table, _ = read_index(str(output / shard.index))
        data = (output / shard.name).read_bytes()
        for cells in table.to_pylist():
            record = data[cells["offset"] : cells["offset"] + cells["length"]]
            yield cells, decode_record(record, shard.name.endswith(".gz"))


def index_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of all indexes, in the order of the dataset."""
    tables = (read_index(str(output / shard.index))[0] for shard in info_of(output).shards)
    return [row for table in tables for row in table.to_pylist()]


def failures_of(output: Path) -> list[dict[str, Any]]:
    """The lines of failures.jsonl."""
    return [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]


def decompressed_files(folder: Path) -> dict[str, bytes]:
    """The name and the content of every file; of a Parquet file what it holds, and its metadata."""
    found = {}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            data = repr((table.to_pylist(), table.schema.metadata)).encode()
        found[str(path.relative_to(folder))] = data
    return found


def edit_info(output: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change dataset_info.json in place."""
    path = output / "dataset_info.json"
    facts = json.loads(path.read_text())
    edit(facts)
    write_info(path, facts)


def write_info(path: Path, facts: dict[str, Any]) -> None:
    """Write dataset_info.json, with the digest of what it holds, as whoever changes it on purpose does."""
    if facts["format_version"] != 1:
        facts["digest"] = content_digest(facts)
    path.write_text(json.dumps(facts))


def manifest_of(output: Path) -> str:
    """The manifest that a dataset was built from."""
    return str(info_of(output).manifest["path"])


def edit_index(output: Path, edit: Callable[[pa.Table], pa.Table], shard: int = 0) -> None:
    """Replace the table of a shard's index; its facts stay."""
    index = info_of(output).shards[shard].index
    table, facts = read_index(str(output / index))
    replace_index(output, index, edit(table), facts)


def replace_index(output: Path, index: str, table: pa.Table, facts: dict[str, str]) -> None:
    """Write an index, and its sha256 into dataset_info.json."""
    write_index(str(output / index), table, facts)
    digest = hashlib.sha256((output / index).read_bytes()).hexdigest()

    def agree(facts: dict[str, Any]) -> None:
        for split in facts["splits"].values():
            for entry in split["shards"]:
                if entry["index"] == index:
                    entry["index_sha256"] = digest

    edit_info(output, agree)


def set_cell(column: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    """An edit of one cell of an index."""

    def edit(table: pa.Table) -> pa.Table:
        cells = table[column].to_pylist()
        cells[row] = value
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array(cells, table.schema.field(column).type))

    return edit


def encode_record(payload: bytes, level: int | None) -> bytes:
    """One framed record in one member."""
    return b"".join(encode_members([payload], level).pieces)


def edit_record(output: Path, row: int, edit: Callable[[bytes], bytes], shard: int = 0) -> None:
    """Change a record's payload; checksums, index and info are made to agree with it."""
    config = info_of(output).config
    compressed = config["compression"] == "gzip"
    level = config["compression_level"] if compressed else None

    def encode(record: bytes) -> EncodedRecord:
        payload = edit(decode_record(record, compressed))
        cuts = list[int]()
        with contextlib.suppress(ShardError, KeyError):  # it may be no Example any more
            cuts = find_cuts(payload, compressed)
        return encode_members([payload], level, cuts)

    edit_stored(output, row, encode, shard)


def edit_stored(output: Path, row: int, edit: Callable[[bytes], EncodedRecord], shard: int = 0) -> None:
    """Change a record as it is stored; index and info are made to agree with it."""
    target = info_of(output).shards[shard]
    table, facts = read_index(str(output / target.index))
    content = (output / target.name).read_bytes()
    offsets, lengths = table["offset"].to_pylist(), table["length"].to_pylist()
    records = [content[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
    encoded = edit(records[row])
    records[row] = b"".join(encoded.pieces)
    table = set_cell("member_lengths", row, encoded.lengths)(table)
    lengths = [len(r) for r in records]
    table = table.set_column(
        table.column_names.index("offset"),
        "offset",
        pa.array([sum(lengths[:i]) for i in range(len(lengths))], pa.int64()),
    ).set_column(table.column_names.index("length"), "length", pa.array(lengths, pa.int64()))
    content = b"".join(records)
    new = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    (output / target.name).write_bytes(content)
    replace_index(output, target.index, table, facts | {k: str(v) for k, v in new.items()})

    def agree(facts: dict[str, Any]) -> None:
        for split in facts["splits"].values():
            for entry in split["shards"]:
                if entry["name"] == target.name:
                    entry |= new
            split["num_bytes"] = sum(e["num_bytes"] for e in split["shards"])

    edit_info(output, agree)


def set_times(folder: Path) -> None:
    """Give the files of a folder times of their own, the same wherever it is copied to."""
    for number, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (1_600_000_000 + 100 * number,) * 2)


_READ_AND_FORK = """
import os, signal, sys
from beam_nifti.random_access import Dataset

records = Dataset(sys.argv[1])
images = [records[0]["image"].tobytes(), records[7]["image"].tobytes()]
child = os.fork()
signal.alarm(60)  # a client that does not outlive the fork may wait without end
if child == 0:
    again = [records[0]["image"].tobytes(), records[7]["image"].tobytes()]
    os._exit(again != images)
assert os.waitpid(child, 0)[1] == 0, "the child read something else, or nothing"
assert "apache_beam" not in sys.modules
"""


def read_without_beam_and_fork(url: str) -> None:
    """Read a dataset in a new process and in a fork of it, as the workers of PyTorch's DataLoader do."""
    command = [sys.executable, "-c", _READ_AND_FORK, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def nested_parquet(depth: int) -> bytes:
    """A Parquet file without rows, of a column of so many groups, one in the other."""
    group = b"\x35\x00\x18\x01g\x15\x02\x00"  # optional, its name, one child
    root, leaf = b"\x48\x06schema\x15\x02\x00", b"\x15\x0c\x25\x00\x18\x01x\x00"
    schema = b"\xfc" + _thrift_size(depth + 2) + root + group * depth + leaf
    footer = b"\x15\x02\x19" + schema + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _thrift_size(size: int) -> bytes:
    return bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
