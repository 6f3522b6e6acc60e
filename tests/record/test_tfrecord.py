"""TFRecord framing: TensorFlow's bytes, readable by others, and no damage goes unseen."""

from __future__ import annotations

import contextlib
import gzip
import struct
import subprocess
import threading
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.errors import ShardError
from beam_nifti.record.tfrecord import (
    EMPTY_MEMBER,
    FOOTER_BYTES,
    HEADER_BYTES,
    decode_record,
    encode_members,
    member_lengths,
    member_sizes,
)
from tests.datasets import encode_record

GOLDEN = Path(__file__).parents[1] / "golden"  # made by TensorFlow: see make.py there
PAYLOADS = [b"", b"a", b"golden record", bytes(range(256)) * 40]
LEVELS = [None, 0, 1, 2, 3]
THREADS = 400


def test_records_are_tensorflows_bytes() -> None:
    records = b"".join(encode_record(payload, None) for payload in PAYLOADS)
    assert records == (GOLDEN / "records.tfrecord").read_bytes()
    packed = gzip.decompress((GOLDEN / "records.tfrecord.gz").read_bytes())
    for level in range(4):
        members = b"".join(encode_record(payload, level) for payload in PAYLOADS)
        assert gzip.decompress(members) == packed == records


CUTS = [[], [1], [12, 5000], [100, 101, 9000, 10_239], [100, len(PAYLOADS[3])]]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_record_of_several_members_holds_what_one_member_holds(level: int | None, cuts: list[int]) -> None:
    encoded = encode_members([PAYLOADS[3]], level, cuts)
    record, plain = b"".join(encoded.pieces), encode_record(PAYLOADS[3], None)
    assert sum(encoded.lengths) == len(record)
    assert len(encoded.lengths) == len(cuts) + 1
    assert decode_record(record, compressed=level is not None) == PAYLOADS[3]
    bounds = pairwise(accumulate(encoded.lengths, initial=0))
    pieces = [record[start:end] for start, end in bounds]
    if level is None:
        assert record == plain
    else:
        assert gzip.decompress(record) == plain
        assert member_lengths(memoryview(record)) == list(encoded.lengths)
        pieces = list(map(gzip.decompress, pieces))
        assert list(map(len, pieces)) == member_sizes(memoryview(record))
    ends = [0, *(HEADER_BYTES + cut for cut in cuts), len(plain)]
    assert pieces == [plain[start:end] for start, end in pairwise(ends)]


def test_a_member_of_several_says_its_length() -> None:
    encoded = encode_members([PAYLOADS[3]], 2, [100])
    record = b"".join(encoded.pieces)
    for start, length in ((0, encoded.lengths[0]), encoded.lengths):
        head = struct.unpack("<HBBIBBH2sHI", record[start : start + 20])
        assert head == (0x8B1F, 8, 4, 0, 0, 255, 8, b"BN", 4, length)


@pytest.mark.parametrize("cuts", CUTS[1:])
def test_damage_of_one_of_several_members_is_told(cuts: list[int]) -> None:
    encoded = encode_members([PAYLOADS[3]], 2, cuts)
    record = b"".join(encoded.pieces)
    for size in (0, 1, 19, 20, encoded.lengths[0], len(record) - 1):
        with pytest.raises(ShardError):
            decode_record(record[:size], compressed=True)
    for at in range(len(record)):
        damaged = bytearray(record)
        damaged[at] ^= 0x40
        with contextlib.suppress(ShardError):  # a bit of the header, such as of its time, changes nothing
            assert decode_record(bytes(damaged), compressed=True) == PAYLOADS[3]
    swapped = record[encoded.lengths[0] :] + record[: encoded.lengths[0]]
    with pytest.raises(ShardError):
        decode_record(swapped, compressed=True)


def test_members_that_hold_too_much_or_are_too_many_are_refused() -> None:
    record = b"".join(encode_members([bytes(100_000)], 2, [50_000]).pieces)
    with pytest.raises(ShardError, match="holds 100,016 bytes, but the record has at most 99,016"):
        decode_record(record, compressed=True, most=99_000)
    many = b"".join(encode_members([bytes(1000)], 2, range(1, 1000)).pieces)
    with pytest.raises(ShardError, match="more than 16 gzip members"):
        decode_record(many, compressed=True, most=1000)


@given(st.binary(max_size=3000), st.sampled_from(LEVELS))
def test_a_record_comes_back(payload: bytes, level: int | None) -> None:
    record = encode_record(payload, level)
    assert decode_record(record, compressed=level is not None) == payload
    assert record == encode_record(payload, level)
    if level is None:
        assert len(record) == HEADER_BYTES + len(payload) + FOOTER_BYTES


@pytest.mark.parametrize("level", range(4))
def test_a_member_holds_no_time_and_no_name(level: int) -> None:
    magic, method, flags, mtime = struct.unpack("<HBBI", encode_record(b"x" * 99, level)[:8])
    assert (magic, method, flags, mtime) == (0x8B1F, 8, 0, 0)


def test_every_level_has_an_effect() -> None:
    payload = b"".join(struct.pack("<f", i % 97 / 97) for i in range(50_000))
    sizes = {level: len(encode_record(payload, level)) for level in range(4)}
    assert len(set(sizes.values())) >= 3
    assert max(sizes.values()) < len(payload)


def test_the_payload_is_framed_without_a_copy() -> None:
    payload = bytes(1000)
    assert encode_members([payload], None).pieces[1] is payload


@pytest.fixture(params=LEVELS)
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / ("a.tfrecord" if request.param is None else "a.tfrecord.gz")
    cuts = [[], [], [4], [1, 5000, 10_239]]  # a record of one member, and records of several
    encoded = (encode_members([p], request.param, c) for p, c in zip(PAYLOADS, cuts, strict=True))
    path.write_bytes(b"".join(piece for record in encoded for piece in record.pieces))
    return path


def test_zcat_and_python_read_a_shard(shard: Path) -> None:
    expected = (GOLDEN / "records.tfrecord").read_bytes()
    if shard.suffix == ".gz":
        assert gzip.decompress(shard.read_bytes()) == expected
        assert subprocess.run(["gzip", "-dc", shard], check=True, capture_output=True).stdout == expected
    else:
        assert shard.read_bytes() == expected


@pytest.mark.tf
def test_tensorflow_reads_a_shard(shard: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    compression = "GZIP" if shard.suffix == ".gz" else ""
    dataset = tf.data.TFRecordDataset(str(shard), compression)
    assert list(dataset.as_numpy_iterator()) == PAYLOADS


def test_beam_reads_shards(tmp_path: Path, local_flags: object) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.testing.util import assert_that, equal_to

    for level in LEVELS:
        path = tmp_path / (f"{level}.tfrecord" if level is None else f"{level}.tfrecord.gz")
        encoded = [encode_members([p], level, [4, 9] if len(p) > 9 else []) for p in PAYLOADS]
        path.write_bytes(b"".join(piece for record in encoded for piece in record.pieces))
    (tmp_path / "empty.tfrecord.gz").write_bytes(EMPTY_MEMBER)
    with beam.Pipeline(options=PipelineOptions(local_flags())) as pipeline:  # type: ignore[operator]
        records = pipeline | beam.io.ReadFromTFRecord(f"{tmp_path}/*.tfrecord*")
        assert_that(records, equal_to(PAYLOADS * len(LEVELS)))


@pytest.mark.tf
def test_tensorflow_reads_a_shard_without_records(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    (tmp_path / "a.gz").write_bytes(EMPTY_MEMBER)
    assert list(tf.data.TFRecordDataset(str(tmp_path / "a.gz"), "GZIP")) == []


RECORD = encode_record(b"golden record", None)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (0, "the CRC of the record's length does not match"),
        (8, "the CRC of the record's length does not match"),
        (HEADER_BYTES, "the CRC of the record's payload does not match"),
        (len(RECORD) - 1, "the CRC of the record's payload does not match"),
    ],
    ids=["length", "CRC of the length", "payload", "CRC of the payload"],
)
def test_each_checksum_is_checked(position: int, message: str) -> None:
    damaged = bytearray(RECORD)
    damaged[position] ^= 1
    for data, compressed in ((bytes(damaged), False), (gzip.compress(damaged), True)):
        with pytest.raises(ShardError, match=message):
            decode_record(data, compressed)


def test_every_flipped_bit_of_a_record_is_found() -> None:
    for bit in range(8 * len(RECORD)):
        damaged = bytearray(RECORD)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ShardError):
            decode_record(bytes(damaged), compressed=False)


def test_every_flipped_bit_of_a_member_is_found_or_harmless() -> None:
    member, found = encode_record(b"golden record" * 20, 2), 0
    for bit in range(8 * len(member)):
        damaged = bytearray(member)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert decode_record(bytes(damaged), compressed=True) == b"golden record" * 20
        except ShardError:
            found += 1
    assert found > 8 * (len(member) - 10)


@pytest.mark.parametrize("level", LEVELS)
def test_wrong_bounds_are_found(level: int | None) -> None:
    record, other = (encode_record(payload, level) for payload in (b"golden record", b"silver record"))
    cuts = [record[:size] for size in range(len(record))]
    for wrong in [*cuts, record + b"\0", record + other, record[1:], b"", bytes(100), EMPTY_MEMBER]:
        with pytest.raises(ShardError):
            decode_record(wrong, compressed=level is not None)


def test_two_records_in_one_member_are_refused() -> None:
    with pytest.raises(ShardError, match="record gives its size as 13 bytes, but holds 42"):
        decode_record(gzip.compress(RECORD + RECORD), compressed=True)


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_a_record_or_a_shard_error(data: bytes, compressed: bool) -> None:
    with pytest.raises(ShardError):
        decode_record(data, compressed)


@pytest.mark.parametrize("level", [level for level in LEVELS if level is not None])
def test_bytes_do_not_depend_on_where_igzip_lies_in_memory(level: int) -> None:
    """Each thread has a stack of its own, at an address on which the bytes of igzip's one call depend."""
    content = b"\n\x19\n\rintensity_max\x12\x08\x12\x06\n\x04\x00\xe0\x95D" * 2 + bytes(range(60))
    results, all_done = list[bytes](), threading.Barrier(THREADS)

    def encode() -> None:
        record = encode_members([b"voxels" + content], level, [6])
        results.append(b"".join(map(bytes, record.pieces)))
        all_done.wait()  # so that no stack is given to another thread

    started = [threading.Thread(target=encode) for _ in range(THREADS)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert len(set(results)) == 1
