"""Builds from and into S3 and Cloud Storage, with servers of both on this machine and a proxy that fails."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from beam_nifti.errors import DatasetError, OutputError, VolumeError
from beam_nifti.pipeline.lock import LOCK_FILE, hold, this_system
from beam_nifti.random_access import Dataset
from beam_nifti.storage import paths as storage
from beam_nifti.storage import stores
from beam_nifti.storage.object_store import ATTEMPTS
from beam_nifti.volume import load_volume
from tests.build_helpers import build
from tests.datasets import read_without_beam_and_fork
from tests.images import brain, nifti_header, row_of, write_cohort
from tests.services.conftest import LOCAL, Reference, content_of, run_cli
from tests.services.fault_proxy import FAULTS, Request
from tests.services.stores import BUCKET, Servers, free_ports, serve

STORES = ("s3", "gs")
FIRST_IMAGE = "sub-0000.nii.gz"


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with serve(tmp_path_factory.mktemp("object-stores")) as servers:
        yield servers


@pytest.fixture(autouse=True)
def _rested(servers: Servers) -> Iterator[None]:
    yield
    servers.rest()


@pytest.fixture
def folder(request: pytest.FixtureRequest, servers: Servers) -> Callable[[str], str]:
    """A folder of this test's own in a store: `folder("s3")`."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return lambda scheme: f"{scheme}://{BUCKET}/{name}"


def upload(reference: Reference, folder: str) -> str:
    """Copy the reference's cohort into a store; the path of its manifest there."""
    for path in reference.manifest.parent.iterdir():
        storage.write(f"{folder}/{path.name}", path.read_bytes())
    return f"{folder}/{reference.manifest.name}"


def shards(reference: Reference) -> dict[str, str]:
    return {name: digest for name, digest in reference.content.items() if ".tfrecord" in name}


def assert_same(output: str, reference: Reference) -> None:
    """The output has the reference's shards, to the byte, its other files, and nothing else."""
    if storage.is_remote(output):
        objects = _paths(output)
        found = {path.removeprefix(f"{output}/"): path for path in objects}
        assert set(found) == set(reference.content)
        digests = {name: hashlib.sha256(storage.read(path)).hexdigest() for name, path in found.items()}
    else:
        digests = content_of(Path(output))
        assert set(digests) == set(reference.content)
    assert {name: digests[name] for name in shards(reference)} == shards(reference)


def _paths(folder: str) -> list[str]:
    return stores.store_of(folder).find(f"{folder}/", deep=True)[0]


def gets_of_images(requests: list[Request]) -> Counter[str]:
    return Counter(r.path.rpartition("/")[2] for r in requests if r.method == "GET" and ".nii" in r.path)


MIXTURES = (
    ("s3", "s3", "s3"),
    ("gs", "gs", "gs"),
    ("local", "s3", "gs"),
    ("gs", "local", "s3"),
    ("s3", "gs", "local"),
)


@pytest.mark.parametrize(("manifest", "images", "output"), MIXTURES, ids=map("-".join, MIXTURES))
def test_every_mixture_makes_the_same_shards(
    reference: Reference,
    folder: Callable[[str], str],
    tmp_path: Path,
    manifest: str,
    images: str,
    output: str,
) -> None:
    def where(kind: str, name: str) -> str:
        return str(tmp_path / name) if kind == "local" else f"{folder(kind)}/{name}"

    if manifest == images:
        table = upload(reference, where(images, "in"))
    else:
        lines = reference.manifest.read_text().splitlines()
        if images == "local":
            prefix = str(reference.manifest.parent)
        else:
            prefix = where(images, "in")
            upload(reference, prefix)
        column = lines[0].split("\t").index("path")
        rows = [line.split("\t") for line in lines[1:]]
        for row in rows:
            row[column] = f"{prefix}/{row[column]}"
        table = where(manifest, "manifest.tsv")
        storage.write(table, "\n".join([lines[0], *("\t".join(row) for row in rows), ""]).encode())
    dataset = where(output, "dataset")
    run_cli(["build", table, dataset, *reference.flags, "--workers=2"])
    assert_same(dataset, reference)
    said = run_cli(["verify", dataset, "--manifest", table, "--deep=3"])
    assert said.startswith("ok       60 examples, 12 shards")
    assert "examples      60 in " in run_cli(["inspect", dataset])


@pytest.mark.parametrize("scheme", STORES)
def test_pairs_that_a_pattern_finds_are_built(
    folder: Callable[[str], str], tmp_path: Path, scheme: str
) -> None:
    root = folder(scheme)
    for i, packed in enumerate(("", ".gz", ".zst")):
        pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
        head = nifti_header(brain(), fields={"magic": b"ni1", "vox_offset": 0})
        for name, content in ((".hdr", head), (f".img{packed}", pack(brain(seed=i).tobytes(order="F")))):
            storage.write(f"{root}/in/sub-{i}/anat/T1w{name}", content)
            storage.write(f"{tmp_path}/in/sub-{i}/anat/T1w{name}", content)
    for where in (root, str(tmp_path)):
        run_cli(["manifest", "glob", f"{where}/in/**/T1w.*", "--out", f"{where}/in/manifest.tsv"])
        run_cli(["build", f"{where}/in/manifest.tsv", f"{where}/dataset"])
    found = {where: storage.read(f"{where}/in/manifest.tsv") for where in (root, str(tmp_path))}
    assert found[root] == found[str(tmp_path)]
    assert [line.split(b"\t")[1] for line in found[root].splitlines()[1:]] == [
        f"sub-{i}/anat/T1w.hdr".encode() for i in range(3)
    ]
    shard = "dataset/train-00000-of-00001.tfrecord.gz"
    assert storage.read(f"{root}/{shard}") == storage.read(f"{tmp_path}/{shard}")


@pytest.mark.parametrize("scheme", STORES)
def test_what_a_build_asks_for(
    reference: Reference, folder: Callable[[str], str], servers: Servers, scheme: str
) -> None:
    manifest, proxy = upload(reference, f"{folder(scheme)}/in"), servers.proxies[scheme]
    proxy.rest()
    dataset = f"{folder(scheme)}/dataset"
    run_cli(["build", manifest, dataset, *reference.flags, "--workers=1", *LOCAL])
    requests = proxy.rest()
    gets = gets_of_images(requests)
    assert gets.pop(FIRST_IMAGE) == 2  # its header is read before anything is planned
    assert set(gets.values()) == {1}
    assert len(gets) == 59
    images = [r for r in requests if ".nii" in r.path]
    assert {r.method for r in images} == {"GET"}
    sizes = sum(path.stat().st_size for path in reference.manifest.parent.glob("*.nii.gz"))
    first = (reference.manifest.parent / FIRST_IMAGE).stat().st_size
    assert sum(r.received for r in images) == sizes + first
    # With one worker a shard is one unit. What is asked besides is for shards and for the build.
    assert len(requests) - len(images) <= 18 * 12 + 37


@pytest.fixture
def remote(request: pytest.FixtureRequest, folder: Callable[[str], str], tmp_path: Path) -> tuple[str, Path]:
    """A dataset of twelve records in a store, which the test's parameter "scheme" names, and on the disk."""
    build(write_cohort(tmp_path / "in", 12), tmp_path / "out", num_shards=2)
    url = folder(request.getfixturevalue("scheme"))
    for path in (tmp_path / "out").rglob("*.*"):
        storage.write(f"{url}/{path.relative_to(tmp_path / 'out')}", path.read_bytes())
    return url, tmp_path / "out"


@pytest.mark.parametrize("scheme", STORES)
def test_a_record_by_number_is_one_request(remote: tuple[str, Path], servers: Servers, scheme: str) -> None:
    url, local = remote
    records, proxy = pickle.loads(pickle.dumps(Dataset(url))), servers.proxies[scheme]
    (length,) = records[7:8].index(["length"])["length"].to_pylist()
    proxy.rest()
    image = records[7]["image"]
    (request,) = proxy.rest()
    assert (request.method, request.received) == ("GET", length)
    assert image.tobytes() == Dataset(local)[7]["image"].tobytes()


@pytest.mark.parametrize("scheme", STORES)
def test_a_forked_process_reads_on_and_nothing_loads_beam(remote: tuple[str, Path], scheme: str) -> None:
    read_without_beam_and_fork(remote[0])


@pytest.mark.tf
@pytest.mark.parametrize("scheme", STORES)
def test_an_epoch_of_tensorflow_is_one_request_a_record(
    remote: tuple[str, Path], servers: Servers, scheme: str
) -> None:
    load_dataset = pytest.importorskip("beam_nifti.reader", exc_type=ImportError).load_dataset
    url, local = remote
    options = {"batch_size": 5, "shuffle": True, "seed": 1}
    engine = None if scheme == "s3" else "indexed"  # which TensorFlow does not know
    dataset, proxy = load_dataset(url, engine=engine, **options), servers.proxies[scheme]
    proxy.rest()
    images = [x.numpy() for x, _ in dataset]
    # At its beginning it looks whether the dataset is still the one that was opened.
    requests = [r for r in proxy.rest() if "dataset_info.json" not in r.path]
    assert len(requests) == 12
    assert {r.method for r in requests} == {"GET"}
    assert sum(r.received for r in requests) == sum(Dataset(local).index(["length"])["length"].to_pylist())
    expected = [x.numpy() for x, _ in load_dataset(local, **options)]
    assert [x.tobytes() for x in images] == [x.tobytes() for x in expected]


def test_what_is_missing_differs_from_what_is_not_reached(
    folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match=r"no complete dataset here \(dataset_info.json is missing\)"):
        Dataset(folder("s3"))
    with pytest.raises(DatasetError, match=r"no complete dataset here \(No such bucket\)"):
        Dataset("s3://another/dataset")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setattr(stores, "_stores", {})
    with pytest.raises(DatasetError, match=r"cannot be reached .*not accept the credentials"):
        Dataset(folder("s3"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.01)
    monkeypatch.setattr(stores, "_stores", {})
    with pytest.raises(DatasetError, match=r"dataset_info.json: cannot be reached .*Could not connect"):
        Dataset(folder("s3"))


def test_flags_lead_to_the_store_where_the_environment_does_not(
    folder: Callable[[str], str], servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in write_cohort(tmp_path / "in", 2).parent.iterdir():
        storage.write(f"{folder('s3')}/{path.name}", path.read_bytes())
    names = {
        "AWS_ENDPOINT_URL": "endpoint_url",
        "AWS_ACCESS_KEY_ID": "access_key_id",
        "AWS_SECRET_ACCESS_KEY": "secret_access_key",
        "AWS_DEFAULT_REGION": "region_name",
    }
    flags = [f"--s3_{flag}={os.environ[name]}" for name, flag in names.items()]
    for name in names:
        monkeypatch.delenv(name)
    servers.rest()
    run_cli(["check", f"{folder('s3')}/manifest.tsv", *flags], AWS_EC2_METADATA_DISABLED="true")
    assert len(gets_of_images(servers.proxies["s3"].rest())) == 2


@pytest.mark.parametrize("scheme", STORES)
def test_passing_errors_change_nothing(
    reference: Reference, folder: Callable[[str], str], servers: Servers, scheme: str
) -> None:
    manifest, proxy = upload(reference, f"{folder(scheme)}/in"), servers.proxies[scheme]
    proxy.rest()
    proxy.spoil(0.1, seed=4)
    dataset = f"{folder(scheme)}/dataset"
    run_cli(["build", manifest, dataset, *reference.flags, "--workers=2"])
    spoilt = Counter(r.fault for r in proxy.rest() if r.fault)
    assert spoilt.keys() == set(FAULTS)
    assert_same(dataset, reference)


@pytest.mark.parametrize("scheme", STORES)
def test_a_refused_image_is_a_dead_letter_at_once(
    reference: Reference, folder: Callable[[str], str], servers: Servers, scheme: str
) -> None:
    manifest, proxy = upload(reference, f"{folder(scheme)}/in"), servers.proxies[scheme]
    proxy.rest()
    refused = {"sub-0007.nii.gz": "400", "sub-0008.nii.gz": "403", "sub-0009.nii.gz": "404"}
    proxy.choose = lambda _, path: refused.get(path.rpartition("/")[2], "")
    dataset = f"{folder(scheme)}/dataset"
    run_cli(["build", manifest, dataset, *reference.flags, "--workers=2", "--max-bad-fraction=0.1"])
    asked = gets_of_images(proxy.rest())
    assert [asked[name] for name in refused] == [1, 1, 1]
    failures = [json.loads(line) for line in storage.read(f"{dataset}/failures.jsonl").splitlines()]
    assert [failure["participant_id"] for failure in failures] == ["sub-0007", "sub-0008", "sub-0009"]
    for failure, reason in zip(failures, ("HTTP 400", "HTTP 403", "No such file or directory"), strict=True):
        assert failure["message"].startswith(f"{failure['participant_id']}.nii.gz: cannot be read: ")
        assert reason in failure["message"]
        assert failure["message"].endswith("; check the path and its permissions")


def test_a_killed_build_goes_on(
    reference: Reference, folder: Callable[[str], str], servers: Servers, tmp_path: Path
) -> None:
    manifest, proxy = upload(reference, f"{folder('s3')}/in"), servers.proxies["s3"]
    proxy.rest()
    dataset = f"{folder('s3')}/dataset"
    command = ["build", manifest, dataset, *reference.flags, "--workers=1", *LOCAL]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "beam_nifti", *command], stdout=log, stderr=subprocess.STDOUT
        )
    asked, lock = set[str](), threading.Lock()

    def kill_midway(method: str, path: str) -> str:
        with lock:
            if method == "GET" and path.endswith(".nii.gz"):
                asked.add(path)
                if len(asked) == 31:
                    process.send_signal(signal.SIGKILL)
        return ""

    proxy.choose = kill_midway
    assert process.wait(timeout=200) == -signal.SIGKILL, (tmp_path / "log").read_text()
    proxy.rest()
    assert not storage.exists(f"{dataset}/dataset_info.json")
    said = run_cli(command)
    again = gets_of_images(proxy.rest())
    assert_same(dataset, reference)
    assert "kept     " in said
    assert 29 <= len(again) < 60
    assert set(again.values()) <= {1, 2}


@pytest.mark.parametrize("scheme", STORES)
def test_of_many_builds_one_takes_the_lease(folder: Callable[[str], str], scheme: str) -> None:
    output, together = folder(scheme), threading.Barrier(6)
    outcomes = list[str]()

    def build() -> None:
        together.wait()
        try:
            with hold(output):
                outcomes.append("held")
                refused.wait(60)
        except OutputError as e:
            outcomes.append(str(e))
        if len(outcomes) == 6:
            refused.set()

    for stale in (False, True):
        outcomes.clear()
        refused = threading.Event()
        if stale:
            gone = subprocess.run(
                [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
            )
            lease = {"token": "x", "pid": int(gone.stdout), "system": this_system()}
            storage.write(f"{output}/{LOCK_FILE}", json.dumps(lease).encode())
        threads = [threading.Thread(target=build) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("held") == 1
        said = ("a build or conversion on", "another command took")
        assert all(any(text in o for text in said) for o in outcomes if o != "held")
        assert not storage.exists(f"{output}/{LOCK_FILE}")


@pytest.mark.parametrize("scheme", STORES)
def test_a_bucket_that_does_not_exist_is_named(scheme: str) -> None:
    output = f"{scheme}://no-such-bucket-of-ours/out"
    with pytest.raises(OutputError, match=f"^OUTPUT is {output}, .*: No such bucket"), hold(output):
        pass
    with pytest.raises(OutputError, match=f"--temp-location is {output}, .*: No such bucket"):
        storage.require_writable(output, "--temp-location", is_folder=True)


@pytest.mark.parametrize("scheme", STORES)
def test_the_store_tells_the_age_of_a_lease(folder: Callable[[str], str], scheme: str) -> None:
    path = f"{folder(scheme)}/{LOCK_FILE}"
    storage.write(path, b"{}")
    with pytest.raises(OutputError, match=r"is writing here .last renewed [0-5] s ago"), hold(folder(scheme)):
        pass
    assert storage.list_files(folder(scheme)) == [LOCK_FILE]


LARGE = bytes(range(256)) * 70_000
"""More than is sent at once."""


def _write_large(path: str) -> None:
    with storage.create(path) as handle:
        for start in range(0, len(LARGE), 1 << 20):
            handle.write(LARGE[start : start + (1 << 20)])


def _read_in_pieces(path: str) -> bytes:
    handle, stat = storage.open_with_stat(path)
    assert stat == storage.stat(path)
    assert stat.version
    with handle:
        data = bytearray(stat.size)
        view, size = memoryview(data), 0
        while count := handle.readinto(view[size:]):  # type: ignore[attr-defined]
            size += count
    return bytes(data[:size])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scheme", STORES)
def test_whatever_is_asked_is_asked_again(
    folder: Callable[[str], str],
    servers: Servers,
    scheme: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.05)
    root, proxy, lock = folder(scheme), servers.proxies[scheme], threading.Lock()
    seen: Counter[tuple[str, str]] = Counter()

    def every_other(method: str, path: str) -> str:
        # Cloud Storage passes over bytes of an upload that it has already; its stand-in here does not.
        if scheme == "gs" and method == "PUT" and fault in ("lost", "cut"):
            return ""
        with lock:
            seen[method, path] += 1
            return fault if seen[method, path] % 2 else ""

    proxy.choose = every_other
    storage.write(f"{root}/a b", b"some bytes")
    assert storage.read(f"{root}/a b") == b"some bytes"
    assert storage.stat(f"{root}/a b").size == 10
    storage.write(f"{root}/empty", b"")
    assert storage.read(f"{root}/empty") == b""
    _write_large(f"{root}/large")
    assert storage.read(f"{root}/large") == LARGE
    assert _read_in_pieces(f"{root}/large") == LARGE
    storage.link(f"{root}/large", f"{root}/x/copy")
    assert storage.read(f"{root}/x/copy") == LARGE
    assert storage.list_files(root) == ["a b", "empty", "large"]
    assert storage.list_folders(root) == ["x"]
    storage.delete_tree(f"{root}/x")
    assert not storage.exists(f"{root}/x")
    assert any(r.fault for r in proxy.requests)


@pytest.mark.parametrize("scheme", STORES)
def test_a_store_that_stays_down_is_given_up(
    folder: Callable[[str], str], servers: Servers, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, proxy = f"{folder(scheme)}/a", servers.proxies[scheme]
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.01)
    proxy.choose = lambda *_: "503"
    with pytest.raises(TimeoutError, match=rf"failed {ATTEMPTS} times in a row \(HTTP 503"):
        storage.read(path)
    assert len(proxy.requests) == ATTEMPTS


@pytest.mark.parametrize("scheme", STORES)
def test_a_store_that_cannot_be_reached_is_tried_again(
    folder: Callable[[str], str],
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And an error that may pass."""
    path, (port,) = f"{folder(scheme)}/a", free_ports(1)
    monkeypatch.setattr("beam_nifti.storage.object_store.FIRST_WAIT", 0.01)
    monkeypatch.setattr(stores, "_stores", {})
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    with pytest.raises(TimeoutError, match=rf"failed {ATTEMPTS} times in a row"):
        storage.read(path)
    (record,) = (r for r in caplog.records if r.name == "beam_nifti")
    assert record.getMessage().startswith(f"127.0.0.1:{port} cannot be reached (connection refused); trying")


@pytest.mark.parametrize("scheme", STORES)
def test_what_is_not_finished_does_not_appear(folder: Callable[[str], str], scheme: str) -> None:
    path = f"{folder(scheme)}/a"
    storage.write(path, b"old")
    for size in (10, len(LARGE)):
        with contextlib.suppress(KeyboardInterrupt), storage.create(path) as handle:
            handle.write(LARGE[:size])
            raise KeyboardInterrupt
        assert storage.read(path) == b"old"
    with storage.create(path) as handle:
        handle.write(LARGE)
        assert storage.read(path) == b"old"
    assert storage.read(path) == LARGE


@pytest.mark.parametrize("scheme", STORES)
def test_a_large_file_is_judged_by_its_head(
    folder: Callable[[str], str], servers: Servers, scheme: str
) -> None:
    """Of a download that is no image, no more is read than the store sends before it can be stopped."""
    path = f"{folder(scheme)}/a.nii"
    with storage.create(path) as handle:
        for _ in range(9):
            handle.write(bytes(10 << 20))
    with pytest.raises(VolumeError, match="zeros where a header should be"):
        load_volume(row_of(path))


def test_unfinished_uploads_are_taken_back(folder: Callable[[str], str], servers: Servers) -> None:
    path = f"{folder('s3')}/a"
    with contextlib.suppress(ZeroDivisionError), storage.create(path) as handle:
        handle.write(LARGE)
        raise ZeroDivisionError
    methods = [r.method for r in servers.proxies["s3"].rest() if "uploadId" in r.query]
    assert methods[0] == "PUT"
    assert methods[-1] == "DELETE"
    assert not storage.exists(path)
