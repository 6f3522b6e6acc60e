"""Measure what a random patch costs from each kind of store; print Markdown tables.

One volume (synthetic CT: air, smooth anatomy, scanner noise; int16 .nii) is rescaled to float32 in [0, 1]
and stored by each side, unless the side stores native voxels and rescales each patch. Each step of each side
runs in a process of its own, in turns, with one thread. CPU and wall are those of the work alone, after a
small volume that does not count; "build" is loading, rescaling and storing, without Beam. Peak memory
includes the interpreter and its imports. Where the caller chooses the corner of a patch, its voxels are
compared with those of the source.

beam_nifti runs in this interpreter, the other sides in that of --peers, which needs numpy and nibabel, and

    pip install blosc2 nnunetv2 h5py zarr monai torchio

A side whose packages are missing is left out, with the reason.

With --threads, it measures instead how many patches beam_nifti supplies with that many threads, each on its
own core: by `PatchDataset`, and by `load_dataset` in batches of two. A thread of `PatchDataset` that is
neither running nor queued for a core waits for Python's lock. Its CPU time and its waits give the rate on a
core of its own. A busy machine lengthens the waits, so the rate is a lower limit. This needs
/proc/PID/schedstat of Linux. For `load_dataset` it is the best of several half seconds, and a lower limit.

Usage: patches.py [--peers PYTHON] [--case NAME ...] [--side NAME ...] [--repeat N] [--threads N ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CASES = {"small": ((256, 256, 128), 96, 15), "large": ((512, 512, 300), 128, 7)}
"""Shape, edge of a patch, and how many patches are read."""

SECONDS, PART = 6.0, 0.5
"""How long patches are fed, and the part of it that is the best for `load_dataset`."""

PER_VOLUME = 8
"""Patches that TorchIO's queue draws from a volume that it has loaded."""

Corner = tuple[int, int, int]
Read = Callable[[Corner, int], np.ndarray]
"""A patch, of a corner and an edge; a side that chooses corners by itself ignores the corner."""


@contextmanager
def measured(found: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU and wall milliseconds of a block to what was found."""
    used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    found[f"{name} wall"] = 1e3 * (time.perf_counter() - start)
    now = resource.getrusage(resource.RUSAGE_SELF)
    found[f"{name} cpu"] = 1e3 * (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


def peak() -> float:
    """Megabytes that this process had at most. ru_maxrss is in KiB on Linux, in bytes on macOS."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    )


def load(source: Path) -> np.ndarray:
    import nibabel

    voxels = np.asanyarray(nibabel.load(source).dataobj)
    low, high = voxels.min(), voxels.max()
    return (voxels.astype(np.float32) - np.float32(low)) / np.float32(high - low)


def box(corner: Corner, edge: int) -> tuple[slice, ...]:
    return tuple(slice(start, start + edge) for start in corner)


@dataclass(frozen=True)
class Side:
    """A way to store volumes.

    Attributes:
        title: in the table.
        is_peer: whether it runs in the other interpreter.
        build: writes the store of a source into a folder.
        open: a function that reads patches, and one that reads the whole volume.
        is_random: whether it chooses the corners of patches itself.
    """

    title: str
    is_peer: bool
    build: Callable[[Path, Path, int], None]
    open: Callable[[Path, Path, int], tuple[Read, Callable[[], np.ndarray]]]
    is_random: bool = False


def beam_nifti(title: str, **options: str) -> Side:
    def build(source: Path, folder: Path, edge: int) -> None:
        from beam_nifti.config import RecordConfig
        from beam_nifti.manifest import VolumeRow
        from beam_nifti.record.example import encode_volume
        from beam_nifti.record.tiles import encode_record
        from beam_nifti.volume import load_volume, rescale_volume

        level = None if options["compression"] == "none" else 2
        config = RecordConfig(voxel_dtype=options["voxel_dtype"])
        volume = rescale_volume(load_volume(VolumeRow(1, "a", str(source)), record=config), config)
        example = encode_volume(volume)
        with (folder / "record").open("wb") as file:
            file.writelines(encode_record(example, level).pieces)

    def open_(folder: Path, source: Path, edge: int) -> tuple[Read, Callable[[], np.ndarray]]:
        import beam_nifti as bn

        if not (folder / "dataset").exists():
            bn.build([{"path": str(source)}], folder / "dataset", workers=1, progress=False, **options)
        dataset = bn.Dataset(folder / "dataset", columns=["image"])
        return (
            lambda corner, edge: dataset.patch(0, corner, (edge,) * 3)["image"][..., 0],
            lambda: dataset[0]["image"],
        )

    return Side(title, False, build, open_)


def blosc2(title: str, codec: str, level: int, *, selects_filter: bool) -> Side:
    def build(source: Path, folder: Path, edge: int) -> None:
        import blosc2
        from nnunetv2.training.dataloading import nnunet_dataset

        blosc2.set_nthreads(1)
        voxels, kind = load(source)[None], blosc2.Codec[codec]
        blocks, chunks = nnunet_dataset.comp_blosc2_params(voxels.shape, (edge,) * 3, voxels.itemsize)
        params = {"codec": kind, "clevel": level, "nthreads": 1}
        if selects_filter:
            select = nnunet_dataset.nnUNetDatasetBlosc2._select_filter
            params["filters"] = [select(voxels, blocks, chunks, kind, level)]
        blosc2.asarray(voxels, urlpath=str(folder / "a.b2nd"), chunks=chunks, blocks=blocks, cparams=params)

    def open_(folder: Path, source: Path, edge: int) -> tuple[Read, Callable[[], np.ndarray]]:
        import blosc2

        blosc2.set_nthreads(1)

        def stored() -> Any:  # nnU-Net opens the file for each patch
            return blosc2.open(str(folder / "a.b2nd"), mode="r", dparams={"nthreads": 1}, mmap_mode="r")

        return lambda corner, edge: stored()[(slice(None), *box(corner, edge))][0], lambda: stored()[:]

    return Side(title, True, build, open_)


def build_hdf5(source: Path, folder: Path, edge: int) -> None:
    import h5py

    with h5py.File(folder / "a.h5", "w") as file:
        options = {"chunks": (32,) * 3, "compression": "gzip", "compression_opts": 4, "shuffle": True}
        file.create_dataset("image", data=load(source), **options)


def open_hdf5(folder: Path, source: Path, edge: int) -> tuple[Read, Callable[[], np.ndarray]]:
    import h5py

    stored = h5py.File(folder / "a.h5")["image"]
    return lambda corner, edge: stored[box(corner, edge)], lambda: stored[:]


def build_zarr(source: Path, folder: Path, edge: int) -> None:
    import zarr

    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    voxels = load(source)
    shards = tuple(32 * math.ceil(n / 32) for n in voxels.shape)
    array = zarr.create_array(
        str(folder / "a.zarr"), shape=voxels.shape, dtype="float32", chunks=(32,) * 3, shards=shards
    )
    array[:] = voxels


def open_zarr(folder: Path, source: Path, edge: int) -> tuple[Read, Callable[[], np.ndarray]]:
    import zarr

    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    stored = zarr.open_array(str(folder / "a.zarr"), mode="r")
    return lambda corner, edge: stored[box(corner, edge)], lambda: stored[:]


def persistent(source: Path, folder: Path, edge: int) -> Any:
    import torch
    from monai.data import PersistentDataset
    from monai.transforms import Compose, LoadImage, RandSpatialCrop, ScaleIntensity

    torch.set_num_threads(1)
    crop = RandSpatialCrop((edge,) * 3, random_size=False)
    steps = [LoadImage(image_only=True, ensure_channel_first=True), ScaleIntensity(), crop]
    return PersistentDataset([str(source)], Compose(steps), cache_dir=folder)


def open_monai(folder: Path, source: Path, edge: int) -> tuple[Read, Callable[[], np.ndarray]]:
    patches, whole = (persistent(source, folder, n) for n in (edge, -1))
    return lambda corner, edge: patches[0][0].numpy(), lambda: whole[0][0].numpy()


def open_torchio(folder: Path, source: Path, edge: int) -> tuple[Read, Callable[[], np.ndarray]]:
    import torch
    import torchio as tio

    torch.set_num_threads(1)
    subjects = tio.SubjectsDataset(
        [tio.Subject(image=tio.ScalarImage(source))], transform=tio.RescaleIntensity((0, 1))
    )
    sampler = tio.data.UniformSampler(edge)

    def queued() -> Iterator[np.ndarray]:
        while True:
            queue = tio.Queue(subjects, PER_VOLUME, PER_VOLUME, sampler, num_workers=0)
            yield from (queue[i]["image"].data[0].numpy().copy() for i in range(PER_VOLUME))

    patches = queued()
    return lambda corner, edge: next(patches), lambda: subjects[0]["image"].data[0].numpy()


SIDES = {
    "native": beam_nifti("beam_nifti, native, gzip", voxel_dtype="native", compression="gzip"),
    "float32": beam_nifti("beam_nifti, float32, gzip", voxel_dtype="float32", compression="gzip"),
    "native-none": beam_nifti("beam_nifti, native, uncompressed", voxel_dtype="native", compression="none"),
    "float32-none": beam_nifti(
        "beam_nifti, float32, uncompressed", voxel_dtype="float32", compression="none"
    ),
    "zstd": blosc2("nnU-Net to 2.7 (Blosc2, zstd 8)", "ZSTD", 8, selects_filter=False),
    "lz4hc": blosc2("nnU-Net 2.8 (Blosc2, LZ4HC 5)", "LZ4HC", 5, selects_filter=True),
    "hdf5": Side("HDF5, chunks of 32³, gzip 4", True, build_hdf5, open_hdf5),
    "zarr": Side("Zarr v3, one shard, chunks of 32³, zstd", True, build_zarr, open_zarr),
    "monai": Side(
        "MONAI `PersistentDataset`, crop",
        True,
        lambda source, folder, edge: persistent(source, folder, edge)[0],
        open_monai,
        is_random=True,
    ),
    "torchio": Side(
        f"TorchIO `Queue` of the .nii, {PER_VOLUME} patches per load",
        True,
        lambda source, folder, edge: None,
        open_torchio,
        is_random=True,
    ),
}


def make_source(case: str, path: Path) -> None:
    """Write the volume, plane by plane."""
    import nibabel

    shape = CASES[case][0]
    random = np.random.default_rng(0)
    knots = random.normal(0, 1, [n // 16 + 2 for n in shape])
    at = [np.arange(n) / 16 for n in shape]
    low = [a.astype(int) for a in at]
    y, z = (at[1] - low[1])[:, None], (at[2] - low[2])[None]
    across = np.linspace(-1, 1, shape[1])[:, None] / 0.6
    voxels = np.empty(shape, np.int16)
    for x in range(shape[0]):
        share = at[0][x] - low[0][x]
        plane = (1 - share) * knots[low[0][x]] + share * knots[low[0][x] + 1]
        rows = (1 - y) * plane[low[1]] + y * plane[low[1] + 1]
        smooth = (1 - z) * rows[:, low[2]] + z * rows[:, low[2] + 1]
        is_body = ((2 * x / shape[0] - 1) / 0.8) ** 2 + across**2 < 1
        tissue = 40 + 60 * smooth + random.normal(0, 12, shape[1:])
        voxels[x] = np.where(is_body, tissue, -1000 + random.normal(0, 3, shape[1:]))
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


def build(side: Side, source: Path, folder: Path, edge: int) -> dict[str, float]:
    import nibabel

    found = dict[str, float]()
    with tempfile.TemporaryDirectory() as scratch:
        ramp = np.arange(64**3, dtype=np.int16).reshape(64, 64, 64)
        nibabel.save(nibabel.Nifti1Image(ramp, np.eye(4)), small := Path(scratch) / "small.nii")
        (store := Path(scratch) / "store").mkdir()
        side.build(small, store, 32)
    with measured(found, "build"):
        side.build(source, folder, edge)
    found["build peak"] = peak()
    found["MB"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    return found


def read(side: Side, source: Path, folder: Path, case: str) -> dict[str, float]:
    shape, edge, count = CASES[case]
    random = np.random.default_rng(1)
    corners = [tuple(int(random.integers(0, n - edge + 1)) for n in shape) for _ in range(count + 1)]
    patch, whole = side.open(folder, source, edge)
    patch(corners[-1], edge)  # imports, tables, and the file in the page cache
    times, taken = dict[str, float](), list[dict[str, float]]()
    if side.is_random:
        corners = corners[:PER_VOLUME] + [(0, 0, 0)] * (-len(corners[:PER_VOLUME]) % PER_VOLUME)
    for corner in corners:
        with measured(times, "patch"):
            result = patch(corner, edge)
        assert (result.shape, result.dtype) == ((edge,) * 3, np.float32)
        taken.append(dict(times))
    middle = statistics.mean if side.is_random else statistics.median
    found = {name: middle(t[name] for t in taken) for name in times}
    found["patch peak"] = peak()
    with measured(found, "whole"):
        whole()
    if not side.is_random:
        with measured(found, "whole"):
            whole()
        assert np.array_equal(result, load(source)[box(corners[-1], edge)]), "its voxels are not the source's"
    return found


def of_thread() -> tuple[int, int, int]:
    """Nanoseconds of a clock, and of this thread on a core and in the queue for one."""
    found = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return time.perf_counter_ns(), int(found[0]), int(found[1])


def feed(side: Side, source: Path, folder: Path, case: str, count: int) -> dict[str, float]:
    """Patches of one volume, read by `PatchDataset` in some threads, each on a core."""
    import beam_nifti as bn

    side.open(folder, source, 0)  # builds it
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    records = bn.Dataset(folder / "dataset", columns=["image"])
    patches = bn.PatchDataset(records, bn.Patches((CASES[case][1],) * 3, per_volume=1 << 20), seed=0)
    numbers = itertools.count()  # next() of it is atomic
    patches[next(numbers)]
    spent, end = list[tuple[int, int, int]](), time.perf_counter() + SECONDS

    def work() -> None:
        before = of_thread()
        while time.perf_counter() < end:
            patches[next(numbers)]
        after = of_thread()
        spent.append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, on_core, queued = (sum(times) / 1e6 for times in zip(*spent, strict=True))
    num_read = next(numbers) - 1
    return {
        "cpu": on_core / num_read,
        "waits": (wall - on_core - queued) / num_read,
        "rate": count * 1e3 * num_read / (wall - queued),
    }


def feed_tensorflow(side: Side, source: Path, folder: Path, case: str, count: int) -> dict[str, float]:
    """The same by `load_dataset`."""
    side.open(folder, source, 0)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])  # before TensorFlow counts them
    from beam_nifti.reader import load_dataset

    batches = iter(
        load_dataset(
            folder / "dataset",
            batch_size=2,
            patch=(CASES[case][1],) * 3,
            patches_per_volume=1 << 20,
            seed=0,
        )
    )
    next(batches)
    found, rates, num_read = dict[str, float](), list[float](), 0
    with measured(found, "all"):
        end = time.perf_counter() + SECONDS
        while (start := time.perf_counter()) < end:
            before = num_read
            while time.perf_counter() - start < PART:
                num_read += len(next(batches))
            rates.append((num_read - before) / (time.perf_counter() - start))
    return {"tf cpu": found["all cpu"] / num_read, "tf rate": max(rates)}


def run(name: str, step: str, case: str, source: Path, folder: Path, peers: str) -> dict[str, float] | str:
    """What a step of a side found, or why it failed."""
    interpreter = peers if SIDES[name].is_peer else sys.executable
    if not interpreter:
        return "it needs --peers"
    command = [interpreter, "-W", "ignore", __file__, "--step", step, name, case, str(source), str(folder)]
    threads = {f"{n}_NUM_THREADS": "1" for n in ("OMP", "OPENBLAS", "MKL", "BLOSC")}
    environment = os.environ | threads | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(case: str, names: list[str], repeat: int, peers: str, scratch: Path) -> Iterator[str]:
    shape, edge, _ = CASES[case]
    source = scratch / f"{case}.nii"
    # A process of its own: a child's peak memory is never below its parent's.
    subprocess.run([sys.executable, __file__, "--step", "make", "", case, str(source), ""], check=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed = dict[str, str]()
    for _, name in itertools.product(range(repeat), names):
        if name in failed:
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            found = dict[str, float]()
            for step in ("build", "read"):
                result = run(name, step, case, source, Path(folder), peers)
                if isinstance(result, str):
                    failed[name] = result
                    break
                found |= result
            else:
                results[name].append(found)
    yield f"Patches of {edge}³ from {'×'.join(map(str, shape))} int16; milliseconds and megabytes, CPU / wall"
    yield ""
    yield "| | MB | build | patch | whole volume | peak, build | peak, patches |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, found_all in results.items():
        title = SIDES[name].title
        if name in failed:
            yield f"| {title} | left out: {failed[name]} |"
            continue
        m = {key: statistics.median(found[key] for found in found_all) for key in found_all[0]}
        cells = [f"{m['MB']:.2f}"]
        cells += [f"{m[f'{step} cpu']:.1f} / {m[f'{step} wall']:.1f}" for step in ("build", "patch", "whole")]
        cells += [f"{m[f'{step} peak']:.0f}" for step in ("build", "patch")]
        if not m["MB"]:  # it reads the source
            cells[0] = cells[1] = cells[4] = "–"
        yield f"| {title} | {' | '.join(cells)} |"


def feeding_table(
    case: str, names: list[str], repeat: int, counts: list[int], scratch: Path
) -> Iterator[str]:
    shape, edge, _ = CASES[case]
    source = scratch / f"{case}.nii"
    make_source(case, source)
    yield f"Patches of {edge}³ from {'×'.join(map(str, shape))} int16 by `PatchDataset` and by `load_dataset`"
    yield ""
    yield "| | threads | CPU ms | waits ms | patches/s | `load_dataset`: CPU ms | patches/s, at least |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in names:
        results: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for _, count, step in itertools.product(range(repeat), counts, ("feed", "feed_tensorflow")):
                result = run(name, f"{step} {count}", case, source, Path(folder), "")
                if isinstance(result, str):
                    raise SystemExit(f"{name}: {result}")
                results[count].append(result)
        for count, found in results.items():
            m = {
                key: [f[key] for f in found if key in f]
                for key in ("cpu", "waits", "rate", "tf cpu", "tf rate")
            }
            cells = [f"{statistics.median(m[key]):.2f}" for key in ("cpu", "waits")]
            cells += [f"{statistics.median(m['rate']):.0f}"]
            cells += [f"{statistics.median(m['tf cpu']):.2f}", f"{max(m['tf rate']):.0f}"]
            yield f"| {SIDES[name].title} | {count} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a random patch costs.")
    parser.add_argument(
        "--peers", metavar="PYTHON", default="", help="interpreter with the packages of other sides"
    )
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--side", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", default=[])
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, name, case, *paths = options.step
        source, folder = map(Path, paths)
        if step == "make":
            make_source(case, source)
        elif step == "build":
            print(json.dumps(build(SIDES[name], source, folder, CASES[case][1])))
        elif step == "read":
            print(json.dumps(read(SIDES[name], source, folder, case)))
        else:
            how, count = step.split()
            fed = feed if how == "feed" else feed_tensorflow
            print(json.dumps(fed(SIDES[name], source, folder, case, int(count))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for case in options.case:
            if options.threads:
                names = [name for name in options.side if not SIDES[name].is_peer]
                lines = feeding_table(case, names, options.repeat, options.threads, Path(scratch))
            else:
                lines = table(case, options.side, options.repeat, options.peers, Path(scratch))
            for line in lines:
                print(line, flush=True)
            print()
    print(f"{platform.platform()}, {os.cpu_count()} CPUs; Python {platform.python_version()}")


if __name__ == "__main__":
    main()
