"""Unfinished builds are treated like datasets: continued, or refused, and never destroyed without a word."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_nifti.config import Columns
from beam_nifti.errors import OutputError, TooManyFailures
from beam_nifti.pipeline.build import open_build, plan_build
from beam_nifti.pipeline.resume import Reuse
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.index import read_index, write_index
from beam_nifti.record.sharding import ShardName
from tests.build_helpers import assert_complete, build, build_apart, contents, make_config, snapshot
from tests.images import brain, name_of, write_image, write_manifest

COUNT = 10
SHAPE = (6, 5, 4)
SMALL_SHARDS: dict[str, Any] = {"examples_per_shard": 4}
SMALL = SMALL_SHARDS | {"unit_rows": 2}


def index_name(shard: str) -> str:
    name = ShardName.parse(shard)
    assert name is not None
    return name.index_file


def rows_of(count: int) -> list[dict[str, Any]]:
    return [
        {
            "participant_id": f"sub-{i:04d}",
            "path": name_of(i),
            "label": i,
            "age": 20 + i,
            "mask": f"mask-{i}.nii",
            "other_mask": f"other-{i}.nii",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and masks of two more rows than the manifest has."""
    folder = tmp_path_factory.mktemp("cohort")
    for i in range(COUNT + 2):
        write_image(folder / name_of(i), brain(SHAPE, seed=i))
        for number, name in enumerate(("mask", "other")):
            write_image(folder / f"{name}-{i}.nii", np.full(SHAPE, 1 + number, np.uint8))
            os.utime(folder / f"{name}-{i}.nii", (1, 1))
    write_manifest(folder / "manifest.tsv", rows_of(COUNT))
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    return folder / "manifest.tsv"


def killed_at(manifest: Path, tmp: Path, share: float, **options: Any) -> Path:
    operations = build_apart(manifest, tmp / "undisturbed", **SMALL, **options).operations
    killed = build_apart(manifest, tmp / "killed", round(share * operations), **SMALL, **options)
    assert killed.was_killed
    return tmp / "killed"


@pytest.fixture(scope="module")
def bases(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs in several states, which no test changes."""
    tmp = tmp_path_factory.mktemp("bases")
    early, late = (killed_at(manifest, tmp / str(share), share) for share in (0.5, 0.9))
    # A rebuild of the finished dataset, with more rows, that was killed.
    more = write_manifest(manifest.parent / "more.tsv", rows_of(COUNT + 2))
    whole, rebuilt = (
        shutil.copytree(tmp / "0.5" / "undisturbed", tmp / name) for name in ("whole", "rebuilt")
    )
    operations = build_apart(more, whole, **SMALL).operations
    assert build_apart(more, rebuilt, operations // 2, **SMALL).was_killed
    return {"early": early, "late": late, "finished": tmp / "0.5" / "undisturbed", "rebuilt": rebuilt}


@pytest.fixture
def output(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A build that was killed halfway."""
    return Path(shutil.copytree(bases["early"], tmp_path / "out"))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale": "none"}, "--rescale was minmax, now none"),
        ({"clip": True, "rescale": "window:0,9"}, "--clip was not given, now given"),
        ({"shape": (4, 4, 4)}, "--shape was not given, now 4,4,4"),
        ({"columns": {"label": "age"}}, "--label-column was label, now age"),
        ({"columns": {"id": "path"}}, "--id-column was not given, now path"),
        ({"spacing": (1.0, 1.0, 1.00000001)}, "--spacing was not given, now 1,1,1.00000001"),
    ],
)
def test_other_options_are_refused(
    manifest: Path, output: Path, changes: dict[str, Any], message: str
) -> None:
    before = snapshot(output)
    with pytest.raises(OutputError) as raised:
        build(manifest, output, **SMALL, **changes)
    assert message in str(raised.value)
    assert "finished examples (" in str(raised.value)
    assert "would be lost; to continue that build, use its options" in str(raised.value)
    assert "--overwrite to discard it" in str(raised.value)
    assert snapshot(output) == before
    build(manifest, output, **SMALL, overwrite=True, **changes)
    build(manifest, output.parent / "fresh", **SMALL, **changes)
    assert_complete(output, output.parent / "fresh")


@pytest.mark.parametrize(
    ("flags", "differences"),
    [
        (["--rescale=none"], ["--rescale was minmax, now none"]),
        (["--mask-column=mask"], ["--mask-column was not given, now mask"]),
        (["--split=a=0.5,b=0.5"], ["--split was not given, now a=0.5,b=0.5"]),
        (
            ["--shape=9,9,9", "--examples-per-shard=3"],
            ["--shape was not given, now 9,9,9", "--examples-per-shard was 4, now 3"],
        ),
    ],
)
def test_only_options_that_were_given_are_named(
    manifest: Path, output: Path, flags: list[str], differences: list[str], run: Callable[..., str]
) -> None:
    said = run("build", manifest, output, "--dry-run", *flags, code=2)
    assert re.findall(r"^  (--.*)$", said, re.M) == differences


def test_the_command_line_refuses_with_code_2(manifest: Path, output: Path, run: Callable[..., str]) -> None:
    said = run("build", manifest, output, "--examples-per-shard", 4, "--rescale", "zscore", code=2)
    assert "--rescale was minmax, now zscore" in said
    said = run("build", manifest, output, "--rescale", "zscore", "--dry-run", code=2)
    assert "would be lost" in said


def test_a_dry_run_prints_what_is_kept_rebuilt_and_deleted(
    folder: Path, manifest: Path, output: Path, bases: dict[str, Path], run: Callable[..., str]
) -> None:
    flags = ["--examples-per-shard", 4, "--dry-run"]
    before = snapshot(output)
    said = run("build", manifest, output, *flags)
    kept, rebuilt = map(int, re.findall(r"^(?:keep|build) +(\d+) example", said, re.M))
    assert kept + rebuilt == COUNT
    assert f"keep     {kept} examples from an unfinished build\n" in said
    assert snapshot(output) == before
    more = write_manifest(folder / "more.tsv", rows_of(COUNT + 2))
    said = run("build", more, bases["finished"], *flags)
    assert (
        "keep     10 examples from the dataset\nbuild    2 examples\ndelete   1 shard of revision 1 (" in said
    )
    said = run("build", manifest, bases["finished"], *flags, "--overwrite")
    assert "build    10 examples\ndelete   3 shards of revision 1 (" in said


@pytest.mark.parametrize("linked", ["part", "index", "folder"])
def test_a_part_is_not_read_through_a_link(manifest: Path, output: Path, tmp_path: Path, linked: str) -> None:
    """A dataset from somebody else may hold an unfinished build, whose parts a build takes as they are."""
    part = next(output.glob(".build/*/*/*.parquet")).with_suffix(".part")
    path = {"part": part, "index": part.with_suffix(".parquet"), "folder": part.parent}[linked]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match=f"{path.name}: is a symbolic link, which a build does not follow"):
        build(manifest, output, **SMALL)
    assert path.is_symlink()
    path.unlink()
    (tmp_path / "elsewhere").rename(path)
    build(manifest, output, **SMALL)


@pytest.mark.parametrize("damage", ["data", "facts"])
@pytest.mark.parametrize("base", ["early", "late"])
def test_what_is_not_as_it_was_written_is_made_again(
    manifest: Path, bases: dict[str, Path], tmp_path: Path, base: str, damage: str
) -> None:
    """As after a loss of power, which can leave other bytes in a file that nobody has forced to disk."""
    output = Path(shutil.copytree(bases[base], tmp_path / "out"))
    parts = [(path, path.with_suffix(".parquet")) for path in output.glob(".build/*/*/*.part")]
    shards = [(path, output / index_name(path.name)) for path in output.glob("*.tfrecord.gz")]
    finished = [(path, index) for path, index in (*parts, *shards) if index.exists()]
    assert finished
    for path, index in finished:
        if damage == "data":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        else:
            table, facts = read_index(str(index))
            (name,) = {"sha256", "crc32"} & facts.keys()
            write_index(str(index), table, facts | {name: facts[name][::-1]})
    build(manifest, output, **SMALL)
    assert_complete(output, bases["finished"])


def test_rows_that_would_lose_finished_records_are_refused(manifest: Path, output: Path) -> None:
    before = snapshot(output)
    rows = rows_of(COUNT)
    for changed, message in (
        (rows[1:], r"row 1 \(sub-0000\) was dropped"),
        ([rows[0] | {"label": 7}, *rows[1:]], r"row 1 \(sub-0000\): label was 0, now 7\n"),
        ([row | {"site": "A"} for row in rows], "columns were .*now .*site"),
        (
            [row | {"age": 1} for row in rows],
            r"row 1 \(sub-0000\): age was '20', now '1'; \d+ more rows changed\n",
        ),
    ):
        other = write_manifest(manifest.parent / "changed.tsv", changed)
        with pytest.raises(OutputError, match=message):
            build(other, output, **SMALL)
        assert snapshot(output) == before


def finished_in(said: str) -> str:
    """What a message says of finished examples: how many, and their bytes."""
    (work,) = re.findall(r"\d+ finished examples? \([^)]*\)", said)
    return str(work)


def test_all_is_counted_that_overwrite_discards(
    folder: Path, output: Path, bases: dict[str, Path], run: Callable[..., str]
) -> None:
    """Also records that the changed rows would not make others of."""
    rows = rows_of(COUNT)
    other = write_manifest(folder / "other.tsv", [rows[0] | {"age": 7}, *rows[1:]])
    refused = run("build", other, output, "--examples-per-shard=4", code=2)
    work = finished_in(refused)
    assert f"{work} would be lost; " in refused
    flags = ["--examples-per-shard=4", "--overwrite"]
    said = run("build", other, output, *flags, "--dry-run")
    assert f"{work} of an unfinished build would be discarded" in said
    assert f"{work} of an unfinished build are discarded" in run("build", other, output, *flags)


def test_what_continues_a_killed_replacement_is_told(
    manifest: Path, bases: dict[str, Path], tmp_path: Path, run: Callable[..., str]
) -> None:
    output, other = (Path(shutil.copytree(bases["finished"], tmp_path / name)) for name in ("out", "other"))
    options = SMALL | {"rescale": "none", "overwrite": True}
    operations = build_apart(manifest, other, **options).operations
    assert build_apart(manifest, output, operations // 2, **options).was_killed
    before = snapshot(output)
    build_it: Any = functools.partial(run, "build", manifest, output, "--examples-per-shard=4", "--dry-run")
    said = build_it(code=2)
    work = finished_in(said)
    assert "--rescale was none, now minmax" in said
    assert "to continue that build, use its options, its rows and --overwrite; otherwise" in said
    said = build_it("--rescale=none", code=2)
    assert f"use --overwrite to replace it, which continues an unfinished build of {work}" in said
    said = build_it("--rescale=zscore", code=2)
    assert f"use --overwrite to replace it; that also discards {work} of an unfinished build" in said
    said = build_it("--rescale=zscore", "--overwrite")
    assert f"{work} of an unfinished build would be discarded" in said
    said = build_it("--rescale=none", "--overwrite")
    assert f"keep     {work.partition(' ')[0]} example" in said
    assert snapshot(output) == before
    build(manifest, output, **options)
    assert_complete(output, other)


# Rows that were changed


def differences(manifest: Path, output: Path, rows: list[dict[str, Any]], **changes: Any) -> list[str]:
    """What a build of other rows is told."""
    changed = write_manifest(manifest.parent / "changed.tsv", rows)
    with pytest.raises(OutputError) as raised:
        build(changed, output, **SMALL, **changes)
    return [line.strip() for line in str(raised.value).splitlines() if line.startswith("  ")]


def test_rows_that_came_or_went_are_named(manifest: Path, bases: dict[str, Path]) -> None:
    rows, told = rows_of(COUNT + 2), functools.partial(differences, manifest, bases["finished"])
    whole, new = rows[:COUNT], [row | {"mask": "", "other_mask": ""} for row in rows[COUNT:]]
    assert told([*whole[:7], new[0], *whole[7:]]) == ["row 8 (sub-0010) was inserted"]
    assert told([*new, *whole]) == ["rows 1, 2 were inserted"]
    assert told([*whole[:3], *whole[4:]]) == ["row 4 (sub-0003) was dropped"]
    assert told([*whole[:3], *whole[5:], *new]) == ["rows 4, 5 were dropped"]
    assert told([*whole[:7], whole[8], whole[7], whole[9]]) == ["row 8 (sub-0007) is now row 9"]
    assert told(whole[:-1]) == ["row 10 (sub-0009) was dropped"]


def test_a_row_that_failed_and_was_dropped_is_told(folder: Path, tmp_path: Path) -> None:
    """The rows after it move up."""
    output, rows = tmp_path / "out", rows_of(COUNT)
    failed = [rows[4] | {"path": "no.nii"}, rows[5] | {"path": "none.nii"}]
    wrong = write_manifest(folder / "wrong.tsv", [*rows[:4], *failed, *rows[6:]])
    with pytest.raises(TooManyFailures):
        build(wrong, output, **SMALL)
    assert differences(wrong, output, [*rows[:5], *rows[6:]]) == ["1 of rows 5, 6 was dropped"]
    assert differences(wrong, output, [*rows[:4], *rows[6:]]) == ["rows 5, 6 were dropped"]
    shutil.rmtree(output)
    wrong = write_manifest(folder / "wrong.tsv", [*rows[:4], failed[0], *rows[5:]])
    with pytest.raises(TooManyFailures):
        build(wrong, output, **SMALL)
    assert differences(wrong, output, [*rows[:4], *rows[5:]]) == ["row 5 was dropped"]
    assert build(wrong, output, **SMALL, max_bad_fraction=0.1).read == {"no.nii"}
    changed = "row 5 (sub-0004): path was 'no.nii', now 'sub-0004.nii.gz'"
    assert differences(wrong, output, rows) == [changed]
    (output / "failures.jsonl").unlink()
    assert differences(wrong, output, rows) == ["row 5, which had no record, was changed"]


def test_cells_that_were_changed_are_named(folder: Path, tmp_path: Path) -> None:
    """Labels by the names of their classes; columns, but no cells with names, where ids are anonymous."""
    rows = [row | {"sex": "FM"[i % 2], "split": "ab"[i % 2]} for i, row in enumerate(rows_of(4))]
    for row in rows:
        del row["other_mask"]
    manifest, output = write_manifest(folder / "sex.tsv", rows), tmp_path / "out"
    columns = Columns(label="sex", mask="mask")
    build(manifest, output, **SMALL, columns=columns)
    told = functools.partial(differences, manifest, columns=columns)
    changed = [rows[0], rows[1] | {"sex": "F", "mask": "other-1.nii"}, rows[2], rows[3] | {"age": ""}]
    assert told(output, changed) == [
        "row 2 (sub-0001): mask was 'mask-1.nii', now 'other-1.nii', sex was 'M', now 'F'; 1 more row changed"
    ]
    assert told(output, [*rows[:3], rows[3] | {"participant_id": "x", "split": "a"}]) == [
        "row 4 (sub-0003): participant_id was 'sub-0003', now 'x', split was 'b', now 'a'"
    ]
    (tmp_path / "key").write_text("0123456789abcdef" * 2)
    key, hidden = {"anonymous_ids": str(tmp_path / "key")}, tmp_path / "hidden"
    build(manifest, hidden, **SMALL, columns=columns, **key)
    renamed = [*rows[:3], rows[3] | {"participant_id": "Anna", "age": 7}]
    assert told(hidden, renamed, **key) == ["row 4: participant_id was changed, age was '23', now '7'"]
    assert told(hidden, rows[1:], **key) == ["row 1 was dropped"]


def test_rows_without_finished_records_may_change(folder: Path, tmp_path: Path) -> None:
    """As after a failure: a path is corrected, or the failed row is dropped at the end."""
    output, rows = tmp_path / "out", rows_of(COUNT)
    wrong = write_manifest(folder / "wrong.tsv", [*rows[:-1], rows[-1] | {"path": "no.nii"}])
    with pytest.raises(TooManyFailures):
        build(wrong, output, **SMALL)
    for changed in (rows, rows[:-1]):
        copy = Path(shutil.copytree(output, tmp_path / f"copy-{len(changed)}"))
        corrected = write_manifest(folder / "corrected.tsv", changed)
        assert build(corrected, copy, **SMALL).read <= {name_of(COUNT - 1)}


def test_a_build_that_has_finished_nothing_stands_in_no_ones_way(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open_build(make_config(manifest, output)):
        pass
    build(manifest, output, **SMALL, rescale="none")
    build(manifest, tmp_path / "fresh", **SMALL, rescale="none")
    assert_complete(output, tmp_path / "fresh")


def test_another_mask_column_is_refused(manifest: Path, tmp_path: Path) -> None:
    """Both masks have one size and time, so that only the option tells them apart."""
    masked = {"columns": {"mask": "mask"}}
    output = killed_at(manifest, tmp_path, 0.5, **masked)
    with pytest.raises(OutputError, match="--mask-column was mask, now other_mask"):
        build(manifest, output, **SMALL, columns={"mask": "other_mask"})
    build(manifest, output, **SMALL, **masked)
    assert_complete(output, tmp_path / "undisturbed")


def test_records_that_mixed_shapes_exclude_are_not_taken(tmp_path: Path) -> None:
    """Colour volumes have a fourth axis, which a dataset of mixed shapes cannot have."""
    colour = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    rows = []
    for i in range(3):
        voxels = np.zeros(SHAPE, colour)
        voxels["R"] = brain(SHAPE, seed=i) % 200
        write_image(tmp_path / f"{i}.nii", voxels)
        rows.append({"path": f"{i}.nii"})
    manifest = write_manifest(tmp_path / "m.tsv", [*rows, {"path": "none.nii"}])
    output = tmp_path / "out"
    with pytest.raises(TooManyFailures, match="1 of 4"):
        build(manifest, output)
    with pytest.raises(OutputError, match="--allow-mixed-shapes was not given, now given"):
        build(manifest, output, allow_mixed_shapes=True)


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b'{"note_version": 99}', b'{"note_version": 2, "info": 3}']
)
def test_a_note_that_cannot_be_read_is_refused(manifest: Path, output: Path, damage: bytes) -> None:
    (output / ".build" / "plan.json").write_bytes(damage)
    before = snapshot(output)
    with pytest.raises(OutputError, match=r"plan\.json: the plan .*another version of beam-nifti"):
        build(manifest, output, **SMALL)
    assert snapshot(output) == before


def test_overwrite_discards_what_has_no_readable_note(
    manifest: Path, output: Path, bases: dict[str, Path]
) -> None:
    (output / ".build" / "plan.json").write_bytes(b"")
    build(manifest, output, **SMALL, overwrite=True)
    assert_complete(output, bases["finished"])


def test_parts_without_a_note_are_refused_beside_a_dataset_too(
    manifest: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(bases["rebuilt"], tmp_path / "out"))
    (output / ".build" / "plan.json").unlink()
    before = snapshot(output)
    with pytest.raises(OutputError, match=r"holds a folder \.build"):
        build(manifest, output, **SMALL)
    assert snapshot(output) == before


# What is continued


def test_other_shards_keep_every_finished_record(
    manifest: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"examples_per_shard": 3}
    build(manifest, tmp_path / "fresh", unit_rows=2, **changes)
    for base in ("early", "late"):
        output = Path(shutil.copytree(bases[base], tmp_path / base))
        done = reuse_of(make_config(manifest, output, **SMALL_SHARDS)).num_unfinished
        assert done >= 4
        assert reuse_of(make_config(manifest, output, **changes)).num_unfinished == done
        built = build(manifest, output, unit_rows=2, **changes)
        assert built.counters["volumes-skipped"] == done
        assert_complete(output, tmp_path / "fresh")


def reuse_of(config: Any) -> Reuse:
    reuse = plan_build(config)[1].reuse
    assert reuse is not None
    return reuse


def test_parts_are_found_where_an_earlier_temporary_location_was(
    manifest: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    output = killed_at(manifest, tmp_path, 0.3, temp_location=one)
    done = reuse_of(make_config(manifest, output, examples_per_shard=4, temp_location=one)).num_unfinished
    assert done
    with open_build(make_config(manifest, output, examples_per_shard=4, temp_location=other)):
        pass  # killed again
    built = build(manifest, output, **SMALL)
    assert built.counters["volumes-skipped"] == done
    assert_complete(output, bases["finished"])
    assert [p for place in (one, other) for p in Path(place).rglob("*") if p.is_file()] == []


# Killed after publishing


@pytest.fixture
def dies_before_cleaning_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next build ends when dataset_info.json is written."""

    def die(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("beam_nifti.pipeline.build.clean_up", die)
    return


@pytest.mark.usefixtures("dies_before_cleaning_up")
@pytest.mark.parametrize(
    ("base", "options"), [(None, {}), ("finished", {}), ("finished", {"overwrite": True, "rescale": "none"})]
)
def test_what_was_published_is_only_cleaned_up_after(
    folder: Path, bases: dict[str, Path], tmp_path: Path, base: str | None, options: dict[str, Any]
) -> None:
    output, more = tmp_path / "out", write_manifest(folder / "more.tsv", rows_of(COUNT + 2))
    if base:
        shutil.copytree(bases[base], output)
    with pytest.raises(KeyboardInterrupt):
        build(more, output, **SMALL, **options)
    info, published = read_info(str(output)), contents(output)
    reuse = reuse_of(make_config(more, output, examples_per_shard=4, **options))
    assert (reuse.num_published, reuse.num_rebuilt, reuse.replaced) == (COUNT + 2, 0, ())
    assert build(more, output, **SMALL, **options).read == set()
    assert read_info(str(output)) == info
    assert contents(output) == published
    build(more, tmp_path / "fresh", **SMALL, **{k: v for k, v in options.items() if k != "overwrite"})
    assert_complete(output, tmp_path / "fresh")


# Random changes


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"examples_per_shard": 3},
    {"num_shards": 2},
    {"allow_mixed_shapes": True},
    {"max_bad_fraction": 0.5},
    {"shuffle_seed": 1},
    {"rescale": "none"},
    {"compression_level": 1},
    {"columns": {"mask": "mask"}},
    {"columns": {"label": "age"}},
    {"overwrite": True},
)
ROWS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "same": lambda rows: rows[:COUNT],
    "appended": lambda rows: rows,
    "shorter": lambda rows: rows[: COUNT - 2],
    "dropped": lambda rows: [*rows[:6], *rows[7:COUNT]],
    "labelled": lambda rows: [*rows[:8], rows[8] | {"label": 99}, rows[9]],
    "exchanged": lambda rows: [*rows[:8], rows[9], rows[8]],
}


@settings(max_examples=14, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from(["early", "late", "finished", "rebuilt"]),
    options=st.sampled_from(OPTIONS),
    rows=st.sampled_from(sorted(ROWS)),
    replaced=st.sampled_from([None, 1, 7]),
)
def test_any_change_gives_the_bytes_of_a_fresh_build_or_is_refused(
    folder: Path,
    bases: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    base: str,
    options: dict[str, Any],
    rows: str,
    replaced: int | None,
) -> None:
    """And the preview of the build counts what the build then does."""
    tmp = tmp_path_factory.mktemp("change")
    output = Path(shutil.copytree(bases[base], tmp / "out"))
    manifest = write_manifest(folder / "random.tsv", ROWS[rows](rows_of(COUNT + 2)))
    options = SMALL | options
    if "num_shards" in options:
        options.pop("examples_per_shard")
    config = make_config(manifest, output, **{k: v for k, v in options.items() if k != "unit_rows"})
    with replaced_image(folder, replaced):
        before = snapshot(output)
        published = read_info(str(output)) if (output / "dataset_info.json").exists() else None
        try:
            plan, estimate = plan_build(config)
            built = build(manifest, output, **options)
        except OutputError:
            assert snapshot(output) == before
            return
        kept = built.counters.get("volumes-skipped", 0)
        reuse = estimate.reuse or Reuse(0, 0, plan.num_examples)
        assert (reuse.num_published + reuse.num_unfinished, reuse.num_rebuilt) == (
            kept,
            plan.num_examples - kept,
        )
        gone = {s for s in (published.shards if published else ()) if not (output / s.name).exists()}
        assert set(reuse.replaced) == gone
        options.pop("overwrite", None)
        build(manifest, tmp / "fresh", **options)
        assert_complete(output, tmp / "fresh")


@contextlib.contextmanager
def replaced_image(folder: Path, number: int | None) -> Iterator[None]:
    """Replace an image while the block runs."""
    if number is None:
        yield
        return
    path = folder / name_of(number)
    data, times = path.read_bytes(), path.stat()
    write_image(path, brain(SHAPE, seed=1000))
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
