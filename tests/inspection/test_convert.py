"""A dataset of an earlier format becomes one of the current format, without its images."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig, Sharding
from beam_nifti.errors import DatasetError, OutputBusyError, OutputError, UsageError
from beam_nifti.inspection.convert import convert_dataset
from beam_nifti.inspection.problems import Problems, Scope
from beam_nifti.pipeline import lock, write, write_plan
from beam_nifti.pipeline.conversion import Conversion
from beam_nifti.record import versions
from beam_nifti.record.index import read_index, write_index
from beam_nifti.record.tiles import encode_record
from beam_nifti.support.outcomes import INTERRUPTED, TERMINATED
from tests.build_helpers import build as build_again
from tests.build_helpers import contents, fork_server, make_options, snapshot, state_of, stray_files, watching
from tests.datasets import (
    build_dataset,
    edit_index,
    edit_info,
    failures_of,
    index_rows,
    info_of,
    manifest_of,
    records_of,
    set_cell,
)
from tests.images import brain, write_cohort, write_image, write_manifest

GOLDEN = Path(__file__).parents[1] / "golden/version-1"
SHAPE = (64, 48, 40)
"""Large enough for several members of the image, and of the mask."""

COUNT = 3
VERSION_1: dict[str, Any] = {"format_version": 1, "format_features": ()}
NO_MEMBERS: dict[str, Any] = {"format_features": ("sources", "digests")}
OF_SOURCES = {"source_size", "source_mtime"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of images with a second one each, masks, and labels of several kinds; it stays."""
    folder = tmp_path_factory.mktemp("study")
    rows = []
    for i in range(COUNT):
        voxels = brain(SHAPE, seed=i)
        write_image(folder / f"{i}.nii", voxels, slope=0.5 if i % 2 else None)
        write_image(folder / f"second/{i}.nii", brain(SHAPE, seed=10 + i))
        write_image(folder / f"mask/{i}.nii", (voxels // (300 + i)).astype(np.uint8))
        write_image(folder / f"frames/{i}.nii", np.stack([voxels[:9, :8], 2 * voxels[:9, :8]], -1))
        rows.append(
            {
                **{"participant_id": f"p{i}", "path": f"{i}.nii", "second": f"second/{i}.nii"},
                **{"mask": f"mask/{i}.nii", "frames": f"frames/{i}.nii", "label": i / 2},
                **{"site": "AB"[i % 2], "note": f"is {i}", "split": ("train", "test")[i == 1]},
            }
        )
    return write_manifest(folder / "manifest.tsv", rows)


CASES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the defaults": ({}, {}),
    "native": ({"voxel_dtype": "native"}, {}),
    "a mask": ({"voxel_dtype": "uint8"}, {"columns": Columns(mask="mask")}),
    "a mask, uncompressed": ({"compression": "none"}, {"columns": Columns(mask="mask")}),
    "channels": (
        {"rescale": "percentile:1,99", "voxel_dtype": "float16", "compression_level": 1},
        {"columns": Columns(path="path,second")},
    ),
    "each frame": ({"frames": "each"}, {"columns": Columns(path="frames")}),
    "labels": ({"rescale": "zscore"}, {"columns": Columns(label="label:float,site,note:string")}),
    "mixed shapes, shuffled": ({}, {"allow_mixed_shapes": True, "shuffle_seed": 3}),
}


@pytest.fixture(scope="module")
def fresh_of(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a build gives in a case."""

    @functools.cache
    def build_case(case: str) -> Path:
        record, options = CASES[case]
        output = tmp_path_factory.mktemp("fresh") / "dataset"
        return build_dataset(study, output, RecordConfig(**record), **options)

    return build_case


def patches_are_slices(dataset: Path) -> None:
    records = bn.Dataset(dataset)
    for number in range(len(records)):
        whole = records[number]
        corner = tuple(n // 2 - 1 for n in whole["image"].shape[:3])
        box = tuple(slice(c, c + 2) for c in corner)
        patch = records.patch(number, corner, (2, 2, 2))
        for name in ("image", "mask"):
            assert name not in whole or np.array_equal(patch[name], whole[name][box])


def without_sources(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("source_")} for row in rows]


@pytest.mark.parametrize("earlier", [VERSION_1, NO_MEMBERS], ids=["version 1", "version 2 without members"])
@pytest.mark.parametrize("case", CASES)
def test_it_has_the_bytes_that_a_build_gives(
    study: Path, fresh_of: Callable[[str], Path], tmp_path: Path, case: str, earlier: dict[str, Any]
) -> None:
    record, options = CASES[case]
    old = build_dataset(study, tmp_path / "old", RecordConfig(**record, **earlier), **options)
    fresh = fresh_of(case)
    before, new = snapshot(old), tmp_path / "new"
    info = bn.convert(old, new, progress=False)
    assert snapshot(old) == before
    assert info == info_of(new)
    assert bn.verify(new, manifest=study)
    assert not bn.diff(old, new)
    assert not bn.diff(new, fresh)
    assert [payload for _, payload in records_of(new)] == [payload for _, payload in records_of(old)]
    patches_are_slices(new)
    found, expected = contents(new), contents(fresh)
    assert {place: sha256 for place, (sha256, _) in found.items()} == {
        place: sha256 for place, (sha256, _) in expected.items()
    }
    if earlier == NO_MEMBERS:  # which knows all that a build writes
        assert found == expected
        assert info == info_of(fresh) or info.splits != info_of(fresh).splits
    else:
        assert "sources" not in info.format_features
        for place, (_, rows) in found.items():
            assert without_sources(rows) == without_sources(expected[place][1])
            assert all(row.keys() >= OF_SOURCES for row in rows)
    assert info.config == info_of(fresh).config
    assert stray_files(new) == set()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A dataset that the code of version 1 wrote, of which one example failed."""
    return Path(shutil.copytree(GOLDEN / "dataset", tmp_path / "golden"))


def test_what_version_1_wrote_is_converted(golden: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    info = bn.convert(golden, new, progress=False)
    assert bn.verify(new)
    assert not bn.diff(golden, new)
    assert (info.format_version, info.format_features) == (2, ("digests", "members", "positions"))
    assert [payload for _, payload in records_of(new)] == [payload for _, payload in records_of(golden)]
    assert failures_of(new) == failures_of(golden)
    assert (info.failures, info.num_failures, info.revision) == ("failures.jsonl", 1, 1)
    assert all(len(row["mask_positions"]) == 64 * (len(row["mask_labels"]) - 1) for row in index_rows(new))
    for shard in info.shards:
        written = json.loads(pq.read_schema(new / shard.index).metadata[b"versions"])
        assert written[-1] == versions.record_versions()
    patches_are_slices(new)


def test_patches_around_labels_of_version_1_need_a_conversion(golden: Path, tmp_path: Path) -> None:
    patches = bn.Patches((2, 2, 2), foreground=0.5)
    with pytest.raises(
        UsageError, match="no positions of labels; `beam-nifti convert` makes a dataset that has"
    ):
        bn.PatchDataset(bn.Dataset(golden), patches, seed=0)
    bn.convert(golden, tmp_path / "new", progress=False)
    assert bn.PatchDataset(bn.Dataset(tmp_path / "new"), patches, seed=0)[0]["image"].shape[:3] == (2, 2, 2)


def test_the_versions_that_made_records_stay_known(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda n: "0.9" if n == "numpy" else real(n))
    old = build_dataset(study, tmp_path / "old", RecordConfig(**VERSION_1))
    for shard in info_of(old).shards:  # as before indexes had versions
        table = pq.read_table(old / shard.index)
        facts = {k.decode(): v.decode() for k, v in table.schema.metadata.items() if k != b"versions"}
        replaced = table.replace_schema_metadata(facts)
        edit_index(old, lambda _, table=replaced: table, info_of(old).shards.index(shard))  # type: ignore[misc]
    monkeypatch.undo()
    info = bn.convert(old, tmp_path / "new", progress=False)
    for shard in info.shards:
        facts = pq.read_schema(tmp_path / "new" / shard.index).metadata
        assert [found["numpy"] for found in json.loads(facts[b"versions"])] == ["0.9", np.__version__]


def test_revisions_begin_again(study: Path, tmp_path: Path) -> None:
    lines = study.read_text().splitlines(keepends=True)
    short = study.with_name("short.tsv")
    short.write_text("".join(lines[:-1]))
    old, options = tmp_path / "old", {"max_bad_fraction": 0.5, "columns": Columns(id="participant_id")}
    record = RecordConfig(**NO_MEMBERS)
    build_dataset(short, old, record, **options)
    short.write_text("".join([*lines, lines[-1].replace("p2", "p5").replace("2.nii", "none.nii")]))
    build_dataset(short, old, record, **options)
    assert (info_of(old).revision, info_of(old).failures) == (2, "failures-r2.jsonl")
    assert any("-r2" in shard.name for shard in info_of(old).shards)
    info = bn.convert(old, tmp_path / "new", progress=False)
    assert (info.revision, info.failures) == (1, "failures.jsonl")
    assert not any("-r" in shard.name for shard in info.shards)
    assert bn.verify(tmp_path / "new")
    assert not bn.diff(old, tmp_path / "new")


def test_rows_are_added_without_reading_the_other_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, old, new = write_cohort(tmp_path / "images", 6), tmp_path / "old", tmp_path / "new"
    options: dict[str, Any] = {"examples_per_shard": 3}
    build_again(manifest, old, **VERSION_1, **options)
    build_again(manifest, old, **options)
    assert "has format version 1 and keeps it (`beam-nifti convert` makes one of the current" in caplog.text
    bn.convert(old, new, progress=False)
    same = snapshot(new)
    assert build_again(manifest, new, **options).read == set()
    assert snapshot(new) == same
    assert "was converted from format version 1" in caplog.text
    write_cohort(manifest.parent, 2, first=6)
    assert build_again(manifest, new, **options).read == {"sub-0006.nii.gz", "sub-0007.nii.gz"}
    info = info_of(new)
    assert (info.revision, info.num_examples) == (2, 8)
    assert "sources" not in info.format_features
    assert bn.verify(new, manifest=manifest, deep="all")
    with pytest.raises(OutputError, match="not converted from"):
        bn.convert(old, new, progress=False)


def test_ids_stay_anonymous(study: Path, tmp_path: Path) -> None:
    key, old, new = tmp_path / "key", tmp_path / "old", tmp_path / "new"
    key.write_bytes(bytes(range(32)))
    named = study.with_name("unnamed.tsv")
    rows = [line.split("\t") for line in study.read_text().splitlines()]
    named.write_text("".join("\t".join((row[0], row[1], row[5])) + "\n" for row in rows))
    build_dataset(named, old, RecordConfig(**VERSION_1), anonymous_ids=str(key))
    bn.convert(old, new, progress=False)
    assert bn.verify(new, manifest=named, anonymous_ids=key)
    assert info_of(new).manifest["key_check"] == info_of(old).manifest["key_check"]
    assert not bn.diff(old, new)


@pytest.mark.parametrize("with_mask", [True, False])
def test_what_other_pipelines_wrote_is_converted(
    tmp_path: Path, with_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import apache_beam as beam

    def element(number: int) -> tuple[str, dict[str, Any]]:
        image = brain(SHAPE, seed=number)
        masks = {"mask": (image // 500).astype(np.uint8)} if with_mask else {}
        return f"{number}", {"image": image, "other": [number, 3], **masks}

    def write_to(output: Path) -> Path:
        with beam.Pipeline(options=make_options()) as pipeline:
            elements = pipeline | beam.Create([element(n) for n in range(3)])
            elements | bn.WriteToTFRecord(str(output), examples_per_shard=2)
        return output

    fresh = write_to(tmp_path / "fresh")
    features, describe = ("sources", "digests"), write_plan.WritePlan.describe
    monkeypatch.setattr(write_plan, "FORMAT_FEATURES", features)
    monkeypatch.setattr(write, "encode_record", partial(encode_record, whole=True))
    monkeypatch.setattr(
        write_plan.WritePlan,
        "describe",
        lambda *arguments: replace(describe(*arguments), format_features=features),
    )
    old = write_to(tmp_path / "old")
    monkeypatch.undo()
    assert info_of(old).format_features == features
    info = bn.convert(old, tmp_path / "new", progress=False)
    assert bn.verify(tmp_path / "new")
    assert contents(tmp_path / "new") == contents(fresh)
    assert info.format_features == info_of(fresh).format_features
    patches_are_slices(tmp_path / "new")


def test_a_shard_without_records_keeps_its_columns(tmp_path: Path) -> None:
    manifest, old = write_cohort(tmp_path / "images", 4), tmp_path / "old"
    for number in (2, 3):
        (manifest.parent / f"sub-000{number}.nii.gz").unlink()
    build_dataset(manifest, old, RecordConfig(**VERSION_1), max_bad_fraction=0.5)
    info = bn.convert(old, tmp_path / "new", progress=False)
    assert [shard.num_examples for shard in info.shards] == [2, 0]
    first, second = (pq.read_schema(tmp_path / "new" / shard.index).names for shard in info.shards)
    assert first == second
    assert bn.verify(tmp_path / "new")


# Interruptions


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of version 1 of twelve images in four shards, and a failure; nothing changes it."""
    folder = tmp_path_factory.mktemp("small")
    manifest = write_cohort(folder / "images", 12)
    (manifest.parent / "sub-0007.nii.gz").unlink()
    output = folder / "old"
    build_again(manifest, output, **VERSION_1, examples_per_shard=3, max_bad_fraction=0.5)
    return output


@pytest.fixture
def old(small: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(small, tmp_path / "old"))


def convert(old: Path, new: Path, workers: int = 1) -> int:
    """Convert it; how many records were there already."""
    return convert_dataset(Conversion.of(str(old), str(new)), workers)[1]


def test_the_same_command_continues_after_a_kill_at_any_point(tmp_path: Path) -> None:
    manifest, old, whole = write_cohort(tmp_path / "images", 4), tmp_path / "old", tmp_path / "whole"
    (manifest.parent / "sub-0003.nii.gz").unlink()
    build_dataset(manifest, old, RecordConfig(**VERSION_1), max_bad_fraction=0.5)
    arguments = {"old": str(old), "workers": 1}
    run = fork_server().run("convert", folder=whole, output=str(whole), **arguments)
    expected, kept = snapshot(whole), list[int]()
    for kill_at in range(1, run.operations + 1, 2):
        new = tmp_path / "new"
        ended = fork_server().run("convert", folder=new, kill_at=kill_at, output=str(new), **arguments)
        assert ended.was_killed
        if (new / "dataset_info.json").exists():
            assert expected.items() <= snapshot(new).items()
        kept.append(convert(old, new))
        assert snapshot(new) == expected
        assert not (new / ".build").exists()
        shutil.rmtree(new)
    assert kept == sorted(kept)
    assert {*kept} == {0, 2, 3}


def test_finished_shards_of_other_versions_are_converted_again(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    damage(old, 3)
    with pytest.raises(DatasetError):
        convert(old, new)
    assert len(list(new.glob("*.tfrecord.gz"))) == 3
    repair(old, 3)
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda n: "9.9" if n == "isal" else real(n))
    assert convert(old, new) == 0
    for shard in info_of(new).shards:
        facts = pq.read_schema(new / shard.index).metadata
        assert json.loads(facts[b"versions"])[-1]["isal"] == "9.9"


def test_a_shard_that_is_not_as_it_was_written_is_converted_again(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    damage(old, 3)
    with pytest.raises(DatasetError):
        convert(old, new)
    repair(old, 3)
    shard = new / info_of(old).shards[0].name
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert convert(old, new) == 5
    assert bn.verify(new)


@pytest.mark.parametrize(
    "edit",
    [
        lambda table, facts: (table, {name: fact for name, fact in facts.items() if name != "sha256"}),
        lambda table, facts: (table.drop_columns(["affine"]), facts),
        lambda table, facts: (set_cell("shape", 0, [1])(table), facts),
        lambda table, facts: (set_cell("member_lengths", 0, [1])(table), facts),
        lambda table, facts: (table.append_column("label", table["label"]), facts),
    ],
    ids=["sha256", "affine", "shape", "members", "twice"],
)
def test_a_shard_whose_index_no_conversion_writes_is_converted_again(
    old: Path, tmp_path: Path, edit: Callable[..., Any]
) -> None:
    new = tmp_path / "new"
    damage(old, 3)
    with pytest.raises(DatasetError):
        convert(old, new)
    repair(old, 3)
    index = new / info_of(old).shards[0].index
    write_index(str(index), *edit(*read_index(str(index))))
    assert convert(old, new) == 5
    assert bn.verify(new)


def when_written(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_ctime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_changes_nothing(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tmp_path / "new"
    assert convert(old, new, workers=3) == 0
    files = when_written(new)
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda n: "9.9" if n == "isal" else real(n))
    assert convert(old, new) == 11
    assert when_written(new) == files


def test_a_damaged_plan_beside_the_converted_dataset_is_removed(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    convert(old, new)
    (new / ".build").mkdir()
    (new / ".build/write.json").write_bytes(bytes(9))
    assert convert(old, new) == 11
    assert not (new / ".build").exists()


def test_workers_do_not_change_the_bytes(old: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        bn.convert(old, tmp_path / f"{workers}", workers=workers, progress=False)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "4")
    with pytest.raises(UsageError, match="workers is 0"):
        bn.convert(old, tmp_path / "0", workers=0, progress=False)


def test_memory_does_not_grow_with_a_shard(tmp_path: Path) -> None:
    manifest, peaks = write_cohort(tmp_path / "images", 10, shape=(96, 96, 96)), list[int]()
    lines = manifest.read_text().splitlines(keepends=True)
    for count in (2, 10):
        manifest.write_text("".join(lines[: count + 1]))
        old, new = tmp_path / f"old-{count}", tmp_path / f"new-{count}"
        build_dataset(manifest, old, RecordConfig(**VERSION_1), sharding=Sharding(num_shards=1))
        ended = fork_server().run("convert", old=str(old), output=str(new), workers=1)
        assert ended.status == 0, ended.result
        peaks.append(ended.peak_bytes)
    assert peaks[1] - peaks[0] < 12 << 20  # the further records are 28 MB


# Damage


def damage(old: Path, shard: int, record: int = 1, at: float = 0.5) -> None:
    """Change a byte of a record in its shard."""
    name = info_of(old).shards[shard].name
    cells = pq.read_table(old / info_of(old).shards[shard].index).to_pylist()[record]
    data = bytearray((old / name).read_bytes())
    data[cells["offset"] + int(cells["length"] * at)] ^= 255
    (old / name).rename(old / f"{name}.sound")
    (old / name).write_bytes(data)


def repair(old: Path, shard: int) -> None:
    name = info_of(old).shards[shard].name
    (old / f"{name}.sound").replace(old / name)


def test_a_damaged_record_is_named_and_nothing_is_published(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    damage(old, 1)
    name = info_of(old).shards[1].name
    with pytest.raises(DatasetError, match=rf"{name}: record 1 \(sub-0004\): gzip member is damaged"):
        bn.convert(old, new, workers=1, progress=False)
    assert not (new / "dataset_info.json").exists()
    assert not (new / name).exists()
    assert not (new / ".lock").exists()
    repair(old, 1)
    assert convert(old, new) == 3
    assert bn.verify(new)


def test_damage_is_listed_line_by_line_with_what_to_do(old: Path, tmp_path: Path) -> None:
    shard = info_of(old).shards[0]
    (old / shard.index).write_bytes(b"PAR1" + bytes(40) + b"\x04\0\0\0PAR1")
    with pytest.raises(DatasetError) as refused:
        bn.convert(old, tmp_path / "new", workers=1, progress=False)
    first, *findings, last = str(refused.value).splitlines()
    assert first == f"{old}: is damaged, so it is not converted:"
    assert len(findings) > 1
    assert {text.partition(": ")[0].strip() for text in findings} == {shard.index}
    assert last.startswith("restore the files from a copy, or build this dataset again with ")


def test_a_problem_is_one_line() -> None:
    problems = Problems()
    problems.add(Scope.SHARD, "index/a.parquet: cannot be read: TProtocolException: Invalid data\n; copy it")
    assert problems.texts()[0].endswith(r"Invalid data\n; copy it")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda old: damage(old, 0, at=0.0), "record 1"),
        # The time in the header of a member is covered by no checksum but the file's.
        (lambda old: damage_header(old), "sha256 is"),
        (lambda old: (old / info_of(old).shards[0].name).unlink(), "is missing"),
        (lambda old: (old / info_of(old).shards[0].index).unlink(), "is missing"),
        (lambda old: (old / info_of(old).shards[0].index).write_bytes(b"PAR1"), "is not the file that"),
        (lambda old: (old / "failures.jsonl").unlink(), r"failures.jsonl: is missing"),
        (lambda old: edit_failures(old, lambda text: text[:-9]), r"failures.jsonl: .*; copy it again"),
        (
            lambda old: edit_failures(old, lambda text: text.replace("sub-", "\0")),
            "failures.jsonl: .*; copy it",
        ),
        (lambda old: edit_failures(old, lambda text: text * 2), "failures.jsonl: .*; copy it again"),
        (lambda old: edit_failures(old, lambda text: ""), "failures.jsonl: .*; copy it again"),
        (lambda old: edit_index(old, set_cell("min", 0, -1.0)), r"record 0 \(sub-0000\): intensity_min is 0"),
        (lambda old: edit_index(old, set_cell("offset", 2, 0)), "offset"),
        (lambda old: edit_config(old, "fingerprint", "0" * 16), "the fingerprint is 0000"),
        (lambda old: (old / "dataset_info.json").unlink(), "no complete dataset"),
    ],
)
def test_damage_is_an_error(old: Path, tmp_path: Path, edit: Callable[[Path], object], message: str) -> None:
    edit(old)
    with pytest.raises(DatasetError, match=message):
        bn.convert(old, tmp_path / "new", workers=1, progress=False)
    assert not (tmp_path / "new/dataset_info.json").exists()


def edit_failures(old: Path, edit: Callable[[str], str]) -> None:
    path = old / "failures.jsonl"
    path.write_text(edit(path.read_text()))


def damage_header(old: Path) -> None:
    path = old / info_of(old).shards[0].name
    data = bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(data)


def edit_config(old: Path, name: str, value: str) -> None:
    edit_info(old, lambda facts: facts["config"].update({name: value}))


def test_a_changed_list_of_failures_is_refused(tmp_path: Path) -> None:
    manifest, old = write_cohort(tmp_path / "images", 4), tmp_path / "old"
    (manifest.parent / "sub-0002.nii.gz").unlink()
    build_dataset(manifest, old, RecordConfig(**NO_MEMBERS), max_bad_fraction=0.5)
    path = old / "failures.jsonl"
    path.write_text(path.read_text().replace("sub-0002", "sub-0003"))
    with pytest.raises(DatasetError, match=r"failures\.jsonl: is not the file that"):
        bn.convert(old, tmp_path / "new", progress=False)


@pytest.mark.parametrize("number", [1, 3])
def test_a_dataset_that_is_rebuilt_meanwhile_is_no_damage(old: Path, tmp_path: Path, number: int) -> None:
    new, path = tmp_path / "new", old / info_of(old).shards[number].name
    rebuilt = False

    def rebuild(opened: str) -> None:
        nonlocal rebuilt
        if opened == str(path) and not rebuilt:
            rebuilt = True
            edit_info(old, lambda facts: facts.update(revision=2))
            if number == 1:
                path.rename(old / "moved")

    with watching(rebuild), pytest.raises(OutputBusyError, match="was rebuilt while it was converted"):
        convert(old, new)
    assert snapshot(new) == {}
    if number == 1:
        (old / "moved").rename(path)
    assert convert(old, new) == 0


def test_what_is_published_stays_if_the_old_dataset_is_rebuilt(old: Path, tmp_path: Path) -> None:
    conversion = Conversion.of(str(old), str(tmp_path / "new"))
    convert_dataset(conversion)
    edit_info(old, lambda facts: facts.update(revision=2))
    with unchanged(tmp_path / "new"), pytest.raises(OutputBusyError):
        convert_dataset(conversion)


# What is refused


def test_the_current_format_is_not_converted(old: Path, tmp_path: Path, study: Path) -> None:
    bn.convert(old, tmp_path / "new", progress=False)
    build_dataset(study, tmp_path / "fresh")
    for dataset in (tmp_path / "new", tmp_path / "fresh"):
        with pytest.raises(UsageError, match="already has the current format"):
            bn.convert(dataset, tmp_path / "newer", progress=False)
    assert not (tmp_path / "newer").exists()


def test_one_folder_is_not_in_the_other(old: Path) -> None:
    before = snapshot(old.parent)
    (old.parent / "link").symlink_to(old)
    for output in (old, old / "new", old.parent, old.parent / "link", old.parent / "link/new"):
        with pytest.raises(UsageError, match="choose a folder outside the dataset"):
            bn.convert(old, output, progress=False)
    (old.parent / "link").unlink()
    assert snapshot(old.parent) == before


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


def test_an_output_that_holds_something_else_stays(
    old: Path, small: Path, tmp_path: Path, study: Path
) -> None:
    new = tmp_path / "new"
    build_dataset(study, new)
    with unchanged(new), pytest.raises(OutputError, match="holds a dataset that was not converted from"):
        bn.convert(old, new, progress=False)
    (new / "dataset_info.json").unlink()
    with unchanged(new), pytest.raises(OutputError, match=r"choose another output, or delete it first$"):
        bn.convert(old, new, progress=False)
    # An unfinished conversion of what the dataset was before.
    damage(old, 3)
    with pytest.raises(DatasetError):
        convert(old, tmp_path / "other")
    repair(old, 3)
    edit_info(old, lambda facts: facts.update(revision=2))
    with (
        unchanged(tmp_path / "other"),
        pytest.raises(OutputError, match="holds an unfinished build, or a conversion"),
    ):
        bn.convert(old, tmp_path / "other", progress=False)
    assert convert(small, tmp_path / "other") == 8


@pytest.mark.parametrize("name", [".build/plan.json", ".build/0123456789abcdef/train-00000/x.part"])
def test_an_unfinished_build_stays(old: Path, tmp_path: Path, name: str) -> None:
    new = tmp_path / "new"
    (new / name).parent.mkdir(parents=True)
    (new / name).write_text("{}")
    with unchanged(new), pytest.raises(OutputError, match="unfinished"):
        bn.convert(old, new, progress=False)


@pytest.mark.parametrize(
    "lose",
    [
        lambda new: (new / info_of(new).shards[2].name).unlink(),
        lambda new: (new / info_of(new).shards[2].name).write_bytes(b""),
        lambda new: damage(new, 2),
        lambda new: (new / info_of(new).shards[2].index).unlink(),
        lambda new: (new / info_of(new).shards[2].index).write_bytes(b"PAR1"),
    ],
)
def test_a_converted_dataset_that_is_damaged_is_called_so(
    old: Path, tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    new = tmp_path / "new"
    bn.convert(old, new, progress=False)
    lose(new)
    damaged = (
        r"(index/)?train-00002-of-00004\S* is missing or damaged; convert \S*/old again, and choose another "
    )
    with unchanged(new), pytest.raises(OutputError, match=damaged):
        bn.convert(old, new, progress=False)
    edit_info(old, lambda facts: facts["manifest"].update(digest="0" * 64))
    with unchanged(new), pytest.raises(OutputError, match="holds a dataset that was not converted from"):
        bn.convert(old, new, progress=False)


def test_files_of_other_names_stay(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    (new / "index").mkdir(parents=True)
    others = {"notes.txt", "old.tfrec", "index/a.parquet"}
    for name in others:
        (new / name).write_text("mine")
    bn.convert(old, new, progress=False)
    assert stray_files(new) == others
    (problem,) = bn.verify(new).problems
    assert problem.startswith("index/a.parquet: not in dataset_info.json")


def test_links_in_an_output_are_not_followed(old: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/index").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="symbolic link"):
        bn.convert(old, tmp_path / "new", progress=False)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_one_conversion_at_a_time(old: Path, tmp_path: Path) -> None:
    with lock.hold(str(tmp_path / "new")), pytest.raises(OutputBusyError, match="is writing here"):
        bn.convert(old, tmp_path / "new", progress=False)
    assert bn.convert(old, tmp_path / "new", progress=False).num_examples == 11


def test_a_build_into_an_unfinished_conversion_is_refused(old: Path, tmp_path: Path) -> None:
    damage(old, 3)
    with pytest.raises(DatasetError):
        convert(old, tmp_path / "new")
    with pytest.raises(DatasetError, match=r"run the interrupted .*`beam-nifti convert`"):
        bn.verify(tmp_path / "new")
    with pytest.raises(
        OutputError, match=r"holds an unfinished `beam-nifti convert` or WriteToTFRecord; run"
    ):
        build_again(manifest_of(old), tmp_path / "new")


def test_a_build_that_overwrites_a_killed_conversion_leaves_nothing_of_it(old: Path, tmp_path: Path) -> None:
    arguments = {"old": str(old), "workers": 1}
    run = fork_server().run("convert", folder=tmp_path / "whole", output=str(tmp_path / "whole"), **arguments)
    left, states = set[str](), list[list[tuple[str, bytes]]]()
    for kill_at in range(1, run.operations, 3):
        new = tmp_path / f"new-{kill_at}"
        fork_server().run("convert", folder=new, kill_at=kill_at, output=str(new), **arguments)
        left |= {path.suffix for path in new.rglob("*")}
        if (state := state_of(new)) in states:  # it has only read since
            continue
        states.append(state)
        build_again(manifest_of(old), new, overwrite=True, examples_per_shard=5, max_bad_fraction=0.5)
        assert bn.verify(new)
        assert stray_files(new) == set()
    assert left >= {".tmp", ".gz", ".parquet"}


# The command


def test_the_command(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, ended = tmp_path / "new", tmp_path / "ended.json"
    command = ["convert", str(old), str(new), "--workers=2", f"--summary-json={ended}"]
    assert cli.main([*command, "--quiet"]) == cli.SUCCESS
    streams = capsys.readouterr()
    size = info_of(new).num_bytes / 1000
    assert streams.err == ""
    assert streams.out.splitlines() == [
        f"dataset  11 examples, 4 shards, {size:.1f} kB: {new}",
        f"failed   1 volume, listed in {new / 'failures.jsonl'}",
        f"read it  from beam_nifti.reader import load_dataset; dataset = load_dataset('{new}', 'train', "
        "batch_size=8)",
    ]
    facts = json.loads(ended.read_text())
    assert (facts["status"], facts["command"], facts["output"]) == ("success", "convert", str(new))
    assert [facts[f"num_{what}"] for what in ("volumes", "examples", "kept", "failed", "shards")] == [
        *(12, 11, 0, 1, 4),
    ]
    assert facts["failures_path"] == str(new / "failures.jsonl")
    assert facts["fingerprint"] == info_of(new).config["fingerprint"] != info_of(old).config["fingerprint"]
    assert cli.main(command) == cli.SUCCESS
    assert capsys.readouterr().out.splitlines()[0] == "kept     11 examples of an earlier run"
    assert cli.main(["convert", str(new), str(tmp_path / "newer")]) == cli.USAGE
    damage(old, 0)
    assert cli.main(["convert", str(old), str(tmp_path / "other"), "--quiet"]) == cli.FAILED
    assert "record 1 (sub-0001)" in capsys.readouterr().err


def test_an_interrupted_command_continues(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(old), str(tmp_path / "new"), "--workers=1", "--quiet"]
    last = str(old / info_of(old).shards[3].name)

    def interrupt(path: str) -> None:
        if path == last:
            raise KeyboardInterrupt

    with watching(interrupt):
        assert cli.main(command) == INTERRUPTED
    assert "the same command continues where it stopped" in capsys.readouterr().err
    assert cli.main(command) == cli.SUCCESS
    assert capsys.readouterr().out.startswith("kept     8 examples of an earlier run\n")


def test_a_terminated_command_says_so_and_continues(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told.json"
    command = ["convert", str(old), str(tmp_path / "new"), "--workers=1", "--quiet", f"--summary-json={told}"]
    last = str(old / info_of(old).shards[3].name)

    def terminate(path: str) -> None:
        if path == last and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # until the main thread has seen it
                pass

    with watching(terminate):
        assert cli.main(command) == TERMINATED
    assert "the same command continues where it stopped" in capsys.readouterr().err
    summary = json.loads(told.read_text())
    assert (summary["status"], summary["error"]["message"]) == ("interrupted", "SIGTERM")
    assert cli.main(command) == cli.SUCCESS
    assert re.match("kept     (8|11) examples of an earlier run\n", capsys.readouterr().out)


def test_an_object_store_is_read_and_written(old: Path, tmp_path: Path) -> None:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    here, there = tmp_path / "here", "memory://lab/new"
    bn.convert(old, here, progress=False)
    for name, data in snapshot(old).items():
        MemoryFileSystem.objects[f"memory://lab/old/{name}"] = (data, 1.0)
    bn.convert("memory://lab/old", there, progress=False)
    found = {
        name.removeprefix(f"{there}/"): data
        for name, (data, _) in MemoryFileSystem.objects.items()
        if name.startswith(there)
    }
    MemoryFileSystem.objects.clear()
    assert found == snapshot(here)
