"""Converts a dataset to the current format without its images, checking every byte that it reads.

A thread converts a shard at a time and holds one record. No runner is involved: nothing is exchanged between
shards, and what is written does not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.inspection.problems import Problems, Scope
from beam_nifti.inspection.record_checks import RecordSpec
from beam_nifti.inspection.shard_pass import ShardPass, StoredRecord
from beam_nifti.pipeline.conversion import Conversion
from beam_nifti.pipeline.progress import Progress, current_progress
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo
from beam_nifti.support.process import keep_buffers


def convert_dataset(conversion: Conversion, workers: int = 1) -> tuple[DatasetInfo, int]:
    """Convert a dataset, as `beam_nifti.convert`, which documents the errors.

    Returns:
        The converted dataset, and how many of its records an earlier run had finished.
    """
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it must be at least 1")
    keep_buffers()
    with conversion.opened() as kept:
        num_kept, progress = sum(shard.num_examples for shard in kept.values()), current_progress()
        progress.add(kept=num_kept, shards=len(kept))
        try:
            made = _convert_shards(conversion, kept.keys(), workers, progress)
        except DatasetError:
            conversion.refuse_rebuilt()  # which explains apparent damage
            raise
        conversion.refuse_rebuilt()
        return conversion.publish(kept | made), num_kept


def _convert_shards(
    conversion: Conversion, kept: Collection[str], workers: int, progress: Progress
) -> dict[str, ShardInfo]:
    """Convert all shards but those that are kept; what was written, by the old name."""
    stop, spec = threading.Event(), RecordSpec(conversion.source)
    shards = [
        (name, shard)
        for name, split in conversion.source.splits.items()
        for shard in split.shards
        if shard.name not in kept
    ]

    def convert(split: str, shard: ShardInfo) -> tuple[str, ShardInfo]:
        done = _convert_shard(conversion, split, shard, spec, stop, progress)
        progress.add(shards=1)
        return shard.name, done

    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            return dict(
                done.result() for done in as_completed(pool.submit(convert, *each) for each in shards)
            )
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _convert_shard(
    conversion: Conversion,
    split: str,
    shard: ShardInfo,
    spec: RecordSpec,
    stop: threading.Event,
    progress: Progress,
) -> ShardInfo:
    problems = Problems()
    shard_pass = ShardPass(conversion.old, shard, split, 0, spec, problems)

    def refuse_damaged() -> None:
        if texts := problems.texts():
            raise DatasetError(
                "\n  ".join([f"{conversion.old}: is damaged, so it is not converted:", *texts])
                + "\nrestore the files from a copy, or build this dataset again with --recheck; then "
                "convert it again"
            )

    def checked(record: StoredRecord) -> bytes:
        def tell(problem: str) -> None:
            problems.add(Scope.RECORD, f"{record.name}: {problem}", 0, record.ordinal)

        payload = record.check(spec, tell)
        refuse_damaged()
        assert payload is not None
        return payload

    record = shard_pass.take()
    refuse_damaged()
    with conversion.writing(shard, shard_pass.columns) as writer:
        while record is not None:
            if stop.is_set():
                raise CancelledError
            progress.add(volumes=1, num_bytes=writer.write(record.cells, checked(record)))
            record = shard_pass.take()
        refuse_damaged()
    return conversion.finish(shard, writer, shard_pass.versions)
