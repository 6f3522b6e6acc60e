"""Measure what a dataset costs to build, beside the ways that it replaces; print a Markdown table.

Every contender runs as a process of its own, in turns, on cohorts of 20, 200 and 800 volumes (made on
the first run: 740 MB). CPU seconds and peak memory are the kernel's account of the process, start-up
and imports included. "Per further volume" is the slope from 200 to 800 volumes, which the start-up
cancels out of. Figures are medians over the rounds; the two slow contenders run in the first only.

Usage: run_build.py [--repeat N] [--cohort-dir DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
SIZES = (20, 200, 800)
LOCAL_RUNNER = (
    "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "--direct_running_mode=multi_threading",
)
THREADS = os.cpu_count() or 1
OWN_1, OWN_2, OWN_ALL = "beam-nifti-1", "beam-nifti-2", "beam-nifti"
LOOP, STOCK, FLOOR = "loop", "stock", "floor"
SLOW = (LOOP, STOCK)
MEMORY_SHARE = 0.7
"""Of the memory that is free: what no contender may be expected to exceed."""


@dataclass(frozen=True)
class Usage:
    """What one process used; seconds and megabytes."""

    cpu: float
    wall: float
    rss: float
    written: float


@dataclass(frozen=True)
class Contender:
    title: str
    command: tuple[str, ...]


def build(workers: int) -> tuple[str, ...]:
    return ("-m", "beam_nifti", "build", "{manifest}", "{output}", f"--workers={workers}", "--quiet")


def contenders() -> dict[str, Contender]:
    stock = ("{output}/train", "--num_shards=4", *LOCAL_RUNNER, f"--direct_num_workers={THREADS}")
    stock_script = str(HERE.parent / "pipelines" / "stock.py")
    found = {
        LOOP: Contender(
            "a loop of nibabel and `tf.io.TFRecordWriter`",
            (str(HERE / "loop.py"), "{manifest}", "{output}"),
        ),
        STOCK: Contender(
            f"Beam's own `WriteToTFRecord`, {THREADS} threads", (stock_script, "{manifest}", *stock)
        ),
        OWN_1: Contender("`beam-nifti build`, 1 thread", build(1)),
        OWN_2: Contender("`beam-nifti build`, 2 threads", build(2)),
        OWN_ALL: Contender(f"`beam-nifti build`, {THREADS} threads", build(THREADS)),
        FLOOR: Contender("the work floor, 1 thread", (str(HERE / "floor.py"), "{manifest}", "{output}")),
    }
    if THREADS <= 2:
        del found[OWN_ALL]
    return found


def measure(contender: Contender, manifest: Path, output: Path) -> Usage | None:
    """Run a contender once; None if it failed (it may have been killed for its memory)."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # nobody pays for what another left to be written
    places = {"manifest": manifest, "output": output}
    command = [sys.executable, *(word.format(**places) for word in contender.command)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=HERE.parent, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            sys.stderr.write(log.read().decode(errors="replace"))
            return None
    written = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    shutil.rmtree(output)
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * unit / 1e6, written / 1e6)


@dataclass
class Results:
    """Every measurement, by contender and cohort size."""

    runs: dict[tuple[str, int], list[Usage]]

    def has(self, name: str, size: int) -> bool:
        return bool(self.runs[name, size])

    def median(self, name: str, size: int, what: str) -> float:
        return statistics.median(getattr(usage, what) for usage in self.runs[name, size])

    def slope(self, name: str, what: str, low: int, high: int) -> float:
        """Seconds per volume between two sizes."""
        return (self.median(name, high, what) - self.median(name, low, what)) / (high - low)

    def per_volume(self, name: str) -> float:
        """CPU seconds per further volume, between the two largest sizes that ran."""
        low, high = [size for size in SIZES if self.has(name, size)][-2:]
        return self.slope(name, "cpu", low, high)

    def expected_rss(self, name: str, size: int) -> float:
        """Megabytes, from the two smaller sizes; 0 where they are not known."""
        smaller = [s for s in SIZES if s < size]
        if len(smaller) < 2 or not all(self.has(name, s) for s in smaller[-2:]):
            return 0.0
        low, high = smaller[-2:]
        at_low, at_high = self.median(name, low, "rss"), self.median(name, high, "rss")
        return at_high + (at_high - at_low) / (high - low) * (size - high)


def run_all(names: Sequence[str], rounds: int, manifests: dict[int, Path], scratch: Path) -> Results:
    results = Results(defaultdict(list))
    known = contenders()
    for turn in range(rounds):
        for size in SIZES:
            for name in names:
                if turn and name in SLOW:
                    continue
                free = psutil.virtual_memory().available / 1e6
                if results.expected_rss(name, size) > MEMORY_SHARE * free:
                    continue
                usage = measure(known[name], manifests[size], scratch / "output")
                line = {"turn": turn + 1, "contender": name, "volumes": size}
                print(json.dumps(line | (asdict(usage) if usage else {"failed": True})), file=sys.stderr)
                if usage:
                    results.runs[name, size].append(usage)
    return results


def table(results: Results, names: Sequence[str]) -> Iterator[str]:
    base, small, large = SIZES
    yield (
        f"| | CPU ms per volume, whole process, {small} | {large} | per further volume | loop / this "
        f"| this / floor | peak MB, {small} | {large} | seconds, {small} | {large} | MB written |"
    )
    yield "|---|" + "---:|" * 10
    for name in names:
        if not results.has(name, base) or not results.has(name, small):
            continue
        cells = [contenders()[name].title]
        for size in (small, large):
            known = results.has(name, size)
            cells.append(f"{1e3 * results.median(name, size, 'cpu') / size:.1f}" if known else "–")
        each = results.per_volume(name)
        cells.append(f"{1e3 * each:.1f}")
        cells.append(f"{results.per_volume(LOOP) / each:.1f}" if results.has(LOOP, small) else "–")
        cells.append(f"{each / results.per_volume(FLOOR):.2f}" if results.has(FLOOR, small) else "–")
        for what, form in (("rss", ".0f"), ("wall", ".1f")):
            for size in (small, large):
                if results.has(name, size):
                    cells.append(f"{results.median(name, size, what):{form}}")
                elif what == "rss":
                    cells.append(f"not run: {results.expected_rss(name, size):.0f} expected")
                else:
                    cells.append("–")
        last = large if results.has(name, large) else small
        mark = "" if last == large else f" ({last} volumes)"
        cells.append(f"{results.median(name, last, 'written'):.0f}{mark}")
        yield f"| {' | '.join(cells)} |"


def findings(results: Results, names: Sequence[str]) -> Iterator[str]:
    """The conclusions from the table, one line each."""
    base, small, large = SIZES
    if OWN_1 in names:
        first, later = results.slope(OWN_1, "cpu", base, small), results.slope(OWN_1, "cpu", small, large)
        start = results.median(OWN_1, base, "cpu") - base * later
        whole = [results.median(OWN_1, size, "cpu") / size for size in (small, large)]
        yield (
            f"Growth, 1 thread: {1e3 * first:.1f} ms of CPU per further volume up to {small} volumes, "
            f"{1e3 * later:.1f} from there to {large} ({later / first - 1:+.1%}); with the start-up of "
            f"{start:.1f} s, {1e3 * whole[0]:.1f} and {1e3 * whole[1]:.1f} ms a volume."
        )
    if {OWN_1, LOOP, FLOOR} <= set(names):
        loop, own, floor = (results.median(n, large, "cpu") for n in (LOOP, OWN_1, FLOOR))
        yield (
            f"CPU of {large} volumes, start-up included, 1 thread: the loop's over this "
            f"{loop / own:.1f}, this over the floor's {own / floor:.2f}."
        )
    if {OWN_1, OWN_2} <= set(names):
        walls = [results.median(n, large, "wall") for n in (OWN_1, OWN_2)]
        slopes = [results.slope(n, "wall", small, large) for n in (OWN_1, OWN_2)]
        yield (
            f"Throughput of 2 threads over 1: {walls[0] / walls[1]:.2f} ({large} volumes, start-up "
            f"included), {slopes[0] / slopes[1]:.2f} per further volume."
        )


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _lines(Path("/proc/cpuinfo"))
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return f"{model}, {THREADS} CPUs, {memory:.0f} GiB; Python {platform.python_version()}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a dataset costs to build.")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default 3)")
    parser.add_argument(
        "--cohort-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "beam-nifti-cohort",
        help="where the volumes are, or are made (default %(default)s)",
    )
    parser.add_argument("--only", nargs="+", choices=list(contenders()), metavar="NAME")
    options = parser.parse_args()
    names = options.only or list(contenders())

    folder = options.cohort_dir.resolve()
    manifests = {size: folder / f"manifest-{size}.tsv" for size in SIZES}
    for size, manifest in manifests.items():
        if not manifest.exists():
            # A process of its own: a child's peak memory is never below its parent's.
            script = str(HERE / "make_cohort.py")
            subprocess.run([sys.executable, script, str(size), str(folder)], check=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        results = run_all(names, options.repeat, manifests, Path(scratch))

    print("\n".join(table(results, names)))
    print()
    print("\n".join(findings(results, names)))
    print(f"Measured on {machine()}; load {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
