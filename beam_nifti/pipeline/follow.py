"""How far a build on a cluster is, by what has appeared in its storage.

The workers of a cluster do not report to the launching process, and engines report counters differently, some
only at the end. With all of them, parts and shards appear.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from beam_nifti.pipeline.parts import parts_folder
from beam_nifti.pipeline.plan import BuildPlan
from beam_nifti.pipeline.progress import Progress, show_progress
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import in_background

REQUESTS_PER_MINUTE: Final = 20
"""Most requests, whatever the number of parts: with more parts, looks are less frequent."""

_PAUSE_AFTER_ERROR: Final = 60.0
_NAMES_PER_REQUEST: Final = 1000  # of S3 and Cloud Storage


@dataclass(frozen=True)
class BuildProgress:
    """What there was at one look.

    Attributes:
        num_volumes: volumes of the units that have left a part, and of the complete shards.
        num_shards: complete shards.
        num_requests: requests to a store that such a look takes.
    """

    num_volumes: int
    num_shards: int
    num_requests: int

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return self.num_requests * 60 / REQUESTS_PER_MINUTE


class BuildWatcher:
    """Looks at a build from outside.

    A unit counts as a whole once it has left a part with its index, as the names tell where a part begins,
    and to open the indexes would cost a request for each. So volumes that failed count with their unit.
    """

    def __init__(self, plan: BuildPlan) -> None:
        root, fingerprint = plan.parts_root, plan.config.record.fingerprint
        self._parts = storage.join(root, fingerprint)
        self._output = plan.config.output
        self._units = {
            (parts_folder(root, fingerprint, task.name.split, task.name.index), task.name.index_file): (
                plan.unit_ranges(task.positions)
            )
            for task in plan.read_tasks()
        }

    def look(self) -> BuildProgress:
        """List the parts, then the shards: so a shard whose parts are removed meanwhile is not missed."""
        parts = list[str]()
        # On the local disk there is no folder before the first part, and one in it may just be gone.
        with contextlib.suppress(FileNotFoundError):
            parts.extend(storage.list_tree(self._parts, "", 1))
        shards = {f"index/{name}" for name in storage.list_files(storage.join(self._output, "index"))}
        firsts: dict[str, set[int]] = {}
        for path in parts:
            folder, _, name = path.rpartition("/")
            first = name.partition("-")[0]
            if name.endswith(".parquet") and first.isdecimal():
                firsts.setdefault(storage.join(self._parts, folder), set()).add(int(first))
        num_volumes = num_shards = 0
        for (folder, index_file), units in self._units.items():
            if index_file in shards:
                num_shards += 1
                num_volumes += sum(map(len, units))
            else:
                num_volumes += sum(len(unit) for unit in _begun(units, firsts.get(folder, ())))
        pages = (len(parts) + len(shards)) // _NAMES_PER_REQUEST
        return BuildProgress(num_volumes, num_shards, 2 + pages)


def _begun(units: Sequence[range], firsts: Iterable[int]) -> Iterator[range]:
    """The units in which a part begins; an earlier build with other shards may have left parts elsewhere."""
    starts, whole = [unit.start for unit in units], range(units[0].start, units[-1].stop)
    numbers = {bisect.bisect(starts, first) - 1 for first in firsts if first in whole}
    return (units[number] for number in numbers)


@contextlib.contextmanager
def follow_build(plan: BuildPlan) -> Iterator[None]:
    """Show on standard error how far a build is while the block runs it elsewhere."""
    # Not the steps' own, to which a cluster's worker adds too if it is this process.
    watcher, progress = BuildWatcher(plan), Progress()
    kept: int | None = None

    def look() -> float:
        nonlocal kept
        try:
            seen = watcher.look()
        except OSError:  # what is wrong with the storage, the build itself will say
            return _PAUSE_AFTER_ERROR
        kept = seen.num_volumes if kept is None else kept
        volumes = max(progress.volumes, seen.num_volumes - kept)
        progress.reset(volumes=volumes, kept=kept, shards=seen.num_shards)
        return seen.pause

    def watch() -> Iterator[float]:
        while True:
            yield look()

    with show_progress(plan.num_examples, progress=progress):
        with in_background(watch(), "follow"):
            yield
        look()  # the end
