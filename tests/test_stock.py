from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beam_nifti.config import BuildConfig, Sharding
from beam_nifti.record.example import decode_example
from pipelines import stock

Flags = Callable[..., list[str]]


def read_records(shards: Iterable[Path]) -> Iterator[bytes]:
    """The payloads; what frames them is tested elsewhere."""
    for shard in shards:
        content = gzip.decompress(shard.read_bytes())
        at = 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            yield content[at + 12 : at + 12 + length]
            at += length + 16


def by_id(shards: Iterable[Path]) -> dict[str, bytes]:
    payloads = list(read_records(shards))
    records = {bytes(decode_example(p)["id"]).decode(): p for p in payloads}
    assert len(records) == len(payloads)
    return records


def test_records_are_those_of_build(
    cohort: Path, tmp_path: Path, local_flags: Flags, build: Callable[..., Any]
) -> None:
    build(BuildConfig(str(cohort), str(tmp_path / "built"), sharding=Sharding(num_shards=2)))
    prefix = tmp_path / "stock" / "train"

    stock.main([str(cohort), str(prefix), "--num_shards=3", *local_flags(2)])

    shards = sorted(prefix.parent.iterdir())
    assert [s.name for s in shards] == [f"train-{i:05d}-of-00003.tfrecord.gz" for i in range(3)]
    records = by_id(shards)
    assert records == by_id((tmp_path / "built").glob("*.tfrecord.gz"))
    assert sorted(records) == [f"sub-{i:04d}" for i in range(12)]


def test_a_broken_image_fails_the_pipeline(cohort: Path, tmp_path: Path, local_flags: Flags) -> None:
    broken = cohort.parent / "sub-0007.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-20])

    with pytest.raises(Exception, match=r"sub-0007\.nii\.gz: truncated gzip stream"):
        stock.main([str(cohort), str(tmp_path / "stock" / "train"), *local_flags()])

    assert not list(tmp_path.glob("stock/*.tfrecord.gz"))
