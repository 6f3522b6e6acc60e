"""Patches of datasets whose index and records contradict each other are refused, as whole records are."""

from __future__ import annotations

import contextlib
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import beam_nifti as bn
from beam_nifti.errors import DatasetError
from beam_nifti.record.example import decode_example, encode_example
from tests.datasets import edit_index, edit_info, edit_record, set_cell
from tests.images import write_image, write_manifest

HEAD_BYTES, FOOTER_BYTES = 20, 8
"""Of a gzip member: around its deflate stream."""

SHAPE = (70, 61, 50)
BUILDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "uncompressed": {"compression": "none"},
    "native": {"voxel_dtype": "native"},
    "percentile": {"voxel_dtype": "native", "rescale": "percentile:1,99"},
    "mixed": {"allow_mixed_shapes": True},
    "labels": {"label_column": "age:float,site:class", "rescale": "percentile:1,99"},
}
Edit = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("built"), []
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:20, 5:9, 3:8] = 2
    write_image(folder / "mask.nii", mask)
    for i in range(2):
        write_image(folder / f"{i}.nii", np.random.default_rng(i).normal(0, 99, SHAPE).astype(np.int16))
        row = {"participant_id": f"sub-{i}", "path": f"{i}.nii", "mask": "mask.nii"}
        rows.append(row | {"age": 30 + i, "site": "AB"[i]})
    manifest = write_manifest(folder / "manifest.tsv", rows)
    for name, options in BUILDS.items():
        bn.build(manifest, folder / name, mask_column="mask", num_shards=1, progress=False, **options)
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(built / name, tmp_path / name))


def swap(*columns: str) -> Edit:
    """Two records change places in some columns of the index."""

    def edit(table: pa.Table) -> pa.Table:
        for name in columns:
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].take([1, 0]))
        return table

    return edit


def set_cells(**cells: Any) -> Edit:
    def edit(table: pa.Table) -> pa.Table:
        for name, value in cells.items():
            table = set_cell(name, 0, value)(table)
        return table

    return edit


def shift(table: pa.Table) -> pa.Table:
    """The voxels are said to begin a voxel later."""
    first, *others, last = table["member_lengths"][0].as_py()
    return set_cell("member_lengths", 0, [first + 4, *others, last - 4])(table)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("float32", swap("example_id"), "it is the record of 'sub-0'"),
        ("uncompressed", swap("offset", "length", "member_lengths"), "it is the record of 'sub-1'"),
        ("uncompressed", shift, "not an Example"),
        ("float32", shift, "no gzip member of"),
        ("float32", set_cells(min=5e4, max=6e4), r"its intensity_min is -\d+, but the index has 50000"),
        ("native", set_cells(min=-123.0), r"its intensity_min is -\d+, but the index has -123"),
        ("native", set_cells(max=math.inf), r"its intensity_max is \d+, but the index has inf"),
        ("native", set_cells(scl_slope=3.0, scl_inter=1.0), "its scaling is 1 0, but the index has 3 1"),
        ("native", set_cells(scl_slope=3.0), "the index has a scaling by 3.0 and None"),
        ("percentile", set_cells(rescale_low=-1.0), r"its rescale_low is -\d+, but the index has -1"),
        ("mixed", set_cells(shape=[70, 50, 61]), r"its image_raw holds float32 of \(70, 61, 50\), expected"),
    ],
)
def test_an_index_that_contradicts_a_record_is_refused(
    copy: Callable[[str], Path], name: str, edit: Edit, message: str
) -> None:
    dataset = copy(name)
    edit_index(dataset, edit)
    records = bn.Dataset(dataset, columns=["id", "image", "mask"])
    for _ in range(2):  # the first refusal does not let a second patch through
        with pytest.raises(DatasetError, match=message):
            records.patch(0, (1, -2, 0), (69, 50, 50))
    assert not bn.verify(dataset)


@pytest.mark.parametrize(
    ("name", "cells", "message"),
    [
        ("native", {"min": None}, r"the index has minima \[\] and maxima \[\d+.0\]"),
        ("percentile", {"rescale_low": None}, r"the index has rescale_low \[\] and rescale_high \[\d+.0\]"),
        ("percentile", {"rescale_low": None, "rescale_high": None}, "the index has rescale_low"),
        ("float32", {"mask_labels": None, "mask_positions": None}, "has 0 mask_positions, which cannot be"),
        ("float32", {"mask_labels": None}, "has 64 mask_positions, which cannot be"),
    ],
)
def test_cells_that_no_manifest_requires_are_refused_where_patches_need_them(
    copy: Callable[[str], Path], name: str, cells: dict[str, None], message: str
) -> None:
    dataset = copy(name)
    edit_info(dataset, lambda facts: facts["manifest"].update(path=""))  # as WriteToTFRecord has it
    edit_index(dataset, set_cells(**cells))
    records = bn.Dataset(dataset, columns=["image", "mask"])
    with pytest.raises(DatasetError, match=message):
        bn.PatchDataset(records, bn.Patches((9, 9, 9), foreground=1), seed=1)[0]
    assert not bn.verify(dataset)


def with_range(low: float, high: float) -> Callable[[bytes], bytes]:
    """The record says a range of intensities."""

    def edit(payload: bytes) -> bytes:
        held = {k: bytes(v) if isinstance(v, memoryview) else v for k, v in decode_example(payload).items()}
        found = {"intensity_min": low, "intensity_max": high}
        return encode_example(held | {name: np.array([n], np.float32) for name, n in found.items()})

    return edit


@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 0.0), (5.0, 5.0), (-70000.0, 0.0), (0.0, 1e9), (0.5, 9.0), (0.0, math.inf)]
)
def test_intensities_that_no_voxels_have_are_refused(
    copy: Callable[[str], Path], low: float, high: float
) -> None:
    dataset = copy("native")
    edit_record(dataset, 0, with_range(low, high))
    edit_index(dataset, set_cells(min=low, max=high))
    with pytest.raises(DatasetError, match=r"record 'sub-0'.*intensit"):
        bn.Dataset(dataset, columns=["image"]).patch(0, (0, 0, 0), (9, 9, 9))


@pytest.mark.parametrize(
    "cells",
    [
        {"mask_positions": []},
        {"mask_positions": [1] * 63 + [-1]},
        {"mask_positions": [math.prod(SHAPE)] * 64},
        {"mask_labels": [0]},
        {"mask_labels": [0, 1, 2, 3]},
    ],
)
def test_positions_that_cannot_be_are_refused(copy: Callable[[str], Path], cells: dict[str, Any]) -> None:
    dataset = copy("float32")
    edit_index(dataset, set_cells(**cells))
    patches = bn.PatchDataset(bn.Dataset(dataset), bn.Patches((9, 9, 9), foreground=1), seed=1)
    with pytest.raises(DatasetError, match="record 'sub-0'; run beam-nifti verify"):
        patches[0]
    assert not bn.verify(dataset)


@pytest.mark.parametrize("shape", [[1 << 62] * 3, [1 << 40, 1, 1], [1, 2, 1 << 40], [0, 1, 1], [-1, 50, 61]])
def test_a_shape_that_a_record_cannot_have_is_refused_before_memory_is_allocated(
    copy: Callable[[str], Path], shape: list[int]
) -> None:
    dataset = copy("mixed")
    edit_index(dataset, set_cells(shape=shape))
    message = (
        r"record 0 \(sub-0\) of .* is said to have the shape .*, which it cannot hold; run beam-nifti verify"
    )
    with pytest.raises(DatasetError, match=message):
        bn.Dataset(dataset, columns=["image"])


def test_a_shape_of_all_volumes_that_a_record_cannot_have_is_refused(copy: Callable[[str], Path]) -> None:
    """A batch has room for so many voxels of each record before any is read."""
    dataset, shape = copy("float32"), [(1 << 31) - 1, 1, 1]
    edit_info(dataset, lambda facts: facts.update(shape=shape))
    edit_index(dataset, lambda table: set_cell("shape", 1, shape)(set_cell("shape", 0, shape)(table)))
    with pytest.raises(DatasetError, match=r"have the shape \[2147483647, 1, 1\], which it cannot hold"):
        bn.Dataset(dataset)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 42.0, "its label is 30, but the index has 42"),
        ("label", None, "its label is 30, but the index has nan"),
        ("affine", [2.0] * 16, "its affine is -2 0 .*, but the index has 2 2"),
        ("zooms", [9.0] * 3, "its zooms is 2 2 .*, but the index has 9 9 9"),
        ("age", "99", "its label/age is 30, but the index has 99"),
        ("site", "B", "its label/site is 0, but the index has 1"),
        ("site", "C", "the index has 'C' in site, which does not match"),
        ("min", 5e4, r"its intensity_min is -\d+, but the index has 50000"),
        ("max", 5e4, r"its intensity_max is \d+, but the index has 50000"),
        ("rescale_low", 5.0, r"its rescale_low is -\d.*, but the index has 5"),
    ],
)
def test_a_record_that_states_other_values_than_the_index_is_refused(
    copy: Callable[[str], Path], column: str, value: Any, message: str
) -> None:
    dataset = copy("labels")
    edit_index(dataset, set_cells(**{column: value}))
    records = bn.Dataset(dataset, columns=["image", column])
    reads: list[Callable[[], object]] = [lambda: records[0], lambda: records.patch(0, (0, 0, 0), (9, 9, 9))]
    for read in reads:
        with pytest.raises(DatasetError, match=rf"record 'sub-0', .*{message}"):
            read()
    assert any(message.removeprefix("its ")[:9] in problem for problem in bn.verify(dataset).problems)


def test_a_record_without_a_label_that_the_index_states_is_refused(copy: Callable[[str], Path]) -> None:
    dataset = copy("labels")

    def edit(payload: bytes) -> bytes:
        held = {k: bytes(v) if isinstance(v, memoryview) else v for k, v in decode_example(payload).items()}
        return encode_example({k: v for k, v in held.items() if not k.startswith("label")})

    edit_record(dataset, 0, edit)
    for column in ("label", "age"):
        with pytest.raises(DatasetError, match=r"feature label(/age)? is missing, but the index has a value"):
            bn.Dataset(dataset, columns=["image", column])[0]


@pytest.mark.parametrize("column", ["age", "site"])
def test_a_record_with_a_label_that_the_index_lacks_is_refused(
    copy: Callable[[str], Path], column: str
) -> None:
    dataset = copy("labels")
    edit_info(dataset, lambda facts: facts["manifest"].update(path=""))  # as WriteToTFRecord has it
    edit_index(dataset, set_cells(**{column: None}))
    with pytest.raises(DatasetError, match=rf"its label/{column} is \d+, but the index has (nan|-1)"):
        bn.Dataset(dataset, columns=["image", column])[0]
    assert any(f"label/{column} is " in problem for problem in bn.verify(dataset).problems)


def test_a_record_that_a_condition_selects_by_another_value_is_refused(copy: Callable[[str], Path]) -> None:
    dataset = copy("labels")
    edit_index(dataset, set_cells(age="99"))
    records = bn.Dataset(dataset, columns=["image"], where="age > 60")
    assert records.ids == ["sub-0"]
    with pytest.raises(DatasetError, match="its label/age is 30, but the index has 99"):
        records[0]


def inflate(member: bytes | bytearray) -> bytes | None:
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(wbits=-15).decompress(member[HEAD_BYTES:])
    return None


def test_every_byte_around_the_voxels_is_checked_by_the_first_patch(copy: Callable[[str], Path]) -> None:
    dataset = copy("float32")
    lengths = bn.Dataset(dataset).index(["member_lengths"])["member_lengths"][0].as_py()
    records = bn.Dataset(dataset, columns=["image"])
    (path,) = dataset.glob("*.tfrecord.gz")
    sound, end = path.read_bytes(), sum(lengths)
    before, first, after = (
        slice(0, lengths[0]),
        slice(lengths[0], sum(lengths[:2])),
        slice(end - lengths[-1], end),
    )
    for member, count in ((before, lengths[0]), (after, lengths[-1]), (first, HEAD_BYTES)):
        for at in range(count):
            damaged = bytearray(sound)
            damaged[member.start + at] ^= 16
            is_deflate = HEAD_BYTES <= at < count - FOOTER_BYTES
            if is_deflate and inflate(damaged[member]) == inflate(sound[member]):
                continue  # some bits of a deflate stream mean nothing
            path.write_bytes(damaged)
            with pytest.raises(DatasetError, match="record 'sub-0'"):
                records.patch(0, (0, 0, 0), (1, 1, 1))
    path.write_bytes(sound)
    assert records.patch(0, (0, 0, 0), (1, 1, 1))


def test_an_id_that_is_no_text_is_refused(copy: Callable[[str], Path]) -> None:
    dataset = copy("float32")

    def edit(payload: bytes) -> bytes:
        held = {k: bytes(v) if isinstance(v, memoryview) else v for k, v in decode_example(payload).items()}
        return encode_example(held | {"id": np.array([1, 2], np.float32)})

    edit_record(dataset, 0, edit)
    records = bn.Dataset(dataset, columns=["image"])
    for read in (lambda: records[0], lambda: records.patch(0, (0, 0, 0), (1, 1, 1))):
        with pytest.raises(DatasetError, match="it has no id"):
            read()
