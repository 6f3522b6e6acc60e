"""Measure what one large volume costs to build: memory and CPU; print a Markdown table.

Every image (512×512×512 voxels, or 4-D of 2 GB; 4.4 GB of files, made on the first run) is the one
image of a dataset that `beam-nifti build` makes with one thread. Peak memory and CPU seconds are the
kernel's account of the process, start-up and imports included. The first line is an image of 8×8×8
voxels: what the program takes by itself.

Usage: large_volumes.py [--folder DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
VOXEL_OFFSET = 352
NOISE = 12.0


@dataclass(frozen=True)
class Case:
    """An image, and the options that it is built with."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    options: tuple[str, ...] = ()

    @property
    def stored_bytes(self) -> int:
        native = "--voxel-dtype=native" in self.options
        return math.prod(self.shape) * (self.source_itemsize if native else 4)

    @property
    def source_itemsize(self) -> int:
        return {"int16": 2, "float32": 4}[self.dtype]


CUBE, SHORT_RUN, LONG_RUN = (512, 512, 512), (64, 64, 40, 3050), (64, 64, 40, 6100)
CASES = (
    Case("start-up", "tiny.nii", (8, 8, 8), "int16"),
    Case("cube-gz", "cube.nii.gz", CUBE, "int16"),
    Case("cube", "cube.nii", CUBE, "int16"),
    Case("cube-gz-native", "cube.nii.gz", CUBE, "int16", ("--voxel-dtype=native",)),
    Case("cube-native", "cube.nii", CUBE, "int16", ("--voxel-dtype=native",)),
    Case("run-float32", "run-float32.nii", SHORT_RUN, "float32", ("--frames=all",)),
    Case("run-native", "run-int16.nii", LONG_RUN, "int16", ("--frames=all", "--voxel-dtype=native")),
)


def make_image(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Anatomy, repeated, under noise of its own in every slice or frame; written piece by piece."""
    import nibabel
    import numpy as np
    from isal import igzip
    from make_cohort import load_anatomy

    anatomy = load_anatomy().astype(np.float32)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+1", VOXEL_OFFSET
    random = np.random.default_rng(0)
    piece = shape[:-1]
    tiles = [math.ceil(n / m) for n, m in zip(shape[:3], anatomy.shape, strict=True)]
    whole = np.tile(anatomy, tiles)[tuple(slice(n) for n in shape[:3])]
    unfinished = path.with_name(f"unfinished-{path.name}")
    opened = igzip.open(unfinished, "wb", 2) if path.suffix == ".gz" else unfinished.open("wb")
    with opened as file:
        file.write(bytes(header.binaryblock) + bytes(VOXEL_OFFSET - header.sizeof_hdr))
        for i in range(shape[-1]):
            signal = whole if len(shape) == 4 else whole[..., i]
            noisy = np.hypot(signal + random.normal(0, NOISE, piece), random.normal(0, NOISE, piece))
            file.write(noisy.astype(np.dtype(dtype).newbyteorder("<")).tobytes(order="F"))
    unfinished.rename(path)


def measure(case: Case, folder: Path, output: Path) -> tuple[float, float, int]:
    """Peak memory in bytes, CPU seconds, and the bytes of the shards."""
    manifest = folder / f"{case.file}.tsv"
    manifest.write_text(f"path\n{case.file}\n")
    shutil.rmtree(output, ignore_errors=True)
    command = ["-m", "beam_nifti", "build", str(manifest), str(output), "--workers=1", "--quiet"]
    process = subprocess.Popen([sys.executable, *command, *case.options], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"error: {case.name}: beam-nifti build ended with {process.returncode}")
    written = sum(f.stat().st_size for f in output.glob("*.tfrecord.gz"))
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return used.ru_maxrss * unit, used.ru_utime + used.ru_stime, written


def table(cases: list[Case], folder: Path, output: Path) -> Iterator[str]:
    yield (
        "| image | options | file, MB | voxels as stored, MB | shard, MB | peak, MB | peak / stored "
        "| (peak - start-up) / stored | CPU s |"
    )
    yield "|---|---|" + "---:|" * 7
    start_up = 0.0
    for case in cases:
        peak, cpu, written = measure(case, folder, output)
        if case is CASES[0]:
            start_up = peak
        shape = "×".join(map(str, case.shape))
        sizes = ((folder / case.file).stat().st_size, case.stored_bytes, written, peak)
        megabytes = " | ".join(f"{size / 1e6:.0f}" for size in sizes)
        is_large = case is not CASES[0]
        ratios = (peak / case.stored_bytes, (peak - start_up) / case.stored_bytes)
        shown = " | ".join(f"{ratio:.2f}" if is_large else "–" for ratio in ratios)
        options = " ".join(f"`{option}`" for option in case.options)
        ending = case.file.partition(".")[2]
        yield f"| {shape} {case.dtype} .{ending} | {options} | {megabytes} | {shown} | {cpu:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what one large volume costs to build.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "beam-nifti-large",
        help="where the images are, or are made (default %(default)s)",
    )
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CASES], metavar="NAME")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        path, shape, dtype = options.make
        make_image(Path(path), tuple(map(int, shape.split("x"))), dtype)
        return
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cases = [c for c in CASES if c is CASES[0] or not options.only or c.name in options.only]
    for case in cases:
        path = folder / case.file
        if not path.exists():
            # A process of its own: a child's peak memory is never below its parent's.
            shape = "x".join(map(str, case.shape))
            command = [sys.executable, __file__, "--make", str(path), shape, case.dtype]
            subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for line in table(cases, folder, Path(scratch) / "output"):
            print(line, flush=True)
    print(f"\n{platform.platform()}, {os.cpu_count()} CPUs; Python {platform.python_version()}")


if __name__ == "__main__":
    main()
