"""Build very many tiny volumes, also killed in the middle and resumed; print a Markdown table.

The volumes are 8×8×8, and the rows of a manifest share a thousand files, so what is measured is what a
row costs: manifest, units, index, dataset_info.json, resume.

Usage: run_scale.py [--rows N ...] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil

SHARED_FILES = 1000
SHAPE = (8, 8, 8)


def make_cohort(folder: Path, num_rows: int) -> Path:
    """A manifest of `num_rows` rows over SHARED_FILES images; made once."""
    manifest = folder / f"manifest-{num_rows}.tsv"
    if manifest.exists():
        return manifest
    rng = np.random.default_rng(0)
    for i in range(SHARED_FILES):
        path = folder / f"{i:04d}.nii"
        if not path.exists():
            voxels = rng.integers(0, 1200, SHAPE).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), path)
    with manifest.open("w") as handle:
        handle.write("participant_id\tpath\tlabel\tsite\n")
        for row in range(num_rows):
            handle.write(f"sub-{row:07d}\t{row % SHARED_FILES:04d}.nii\t{row % 90}\tsite-{row % 20}\n")
    return manifest


@dataclass
class Usage:
    """What a process used: CPU and wall seconds, and its peak of resident megabytes."""

    cpu: float
    wall: float
    rss: float


def run(
    arguments: list[str], until: Callable[[float], bool] | None = None, *, is_killed: bool = False
) -> tuple[Usage, float]:
    """Run beam-nifti; its usage, and after how many seconds `until(start)` was first true.

    Args:
        arguments: of the command.
        until: asked ten times a second.
        is_killed: whether it gets SIGKILL at that moment.
    """
    start, wall_start, moment, stop = time.perf_counter(), time.time(), [0.0], threading.Event()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "beam_nifti", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parent.parent,
        )

        def watch() -> None:
            while until and not stop.wait(0.1):
                if until(wall_start):
                    moment[0] = time.perf_counter() - start
                    if is_killed:
                        process.send_signal(signal.SIGKILL)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        stop.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != (-signal.SIGKILL if is_killed else 0):
            log.seek(0)
            sys.exit(f"exit code {process.returncode}:\n{log.read().decode(errors='replace')[-3000:]}")
    usage = Usage(used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss / 1024)
    print(json.dumps({"command": arguments[0], "moment": moment[0], **asdict(usage)}), file=sys.stderr)
    return usage, moment[0]


def newest_part(output: Path) -> float:
    """Time of the newest file that a worker began."""
    times = [0.0]
    for folder in (output / ".build").glob("*/*"):
        with os.scandir(folder) as entries:
            times += [entry.stat().st_mtime for entry in entries if ".part" in entry.name]
    return max(times)


def finished_bytes(output: Path) -> int:
    """Bytes of the parts and shards that are there."""
    files = [*output.glob(".build/*/*/*.part"), *output.glob("*.tfrecord*")]
    return sum(path.stat().st_size for path in files if path.exists())


def measure(manifest: Path, output: Path, num_rows: int, workers: int) -> str:
    command = ["build", str(manifest), str(output), f"--workers={workers}", "--quiet"]
    whole, _ = run(command)
    info = json.loads((output / "dataset_info.json").read_text())
    written = sum(s["num_bytes"] for split in info["splits"].values() for s in split["shards"])
    shards = sum(len(split["shards"]) for split in info["splits"].values())
    checked, _ = run(["verify", str(output), f"--workers={workers}", "--quiet"])
    again, _ = run(command)

    killed = output.with_name("killed")
    kill = ["build", str(manifest), str(killed), f"--workers={workers}", "--quiet"]
    run(kill, lambda _: finished_bytes(killed) > written / 2, is_killed=True)
    resumed, started = run(kill, lambda start: newest_part(killed) > start)
    same = all(
        (output / name).read_bytes() == (killed / name).read_bytes()
        for name in (p.name for p in output.glob("*.tfrecord*"))
    )
    return (
        f"| {num_rows:,} | {shards} | {written / 1e6:.0f} | {whole.wall:.0f} | {whole.cpu:.0f} "
        f"| {1e3 * whole.cpu / num_rows:.3f} | {whole.rss:.0f} | {checked.cpu:.0f} | {checked.rss:.0f} "
        f"| {again.cpu:.0f} | {started:.0f} | {resumed.rss:.0f} | {'yes' if same else 'NO'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build very many tiny volumes; print a Markdown table.")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], metavar="N")
    parser.add_argument("--workers", type=int, default=psutil.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(
            "| rows | shards | MB | build s | CPU s | CPU ms per row | peak MB | verify CPU s | peak MB "
            "| build again CPU s | resumed: first volume after s | peak MB | same bytes |"
        )
        print("|---:|" + "---:|" * 11 + "---|", flush=True)
        for num_rows in options.rows:
            folder = Path(scratch) / str(num_rows)
            folder.mkdir()
            manifest = make_cohort(folder, num_rows)
            print(measure(manifest, folder / "dataset", num_rows, options.workers), flush=True)


if __name__ == "__main__":
    main()
