"""How elements are encoded where a runner has to: between two stages, and to judge their size."""

from __future__ import annotations

import pickle
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final, cast

from apache_beam import coders
from isal import isal_zlib

from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.pipeline.plan import WorkUnit
from beam_nifti.pipeline.records import Record
from beam_nifti.volume.volume import Volume

_PACKED_ROW_BYTES: Final = 20
_cells = attrgetter(*(f.name for f in fields(VolumeRow)))


class VolumeCoder(coders.Coder):
    """Pickle, and a size that does not take pickling: Beam asks for that of ten volumes a step."""

    def encode(self, value: Volume) -> bytes:
        """To bytes, where a runner cuts the chain."""
        return pickle.dumps(value, protocol=5)

    def decode(self, encoded: bytes) -> Volume:
        """And back."""
        return cast(Volume, pickle.loads(encoded))

    def estimate_size(self, value: Volume) -> int:
        """Bytes of the voxels."""
        return int(value.voxels.nbytes)

    def to_type_hint(self) -> type[Any]:
        """What it encodes."""
        return Volume


class RecordCoder(coders.Coder):
    """Pickle, and a size that does not take pickling."""

    def encode(self, value: Record) -> bytes:
        """To bytes, where a runner cuts the chain."""
        return pickle.dumps(value, protocol=5)

    def decode(self, encoded: bytes) -> Record:
        """And back."""
        return cast(Record, pickle.loads(encoded))

    def estimate_size(self, value: Record) -> int:
        """Bytes of the Example."""
        return len(value.example)

    def is_deterministic(self) -> bool:
        """It is never a key."""
        return False

    def to_type_hint(self) -> type[Any]:
        """What it encodes."""
        return Record


class WorkUnitCoder(coders.Coder):
    """Compressed pickle of the rows' cells: a runner in this process holds all of them in memory.

    Cells, as a dataclass with slots is pickled field by field in Python.
    """

    def encode(self, value: WorkUnit) -> bytes:
        """To bytes, before the shuffle."""
        unit = (value.task, [_cells(row) for row in value.rows])
        packed: bytes = isal_zlib.compress(pickle.dumps(unit, protocol=5), 1)
        return packed

    def decode(self, encoded: bytes) -> WorkUnit:
        """And back."""
        task, rows = pickle.loads(isal_zlib.decompress(encoded))
        return WorkUnit(task, tuple(VolumeRow(*cells) for cells in rows))

    def estimate_size(self, value: WorkUnit) -> int:
        """About what `encode` gives, without its work: Beam asks for it five times a unit."""
        return _PACKED_ROW_BYTES * len(value.rows)

    def to_type_hint(self) -> type[Any]:
        """What it encodes."""
        return WorkUnit


coders.registry.register_coder(Record, RecordCoder)
coders.registry.register_coder(Volume, VolumeCoder)
coders.registry.register_coder(WorkUnit, WorkUnitCoder)
