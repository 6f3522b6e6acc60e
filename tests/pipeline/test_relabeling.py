"""Datasets that get the labels, splits and columns of a changed manifest, without their images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig, Sharding
from beam_nifti.errors import UsageError
from beam_nifti.manifest.tables import read_table
from tests.build_helpers import contents, fork_server, snapshot, stray_files
from tests.datasets import build_dataset, info_of
from tests.images import write_manifest
from tests.pipeline.test_withdrawal import rows_of

Row = dict[str, Any]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    return write_manifest(folder / "manifest.tsv", rows_of(folder))


def changed(study: Path, change: Callable[[int, Row], Row], name: str = "changed.tsv") -> Path:
    """The manifest with every row changed."""
    rows = read_table(str(study)).to_pylist()
    return write_manifest(study.with_name(name), [change(number, row) for number, row in enumerate(rows)])


def other_labels(number: int, row: Row) -> Row:
    return row | {"label": number % 3, "site": "XYZ"[number % 3], "note": f"now {number // 4}"}


def other_splits(number: int, row: Row) -> Row:
    return row | {"split": "validation" if row["participant_id"] in ("p0", "p5") else "train"}


CHANGES: Mapping[str, Callable[[int, Row], Row]] = {
    "labels": other_labels,
    "splits": other_splits,
    "columns": lambda number, row: {k: v for k, v in row.items() if k != "note"} | {"new": f"n{number}"},
    "one label": lambda number, row: row | ({"site": "Q"} if number == 8 else {}),
}
CASES: Mapping[str, tuple[Row, Row]] = {
    "the defaults": ({}, {}),
    "native": ({"voxel_dtype": "native", "compression": "none"}, {}),
    "labels and masks": (
        {"voxel_dtype": "uint8"},
        {"columns": Columns(label="label:float,site", mask="mask"), "sharding": Sharding(3)},
    ),
    "each frame": ({"frames": "each"}, {"columns": Columns(path="bold", label="site:class")}),
    "frames of runs": (
        {"frames": "each", "max_frames": 3},
        {"columns": Columns(path="runs", mask=None), "sharding": Sharding(6)},
    ),
    "shuffled": ({}, {"columns": Columns(path="path,second", label="site:string"), "shuffle_seed": 3}),
}


PAIRS = [
    (case, change)
    for number, case in enumerate(CASES)
    for change in ("labels", ("splits", "columns", "one label")[number % 3])
]


@pytest.mark.parametrize(("case", "change"), PAIRS)
def test_the_dataset_is_that_of_the_changed_manifest(
    study: Path, tmp_path: Path, case: str, change: str
) -> None:
    record, options = CASES[case]
    options = {"max_bad_fraction": 0.5, **options}
    output = build_dataset(study, tmp_path / "out", RecordConfig(**record), **options)
    manifest = changed(study, CHANGES[change])
    fresh = build_dataset(manifest, tmp_path / "fresh", RecordConfig(**record), **options)
    info, expected = bn.relabel(output, manifest, progress=False), info_of(fresh)
    assert info == info_of(output)
    assert contents(output) == contents(fresh)
    assert (info.config, info.labels, info.features) == (expected.config, expected.labels, expected.features)
    assert (info.manifest, info.mask_labels) == (expected.manifest, expected.mask_labels)
    assert info.failures == "failures-r2.jsonl"
    assert (output / info.failures).read_bytes() == (fresh / "failures.jsonl").read_bytes()
    assert bn.verify(output, manifest=manifest, deep=4)
    assert stray_files(output) == set()
    before = snapshot(output)
    assert bn.relabel(output, manifest, progress=False) == info
    build_dataset(manifest, output, RecordConfig(**record), **options)
    assert snapshot(output) == before


def test_labels_may_be_of_other_columns(study: Path, tmp_path: Path) -> None:
    options: Row = {"max_bad_fraction": 0.5}
    output = build_dataset(study, tmp_path / "out", **options)
    for number, labels in enumerate(("site,note:string", "label", "site:class")):
        fresh = build_dataset(study, tmp_path / f"{number}", columns=Columns(label=labels), **options)
        info = bn.relabel(output, study, label_column=labels, progress=False)
        assert contents(output) == contents(fresh)
        assert info.config == info_of(fresh).config
    assert bn.relabel(output, study, label_column=["label", "site"], progress=False).labels


@pytest.fixture(scope="module")
def built(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of it; it stays."""
    columns = Columns(label="site")
    return build_dataset(
        study, tmp_path_factory.mktemp("built") / "out", columns=columns, max_bad_fraction=0.5
    )


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "dataset"))


def test_the_same_command_continues_after_a_kill_at_any_point(
    study: Path, built: Path, tmp_path: Path
) -> None:
    arguments = {"manifest": str(changed(study, other_labels))}
    whole = shutil.copytree(built, tmp_path / "whole")
    run = fork_server().run("relabel", folder=whole, output=str(whole), **arguments)
    expected, old = contents(whole), contents(built)
    for kill_at in range(3, run.operations + 1, 31):
        output = shutil.copytree(built, tmp_path / "killed")
        ended = fork_server().run("relabel", folder=output, kill_at=kill_at, output=str(output), **arguments)
        assert ended.was_killed
        assert contents(output) == (expected if info_of(output).revision == 2 else old)
        bn.relabel(output, arguments["manifest"], progress=False)
        assert contents(output) == expected
        assert not (output / ".build").exists()
        assert stray_files(output) == set()
        shutil.rmtree(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda _, row: row | {"path": "p0a.nii"} if row["path"] == "p0b.nii" else row,
            "row 2 .* other images",
        ),
        (lambda i, row: row | {"participant_id": "p9"} if i == 13 else row, r"lacks 1 example .* \(p6_b\)"),
        (lambda _, row: row | {"site": ""} if row["path"] == "p2a.nii" else row, "row 5: empty|row 5"),
    ],
)
def test_refusals(change: Any, said: str, study: Path, dataset: Path) -> None:
    before = snapshot(dataset)
    with pytest.raises(bn.BeamNiftiError, match=said):
        bn.relabel(dataset, changed(study, change), progress=False)
    assert {name: data for name, data in snapshot(dataset).items() if name in before} == before


def test_rows_are_neither_lost_nor_invented(study: Path, dataset: Path, tmp_path: Path) -> None:
    manifest = changed(study, lambda i, row: row | {"site": ""} if i == 4 else row)
    with pytest.raises(UsageError, match=r"lacks 1 example of .* \(p2_a\), as rows are absent"):
        bn.relabel(dataset, manifest, missing_label="skip", progress=False)
    assert bn.relabel(dataset, manifest, missing_label="nan", progress=False).num_examples == 12
    rows = read_table(str(study)).to_pylist()
    more = write_manifest(study.with_name("more.tsv"), [*rows, rows[-1] | {"session_id": "c"}])
    with pytest.raises(bn.DatasetError, match=r"has neither a record nor a failure of row 15 .*\(p6_c\)"):
        bn.relabel(dataset, more, progress=False)
    elsewhere = write_manifest(tmp_path / "elsewhere/m.tsv", rows)
    with pytest.raises(UsageError, match="paths of images are relative to the manifest's folder; move it"):
        bn.relabel(dataset, elsewhere, progress=False)


def test_rows_may_be_in_another_order(study: Path, dataset: Path, tmp_path: Path) -> None:
    rows = read_table(str(study)).to_pylist()[::-1]
    manifest = write_manifest(study.with_name("backwards.tsv"), rows)
    fresh = build_dataset(manifest, tmp_path / "f", columns=Columns(label="site"), max_bad_fraction=0.5)
    bn.relabel(dataset, manifest, progress=False)
    assert contents(dataset) == contents(fresh)


def test_workers_do_not_change_the_bytes(study: Path, tmp_path: Path) -> None:
    options: Row = {"max_bad_fraction": 0.5, "sharding": Sharding(examples_per_shard=1)}
    first = build_dataset(study, tmp_path / "0", **options)
    outputs = [first, *(shutil.copytree(first, tmp_path / f"{number}") for number in (1, 2))]
    made = []
    for output, workers in zip(outputs, (1, 2, 5), strict=True):
        bn.relabel(output, changed(study, other_labels), workers=workers, progress=False)
        bn.withdraw(output, "p2", manifest=study.with_name("changed.tsv"), workers=workers, progress=False)
        made.append(contents(output))
    assert made[0] == made[1] == made[2]
    with pytest.raises(UsageError, match="workers is 0; it must be at least 1"):
        bn.relabel(first, study, workers=0, progress=False)


def test_who_was_withdrawn_stays_so(study: Path, dataset: Path) -> None:
    info = bn.withdraw(dataset, "p3", manifest=study, progress=False)
    with pytest.raises(bn.ManifestError, match="was withdrawn"):
        bn.relabel(dataset, changed(study, other_labels), progress=False)
    rows = [row for row in read_table(str(study)).to_pylist() if row["participant_id"] != "p3"]
    rest = write_manifest(study.with_name("rest.tsv"), [other_labels(i, row) for i, row in enumerate(rows)])
    again = bn.relabel(dataset, rest, progress=False)
    assert (again.withdrawn, again.withdrawals) == (info.withdrawn, info.withdrawals)
    assert bn.verify(dataset, manifest=rest)


def test_anonymous_ids(study: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    options: Row = {"max_bad_fraction": 0.5, "anonymous_ids": str(key)}
    plain = changed(
        study, lambda _, row: {k: row[k] for k in ("participant_id", "session_id", "path", "label")}
    )
    output = build_dataset(plain, tmp_path / "out", **options)
    manifest = changed(plain, lambda number, row: row | {"label": number}, "numbered.tsv")
    fresh = build_dataset(manifest, tmp_path / "fresh", **options)
    with pytest.raises(
        UsageError, match="its ids are anonymous; give the file of their key with anonymous_ids"
    ):
        bn.relabel(output, manifest, progress=False)
    info = bn.relabel(output, manifest, anonymous_ids=key, progress=False)
    assert contents(output) == contents(fresh)
    assert info.manifest == info_of(fresh).manifest
    assert (output / "failures-r2.jsonl").read_bytes() == (fresh / "failures.jsonl").read_bytes()


def test_the_command(study: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, summary = changed(study, other_labels), dataset.parent / "ended.json"
    command = ["relabel", str(dataset), str(manifest), "--label-column=label,site", "--quiet"]
    assert cli.main([*command, f"--summary-json={summary}"]) == cli.SUCCESS
    assert json.loads(summary.read_text())["num_examples"] == 12
    assert "dataset  12 examples, 4 shards, " in capsys.readouterr().out
    assert [label.name for label in info_of(dataset).labels] == ["label", "site"]
