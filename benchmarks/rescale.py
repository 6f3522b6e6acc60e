"""Measure what each way to rescale and to store a volume costs; print Markdown tables.

One volume of 91×109×91 int16 voxels, made as those of make_cohort.py are, is measured, rescaled and
compressed (igzip, level 2) in this process, 20 times; the least CPU time counts.

Usage: rescale.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from isal import igzip
from make_cohort import load_anatomy, scan

from beam_nifti.config import RecordConfig
from beam_nifti.manifest import VolumeRow
from beam_nifti.volume import Volume, load_volume, rescale_volume

REPEATS = 20
METHODS = (
    RecordConfig("minmax"),
    RecordConfig("minmax", rescale_within="nonzero"),
    RecordConfig("percentile:0.5,99.5"),
    RecordConfig("percentile:0.5,99.5", clip=True),
    RecordConfig("percentile:0.5,99.5", clip=True, rescale_within="nonzero"),
    RecordConfig("window:0,400", clip=True),
    RecordConfig("zscore"),
    RecordConfig("zscore", rescale_within="nonzero"),
    RecordConfig("none"),
)
DTYPES = ("float32", "float16", "bfloat16", "uint8", "native")


def options(config: RecordConfig) -> str:
    within = f" --rescale-within {config.rescale_within}" if config.rescale_within else ""
    return f"`--rescale {config.rescale}{within}{' --clip' if config.clip else ''}`"


def cpu_ms(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return 1e3 * best


def rows(volume: Volume) -> Iterator[str]:
    yield "| method | CPU ms |"
    yield "|---|---:|"
    for config in METHODS:
        yield f"| {options(config)} | {cpu_ms(lambda c=config: rescale_volume(volume, c)):.1f} |"
    yield ""
    yield "| `--voxel-dtype` | CPU ms | packing, CPU ms | MB | MB packed |"
    yield "|---|---:|---:|---:|---:|"
    for dtype in DTYPES:
        config = RecordConfig(voxel_dtype=dtype)
        content = rescale_volume(volume, config).voxels.tobytes()
        times = [cpu_ms(lambda c=config: rescale_volume(volume, c))]
        times.append(cpu_ms(lambda c=content: igzip.compress(c, 2)))
        sizes = [len(content) / 1e6, len(igzip.compress(content, 2)) / 1e6]
        yield f"| {dtype} | {times[0]:.1f} | {times[1]:.1f} | {sizes[0]:.2f} | {sizes[1]:.2f} |"


def main() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        path.write_bytes(scan(load_anatomy(), 0))
        volume = load_volume(VolumeRow(1, "scan", str(path), None))
        for row in rows(volume):
            print(row, flush=True)


if __name__ == "__main__":
    main()
