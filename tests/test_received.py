"""A dataset from somebody else: nothing of it is run, and only its own files are opened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import Columns
from beam_nifti.errors import BeamNiftiError, DatasetError, OutputError, ShardError, UsageError
from beam_nifti.inspection import shard_pass
from beam_nifti.inspection.card import write_card
from beam_nifti.inspection.description import describe_dataset, describe_record
from beam_nifti.inspection.diff import compare_datasets
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.build import plan_build
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.random_access import Dataset
from beam_nifti.record.dataset_info import content_digest
from beam_nifti.record.example import decode_example, encode_example, encode_tensor
from beam_nifti.record.index import Limits, read_index, write_index
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.record.tfrecord import EncodedRecord, decode_record
from beam_nifti.reporting.summary import read_failures
from beam_nifti.support import parquet_headers
from beam_nifti.support.parquet_headers import require_said_sizes, require_schema
from tests.build_helpers import arrow_memory, build, make_config
from tests.datasets import (
    edit_index,
    edit_info,
    edit_record,
    edit_stored,
    encode_record,
    info_of,
    nested_parquet,
    replace_index,
    set_cell,
)
from tests.images import write_cohort, write_image, write_manifest
from tests.peak import peak_growth

SHARD = "train-00000-of-00002.tfrecord.gz"
INDEX = "index/train-00000-of-00002.parquet"
SHAPE = (4, 3, 2)
COLUMNS = asdict(Columns())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, its manifest, and images, of which one failed."""
    folder = tmp_path_factory.mktemp("built")
    manifest = write_cohort(folder, 5, shape=SHAPE)
    (folder / "sub-0004.nii.gz").write_bytes(b"no image")
    build(manifest, folder / "dataset", num_shards=2, max_bad_fraction=0.5)
    return folder


@pytest.fixture
def study(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "study"))


@pytest.fixture
def dataset(study: Path) -> Path:
    return study / "dataset"


def problems(dataset: Path, **options: Any) -> tuple[str, ...]:
    return verify_dataset(str(dataset), **options).problems


READERS: dict[str, Callable[[str], object]] = {
    "Dataset": lambda path: [dict(element) for element in Dataset(path)],
    "diff": lambda path: compare_datasets(path, path),
    "extract": lambda path: read_volume(path, "sub-0000"),
    "inspect": describe_dataset,
    "inspect --record": lambda path: describe_record(path, "sub-0000"),
    "verify": lambda path: verify_dataset(path).problems,
}
"""What reads a dataset, by how it is called."""


# Code


@pytest.fixture
def hostile_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported and must not be."""
    folder = tmp_path / "python"
    folder.mkdir()
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef f(volume): return volume\n"
    (folder / "hostile_helper.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return "hostile_helper"


def test_a_function_that_only_the_dataset_names_is_not_imported(
    study: Path, dataset: Path, tmp_path: Path, hostile_module: str, run: Callable[..., str]
) -> None:
    name = f"{hostile_module}:f"
    edit_info(dataset, lambda i: i["config"].update(preprocess=name, preprocess_sha256="0" * 64))
    deep = ("verify", dataset, "--deep=all", f"--manifest={study}/manifest.tsv")
    told = run(*deep, code=cli.USAGE)
    assert f"was built with {name}, defined in a file of sha256 {'0' * 64}" in told
    assert f"give --preprocess {name}" in told
    assert "but its options give" in run("verify", dataset, code=cli.FAILED)
    for call in READERS.values():
        call(str(dataset))
    assert hostile_module not in sys.modules
    assert not (tmp_path / "ran").exists()
    assert "defines it differs" in run(*deep, f"--preprocess={name}", code=cli.USAGE)
    assert (tmp_path / "ran").exists()  # as the user has named it


@pytest.mark.parametrize("named", ["tests.user_functions:other", "hostile_helper:f"])
def test_a_function_that_the_dataset_was_not_made_with_is_not_imported(
    study: Path, dataset: Path, named: str
) -> None:
    manifest = str(study / "manifest.tsv")
    with pytest.raises(UsageError, match="was built without a function; drop it"):
        verify_dataset(str(dataset), manifest=manifest, deep=1, preprocess=named)
    edit_info(dataset, lambda i: i["config"].update(preprocess="a:b", preprocess_sha256="0" * 64))
    with pytest.raises(UsageError, match=f"--preprocess is {named}; .* was built with a:b"):
        verify_dataset(str(dataset), manifest=manifest, deep=1, preprocess=named)


@pytest.mark.parametrize(
    ("preprocess", "digests"),
    [
        (["a:f", "a:g"], "0" * 64),
        (None, "0" * 64),
        (["a:f", 3], ["0" * 64] * 2),
        ({"function": "a:f"}, "0" * 64),
        ("a f", "0" * 64),
        (f"a:f(x={'9' * 5000})", "0" * 64),
    ],
)
def test_functions_as_no_build_has_them_are_refused(
    dataset: Path, preprocess: object, digests: object
) -> None:
    edit_info(dataset, lambda i: i["config"].update(preprocess=preprocess, preprocess_sha256=digests))
    with pytest.raises(DatasetError, match=r"not a dataset's info: .*preprocess.{,300}$"):
        info_of(dataset)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("argument", ["1if 1else 2", "'\\d'", "-" * 4000 + "1", "open('ran', 'w')"])
def test_arguments_of_a_function_that_only_the_dataset_names_are_not_parsed(
    dataset: Path, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's parser prints warnings of its own, and takes long for some texts."""
    monkeypatch.chdir(tmp_path)
    call = f"a:f(x={argument})"
    edit_info(dataset, lambda i: i["config"].update(preprocess=call, preprocess_sha256="0" * 64))
    assert info_of(dataset).record_config.preprocess == call
    assert bn.verify(dataset, progress=False).problems
    with pytest.raises(UsageError, match="write it as package"):
        bn.verify(dataset, manifest="m.csv", deep=1, preprocess="a:f(x=open('ran', 'w'))", progress=False)
    assert not [*tmp_path.glob("ran")]


def test_the_function_is_for_deep(dataset: Path, run: Callable[..., str]) -> None:
    assert "--preprocess is for --deep" in run("verify", dataset, "--preprocess=a:b", code=cli.USAGE)


# Files


def test_deep_asks_for_the_manifest(dataset: Path, run: Callable[..., str]) -> None:
    told = run("verify", dataset, "--deep=1", code=cli.USAGE)
    assert "--deep opens only images that you name; add --manifest" in told
    assert info_of(dataset).manifest["path"] in told


def test_deep_opens_only_images_of_the_manifest(study: Path, dataset: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # would hang
    edit_index(dataset, set_cell("source", 0, str(tmp_path / "fifo")))
    found = problems(dataset, manifest=str(study / "manifest.tsv"), deep=ALL)
    assert any(f"its image, {tmp_path}/fifo, is not in the manifest" in problem for problem in found)


def test_deep_takes_the_mask_from_the_same_row(tmp_path: Path) -> None:
    rows = []
    for i in range(2):
        write_image(tmp_path / f"mask{i}.nii", np.full(SHAPE, 1 + i, np.uint8))
        rows.append({"participant_id": f"s{i}", "path": "image.nii", "mask": f"mask{i}.nii"})
    write_image(tmp_path / "image.nii", np.arange(24, dtype=np.int16).reshape(SHAPE))
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    build(manifest, tmp_path / "out", columns={"mask": "mask"})
    assert problems(tmp_path / "out", manifest=str(manifest), deep=ALL) == ()


def link(target: str | Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("name", [SHARD, INDEX, "failures.jsonl", "dataset_info.json"])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (os.mkfifo, "is a FIFO, not a file"),
        (link("/etc/passwd"), "is a link that leads out of its dataset, to /etc/passwd"),
        (link("/dev/zero"), "is a link that leads out of its dataset, to /dev/zero"),
        (lambda path: link(path.name)(path), "(Too many levels|symbolic link)"),
    ],
    ids=["FIFO", "file", "device", "loop"],
)
def test_what_is_no_file_of_the_dataset_is_not_opened(
    dataset: Path, name: str, put: Callable[[Path], None], message: str
) -> None:
    (dataset / name).unlink()
    put(dataset / name)
    calls = {**READERS, "report": lambda path: read_failures(path, info_of(Path(path)))}
    told = {}
    for command, call in calls.items():
        try:
            told[command] = repr(call(str(dataset)))
        except (BeamNiftiError, OSError) as e:
            told[command] = f"{e} {e!r}"
    named = [command for command, text in told.items() if name in text and re.search(message, text)]
    expected = {
        "failures.jsonl": ["verify", "report"],
        SHARD: ["Dataset", "extract", "verify"],
        INDEX: list(READERS),
        "dataset_info.json": list(calls),
    }
    assert named == expected[name]


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, link("/etc/passwd"), link("loop")])
def test_an_info_that_is_no_file_is_a_fault_of_the_dataset(
    dataset: Path, put: Callable[[Path], None]
) -> None:
    (dataset / "loop").symlink_to("loop")
    (dataset / "dataset_info.json").unlink()
    put(dataset / "dataset_info.json")
    for call in READERS.values():
        with pytest.raises(DatasetError, match=r"dataset_info\.json: cannot be read \(.*; copy"):
            call(str(dataset))


@pytest.mark.parametrize("name", ["plan.json", "write.json"])
@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, link("/dev/zero"), link("plan.json")])
def test_a_plan_that_is_no_file_hides_nothing(dataset: Path, name: str, put: Callable[[Path], None]) -> None:
    (dataset / ".build").mkdir()
    put(dataset / ".build" / name)
    assert problems(dataset) == ()
    (dataset / "extra.tfrecord").touch()
    assert any("extra.tfrecord: not in dataset_info.json" in problem for problem in problems(dataset))


def test_a_plan_of_more_shards_than_any_dataset_has_is_none(dataset: Path) -> None:
    (dataset / ".build").mkdir()
    shards = tuple(f"extra-{number:05d}-of-99999.tfrecord" for number in range((1 << 19) + 1))
    SavedWrite("0" * 16, ".build", 1, shards=shards).write(str(dataset))
    assert SavedWrite.read(str(dataset)) is None


def test_control_characters_of_a_dataset_are_escaped_in_errors(dataset: Path) -> None:
    hostile = dataset.rename(dataset.with_name("a\x1b[2J\u202e"))
    (hostile / SHARD).unlink()
    (hostile / SHARD).symlink_to("/tmp/\x1b]0;owned\x07")
    for call in READERS.values():
        try:
            text = str(call(str(hostile)))
        except DatasetError as e:
            text = "".join(traceback.format_exception(e))
        assert not set("\x1b\x07\u202e") & set(text)
    with pytest.raises(DatasetError, match=r"a\\x1b\[2J\\u202e"):
        Dataset(hostile)


def test_a_folder_that_leads_out_is_not_read(dataset: Path, tmp_path: Path) -> None:
    (dataset / "index").rename(tmp_path / "index")
    (dataset / "index").symlink_to(tmp_path / "index")
    with pytest.raises(DatasetError, match=rf"{INDEX}: cannot be read .*leads out of its dataset"):
        Dataset(dataset)
    assert len(problems(dataset)) == 2


def test_links_within_a_dataset_and_to_it_are_followed(dataset: Path, tmp_path: Path) -> None:
    (dataset / SHARD).rename(dataset / "blob")
    (dataset / SHARD).symlink_to("blob")
    (tmp_path / "alias").symlink_to(dataset)
    assert len(list(Dataset(tmp_path / "alias"))) == 4
    assert problems(tmp_path / "alias") == ()


# Changes


def test_a_change_of_the_list_of_failures_is_found(dataset: Path) -> None:
    path = dataset / "failures.jsonl"
    text = path.read_text()
    path.write_text(text.replace("sub-0004", "sub-0009"))
    assert any(
        "failures.jsonl: is not the file that dataset_info.json describes" in p for p in problems(dataset)
    )
    path.write_text(text)
    assert problems(dataset) == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"examples_per_shard": null', '"examples_per_shard": 1'),
        ('"shuffle_seed": null', '"shuffle_seed": 7'),
        ('"compression_level": 2', '"compression_level": 0'),
        ('"num_rows": 5', '"num_rows": 6'),
        ('"allow_mixed_shapes": false', '"allow_mixed_shapes": true'),
        ('"numpy": "', '"numpy": "1'),
        ('"columns": [', '"columns": [\n"further",'),
    ],
)
def test_a_change_of_the_info_is_found_by_all(dataset: Path, old: str, new: str) -> None:
    path = dataset / "dataset_info.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    for call in READERS.values():
        with pytest.raises(DatasetError, match=r"dataset_info\.json: .*was changed after it was written"):
            call(str(dataset))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("participant_id", "sub-0009", "record 0 .* is of participant 'sub-0009'"),
        ("row", 2, "row 2 occurs more than once"),
        ("row", 99, "row 99"),
    ],
)
def test_an_index_that_contradicts_itself_is_found(
    dataset: Path, column: str, value: object, message: str
) -> None:
    edit_index(dataset, set_cell(column, 0, value))
    assert any(re.search(message, problem) for problem in problems(dataset))


# Sizes


def set_facts(dataset: Path, **facts: object) -> None:
    """Change what dataset_info.json says of the first shard."""

    def agree(info: dict[str, Any]) -> None:
        split = info["splits"]["train"]
        split["shards"][0] |= facts
        split["num_bytes"] = sum(shard["num_bytes"] for shard in split["shards"])

    edit_info(dataset, agree)


def many_rows(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table] * 10_000)


def long_text(table: pa.Table) -> pa.Table:
    """Texts of a megabyte, which are one in the file."""
    column = table.column_names.index("participant_id")
    table = pa.concat_tables([table] * 100)
    return table.set_column(column, "participant_id", pa.array(["x" * (1 << 20)] * table.num_rows))


def long_lists(table: pa.Table) -> pa.Table:
    column = table.column_names.index("source_shape")
    return table.set_column(column, "source_shape", pa.array([[1] * (8 << 20)] * table.num_rows))


def test_texts_that_begin_alike_are_not_read(dataset: Path) -> None:
    """In a delta encoding each text is a few bits, however much of the one before it begins it."""
    table, facts = read_index(str(dataset / INDEX))
    table = long_text(table).replace_schema_metadata(facts)
    encoding = {"participant_id": "DELTA_BYTE_ARRAY"}
    pq.write_table(table, dataset / INDEX, compression="zstd", use_dictionary=False, column_encoding=encoding)
    assert (dataset / INDEX).stat().st_size < 1 << 16
    with arrow_memory() as memory, pytest.raises(ShardError, match=r"has .* bytes of values, more than"):
        read_index(str(dataset / INDEX), limits=Limits(200, 0))
    assert memory.max_memory() < 16 << 20


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (many_rows, "has 20,000 rows, but can have"),
        (long_text, "has .* bytes of values, more than it can have"),
        (long_lists, "has .* bytes of values, more than it can have"),
    ],
)
def test_a_bomb_in_an_index_is_not_read(
    dataset: Path, edit: Callable[[pa.Table], pa.Table], message: str
) -> None:
    table, facts = read_index(str(dataset / INDEX))
    replace_index(dataset, INDEX, edit(table), facts)
    size = (dataset / INDEX).stat().st_size
    assert size < 1 << 20
    claimed = edit(table).num_rows

    def agree(info: dict[str, Any]) -> None:
        shard = info["splits"]["train"]["shards"][0]
        shard |= {"num_examples": claimed, "num_bytes": max(shard["num_bytes"], 64 * claimed)}
        for key in ("num_examples", "num_bytes"):
            info["splits"]["train"][key] = sum(s[key] for s in info["splits"]["train"]["shards"])

    edit_info(dataset, agree)
    info = info_of(dataset)
    with arrow_memory() as memory:
        with pytest.raises(DatasetError, match=f"{INDEX}: cannot be read .*{message}"):
            read_shard_index(str(dataset), info, info.shards[0])
        assert any(re.search(message, problem) for problem in problems(dataset))
    assert memory.max_memory() < 16 << 20


def test_a_page_that_is_larger_than_the_file_says_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    pq.write_table(pa.table({"text": ["x" * (64 << 20)]}), path, compression="zstd", use_dictionary=False)
    content = path.read_bytes()

    def said() -> int:
        return int(pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size)

    number, less = varint(said()), b"\xd8\x84"  # 300
    less += b"\x80" * (len(number) - len(less) - 1) + b"\0"
    for match in re.finditer(re.escape(number), content):
        path.write_bytes(content[: match.start()] + less + content[match.end() :])
        if said() == 300:
            break
    assert said() == 300
    with pytest.raises(
        ShardError, match="not an index: pages of column text hold more than its metadata gives"
    ):
        read_index(str(path), limits=Limits(1, 0))


@pytest.mark.parametrize("less", [-1, -(1 << 30), 1 << 31, (1 << 32) + 5])
@pytest.mark.parametrize("field", ["bytes", "compressed bytes", "values"])
def test_a_page_of_a_size_that_none_can_be_is_not_read(tmp_path: Path, field: str, less: int) -> None:
    """Such a size can make up for a page that is too large."""
    path = tmp_path / "index.parquet"
    table = pa.table({"number": np.arange(100, dtype=np.int64)})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.data_page_offset
    header, end = page_header(content, start)
    size = {"bytes": header[2], "compressed bytes": header[3], "values": header[5][1]}[field]
    assert content.count(varint(size), start, end) == 1
    changed = content[start:end].replace(varint(size), varint(less))
    with pytest.raises(ValueError, match=f"column number has no usable header .*size or count is {less}"):
        require_said_sizes(content[:start] + changed + content[end:], column)
    require_said_sizes(content, column)


def test_a_field_of_a_page_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    pq.write_table(pa.table({"number": np.arange(100)}), path, use_dictionary=False)
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    _, end = page_header(content, column.data_page_offset)
    for number in (2, 2 + (1 << 16)):  # a field's number has 16 bits
        again = b"\x05" + varint(number) + varint(1)
        with pytest.raises(ValueError, match=f"field {number} is out of range or occurs twice"):
            require_said_sizes(content[: end - 1] + again + content[end - 1 :], column)


def test_a_dictionary_of_more_values_than_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"] * 100}), path, compression="none")
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset
    header, end = page_header(content, start)
    changed = content[start:end].replace(b"\x15" + varint(header[7][1]), b"\x15" + varint(1 << 30))
    with pytest.raises(ValueError, match=f"a dictionary has {1 << 30} values in 15 bytes"):
        require_said_sizes(content[:start] + changed + content[end:], column)


@pytest.mark.parametrize("depth", [4, 50_000])
def test_an_index_whose_columns_nest_does_not_end_the_process(dataset: Path, depth: int) -> None:
    (dataset / INDEX).write_bytes(nested_parquet(depth))
    told = [*problems(dataset)]
    for name in ("Dataset", "diff", "inspect --record"):
        with pytest.raises(DatasetError) as error:
            READERS[name](str(dataset))
        told.append(str(error.value))
    assert sum("nested deeper than the 4 levels" in text and INDEX in text for text in told) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda footer: footer[:-1] + b"\x15", "is not usable"),
        (lambda footer: footer[:-1] + b"\x09\x04\x0c\x00", "field 2 is out of range or occurs twice"),
        (
            lambda footer: footer[:-1] + b"\x19\x15\x00\x00",
            "of type 9, of 5",
        ),  # which Arrow takes for structs
        (lambda footer: footer.replace(b"\x19\xfc", b"\x19\xf5", 1), "field 2 of type 9, of 5"),
        (lambda footer: footer.replace(b"\x15\x02\x00", b"\x15\x01\x00", 1), "has -1 elements"),
        (
            lambda footer: footer[:-2] + b"\xfc\xff\xff\x7f" + b"\x00" * (1 << 21),
            "more values than it can need",
        ),
    ],
)
def test_a_footer_that_arrow_may_read_otherwise_is_refused(
    changed: Callable[[bytes], bytes], message: str
) -> None:
    footer = changed(nested_parquet(2)[4:-8])
    content = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(ValueError, match=message):
        require_schema(io.BytesIO(content), 4, 1 << 20)


def page_header(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a page's header, and where it ends."""
    reader = parquet_headers._Reader(content, at=at)
    return reader.struct(0), reader.at


def varint(number: int) -> bytes:
    """An integer as Thrift has it."""
    number, out = number << 1 if number >= 0 else -number * 2 - 1, b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def test_texts_that_many_rows_share_are_read(dataset: Path) -> None:
    """They may be too large by what is known before; then it is looked at how large they are."""
    table, facts = read_index(str(dataset / INDEX))
    texts = ["y" * (1 << 16), *(["x"] * 1999)]
    table = pa.concat_tables([table] * 1000)
    table = table.set_column(1, "participant_id", pa.array(texts))
    table = table.set_column(2, "session_id", pa.array([f"{i:032}" * 40 for i in range(2000)]))
    replace_index(dataset, INDEX, table, facts)
    found, _ = read_index(str(dataset / INDEX), limits=Limits(2000, 0))
    assert found.schema.remove_metadata() == table.schema.remove_metadata()
    assert found["participant_id"].to_pylist() == texts


@pytest.mark.parametrize("num_indexes", [1, 10, 10_000])
def test_what_all_indexes_of_a_dataset_take_is_bounded(num_indexes: int) -> None:
    """Their shards may be holes of any size."""
    file_bytes = 5000
    total = num_indexes * Limits(100, 0, num_indexes).most_bytes(file_bytes)
    assert total <= (64 << 20) + num_indexes * 256 * file_bytes
    total = num_indexes * Limits(100, 1 << 40, num_indexes).most_bytes(file_bytes)
    assert total <= (2 << 30) + num_indexes * 256 * file_bytes


def test_a_list_of_failures_that_is_larger_than_it_can_be_is_not_read(
    study: Path, dataset: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    failures = dataset / str(info_of(dataset).failures)
    os.truncate(failures, 1 << 30)
    message = r"has more than the 67,174,400 bytes that it may have where .* is 1; copy the dataset again"
    assert any(re.search(f"^{failures.name}: {message}", problem) for problem in problems(dataset))
    for command in (
        ("report", dataset, f"--out={tmp_path}/r.html"),
        ("inspect", dataset, "--record=sub-0004"),
    ):
        assert re.search(f"{failures}: {message}", run(*command, code=cli.FAILED))
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5)
    assert problems(dataset) == ()


def test_a_list_of_failures_is_bounded_whatever_the_dataset_says(
    dataset: Path, run: Callable[..., str]
) -> None:
    os.truncate(dataset / "failures.jsonl", 1 << 29)
    edit_info(dataset, lambda i: (i.update(num_failures=1 << 20), i["manifest"].update(num_rows=1 << 21)))
    message = "failures.jsonl: has more than the 268,435,456 bytes"
    assert message in run("inspect", dataset, "--record=nobody", code=cli.FAILED)
    assert any(message in problem for problem in problems(dataset))


def test_an_index_is_bounded_whatever_the_dataset_says(dataset: Path) -> None:
    os.truncate(dataset / INDEX, 1 << 30)
    os.truncate(dataset / SHARD, 1 << 24)

    def many(info: dict[str, Any]) -> None:
        shard = info["splits"]["train"]["shards"][0]
        for name, value in (("num_examples", 1 << 20), ("num_bytes", 1 << 24)):
            info["splits"]["train"][name] += value - shard[name]
            shard[name] = value

    edit_info(dataset, many)
    with pytest.raises(DatasetError, match=f"{INDEX}: not an index: has more than the 536,870,912 bytes"):
        Dataset(dataset)


def test_a_list_of_failures_that_is_none_is_a_fault_of_the_dataset(
    dataset: Path, run: Callable[..., str]
) -> None:
    (dataset / "failures.jsonl").write_text("no JSON\n")
    told = run("inspect", dataset, "--record=nobody", code=cli.FAILED)
    assert "failures.jsonl: cannot be read (" in told


def test_a_dataset_info_of_many_small_values_is_not_parsed(dataset: Path) -> None:
    text = (dataset / "dataset_info.json").read_text()
    (dataset / "dataset_info.json").write_text(f'{{"x": [{"[]," * (10 << 20)}[]],{text[1:]}')
    with peak_growth() as growth, pytest.raises(DatasetError, match="holds too many values for the length"):
        describe_dataset(str(dataset))
    assert growth() < 256 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest": {"num_rows": 1 << 62}}, "manifest.num_rows is 4611686018427387904, expected 0 to"),
        ({"manifest": {"num_skipped": -1}}, "manifest.num_skipped is -1, expected 0 to 5"),
        ({"manifest": {"num_frames": 1 << 64}}, "manifest.num_frames is 18446744073709551616"),
        ({"manifest": {"columns": ["path", ""]}}, "manifest.columns has an empty name"),
        (
            {"config": {"channels": ["path", ""]}, "shape": [4, 3, 2, 2]},
            r"config.channels is \['path', ''\], but config.columns.path is 'path'",
        ),
        ({"config": {"columns": COLUMNS | {"id": ""}}}, "config.columns has an empty name"),
        ({"features": {"": "float"}}, "features has an empty name"),
        (
            {"features": {str(number): "float" for number in range(1 << 16)}},
            r"features has 65,5\d\d names, expected at most 65,536",
        ),
        (
            {"manifest": {"columns": [str(number) for number in range((1 << 16) + 1)]}},
            "manifest.columns has 65,537 names, expected at most 65,536",
        ),
        ({"num_failures": 6}, "num_failures is 6, expected 0 to 5"),
    ],
)
def test_numbers_and_names_are_bounded(dataset: Path, change: dict[str, Any], message: str) -> None:
    def edit(info: dict[str, Any]) -> None:
        for name, value in change.items():
            info[name] = {**info[name], **value} if isinstance(value, dict) else value

    edit_info(dataset, edit)
    with pytest.raises(DatasetError, match=message):
        describe_dataset(str(dataset))


def hollow(path: Path) -> None:
    """A file of a gigabyte, all of it a hole."""
    path.touch()
    os.truncate(path, 1 << 30)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (hollow, "has more than the 67,108,864"),
        (os.mkfifo, "is a FIFO, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link that leads out"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_a_description_that_cannot_be_read_is_a_problem(
    dataset: Path, put: Callable[[Path], None], message: str
) -> None:
    put(dataset / "croissant.json")
    (problem,) = problems(dataset)
    assert re.search(rf"^croissant\.json: cannot be read: .*{message}", problem)


def test_a_file_in_the_place_of_the_card_is_not_read(dataset: Path) -> None:
    (dataset / "README.md").touch()
    os.truncate(dataset / "README.md", 1 << 30)
    with pytest.raises(OutputError, match=r"README\.md: already exists"):
        write_card(str(dataset), {}, overwrite=False)


def test_a_card_has_no_control_characters(dataset: Path) -> None:
    edit_info(dataset, lambda facts: facts["features"].update({"a\x1b[2J\u202e": "float"}))
    readme, _ = write_card(str(dataset), {})
    text = Path(readme).read_text()
    assert r"a\\x1b\[2J\\u202e" in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_an_index_of_another_program_is_neither_read_nor_removed(study: Path, dataset: Path) -> None:
    index = dataset / "index/more-00000-of-00001.parquet"
    (dataset / "more-00000-of-00001.tfrecord.gz").write_bytes(b"of others")
    index.touch()
    os.truncate(index, 1 << 30)
    build(study / "manifest.tsv", dataset, num_shards=1, max_bad_fraction=0.5, overwrite=True)
    assert index.stat().st_size == 1 << 30


def test_a_gzip_bomb_is_not_inflated(dataset: Path) -> None:
    edit_record(dataset, 0, lambda _: bytes(64 << 20))
    message = r"gzip holds 67,108,880 bytes, but the record has at most 1,048,"
    with pytest.raises(DatasetError, match=f"{SHARD}: record 'sub-0000', .*{message}"):
        Dataset(dataset)[0]
    with pytest.raises(DatasetError, match=message):
        read_volume(str(dataset), "sub-0000")
    assert any(re.search(message, problem) for problem in problems(dataset))


def test_a_record_that_hides_another_one_is_found(dataset: Path) -> None:
    """The checksum at its end is that of its first member, with which a reader of one record is content."""

    def hide(record: bytes) -> EncodedRecord:
        pieces = (record, encode_record(b"another record", 1), record)
        return EncodedRecord(pieces, (sum(map(len, pieces)),))

    edit_stored(dataset, 0, hide)
    message = r"bytes follow the end of a gzip member, which other programs may read"
    (problem,) = problems(dataset)
    assert re.search(rf"{SHARD}: record 0 \(sub-0000\): \d+ {message}", problem)
    with pytest.raises(DatasetError, match=message):
        read_volume(str(dataset), "sub-0000")


def test_a_record_that_is_said_to_take_all_of_a_large_file_is_not_read(study: Path, dataset: Path) -> None:
    """A file may be mostly a hole, which takes no place on a disk or in an archive."""
    size = 256 << 20
    os.truncate(dataset / SHARD, size)
    table, _ = read_index(str(dataset / INDEX))
    last = table.num_rows - 1
    length = size - table["offset"][last].as_py()
    edit_index(dataset, set_cell("length", last, length))
    edit_index(dataset, set_cell("member_lengths", last, [length]))

    set_facts(dataset, num_bytes=size)
    name, message = (
        f"sub-000{last}",
        r"has 268,43\d,\d+ bytes according to the index, but can have at most 2,16\d,\d+",
    )
    with peak_growth() as growth:
        with pytest.raises(DatasetError, match=rf"{SHARD}: record '{name}', .*{message}"):
            Dataset(dataset)[last]
        with pytest.raises(DatasetError, match=message):
            read_volume(str(dataset), name)
        found = problems(dataset)
        build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5, recheck=True)
    assert any(re.search(rf"record {last} \({name}\): {message}", problem) for problem in found)
    assert growth() < 128 << 20
    assert problems(dataset) == ()


@pytest.mark.parametrize("has_index", [True, False])
def test_a_hole_at_the_end_of_a_shard_takes_no_time(
    dataset: Path, has_index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pass, "_MOST_HASHED", 1 << 20)
    size = 1 << 40
    os.truncate(dataset / SHARD, size)
    set_facts(dataset, num_bytes=size)
    if not has_index:
        (dataset / INDEX).unlink()
    found = problems(dataset)
    assert any(f"{SHARD}: its sha256 is not known, as its {size:,} bytes were not all" in p for p in found)


def test_records_in_a_shard_that_is_said_to_have_none_are_found(study: Path, dataset: Path) -> None:
    """Other programs read them."""
    shutil.rmtree(dataset)
    for number in (0, 1):
        (study / f"sub-000{number}.nii.gz").write_bytes(b"no image")
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.9)
    assert problems(dataset) == ()
    shard = info_of(dataset).shards[0]
    assert shard.num_examples == 0
    content = encode_record(b"another record", 1)
    sha256 = hashlib.sha256(content).hexdigest()
    (dataset / SHARD).write_bytes(content)
    table, facts = read_index(str(dataset / INDEX))
    replace_index(dataset, INDEX, table, facts | {"sha256": sha256, "num_bytes": str(len(content))})
    set_facts(dataset, sha256=sha256, num_bytes=len(content))
    assert problems(dataset) == (
        f"{INDEX}: has no rows, but the shard's file has {len(content)} bytes, expected 20",
    )


def test_of_mixed_shapes_the_index_bounds_a_record(tmp_path: Path) -> None:
    for i in range(2):
        write_image(tmp_path / f"{i}.nii", np.arange(24 + 6 * i, dtype=np.int16).reshape(4 + i, 3, 2))
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": f"{i}.nii"} for i in range(2)])
    build(manifest, tmp_path / "out", allow_mixed_shapes=True)
    assert [element["image"].shape[0] for element in Dataset(tmp_path / "out")] == [4, 5]
    edit_record(tmp_path / "out", 0, lambda _: bytes(64 << 20))
    with pytest.raises(DatasetError, match="gzip holds 67,108,880 bytes"):
        Dataset(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x0a" + b"\x80" * (1 << 16), "a number of more than 64 bits"),
        (b"\x0a\xff\xff\xff\xff\x7f", "reaches past the end"),
    ],
)
def test_lengths_of_a_record_that_cannot_be(payload: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        decode_example(payload)


def test_the_features_are_bounded() -> None:
    record = encode_example({str(i): b"" for i in range(1 << 16 | 1)})
    with pytest.raises(ShardError, match="a message of more than 65536 fields"):
        decode_example(record)


def test_a_list_of_integers_is_bounded() -> None:
    feature = encode_example({"x": np.zeros(1 << 18, np.int64)})
    with pytest.raises(ShardError, match="a list of integers of"):
        decode_example(feature)


def test_a_record_of_a_length_that_it_does_not_have() -> None:
    record = bytearray(encode_record(b"payload", None))
    record[:8] = struct.pack("<Q", 1 << 62)
    with pytest.raises(ShardError, match="CRC of the record's length"):
        decode_record(bytes(record), compressed=False)


# Records


def with_features(**values: Any) -> Callable[[bytes], bytes]:
    def change(payload: bytes) -> bytes:
        held = {k: bytes(v) if isinstance(v, memoryview) else v for k, v in decode_example(payload).items()}
        return encode_example({k: v for k, v in (held | values).items() if v is not None})

    return change


@pytest.mark.parametrize(
    ("options", "edit", "columns", "message"),
    [
        ({}, with_features(zooms=None), ["intensity_min", "image"], None),
        ({}, with_features(intensity_min=None), ["intensity_min"], "it has no intensity_min that is float"),
        ({}, with_features(intensity_min=b"x"), ["intensity_min"], "it has no intensity_min that is float"),
        ({}, with_features(image_raw=None), ["image"], "it has no image_raw"),
        (
            {"voxel_dtype": "native"},
            with_features(scl_slope=b"", scl_inter=b"12345678"),
            ["image"],
            "float64 does not",
        ),
        (
            {"voxel_dtype": "native", "rescale": "zscore"},
            with_features(rescale_low=struct.pack("<2d", 1, 2)),
            ["image"],
            "its rescale_low has 2 numbers, expected 1",
        ),
        (
            {"voxel_dtype": "native"},
            with_features(image_raw=encode_tensor(np.zeros(SHAPE, np.int16))),
            ["image"],
            "cannot be read",
        ),
    ],
)
def test_a_record_that_lacks_what_is_read_is_named(
    built: Path, tmp_path: Path, options: dict[str, Any], edit: Any, columns: list[str], message: str | None
) -> None:
    build(built / "manifest.tsv", tmp_path / "out", num_shards=2, max_bad_fraction=0.5, **options)
    edit_record(tmp_path / "out", 0, edit)
    if message is None:
        assert Dataset(tmp_path / "out", columns=columns)[0].keys() == set(columns)
        return
    with pytest.raises(DatasetError, match=rf"{SHARD}: record 'sub-0000', .*{message}"):
        Dataset(tmp_path / "out", columns=columns)[0]


@pytest.mark.parametrize("name", ["id", "label", "affine", "age"])
def test_no_feature_of_another_name_is_taken_for_a_tensor(dataset: Path, name: str) -> None:
    """Only `image_raw` and `mask_raw` are tensors that readers know."""
    columns = ["id", "image", name]
    honest = Dataset(dataset, columns=columns)[0][name]
    edit_info(dataset, lambda facts: facts["features"].update({f"{name}_raw": "bytes"}))
    records = Dataset(dataset, columns=columns)
    for element in (records[0], records.patch(0, (0, 0, 0), (1, 1, 1))):
        assert np.array_equal(element[name], honest)


def _field(number: int, content: bytes) -> bytes:
    assert len(content) < 1 << 14
    size = [len(content)] if len(content) < 128 else [len(content) & 127 | 128, len(content) >> 7]
    return bytes([number << 3 | 2, *size]) + content


def _entry(name: str, feature: bytes) -> bytes:
    return _field(1, _field(1, name.encode()) + _field(2, feature))


def _floats(number: float, field: int = 1) -> bytes:
    return _field(2, _field(field, struct.pack("<f", number)))


def with_label(*fields: bytes, **beside: bytes) -> Callable[[bytes], bytes]:
    """An edit that writes a record's label as some fields of its features, and fields after these."""

    def change(payload: bytes) -> bytes:
        held = decode_example(payload)
        rest = [
            _entry(
                name,
                _field(1, _field(1, bytes(v)))
                if isinstance(v, memoryview)
                else _field(2, _field(1, v.astype("<f4").tobytes())),
            )
            for name, v in reversed(held.items())
            if name != "label"
        ]
        return _field(1, b"".join([*rest, *fields])) + beside.get("after", b"")

    return change


def test_a_record_with_its_features_in_another_order_is_read(dataset: Path) -> None:
    honest = Dataset(dataset)[0]["label"]
    edit_record(dataset, 0, with_label(_entry("label", _floats(float(honest)))))
    assert Dataset(dataset)[0]["label"] == honest
    assert problems(dataset) == ()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_label(_entry("label", _floats(7)), after=_field(2, b"")), "field 2 of a message is unknown"),
        (with_label(after=_field(1, _entry("label", _floats(7)))), "field 1 of a message occurs twice"),
        (with_label(_field(2, _entry("label", _floats(7)))), "field 2 instead of field 1"),
        (with_label(_entry("label", _floats(7)) * 2), "feature 'label' occurs twice"),
        (with_label(_entry("label", _floats(7) * 2)), "field 2 of a message occurs twice"),
        (with_label(_entry("label", _floats(7) + _field(3, b""))), "2 kinds of values instead of 1"),
        (with_label(_entry("label", _floats(7, field=9))), "field 9 of a message is unknown"),
        (
            with_label(_field(1, _field(1, b"label") + _field(2, _floats(7)) * 2)),
            "field 2 of a message occurs twice",
        ),
        (
            with_label(_field(1, _field(1, b"label") + _field(2, _floats(7)) + _field(10, b"x"))),
            "field 10 of a message is unknown",
        ),
        (
            with_features(
                image_raw=b"".join(encode_tensor(np.zeros(SHAPE, np.float32))) + _field(5, b"abcd")
            ),
            "field 5 of a message is unknown",
        ),
    ],
)
def test_a_record_that_parsers_read_differently_is_refused(
    dataset: Path, edit: Callable[[bytes], bytes], message: str
) -> None:
    edit_record(dataset, 0, edit)
    with pytest.raises(DatasetError, match=rf"{SHARD}: record 'sub-0000', .*{message}"):
        Dataset(dataset, columns=["label", "image", "zooms"])[0]
    assert any("sub-0000" in problem and message in problem for problem in problems(dataset))


def test_a_mask_of_another_shape_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "i.nii", np.arange(24, dtype=np.int16).reshape(SHAPE))
    write_image(tmp_path / "m.nii", np.ones(SHAPE, np.uint8))
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "i.nii", "mask": "m.nii"}])
    output = tmp_path / "out"
    build(manifest, output, columns={"mask": "mask"})
    assert Dataset(output, columns=["mask"])[0]["mask"].shape == (*SHAPE, 1)
    edit_record(output, 0, with_features(mask_raw=encode_tensor(np.ones((2, 2, 2), np.uint8))))
    with pytest.raises(DatasetError, match=r"its mask_raw is uint8 of \(2, 2, 2\)"):
        Dataset(output, columns=["mask"])[0]


# Indexes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_cell("affine", 0, [1.0] * 15), "column affine of record 0 .* has 15 values, expected 16"),
        (set_cell("affine", 0, [None] * 16), "column affine has 16 empty values"),
        (set_cell("shape", 0, [4, 3, 3]), r"column shape has other shapes than \[4, 3, 2\]"),
        (set_cell("example_id", 0, None), "column example_id has 1 empty cells"),
        (set_cell("length", 0, -1), "has -1 bytes at offset 0, which are not in"),
        (set_cell("length", 0, 1 << 62), "which are not in"),
        (set_cell("offset", 0, (1 << 63) - 1), "which are not in"),
        (lambda t: t.append_column("hidden", pa.array([1] * t.num_rows)), "has a column 'hidden'"),
        (lambda t: t.drop_columns(["zooms"]), "column zooms is missing"),
        (
            lambda t: t.set_column(3, "label", pa.array([[{"a": 1}]] * t.num_rows)),
            "columns are nested deeper than the 4 levels",
        ),
        (lambda t: t.append_column("label", t["label"]), "not an index"),
        (
            lambda t: t.set_column(0, "example_id", pa.array([b"\xff"] * t.num_rows).view(pa.string())),
            "Invalid UTF8 sequence",
        ),
    ],
)
def test_an_index_that_no_build_writes_is_named(
    dataset: Path, edit: Callable[[pa.Table], pa.Table], message: str
) -> None:
    edit_index(dataset, edit)
    with pytest.raises(DatasetError, match=rf"{INDEX}: .*{message}"):
        describe_dataset(str(dataset))
    assert problems(dataset)


def test_indexes_of_different_columns_are_named(study: Path, dataset: Path) -> None:
    edit_index(dataset, lambda table: table.drop_columns(["age"]), shard=1)
    other = rf"{INDEX.replace('00000', '00001', 1)}: .*"
    with pytest.raises(DatasetError, match=f"{other}has other columns than {INDEX}"):
        Dataset(dataset, columns=["age"])
    assert len(list(Dataset(dataset))) == 4
    assert any(re.search(f"{other}has other columns than {INDEX}", p) for p in problems(dataset))
    with_manifest = problems(dataset, manifest=str(study / "manifest.tsv"))
    assert any(re.search(f"{other}column age is missing", p) for p in with_manifest)


def test_versions_that_are_none_are_named(dataset: Path) -> None:
    table, facts = read_index(str(dataset / INDEX))
    for versions in ("[[[[", "[" + "[]," * (1 << 20) + "[]]"):
        replace_index(dataset, INDEX, table, facts | {"versions": versions})
        with peak_growth() as growth:
            found = problems(dataset)
        assert any(f"{INDEX}: cannot be read: versions of an index" in problem for problem in found)
        assert growth() < 64 << 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"message": "\\ud800"}', "message is .*, which is not Unicode text"),
        ('{"message": {}}', "message is {}, expected text"),
        ("[]", r"a line is \[\], expected an object"),
        ('{"row": [' + "[]," * (1 << 20) + "1]}", "holds too many values for the length of its text"),
    ],
    ids=["surrogate", "object", "list", "values"],
)
def test_a_failure_that_no_build_writes_is_not_shown(dataset: Path, line: str, message: str) -> None:
    (dataset / "failures.jsonl").write_text(line)
    refused = pytest.raises(DatasetError, match=rf"failures.jsonl: cannot be read \({message}")
    with peak_growth() as growth, refused:
        read_failures(str(dataset), info_of(dataset))
    assert growth() < 64 << 20


# Appending


def layout_of(num_shards: int, *splits: str) -> dict[str, Any]:
    """A layout of a plan, of that many shards a split."""
    sharding = {"examples_per_shard": None, "num_shards": num_shards}
    return {"split_sizes": dict.fromkeys(splits, num_shards), "sharding": sharding}


def test_a_build_takes_nothing_from_an_index_that_no_build_writes(study: Path, dataset: Path) -> None:
    edit_index(dataset, set_cell("length", 0, -1))
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5)
    assert problems(dataset) == ()
    assert len(list(Dataset(dataset))) == 4


@pytest.mark.parametrize(
    "edit",
    [
        set_cell("offset", 0, None),
        lambda table: table.drop_columns(["length"]),
        lambda table: table.append_column("length", table["length"]),
    ],
    ids=["empty", "missing", "twice"],
)
def test_a_recheck_replaces_a_shard_whose_index_does_not_lead_through_it(
    study: Path, dataset: Path, edit: Callable[[pa.Table], pa.Table]
) -> None:
    edit_index(dataset, edit)
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5, recheck=True)
    assert problems(dataset) == ()


@pytest.mark.parametrize("kind", [pa.string(), pa.timestamp("us")])
def test_a_build_takes_nothing_by_positions_that_are_no_numbers(
    study: Path, dataset: Path, kind: pa.DataType
) -> None:
    """By the least and the largest of them, in the file's footer, it is decided which rows to read."""

    def edit(table: pa.Table) -> pa.Table:
        place = table.column_names.index("position")
        return table.set_column(place, "position", table["position"].cast(kind))

    edit_index(dataset, edit)
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5)
    assert problems(dataset) == ()


def test_a_build_takes_nothing_from_an_index_that_was_changed(study: Path, dataset: Path) -> None:
    """Otherwise the digest of the change would become that of the dataset."""
    table, facts = read_index(str(dataset / INDEX))
    write_index(str(dataset / INDEX), set_cell("mean", 0, 1.25)(table), facts)
    assert problems(dataset)
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5)
    assert problems(dataset) == ()
    assert read_index(str(dataset / info_of(dataset).shards[0].index))[0]["mean"][0].as_py() != 1.25


@pytest.mark.parametrize(
    "facts",
    [
        {"versions": "[[[["},
        {"versions": "[]"},
        {"versions": "[1]"},
        {"sha256": "0"},
        {"sha256": None},
        {"num_bytes": "many"},
        {"num_bytes": "-5"},
        {"num_bytes": None},
    ],
)
@pytest.mark.parametrize("are_appended", [False, True])
def test_a_build_takes_nothing_by_metadata_that_no_build_writes(
    study: Path, dataset: Path, facts: dict[str, str | None], are_appended: bool
) -> None:
    table, known = read_index(str(dataset / INDEX))
    changed = {name: text for name, text in (known | facts).items() if text is not None}
    replace_index(dataset, INDEX, table, changed)
    if are_appended:
        with (study / "manifest.tsv").open("a") as handle:
            handle.write((study / "manifest.tsv").read_text().splitlines()[1].replace("0000", "0009") + "\n")
        shutil.copy(study / "sub-0000.nii.gz", study / "sub-0009.nii.gz")
    build(study / "manifest.tsv", dataset, num_shards=2, max_bad_fraction=0.5)
    assert problems(dataset) == ()
    assert len(list(Dataset(dataset))) == 4 + are_appended


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b'{"reasons": [1]}', b"{" * 99_999, b" " * (1 << 24) + b"{}", b'{"reasons": []}'],
)
def test_a_summary_that_no_build_has_written_ends_the_build(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str], content: bytes
) -> None:
    """Another program has put it where the workers put theirs."""
    monkeypatch.setattr("beam_nifti.pipeline.publish._write_summary", lambda *_: put.write_bytes(content))
    put = tmp_path / "new/.build/summary.json"
    told = run("build", study / "manifest.tsv", tmp_path / "new", "--max-bad-fraction=0.5", code=cli.USAGE)
    assert f"{put}: differs from what the pipeline wrote" in told


def test_a_report_of_a_check_that_no_pipeline_has_written_is_named(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    out = tmp_path / "report.json"
    monkeypatch.setattr("beam_nifti.pipeline.check._write_report", lambda *_: out.write_bytes(b"[]"))
    told = run("check", study / "manifest.tsv", f"--out={out}", code=cli.USAGE)
    assert f"{out}: differs from what the pipeline wrote: it is [], expected an object" in told
    out.unlink()
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 1 << 31)
    monkeypatch.setattr("beam_nifti.pipeline.check._write_report", lambda *_: large.rename(out))
    told = run("check", study / "manifest.tsv", f"--out={out}", code=cli.USAGE)
    assert f"{out}: differs from what the pipeline wrote: has more than the 67,129,344 bytes" in told


@pytest.mark.parametrize(
    "edit",
    [
        lambda note: note.update(
            layouts=[{"split_sizes": {"train": 10**15}, "sharding": {"examples_per_shard": 1}}]
        ),
        lambda note: note.update(layouts=[note["layouts"][0] | layout_of(1 << 19, "a", "b", "c")]),
        lambda note: note.update(layouts=[note["layouts"][0] | layout_of(1 << 19, "a")] * 3),
        lambda note: note["layouts"][0].update(num_frames=1.5),
        lambda note: note["layouts"][0]["split_sizes"].update(train=1.5),
        lambda note: note["layouts"][0]["split_sizes"].update({"../../x": 1}),
        lambda note: note["layouts"][0]["split_sizes"].update({"x" * 10 + "/y": 1}),
        lambda note: note.update(published=["../../x"]),
        lambda note: note.update(published=["README.md"]),
        lambda note: note["layouts"][0]["sharding"].update(num_shards=0, examples_per_shard=None),
        lambda note: note["info"]["config"].update(fingerprint="../../.."),
        lambda note: note.update(roots=["/"]),
        lambda note: note.update(published=[1]),
        lambda note: note.update(surplus=1),
    ],
)
def test_the_note_of_an_unfinished_build_is_checked(study: Path, edit: Callable[[Any], None]) -> None:
    output = study / "new"
    config = make_config(study / "manifest.tsv", output)
    plan, _ = plan_build(config)
    note = SavedPlan(plan.describe(), (plan.layout,), (".build",), plan.identity, False)
    note.write(str(output))
    assert SavedPlan.read(str(output)) == note
    path = output / ".build/plan.json"
    facts = json.loads(path.read_text())
    edit(facts)
    facts["info"]["digest"] = content_digest(facts["info"])
    path.write_text(json.dumps(facts))
    with pytest.raises(BeamNiftiError, match=r"\.build/plan\.json: "):
        plan_build(config)
