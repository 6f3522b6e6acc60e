"""Problems that concurrent checks find, collected in the order of the dataset."""

from __future__ import annotations

import bisect
import threading
from enum import IntEnum
from typing import Final

from beam_nifti.support.wording import counted, one_line

MAX_PROBLEMS: Final = 20  # problems to report; the rest are counted


class Scope(IntEnum):
    """What a problem concerns, in the order of reporting."""

    DATASET = 0
    SHARD = 1
    ROWS = 2
    RECORD = 3


class Problems:
    """The first MAX_PROBLEMS problems in the order of the dataset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[tuple[int, ...], str]] = []
        self._total = 0

    def add(self, scope: Scope, problem: str, *place: int) -> None:
        """Add a problem. `place` orders problems of one scope, such as by shard and record."""
        with self._lock:
            self._total += 1
            bisect.insort(self._kept, ((scope, *place), one_line(problem)), key=lambda kept: kept[0])
            del self._kept[MAX_PROBLEMS:]

    def texts(self) -> tuple[str, ...]:
        """The problems kept, and one more sentence if there were more."""
        more = self._total - len(self._kept)
        texts = tuple(text for _, text in self._kept)
        return (*texts, f"and {counted(more, 'more problem')}") if more else texts
