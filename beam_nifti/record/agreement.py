"""Where a record and its row of the index state different values.

Both state labels, geometry and intensities. This package takes them from the index and other programs take
them from the record, so a difference is damage, or an attempt to show them different things.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import LabelColumn, RecordConfig
from beam_nifti.manifest.labels import LabelValue, label_of
from beam_nifti.record.example import (
    RANGE_FEATURES,
    SCALING_FEATURES,
    Features,
    decode_doubles,
    label_feature,
)
from beam_nifti.record.index import extra_column

ROUNDED: Final = {
    "label": "label",
    "affine": "affine",
    "zooms": "zooms",
    "min": "intensity_min",
    "max": "intensity_max",
}
"""Features that hold columns of the index as float32, by these columns."""

_GEOMETRY: Final = ("affine", "zooms")
_NO_SCALING: Final = dict(zip(SCALING_FEATURES, (1.0, 0.0), strict=True))


def compared_columns(config: RecordConfig) -> frozenset[str]:
    """The columns of the index that records also state."""
    labels = (extra_column(label.name) for label in config.labels or ())
    return frozenset([*ROUNDED, *RANGE_FEATURES, *SCALING_FEATURES, *labels])


def find_disagreements(
    features: Features, cells: Mapping[str, Any], labels: Sequence[LabelColumn]
) -> Iterator[str]:
    """Find where a record states something else than its row of the index.

    Args:
        features: features of the record.
        cells: its row of the index; columns that are not there are not compared.
        labels: columns whose values have features of their own.

    Raises:
        ShardError: a value is not of its kind.
    """
    for column, name in ROUNDED.items():
        if column in cells:
            yield from _compare_floats(name, features.get(name), cells[column])
    for name in RANGE_FEATURES:
        if name in cells:
            stored, said = _doubles(features, name), as_list(cells[name])
            if stored != said:
                yield f"{name} is {show(stored)}, but the index has {show(said)}"
    scaling = {name: none for name, none in _NO_SCALING.items() if name in cells}
    stored = [number for name, none in scaling.items() for number in _doubles(features, name) or [none]]
    said = [none if cells[name] is None else cells[name] for name, none in scaling.items()]
    if stored != said:
        yield f"scaling is {show(stored)}, but the index has {show(said)}"
    for label in labels:
        if (column := extra_column(label.name)) in cells:
            yield from _compare_label(features, label.name, label_of(cells[column], label))


def _doubles(features: Features, name: str) -> list[float]:
    return decode_doubles(features[name]) if name in features else []


def _compare_floats(name: str, feature: Any, cell: Any) -> Iterator[str]:
    if feature is None:
        # Voxel sizes can be missing where the affine, which gives them, is not.
        if cell is not None and name != "zooms":
            yield f"feature {name} is missing, but the index has a value for it"
        return
    stored = np.asarray(feature)
    if cell is None and name in _GEOMETRY:
        yield f"{name} is {show(stored)}, but the index has no value for it"
    elif cell is not None or name == "label":
        said = as_float32(as_list(np.nan if cell is None else cell))
        if not np.array_equal(stored, said, equal_nan=True):
            yield f"{name} is {show(stored)}, but the index has {show(said)}"


def _compare_label(features: Features, name: str, said: LabelValue) -> Iterator[str]:
    feature = features.get(label_feature(name))
    if feature is None:
        yield f"feature {label_feature(name)} is missing, but the index has a value for it"
    elif isinstance(said, str):
        text = bytes(feature).decode(errors="replace")
        if text != said:
            yield f"{label_feature(name)} is {text!r}, but the index has {said!r}"
    else:
        stored = np.asarray(feature)
        expected = np.array([said]) if isinstance(said, int) else as_float32([said])
        if not np.array_equal(stored, expected, equal_nan=True):
            yield f"{label_feature(name)} is {show(stored)}, but the index has {show(expected)}"


def as_list(cell: Any) -> list[Any]:
    """The values in a cell, of which there is one for each image of a record; none in an empty cell."""
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def as_float32(numbers: Sequence[float]) -> npt.NDArray[np.float32]:
    """Numbers rounded as in a record; those beyond float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)


def show(numbers: Iterable[Any]) -> str:
    """Numbers for a message; "nothing" if there are none."""
    return " ".join(f"{n:g}" for n in numbers) or "nothing"
