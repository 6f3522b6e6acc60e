"""Work that is done again and again in a thread of its own, while something else goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def in_background(work: Iterable[float], name: str) -> Iterator[None]:
    """Go on with some work while the block runs.

    Args:
        work: gives, each time that it has done something, the seconds to sleep before it is asked to go on;
            that is where it ends with the block, which waits for it.
        name: of the thread.
    """
    stop = threading.Event()

    def run() -> None:
        for pause in work:
            if stop.wait(pause):
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
