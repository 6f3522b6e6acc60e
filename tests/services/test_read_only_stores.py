"""Reading from servers on this machine: Azure Blob Storage (Azurite), HDFS and files on the web (aiohttp)."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import pickle
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from beam_nifti.errors import DatasetError
from beam_nifti.random_access import Dataset
from beam_nifti.storage import paths as storage
from tests.datasets import read_without_beam_and_fork
from tests.services.conftest import INSTALL_TIMEOUT, Reference, content_of, run_cli
from tests.services.fault_proxy import FaultProxy, Request
from tests.services.stores import free_ports

pytest.importorskip("adlfs", reason="adlfs is not installed; pip install beam-nifti[azure]")

SCRIPT = Path(__file__).parents[2] / "scripts/azure_hdfs"
SCHEMES = ("az", "hdfs", "http")
LISTED = ("az", "hdfs")
PATIENCE = 60.0
"""Seconds in which a server starts."""

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Those that every Azurite has, as Microsoft publishes them."""


@dataclass(frozen=True)
class Served:
    """What the three servers have: a dataset of sixty records, and the cohort that it was built from.

    Attributes:
        folders: by scheme the URL of the folder that holds "dataset" and "cohort".
        proxies: by scheme, in front of its server.
        local: the same folder on the disk.
    """

    folders: dict[str, str]
    proxies: dict[str, FaultProxy]
    local: Path


@contextlib.contextmanager
def run_server(name: str, port: int, folder: Path) -> Iterator[None]:
    folder.mkdir()
    with (folder.parent / f"{name}.log").open("wb") as log:
        command = [SCRIPT, name, str(port), str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    probe = {"azurite": f"{ACCOUNT}?comp=list", "hdfs": "webhdfs/v1/?op=LISTSTATUS"}[name]
    try:
        end = time.monotonic() + PATIENCE
        while not answers(f"http://127.0.0.1:{port}/{probe}"):
            assert time.monotonic() < end, f"{name} does not answer"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                raise AssertionError((folder.parent / f"{name}.log").read_text())
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE / 10):
            return True
    except urllib.error.HTTPError as e:
        return e.code == 403  # by Azurite, which does not know who asks
    except OSError:
        return False


@contextlib.contextmanager
def run_web_server(port: int, folder: Path) -> Iterator[None]:
    from aiohttp import web

    started, loop = threading.Event(), asyncio.new_event_loop()

    async def run() -> None:
        application = web.Application()
        application.router.add_static("/lab", folder)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        started.set()
        await stopped.wait()
        await runner.cleanup()

    stopped = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert started.wait(PATIENCE), "the web server does not start"
    yield
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


def connection_string(port: int, key: str = KEY) -> str:
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={endpoint};"


def upload(local: Path, hdfs_port: int) -> None:
    """Copy a folder into Azure's container "lab" and HDFS's folder "/lab"."""
    import fsspec
    import requests

    azure = fsspec.filesystem("az")
    azure.mkdir("lab")

    def put(path: Path) -> None:
        name, content = path.relative_to(local), path.read_bytes()
        azure.pipe_file(f"lab/{name}", content)
        query = {"op": "CREATE", "user.name": getpass.getuser()}
        url = f"http://127.0.0.1:{hdfs_port}/webhdfs/v1/lab/{name}"
        requests.put(url, params=query, data=content, timeout=PATIENCE).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, (p for p in local.rglob("*") if p.is_file())))


@pytest.fixture(scope="module")
def served(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    subprocess.run([SCRIPT, "install"], check=True, timeout=INSTALL_TIMEOUT)
    run, ports = tmp_path_factory.mktemp("servers"), free_ports(3)
    local = reference.manifest.parent.parent
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(run_server("azurite", ports[0], run / "azurite"))
        stack.enter_context(run_server("hdfs", ports[1], run / "hdfs"))
        stack.enter_context(run_web_server(ports[2], local))
        proxies = {scheme: FaultProxy(port) for scheme, port in zip(SCHEMES, ports, strict=True)}
        for proxy in proxies.values():
            stack.callback(proxy.close)
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(proxies["az"].port))
        upload(local, ports[1])
        folders = {
            "az": "az://lab",
            "hdfs": f"hdfs://127.0.0.1:{proxies['hdfs'].port}/lab",
            "http": f"{proxies['http'].url}/lab",
        }
        yield Served(folders, proxies, local)


@pytest.fixture(autouse=True)
def _rested(served: Served) -> None:
    for proxy in served.proxies.values():
        proxy.rest()


def asked_bytes(request: Request) -> int:
    """The bytes that a request asked for; the proxy sees that a DataNode gives them, but not how many."""
    return int(request.query["length"]) if request.status == 307 else request.received


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_record_by_number_is_one_request(served: Served, scheme: str) -> None:
    records = pickle.loads(pickle.dumps(Dataset(f"{served.folders[scheme]}/dataset")))
    expected = Dataset(served.local / "dataset")
    lengths = expected.index(["length"])["length"].to_pylist()
    served.proxies[scheme].rest()
    for number in range(len(expected)):
        assert records[number]["image"].tobytes() == expected[number]["image"].tobytes()
    requests = served.proxies[scheme].rest()
    assert {r.method for r in requests} == {"GET"}
    assert [asked_bytes(r) for r in requests] == lengths


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_forked_process_reads_on_and_nothing_loads_beam(served: Served, scheme: str) -> None:
    read_without_beam_and_fork(f"{served.folders[scheme]}/dataset")


@pytest.mark.tf
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_epoch_of_tensorflow(served: Served, scheme: str) -> None:
    load_dataset = pytest.importorskip("beam_nifti.reader", exc_type=ImportError).load_dataset
    options = {"batch_size": 7, "shuffle": True, "seed": 1}
    dataset = load_dataset(f"{served.folders[scheme]}/dataset", **options)
    served.proxies[scheme].rest()
    images = [x.numpy().tobytes() for x, _ in dataset]
    assert images == [x.numpy().tobytes() for x, _ in load_dataset(served.local / "dataset", **options)]
    # At its beginning it looks whether the dataset is still the one that was opened.
    of_shards = [r for r in served.proxies[scheme].rest() if "dataset_info.json" not in r.path]
    assert len(of_shards) == len(Dataset(served.local / "dataset"))


@pytest.mark.parametrize("scheme", LISTED)
def test_images_are_built_from_there_into_a_local_folder(
    served: Served, reference: Reference, tmp_path: Path, scheme: str
) -> None:
    manifest = f"{served.folders[scheme]}/cohort/{reference.manifest.name}"
    run_cli(["build", manifest, str(tmp_path / "out"), *reference.flags, "--workers=2"])
    shards = {name: digest for name, digest in reference.content.items() if ".tfrecord" in name}
    assert shards.items() <= content_of(tmp_path / "out").items()
    said = run_cli(["verify", f"{served.folders[scheme]}/dataset", f"--manifest={manifest}", "--deep=3"])
    assert "ok       60 examples, 12 shards" in said


@pytest.mark.parametrize("scheme", LISTED)
def test_files_are_listed_as_on_the_disk(served: Served, scheme: str) -> None:
    there, here = served.folders[scheme], str(served.local)
    for folder in ("dataset", "dataset/index", "cohort", "missing"):
        assert storage.list_files(f"{there}/{folder}") == storage.list_files(f"{here}/{folder}")
        assert storage.exists(f"{there}/{folder}") == storage.exists(f"{here}/{folder}")
    assert storage.list_folders(f"{there}/dataset") == storage.list_folders(f"{here}/dataset") == ["index"]
    trees = [sorted(storage.list_tree(folder, "coh", 2)) for folder in (there, here)]
    assert trees[0] == trees[1]
    assert len(trees[0]) == 61
    for pattern in ("cohort/sub-000*.nii.gz", "**/*-00000-of-*.parquet"):
        found = [path.removeprefix(f"{there}/") for path in storage.glob(f"{there}/{pattern}")]
        assert found == [path.removeprefix(f"{here}/") for path in storage.glob(f"{here}/{pattern}")]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_place_without_a_dataset(served: Served, scheme: str) -> None:
    with pytest.raises(DatasetError, match=r"no complete dataset here \(dataset_info.json is missing\)"):
        Dataset(f"{served.folders[scheme]}/cohort")
    with pytest.raises(OSError, match=rf"{scheme}:// is read-only; write to the local disk, s3:// or gs://"):
        storage.write(f"{served.folders[scheme]}/new", b"")


def test_a_container_that_is_not_there(served: Served) -> None:
    with pytest.raises(DatasetError, match="no complete dataset here"):
        Dataset("az://another/dataset")


@pytest.mark.parametrize(
    ("key", "message"),
    [("AAAA", "access is denied"), (None, "Must provide either a connection_string or account_name")],
)
def test_wrong_credentials_are_not_a_missing_dataset(
    served: Served, monkeypatch: pytest.MonkeyPatch, key: str | None, message: str
) -> None:
    from adlfs import AzureBlobFileSystem

    name = "AZURE_STORAGE_CONNECTION_STRING"
    if key is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, connection_string(served.proxies["az"].port, key))
    AzureBlobFileSystem.clear_instance_cache()  # as it looks at its environment once
    with pytest.raises(DatasetError, match=rf"dataset_info.json: cannot be reached .*{message}"):
        Dataset("az://lab/dataset")
    AzureBlobFileSystem.clear_instance_cache()


def test_a_file_that_others_may_not_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    url = served.folders["hdfs"].replace("hdfs://", "http://").replace("/lab", "/webhdfs/v1/lab")
    rights = {"op": "SETPERMISSION", "permission": "600", "user.name": getpass.getuser()}
    name = "cohort/sub-0059.nii.gz"
    requests.put(f"{url}/{name}", params=rights, timeout=PATIENCE).raise_for_status()
    path = f"{served.folders['hdfs']}/{name}"
    monkeypatch.setenv("HADOOP_USER_NAME", "somebody")
    with pytest.raises(PermissionError, match=r"access is denied \(HTTP 403 AccessControlException"):
        storage.read(path)
    monkeypatch.setenv("HADOOP_USER_NAME", getpass.getuser())
    assert storage.read(path) == (served.local / name).read_bytes()


def test_a_port_of_something_else_is_not_a_missing_dataset(served: Served) -> None:
    other = served.folders["hdfs"].replace(str(served.proxies["hdfs"].port), str(served.proxies["http"].port))
    with pytest.raises(
        DatasetError, match=r"cannot be reached .*port must be that of the NameNode's web page"
    ):
        Dataset(f"{other}/dataset")
