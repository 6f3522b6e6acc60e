"""Participants who are withdrawn from a dataset, without the images of the others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig, Sharding, Splitting
from beam_nifti.errors import ManifestError, OutputError, UsageError
from beam_nifti.manifest.pseudonyms import read_pseudonyms
from beam_nifti.manifest.tables import read_table
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.record.index import read_index
from tests.build_helpers import build_apart, contents, fork_server, snapshot, stray_files, write_arrays
from tests.datasets import build_dataset, decompressed_files, edit_info, index_rows, info_of
from tests.images import brain, write_image, write_manifest

SHAPE = (64, 48, 12)
"""Large enough for several members."""

PEOPLE = ("p0", "p1", "p2", "p3", "p4", "p5", "p6")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Two sessions of each participant; one image of p1 and of p5 is missing, or has a constant frame."""
    rows = []
    for i, person in enumerate(PEOPLE):
        for session in ("a", "b"):
            name = f"{person}{session}"
            voxels = brain(SHAPE, seed=2 * i + (session == "b"))
            if name not in ("p1b", "p5a"):
                write_image(folder / f"{name}.nii", voxels)
            write_image(folder / f"second/{name}.nii", voxels // 2)
            write_image(folder / f"mask/{name}.nii", (voxels // (300 + i)).astype(np.uint8))
            if name != "p1b":
                frames = voxels[:9, :8, :, None] * np.array([1, name != "p5a"], np.int16)
                write_image(folder / f"bold/{name}.nii", frames)
                write_image(folder / f"runs/{name}.nii", frames.repeat(1 + i % 2, 3)[..., : 1 + i % 3])
            rows.append(
                {
                    **{"participant_id": person, "session_id": session, "path": f"{name}.nii"},
                    **{"second": f"second/{name}.nii", "mask": f"mask/{name}.nii"},
                    **{"runs": f"runs/{name}.nii", "some": f"mask/{name}.nii" if i % 3 else "n/a"},
                    **{"bold": f"bold/{name}.nii", "label": i / 2, "site": "ABCDEFG"[i]},
                    **{
                        "grade": "" if i == 3 else i,
                        "note": f"is {i}",
                        "split": "test" if i in (1, 4) else "train",
                    },
                }
            )
    return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_manifest(folder / "manifest.tsv", rows_of(folder))
    return folder / "manifest.tsv"


def without(study: Path, people: tuple[str, ...], columns: tuple[str, ...] = ()) -> Path:
    """The manifest without some participants and columns."""
    lines = [line.split("\t") for line in study.read_text().splitlines()]
    kept = [at for at, name in enumerate(lines[0]) if name not in columns]
    path = study.parent / f"without-{'-'.join((*people, *columns))}.tsv"
    rows = [line for line in lines if line[0] not in people]
    path.write_text("".join("\t".join(row[at] for at in kept) + "\n" for row in rows))
    return path


CASES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the defaults": ({}, {}),
    "native, shards of three": ({"voxel_dtype": "native"}, {"sharding": Sharding(examples_per_shard=3)}),
    "uncompressed": ({"compression": "none"}, {"columns": Columns(mask="mask")}),
    "channels, ids": ({"rescale": "percentile:1,99"}, {"columns": Columns(path="path,second", id="path")}),
    "each frame": ({"frames": "each"}, {"columns": Columns(path="bold")}),
    "frames of runs": ({"frames": "each", "max_frames": 3}, {"columns": Columns(path="runs")}),
    "missing masks": ({}, {"columns": Columns(mask="some", missing_mask="empty")}),
    "labels": ({}, {"columns": Columns(label="label:float,site,note:string")}),
    "labels, shards of five": (
        {"voxel_dtype": "uint8"},
        {"columns": Columns(label="site", mask="mask"), "sharding": Sharding(examples_per_shard=5)},
    ),
    "skipped rows": ({}, {"columns": Columns(label="grade:class", missing_label="skip")}),
    "shuffled": ({}, {"allow_mixed_shapes": True, "shuffle_seed": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dataset_is_that_of_a_manifest_without_them(study: Path, tmp_path: Path, case: str) -> None:
    record, options = CASES[case]
    people = ("p2",) if list(CASES).index(case) % 2 else ("p1", "p5")
    options = {"max_bad_fraction": 0.5, **options}
    output = build_dataset(study, tmp_path / "out", RecordConfig(**record), **options)
    rest = without(study, people)
    fresh = build_dataset(rest, tmp_path / "fresh", RecordConfig(**record), **options)
    before = info_of(output)
    info = bn.withdraw(output, people, manifest=study, progress=False)
    assert info == info_of(output)
    assert contents(output) == contents(fresh)
    expected = info_of(fresh)
    assert (info.config, info.labels, info.features) == (expected.config, expected.labels, expected.features)
    assert info.manifest == {**expected.manifest, "path": before.manifest["path"]}
    assert (info.num_failures, info.mask_labels) == (expected.num_failures, expected.mask_labels)
    if info.failures:
        listed = (output / info.failures).read_bytes()
        assert listed == (fresh / "failures.jsonl").read_bytes()
    assert bn.verify(output, manifest=rest, deep=4)
    assert stray_files(output) == set()
    whole = snapshot(output)
    build_dataset(rest, output, RecordConfig(**record), **options)
    assert snapshot(output) == whole


# Nothing is left, whatever happens


@pytest.fixture(scope="module")
def built(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of it, with two failures; it stays."""
    return build_dataset(study, tmp_path_factory.mktemp("built") / "out", max_bad_fraction=0.5)


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "dataset"))


def mentions(output: Path, text: str) -> list[str]:
    """Files whose names or contents, decompressed, have a text."""
    return [
        name for name, data in decompressed_files(output).items() if text.encode() in name.encode() + data
    ]


def test_the_same_command_continues_after_a_kill_at_any_point(
    study: Path, built: Path, tmp_path: Path
) -> None:
    rest, arguments = without(study, ("p1",)), {"people": ["p1"], "manifest": str(study)}
    whole = shutil.copytree(built, tmp_path / "whole")
    run = fork_server().run("withdraw", folder=whole, output=str(whole), **arguments)
    expected = contents(whole)
    assert run.result == 2
    for kill_at in range(1, run.operations + 1, 29):
        output = shutil.copytree(built, tmp_path / "killed")
        ended = fork_server().run("withdraw", folder=output, kill_at=kill_at, output=str(output), **arguments)
        assert ended.was_killed
        is_published = info_of(output).revision == 2
        found = bn.verify(output)
        assert found or (is_published and "is not removed; run the same" in found.problems[0])
        bn.withdraw(output, "p1", manifest=study, progress=False)
        assert contents(output) == expected
        assert bn.verify(output, manifest=rest)
        assert stray_files(output) == set()
        assert not (output / ".build").exists()
        assert mentions(output, "p1") == []
        shutil.rmtree(output)


def test_a_build_after_a_killed_withdrawal_leaves_nothing_of_it(
    study: Path, built: Path, tmp_path: Path
) -> None:
    rest, arguments = without(study, ("p1",)), {"people": ["p1"], "manifest": str(study)}
    before = snapshot(built)
    run = fork_server().run(
        "withdraw", folder=tmp_path, output=str(shutil.copytree(built, tmp_path / "whole")), **arguments
    )
    for kill_at in range(5, run.operations + 1, 40):
        output = shutil.copytree(built, tmp_path / "killed")
        fork_server().run("withdraw", folder=output, kill_at=kill_at, output=str(output), **arguments)
        is_published = info_of(output).revision == 2
        build_dataset(rest if is_published else study, output, max_bad_fraction=0.5)
        assert snapshot(output) == before or is_published
        assert bn.verify(output, manifest=rest if is_published else study)
        assert stray_files(output) == set()
        shutil.rmtree(output)


def test_the_statement(study: Path, dataset: Path) -> None:
    before, content = info_of(dataset), (dataset / "dataset_info.json").read_bytes()
    info = bn.withdraw(dataset, ["p1", "p2"], manifest=study, progress=False)
    (statement,) = info.withdrawals
    assert (statement.revision, statement.num_people, statement.num_rows) == (2, 2, 4)
    assert (statement.num_examples, statement.num_failures) == (3, 1)
    assert statement.info_sha256 == hashlib.sha256(content).hexdigest()
    held = {row["shard"] for row in placed(before, dataset) if row["participant_id"] in ("p1", "p2")}
    assert {shard.name for shard in statement.shards} <= {shard.name for shard in before.shards}
    assert len(info.withdrawn) == 2
    assert held <= {shard.name for shard in statement.shards}
    assert mentions(dataset, "p1") == mentions(dataset, "p2") == []
    again = bn.withdraw(dataset, "p3", manifest=without(study, ("p1", "p2")), progress=False)
    assert [each.revision for each in again.withdrawals] == [2, 3]
    assert again.withdrawals[:1] == info.withdrawals
    assert bn.withdraw(dataset, ["p1", "p3"], manifest=study, progress=False) == again
    assert bn.verify(dataset)


def placed(info: DatasetInfo, output: Path) -> list[dict[str, Any]]:
    """The rows of the indexes, with the name of the shard of each; of the statement's dataset, as it was."""
    rows = []
    for shard in info.shards:
        path = output / shard.index
        if path.exists():
            rows += [row | {"shard": shard.name} for row in read_index(str(path))[0].to_pylist()]
    return rows


def test_builds_refuse_who_was_withdrawn(study: Path, dataset: Path) -> None:
    bn.withdraw(dataset, "p2", manifest=study, progress=False)
    rest, whole = without(study, ("p2",)), snapshot(dataset)
    for overwrite in (False, True):
        with pytest.raises(bn.ManifestError, match=r"row 5 \(p2\): was withdrawn from the dataset in OUTPUT"):
            build_dataset(study, dataset, max_bad_fraction=0.5, overwrite=overwrite)
    assert snapshot(dataset) == whole
    build_dataset(rest, dataset, max_bad_fraction=0.5)
    assert snapshot(dataset) == whole
    more = rest.with_name("more.tsv")
    last = rest.read_text().splitlines()[-1].split("\t")
    more.write_text(rest.read_text() + "\t".join(["p9", *last[1:2], "p0a.nii", *last[3:]]) + "\n")
    build_dataset(more, dataset, max_bad_fraction=0.5)
    assert "p9_b" in {row["example_id"] for row in index_rows(dataset)}
    build_dataset(rest, dataset, max_bad_fraction=0.5, overwrite=True)
    assert info_of(dataset).num_examples == 10
    with pytest.raises(bn.ManifestError, match="was withdrawn"):
        build_dataset(study, dataset, max_bad_fraction=0.5, overwrite=True)


def test_verify_finds_who_is_still_there(study: Path, dataset: Path) -> None:
    old = next(shard for shard in info_of(dataset).shards if "train" in shard.name)
    data = (dataset / old.name).read_bytes()
    bn.withdraw(dataset, "p0", manifest=study, progress=False)
    problems = bn.verify(dataset, manifest=study).problems
    assert any("row 1 (p0): was withdrawn from the dataset in OUTPUT; drop the row" in p for p in problems)
    assert not any("run the build again" in p for p in problems)
    (dataset / old.name).write_bytes(data)
    assert any(f"{old.name}: holds records of withdrawn" in text for text in bn.verify(dataset).problems)
    (dataset / old.name).unlink()
    assert bn.verify(dataset)

    def back(facts: dict[str, Any]) -> None:
        key = bytes.fromhex(facts["withdrawals"][0]["info_sha256"])
        name = hashlib.blake2b(b"p3", digest_size=16, key=key, person=b"withdrawn").hexdigest()
        facts["withdrawn"] = [name]

    edit_info(dataset, back)
    (problem,) = bn.verify(dataset).problems
    assert "has records or failures of 1 withdrawn participant (p3)" in problem


def test_anonymous_ids(study: Path, tmp_path: Path) -> None:
    key, output = tmp_path / "key", tmp_path / "out"
    key.write_bytes(bytes(range(32)))
    options: dict[str, Any] = {"max_bad_fraction": 0.5, "anonymous_ids": str(key)}
    study, rest = (
        without(study, people, ("second", "mask", "bold", "runs", "some")) for people in ((), ("p4",))
    )
    build_dataset(study, output, **options)
    other = shutil.copytree(output, tmp_path / "other")
    fresh = build_dataset(rest, tmp_path / "fresh", **options)
    with pytest.raises(UsageError, match="its ids are anonymous; give the file of their key with anonymous_"):
        bn.withdraw(output, "p4", manifest=study, progress=False)
    bn.withdraw(output, "p4", manifest=study, anonymous_ids=key, progress=False)
    assert contents(output) == contents(fresh)
    pseudonym = read_pseudonyms(str(key)).of("p4", "participant_id")
    bn.withdraw(other, pseudonym, manifest=study, anonymous_ids=key, progress=False)
    assert contents(other) == contents(fresh)
    assert mentions(output, pseudonym) == mentions(output, "p4") == []
    with pytest.raises(bn.ManifestError, match="row 9: was withdrawn"):
        build_dataset(study, output, **options)


def test_ids_without_participants(study: Path, tmp_path: Path) -> None:
    manifest = without(study, (), ("participant_id", "session_id"))
    rest = manifest.with_name("fewer.tsv")
    rest.write_text("".join(line for line in manifest.read_text().splitlines(True) if "p5b.nii" not in line))
    output = build_dataset(manifest, tmp_path / "out", max_bad_fraction=0.5)
    fresh = build_dataset(rest, tmp_path / "fresh", max_bad_fraction=0.5)
    bn.withdraw(output, "p5b.nii", manifest=manifest, progress=False)
    assert contents(output) == contents(fresh)
    with pytest.raises(bn.ManifestError, match=r"row 12 \(p5b.nii\): was withdrawn"):
        build_dataset(manifest, output, max_bad_fraction=0.5)


def test_rows_that_were_appended_meanwhile_do_not_matter(
    study: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = study.read_text().splitlines()[1]
    longer = study.with_name("appended.tsv")
    longer.write_text(
        f"{study.read_text()}{first.replace('p0', 'p9', 1)}\n{first.replace(chr(9) + 'a', chr(9) + 'c', 1)}\n"
    )
    other = shutil.copytree(dataset, tmp_path / "other")
    bn.withdraw(dataset, "p0", manifest=longer, progress=False)
    assert "drop rows 1, 2, 16; builds" in caplog.text
    bn.withdraw(other, "p0", manifest=study, progress=False)
    assert contents(dataset) == contents(other)
    with pytest.raises(UsageError, match="has no participant p9"):
        bn.withdraw(dataset, "p9", manifest=without(longer, ("p0",)), progress=False)


def test_splits_that_are_drawn_are_drawn_again(study: Path, tmp_path: Path) -> None:
    manifest, rest = (without(study, people, ("split",)) for people in ((), ("p0",)))
    drawn = Splitting({"train": 0.6, "test": 0.4}, stratify="note")
    output, fresh = (
        build_dataset(path, tmp_path / name, max_bad_fraction=0.5, splitting=drawn)
        for path, name in ((manifest, "out"), (rest, "fresh"))
    )
    bn.withdraw(output, "p0", manifest=manifest, progress=False)
    assert contents(output) == contents(fresh)


def test_a_table_in_memory_is_a_manifest(study: Path, dataset: Path, tmp_path: Path) -> None:
    rows = read_table(str(study)).to_pylist()
    other = shutil.copytree(dataset, tmp_path / "other")
    for output, manifest in ((dataset, study), (other, rows)):
        bn.withdraw(output, "p6", manifest=manifest, progress=False)  # type: ignore[arg-type]
    assert contents(dataset) == contents(other)


def test_several_withdrawals_take_one_manifest(study: Path, dataset: Path, tmp_path: Path) -> None:
    for people in ("p1", ("p1", "p5"), "p2"):
        bn.withdraw(dataset, people, manifest=study, progress=False)
    rest = without(study, ("p1", "p5", "p2"))
    fresh = build_dataset(rest, tmp_path / "fresh", sharding=Sharding(num_shards=2), max_bad_fraction=0.5)
    assert [row["example_id"] for row in index_rows(dataset)] == [
        row["example_id"] for row in index_rows(fresh)
    ]
    assert bn.verify(dataset, manifest=rest, deep=2)
    assert [each.num_people for each in info_of(dataset).withdrawals] == [1, 1, 1]


@pytest.mark.parametrize(("first", "then"), [(None, 1), (1, 2), (1, None)])
def test_nobody_comes_back_by_another_id(
    study: Path, tmp_path: Path, first: int | None, then: int | None
) -> None:
    def key(number: int | None) -> Path | None:
        path = tmp_path / f"key{number}"
        path.write_bytes(bytes([number or 0]) * 32)
        return path if number else None

    def build(manifest: Path, number: int | None) -> None:
        options = {"max_bad_fraction": 0.5, "overwrite": True, "workers": 1, "progress": False}
        bn.build(manifest, output, anonymous_ids=key(number), **options)  # type: ignore[arg-type]

    named = ("second", "mask", "bold", "runs", "some")
    everybody, rest = (without(study, people, named) for people in ((), ("p1",)))
    output = tmp_path / "out"
    build(everybody, first)
    bn.withdraw(output, "p1", manifest=everybody, anonymous_ids=key(first), progress=False)
    for manifest in (everybody, rest):
        with pytest.raises(ManifestError, match="cannot be recognized by other ids; keep the columns"):
            build(manifest, then)
    with pytest.raises(ManifestError, match="was withdrawn from the dataset in output; drop the row"):
        build(everybody, first)
    build(rest, first)


@pytest.mark.parametrize(
    ("people", "manifest", "said"),
    [
        ("p8", {}, "dataset: has no participant p8; give ids exactly as in .*manifest.tsv"),
        (PEOPLE, {}, "dataset: has no other participants; delete it instead"),
        ((), {}, "no participant is named"),
        (("p1", ""), {}, "no participant is named"),
        ("p1", {"people": ("p0",)}, "is not the manifest that .* was built from; give that one"),
    ],
)
def test_refusals(people: Any, manifest: dict[str, Any], said: str, study: Path, dataset: Path) -> None:
    before = snapshot(dataset)
    given = without(study, **manifest) if manifest else study
    with pytest.raises(UsageError, match=said):
        bn.withdraw(dataset, people, manifest=given, progress=False)
    assert snapshot(dataset) == before


def test_what_may_hold_more_records_is_refused_or_discarded(study: Path, dataset: Path) -> None:
    (dataset / "failures-r7.jsonl").write_text("{}")
    with pytest.raises(OutputError, match=r"holds 1 file \(failures-r7.jsonl\) that dataset_info.json does"):
        bn.withdraw(dataset, "p1", manifest=study, progress=False)
    (dataset / "failures-r7.jsonl").unlink()
    more = study.with_name("longer.tsv")
    row = study.read_text().splitlines()[1].replace("p0\t", "p9\t")
    more.write_text(f"{study.read_text()}{row}\n")
    for kill_at in range(100, 300, 20):
        killed = build_apart(more, dataset, kill_at=kill_at, num_shards=2, max_bad_fraction=0.5)
        if list(dataset.rglob("*.part")):
            break
    assert killed.was_killed
    assert info_of(dataset).revision == 1
    assert (dataset / ".build").exists()
    with pytest.raises(OutputError, match="holds an unfinished build; finish it, or use overwrite"):
        bn.withdraw(dataset, "p1", manifest=study, progress=False)
    bn.withdraw(dataset, "p1", manifest=study, overwrite=True, progress=False)
    assert not (dataset / ".build").exists()
    assert bn.verify(dataset, manifest=without(study, ("p1",)))
    assert mentions(dataset, "p1") == []


def test_damaged_records_are_not_copied(study: Path, dataset: Path) -> None:
    shard = info_of(dataset).split("train").shards[1]
    data = bytearray((dataset / shard.name).read_bytes())
    data[len(data) // 2] ^= 1
    (dataset / shard.name).write_bytes(data)
    with pytest.raises(bn.DatasetError, match="is damaged, so no records of it are copied; restore it"):
        bn.withdraw(dataset, "p0", manifest=study, progress=False)
    assert info_of(dataset).revision == 1


def test_datasets_without_a_manifest_and_of_version_1_are_refused(study: Path, tmp_path: Path) -> None:
    version_1 = RecordConfig(format_version=1, format_features=())
    old = build_dataset(study, tmp_path / "old", version_1, max_bad_fraction=0.5)
    with pytest.raises(UsageError, match="has format version 1; make a new one of it with `beam-nifti conv"):
        bn.withdraw(old, "p0", manifest=study, progress=False)
    write_arrays(tmp_path / "written", ["a", "b"])
    with pytest.raises(UsageError, match="was written by WriteToTFRecord, without a manifest"):
        bn.withdraw(tmp_path / "written", "a", manifest=study, progress=False)


def test_records_without_a_manifest_do_not_replace_a_dataset_with_withdrawals(
    study: Path, dataset: Path
) -> None:
    bn.withdraw(dataset, "p0", manifest=study, progress=False)
    with pytest.raises(
        OutputError, match="holds a dataset from which participants were withdrawn, and records"
    ):
        write_arrays(dataset, ["p0"], overwrite=True)


def test_a_converted_dataset(study: Path, tmp_path: Path) -> None:
    version_1 = RecordConfig(format_version=1, format_features=())
    old = build_dataset(study, tmp_path / "old", version_1, max_bad_fraction=0.5)
    bn.convert(old, tmp_path / "new", progress=False)
    bn.withdraw(tmp_path / "new", "p3", manifest=study, progress=False)
    assert bn.verify(tmp_path / "new", manifest=without(study, ("p3",)))
    assert bn.inspect(tmp_path / "new")["withdrawals"][0]["num_examples"] == 2


def test_a_dataset_with_withdrawals_is_converted(study: Path, tmp_path: Path) -> None:
    earlier = RecordConfig(format_features=("sources", "digests"))
    old = build_dataset(study, tmp_path / "old", earlier, max_bad_fraction=0.5)
    before = bn.withdraw(old, "p3", manifest=study, progress=False)
    info = bn.convert(old, tmp_path / "new", progress=False)
    assert (info.withdrawn, info.withdrawals) == (before.withdrawn, before.withdrawals)
    assert {shard.name for shard in before.withdrawals[0].shards} <= {shard.name for shard in info.shards}
    assert bn.verify(tmp_path / "new", manifest=without(study, ("p3",)))
    with pytest.raises(bn.ManifestError, match="was withdrawn"):
        build_dataset(study, tmp_path / "new", max_bad_fraction=0.5)


def test_an_object_store(study: Path, dataset: Path) -> None:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    for name, data in snapshot(dataset).items():
        MemoryFileSystem.objects[f"memory://lab/out/{name}"] = (data, 1.0)
    bn.withdraw("memory://lab/out", "p0", manifest=study, progress=False)
    info = bn.withdraw(dataset, "p0", manifest=study, progress=False)
    there = {
        name.removeprefix("memory://lab/out/"): data for name, (data, _) in MemoryFileSystem.objects.items()
    }
    MemoryFileSystem.objects.clear()
    here = snapshot(dataset)
    assert there.keys() == here.keys()
    assert all(there[shard.name] == here[shard.name] for shard in info.shards)


def test_the_command(study: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "ended.json"
    command = ["withdraw", str(dataset), "--participant=p1", "--participant=p2", f"--manifest={study}"]
    assert cli.main([*command, "--quiet", f"--summary-json={summary}"]) == cli.SUCCESS
    said = capsys.readouterr()
    assert said.out.startswith("withdrawn 2 participants with 3 examples and 1 failure, in revision 2 (")
    assert "dataset   9 examples, 4 shards, " in said.out
    assert f"{study}: drop rows 3, 4, 5, 6; builds into {dataset} refuse them" in said.err
    assert json.loads(summary.read_text())["num_examples"] == 9
    assert cli.main(["inspect", str(dataset)]) == cli.SUCCESS
    assert "withdrawn     2 participants with 3 examples and 1 failure, in rev" in capsys.readouterr().out
    assert cli.main([*command[:3], "--participant=p8", f"--manifest={study}"]) == cli.USAGE
