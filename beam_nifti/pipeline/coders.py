"""How elements are encoded when a runner requires it: between two stages, and to estimate their size."""

from __future__ import annotations

import pickle
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

from apache_beam import coders
from isal import isal_zlib

from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.pipeline.plan import WorkUnit
from beam_nifti.pipeline.records import Record
from beam_nifti.volume.volume import Volume

_PACKED_ROW_BYTES: Final = 20
_cells = attrgetter(*(f.name for f in fields(VolumeRow)))


class _PickleCoder(coders.Coder):
    """Pickle, with a size that is known without pickling: Beam asks for that of ten elements a step."""

    def encode(self, value: Any) -> bytes:
        return pickle.dumps(value, protocol=5)

    def decode(self, encoded: bytes) -> Any:
        return pickle.loads(encoded)


class _VolumeCoder(_PickleCoder):
    def estimate_size(self, value: Volume) -> int:
        return int(value.voxels.nbytes)

    def to_type_hint(self) -> type[Any]:
        return Volume


class _RecordCoder(_PickleCoder):
    def estimate_size(self, value: Record) -> int:
        return len(value.example)

    def to_type_hint(self) -> type[Any]:
        return Record


class _WorkUnitCoder(coders.Coder):
    """Compressed pickle of the rows' cells: a runner in this process holds all of them in memory.

    Cells, as a dataclass with slots is pickled field by field in Python.
    """

    def encode(self, value: WorkUnit) -> bytes:
        unit = (value.task, [_cells(row) for row in value.rows])
        packed: bytes = isal_zlib.compress(pickle.dumps(unit, protocol=5), 1)
        return packed

    def decode(self, encoded: bytes) -> WorkUnit:
        task, rows = pickle.loads(isal_zlib.decompress(encoded))
        return WorkUnit(task, tuple(VolumeRow(*cells) for cells in rows))

    def estimate_size(self, value: WorkUnit) -> int:
        return _PACKED_ROW_BYTES * len(value.rows)

    def to_type_hint(self) -> type[Any]:
        return WorkUnit


coders.registry.register_coder(Record, _RecordCoder)
coders.registry.register_coder(Volume, _VolumeCoder)
coders.registry.register_coder(WorkUnit, _WorkUnitCoder)
