"""How far this process is, for a bar on the screen.

The steps of a pipeline add to `METER`; a local build reads it from the same process. On a cluster
nobody reads it, and Beam's own counters tell.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from tqdm import tqdm


@dataclass
class Meter:
    """Volumes and bytes done so far; safe to add to from many threads."""

    volumes: int = 0
    failed: int = 0
    num_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, volumes: int = 0, failed: int = 0, num_bytes: int = 0) -> None:
        """Count some more."""
        with self._lock:
            self.volumes += volumes
            self.failed += failed
            self.num_bytes += num_bytes

    def reset(self) -> None:
        """Start again from nothing."""
        with self._lock:
            self.volumes = self.failed = self.num_bytes = 0


METER = Meter()

_BAR_SECONDS: Final = 0.2
_LINE_SECONDS: Final = 30.0


@contextmanager
def no_progress() -> Iterator[None]:
    """Show nothing."""
    yield


@contextmanager
def show_progress(total: int, unit: str = "volume") -> Iterator[None]:
    """Show `METER` on standard error while the block runs.

    A terminal gets a bar with the rate and the time left; a log file a plain line every 30 seconds.

    Args:
        total: of what is counted.
        unit: what is counted.
    """
    METER.reset()
    stream = sys.stderr
    is_terminal = stream.isatty()
    with tqdm(total=total, unit=unit, dynamic_ncols=True, file=stream, disable=not is_terminal) as bar:
        started = time.monotonic()

        def refresh() -> None:
            done = METER.volumes + METER.failed
            elapsed = time.monotonic() - started
            rate = f"{METER.num_bytes / 1e6 / max(elapsed, 1e-3):.1f} MB/s"
            facts = f"{rate}, {METER.failed} failed" if METER.failed else rate
            if is_terminal:
                bar.set_postfix_str(facts, refresh=False)
                bar.update(done - bar.n)
            else:
                left = tqdm.format_interval(elapsed * (total - done) / done) if done else "?"
                print(f"{done} of {total} {unit}s, {facts}, {left} left", file=stream, flush=True)

        def follow() -> None:
            while not stop.wait(_BAR_SECONDS if is_terminal else _LINE_SECONDS):
                refresh()

        stop = threading.Event()
        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if is_terminal:
                refresh()
