"""Datasets and images on a web server."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import shutil
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from beam_nifti.cli import main as cli
from beam_nifti.errors import DatasetError, OutputError
from beam_nifti.random_access import Dataset
from beam_nifti.storage import object_store, paced
from beam_nifti.storage import paths as storage
from beam_nifti.storage.object_store import ATTEMPTS
from beam_nifti.support.outcomes import may_pass
from beam_nifti.volume import load_volume
from tests.build_helpers import build
from tests.datasets import read_without_beam_and_fork, records_of
from tests.images import name_of, row_of, write_cohort, write_manifest
from tests.services.fault_proxy import FAULTS, FaultProxy
from tests.web_server import Plain, Ranges, Redirecting, serve

SHARD = "train-00001-of-00002.tfrecord.gz"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records in two shards, and their images in the folder "cohort" beside them."""
    folder = tmp_path_factory.mktemp("web")
    build(write_cohort(folder / "cohort", 12), folder / "dataset", num_shards=2)
    return folder / "dataset"


@pytest.fixture
def copy(local: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(local, tmp_path / "dataset")


@pytest.fixture
def server(local: Path) -> Iterator[FaultProxy]:
    with serve(local.parent, Ranges) as proxy:
        yield proxy


def test_a_record_by_number_is_one_request_of_its_bytes(server: FaultProxy, local: Path) -> None:
    records, expected = pickle.loads(pickle.dumps(Dataset(f"{server.url}/dataset"))), Dataset(local)
    lengths = expected.index(["length"])["length"].to_pylist()
    server.rest()
    for number in range(len(expected)):
        assert records[number]["image"].tobytes() == expected[number]["image"].tobytes()
    assert [(r.method, r.status, r.received) for r in server.rest()] == [
        ("GET", 206, length) for length in lengths
    ]


def test_a_forked_process_reads_on_and_nothing_loads_beam(server: FaultProxy) -> None:
    read_without_beam_and_fork(f"{server.url}/dataset")


def test_what_opening_asks_for(server: FaultProxy) -> None:
    Dataset(f"{server.url}/dataset")
    assert Counter((r.method, Path(r.path).suffix) for r in server.rest()) == {
        ("HEAD", ".json"): 1,
        ("GET", ".json"): 1,
        ("HEAD", ".gz"): 2,
        ("HEAD", ".parquet"): 2,
        ("GET", ".parquet"): 2,
    }


@pytest.mark.tf
def test_tensorflow_reads_it_by_the_index(server: FaultProxy, local: Path) -> None:
    load_dataset = pytest.importorskip("beam_nifti.reader", exc_type=ImportError).load_dataset
    options = {"batch_size": 5, "shuffle": True, "seed": 1}
    images = [x.numpy().tobytes() for x, _ in load_dataset(f"{server.url}/dataset", **options)]
    assert images == [x.numpy().tobytes() for x, _ in load_dataset(local, **options)]


def test_a_server_without_ranges_is_refused(local: Path) -> None:
    with serve(local.parent, Plain) as server:
        records = Dataset(f"{server.url}/dataset")
        assert len(records) == 12
        server.rest()
        with pytest.raises(DatasetError, match="sent the whole file instead of the requested range"):
            records[1]
        # Then whether the dataset is still the one that was opened.
        assert [r.path.endswith(".tfrecord.gz") for r in server.rest() if r.method == "GET"].count(True) == 1


def test_a_shard_that_is_missing_or_cut_is_found_at_opening(copy: Path) -> None:
    with serve(copy, Ranges) as server:
        content = (copy / SHARD).read_bytes()
        (copy / SHARD).write_bytes(content[:-1])
        with pytest.raises(DatasetError, match=rf"{SHARD}: the shard has {len(content) - 1} bytes"):
            Dataset(server.url)
        (copy / SHARD).unlink()
        with pytest.raises(DatasetError, match=rf"{SHARD}: the shard is missing"):
            Dataset(server.url)
        server.choose = lambda _, path: "403" if path.endswith(SHARD) else ""
        with pytest.raises(DatasetError, match=rf"{SHARD}: cannot be reached .*access is denied \(HTTP 403"):
            Dataset(server.url)
        (copy / "dataset_info.json").unlink()
        with pytest.raises(DatasetError, match=r"no complete dataset here \(dataset_info.json is missing\)"):
            Dataset(server.url)


def test_a_shard_that_is_cut_later_is_found_at_reading(copy: Path) -> None:
    with serve(copy, Ranges) as server:
        records = Dataset(server.url)
        for rest in (20, 0):
            (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:rest])
            with pytest.raises(DatasetError, match=rf"the file has only {rest} of its \d+ bytes"):
                records[len(records) // 2]


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_errors_change_nothing(
    server: FaultProxy, local: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.01)
    seen: Counter[tuple[str, str]] = Counter()

    def every_other(method: str, path: str) -> str:
        seen[method, path] += 1
        return fault if seen[method, path] % 2 else ""

    server.choose = every_other
    records, expected = Dataset(f"{server.url}/dataset"), Dataset(local)
    for number in (0, 11):
        assert records[number]["image"].tobytes() == expected[number]["image"].tobytes()
    assert any(r.fault for r in server.requests)


def test_a_server_that_stays_down_is_given_up(server: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.01)
    server.choose = lambda *_: "503"
    with pytest.raises(DatasetError, match=rf"failed {ATTEMPTS} times in a row \(HTTP 503"):
        Dataset(f"{server.url}/dataset")
    assert len(server.requests) == ATTEMPTS


def no_address(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("scheme", ["http", "hdfs"])
@pytest.mark.parametrize("is_named", [True, False])
def test_a_server_that_cannot_be_reached_is_named_once(
    scheme: str,
    is_named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(object_store, "_told", {})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    if not is_named:
        monkeypatch.setattr(socket, "getaddrinfo", no_address)
        host = "store.example:81"
    url = f"{scheme}://me:password@{host}/cohort/manifest.tsv"
    said = []
    for _ in range(2):
        assert cli.main(["build", url, str(tmp_path / "out"), "--quiet"]) == cli.TEMPORARY
        said.append(capsys.readouterr().err.splitlines())
    reason = "connection refused" if is_named else "its name cannot be resolved"
    assert said[0][0] == f"{host} cannot be reached ({reason}); trying again for up to 63 s"
    assert said[0][1:] == said[1], "it was told a second time"


def test_a_server_that_fails_is_named(
    server: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(object_store, "_told", {})
    answers = iter(["503", "503"])
    server.choose = lambda *_: next(answers, "")
    storage.read(f"{server.url}/cohort/manifest.tsv?signature=secret")
    (record,) = caplog.records
    host = server.url.removeprefix("http://")
    assert record.getMessage() == f"{host} fails (HTTP 503); trying again for up to 63 s"


@pytest.mark.parametrize(("fault", "code"), [("400", 2), ("403", 2), ("404", 2), ("503", 75)])
def test_only_what_may_pass_asks_for_another_attempt(
    server: FaultProxy, tmp_path: Path, fault: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.01)
    server.choose = lambda *_: fault
    assert cli.main(["build", f"{server.url}/cohort/manifest.tsv", str(tmp_path / "out"), "--quiet"]) == code


def test_images_are_read_from_there(server: FaultProxy, local: Path, tmp_path: Path) -> None:
    image = "cohort/sub-0003.nii.gz"
    there, here = load_volume(row_of(f"{server.url}/{image}")), load_volume(row_of(local.parent / image))
    assert there.voxels.tobytes() == here.voxels.tobytes()
    build(f"{server.url}/cohort/manifest.tsv", tmp_path / "out", num_shards=2)
    assert (tmp_path / "out" / SHARD).read_bytes() == (local / SHARD).read_bytes()


REDIRECTS = {
    "": "the server redirects without end",
    "file:///etc/hostname": "is not valid (InvalidSchema)",
    "gopher://there/x": "is not valid (InvalidSchema)",
    "http://[": "is not valid (",
    "http://a..b/": "is not valid (",
    f"http://{'a' * 70}.example/": "is not valid (",
    "\xff\xfe": "is not valid (",
    "LENGTH": "is not valid (ValueError)",
    "DATE": "is not valid (ValueError)",
}
"""Where a server redirects to, and what is reported."""


def test_an_answer_of_no_use_is_the_fault_of_its_image(tmp_path: Path) -> None:
    folder = write_cohort(tmp_path / "cohort", 2).parent
    with serve(folder, Redirecting) as server:
        paths = [f"{server.url}/to/{quote(where, '', 'latin-1')}" for where in REDIRECTS]
        good = [f"{server.url}/{name_of(0)}", f"{server.url}/to/{quote('/' + name_of(1), '')}"]
        manifest = write_manifest(tmp_path / "m.tsv", [{"path": path} for path in [*good, *paths]])
        assert cli.main(["check", str(manifest), "--quiet", f"--out={tmp_path}/check.json"]) == cli.FAILED
        built = build(manifest, tmp_path / "out", max_bad_fraction=0.9)
    checked = [p["message"] for p in json.loads((tmp_path / "check.json").read_text())["problems"]]
    listed = [json.loads(line) for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()]
    assert built.summary.num_written == 2
    for messages in (checked, [line["message"] for line in listed]):
        for path, reason, message in zip(paths, REDIRECTS.values(), messages, strict=True):
            assert message.startswith(f"{path}: cannot be read: ")
            assert reason in message


class _Tagged(Ranges):
    """Says of a file, besides its size and time, which content it has."""

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{zlib.crc32(path.read_bytes())}"')
        super().end_headers()


@pytest.mark.parametrize("secret", [None, b"not so random, but long enough"])
def test_a_server_that_tags_its_files_tells_what_size_and_time_do_not(
    tmp_path: Path, secret: bytes | None
) -> None:
    key = None
    if secret:
        (tmp_path / "key").write_bytes(secret)
        key = str(tmp_path / "key")
    manifest, output = write_cohort(tmp_path / "cohort", 2), tmp_path / "out"
    path = manifest.parent / name_of(1)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with serve(manifest.parent, _Tagged) as server:
        built = build(f"{server.url}/manifest.tsv", output, anonymous_ids=key)
        again = build(f"{server.url}/manifest.tsv", output, anonymous_ids=key)
        assert again.counters["volumes-skipped"] == 2
        data = bytearray(path.read_bytes())
        data[4] ^= 1  # in the gzip header's time, so that the voxels stay right
        path.write_bytes(data)
        os.utime(path, ns=times)
        again = build(f"{server.url}/manifest.tsv", output, anonymous_ids=key)
    assert built.counters["volumes-loaded"] == 2
    assert (again.counters["volumes-skipped"], again.counters["volumes-loaded"]) == (1, 1)
    versions = [cells["source_versions"] for cells, _ in records_of(output)]
    tag = f'"{zlib.crc32(data)}"'
    assert versions[1] == [tag if secret is None else pseudonym(tag, secret)]


def pseudonym(version: str, secret: bytes) -> str:
    """What docs/format.md says."""
    for name in ("key", version):
        key = hashlib.sha256(secret).digest()
        secret = (
            hashlib.blake2b(name.encode(), digest_size=16, key=key, person=b"version").hexdigest().encode()
        )
    return secret.decode()


def test_a_dataset_there_is_verified_and_inspected(server: FaultProxy, run: Callable[..., str]) -> None:
    assert run("verify", f"{server.url}/dataset").startswith("ok       12 examples, 2 shards")
    assert "12 in " in run("inspect", f"{server.url}/dataset")


def test_nothing_is_written_and_nothing_listed_there(server: FaultProxy, local: Path) -> None:
    url = f"{server.url}/out"
    for access in (partial(storage.write, data=b""), storage.delete, storage.delete_tree):
        with pytest.raises(OSError, match=rf"{url}: http:// is read-only; write to the local disk"):
            access(url)
    with pytest.raises(OSError, match="is read-only"):
        storage.link(f"{server.url}/dataset/{SHARD}", url)
    with pytest.raises(OutputError, match=rf"OUTPUT is {url}: http:// is read-only; write to the local disk"):
        build(local.parent / "cohort/manifest.tsv", url)
    with pytest.raises(OSError, match="a web server does not list its files"):
        storage.glob(f"{server.url}/cohort/*.nii.gz")
    assert not storage.exists(url)
    assert {r.method for r in server.requests} <= {"GET", "HEAD"}


def answer_with(sent: Callable[[socket.socket], None]) -> str:
    """A server that answers one HEAD honestly, with 2000 bytes, and each further request by a function."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_all() -> None:
        with listener:
            while True:
                connection, _ = listener.accept()
                with connection:
                    while question := connection.recv(1 << 16):
                        if question.startswith(b"HEAD"):
                            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n")
                            continue
                        with contextlib.suppress(OSError):
                            sent(connection)
                        break

    threading.Thread(target=serve_all, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/a.nii"


HEAD_OF_RANGE = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-1999/2000\r\n"


@pytest.mark.parametrize("announced", [b"Content-Length: 999999999999\r\n\r\n", b"Connection: close\r\n\r\n"])
def test_a_body_without_an_end_is_refused(announced: bytes) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(HEAD_OF_RANGE + announced)
        while True:
            connection.sendall(bytes(1 << 16))

    with pytest.raises(OSError, match="sent more than the 2000 bytes that were requested"):
        storage.read(answer_with(endless))


@pytest.mark.parametrize(
    "answer",
    [
        b"GARBAGE\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 150 + b"\r\n",
    ],
    ids=["no status", "a long header", "many headers"],
)
def test_an_answer_that_is_no_http_is_not_asked_for_again(answer: bytes) -> None:
    asked = []

    def other(connection: socket.socket) -> None:
        asked.append(connection)
        connection.sendall(answer)

    with pytest.raises(OSError, match="what the server answers is not HTTP") as error:
        storage.read(answer_with(other))
    assert len(asked) == 1
    assert not may_pass(error.value)


@pytest.mark.parametrize("announced", [b"Content-Length: 999999999999\r\n\r\n", b"Connection: close\r\n\r\n"])
def test_the_body_of_a_redirect_is_not_read(server: FaultProxy, local: Path, announced: bytes) -> None:
    name = f"dataset/{SHARD}"

    def endless(connection: socket.socket) -> None:
        location = f"Location: {server.url}/{name}\r\n"
        connection.sendall(f"HTTP/1.1 302 Found\r\n{location}".encode() + announced)
        while True:
            connection.sendall(bytes(1 << 16))

    url = answer_with(endless)
    assert storage.read_head(url, 100) == (local / SHARD).read_bytes()[:100]


@pytest.mark.parametrize("begun", [b"HTTP/1.1 206 OK\r\n", HEAD_OF_RANGE + b"Content-Length: 2000\r\n\r\n"])
def test_an_answer_in_drops_times_out(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drop comes well within the time-out of the socket."""
    monkeypatch.setattr(paced, "SILENCE", 0.2)
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)

    def dripping(connection: socket.socket) -> None:
        connection.sendall(begun)
        for drop in itertools.cycle(b"X-Header: drip\r\n"):
            connection.sendall(bytes([drop]))
            time.sleep(0.01)

    with pytest.raises(TimeoutError, match="the store failed 2 times in a row"):
        storage.read(answer_with(dripping))
