"""`beam-nifti check`: what headers tell of a cohort before anything is built."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.support.wording import bytes_text
from tests.build_helpers import build
from tests.images import brain, nifti_bytes, write_cohort, write_image, write_manifest

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command: `check(manifest, *flags)` -> exit code, report."""

    def run(manifest: Path, *flags: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["check", str(manifest), "--json", "--quiet", *flags])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six images of one kind; then one of each other kind."""
    folder = write_cohort(tmp_path, 6, shape=(6, 5, 4)).parent
    rows = [{"participant_id": f"sub-{i:04d}", "path": f"sub-{i:04d}.nii.gz"} for i in range(6)]
    turned = np.diag([2.0, 2.0, 2.5, 1.0])
    write_image(folder / "larger.nii", brain((9, 5, 4), seed=7))
    write_image(folder / "turned.nii", brain(seed=8), affine=turned)
    write_image(folder / "wider.nii", brain(seed=9).astype(np.float32), affine=turned * [3, 3, 3, 1])
    write_image(folder / "frames.nii.gz", brain((6, 5, 4, 3)))
    shutil.copy(folder / "sub-0002.nii.gz", folder / "copy.nii.gz")
    (folder / "junk.nii.gz").write_bytes(gzip.compress(b"junk" * 300))
    for name in (
        "larger.nii",
        "turned.nii",
        "wider.nii",
        "frames.nii.gz",
        "copy.nii.gz",
        "junk.nii.gz",
        "no.nii",
    ):
        rows.append({"participant_id": name.partition(".")[0], "path": name})
    return write_manifest(folder / "mixed.tsv", rows)


def test_what_there_is_is_counted(mixed: Path, check: Check) -> None:
    code, report = check(mixed)
    assert code == 1
    assert report["num_images"] == 13
    assert report["shapes"] == {"6×5×4": 9, "9×5×4": 1, "6×5×4×3": 1}
    assert report["spacings"] == {"2×2×2.5": 10, "6×6×7.5": 1}
    assert report["orientations"] == {"LAS": 9, "RAS": 2}
    assert report["dtypes"] == {"int16": 10, "float32": 1}
    assert report["records"] == {"6×5×4": 9, "9×5×4": 1}
    assert report["source_bytes"] == sum(p.stat().st_size for p in mixed.parent.glob("*.nii*")) - (
        (mixed.parent / "junk.nii.gz").stat().st_size
    )


def test_a_report_is_replaced_and_no_dataset_is_sought_in_its_place(
    tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_cohort(tmp_path / "cohort", 2)
    (tmp_path / "index").touch()  # in OUTPUT it would be in the way
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, report = check(manifest, "--out=report.json")
        assert code == 0
        assert json.loads(Path("report.json").read_text()) == report


def test_what_would_be_left_out_is_named(mixed: Path, check: Check) -> None:
    _, report = check(mixed)
    assert report["num_bad"] == 4
    assert report["num_examples"] == 9
    assert [(p["row"], p["example_id"]) for p in report["problems"]] == [
        (7, "larger"),
        (10, "frames"),
        (12, "junk"),
        (13, "no"),
    ]
    messages = [p["message"] for p in report["problems"]]
    assert "shape (9, 5, 4), but the first image has (6, 5, 4)" in messages[0]
    assert "choose frames with --frames all" in messages[1]
    assert "a text file; copy or download" in messages[2]
    assert "No such file" in messages[3]


def test_an_example_with_a_broken_file_is_in_no_table(
    tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of its files it is, and however it is broken."""
    write_image(tmp_path / "a.nii", brain((6, 5, 4)))
    write_image(tmp_path / "b.nii", brain((9, 5, 4)))
    for name, shape in (("mask", (6, 5, 4)), ("b-mask", (9, 5, 4)), ("small", (6, 5, 3)), ("cut", (6, 5, 4))):
        write_image(tmp_path / f"{name}.nii", np.ones(shape, np.uint8))
    cut = tmp_path / "cut.nii"
    cut.write_bytes(cut.read_bytes()[:-9])
    masks = ["mask.nii", "cut.nii", "no.nii", "small.nii"]
    rows = [{"image_id": mask, "path": "a.nii", "mask": mask} for mask in masks]
    rows.append({"image_id": "larger", "path": "b.nii", "mask": "b-mask.nii"})
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    code, report = check(manifest, "--mask-column=mask", "--id-column=image_id")
    assert (code, report["num_images"], report["num_examples"]) == (1, 5, 1)
    assert [p["example_id"] for p in report["problems"]] == [*masks[1:], "larger"]
    # --shape makes the larger one.
    assert report["shapes"] == report["records"] == {"6×5×4": 1, "9×5×4": 1}
    for name in ("spacings", "orientations", "dtypes"):
        assert sum(report[name].values()) == 2
    assert report["twins"] == []
    cli.main(["check", str(manifest), "--quiet", "--mask-column=mask", "--id-column=image_id"])
    assert "shapes        6×5×4: 1\n              9×5×4: 1\n" in capsys.readouterr().out


def test_splits_add_up_to_what_would_be_made(mixed: Path, check: Check) -> None:
    """An image that would fail is in none."""
    rows = [line.split("\t") for line in mixed.read_text().splitlines()]
    splits = ["split", *("test" if row[0] in ("junk", "no", "copy") else "train" for row in rows[1:])]
    mixed.write_text("\n".join("\t".join([*row, name]) for row, name in zip(rows, splits, strict=True)))
    _, report = check(mixed)
    assert report["num_examples"] == 9
    assert report["splits"] == {"test": 1, "train": 8}


def test_copies_are_suspected(mixed: Path, check: Check) -> None:
    assert check(mixed)[1]["twins"] == [["copy", "sub-0002"]]


def test_copies_in_two_splits_are_warned_of(
    tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 0), ("b", 1), ("copy-of-a", 0)):
        write_image(tmp_path / f"{name}.nii", brain(seed=seed))
    (tmp_path / "link-to-b.nii").symlink_to("b.nii")
    rows = [
        {"participant_id": name, "path": f"{name}.nii", "split": split}
        for name, split in (("a", "train"), ("b", "train"), ("copy-of-a", "test"), ("link-to-b", "train"))
    ]
    manifest = write_manifest(tmp_path / "m.csv", rows)
    code, report = check(manifest)
    assert report["twins_across_splits"] == [{"a": "train", "copy-of-a": "test"}]
    assert report["twins"] == [["a", "copy-of-a"], ["b", "link-to-b"]]
    assert cli.main(["check", str(manifest), "--quiet"]) == code == cli.SUCCESS
    said = capsys.readouterr()
    assert "in several splits, such as a (train) and copy-of-a (test)" in said.err
    assert "in two splits a (train) = copy-of-a (test)" in said.out


def test_the_suggested_flags_make_the_cohort_alike(mixed: Path, tmp_path: Path, check: Check) -> None:
    _, report = check(mixed)
    flags = " ".join(report["suggested_flags"]).split()
    assert flags == [
        "--frames",
        "first",
        "--orientation",
        "LAS",
        "--spacing",
        "2,2,2.5",
        "--shape",
        "18,15,12",
    ]
    rows = mixed.read_text().splitlines()
    sound = mixed.with_name("sound.tsv")
    sound.write_text("\n".join(r for r in rows if r.split("\t")[0] not in ("junk", "no")) + "\n")
    code, report = check(sound, *flags)
    assert (code, report["suggested_flags"], report["records"]) == (0, [], {"18×15×12": 11})
    assert cli.main(["build", str(sound), str(tmp_path / "out"), "--quiet", *flags]) == 0


def test_frames_are_channels_only_where_all_have_as_many(tmp_path: Path, check: Check) -> None:
    for name, shape in (("a", (6, 5, 4, 3)), ("b", (6, 5, 4, 3)), ("c", (6, 5, 4))):
        write_image(tmp_path / f"{name}.nii", brain(shape))
    alike, mixed = [{"path": "a.nii"}, {"path": "b.nii"}], [{"path": "a.nii"}, {"path": "c.nii"}]
    manifest = write_manifest(tmp_path / "alike.tsv", alike)
    assert check(manifest)[1]["suggested_flags"] == ["--frames all"]
    assert check(manifest, "--frames=all")[1]["suggested_flags"] == []
    manifest = write_manifest(tmp_path / "mixed.tsv", mixed)
    assert check(manifest, "--frames=all")[1]["suggested_flags"] == ["--frames first"]
    assert check(manifest, "--frames=first")[1]["suggested_flags"] == []


def test_the_estimate_is_that_of_a_build(tmp_path: Path, check: Check) -> None:
    manifest = write_cohort(tmp_path, 5, shape=(32, 32, 20))
    code, report = check(manifest)
    assert code == 0
    build(manifest, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tfrecord.gz"))
    assert report["num_examples"] == 5
    assert 0.5 < report["record_bytes"] / size < 2
    assert report["worker_bytes"] == round(0.3e9 + 2 * 4 * 32 * 32 * 20)


def test_only_the_first_kilobytes_are_read(tmp_path: Path, check: Check) -> None:
    """A file that is cut behind its first block is found by the build, not by the check."""
    data = gzip.compress(
        nifti_bytes(np.random.default_rng(0).integers(0, 9999, (64, 64, 30)).astype(np.int16))
    )
    (tmp_path / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    manifest = write_manifest(tmp_path / "m.tsv", [{"participant_id": "a", "path": "cut.nii.gz"}])
    assert check(manifest)[0] == 0


def test_shapes_that_differ_are_no_failure_where_they_may(
    tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.nii", brain((6, 5, 4)))
    write_image(tmp_path / "b.nii", brain((6, 5, 5)))
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii"}, {"path": "b.nii"}])
    assert check(manifest)[0] == 1
    assert cli.main(["check", str(manifest), "--quiet"]) == 1
    assert "would fail    row 2 (b.nii): shape (6, 5, 5)" in capsys.readouterr().out
    assert check(manifest, "--allow-mixed-shapes")[0] == 0
    capsys.readouterr()
    build = ["build", str(manifest), str(tmp_path / "out"), "--allow-mixed-shapes", "--dry-run"]
    assert cli.main(build) == 0
    assert "volumes  2, the first of 6×5×4 voxels (train 2)" in capsys.readouterr().out


def test_the_table_and_the_file_say_the_same(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(mixed), "--quiet", f"--out={tmp_path}/report.json"]) == 1
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert f"images        13 in {bytes_text(report['source_bytes'])}" in table
    assert all(f"{kind}: {count}" in table for kind, count in report["shapes"].items())
    assert "would fail    row 7 (larger): larger.nii: " in table
    assert "duplicates?   copy = sub-0002" in table
    assert table.rstrip().endswith("suggestion    use " + " ".join(report["suggested_flags"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--runner=PortableRunner", "--job_endpoint=h:1", "--environment_type=LOOPBACK"],
            "--out is missing",
        ),
        (["--rescale=maxmin"], "--rescale is 'maxmin'"),
        (["--shap=1,2,3"], "did you mean --shape"),
    ],
)
def test_wrong_flags_are_refused(
    mixed: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(mixed), *flags]) == 2
    assert message in capsys.readouterr().err
