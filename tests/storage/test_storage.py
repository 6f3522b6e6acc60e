"""Files on the local disk and in an object store behave alike."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, Sharding
from beam_nifti.errors import TooManyFailures, VolumeError
from beam_nifti.pipeline.lock import LOCK_FILE
from beam_nifti.random_access import Dataset
from beam_nifti.storage import paths as storage
from beam_nifti.storage.paths import join
from beam_nifti.support.outcomes import TEMPORARY, exit_code
from beam_nifti.volume import load_volume
from tests.images import brain, row_of, write_image, write_manifest


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "a folder")
        return
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    yield "memory://bucket/a folder"
    MemoryFileSystem.objects.clear()


def test_what_is_written_can_be_read(folder: str) -> None:
    path = join(folder, "sub/ä [b]*?.bin")
    storage.write(path, b"some bytes")
    assert storage.read(path) == b"some bytes"
    assert storage.read_head(path, 4) == b"some"
    assert storage.read_head(path, 99) == b"some bytes"
    assert storage.stat(path).size == 10
    assert storage.stat(path).mtime > 1e9
    with storage.open_read(path) as handle:
        handle.seek(5)
        assert handle.read() == b"bytes"


def test_what_is_opened_is_described(folder: str) -> None:
    path = join(folder, "a.bin")
    storage.write(path, b"some bytes")
    handle, stat = storage.open_with_stat(path)
    with handle:
        assert handle.read(4) == b"some"
        assert handle.read() == b" bytes"
    assert stat == storage.stat(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.open_with_stat(join(folder, "missing"))


def test_gzip_is_not_unpacked_on_the_way(folder: str) -> None:
    for name in ("a.gz", "a.bz2"):
        storage.write(join(folder, name), b"\x1f\x8b not gzip at all")
        assert storage.read(join(folder, name)) == b"\x1f\x8b not gzip at all"


def test_file_urls_name_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "ä%20[1]*?#.nii"
    path.parent.mkdir()
    path.touch()
    uri = path.as_uri()
    for url in (uri, uri.replace("file://", "file://localhost"), uri.replace("file://", "FILE:"), str(path)):
        assert (
            storage.absolute(url) == storage.join("s3://bucket", url) == storage.local_path(url) == str(path)
        )
        assert not storage.is_remote(url)
    assert storage.absolute(f"{tmp_path.as_uri()}/") == str(tmp_path)
    assert storage.join(tmp_path.as_uri(), "x") == f"{tmp_path}/x"
    assert storage.join(str(tmp_path), "x/file:y") == f"{tmp_path}/x/file:y"


def test_encoded_characters_of_a_file_url_are_no_pattern(tmp_path: Path) -> None:
    for name in ("a1.nii", "a*.nii", "a[1].nii", "b c.nii"):
        (tmp_path / name).touch()
    folder = tmp_path.as_uri()
    assert storage.glob(f"{folder}/a*.nii") == [f"{tmp_path}/{name}.nii" for name in ("a*", "a1", "a[1]")]
    assert storage.glob(f"{folder}/a%2a.nii") == [f"{tmp_path}/a*.nii"]
    assert storage.glob(f"{folder}/a%5B1%5D.nii") == [f"{tmp_path}/a[1].nii"]
    assert storage.glob(f"{folder}/b%20?.nii") == [f"{tmp_path}/b c.nii"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file://server/data/a.nii", "a file:// URL that names another computer; write file:///FOLDER/FILE"),
        ("C:\\data\\a.nii", "a Windows path; give the path at which this computer has the file"),
        ("d:/data/a.nii", "a Windows path"),
        ("\\\\server\\share\\a.nii", "a Windows path"),
        ("smtp://server/a.nii", "smtp:// is not supported here; use the local disk, s3://"),
    ],
)
def test_paths_that_nothing_here_can_reach_are_refused_by_name(path: str, message: str) -> None:
    for access in (storage.open_read, storage.stat, storage.exists, storage.glob, storage.delete):
        with pytest.raises(OSError, match=message) as caught:
            access(storage.absolute(path))  # type: ignore[operator]
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(VolumeError, match=message):
        load_volume(row_of(path), "/folder")


def test_every_path_of_a_command_may_be_a_file_url(tmp_path: Path, run: Callable[..., str]) -> None:
    folder = tmp_path / "a b"
    write_image(folder / "scans" / "1.nii.gz", brain())
    write_image(folder / "scans" / "1 mask.nii.gz", brain() // 900)
    base = folder.as_uri()
    assert cli.main(["manifest", "glob", f"{base}/scans/1.nii*", "--out", f"{base}/found.tsv"]) == 0
    assert (folder / "found.tsv").read_text() == "path\nscans/1.nii.gz\n"
    cells = {
        "participant_id": "s1",
        "path": f"{base}/scans/1.nii.gz",
        "mask": f"{base}/scans/1%20mask.nii.gz",
        "label": 1,
    }
    write_manifest(folder / "m.tsv", [cells])
    paths = [f"{base}/m.tsv", f"{base}/out", "--mask-column=mask"]
    run("check", f"{base}/m.tsv", "--mask-column=mask")
    run("build", *paths, f"--summary-json={base}/summary.json")
    assert json.loads((folder / "summary.json").read_text())["output"] == str(folder / "out")
    run("verify", f"{base}/out", "--deep=all", f"--manifest={base}/m.tsv")
    assert len(Dataset(f"{base}/out")) == 1
    assert cli.main(["extract", f"{base}/out", "--id=s1", "--mask", f"--out={base}/x%20y.nii"]) == 0
    assert (folder / "x y.nii").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b"]


def test_what_is_not_there(folder: str) -> None:
    path = join(folder, "missing")
    assert not storage.exists(path)
    for access in (storage.stat, storage.read, storage.open_read):
        with pytest.raises(FileNotFoundError, match="missing"):
            access(path)
    storage.delete(path)
    storage.delete_tree(path)
    assert storage.list_files(path) == []
    assert storage.list_folders(path) == []


def test_a_file_appears_whole_or_not_at_all(folder: str) -> None:
    path = join(folder, "a.bin")
    with storage.create(path) as handle:
        handle.write(b"new")
        handle.flush()
        assert not storage.exists(path)
    assert storage.read(path) == b"new"
    with contextlib.suppress(ZeroDivisionError), storage.create(join(folder, "b.bin")) as handle:
        handle.write(b"half")
        raise ZeroDivisionError
    assert storage.list_files(folder) == ["a.bin"]


def test_on_the_disk_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    storage.write(path, b"old")
    with contextlib.suppress(KeyboardInterrupt), storage.create(path) as handle:
        handle.write(b"half")
        raise KeyboardInterrupt
    assert storage.read(path) == b"old"
    assert storage.list_files(str(tmp_path)) == ["a.bin"]


def test_of_many_writers_one_wins_whole(folder: str) -> None:
    path = join(folder, "a.bin")
    contents = [bytes([i]) * 300_000 for i in range(8)]
    threads = [threading.Thread(target=storage.write, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read(path) in contents
    assert storage.list_files(folder) == ["a.bin"]


def test_a_link_has_the_content_and_replaces_what_was_there(folder: str) -> None:
    source, target = join(folder, "a"), join(folder, "deep/b")
    storage.write(source, b"content")
    storage.link(source, target)
    storage.write(join(folder, "deep/c"), b"old")
    storage.link(source, join(folder, "deep/c"))
    storage.delete(source)
    assert storage.read(target) == storage.read(join(folder, "deep/c")) == b"content"
    assert storage.list_files(join(folder, "deep")) == ["b", "c"]


def test_a_link_across_devices_is_a_copy(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system for everyone to write to")
    target = other / f"beam-nifti-{os.getpid()}"
    storage.write(str(tmp_path / "a"), b"content")
    try:
        storage.link(str(tmp_path / "a"), str(target))
        assert target.read_bytes() == b"content"
    finally:
        target.unlink()


def test_a_link_between_disk_and_store_is_a_copy(tmp_path: Path) -> None:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    here, there = str(tmp_path / "sub/a"), "memory://bucket/a"
    storage.write(there, b"content")
    storage.link(there, here)
    storage.delete(there)
    storage.link(here, there)
    assert storage.read(here) == storage.read(there) == b"content"


def test_listing_is_of_one_folder_and_sorted(folder: str) -> None:
    for name in ("b.txt", "a.txt", "a.bin", "x/c.txt", "x/y/d.txt", "z/e.txt"):
        storage.write(join(folder, name), b"")
    assert storage.list_files(folder) == ["a.bin", "a.txt", "b.txt"]
    assert storage.list_files(folder, "*.txt") == ["a.txt", "b.txt"]
    assert storage.list_files(join(folder, "x")) == ["c.txt"]
    assert storage.list_folders(folder) == ["x", "z"]
    assert storage.list_folders(join(folder, "x")) == ["y"]


def test_a_link_that_leads_to_itself_is_neither_file_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert storage.list_files(str(tmp_path)) == ["a"]
    assert storage.list_folders(str(tmp_path)) == []


def test_a_tree_whose_links_lead_in_circles_is_listed_once(tmp_path: Path) -> None:
    """Six folders of ten links each: a million ways lead through them."""
    for name in "abcdef":
        (tmp_path / f"sub-{name}").mkdir()
        (tmp_path / f"sub-{name}" / "image.nii").touch()
        for other in range(10):
            (tmp_path / f"sub-{name}" / f"link-{other}").symlink_to(tmp_path / f"sub-{'abcdef'[other % 6]}")
    found = sorted(storage.list_tree(str(tmp_path), "sub-", 8))
    assert found == [f"sub-{name}/image.nii" for name in "abcdef"]


def test_a_folder_is_there_while_something_is_in_it(folder: str) -> None:
    storage.write(join(folder, "x/c.txt"), b"")
    assert storage.exists(folder)
    assert storage.exists(join(folder, "x"))
    assert not storage.exists(join(folder, "x/c"))
    assert not storage.exists(join(folder, "x/c.tx"))


def test_deleting_a_tree_spares_its_neighbours(folder: str) -> None:
    for name in ("x/a", "x/y/b", "xy/c", "x.txt"):
        storage.write(join(folder, name), b"")
    storage.delete_tree(join(folder, "x"))
    assert not storage.exists(join(folder, "x"))
    assert storage.list_folders(folder) == ["xy"]
    storage.delete(join(folder, "x.txt"))
    assert storage.list_files(folder) == []


def test_paths() -> None:
    assert join("", "a.nii") == "a.nii"
    assert join("/data/", "a", "b.nii") == "/data/a/b.nii"
    assert join("/data", "s3://b/a.nii") == "s3://b/a.nii"
    assert join("gs://b", "/data/a.nii") == "/data/a.nii"
    assert storage.absolute("gs://b/a/") == "gs://b/a"
    assert storage.absolute("~/x/") == str(Path("~/x").expanduser())
    assert storage.absolute("x/../y") == str(Path.cwd() / "y")
    assert storage.dirname(storage.absolute("m.csv")) == str(Path.cwd())


def test_a_scheme_that_is_not_served_says_what_to_do() -> None:
    pytest.importorskip("apache_beam")
    for access in (storage.read, storage.stat, storage.exists, storage.list_files, storage.delete):
        with pytest.raises(
            OSError, match=r"nowhere:// is not supported here; .*install beam-nifti.*: 'nowhere://b/x'"
        ):
            access("nowhere://b/x")
    with pytest.raises(OSError, match="is not supported here"):
        storage.write("nowhere://b/x", b"")


def test_a_server_of_fsspec_whose_name_is_not_found_may_be_found_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec = pytest.importorskip("fsspec")

    class Lost(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "lost"

        def info(self, path: str, **_: object) -> dict[str, object]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    fsspec.register_implementation("lost", Lost, clobber=True)
    with pytest.raises(OSError, match="Name or service not known") as raised:
        storage.read("lost://account/a.tsv")
    assert exit_code(raised.value) == TEMPORARY


def test_what_fsspec_serves_is_read_as_the_disk_is(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    for name in ("a.bin", "b.txt", "sub-1/c.bin", "sub-1/x/d.bin", "other/e.bin"):
        storage.write(str(tmp_path / name), name.encode() * 3)
    here, there = str(tmp_path), f"local://{tmp_path}"
    for read in (storage.read, storage.stat, lambda path: storage.read_head(path, 4)):
        assert read(f"{there}/a.bin") == read(f"{here}/a.bin")
    for offset, length in ((2, 5), (12, 9), (15, 4)):
        part, expected = bytearray(length), bytearray(length)
        count = storage.read_into(f"{there}/a.bin", offset, memoryview(part))
        assert count == storage.read_into(f"{here}/a.bin", offset, memoryview(expected))
        assert part == expected
    for folder in ("", "/sub-1", "/missing"):
        assert storage.list_files(there + folder) == storage.list_files(here + folder)
        assert storage.list_folders(there + folder) == storage.list_folders(here + folder)
        assert storage.exists(there + folder) == storage.exists(here + folder)
    assert sorted(storage.list_tree(there, "sub", 2)) == ["sub-1/c.bin", "sub-1/x/d.bin"]
    found = [path.removeprefix("local://") for path in storage.glob(f"{there}/**/*.bin")]
    assert found == storage.glob(f"{here}/**/*.bin")
    with pytest.raises(FileNotFoundError, match="sub-1"):
        storage.read(f"{there}/sub-1")
    with pytest.raises(OSError, match="local:// is read-only"):
        storage.write(f"{there}/new", b"")


@pytest.mark.parametrize(("path", "extra"), [("s3://b/x", "aws"), ("gs://b/x", "gcp")])
def test_a_missing_extra_is_named(path: str, extra: str) -> None:
    client = {"aws": "boto3", "gcp": "apitools"}[extra]  # what each extra brings and nothing else does
    if importlib.util.find_spec(client) is not None:
        pytest.skip(f"beam-nifti[{extra}] is installed")
    with pytest.raises(OSError, match=rf"install beam-nifti\[{extra}\]"):
        storage.read(path)


def test_a_dataset_is_built_from_and_in_an_object_store(
    cohort: Path, tmp_path: Path, build: Callable[..., Any]
) -> None:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    for path in cohort.parent.iterdir():
        storage.write(f"memory://in/{path.name}", path.read_bytes())
    sharding = Sharding(num_shards=2)
    here = build(BuildConfig(str(cohort), str(tmp_path / "out"), sharding=sharding))
    there = BuildConfig("memory://in/manifest.tsv", "memory://out/set", sharding=sharding)
    assert build(there, 2) == here
    written = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {Path(o.removeprefix("memory://out/set/")) for o in _objects("memory://out/")} == written
    for name in storage.list_files("memory://out/set", "*.tfrecord.gz"):
        assert storage.read(f"memory://out/set/{name}") == (tmp_path / "out" / name).read_bytes()
    assert build(there) == here  # again: nothing to do


def test_an_unfinished_build_in_an_object_store_goes_on(cohort: Path, build: Callable[..., Any]) -> None:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    broken = cohort.parent / "sub-0003.nii.gz"
    image = broken.read_bytes()
    broken.write_bytes(image[:-9])
    config = BuildConfig(str(cohort), "memory://out", sharding=Sharding(num_shards=2))
    with pytest.raises(TooManyFailures, match="1 of 12 volumes failed"):
        build(config)
    broken.write_bytes(image)
    assert build(config).num_written == 12
    assert not storage.exists("memory://out/failures.jsonl")
    assert not storage.exists(f"memory://out/{LOCK_FILE}")


def _objects(prefix: str) -> list[str]:
    from tests.object_store import MemoryFileSystem

    return [path for path in MemoryFileSystem.objects if path.startswith(prefix)]


def test_a_folder_that_is_written_to_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker that outlives its job: what it left in time goes, and the rest is no error."""
    folder = tmp_path / "folder"
    (folder / "parts").mkdir(parents=True)
    rmdir, late = os.rmdir, ["a", "b", "c", "d"]

    def write_and_rmdir(path: Any, **arguments: Any) -> None:
        if late:
            (folder / "parts").mkdir(exist_ok=True)
            (folder / "parts" / late.pop()).touch()
        rmdir(path, **arguments)

    monkeypatch.setattr(os, "rmdir", write_and_rmdir)
    storage.delete_tree(str(folder))
    late.clear()
    storage.delete_tree(str(folder))
    assert not folder.exists()
