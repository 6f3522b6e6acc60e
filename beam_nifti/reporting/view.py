"""`beam-nifti view`: a page to walk through the volume of a record, with nilearn's viewer.

The viewer's own page loads an icon from a server and does not escape its title, so it is embedded in a page
whose policy allows no loading. Source: docs/view.md.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.inspection.extract import StoredVolume
from beam_nifti.reporting.templates import load_templates
from beam_nifti.support.wording import first_few, size_text
from beam_nifti.volume.label_map import overlaid

_WINDOW: Final = (0.5, 99.5)  # percentiles of the voxels that are drawn black and white
_WIDTH: Final = 900  # pixels of the three slices together
_MOST_GROWTH: Final = 64
_MOST_VOXELS: Final = 1 << 26
_LONGEST_AXIS: Final = 32767
"""Limits of the grid of cubes that the viewer draws: as a multiple of the volume's voxels, or for small
volumes in all; and along an axis, by the header of NIfTI-1."""

_MASK_OPACITY: Final = 0.6
_MASK_COLOURS: Final = "tab20"
_NUM_COLOURS: Final = 20  # the first is omitted, because it means no label
_SHOWN_LABELS: Final = 12


def make_view(volume: StoredVolume, *, channel: int | None = None, with_mask: bool = False) -> str:
    """The HTML of a page with three slices through a volume, which the mouse moves.

    Args:
        volume: volume of a record.
        channel: channel on its last axis, from 0; required if there are several.
        with_mask: overlay the labels of its mask; where it has several, those of the last one on top.

    Raises:
        UsageError: there is no such channel or no mask, or the volume cannot be drawn.
    """
    _require_drawable(volume)
    values = volume.scaling.apply(_channel(volume, channel))
    if np.abs(values).max() > np.finfo(np.float32).max:
        raise UsageError(
            f"record {volume.example_id!r} has intensities beyond float32, so it cannot be drawn; write its "
            "image with `beam-nifti extract`"
        )
    labels = overlaid(volume.of_mask().voxels) if with_mask else None
    facts = [
        size_text(values.shape) + " voxels",
        size_text(volume.zooms) + " mm",
        f"channel {channel} of {volume.voxels.shape[3]}" if channel is not None else "",
        f"{values.min():g} to {values.max():g}",
        f"mask labels {first_few(np.unique(labels).tolist(), _SHOWN_LABELS)}" if labels is not None else "",
    ]
    return (
        load_templates()
        .get_template("view.html")
        .render(
            style_source="unsafe-inline",
            script_source="unsafe-inline",
            name=volume.example_id,
            facts=list(filter(None, facts)),
            viewer=_draw(values, labels, volume.affine),
        )
    )


def _require_drawable(volume: StoredVolume) -> None:
    """Refuse volumes that take too much memory as cubes of their smallest voxel size, as they are drawn."""
    shape = np.array(volume.voxels.shape[:3])
    extent = np.abs(volume.affine[:3, :3]) @ (shape - 1)
    grid = extent / nib.affines.voxel_sizes(volume.affine).min() + 1
    if grid.max() > _LONGEST_AXIS or grid.prod() > max(_MOST_VOXELS, _MOST_GROWTH * float(shape.prod())):
        raise UsageError(
            f"record {volume.example_id!r} has voxels of {size_text(volume.zooms)} mm, which are too unlike "
            "cubes to be drawn; write its image with `beam-nifti extract`"
        )


def _channel(volume: StoredVolume, channel: int | None) -> npt.NDArray[Any]:
    voxels = volume.voxels
    if voxels.ndim == 3:
        if channel is not None:
            raise UsageError(f"record {volume.example_id!r} has no channels; drop --channel")
        return voxels
    last = voxels.shape[3] - 1
    if channel is None or not 0 <= channel <= last:
        given = "--channel is missing" if channel is None else f"--channel is {channel}"
        raise UsageError(f"{given}: record {volume.example_id!r} has the channels 0 to {last}")
    return voxels[..., channel]


def _draw(
    values: npt.NDArray[np.float64], labels: npt.NDArray[Any] | None, affine: npt.NDArray[np.float64]
) -> str:
    """The viewer, as an element of a page."""
    from nilearn.plotting import view_img

    low, high = (float(end) for end in np.percentile(values, _WINDOW))
    high = high if high > low else low + 1
    # Black is 0 here, as nilearn fills with 0 what lies around a volume that is tilted.
    shades = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    if labels is not None and labels.any():
        above: dict[str, Any] = {
            "stat_map_img": nib.Nifti1Image(_colours(labels), affine),
            "threshold": 0.5,
            "cmap": _MASK_COLOURS,
            "vmin": 0,
            "vmax": _NUM_COLOURS,
            "opacity": _MASK_OPACITY,
            "colorbar": False,
        }
    else:
        centre = nib.affines.apply_affine(affine, (np.array(values.shape) - 1) / 2)
        above = {
            "stat_map_img": nib.Nifti1Image(values.astype(np.float32), affine),
            "cut_coords": centre.tolist(),
            "threshold": None,
            "cmap": "gray",
            "vmin": low,
            "vmax": high,
        }
    with warnings.catch_warnings():
        # That an image of two values be not interpolated, which nilearn itself does.
        warnings.simplefilter("ignore", UserWarning)
        view = view_img(
            **above,
            bg_img=nib.Nifti1Image(shades, affine),  # without one it draws memory that nobody wrote to
            black_bg=True,
            dim=0,
            symmetric_cmap=False,
            resampling_interpolation="nearest",  # voxels as they are
            width_view=_WIDTH,
        )
    element: str = view.get_iframe()
    return element


def _colours(labels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The number of the colour of each label; 0 for no label."""
    known = np.unique(labels[labels != 0])
    numbers = np.searchsorted(known, labels) % (_NUM_COLOURS - 1) + 1
    colours: npt.NDArray[np.float32] = np.where(labels == 0, 0, numbers).astype(np.float32)
    return colours
