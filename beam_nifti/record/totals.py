"""What the indexes of a dataset add up to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa

from beam_nifti.config import RecordConfig
from beam_nifti.record.index import mask_labels, schema_of

_REPLACED: Final = ("num_nonfinite", "target_nonfinite")
"""Columns that count voxels which were replaced."""


@dataclass(frozen=True, slots=True)
class RecordTotals:
    """Totals over some records. Those of disjoint records add up.

    Attributes:
        num_nonfinite: voxels of images and targets that were NaN or infinite and were replaced.
        num_made_finite: records that had such voxels.
        mask_labels: labels of the masks.
        mapped_labels: how many records had a label that was mapped to another one, by that label.
    """

    num_nonfinite: int = 0
    num_made_finite: int = 0
    mask_labels: frozenset[int] = frozenset()
    mapped_labels: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, table: pa.Table) -> RecordTotals:
        """The totals of an index. Cells may be empty, as `WriteToTFRecord` leaves them."""
        names = table.column_names
        replaced = [table[name].to_pylist() for name in _REPLACED if name in names]
        counts = [sum(np.sum(cell or 0) for cell in cells) for cells in zip(*replaced, strict=True)]
        mapped = (
            (cell or () for cell in table["mapped_labels"].to_pylist()) if "mapped_labels" in names else ()
        )
        return cls(
            num_nonfinite=int(sum(counts)),
            num_made_finite=int(np.count_nonzero(counts)),
            mask_labels=frozenset(mask_labels(table)) if "mask_labels" in names else frozenset(),
            mapped_labels=Counter(label for cell in mapped for label in set(cell)),
        )

    @staticmethod
    def columns(record: RecordConfig) -> list[str]:
        """The columns of an index of such records that are added up."""
        return [
            name for name in (*_REPLACED, "mask_labels", "mapped_labels") if name in schema_of(record).names
        ]

    def __add__(self, other: RecordTotals) -> RecordTotals:
        return RecordTotals(
            self.num_nonfinite + other.num_nonfinite,
            self.num_made_finite + other.num_made_finite,
            self.mask_labels | other.mask_labels,
            self.mapped_labels + other.mapped_labels,
        )

    def mapped(self, record: RecordConfig) -> list[dict[str, int]]:
        """Each label that is mapped, its new label, and how many records had it, as JSON."""
        return [
            {"old": old, "new": new, "num_examples": self.mapped_labels[old]}
            for old, new in sorted(record.label_map.items())
        ]

    def nonfinite(self) -> dict[str, int]:
        """How many voxels were replaced, in how many records, as JSON."""
        return {"num_voxels": self.num_nonfinite, "num_examples": self.num_made_finite}
