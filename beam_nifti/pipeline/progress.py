"""How far a build is: a bar on a terminal or in a notebook, otherwise a line in the log from time to time.

The steps of a pipeline add to the `Progress` of the build that made them, if they run in its process. On a
cluster nobody shows it: `follow.py` counts what appears in the storage.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakValueDictionary

from beam_nifti.support import logs
from beam_nifti.support.process import in_background
from beam_nifti.support.terminal import under_screen
from beam_nifti.support.wording import bytes_text, counted


@dataclass
class Progress:
    """What a pipeline has done so far; safe to add to from many threads.

    A step holds it. Runners pickle steps, even in their own process, where the copy is the same object.

    Attributes:
        volumes: volumes that became records.
        failed: volumes that failed.
        kept: records of an earlier run.
        num_bytes: size of the records.
        shards: complete shards.
    """

    volumes: int = 0
    failed: int = 0
    kept: int = 0
    num_bytes: int = 0
    shards: int = 0
    _key: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        """Add to attributes."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def reset(self, **counts: int) -> None:
        """Set attributes, the others to 0."""
        with self._lock:
            self.__dict__.update(volumes=0, failed=0, kept=0, num_bytes=0, shards=0)
            self.__dict__.update(counts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, (self._key,)

    @property
    def done(self) -> int:
        """What needs no more work."""
        return self.volumes + self.failed + self.kept


_SHOWN: Final = WeakValueDictionary[str, Progress]()
_CURRENT: Final = ContextVar[Progress | None]("progress", default=None)


def _find(key: str) -> Progress:
    return _SHOWN.get(key) or Progress()


def current_progress() -> Progress:
    """The progress that is shown, for the steps of a pipeline; one that nobody sees if none is."""
    return _CURRENT.get() or Progress()


_BAR_SECONDS: Final = 0.2
_LINE_SECONDS: Final = 30.0


@contextmanager
def no_progress() -> Iterator[None]:
    """Show nothing."""
    yield


@contextmanager
def show_progress(total: int, unit: str = "volume", progress: Progress | None = None) -> Iterator[None]:
    """Show a progress while the block runs, from nothing to a total.

    Without `progress`, show that of the pipelines that are made in the block, by `current_progress`.

    A terminal, by standard error, and a notebook get a bar with the rate and the time left; a log gets a line
    every 30 seconds.
    """
    from tqdm.auto import tqdm

    token = None
    if progress is None:
        progress = Progress(_key=uuid.uuid4().hex)
        _SHOWN[progress._key] = progress
        token = _CURRENT.set(progress)
    started = time.monotonic()
    stream = sys.stderr
    has_bar = (stream is not None and stream.isatty()) or _is_notebook()
    drawn_on = under_screen(stream)
    with tqdm(total=total, unit=unit, dynamic_ncols=True, file=drawn_on, disable=not has_bar) as bar:

        def refresh() -> None:
            elapsed = max(time.monotonic() - started, 1e-3)
            if has_bar:
                bar.set_postfix_str(", ".join(_facts(progress, elapsed)), refresh=False)
                bar.update(progress.done - bar.n)
            else:
                _log_line(progress, total, unit, elapsed)

        def follow() -> Iterator[float]:
            while True:
                yield _BAR_SECONDS if has_bar else _LINE_SECONDS
                refresh()

        try:
            with in_background(follow(), "progress"):
                yield
        finally:
            if token is not None:
                _CURRENT.reset(token)
            if has_bar:
                refresh()


def _is_notebook() -> bool:
    """Whether this is a notebook's kernel, which shows bars without a terminal."""
    return "ipykernel" in sys.modules


def _facts(progress: Progress, elapsed: float) -> Iterator[str]:
    """The facts besides the number of volumes."""
    if progress.num_bytes:
        yield f"{bytes_text(progress.num_bytes / elapsed)}/s"
    if progress.failed:
        yield f"{progress.failed:,} failed"
    if progress.shards:
        yield f"{counted(progress.shards, 'shard')} complete"


def _log_line(progress: Progress, total: int, unit: str, elapsed: float) -> None:
    from tqdm.std import tqdm

    done = progress.done
    rate = (done - progress.kept) / elapsed
    left = round((total - done) / rate) if rate else None
    facts = [f"{done:,} of {total:,} {unit}s", f"{rate:.1f} per second", *_facts(progress, elapsed)]
    logs.LOGGER.info(
        "%s, %s left",
        ", ".join(facts),
        "?" if left is None else tqdm.format_interval(left),
        extra=logs.fields(
            unit=unit,
            total=total,
            done=done,
            failed=progress.failed,
            shards=progress.shards,
            per_second=round(rate, 3),
            seconds_left=left,
        ),
    )
