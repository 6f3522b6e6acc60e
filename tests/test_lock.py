"""One build at a time in one output, and no dead build in the way of the next."""

from __future__ import annotations

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

from beam_nifti import storage
from beam_nifti.errors import OutputError
from beam_nifti.lock import LOCK_FILE, hold

_HOLD = """
import sys
from beam_nifti.lock import hold
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
    with pytest.raises(OutputError, match=f"{output}: another build is writing here"), hold(output):
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
        with pytest.raises(OutputError, match="another build"), hold(str(tmp_path)):
            pass
        with hold(str(tmp_path / "other")):
            pass
        with pytest.raises(OutputError, match="another build"), hold(str(tmp_path)):
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
from beam_nifti.lock import hold
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


def write_lease(host: str, pid: int, age: float) -> None:
    lease = {"token": "x", "host": host, "pid": pid, "time": time.time() - age}
    storage.write(LEASE, json.dumps(lease).encode())


@pytest.mark.usefixtures("store")
def test_a_lease_is_held_and_given_back() -> None:
    with hold(OUTPUT):
        assert storage.exists(LEASE)
        with pytest.raises(OutputError, match=f"{OUTPUT}: a build on .* was writing here"), hold(OUTPUT):
            pass
    assert not storage.exists(LEASE)


@pytest.mark.usefixtures("store")
def test_a_living_lease_of_another_machine_is_respected() -> None:
    write_lease("another-machine", 1, age=100)
    message = "a build on another-machine was writing here 100 s ago"
    with pytest.raises(OutputError, match=message), hold(OUTPUT):
        pass


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("kind", ["old", "dead process", "damaged", "not an object"])
def test_a_dead_lease_is_taken_over(kind: str) -> None:
    if kind == "old":
        write_lease("another-machine", 1, age=1000)
    elif kind == "dead process":
        done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                              capture_output=True, check=True)  # fmt: skip
        write_lease(socket.gethostname(), int(done.stdout), age=1)
    else:
        storage.write(LEASE, b"{" if kind == "damaged" else b"[]")
    with hold(OUTPUT):
        assert json.loads(storage.read(LEASE))["pid"] == os.getpid()


@pytest.mark.usefixtures("store")
def test_a_build_whose_lease_was_taken_says_so_and_leaves_the_taker_alone() -> None:
    with pytest.raises(OutputError, match="another build took this output"), hold(OUTPUT):
        write_lease("another-machine", 1, age=0)
    assert json.loads(storage.read(LEASE))["host"] == "another-machine"
