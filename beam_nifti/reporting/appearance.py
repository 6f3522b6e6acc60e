"""What one record looks like: numbers, a small grid and pictures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_nifti.inspection.record_checks import RecordSpec, affine_of
from beam_nifti.record.agreement import as_list
from beam_nifti.record.example import MASK_FEATURE, Features, decode_example, decode_tensor, scaling_of
from beam_nifti.record.index import extra_column
from beam_nifti.reporting.thumbnail import block_means, draw_labels, draw_slices
from beam_nifti.support.cells import is_missing
from beam_nifti.support.wording import size_text
from beam_nifti.volume.grid import Grid, agreed_zooms, axes_to, orientation_of, turn_voxels, turn_zooms
from beam_nifti.volume.header import COLOURS
from beam_nifti.volume.label_map import label_counts, overlaid
from beam_nifti.volume.rescale import UINT8_LEVELS, Scaling, Voxels, measure

SCHEMA: Final = pa.schema(
    [
        ("example_id", pa.string()),
        ("participant_id", pa.string()),
        ("row", pa.int64()),
        ("group", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("shape", pa.string()),
        ("spacing", pa.string()),
        ("orientation", pa.string()),
        ("dtype", pa.string()),
        ("nonfinite", pa.int64()),
        ("extents", pa.list_(pa.float64())),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("foreground", pa.float64()),
        ("quantiles", pa.list_(pa.float64())),
        ("digests", pa.list_(pa.binary())),
        ("mask_labels", pa.list_(pa.int64())),
        ("mask_counts", pa.list_(pa.int64())),
        ("num_labelled", pa.int64()),
        ("grid", pa.binary()),
        ("picture", pa.binary()),
        ("overlay", pa.binary()),
    ]
)
"""Schema of the rows.

`nonfinite` is the number of voxels that were replaced. The other numbers are of the stored voxels, in the
unit of `unit_of`. `extents` are the sides of the volume's box, right, anterior and superior; `grid` is the
volume in the same order of axes, GRID³ bytes from its darkest block to its brightest; `picture` is a WebP,
and `overlay` that of the mask's labels, if there are any. `group` is the cell of the column by which records
are grouped. `mask_counts` are the numbers of voxels that have each of `mask_labels` in any mask, for 0 of
those without a label; `num_labelled` is the number of all others. Records with one of the `digests` in common
have the same voxels.
"""

_QUANTILES: Final = np.linspace(0, 1, 33)
_SAMPLE: Final = 1 << 16  # voxels of a volume from which to estimate quantiles and foreground
_BINS: Final = 256


def unit_of(spec: RecordSpec) -> str:
    """The unit of the numbers in a row."""
    kept = spec.config.voxel_dtype == "native" or spec.config.method == "none"
    return "in the images' units" if kept else f"rescaled by {spec.config.rescale}"


def label_columns(spec: RecordSpec) -> dict[str, str]:
    """The column of the index of each label."""
    if spec.config.labels:
        return {column.name: extra_column(column.name) for column in spec.config.labels}
    return {"label": "label"} if spec.info.labelled else {}


def look_at_record(
    payload: bytes, cells: Mapping[str, Any], spec: RecordSpec, by: str | None = None
) -> dict[str, Any]:
    """The row, of SCHEMA, of one sound record; `by` is the column of the index by which records are grouped.

    If there are several channels or frames, numbers are over all of them, and grid and picture show the
    first. NaN or infinite voxels are a VolumeError.
    """
    features = decode_example(payload)
    voxels = decode_tensor(features["image_raw"])  # type: ignore[arg-type]
    scaling = scaling_of(features)
    if spec.config.voxel_dtype == "uint8":
        scaling = Scaling(slope=1 / UINT8_LEVELS)
    affine = affine_of(cells)
    turns = axes_to(Grid.of(voxels.shape, affine), "RAS")
    volume = turn_voxels(voxels, turns)
    first = volume if volume.ndim == 3 else volume[..., 0]
    in_colour = cells["dtype"] in COLOURS.values() and spec.config.channels is None and volume.ndim == 4
    sizes = agreed_zooms(affine, cells["zooms"]).tolist()
    zooms = turn_zooms(sizes, turns)
    sample = scaling.apply(_spread(voxels))
    intensity = measure(voxels, scaling)
    return {
        "example_id": cells["example_id"],
        "participant_id": cells["participant_id"],
        "row": cells["row"],
        "group": None if by is None else _text(cells.get(by)),
        "labels": [_text(cells[column]) for column in label_columns(spec).values()],
        "shape": size_text(voxels.shape),
        "spacing": size_text(round(zoom, 3) for zoom in sizes),
        "orientation": orientation_of(affine),
        "dtype": cells["dtype"],
        "nonfinite": sum(as_list(cells.get("num_nonfinite"))),
        "extents": np.multiply(first.shape, zooms),
        "mean": intensity.mean,
        "std": intensity.std,
        "foreground": float(np.mean(sample > otsu_threshold(sample))),
        "quantiles": np.quantile(sample, _QUANTILES),
        "grid": _to_bytes(block_means(first) * math.copysign(1, scaling.slope)),
        "digests": _digests(voxels, volume) if intensity.std else (),
        "picture": draw_slices(volume[..., :3] if in_colour else first, zooms, scaling),
        **(_of_mask(features, turns, zooms, spec) if MASK_FEATURE in features else {}),
    }


def _of_mask(
    features: Features, turns: npt.NDArray[Any], zooms: Sequence[float], spec: RecordSpec
) -> dict[str, Any]:
    mask = decode_tensor(features[MASK_FEATURE])  # type: ignore[arg-type]
    counts, drawn = label_counts(mask), overlaid(mask)
    num_labelled = np.count_nonzero(drawn)
    counts[0] = drawn.size - num_labelled  # and not where only one of the masks has no label
    labels = np.flatnonzero(counts)
    return {
        "mask_labels": labels,
        "mask_counts": counts[labels],
        "num_labelled": num_labelled,
        "overlay": draw_labels(turn_voxels(drawn, turns), zooms, spec.info.mask_labels or ()),
    }


def _digests(voxels: Voxels, volume: Voxels) -> tuple[bytes, ...]:
    """Digests of the voxels as stored, and of the volume in RAS orientation.

    The first is that of a copy whose header states another orientation, the second that of a copy whose
    voxels were reordered.
    """
    same = volume.strides == voxels.strides and volume.shape == voxels.shape
    return tuple(_digest(array) for array in ((voxels,) if same else (voxels, volume)))


def _digest(array: Voxels) -> bytes:
    hasher = hashlib.blake2b(f"{array.shape} {array.dtype.name}".encode(), digest_size=16)
    for plane in array:  # not the volume at once, as planes that are not contiguous are copied
        hasher.update(np.ascontiguousarray(plane).view(np.uint8).data)
    return hasher.digest()


def _spread(voxels: Voxels) -> Voxels:
    """A deterministic sample of a volume's voxels."""
    step = max(1, voxels.size // _SAMPLE)
    while math.gcd(step, voxels.size) > 1:  # else it may pick the same few places of every row
        step += 1
    return voxels.reshape(-1)[::step]


def otsu_threshold(values: npt.NDArray[np.float64]) -> float:
    """The threshold between a volume's foreground and background.

    Of the thresholds between the bins of a histogram, it has the largest variance between the two classes.
    The brightest half percent counts as one brightness. Source: Otsu 1979, IEEE Transactions on Systems, Man,
    and Cybernetics 9(1).
    """
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    if not low < high:
        return low
    counts, edges = np.histogram(np.minimum(values, high), _BINS, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    means_below = sums[:-1] / below
    means_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * (means_above - means_below) ** 2)])


def _to_bytes(grid: npt.NDArray[np.float64]) -> bytes:
    low, high = grid.min(), grid.max()
    shades = (grid - low) / (high - low) if low < high else np.zeros_like(grid)
    return np.round(255 * shades).astype(np.uint8).tobytes()


def _text(cell: object) -> str | None:
    if cell is None or (isinstance(cell, str) and is_missing(cell)):
        return None
    return str(cell).removesuffix(".0") if isinstance(cell, float) else str(cell)
