"""Patches of records equal the same slices of the whole record."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.config import RecordConfig, Sharding
from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read import records as reading
from tests.datasets import build_dataset, edit_index, info_of, set_cell
from tests.images import write_image, write_manifest
from tests.web_server import Ranges, serve

SHAPES = ((70, 61, 50), (64, 72, 45))
COLUMNS = ("image", "mask", "id", "label", "site")
BUILDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"voxel_dtype": "float16", "rescale": "zscore"},
    "bfloat16": {"voxel_dtype": "bfloat16"},
    "uint8": {"voxel_dtype": "uint8", "rescale": "percentile:1,99", "clip": True},
    "native": {"voxel_dtype": "native"},
    "native, window": {"voxel_dtype": "native", "rescale": "window:-100,300", "compression": "none"},
    "native, units": {"voxel_dtype": "native", "rescale": "none"},
    "uncompressed": {"compression": "none"},
    "channels": {"path_column": ["path", "other"], "rescale": "percentile:2,98", "rescale_within": "nonzero"},
    "native channels": {"path_column": ["path", "other"], "voxel_dtype": "native"},
    "frames": {"path_column": "frames", "frames": "all", "compression_level": 0},
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for i, shape in enumerate(SHAPES):
        names = {kind: f"sub-{i}_{kind}.nii.gz" for kind in ("path", "other", "frames", "mask")}
        for kind, seed in (("path", i), ("other", 9)):
            voxels = np.random.default_rng(seed).normal(40 * i, 120, shape).astype(np.int16)
            write_image(folder / names[kind], voxels, slope=0.25 if i else None, inter=-3 if i else None)
        write_image(folder / names["frames"], rng.normal(0, 9, (*shape, 2)).astype(np.float32))
        write_image(folder / names["mask"], rng.integers(0, 4, shape).astype(np.uint8))
        rows.append({"participant_id": f"sub-{i}", **names, "label": i / 4, "site": "AB"[i]})
    return write_manifest(folder / "manifest.tsv", rows)


@pytest.fixture(scope="module", params=BUILDS)
def dataset(request: pytest.FixtureRequest, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "out"
    options = {"mask_column": "mask", "allow_mixed_shapes": True, "num_shards": 1} | BUILDS[request.param]
    bn.build(manifest, output, progress=False, **options)
    return output


def expected_patch(
    volume: npt.NDArray[Any], corner: tuple[int, ...], shape: tuple[int, ...], padding: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    out = np.empty((*shape, volume.shape[3]), volume.dtype)
    out[...] = padding
    for at in itertools.product(*map(range, shape)):
        place = tuple(c + a for c, a in zip(corner, at, strict=True))
        if all(0 <= p < n for p, n in zip(place, volume.shape, strict=False)):
            out[at] = volume[place]
    return out


boxes = st.tuples(*[st.integers(-12, 90)] * 3), st.tuples(*[st.integers(1, 9)] * 3)


def test_any_patch_is_the_same_part_of_the_whole_record(dataset: Path) -> None:
    records = bn.Dataset(dataset, columns=COLUMNS)
    whole = list(records)
    is_each = info_of(dataset).config["channels"] is not None

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1), *boxes)
    def check(number: int, corner: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
        patch, record = records.patch(number, corner, shape), whole[number]
        assert list(patch) == list(record)
        for name in ("image", "mask"):
            least = record[name].min(axis=(0, 1, 2) if is_each else None) if name == "image" else np.zeros(1)
            expected = expected_patch(record[name], corner, shape, least)
            assert patch[name].dtype == record[name].dtype
            assert np.array_equal(patch[name], expected)
            assert patch[name].flags.c_contiguous
            assert patch[name].flags.writeable
        assert [patch[n] for n in ("id", "label", "site")] == [record[n] for n in ("id", "label", "site")]

    check()


def test_large_patches_cross_tiles_and_are_the_same_too(dataset: Path) -> None:
    records, first = bn.Dataset(dataset, columns=COLUMNS), bn.Dataset(dataset, channels_first=True)
    for corner, shape in (((0, 0, 0), SHAPES[0]), ((3, 7, 2), (60, 50, 40)), ((1, 0, 0), (69, 61, 50))):
        box = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        whole, patch = records[0], records.patch(0, corner, shape)
        assert np.array_equal(patch["image"], whole["image"][box])
        assert np.array_equal(patch["mask"], whole["mask"][box])
        assert np.array_equal(first.patch(-2, corner, shape)["image"], np.moveaxis(patch["image"], -1, 0))


def test_only_the_members_that_a_patch_touches_are_read(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, read = bn.Dataset(dataset, columns=["image"]), list[tuple[int, int]]()
    original = reading.storage.read_ranges

    def count(path: str, ranges: list[tuple[int, int]], buffer: memoryview) -> None:
        read.extend(ranges)
        original(path, ranges, buffer)

    monkeypatch.setattr(reading.storage, "read_ranges", count)
    records.patch(0, (30, 10, 0), (2, 3, 4))
    assert 0 < sum(size for _, size in read) < records.index(["length"])["length"][0].as_py() / 3


@pytest.mark.parametrize(
    ("corner", "shape", "message"),
    [
        ((0, True, 0), (1, 1, 1), r"corner is \(0, True, 0\); give three integers"),
        ((0, 0), (1, 1, 1), r"corner is \(0, 0\); give three integers, along x, y and z"),
        ((0, 0, 0.5), (1, 1, 1), "corner is"),
        ((0, 0, 0), (1, 0, 1), r"shape is \(1, 0, 1\); give three integers of at least 1"),
        ((0, 0, 0), 8, "shape is 8"),
        (
            (0, 0, 0),
            (10**5, 10**5, 10**5),
            r"shape is \(100000, 100000, 100000\), which does not fit into memory",
        ),
    ],
)
def test_boxes_that_are_none_are_refused(dataset: Path, corner: Any, shape: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bn.Dataset(dataset).patch(0, corner, shape)
    with pytest.raises(IndexError, match="there is no record 2"):
        bn.Dataset(dataset).patch(2, (0, 0, 0), (1, 1, 1))


def test_columns_that_only_records_hold_come_with_a_patch(dataset: Path) -> None:
    records = bn.Dataset(dataset, columns=["image", "intensity_max"])
    patch, whole = records.patch(1, (5, 5, 5), (9, 9, 9)), records[1]
    assert np.array_equal(patch["intensity_max"], whole["intensity_max"])
    assert np.array_equal(patch["image"], whole["image"][5:14, 5:14, 5:14])


@pytest.fixture
def sound(manifest: Path, tmp_path: Path) -> Path:
    output = tmp_path / "out"
    record = RecordConfig(voxel_dtype="native", rescale="window:0,9")
    return build_dataset(manifest, output, record, allow_mixed_shapes=True, sharding=Sharding(num_shards=1))


def test_a_damaged_member_is_told_where_a_patch_touches_it(sound: Path) -> None:
    records = bn.Dataset(sound, columns=["image"])
    right = records.patch(0, (0, 0, 0), (3, 9, 9))["image"]
    offset, length = (records.index([name])[name][0].as_py() for name in ("offset", "length"))
    path = sound / info_of(sound).shards[0].name
    data = bytearray(path.read_bytes())
    data[offset + length - 2000] ^= 1
    path.write_bytes(data)
    assert np.array_equal(records.patch(0, (0, 0, 0), (3, 9, 9))["image"], right)
    with pytest.raises(DatasetError, match=r"record 'sub-0', number 0 from 0, cannot be read \(gzip member"):
        records.patch(0, (60, 0, 0), (10, 61, 50))
    path.write_bytes(data[: offset + length // 2])
    with pytest.raises(DatasetError, match=r"record 'sub-0', number 0 from 0, cannot be read \(ends before"):
        records.patch(0, (60, 0, 0), (10, 61, 50))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda n: [*n[:-2], n[-2] + n[-1]],
            "record 'sub-0'.*the index gives it 7 members, expected 8",
        ),
        (lambda n: [n[0], n[2], n[1], *n[3:]], "record 'sub-0'.*gzip member"),
        (lambda n: [n[0] + 1, n[1] - 1, *n[2:]], "record 'sub-0'.*gzip member"),
        (lambda n: [*n[:-1], n[-1] + 1], r"the members of record 0 have \d+ bytes, but it has \d+"),
        (lambda n: [], r"column member_lengths of record 0 .*has 0 values, expected 1"),
    ],
)
def test_a_wrong_table_of_members_is_told(
    sound: Path, edit: Callable[[list[int]], list[int]], message: str
) -> None:
    lengths = bn.Dataset(sound).index(["member_lengths"])["member_lengths"][0].as_py()
    edit_index(sound, set_cell("member_lengths", 0, edit(lengths)))
    assert not bn.verify(sound)
    with pytest.raises(DatasetError, match=message):
        bn.Dataset(sound, columns=["image"]).patch(0, (0, 0, 0), SHAPES[0])


def test_a_dataset_without_members_is_read_and_extended_as_it_is(manifest: Path, tmp_path: Path) -> None:
    lines = manifest.read_text().splitlines(keepends=True)
    short = manifest.with_name("short.tsv")
    short.write_text("".join(lines[:2]))
    record = RecordConfig(format_features=("sources", "digests"))
    options: dict[str, Any] = {"allow_mixed_shapes": True, "sharding": Sharding(examples_per_shard=1)}
    output = build_dataset(short, tmp_path / "out", record, **options)
    short.write_text("".join(lines))
    bn.build(short, output, allow_mixed_shapes=True, progress=False)
    assert info_of(output).format_features == ("sources", "digests")
    assert bn.verify(output)
    records = bn.Dataset(output)
    assert "member_lengths" not in records.index().column_names
    whole, patch = records[1]["image"], records.patch(1, (60, 5, -2), (9, 8, 7))["image"]
    assert np.array_equal(patch, expected_patch(whole, (60, 5, -2), (9, 8, 7), whole.min()))


def test_a_patch_from_a_store_is_one_request(sound: Path) -> None:
    local = bn.Dataset(sound, columns=["image"])
    with serve(sound.parent, Ranges) as server:
        records = bn.Dataset(f"{server.url}/out", columns=["image"])
        records.patch(0, (0, 0, 0), (1, 1, 1))  # reads the index
        server.rest()
        records.patch(1, (0, 0, 0), (1, 1, 1))
        assert len(server.rest()) == 3  # what stands before and after its voxels, once
        patch = records.patch(1, (10, 20, 30), (20, 30, 20))
        (request,) = server.rest()
        assert 0 < request.received < records.index(["length"])["length"][1].as_py() * 0.6
    assert np.array_equal(patch["image"], local.patch(1, (10, 20, 30), (20, 30, 20))["image"])
