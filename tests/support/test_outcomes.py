"""Each cause has its exit code, and what can be refused before the work is."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from beam_nifti import errors
from beam_nifti.cli import main as cli
from beam_nifti.storage import paths as storage
from beam_nifti.support.outcomes import FAILED, SUCCESS, TEMPORARY, USAGE, engine_outcome, exit_code
from tests.images import write_cohort, write_image, write_manifest


class Unknown(Exception):
    """Of a library that the launching process may not know."""


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/a")


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


CAUSES: list[tuple[Exception, int]] = [
    (os_error(errno.EACCES), USAGE),
    (os_error(errno.EPERM), USAGE),
    (os_error(errno.EROFS), USAGE),
    (os_error(errno.ENOENT), USAGE),
    (os_error(errno.ENOTDIR), USAGE),
    (os_error(errno.EISDIR), USAGE),
    (os_error(errno.ENAMETOOLONG), USAGE),
    (os_error(errno.EINVAL), USAGE),
    (os_error(errno.EFBIG), USAGE),
    (OSError("s4://b/x: s4:// is not supported here"), USAGE),
    (os_error(errno.ENOSPC), TEMPORARY),
    (os_error(errno.EDQUOT), TEMPORARY),
    (os_error(errno.EIO), TEMPORARY),
    (os_error(errno.ESTALE), TEMPORARY),
    (os_error(errno.EMFILE), TEMPORARY),
    (os_error(errno.ETIMEDOUT), TEMPORARY),
    (os_error(errno.ECONNREFUSED), TEMPORARY),
    (os_error(errno.ENETUNREACH), TEMPORARY),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), TEMPORARY),
    (MemoryError(), TEMPORARY),
    (errors.OutputBusyError("busy"), TEMPORARY),
    (errors.ManifestChangedError("m.tsv", ["changed"]), TEMPORARY),
    (errors.PartsChangedError("parts"), TEMPORARY),
    (errors.OutputError("foreign"), USAGE),
    (errors.UsageError("--x"), USAGE),
    (errors.ManifestError("m.tsv", ["row 1: no\nTypeError: in a cell"]), USAGE),
    (errors.DatasetError("none"), FAILED),
    (errors.ShardError("damaged"), FAILED),
    (caused(errors.ShardError("damaged"), os_error(errno.ETIMEDOUT)), TEMPORARY),
    (caused(errors.DatasetError("not read"), os_error(errno.EACCES)), FAILED),
    (caused(errors.UsageError("it called sys.exit()"), SystemExit("bye")), USAGE),
    (ModuleNotFoundError("No module named 'lab'"), USAGE),
    (TypeError("a bug"), FAILED),
    (KeyError("bug"), FAILED),
    (AssertionError(), FAILED),
    (NotImplementedError("bug"), FAILED),
    (Unknown("?"), TEMPORARY),
]
"""What stops a command, and the exit code: 75 only for what may pass when it is tried again."""

IDS = [f"{type(e).__name__}-{i}" for i, (e, _) in enumerate(CAUSES)]


def fail(number: int) -> None:
    error = CAUSES[number][0]
    try:
        if error.__cause__ is not None:
            raise error.__cause__
    except BaseException as e:
        raise error from e
    raise error


IN_PROCESS = [0, 9, 10, 17, 18, 19, 20, 23, 24, 26, 27, 29, 30, 31, 33, 35]
"""Of CAUSES, one of each way in which Beam brings an exception back."""


@pytest.mark.parametrize("mode", ["multi_threading", "in_memory"])
def test_a_workers_error_has_the_exit_code_of_its_cause(
    mode: str, local_flags: Callable[..., list[str]]
) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    codes = {}
    # In memory some come back as they are.
    numbers = IN_PROCESS if mode == "multi_threading" else [0, 18]
    for number in numbers:
        pipeline = beam.Pipeline(options=PipelineOptions(local_flags(mode=mode)))
        pipeline | "Create" >> beam.Create([number]) | "Fail" >> beam.Map(fail)
        try:
            pipeline.run()
        except Exception as e:
            outcome = engine_outcome(e)
            codes[number] = outcome and outcome.code
    assert codes == {number: CAUSES[number][1] for number in numbers}


@pytest.mark.parametrize(
    ("error", "code"), [c for c in CAUSES if isinstance(c[0], OSError | errors.BeamNiftiError)]
)
def test_an_error_of_the_launching_process_has_the_same_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("number", range(len(CAUSES)), ids=IDS)
def test_a_clusters_report_has_the_exit_code_of_its_cause(number: int) -> None:
    error, code = CAUSES[number]
    text = "".join(traceback.format_exception(_raised(number))).replace(
        "Traceback",
        "java.lang.RuntimeException: Error received from SDK harness for instruction 7: Traceback",
    )
    text = (
        f"BeamApp failed in state FAILED: {text}\n\n\tat org.apache.beam.sdk.util.MoreFutures.get(M.java)\n"
    )
    outcome = engine_outcome(RuntimeError(text))
    assert outcome is not None
    assert outcome.code == code
    assert "\tat " not in outcome.reason
    assert "beam_nifti" not in outcome.reason
    assert str(error).partition("\n")[0] in outcome.reason


def _raised(number: int) -> Exception:
    try:
        fail(number)
    except Exception as e:
        return e
    raise AssertionError


def test_an_engine_that_names_no_cause_may_do_better_next_time() -> None:
    outcome = engine_outcome(RuntimeError("Pipeline x failed in state FAILED:\nTaskManager lost"))
    assert outcome is not None
    assert (outcome.code, outcome.reason) == (TEMPORARY, "TaskManager lost")
    assert engine_outcome(ZeroDivisionError("of this process")) is None


# Job servers


@pytest.mark.parametrize(
    ("status", "code"), [("INVALID_ARGUMENT", USAGE), ("UNAUTHENTICATED", USAGE), ("INTERNAL", TEMPORARY)]
)
def test_what_a_job_server_answers(status: str, code: int) -> None:
    import grpc

    class Refuse(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(grpc.StatusCode[status], "such a job")
            )

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refuse()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/job/Prepare")(b"")
    server.stop(None).wait()
    outcome = engine_outcome(caught.value)
    assert outcome is not None
    assert (outcome.code, outcome.reason) == (code, f"the job server: {status}, such a job")


def test_a_job_server_that_does_not_answer_may_do_so_later(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listening:  # and never accepting
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        flags = ["--runner=PortableRunner", f"--job-endpoint={address}", "--environment-type=LOOPBACK"]
        argv = ["build", str(cohort), str(tmp_path / "out"), "--quiet", *flags, "--job-server-timeout=1"]
        assert cli.main(argv) == TEMPORARY
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "the build stopped: the job server does not answer; run the same command again, which continues"
        in line
    )


# Paths that cannot be written, before the work


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outcomes")
    manifest = write_cohort(folder / "cohort", 2)
    assert cli.main(["build", str(manifest), str(folder / "out"), "--quiet"]) == SUCCESS
    return folder / "out"


def unwritable_file(kind: str, folder: Path) -> str:
    """A path to which no file can be written, and which may end in ".json" or ".prom"."""
    if kind == "a file above":
        (folder / "file").write_text("")
        return f"{folder}/file/sub/x"
    if kind == "a link to nothing above":
        (folder / "link").symlink_to("nothing")
        return f"{folder}/link/x"
    if kind == "a name too long":
        return f"{folder}/{'x' * 230}"
    if kind == "no rights":
        (folder / "closed").mkdir(mode=0o500)
        return f"{folder}/closed/x"
    return "/proc/nope/x" if kind == "no file system for it" else f"{folder}/taken"


KINDS = ["a file above", "a link to nothing above", "a name too long", "no file system for it"]
KINDS += ["a folder there"] + (["no rights"] if os.geteuid() else [])
COMMANDS: dict[str, tuple[str, str]] = {
    "build MANIFEST out --summary-json PATH": ("--summary-json", ".json"),
    "build MANIFEST out --dry-run --summary-json PATH": ("--summary-json", ".json"),
    "build MANIFEST out --metrics-file PATH": ("--metrics-file", ".prom"),
    "check MANIFEST --out PATH": ("--out", ".json"),
    "check MANIFEST --summary-json PATH": ("--summary-json", ".json"),
    "verify DATASET --summary-json PATH": ("--summary-json", ".json"),
    "report DATASET --out PATH": ("--out", ".html"),
    "view DATASET --id sub-0000 --out PATH --overwrite": ("--out", ".html"),
    "extract DATASET --id sub-0000 --out PATH --overwrite": ("--out", ".nii"),
    "manifest glob IMAGES --out PATH --overwrite": ("--out", ".tsv"),
}


def arguments(command: str, places: dict[str, object]) -> list[str]:
    return [str(places.get(word, word)) for word in command.split()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    dataset: Path, tmp_path: Path, command: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, ending = COMMANDS[command]
    path = unwritable_file(kind, tmp_path) + ending
    if kind == "a folder there":
        Path(path).mkdir()
    before = sorted(tmp_path.rglob("*"))
    # Of whose images none is there, as the work would complain of.
    manifest = write_manifest(tmp_path.with_suffix(".tsv"), [{"path": "missing.nii", "label": "1"}])
    places: dict[str, object] = {"MANIFEST": manifest, "DATASET": dataset, "PATH": path}
    assert cli.main(arguments(command, {**places, "IMAGES": f"{tmp_path}/**/*.nii"})) == USAGE
    said = capsys.readouterr().err
    assert said.startswith(f"beam-nifti: error: {flag} is {path}")
    assert len(said.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("flag", ["OUTPUT", "--temp-location"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, flag: str, dry: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unwritable_file(kind, tmp_path)
    if kind == "a folder there":
        Path(path).write_text("or rather a file where a folder must go")
    if kind == "a name too long":
        path += "x" * 30
    before = sorted(tmp_path.rglob("*"))
    manifest = write_manifest(tmp_path.with_suffix(".tsv"), [{"path": "missing.nii", "label": "1"}])
    output = [path] if flag == "OUTPUT" else [str(tmp_path / "out"), f"--temp-location={path}"]
    assert cli.main(["build", str(manifest), *output, "--quiet", *dry]) == USAGE
    said = capsys.readouterr().err
    assert said.startswith(f"beam-nifti: error: {flag} is {path}, which cannot be written: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "obstacle",
    [
        "dataset_info.json/",
        "failures.jsonl/",
        "train-00000-of-00001.tfrecord.gz/",
        "index/train-00000-of-00001.parquet/",
        ".lock/",
        ".build/plan.json/",
        ".build/write.json/",
        "dataset_info.json|",
        ".lock|",
        ".build/plan.json|",
        ".build/write.json|",
        "index",
        ".build",
    ],
)
def test_what_is_in_the_way_in_output_is_named_before_the_work(
    cohort: Path, tmp_path: Path, obstacle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / obstacle.rstrip("|")
    path.parent.mkdir(parents=True, exist_ok=True)
    if obstacle.endswith("|"):
        os.mkfifo(path)
    elif obstacle.endswith("/"):
        (path / "kept").mkdir(parents=True)
    else:
        path.write_text("kept")
    for more in ([], ["--overwrite"], ["--dry-run"]):
        assert cli.main(["build", str(cohort), str(tmp_path / "out"), "--quiet", *more]) == USAGE
        assert f"OUTPUT/{obstacle.rstrip('/|')} is {path}" in capsys.readouterr().err
    assert path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "{manifest}", "--out={path}.json"],
        ["check", "{manifest}", "--summary-json={path}.json"],
        ["manifest", "glob", "{folder}/*.nii", "--out={path}.csv", "--overwrite"],
    ],
)
def test_a_fifo_or_device_is_not_replaced_by_a_file(
    cohort: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for ending in ("", ".csv", ".json"):
        os.mkfifo(tmp_path / f"result{ending}")
    names = {"manifest": cohort, "folder": cohort.parent, "path": tmp_path / "result"}
    assert cli.main([argument.format(**names) for argument in arguments]) == USAGE
    assert "which cannot be written: it is a FIFO; choose another file" in capsys.readouterr().err
    assert all(path.is_fifo() for path in tmp_path.glob("result*"))


def test_a_metrics_file_needs_its_folder(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["build", str(cohort), str(tmp_path / "out"), f"--metrics-file={tmp_path}/textfile/a.prom"]
    assert cli.main(argv) == USAGE
    assert f"there is no folder {tmp_path}/textfile; create it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_text_is_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", str(cohort), os.fsdecode(b"/tmp/caf\xe9")]) == USAGE
    assert r"b'/tmp/caf\xe9' is not UTF-8" in capsys.readouterr().err


def test_without_utf8_names_of_other_letters_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write_image(tmp_path / "é.nii")
    (tmp_path / "m.tsv").write_text("path\né.nii\n", encoding="utf-8")
    (tmp_path / "ö.tsv").write_text("path\né.nii\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, named in (("m.tsv", r"row 1: path is '\xe9.nii', which"), ("ö.tsv", r"/\xf6.tsv")):
        command = [sys.executable, "-m", "beam_nifti", "check", tmp_path / name]
        ended = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, check=False)
        said = ended.stderr.decode()
        assert ended.returncode == USAGE, said
        assert f"{named} cannot be opened, because file names are in ascii here; set PYTHONUTF8=1" in said


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    storage.require_writable(f"{tmp_path}/there", "--out")
    storage.require_writable(f"{tmp_path}/a/b/c", "--out")
    storage.require_writable(f"{tmp_path}/a/b/c", "OUTPUT", is_folder=True)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_a_full_disk_may_have_room_later_and_names_the_file() -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device \(.*B free there\): '/dev/full'") as caught,
        storage.naming("/dev/full"),
        open("/dev/full", "wb", buffering=0) as handle,
    ):
        handle.write(b"x")
    assert exit_code(caught.value) == TEMPORARY


# Stores


@pytest.fixture
def store() -> Iterator[Callable[[str, int], None]]:
    """An object store whose writes below a path fail: `store("memory://b/tmp", errno.EACCES)`."""
    from tests.object_store import MemoryFileSystem

    refused: dict[str, int] = {}
    create = MemoryFileSystem.create

    def refuse(self: MemoryFileSystem, path: str, *arguments: str, **more: str) -> Any:
        for prefix, number in refused.items():
            if path.startswith(prefix):
                raise OSError(number, os.strerror(number), path)
        return create(self, path, *arguments, **more)

    MemoryFileSystem.objects.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "create", refuse)
        yield refused.__setitem__
    MemoryFileSystem.objects.clear()


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, USAGE), (errno.ENOENT, USAGE), (errno.ETIMEDOUT, TEMPORARY)]
)
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("build MANIFEST memory://b/no/out", "OUTPUT is memory://b/no/out"),
        ("build MANIFEST memory://b/out --temp-location memory://b/no", "--temp-location is memory://b/no"),
        (
            "build MANIFEST memory://b/out --summary-json memory://b/no.json",
            "--summary-json is memory://b/no",
        ),
        ("check MANIFEST --out memory://b/no.json", "--out is memory://b/no.json"),
    ],
)
def test_a_store_that_takes_nothing(
    cohort: Path,
    store: Callable[[str, int], None],
    command: str,
    says: str,
    number: int,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store("memory://b/no", number)
    assert cli.main([*arguments(command, {"MANIFEST": cohort}), "--quiet"]) == code
    said = capsys.readouterr().err
    assert f"beam-nifti: error: {says}" in said
    assert os.strerror(number) in said
    assert "Traceback" not in said
    assert storage.list_files("memory://b") == storage.list_files("memory://b/out") == []


READS = [
    ("build MANIFEST memory://b/out", "index/"),
    ("verify memory://b/out", "index/"),
    ("verify memory://b/out", "train-"),
    ("report memory://b/out --out PAGE", "index/"),
    ("report memory://b/out --out PAGE", "train-"),
    ("inspect memory://b/out", "index/"),
    ("inspect memory://b/out", "dataset_info.json"),
    ("extract memory://b/out --id sub-0000 --out IMAGE", "train-"),
    ("view memory://b/out --id sub-0000 --out PAGE", "train-"),
    ("diff memory://b/out memory://b/out", "index/"),
    ("card memory://b/out", "index/"),
]


@pytest.mark.parametrize(("command", "name"), READS, ids=[f"{c.split()[0]} {name}" for c, name in READS])
def test_a_store_that_keeps_failing_is_no_fault_of_the_dataset(
    dataset: Path,
    tmp_path: Path,
    command: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.object_store import MemoryFileSystem

    open_object = MemoryFileSystem.open

    def fail(self: MemoryFileSystem, path: str, *arguments: str, **more: str) -> Any:
        if path.startswith(f"memory://b/out/{name}"):
            raise TimeoutError(errno.ETIMEDOUT, "the store failed 8 times in a row (HTTP 503)", path)
        return open_object(self, path, *arguments, **more)

    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    MemoryFileSystem.objects.clear()
    for path in dataset.rglob("*.*"):
        storage.write(f"memory://b/out/{path.relative_to(dataset)}", path.read_bytes())
    places: dict[str, object] = {"PAGE": tmp_path / "a.html", "IMAGE": tmp_path / "a.nii"}
    argv = arguments(command, {**places, "MANIFEST": dataset.parent / "cohort" / "manifest.tsv"})
    assert cli.main(argv) == TEMPORARY
    MemoryFileSystem.objects.clear()
    said = capsys.readouterr().err
    assert "the store failed 8 times in a row" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("scheme", ["https", "hdfs", "az", "nowhere"])
def test_a_store_that_is_only_read(cohort: Path, capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    url = f"{scheme}://lab/out.json"
    for argv, what in (
        (["build", str(cohort), url], "OUTPUT"),
        (["build", str(cohort), url, "--dry-run"], "OUTPUT"),
        (["build", str(cohort), "out", f"--temp-location={url}"], "--temp-location"),
        (["check", str(cohort), f"--out={url}"], "--out"),
    ):
        assert cli.main([*argv, "--quiet"]) == USAGE
        problem = "not supported" if scheme == "nowhere" else "read-only"
        remedy = f"is {problem}; write to the local disk, s3:// or gs://"
        assert f"error: {what} is {url}: {scheme}:// {remedy}\n" in capsys.readouterr().err
