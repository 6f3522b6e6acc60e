"""What is the fault of a volume is a line of failures.jsonl; everything else stops the build."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.inspection.extract import read_volumes
from beam_nifti.storage.object_store import ATTEMPTS
from beam_nifti.volume import load_volume
from beam_nifti.volume.files import reading
from beam_nifti.volume.user_function import load_function
from tests.datasets import failures_of
from tests.images import brain, row_of, write_image, write_manifest
from tests.services.fault_proxy import FaultProxy
from tests.web_server import Ranges, serve

Run = Callable[..., str]


def make_unreadable(folder: Path) -> dict[str, str]:
    """Paths that nobody can read, by what the error says of each."""
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "file").touch()
    return {
        "folder": "Is a directory",
        "loop": "a symbolic link to a file that is not there",
        "dangling": "a symbolic link to a file that is not there",
        "absent": "No such file or directory",
        "file/below": "Not a directory",
        "long" * 100: "File name too long",
        "nul\0": "not a path: it has a NUL character",
    }


def test_a_path_that_cannot_be_read_is_the_fault_of_its_row(tmp_path: Path) -> None:
    for path, reason in make_unreadable(tmp_path).items():
        with pytest.raises(VolumeError, match=reason):
            load_volume(row_of(path), str(tmp_path))


def test_a_record_that_no_reader_would_accept_is_the_fault_of_its_row(run: Run, tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii")
    rows = [{"path": "a.nii", "participant_id": name, "note": name * (1 << 20)} for name in ("", "b")]
    rows[0] |= {"participant_id": "a"}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--label-column=note:string", "--missing-label=nan", "--max-bad-fraction=0.5"
    run("build", tmp_path / "m.jsonl", tmp_path / "out", *options)
    (failed,) = failures_of(tmp_path / "out")
    assert (failed["stage"], failed["participant_id"]) == ("EncodeExample", "b")
    assert "that readers accept of a record of this shape; shorten its id, labels" in failed["message"]
    run("verify", tmp_path / "out")


def test_an_index_that_no_reader_would_accept_stops_the_build(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "a.nii")
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.nii", "note": "x" * (1 << 23)}) + "\n")
    monkeypatch.setattr("beam_nifti.record.index._FREE_BYTES", 1 << 16)
    told = run("build", tmp_path / "m.jsonl", tmp_path / "out", code=cli.USAGE)
    assert "no reader would accept it: drop or shorten the manifest's largest columns" in told
    assert not (tmp_path / "out/dataset_info.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_the_fault_of_its_row(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii").chmod(0)
    with pytest.raises(VolumeError, match="Permission denied; check the path and its permissions"):
        load_volume(row_of("a.nii"), str(tmp_path))


MACHINE_ERRORS = (
    *(errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET),
)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.EINVAL])
def test_errors_of_paths(number: int) -> None:
    with pytest.raises(VolumeError, match=r"^a\.nii: cannot be read: "), reading("a.nii"):
        raise OSError(number, os.strerror(number), "/data/a.nii")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number), "/data/a.nii") for number in MACHINE_ERRORS),
        OSError("hdfs://lab/a.nii: BeamIOError: no answer"),
        MemoryError(),
        ValueError("ours"),
    ],
)
def test_errors_of_everything_else_are_handed_on(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reading("a.nii"):
        raise error
    assert raised.value is error


# Servers


@pytest.fixture
def server(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Serves the cohort."""
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.001)
    with serve(cohort.parent, Ranges) as proxy:
        yield proxy


def answering(server: FaultProxy, status: str) -> None:
    """Let a server give every request for one image this answer."""
    server.choose = lambda _, path: status if path.endswith("sub-0007.nii.gz") else ""


def test_an_image_that_a_server_refuses_is_left_out(server: FaultProxy, run: Run, tmp_path: Path) -> None:
    reasons = {
        "404": "No such file",
        "403": "access is denied (HTTP 403",
        "400": "HTTP 400",
        "410": "HTTP 410",
    }
    answers = {f"sub-000{number}.nii.gz": status for number, status in enumerate(reasons, 4)}
    server.choose = lambda _, path: answers.get(Path(path).name, "")
    output = tmp_path / "out"
    run("build", f"{server.url}/manifest.tsv", output, "--max-bad-fraction=0.4")
    failures = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert [failure["row"] for failure in failures] == [5, 6, 7, 8]
    for failure, reason in zip(failures, reasons.values(), strict=True):
        assert reason in failure["message"]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("401", "the store does not accept the credentials (HTTP 401"),
        ("503", f"the store failed {ATTEMPTS} times in a row (HTTP 503"),
    ],
)
def test_a_server_that_fails_stops_every_command_and_loses_nothing(
    server: FaultProxy,
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: str,
    reason: str,
) -> None:
    manifest, output = f"{server.url}/manifest.tsv", tmp_path / "out"
    build = ["build", manifest, str(output), "--max-bad-fraction=1", "--quiet"]
    answering(server, status)
    assert cli.main(build) not in (cli.SUCCESS, cli.FAILED)
    told = capsys.readouterr().err
    assert "the build stopped: " in told
    assert reason in told
    assert "sub-0007.nii.gz" in told
    assert "Traceback" not in told
    assert not (output / "dataset_info.json").exists()
    assert not (output / "failures.jsonl").exists()
    assert cli.main(["check", manifest, "--quiet"]) not in (cli.SUCCESS, cli.FAILED)
    assert reason in capsys.readouterr().err
    server.rest()
    assert cli.main(build) == cli.SUCCESS
    answering(server, status)
    code = cli.main(["verify", str(output), "--deep=all", "--manifest", manifest, "--quiet"])
    said = capsys.readouterr()
    assert code not in (cli.SUCCESS, cli.FAILED)
    assert reason in said.err
    assert "failed" not in said.out


# Users' functions

FUNCTION = "tests.user_functions:fail_as_named"


def write_named(folder: Path, *names: str) -> Path:
    rows = [{"path": f"{name}.nii.gz"} for name in names]
    for row in rows:
        write_image(folder / row["path"])
    return write_manifest(folder / "m.tsv", rows)


def test_what_a_function_raises_is_the_fault_of_its_volume(run: Run, tmp_path: Path) -> None:
    manifest, output = write_named(tmp_path, "first", "raise", "unparsable", "absent"), tmp_path / "out"
    run("build", manifest, output, f"--preprocess={FUNCTION}", "--max-bad-fraction=0.75")
    failures = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    kinds = {2: "ValueError", 3: "OSError", 4: "FileNotFoundError"}
    assert [f["row"] for f in failures] == list(kinds)
    assert {(f["stage"], f["error"]) for f in failures} == {("Preprocess", "VolumeError")}
    assert all(f"--preprocess {FUNCTION} failed: {kinds[f['row']]}: " in f["message"] for f in failures)


_EXITED = f"--preprocess {FUNCTION} called sys.exit(); raise an exception instead"


@pytest.mark.parametrize(
    ("name", "is_first", "reason", "code"),
    [
        ("memory", False, "the build stopped: MemoryError: ", cli.TEMPORARY),
        ("full", False, "the build stopped: OSError: [Errno 28] ", cli.TEMPORARY),
        ("full", True, "full.nii.gz: full.nii.gz ", cli.TEMPORARY),
        ("exit", False, f"the build stopped: {_EXITED}; fix this and run the same command", cli.USAGE),
        ("exit", True, _EXITED, cli.USAGE),
    ],
)
def test_a_function_for_which_the_machine_fails_stops_the_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, is_first: bool, reason: str, code: int
) -> None:
    names = [name] if is_first else ["fine", name]  # the first one is looked at by the launcher
    flags = [f"--preprocess={FUNCTION}", "--crop-foreground=nonzero", "--max-bad-fraction=1", "--quiet"]
    argv = ["build", str(write_named(tmp_path, *names)), str(tmp_path / "out"), *flags]
    assert cli.main(argv) == code
    told = capsys.readouterr().err
    assert reason in told
    assert "while running" not in told
    assert not (tmp_path / "out/dataset_info.json").exists()


def test_a_module_that_ends_the_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_that_exits.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UsageError, match=r"module_that_exits calls sys\.exit\(\) when it is imported; put that under"
    ):
        load_function("module_that_exits:f")


def test_frames_do_not_share_what_a_function_changes(run: Run, tmp_path: Path) -> None:
    """All frames of an image have one mask: what a function does to it for one must not reach the next."""
    write_image(tmp_path / "a.nii", brain((6, 5, 4, 3)))
    write_image(tmp_path / "m.nii", (brain() > 600).astype("uint8"))
    manifest = write_manifest(tmp_path / "t.tsv", [{"path": "a.nii", "mask": "m.nii"}])
    flags = ["--frames=each", "--mask-column=mask", "--preprocess=tests.user_functions:change_all_in_place"]
    run("build", manifest, tmp_path / "out", *flags)
    ids = [f"a.nii_frame-{frame:04d}" for frame in range(3)]
    masks = [volume.mask for volume in read_volumes(str(tmp_path / "out"), ids)]
    assert all(np.array_equal(mask, brain() <= 600) for mask in masks)
