"""Build with Beam's own `WriteToTFRecord`, with this package's, and with `beam-nifti build`; print Markdown.

The first two are `pipelines/stock.py` and `pipelines/minimal.py`. Each runs as a process of its own, in
turns, with two threads and one shard for 100 records. CPU seconds and peak memory are the kernel's account of
the process, start-up included; figures are medians over the rounds.

Usage: write.py [--volumes N] [--repeat N] [--cohort-dir DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from make_cohort import make_cohort
from run_build import HERE, LOCAL_RUNNER, Contender, Usage, machine, measure

FLAGS = (*LOCAL_RUNNER, "--direct_num_workers=2")


def contenders(volumes: int) -> list[Contender]:
    pipelines = HERE.parent / "pipelines"
    shards = f"--num_shards={-(-volumes // 100)}"
    build = ("-m", "beam_nifti", "build", "{manifest}", "{output}", "--workers=2", "--quiet")
    return [
        Contender(
            "`WriteToTFRecord` of Beam",
            (str(pipelines / "stock.py"), "{manifest}", "{output}/train", shards, *FLAGS),
        ),
        Contender(
            "`WriteToTFRecord` of beam_nifti",
            (str(pipelines / "minimal.py"), "{manifest}", "{output}", *FLAGS),
        ),
        Contender("`beam-nifti build`", (*build, "--rescale=zscore", "--examples-per-shard=100")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the writer with Beam's own.")
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--cohort-dir", type=Path, default=Path(tempfile.gettempdir()) / "beam_nifti_cohorts")
    args = parser.parse_args()
    manifest = make_cohort(args.volumes, args.cohort_dir / str(args.volumes))
    found = contenders(args.volumes)
    runs: dict[str, list[Usage]] = {contender.title: [] for contender in found}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.repeat):
            for contender in found:
                usage = measure(contender, manifest, Path(scratch) / "output")
                runs[contender.title] += [usage] if usage else []
    print(f"{args.volumes} volumes; {machine()}\n")
    print("| | CPU s | peak MB | wall s | MB written | CPU, stock / this | memory, stock / this |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    stock = runs[found[0].title]
    for title, usages in runs.items():
        if not usages:
            print(f"| {title} | failed | | | | | |")
            continue
        cpu, rss, wall, written = (
            statistics.median(getattr(usage, name) for usage in usages)
            for name in ("cpu", "rss", "wall", "written")
        )
        ratios = [
            f"{statistics.median(getattr(usage, name) for usage in stock) / own:.1f}" if stock else "–"
            for name, own in (("cpu", cpu), ("rss", rss))
        ]
        print(f"| {title} | {cpu:.1f} | {rss:.0f} | {wall:.1f} | {written:.0f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
