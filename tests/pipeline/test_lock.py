"""One build at a time in one output, and no dead build in the way of the next."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beam_nifti.cli import main as cli
from beam_nifti.errors import OutputBusyError, OutputError
from beam_nifti.pipeline.lock import LOCK_FILE, hold, require_held, this_system
from beam_nifti.storage import paths as storage

_HOLD = """
import sys
from beam_nifti.pipeline.lock import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path / "out"` until its standard input ends."""
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_ends(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    output = str(tmp_path / "out")
    with (
        pytest.raises(OutputError, match=f"{output}: another command is writing here"),
        hold(output),
    ):
        pass
    holder.communicate()
    assert holder.returncode == 0
    with hold(output):
        pass


def test_a_killed_holder_frees_it_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / LOCK_FILE).exists()
    with hold(str(tmp_path / "out")):
        pass


def test_a_second_build_of_one_process_is_refused_too(tmp_path: Path) -> None:
    with hold(str(tmp_path)):
        with pytest.raises(OutputError, match="another command"), hold(str(tmp_path)):
            pass
        with hold(str(tmp_path / "other")):
            pass
        with pytest.raises(OutputError, match="another command"), hold(str(tmp_path)):
            pass


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold(str(tmp_path)):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_of_many_processes_that_want_it_each_has_it_alone(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from beam_nifti.errors import OutputError
from beam_nifti.pipeline.lock import hold
folder, done = Path(sys.argv[1]), 0
while done < 40:
    try:
        with hold(str(folder)):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            done += 1
    except OutputError:
        continue
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate()[1] for process in processes]
    assert results == ["", "", ""]


OUTPUT = "memory://bucket/out"
LEASE = f"{OUTPUT}/{LOCK_FILE}"


@pytest.fixture
def store() -> Iterator[None]:
    from tests.object_store import MemoryFileSystem

    MemoryFileSystem.objects.clear()
    yield
    MemoryFileSystem.objects.clear()


def write_lease(age: float, **facts: object) -> None:
    """A lease that was written some seconds ago, by the store's clock."""
    from tests.object_store import MemoryFileSystem

    lease = json.dumps({"token": "x", **facts}).encode()
    MemoryFileSystem.objects[LEASE] = (lease, MemoryFileSystem.now() - age)


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.usefixtures("store")
def test_a_lease_is_held_and_given_back() -> None:
    with hold(OUTPUT):
        assert storage.exists(LEASE)
        with (
            pytest.raises(OutputError, match=f"{OUTPUT}: a build or conversion on .* is writing here"),
            hold(OUTPUT),
        ):
            pass
        require_held(OUTPUT)
    assert storage.list_files(OUTPUT) == []
    require_held(OUTPUT)  # of nobody


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("hours", [-3, 0, 0.1, 3])
def test_the_age_of_a_lease_is_that_of_the_stores_clock(
    hours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine's clock says, and whatever that of the lease's machine said."""
    from tests.object_store import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "ahead", 3600 * hours)
    write_lease(100, host="another-machine", pid=1, time=time.time() - 1000)
    with (
        pytest.raises(OutputBusyError, match=r"a build or conversion on another-machine .* 100 s ago"),
        hold(OUTPUT),
    ):
        pass
    write_lease(200, host="another-machine", pid=1, time=time.time() + 1000)
    with hold(OUTPUT):
        pass


@pytest.mark.usefixtures("store")
def test_a_store_that_keeps_no_times_leaves_it_to_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.object_store.MemoryFileSystem.now", lambda: 0.0)
    write_lease(0, host="another-machine", pid=1)
    with pytest.raises(OutputBusyError, match=f"or, if it died, remove {LEASE}"), hold(OUTPUT):
        pass


@pytest.mark.usefixtures("store")
def test_only_a_process_of_this_system_can_be_known_to_be_gone(gone: int) -> None:
    """Containers may share a host name, and number their processes apart."""
    host = socket.gethostname()
    for system in (None, f"{this_system()}0", "another"):
        write_lease(1, host=host, pid=gone, system=system)
        with pytest.raises(OutputBusyError), hold(OUTPUT):
            pass
    write_lease(1, host=host, pid=gone, system=this_system())
    with hold(OUTPUT):
        assert json.loads(storage.read(LEASE))["pid"] == os.getpid()


@pytest.mark.usefixtures("store")
def test_a_process_that_has_the_number_of_a_dead_one_is_not_it() -> None:
    with hold(OUTPUT):
        lease = json.loads(storage.read(LEASE))
    write_lease(1, **lease)
    with pytest.raises(OutputBusyError), hold(OUTPUT):
        pass
    write_lease(1, **lease | {"started": lease["started"] - 1})
    with hold(OUTPUT):
        pass


@pytest.mark.usefixtures("store")
def test_a_lease_of_a_process_that_no_system_can_have_is_free() -> None:
    write_lease(1, pid=1 << 70, started=1, system=this_system())
    with hold(OUTPUT):
        pass


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"", b"[" * 50_000, b'{"host": "' + b"x" * (1 << 22) + b'"}']
)
def test_a_lease_that_nobody_understands_ends_too(content: bytes) -> None:
    from tests.object_store import MemoryFileSystem

    storage.write(LEASE, content)
    with pytest.raises(OutputBusyError, match="a build or conversion on another machine"), hold(OUTPUT):
        pass
    MemoryFileSystem.objects[LEASE] = (content, MemoryFileSystem.now() - 200)
    with hold(OUTPUT):
        pass


@pytest.mark.usefixtures("store")
def test_a_build_whose_lease_was_taken_says_so_and_leaves_the_taker_alone() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(OUTPUT))
        write_lease(0, host="another-machine", pid=1)
        for look in (lambda: require_held(OUTPUT), stack.close):
            with pytest.raises(OutputBusyError, match="another command took this output"):
                look()
    assert json.loads(storage.read(LEASE))["host"] == "another-machine"


@pytest.mark.usefixtures("store")
def test_a_build_that_has_lost_its_output_publishes_nothing(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(*_: object) -> None:
        write_lease(0, host="another-machine", pid=1)

    # Between the check for another plan and the publication, as after a night in which the machine slept.
    monkeypatch.setattr("beam_nifti.pipeline.transforms.require_current", take)
    assert cli.main(["build", str(cohort), OUTPUT, "--quiet"]) == cli.TEMPORARY
    assert "another command took this output" in capsys.readouterr().err
    assert not storage.exists(f"{OUTPUT}/dataset_info.json")
    assert json.loads(storage.read(LEASE))["host"] == "another-machine"


@pytest.mark.usefixtures("store")
def test_a_store_without_the_bucket_is_no_busy_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, *_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such bucket", path)

    monkeypatch.setattr(storage, "write_if", fail)
    with pytest.raises(OutputError, match=f"^OUTPUT is {OUTPUT}, .*: No such bucket") as caught, hold(OUTPUT):
        pass
    assert not isinstance(caught.value, OutputBusyError)
