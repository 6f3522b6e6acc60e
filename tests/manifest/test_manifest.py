"""The manifest: the same rows from every format, and every problem with its row."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.config import Columns, Splitting
from beam_nifti.errors import ManifestError
from beam_nifti.manifest import read_manifest
from beam_nifti.manifest.tables import BLANKS, MAX_PROBLEMS
from tests.images import write_manifest
from tests.peak import peak_mib

ROWS = [
    {"path": "a/007.nii", "label": "1", "participant_id": "007", "split": "train", "site": "Zürich"},
    {"path": "b c.nii.gz", "label": "-0.5", "participant_id": "008", "split": "test", "site": ""},
    {"path": "/d.nii", "label": "1e3", "participant_id": "009", "split": "train", "site": 'a, "b"'},
]


def write_csv(path: Path) -> None:
    path.write_text(
        "path,label,participant_id,split,site\n"
        "a/007.nii,1,007,train,Zürich\n"
        'b c.nii.gz,-0.5,"008",test,\n'
        '/d.nii,1e3,009,train,"a, ""b"""\n'
    )


def write_excel_csv(path: Path) -> None:
    text = (
        "path,label,participant_id,split,site\r\n"
        "\r\n"
        "a/007.nii,1,007,train,Zürich\r\n"
        '"b c.nii.gz",-0.5,008,test,""\r\n'
        "\r\n"
        '/d.nii,1e3,009,train,"a, ""b"""'
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())


def write_tsv(path: Path) -> None:
    lines = ["\t".join(ROWS[0]), *("\t".join(r.values()) for r in ROWS)]
    path.write_text("\n".join(lines) + "\n\n")


def write_json_lines(path: Path) -> None:
    lines = [json.dumps(r) for r in ROWS]
    lines[0] = json.dumps(ROWS[0], ensure_ascii=False).replace('"label": "1"', '"label": 1')
    lines[1] = lines[1].replace('"-0.5"', "-0.5").replace('"site": ""', '"site": null')
    lines[2] = lines[2].replace('"1e3"', "1e3")
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())


def write_parquet(path: Path) -> None:
    columns = {name: pa.array([r[name] for r in ROWS]) for name in ROWS[0]}
    columns["split"] = columns["split"].dictionary_encode()
    columns["site"] = pa.array([r["site"] or None for r in ROWS], pa.large_string())
    pq.write_table(pa.table(columns), path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "m.csv": write_csv,
    "excel.CSV": write_excel_csv,
    "m.tsv": write_tsv,
    "m.jsonl": write_json_lines,
    "m.ndjson": write_json_lines,
    "m.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    manifest = read_manifest(str(tmp_path / name))
    assert manifest.table.to_pylist() == ROWS
    assert manifest.folder == str(tmp_path)
    assert manifest.extra_columns == ("site",)
    assert manifest.split_sizes() == {"test": 1, "train": 2}
    assert manifest.row_numbers("train").tolist() == [0, 2]
    first, second, third = manifest.rows([0, 1, 2], 5, "a-shard", 4)
    assert (first.row, second.row, third.row) == (1, 2, 3)
    assert (first.position, second.position, third.position) == (5, 6, 7)
    assert first.example_id == first.participant_id == "007"
    assert [r.label for r in (first, second, third)] == [1.0, -0.5, 1000.0]
    assert [r.path for r in (first, second, third)] == ["a/007.nii", "b c.nii.gz", "/d.nii"]
    assert [r.extras for r in (first, second, third)] == [("Zürich",), ("",), ('a, "b"',)]
    assert (third.split, third.shard, third.unit) == ("train", "a-shard", 4)


def test_the_digest_is_of_the_rows_and_not_of_the_file(tmp_path: Path) -> None:
    digests = set()
    for name, write in FORMATS.items():
        write(tmp_path / name)
        digests.add(read_manifest(str(tmp_path / name)).digest())
    assert len(digests) == 1


def test_the_digest_of_an_ordinary_manifest_stays(tmp_path: Path) -> None:
    text = "participant_id,path,label,split,site\nsub-1,a.nii,1.50,train,Zürich (a b)\nsub-2,b.nii,2,test,\n"
    for name, cells in (("m.csv", text), ("m.tsv", text.replace(",", "\t"))):
        (tmp_path / name).write_text(cells)
        assert read_manifest(str(tmp_path / name)).digest() == (
            "e251176756c432d1dac262a3e4e5d0bb64796f26541ee2305dda2d4744a988f0"
        )


def test_the_digest_of_the_first_rows_tells_whether_rows_were_only_appended(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_csv(path)
    before = read_manifest(str(path))
    path.write_text(path.read_text() + "e.nii,4,010,train,\n")
    after = read_manifest(str(path))
    assert after.digest(3) == before.digest() == before.digest(3)
    assert after.digest() != before.digest()
    path.write_text(path.read_text().replace("Zürich", "Basel"))
    assert read_manifest(str(path)).digest(3) != before.digest()
    path.write_text(path.read_text().replace("site", "place"))
    assert read_manifest(str(path)).digest(0) != before.digest(0)


def test_the_digest_of_many_rows_does_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("path\n" + "".join(f"{i}.nii\n" for i in range(40_000)))
    manifest = read_manifest(str(path))
    pieces = [manifest.table.slice(i, 7_001) for i in range(0, 40_000, 7_001)]
    cut = dataclasses.replace(manifest, table=pa.concat_tables(pieces))
    assert cut.digest() == manifest.digest()
    assert cut.digest(20_000) == manifest.digest(20_000) != manifest.digest(20_001)


def read_text(
    tmp_path: Path, text: str, name: str = "m.csv", **columns: str
) -> list[tuple[str, float | None]]:
    """Ids and labels of a manifest given as text."""
    (tmp_path / name).write_bytes(text.encode())
    manifest = read_manifest(str(tmp_path / name), Columns(**columns))
    return [(r.example_id, r.label) for r in manifest.rows(range(len(manifest)))]


def problems_of(tmp_path: Path, text: str | bytes, name: str = "m.csv", **columns: str) -> tuple[str, ...]:
    """What is wrong with a manifest given as text."""
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManifestError) as caught:
        read_manifest(str(tmp_path / name), Columns(**columns))
    assert str(tmp_path / name) in str(caught.value)
    return caught.value.problems


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    text = "scan,file,age,label,sex\nx1,a.nii,31,9,f\nx2,b.nii,32,9,m\n"
    names = {"path": "file", "label": "age", "id": "scan"}
    assert read_text(tmp_path, text, **names) == [("x1", 31.0), ("x2", 32.0)]
    manifest = read_manifest(str(tmp_path / "m.csv"), Columns(**names))
    assert manifest.extra_columns == ("label", "sex")
    assert manifest.columns == Columns("file", "age", "scan")


def test_what_names_an_example(tmp_path: Path) -> None:
    assert read_text(tmp_path, "path\na.nii\nb.nii\n") == [("a.nii", None), ("b.nii", None)]
    assert read_text(tmp_path, "path,participant_id\na.nii,s1\n") == [("s1", None)]
    text = "path,participant_id,session_id\na,s1,01\nb,s1,02\nc,s2,\n"
    assert [i for i, _ in read_text(tmp_path, text)] == ["s1_01", "s1_02", "s2"]
    manifest = read_manifest(str(tmp_path / "m.csv"))
    rows = manifest.rows([0, 2])
    assert [(r.participant_id, r.session_id) for r in rows] == [("s1", "01"), ("s2", "")]


def test_a_manifest_without_labels_is_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\na.nii\n")
    manifest = read_manifest(str(tmp_path / "m.csv"))
    assert manifest.numbers is None
    assert manifest.columns.label is None


def test_labels_are_numbers_of_float32(tmp_path: Path) -> None:
    texts = ["0", "-0.0", "1e-3", " 2.5 ", "+7", "3.4028234e38", "16777217", "1E5", ".5"]
    text = "path,label\n" + "".join(f"{i}.nii,{t}\n" for i, t in enumerate(texts))
    assert [label for _, label in read_text(tmp_path, text)] == [float(t) for t in texts]


@pytest.mark.parametrize("label", ["inf", "-Infinity", "1e39", "-3.5e38", "1_000", "0x1", "1 2", "89+", "x"])
def test_other_labels_are_refused_with_their_row(tmp_path: Path, label: str) -> None:
    (problem,) = problems_of(tmp_path, f"path,label\na.nii,1\nb.nii,{label}\n")
    assert problem == (
        f"row 2: label is {label!r}, not a finite float32 number; correct it, or make classes of all "
        "labels with --label-column label:class"
    )


@pytest.mark.parametrize("label", ["NaN", "Infinity", "null", "1e400"])
def test_labels_in_json_lines_are_checked_too(tmp_path: Path, label: str) -> None:
    (problem,) = problems_of(tmp_path, f'{{"path": "a", "label": {label}}}', "m.jsonl")
    assert problem.startswith("row 1: label is ")


def test_an_absent_cell_in_json_lines_is_an_empty_one(tmp_path: Path) -> None:
    text = '{"path": "a", "label": 1}\n{"path": "b"}\n{"label": 2, "site": "x"}\n'
    assert problems_of(tmp_path, text, "m.jsonl") == (
        "row 3: empty path; give the image's path or drop the row",
        "row 2: label is '', a missing label; fill it in, keep such rows with --missing-label nan, or skip "
        "them with --missing-label skip",
        "row 3: empty id; every image needs one (see --id-column)",
    )


def test_a_late_column_in_json_lines_is_a_column_of_all_rows(tmp_path: Path) -> None:
    lines = [f'{{"path": "{i}.nii"}}' for i in range(20_000)]
    lines[-1] = '{"path": "last.nii", "site": "x"}'
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    manifest = read_manifest(str(tmp_path / "m.jsonl"))
    first, last = manifest.rows([0, len(manifest) - 1])
    assert (len(manifest), manifest.extra_columns) == (20_000, ("site",))
    assert (first.extras, last.extras) == (("",), ("x",))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = (
        "path,label,participant_id,split\n"
        "a.nii,1,s1,train\n"
        ",2,s2,train\n"
        "b.nii,x,s3,train\n"
        "c.nii,3,s1,train\n"
        "d.nii,4,s4,tr ain\n"
        "  ,5,,train\n"
    )
    problems = problems_of(tmp_path, text)
    assert [p.partition(":")[0] for p in problems] == [
        "row 2", "row 6", "row 3", "row 5", "row 5", "row 6", "row 4"
    ]  # fmt: skip
    assert "row 4: id 's1' is also in row 1; add a session_id column" in problems[-1]
    assert "split is 'tr ain'" in problems[3]
    assert "split is 'tr ain', and 'train' in row 1; give them one spelling" in problems[4]


def test_paths_and_ids_that_take_long_to_handle_are_refused(tmp_path: Path) -> None:
    rows = [
        {"path": "x" * 4097, "participant_id": "1", "session_id": "1"},
        {"path": "x/" * 101 + "a.nii", "participant_id": "2", "session_id": "1"},
        {"path": "x/" * 100 + "a.nii", "participant_id": "3" * 4097, "session_id": "1"},
        {"path": "x" * 4096, "participant_id": "4" * 4096, "session_id": "2" * 5000},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError) as caught:
        read_manifest(str(path))
    assert str(caught.value).splitlines()[1:] == [
        "  row 1: path has 4,097 characters, more than 4,096; correct the image's path",
        "  row 2: path has 101 folders, more than 100; correct the image's path",
        "  row 3: participant_id has 4,097 characters, more than 4,096; give a shorter one",
        "  row 4: session_id has 5,000 characters, more than 4,096; give a shorter one",
    ]


def test_no_more_than_twenty_are_told(tmp_path: Path) -> None:
    text = "path,label\n" + "a.nii,inf\n" * 20
    assert len([p for p in problems_of(tmp_path, text) if "label" in p]) == MAX_PROBLEMS == 20
    text = "path,label\n" + "".join(f"{i}.nii,inf\n" for i in range(20))
    assert len(problems_of(tmp_path, text)) == 20
    problems = problems_of(tmp_path, text + "20.nii,inf\n")
    assert (len(problems), problems[-1]) == (21, "(and more)")


def test_a_manifest_that_is_only_a_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    for content, what in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a Git LFS pointer; run `git lfs",
        ),
        (b"/annex/objects/MD5E-s592--0.tsv\n", "a git-annex pointer; run `git annex get`"),
        (b"<!doctype html><title>Sign in</title>", "an HTML page, as servers send for errors; download"),
    ):
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=f"(?s)m.tsv: .*not a table but {what}"):
            read_manifest(str(path))
    path.unlink()
    path.symlink_to(".git/annex/objects/MD5E-s592--0.tsv")
    with pytest.raises(
        ManifestError, match=r"(?s)m\.tsv: .*a git-annex link without its content; run `git annex get`"
    ):
        read_manifest(str(path))


@pytest.mark.parametrize(
    ("text", "columns", "problem"),
    [
        (
            "file,label\na,1\n",
            {},
            "no column 'path'; the columns are: file, label; choose one with --path-column",
        ),
        (
            "path\na\n",
            {"label": "age"},
            "no column 'age'; the columns are: path; choose one with --label-column",
        ),
        ("path\na\n", {"id": "scan"}, "no column 'scan'; the columns are: path; choose one with --id-column"),
        ("path,label\n", {}, "no rows; a manifest needs a header and at least one image"),
        ("path,label\n\n\n", {}, "no rows; a manifest needs a header and at least one image"),
        ("path,label,label\na,1,2\n", {}, "column 'label' occurs twice; rename one"),
        ("", {}, "not a table: the first line is empty; it must name the columns"),
        ("\npath\na\n", {}, "not a table: the first line is empty; it must name the columns"),
        (
            "path;label\na;1\n",
            {},
            "its first line has ';' and no ','; save it as .csv with commas, or as .tsv with tabs",
        ),
        (
            "path\tlabel\na\t1\n",
            {},
            "its first line has '\\t' and no ','; save it as .csv with commas, or as .tsv with tabs",
        ),
        ("path,label\na,1\nb\n", {}, "row 2: 1 cells where the header names 2"),
        ("path,label\na,1\nb,2,3\n", {}, "row 2: 3 cells where the header names 2"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: str, columns: dict[str, str], problem: str) -> None:
    assert problems_of(tmp_path, text, **columns) == (problem,)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("file,split,label,participant_id\na,train,1,p\n", "add it, because the dataset was built with it"),
        (
            "path,split,label,participant_id\na,train,1,p\n",
            "rename it, because the splits of the dataset were drawn",
        ),
        ("path,label,participant_id\na,1,p\nb,1,p\n", "correct one of them, or drop the row"),
        ("path,label,participant_id\na,1,\n", "every image needs one"),
        (
            "path,label,participant_id\na,,p\n",
            "with --missing-label nan, or skip them with --missing-label skip",
        ),
        ("path,label,participant_id\na,1,p\n", "keep its participants, or build another dataset"),
    ],
)
def test_remedies_are_options_of_the_command(tmp_path: Path, text: str, remedy: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    splitting = Splitting({"train": 0.5, "test": 0.5})
    with pytest.raises(ManifestError) as caught:
        read_manifest(str(tmp_path / "m.csv"), splitting=splitting, options=("--missing-label",))
    assert any(problem.endswith(remedy) for problem in caught.value.problems)
    assert not re.search("--(?!missing-label)", str(caught.value))


def test_of_a_manifest_that_is_not_a_datasets_no_option_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("file,split\na,train\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(str(tmp_path / "m.csv"), Columns(label="age"), Splitting({"train": 1.0}), options=())
    assert len(caught.value.problems) == 3
    for problem in caught.value.problems:
        assert "--" not in problem
        assert problem.endswith("; give the manifest that the dataset was built from")


def test_ragged_rows_are_all_told(tmp_path: Path) -> None:
    rows = ["a,1", "b", "c,3", "d,4,5", ""]
    problems = problems_of(tmp_path, "path,label\n" + "\n".join(rows))
    assert problems == (
        "row 2: 1 cells where the header names 2",
        "row 4: 3 cells where the header names 2",
    )


@pytest.mark.parametrize("count", [20, 21, 500])
def test_no_more_than_twenty_ragged_rows_are_told(tmp_path: Path, count: int) -> None:
    problems = problems_of(tmp_path, "path,label\n" + "a\n" * count)
    assert problems[19] == "row 20: 1 cells where the header names 2"
    assert problems[20:] == (() if count == 20 else ("(and more)",))


def test_every_missing_column_is_told(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "a,b\n1,2\n", path="p", label="l", id="i")
    assert [p.split("'")[1] for p in problems] == ["p", "l", "i"]


def test_a_quoted_cell_may_hold_a_line_break(tmp_path: Path) -> None:
    text = 'path,note\na.nii,"two\nlines"\nb.nii,one\n'
    (tmp_path / "m.csv").write_text(text)
    manifest = read_manifest(str(tmp_path / "m.csv"))
    assert [r.extras for r in manifest.rows([0, 1])] == [("two\nlines",), ("one",)]


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\x1f\x8b\x08\x00" + bytes(range(256)) * 4,
        b"PK\x03\x04" + bytes(range(255, -1, -1)) * 3,
        b"\xff\xfep\x00a\x00t\x00h\x00\n\x00",
        b"PAR1" + b"\x00" * 40 + b"PAR1",
        b'path,x\n"unclosed\nb.nii\n',
        b'path,note\na.nii,"5 inch\nb.nii,"x"\nc.nii,y\n',
        b"path\na.nii\nM\xfcller.nii\n",
        b"path,label\n\xff\xfe,1\n",
        b"[" * 200_000,
        b'{"path": "\\ud800"}',
        b'{"path": ["a"]}',
        b'{"path": "a"',
        b"7\n",
        b"null\n",
    ],
    ids=range(16),
)
def test_what_is_not_a_table(tmp_path: Path, name: str, content: bytes) -> None:
    problems = problems_of(tmp_path, content, name)
    assert problems
    assert all(problems)


@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv", "jsonl"]))
def test_any_bytes_are_a_manifest_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    path.write_bytes(b"path\n" + data if suffix != "jsonl" else b'{"path": "' + data)
    with contextlib.suppress(ManifestError):
        manifest = read_manifest(str(path))
        assert all(r.path.strip() for r in manifest.rows(range(len(manifest))))


@pytest.mark.parametrize("name", ["m", "m.txt", "m.csv.gz", "m.xlsx", "dots.in/name", ".csv/m."])
def test_the_suffix_tells_the_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(str(path))
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(ManifestError, match=r"is not a \.csv, \.tsv, \.jsonl or \.parquet file"):
        read_manifest(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(str(tmp_path / "missing.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ManifestError, match="cannot be read: Is a directory"):
        read_manifest(str(tmp_path / "folder.csv"))
    with pytest.raises(ManifestError, match="nowhere:// is not supported here"):
        read_manifest("nowhere://bucket/m.csv")


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=12).filter(
    lambda text: text.strip(BLANKS) == text
)


@given(st.lists(CELLS, min_size=1, max_size=8, unique=True))
def test_any_text_in_a_cell_comes_back(tmp_path_factory: pytest.TempPathFactory, paths: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    quoted = ['"' + p.replace('"', '""') + '"' for p in paths]
    (folder / "cells.csv").write_bytes(("path\n" + "\n".join(quoted) + "\n").encode())
    (folder / "cells.jsonl").write_text("\n".join(json.dumps({"path": p}) for p in paths))
    pq.write_table(pa.table({"path": paths}), folder / "cells.parquet")
    for name in ("cells.csv", "cells.jsonl", "cells.parquet"):
        assert read_manifest(str(folder / name)).ids.to_pylist() == paths


_READ_MANY = """
import sys
from beam_nifti.manifest import read_manifest
manifest = read_manifest(sys.argv[1])
manifest.digest()
count = int(sys.argv[2])
assert len(manifest) == count
assert manifest.rows([count - 1])[0].participant_id == f"sub-{count - 1:07d}"
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_many_rows_take_a_bounded_memory(tmp_path: Path, suffix: str) -> None:
    few, many = 1_000, 201_000
    peaks = [peak_mib(_READ_MANY, write_many(tmp_path / f"{n}.{suffix}", n), n) for n in (few, many)]
    # A row has 68 bytes of text, and one of Python objects would take a kilobyte and more.
    assert (peaks[1] - peaks[0]) * (1 << 20) / (many - few) < 600


def write_many(path: Path, count: int) -> Path:
    numbers = [f"{i:07d}" for i in range(count)]
    table = pa.table(
        {
            "participant_id": [f"sub-{n}" for n in numbers],
            "path": [f"sub-{n}/anat/sub-{n}_T1w.nii.gz" for n in numbers],
            "label": np.arange(count) % 97,
            "split": pa.array(["train", "test"]).take(pa.array(np.arange(count) % 2)),
        }
    )
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with path.open("w") as handle:
            for batch in table.to_batches(10_000):
                handle.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    return path


@pytest.mark.parametrize("name", ["Label", "PARTICIPANT_ID", "Split"])
def test_a_column_that_is_ours_but_for_case_is_an_error(tmp_path: Path, name: str) -> None:
    path = write_manifest(tmp_path / "m.csv", [{"path": "a.nii", name: "1"}])
    with pytest.raises(ManifestError, match=f"column {name!r} is probably meant as"):
        read_manifest(str(path))
    assert len(read_manifest(str(path), Columns(id=name))) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.nii", "a.nii"),
        ("a.nii", "./x/..//a.nii"),
        ("a.nii", "{folder}/a.nii"),
        ("s3://lab/a.nii", "s3://lab/a.nii"),
        ("a.hdr", "a.img"),
        ("A.HDR.gz", "A.IMG.gz"),
    ],
)
def test_an_image_in_two_splits_is_refused(tmp_path: Path, one: str, other: str) -> None:
    rows = [
        {"participant_id": "1", "path": "b/a.nii", "more": "c.nii", "split": "train"},
        {"participant_id": "2", "path": one, "more": "d.nii", "split": "train"},
        {"participant_id": "3", "path": "e.nii", "more": other.format(folder=tmp_path), "split": "test"},
    ]
    path = write_manifest(tmp_path / "m.csv", rows)
    with pytest.raises(ManifestError) as caught:
        read_manifest(str(path), Columns(path="path,more"))
    (problem,) = caught.value.problems
    assert problem.startswith("row 3: image ")
    assert problem.endswith(
        "is in split test and, in row 2, in train; keep one of the rows, or give both one split"
    )
    rows[2]["split"] = "train"
    read_manifest(str(write_manifest(tmp_path / "n.csv", rows)), Columns(path="path,more"))


def test_an_image_may_be_in_two_splits_by_its_name_alone_or_by_a_row_that_is_skipped(tmp_path: Path) -> None:
    rows = [
        {"path": "1/a.nii", "split": "train", "label": "1"},
        {"path": "2/a.nii", "split": "test", "label": "2"},
        {"path": "./1/a.nii", "split": "test", "label": ""},
    ]
    path = write_manifest(tmp_path / "m.csv", rows)
    assert read_manifest(str(path), Columns(missing_label="skip")).num_skipped == 1
