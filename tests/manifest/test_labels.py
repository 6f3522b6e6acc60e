"""Labels: kinds, classes and missing values, from the manifest's cells to the batch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.cli.parser import parse
from beam_nifti.config import BuildConfig, Columns, LabelColumn, RecordConfig, Splitting
from beam_nifti.errors import DatasetError, ManifestError, OutputError, ShardError, UsageError
from beam_nifti.inspection.description import describe_dataset, describe_record, format_description
from beam_nifti.inspection.diff import compare_datasets
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import Manifest, read_manifest
from beam_nifti.manifest import labels as label_module
from beam_nifti.manifest.labels import LabelValue, comparable, label_of, parse_label, read_labels
from beam_nifti.manifest.pseudonyms import Pseudonyms
from beam_nifti.manifest.tables import Problems
from beam_nifti.pipeline.build import plan_build
from beam_nifti.pipeline.failures import Failure, write_failures
from beam_nifti.random_access import Dataset
from beam_nifti.record.example import decode_example, encode_example
from tests.build_helpers import build, build_config, contents
from tests.datasets import build_dataset, edit_index, edit_info, edit_record, info_of, records_of, set_cell
from tests.images import brain, write_image, write_manifest

AGES = ["63.5", "71", "n/a", "58", "66", "40"]
SEXES = ["M", "F", "F", "", "M", "F"]
SUBTYPES = ["a", "b", "a", "Zürich", "", "b"]
STAGES = ["10", "9", "9", "2", "10", "2"]
LABELS = "age,sex,subtype:string,stage:class"
COLUMNS = Columns(label=LABELS, missing_label="nan")


def rows_of(**changes: list[str]) -> list[dict[str, object]]:
    cells = {"age": AGES, "sex": SEXES, "subtype": SUBTYPES, "stage": STAGES} | changes
    return [
        {"participant_id": f"sub-{i}", "path": f"sub-{i}.nii", "site": "A"}
        | {name: texts[i] for name, texts in cells.items()}
        for i in range(len(AGES))
    ]


def manifest_of(path: Path, columns: Columns, **changes: list[str]) -> Manifest:
    return read_manifest(str(write_manifest(path / "m.tsv", rows_of(**changes))), columns)


def problems_of(path: Path, columns: Columns, **changes: list[str]) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as raised:
        manifest_of(path, columns, **changes)
    return raised.value.problems


# What is asked for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age:int", "gives age the kind 'int'; choose one of: float, class, string"),
        ("age:", "gives age the kind ''"),
        ("age,", "names an empty column"),
        (":float", "names an empty column"),
        ("age,sex,age:class", "names 'age' twice"),
    ],
)
def test_columns_that_cannot_be_labels(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Columns(label=text)


def test_what_becomes_of_missing_labels_is_one_of_two_things() -> None:
    with pytest.raises(UsageError, match="--missing-label is 'drop'; choose one of: nan, skip"):
        Columns(missing_label="drop")


def test_the_command_line_gives_columns_and_kinds() -> None:
    known, _ = parse(["build", "m.tsv", "out", "--label-column", LABELS, "--missing-label", "skip"])
    columns = build_config(known).columns
    assert columns == Columns(label=LABELS, missing_label="skip")
    assert columns.labels == (
        LabelColumn("age"),
        LabelColumn("sex"),
        LabelColumn("subtype", "string"),
        LabelColumn("stage", "class"),
    )


def test_one_column_without_a_kind_is_what_it_was(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, Columns(label="stage"))
    assert manifest.columns == Columns(label="stage")
    assert manifest.label_columns == ()
    assert manifest.extra_columns == ("site", "age", "sex", "subtype")
    assert [row.label for row in manifest.rows(range(6))] == [10, 9, 9, 2, 10, 2]
    assert {row.labels for row in manifest.rows(range(6))} == {()}
    config = BuildConfig("m", "o", columns=manifest.columns).as_dataset_config()
    known = {"path": "path", "label": "stage", "id": None, "mask": None, "missing_label": None}
    assert config["columns"] == known
    assert "labels" not in config


def test_classes_are_part_of_the_fingerprint() -> None:
    def fingerprint(*classes: str) -> str:
        return RecordConfig(labels=(LabelColumn("sex", "class", classes),)).fingerprint

    different = {RecordConfig().fingerprint, fingerprint("F", "M"), fingerprint("F"), fingerprint("F", "X")}
    assert len(different) == 4


# Kinds and values


def test_kinds_classes_and_values(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, COLUMNS)
    assert manifest.label_columns == (
        LabelColumn("age", "float"),
        LabelColumn("sex", "class", ("F", "M")),
        LabelColumn("subtype", "string"),
        LabelColumn("stage", "class", ("2", "9", "10")),
    )
    assert manifest.columns.label == "age:float,sex:class,subtype:string,stage:class"
    rows = manifest.rows([1, 4, 3])
    assert [row.labels for row in rows] == [
        (("age", 71.0), ("sex", 0), ("subtype", "b"), ("stage", 1)),
        (("age", 66.0), ("sex", 1), ("subtype", ""), ("stage", 2)),
        (("age", 58.0), ("sex", -1), ("subtype", "Zürich"), ("stage", 0)),
    ]
    assert [row.label for row in rows] == [71, 66, 58]
    (missing,) = manifest.rows([2])
    assert missing.label is None
    assert math.isnan(dict(missing.labels)["age"])  # type: ignore[arg-type]


def test_the_first_label_is_the_number(tmp_path: Path) -> None:
    def first(label: str) -> list[float | None]:
        manifest = manifest_of(tmp_path, Columns(label=label, missing_label="nan"))
        return [row.label for row in manifest.rows(range(6))]

    assert first("sex,age") == [1, 0, 0, -1, 1, 0]
    assert first("stage:float") == [10, 9, 9, 2, 10, 2]
    assert first("subtype:string") == [None] * 6


CELL = st.sampled_from(
    ["", " ", "n/a", "N/A", "NaN", "nan", "-nan", "+NaN", "1", "2.5", "-3", "1e3", "1e39", "inf", "89+", "F"]
)


def is_nan(cell: str) -> bool:
    try:
        return math.isnan(float(cell))
    except ValueError:
        return False


def read(cells: list[str], kind: str | None) -> tuple[LabelColumn, list[LabelValue]]:
    found = read_labels(pa.chunked_array([cells]), LabelColumn("x", kind), "nan", Problems("m"))
    return found.column, found.values.to_pylist()


@given(cells=st.lists(CELL, min_size=1, max_size=12), kind=st.sampled_from([None, "class", "string"]))
def test_labels_are_what_a_plain_loop_makes_of_the_cells(cells: list[str], kind: str | None) -> None:
    present = [c for c in cells if c.strip().lower() not in ("", "n/a") and not is_nan(c)]
    is_float = kind is None and any(c not in ("89+", "F") for c in present)
    is_wrong = not present or (is_float and not all(math.isfinite(parse_label(c)) for c in present))
    if kind is None and is_wrong:
        problems = Problems("m")
        read_labels(pa.chunked_array([cells]), LabelColumn("x"), "nan", problems)
        with pytest.raises(ManifestError):
            problems.stop()
        return
    column, values = read(cells, kind)
    assert column.kind == ("float" if is_float else kind or "class")
    for cell, value in zip(cells, values, strict=True):
        if cell not in present:
            assert str(value) == {"float": "nan", "class": "-1", "string": ""}[column.kind]
        elif column.kind == "class":
            assert column.classes
            assert column.classes[int(value)] == cell
        else:
            assert value == (float(cell) if is_float else cell)
        assert np.array_equal([label_of(cell, column)], [value], equal_nan=column.kind == "float")
    if column.kind == "class":
        assert set(column.classes or ()) == set(present)
        whole = all(c.lstrip("-").isdigit() for c in present)
        assert list(column.classes or ()) == sorted(set(present), key=int if whole else None)
    compared = comparable(pa.chunked_array([cells]), column).to_pylist()
    assert [value is None for value in compared] == [cell not in present for cell in cells]


def test_a_cell_of_an_index_that_is_no_label() -> None:
    for cell, column in (("x", LabelColumn("sex", "class", ("F",))), ("x", LabelColumn("age", "float"))):
        with pytest.raises(ShardError, match=f"the index has 'x' in {column.name}, which"):
            label_of(cell, column)


@pytest.mark.parametrize("flag", [None, "label"])
def test_a_single_column_of_texts_has_classes(tmp_path: Path, flag: str | None) -> None:
    rows = [{"path": f"{i}.nii", "label": text} for i, text in enumerate(["CN", "AD", "CN"])]
    manifest = read_manifest(str(write_manifest(tmp_path / "m.csv", rows)), Columns(label=flag))
    assert manifest.columns.label == "label:class"
    assert manifest.label_columns == (LabelColumn("label", "class", ("AD", "CN")),)
    assert [row.labels for row in manifest.rows(range(3))] == [(("label", n),) for n in (1, 0, 1)]
    assert [row.label for row in manifest.rows(range(3))] == [1, 0, 1]


@pytest.mark.parametrize("label", ["age", "age,sex"])
def test_one_text_among_numbers_makes_no_classes(tmp_path: Path, label: str) -> None:
    (problem,) = problems_of(tmp_path, Columns(label=label, missing_label="nan"), age=["89+", *AGES[1:]])
    assert problem.startswith("row 1: age is '89+', not a finite float32 number; correct it, or make")
    assert problem.endswith("--label-column age:class")
    assert manifest_of(tmp_path, Columns(label="age:class", missing_label="nan"), age=["89+", *AGES[1:]])


@given(
    texts=st.lists(
        st.integers(-(2**70), 2**70).map(str)
        | st.integers(2**24 - 3, 2**24 + 9).map(str)
        | st.decimals(-(10**12), 10**12, places=2).map(str),
        min_size=1,
        max_size=6,
    )
)
def test_labels_that_float32_changes_are_reported(texts: list[str]) -> None:
    problems = Problems("m")
    found = read_labels(pa.chunked_array([texts]), LabelColumn("x"), None, problems)
    assert found.values.to_pylist() == [float(text) for text in texts]
    with np.errstate(all="raise"):
        changed = [i for i, t in enumerate(texts) if abs(Fraction(t) - Fraction(float(np.float32(t)))) >= 0.5]
    if not changed:
        assert problems.warnings == []
        return
    (warning,) = problems.warnings
    first = changed[0]
    assert warning.startswith(
        f"x is {texts[first]} in row {first + 1}, but records store float32, which rounds it to "
        f"{int(np.float32(texts[first]))}"
    )
    if len(changed) > 1:
        assert f"; {len(changed)} labels are affected (rows {first + 1}" in warning
    else:
        assert "; no other is affected" in warning
    assert "--label-column x:class or x:string" in warning


KNOWN = {
    "1e-50": True,
    "1e-400": True,
    "-2e-9999999": True,
    "1e-40": True,
    "0": False,
    "-0.0": False,
    "7": False,
}


def drops_digits(text: str) -> bool:
    with np.errstate(under="ignore"):
        return abs(Fraction(float(np.float32(text))) - Fraction(text)) > abs(Fraction(text)) / 2**24


@given(st.lists(st.floats(-1e-30, 1e-30).map(repr) | st.sampled_from(sorted(KNOWN)), min_size=1, max_size=6))
def test_labels_whose_digits_float32_drops_are_reported(texts: list[str]) -> None:
    problems = Problems("m")
    with np.errstate(all="raise"):
        read_labels(pa.chunked_array([texts]), LabelColumn("x"), None, problems)
    changed = [i for i, text in enumerate(texts) if (KNOWN[text] if text in KNOWN else drops_digits(text))]
    assert len(problems.warnings) == bool(changed)
    for warning in problems.warnings:
        told = re.match(
            r"x is (\S+) in row (\d+), but records store float32, which rounds it to (\S+);", warning
        )
        assert told
        assert (told[1], int(told[2])) == (texts[changed[0]], changed[0] + 1)
        with np.errstate(under="ignore"):
            assert float(told[3]) == pytest.approx(float(np.float32(told[1])), rel=1e-5, abs=0)


FOREIGN = ["\u22121.5", "\u20134", "1\xa0234\xa0567", "12\u202f000,5", "1_000", "\uff11\uff12", "\u0663"]


@pytest.mark.parametrize(
    "text", ["63,5", "50%", "1.234,5", "1,000", "12 %", "- 3", "1 234", "1'000", *FOREIGN]
)
def test_numbers_of_spreadsheets_are_no_classes(tmp_path: Path, text: str) -> None:
    with pytest.raises(ManifestError, match=r"not a finite float32 number.*make classes of all .*age:class"):
        manifest_of(tmp_path, Columns(label="age"), age=[text] * len(AGES))
    assert manifest_of(tmp_path, Columns(label="age:class"), age=[text] * len(AGES))


def test_the_largest_float32_may_be_rounded(tmp_path: Path) -> None:
    assert parse_label("3.4028235e38") == 3.4028235e38
    assert math.isnan(parse_label("3.4028236e38"))


def test_decimals_are_rounded_without_a_word() -> None:
    problems = Problems("m")
    read_labels(pa.chunked_array([["0.1", "16777215.5", "1e-30", "3.5"]]), LabelColumn("x"), None, problems)
    assert problems.warnings == []


def test_more_classes_than_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_module, "MAX_CLASSES", 2)
    (problem,) = problems_of(tmp_path, Columns(label="stage:class"))
    assert problem.startswith(
        "stage has 3 different values, such as '10', but at most 2 classes are possible; use"
    )


# Missing values


def test_missing_labels_are_named_with_row_column_and_remedy(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, Columns(label="age,sex"))
    assert [problem.partition(",")[0] for problem in problems] == ["row 3: age is 'n/a'", "row 4: sex is ''"]
    assert all("--missing-label nan" in p and "--missing-label skip" in p for p in problems)


@pytest.mark.parametrize("missing", ["nan", "skip"])
def test_what_is_no_number_is_not_missing(tmp_path: Path, missing: str) -> None:
    problems = problems_of(
        tmp_path, Columns(label="age:float", missing_label=missing), age=[*AGES[:5], "89+"]
    )
    assert problems == ("row 6: age is '89+', not a finite float32 number",)


def test_columns_that_tell_nothing(tmp_path: Path) -> None:
    blank = ["n/a"] * 6
    (problem,) = problems_of(tmp_path, Columns(label="age,sex", missing_label="nan"), age=blank)
    assert problem.startswith("every value of age is missing, so its kind is unknown")
    (problem,) = problems_of(tmp_path, Columns(label="age", missing_label="skip"), age=blank)
    assert problem.startswith("every row lacks a label (age)")
    (problem,) = problems_of(tmp_path, Columns(missing_label="skip"))
    assert problem.startswith("--missing-label requires labels, but there is no column 'label'")
    (problem,) = problems_of(tmp_path, Columns(label="age,sax", missing_label="nan"))
    assert problem.startswith("no column 'sax'; the columns are: participant_id, path")


def test_skipped_rows_are_in_no_split_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, Columns(label="age,sex", missing_label="skip"))
    assert (len(manifest), manifest.num_skipped, manifest.split_sizes()) == (6, 2, {"train": 4})
    assert manifest.row_numbers("train").tolist() == manifest.kept_rows().tolist() == [0, 1, 4, 5]
    assert manifest.label_columns[1].classes == ("F", "M")


def test_filling_in_a_label_moves_nobody(tmp_path: Path) -> None:
    splitting = Splitting({"train": 0.5, "test": 0.5}, seed=3, stratify="site")
    columns = Columns(label="age", missing_label="skip")
    drawn = []
    for number, age in enumerate((AGES, ["1"] * 6)):
        path = write_manifest(tmp_path / f"{number}.tsv", rows_of(age=age))
        drawn.append(read_manifest(str(path), columns, splitting).splits.to_pylist())
    assert drawn[0][2] is None
    assert drawn[0][:2] + drawn[0][3:] == drawn[1][:2] + drawn[1][3:]


def test_names_that_the_index_and_the_list_of_failures_have_too(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.nii", "label": i, "row": "ab"[i % 2], "stage": "x"} for i in range(3)]
    path = write_manifest(tmp_path / "m.tsv", rows)
    manifest = read_manifest(str(path), Columns(label="label,row,stage"))
    assert manifest.columns.label == "label:float,row:class,stage:class"
    failed = [Failure(row, "LoadVolume", "VolumeError", "broken") for row in manifest.rows(range(3))]
    retry = str(tmp_path / "failures.jsonl")
    write_failures(retry, failed, manifest.folder, manifest.columns, manifest.extra_columns)
    again = read_manifest(retry, manifest.columns)
    assert [r.labels for r in again.rows(range(3))] == [r.labels for r in manifest.rows(range(3))]


def test_names_in_a_label_become_pseudonyms_too(tmp_path: Path) -> None:
    columns = Columns(label="participant_id,age", missing_label="nan")
    path = write_manifest(tmp_path / "m.tsv", rows_of())
    manifest = read_manifest(str(path), columns, pseudonyms=Pseudonyms(b"0123456789abcdef"))
    classes = manifest.label_columns[0].classes
    assert classes
    assert set(classes) == set(manifest.table["participant_id"].to_pylist())
    assert not any("sub-" in name for name in classes)


def test_failures_are_the_manifest_of_a_retry(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, COLUMNS)
    failed = [Failure(row, "LoadVolume", "VolumeError", "broken") for row in manifest.rows(range(6))]
    path = str(tmp_path / "failures.jsonl")
    write_failures(path, failed, manifest.folder, manifest.columns, manifest.extra_columns)
    again = read_manifest(path, manifest.columns)
    assert again.label_columns == manifest.label_columns
    for before, now in zip(manifest.rows(range(6)), again.rows(range(6)), strict=True):
        assert str((now.label, now.labels)) == str((before.label, before.labels))  # NaN is no NaN


# Datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, of which that of the last row is damaged, and their manifest."""
    folder = tmp_path_factory.mktemp("cohort")
    for i in range(len(AGES)):
        write_image(folder / f"sub-{i}.nii", brain(seed=i))
    (folder / "sub-5.nii").write_bytes(b"damaged")
    write_manifest(folder / "manifest.tsv", rows_of())
    return folder


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with labels of all kinds, which no test changes."""
    output = tmp_path_factory.mktemp("built") / "dataset"
    return build_dataset(folder / "manifest.tsv", output, columns=COLUMNS, max_bad_fraction=0.5)


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "dataset"))


def labels_of(output: Path) -> list[dict[str, Any]]:
    """The labels of the records as TensorFlow would give them, in order."""
    records = (decode_example(payload).items() for _, payload in records_of(output))
    return [{n: v for n, v in features if n.startswith("label")} for features in records]


def test_records_have_a_feature_of_each_label(built: Path) -> None:
    records = labels_of(built)
    assert [set(r) for r in records] == [
        {"label", "label/age", "label/sex", "label/subtype", "label/stage"}
    ] * 5
    ages = np.array([63.5, 71, np.nan, 58, 66], np.float32)
    for name in ("label", "label/age"):
        assert np.array_equal(np.concatenate([r[name] for r in records]), ages, equal_nan=True)
    for name, numbers in (("label/sex", [1, 0, 0, -1, 1]), ("label/stage", [2, 1, 1, 0, 2])):
        stored = np.concatenate([r[name] for r in records])
        assert (stored.dtype, stored.tolist()) == (np.dtype(np.int64), numbers)
    assert [bytes(r["label/subtype"]).decode() for r in records] == SUBTYPES[:5]


def test_the_info_and_the_index_say_what_the_labels_are(built: Path) -> None:
    facts = json.loads((built / "dataset_info.json").read_bytes())
    assert facts["labels"] == {
        "age": {"kind": "float"},
        "sex": {"kind": "class", "classes": ["F", "M"]},
        "subtype": {"kind": "string"},
        "stage": {"kind": "class", "classes": ["2", "9", "10"]},
    }
    kinds = {name: kind for name, kind in facts["features"].items() if name.startswith("label/")}
    assert kinds == {
        "label/age": "float",
        "label/sex": "int64",
        "label/stage": "int64",
        "label/subtype": "bytes",
    }
    record = describe_record(str(built), "sub-2")
    assert (record["label"], record["age"], record["sex"], record["site"]) == (None, "n/a", "F", "A")
    assert info_of(built) == info_of(built).from_json(info_of(built).to_json(), "again")


def test_what_was_built_is_right(built: Path, folder: Path) -> None:
    report = verify_dataset(str(built), manifest=str(folder / "manifest.tsv"), deep=ALL)
    assert (report.problems, report.num_deep) == ((), 5)


def test_a_rebuild_changes_nothing(dataset: Path, folder: Path) -> None:
    before = (dataset / "dataset_info.json").read_bytes()
    build_dataset(folder / "manifest.tsv", dataset, columns=COLUMNS, max_bad_fraction=0.5)
    assert (dataset / "dataset_info.json").read_bytes() == before


def test_inspect_tells_kinds_and_counts(built: Path) -> None:
    found = describe_dataset(str(built))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["label_columns"]["age"] == {
        "kind": "float", "count": 4, "min": 58, "max": 71, "mean": 64.625, "missing": 1,
    }  # fmt: skip
    assert found["label_columns"]["sex"] == {"kind": "class", "classes": {"F": 2, "M": 2}, "missing": 1}
    text = format_description(found)
    assert "labels        age: float, 58 to 71, mean 64.625, 1 missing\n" in text
    assert "              stage: class, 0 = 2 (1), 1 = 9 (2), 2 = 10 (2)\n" in text
    assert "              subtype: string, 4, 3 different, 1 missing\n" in text


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", "64", "label/age is 63.5, but the index has 64"),
        ("age", "", "the index's label is 63.5, but its age gives None"),
        ("sex", "F", "label/sex is 1, but the index has 0"),
        ("sex", "X", "the index has 'X' in sex, which does not match sex:class in dataset_info.json"),
        ("subtype", "b", "label/subtype is 'a', but the index has 'b'"),
        ("label", 1.0, "the index's label is 1.0, but its age gives 63.5"),
    ],
)
def test_an_index_that_says_another_label(dataset: Path, column: str, value: object, message: str) -> None:
    edit_index(dataset, set_cell(column, 0, value))
    assert any(message in problem for problem in verify_dataset(str(dataset)).problems)


def test_an_index_without_a_label(dataset: Path) -> None:
    edit_index(dataset, lambda table: table.drop_columns(["sex"]))
    assert any("column sex is missing" in p for p in verify_dataset(str(dataset)).problems)


def test_a_record_with_another_kind_of_label(dataset: Path) -> None:
    def edit(payload: bytes) -> bytes:
        features: Any = {
            n: v if isinstance(v, np.ndarray) else bytes(v) for n, v in decode_example(payload).items()
        }
        return encode_example(features | {"label/sex": np.float32([1])})

    edit_record(dataset, 0, edit)
    (problem,) = verify_dataset(str(dataset)).problems
    assert problem.endswith("feature label/sex is float[1], but dataset_info.json gives int64")


def test_other_classes_are_a_difference_between_datasets(built: Path, dataset: Path) -> None:
    assert compare_datasets(str(built), str(dataset)).is_empty
    edit_info(dataset, lambda info: info["labels"]["sex"].update(classes=["F", "M", "X"]))
    assert list(compare_datasets(str(built), str(dataset)).config) == ["labels"]


def test_an_info_whose_labels_are_not_those_of_its_columns(dataset: Path) -> None:
    edit_info(dataset, lambda info: info["labels"].pop("sex"))
    with pytest.raises(DatasetError, match="labels are age:float, subtype:string"):
        verify_dataset(str(dataset))


def test_verify_finds_other_labels_in_the_manifest(built: Path, tmp_path: Path) -> None:
    changed = rows_of(sex=["F", "F", "F", "M", "M", "F"], age=["63.50", *AGES[1:]])
    manifest = write_manifest(tmp_path / "m.tsv", changed)
    (problem,) = verify_dataset(str(built), manifest=str(manifest)).problems
    assert "2 examples have another label/sex in the manifest" in problem
    assert "sub-0 (M, F), sub-3 (None, M)" in problem


def test_other_classes_are_refused_by_name(dataset: Path, folder: Path) -> None:
    more = [*rows_of(), rows_of()[0] | {"participant_id": "sub-6", "sex": "X"}]
    config = BuildConfig(str(write_manifest(folder / "more.tsv", more)), str(dataset), columns=COLUMNS)
    with pytest.raises(OutputError) as raised:
        plan_build(config)
    assert (
        "\n  the classes of sex were F, M, now F, M, X (new: X), so the stored class numbers would change\n"
        in str(raised.value)
    )
    assert "--overwrite" in str(raised.value)


@pytest.mark.parametrize(("label", "now"), [("age:float,sex", "nan"), ("stage", "skip")])
def test_the_first_row_without_a_label_is_appended(
    folder: Path, tmp_path: Path, label: str, now: str
) -> None:
    def changed(missing: str | None, *ages: str) -> Columns:
        rows = [row | {"age": age, "stage": age} for row, age in zip(rows_of(), ages, strict=False)]
        rows = [row | {"sex": "FM"[i % 2]} for i, row in enumerate(rows)]
        write_manifest(folder / "grown.tsv", rows)
        return Columns(label=label, missing_label=missing)

    manifest, output = folder / "grown.tsv", tmp_path / "out"
    columns = changed(None, "1", "2", "3")
    build(manifest, output, columns=columns)
    columns = changed(now, "1", "2", "3", "n/a", "5")
    again = build(manifest, output, columns=columns)
    assert again.read == {"sub-3.nii", "sub-4.nii"} - ({"sub-3.nii"} if now == "skip" else set())
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()
    assert info_of(output).config["columns"]["missing_label"] == now
    for other in {"nan", "skip"} - {now}:  # what it was decided by
        with pytest.raises(OutputError, match="--missing-label was"):
            plan_build(
                BuildConfig(
                    str(manifest), str(output), columns=dataclasses.replace(columns, missing_label=other)
                )
            )


def test_texts_are_no_labels_of_a_dataset_of_numbers(folder: Path, tmp_path: Path) -> None:
    manifest = write_manifest(folder / "numbers.tsv", rows_of()[:2])
    dataset = build_dataset(manifest, tmp_path / "out", columns=Columns(label="stage"))
    write_manifest(manifest, rows_of(stage=SEXES)[:2])
    with pytest.raises(ManifestError, match=r"stage holds texts, but the labels of .* are numbers"):
        verify_dataset(str(dataset), manifest=str(manifest))


def test_texts_of_a_single_column_are_built_read_and_verified(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": f"sub-{i}.nii", "label": ("CN", "AD")[i % 2]} for i in range(4)]
    rows.append({"path": "sub-5.nii", "label": "CN"})  # which is damaged
    manifest = write_manifest(folder / "texts.tsv", rows)
    dataset = build_dataset(manifest, tmp_path / "out", max_bad_fraction=0.5)
    assert verify_dataset(str(dataset), manifest=str(manifest), deep=ALL).problems == ()
    assert info_of(dataset).labels == (LabelColumn("label", "class", ("AD", "CN")),)
    assert [int(record["label/label"][0]) for record in labels_of(dataset)] == [1, 0, 1, 0]
    failed = json.loads((dataset / "failures.jsonl").read_text())
    assert failed["label"] == "CN"
    before = (dataset / "dataset_info.json").read_bytes()
    build_dataset(manifest, dataset, max_bad_fraction=0.5)
    build_dataset(manifest, dataset, max_bad_fraction=0.5, columns=Columns(label="label:class"))
    assert (dataset / "dataset_info.json").read_bytes() == before


def test_the_index_has_the_label_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": f"sub-{i}.nii", "label": 2**24 + i} for i in range(3)]
    manifest = write_manifest(folder / "large.tsv", rows)
    output = build_dataset(manifest, tmp_path / "out")
    dataset = Dataset(output)
    assert dataset.index(["label"])["label"].to_pylist() == [2**24, 2**24 + 1, 2**24 + 2]
    assert [float(element["label"]) for element in dataset] == [2**24, 2**24, 2**24 + 2]
    assert len(Dataset(output, where="label == 16777217")) == 1
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()


def test_skipped_rows_are_counted_and_no_failures(folder: Path, tmp_path: Path) -> None:
    manifest = write_manifest(folder / "skip.tsv", rows_of()[:5])
    columns = {"label": "age", "missing_label": "skip"}
    built = build(manifest, tmp_path / "out", columns=columns)
    assert (built.summary.num_written, built.summary.num_failed) == (4, 0)
    assert built.read == {"sub-0.nii", "sub-1.nii", "sub-3.nii", "sub-4.nii"}
    info = info_of(tmp_path / "out")
    assert (info.manifest["num_rows"], info.manifest["num_skipped"]) == (5, 1)
    assert "labels" not in json.loads(info.to_json())
    ((_, rows),) = contents(tmp_path / "out").values()
    assert [row["row"] for row in rows] == [1, 2, 4, 5]
    assert verify_dataset(str(tmp_path / "out"), manifest=str(manifest), deep=ALL).problems == ()
    assert "skipped       1 row without a label\n" in format_description(
        describe_dataset(str(tmp_path / "out"))
    )
    assert build(manifest, tmp_path / "out", columns=columns).read == set()
    edit_info(tmp_path / "out", lambda facts: facts["manifest"].update(num_skipped=2))
    (problem,) = verify_dataset(str(tmp_path / "out")).problems
    assert "4 examples and 0 failures do not make the manifest's 5 rows, 2 without a label" in problem


def test_the_command_says_what_labels_are_and_what_is_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(write_manifest(folder / "said.tsv", rows_of()[:5]))
    flags = ["--label-column", "age,sex", "--missing-label", "skip"]
    assert cli.main(["build", manifest, str(tmp_path / "out"), *flags, "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith("volumes  3 of 6×5×4 voxels (train 3)")
    assert said[4:7] == [
        "labels   age: float",
        "         sex: class, 2: F, M",
        "skipped  2 rows without a label",
    ]
    assert cli.main(["check", manifest, *flags, "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("skipped  2 rows without a label\n")
    flags[-1] = "nan"
    assert cli.main(["check", manifest, *flags, "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("kept     2 rows without a label\n")
    assert cli.main(["build", manifest, str(tmp_path / "out"), *flags, "--quiet"]) == 0
    assert "\nkept     2 rows without a label\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert cli.main(["build", manifest, str(tmp_path / "out"), "--label-column", "age"]) == 2
    assert "row 3: age is 'n/a', a missing label; fill it in" in capsys.readouterr().err


def test_a_label_that_is_text_is_asked_by_its_column(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": row["path"], "label": f"2023011{number}"} for number, row in enumerate(rows_of()[:3])]
    manifest = write_manifest(folder / "codes.tsv", rows)
    output = tmp_path / "out"
    assert cli.main(["build", str(manifest), str(output), "--label-column=label:string", "--quiet"]) == 0
    with pytest.raises(UsageError, match="a label of the kind string is not a number; use manifest_label"):
        Dataset(output, where="label == 20230110")
    assert Dataset(output, where="manifest_label == 20230110").ids == [rows[0]["path"]]
    assert Dataset(output)[1]["label/label"] == b"20230111"
    with pytest.raises(
        UsageError, match="the first label is a string, not a number; choose one of: label/label"
    ):
        Dataset(output, columns=["id", "label"])


@pytest.mark.parametrize(("label", "column"), [("label", "manifest_label"), ("s e x", "column('s e x')")])
def test_a_condition_on_a_class_is_told_which_column_has_its_text(
    folder: Path, tmp_path: Path, label: str, column: str
) -> None:
    rows = [{"path": row["path"], label: "FM"[number % 2]} for number, row in enumerate(rows_of()[:4])]
    manifest = write_manifest(folder / "texts.tsv", rows)
    output = build_dataset(manifest, tmp_path / "out", columns=Columns(label=label))
    with pytest.raises(UsageError, match=r"label is a number; use .*, which has the text") as raised:
        Dataset(output, where="label == 'F'")
    assert f"use {column}, " in str(raised.value)
    assert len(Dataset(output, where=f"{column} == 'F'")) == 2


def test_plain_labels_may_be_missing(folder: Path, tmp_path: Path) -> None:
    manifest = write_manifest(folder / "nan.tsv", rows_of()[:5])
    columns = {"label": "age", "missing_label": "nan"}
    build(manifest, tmp_path / "out", columns=columns)
    stored = [float(record["label"][0]) for record in labels_of(tmp_path / "out")]
    assert np.array_equal(stored, [63.5, 71, np.nan, 58, 66], equal_nan=True)
    assert verify_dataset(str(tmp_path / "out"), manifest=str(manifest), deep=ALL).problems == ()
    assert build(manifest, tmp_path / "out", columns=columns).read == set()


@pytest.mark.tf
def test_the_reader_gives_the_label_that_is_asked_for(built: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    def y_of(label: str | tuple[str, ...] | None) -> Any:
        sequential, indexed = (
            next(iter(load_dataset(built, batch_size=5, label=label, engine=engine)))[1]
            for engine in ("sequential", "indexed")
        )
        for one, other in zip(tf.nest.flatten(sequential), tf.nest.flatten(indexed), strict=True):
            assert one.dtype == other.dtype
            assert set(map(str, one.numpy())) == set(map(str, other.numpy()))
        return sequential

    ages = np.array([63.5, 58, 71, 66, np.nan], np.float32)  # of two shards in turn
    for label in (None, "age"):
        assert np.array_equal(y_of(label).numpy(), ages, equal_nan=True)
    assert (y_of("sex").dtype, y_of("sex").numpy().tolist()) == (tf.int64, [1, -1, 0, 1, 0])
    assert (y_of("subtype").dtype, y_of("subtype").numpy()[1].decode()) == (tf.string, "Zürich")
    several = y_of(("stage", "age"))
    assert set(several) == {"age", "stage"}
    assert several["stage"].numpy().tolist() == [2, 0, 1, 2, 1]
    with pytest.raises(UsageError, match=r"target is 'mask', but .* has no masks"):
        load_dataset(built, target="mask", label="age")
    for label in ("site", ("age", "site"), ()):
        with pytest.raises(UsageError, match=r"label is .*; the dataset has age, sex, subtype, stage"):
            load_dataset(built, label=label)


@pytest.mark.tf
def test_the_reader_of_other_datasets(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    manifest = write_manifest(folder / "some.tsv", rows_of()[:2])
    plain = build_dataset(manifest, tmp_path / "plain", columns=Columns(label="stage"))
    assert [float(y) for _, y in load_dataset(plain, label="stage")] == [10, 9]
    with pytest.raises(UsageError, match="label is 'age'; the dataset has stage"):
        load_dataset(plain, label="age")
    text = build_dataset(manifest, tmp_path / "text", columns=Columns(label="subtype:string"))
    assert [y.numpy() for _, y in load_dataset(text, label="subtype")] == [b"a", b"b"]
    with pytest.raises(UsageError, match="the first label is a string, not a number; choose y with label="):
        load_dataset(text)
    for engine in ("indexed", "sequential"):
        given = [x["label/subtype"].numpy() for x in load_dataset(text, as_dict=True, engine=engine)]
        assert given == [b"a", b"b"] == [element["label/subtype"] for element in Dataset(text)]
        with pytest.raises(UsageError, match="is a string, not a number; choose one of: label/subtype"):
            load_dataset(text, as_dict=True, columns=["label"], engine=engine)
    unlabelled = build_dataset(manifest, tmp_path / "none")
    with pytest.raises(UsageError, match="label is 'age'; the dataset has no labels"):
        load_dataset(unlabelled, label="age")


def test_a_long_cell_of_digits_is_read_at_once() -> None:
    digits = "9" * (1 << 15)
    start = time.perf_counter()
    for cell in (digits, f"{digits}x", f"{digits}.{digits}x"):
        assert not math.isfinite(parse_label(cell))
    assert time.perf_counter() - start < 5
