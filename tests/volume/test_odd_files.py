"""Inputs that are no plain files, and files that change while they are read."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.errors import VolumeError
from beam_nifti.storage import paths as storage
from beam_nifti.volume.files import open_image, reading
from beam_nifti.volume.formats import parse_header
from tests.images import write_cohort, write_image, write_manifest


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}
"""What nobody may read to its end, by its name in messages."""


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_file_is_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    KINDS[kind](Path("a"))
    for action in (
        storage.open_read,
        storage.open_with_stat,
        storage.read,
        lambda p: storage.read_head(p, 1),
    ):
        with pytest.raises(OSError, match=f"is a {kind}, not a file"):
            action("a")
    with pytest.raises(IsADirectoryError):
        storage.read(str(tmp_path))


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_an_image_or_a_mask_that_is_no_file_is_a_failure_of_its_row(
    tmp_path: Path, run: Callable[..., str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        write_image(tmp_path / f"{name}.nii", np.ones((2, 2, 2), np.uint8))
    KINDS[kind](Path("odd.nii"))
    rows = [{"path": "a.nii", "mask": "b.nii"}, {"path": "odd.nii", "mask": "b.nii"}]
    rows.append({"path": "c.nii", "mask": "odd.nii"})
    manifest = write_manifest(tmp_path / "m.csv", rows)
    assert "odd.nii" in run("check", manifest, "--mask-column=mask", code=cli.FAILED)
    run("build", manifest, tmp_path / "out", "--mask-column=mask", "--rescale=none", "--max-bad-fraction=0.7")
    (listed,) = (tmp_path / "out").glob("failures*.jsonl")
    failures = listed.read_text().splitlines()
    assert [f"is a {kind}, not a file" in line for line in failures] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_or_a_key_that_is_no_file_is_refused(
    tmp_path: Path, run: Callable[..., str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[kind](Path("odd.tsv"))
    assert f"is a {kind}, not a file" in run("build", "odd.tsv", "out", code=cli.USAGE)
    cohort = write_cohort(tmp_path / "cohort", 2)
    said = run("build", cohort, "out", "--anonymous-ids=odd.tsv", code=cli.USAGE)
    assert f"is a {kind}, not a file" in said


def read_while(path: Path, change: Callable[[], object]) -> list[int]:
    """The voxels of an image, which is changed between its opening and its reading."""
    with open_image("a.nii", str(path), lambda head: parse_header("a.nii", head)) as image:
        change()
        return np.frombuffer(image.read_all(), np.int16).tolist()


@pytest.mark.parametrize("name", ["a.nii", "a.hdr", "a.img"])
def test_an_image_that_is_written_to_while_it_is_read_is_no_volume(tmp_path: Path, name: str) -> None:
    path, changed = tmp_path / name.replace("hdr", "img"), tmp_path / name
    kind = nib.Nifti1Image if name.endswith("nii") else nib.Nifti1Pair
    nib.save(kind(np.zeros((2, 2, 2), np.int16), np.eye(4)), path)

    def write() -> None:
        with changed.open("r+b") as file:
            file.write(changed.read_bytes())
        os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1_000_000))  # clocks of files are coarse

    with pytest.raises(VolumeError, match=r"a\.nii: changed while it was read"):
        read_while(path, write)


def test_a_torn_file_is_called_so_and_not_damaged(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match="changed while it was read"):
        read_while(path, lambda: os.truncate(path, 400))


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", np.full((2, 2, 2), 7, np.int16))
    other = write_image(tmp_path / "b.nii", np.zeros((2, 2, 2), np.int16))
    assert read_while(path, lambda: other.replace(path)) == [7] * 8


def test_a_disk_that_fails_names_the_image() -> None:
    """The system names no file where reading an open one fails."""
    with pytest.raises(OSError, match=r"a\.nii") as failed, reading("a.nii"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert failed.value.errno == errno.EIO
