"""A build of which something is awaited, such as the hundredth image being opened."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from inotify_simple import INotify

from tests.images import brain, write_image, write_manifest

PATIENCE = 480.0
"""Seconds for one build, faults included."""


@dataclass(frozen=True)
class Watched:
    """A build that was watched.

    Attributes:
        code: its exit code.
        printed: what it printed.
        seen: files on which the awaited event was seen, in order, when the first fault came.
        events: how many events there were in all.
        seconds: it took.
    """

    code: int
    printed: str
    seen: tuple[str, ...]
    events: int
    seconds: float


def watch_build(
    arguments: Sequence[str],
    folder: Path,
    mask: int,
    ending: str,
    faults: Mapping[int, Callable[[], None]],
    *,
    program: Sequence[str] = ("-m", "beam_nifti", "build"),
) -> Watched:
    """Run `beam-nifti build`, or another program, and call each fault once, at the event of its number.

    Args:
        arguments: of the build.
        folder: whose files are watched.
        mask: of inotify: which events count.
        ending: of the names that count.
        faults: what to do, by the number of the event.
        program: what the interpreter runs.
    """
    started, printed = time.monotonic(), folder.parent / f"{folder.name}.printed"
    events, due = list[str](), sorted(faults)
    seen: tuple[str, ...] = ()
    with INotify() as inotify, printed.open("w") as out:
        inotify.add_watch(folder, mask)
        command = [sys.executable, *program, *arguments]
        with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as build:
            try:
                while build.poll() is None:
                    assert time.monotonic() < started + PATIENCE, printed.read_text()
                    events += [e.name for e in inotify.read(timeout=100) if e.name.endswith(ending)]
                    while due and len(events) >= due[0]:
                        seen = seen or tuple(events)
                        faults[due.pop(0)]()
            finally:
                build.kill()
        events += [e.name for e in inotify.read(timeout=0) if e.name.endswith(ending)]
    seconds = time.monotonic() - started
    print(f"{folder.name}: {seconds:.1f} s, {len(seen)} events at the fault, {len(events)} in all")
    return Watched(build.returncode, printed.read_text(), seen, len(events), seconds)


def catch_writing(
    masters: Callable[[], Iterable[psutil.Process]],
) -> tuple[psutil.Process, list[psutil.Process]]:
    """A process that has started workers, and these: all stopped, one of them with a part half written.

    Its work is lost if it is killed now, where a finished part would be found by whoever does it again.

    Args:
        masters: processes that start workers, as they are at the moment.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for master in masters():
            workers = master.children(recursive=True)
            for worker in workers:
                worker.suspend()
            if any(".part" in Path(f.path).name for worker in workers for f in worker.open_files()):
                return master, workers
            for worker in workers:
                worker.resume()
    raise AssertionError("no worker was writing a part")


def write_rows(folder: Path, count: int, images: int, shape: tuple[int, int, int]) -> Path:
    """The manifest of `count` rows that share `images` images."""
    for i in range(images):
        write_image(folder / f"{i:04d}.nii.gz", brain(shape, seed=i))
    rows = [{"participant_id": f"sub-{i:05d}", "path": f"{i % images:04d}.nii.gz"} for i in range(count)]
    return write_manifest(folder / "manifest.tsv", rows)
