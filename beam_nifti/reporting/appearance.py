"""What one record looks like: numbers, a small grid and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_nifti.inspection.record_checks import RecordSpec, affine_of
from beam_nifti.record.agreement import as_list
from beam_nifti.record.example import MASK_FEATURE, decode_example, decode_tensor, scaling_of
from beam_nifti.record.index import extra_column
from beam_nifti.reporting.thumbnail import block_means, draw_slices
from beam_nifti.support.cells import is_missing
from beam_nifti.support.wording import size_text
from beam_nifti.volume.grid import Grid, agreed_zooms, axes_to, orientation_of, turn_voxels, turn_zooms
from beam_nifti.volume.header import COLOURS
from beam_nifti.volume.rescale import UINT8_LEVELS, Scaling, Voxels, measure

SCHEMA: Final = pa.schema(
    [
        ("example_id", pa.string()),
        ("participant_id", pa.string()),
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
        ("grid", pa.binary()),
        ("picture", pa.binary()),
    ]
)
"""Schema of the rows.

`nonfinite` is the number of voxels that were replaced. The other numbers are of the stored voxels, in the
unit of `unit_of`. `extents` are the sides of the volume's box, right, anterior and superior; `grid` is the
volume in the same order of axes, GRID³ bytes from its darkest block to its brightest; `picture` is a WebP.
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


def look_at_record(payload: bytes, cells: Mapping[str, Any], spec: RecordSpec) -> dict[str, Any]:
    """The row, of SCHEMA, of one sound record.

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
    mask = None
    if MASK_FEATURE in features:
        mask = turn_voxels(decode_tensor(features[MASK_FEATURE]), turns)  # type: ignore[arg-type]
    sizes = agreed_zooms(affine, cells["zooms"]).tolist()
    zooms = turn_zooms(sizes, turns)
    sample = scaling.apply(_spread(voxels))
    intensity = measure(voxels, scaling)
    return {
        "example_id": cells["example_id"],
        "participant_id": cells["participant_id"],
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
        "picture": draw_slices(volume[..., :3] if in_colour else first, zooms, scaling, mask=mask),
    }


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
