"""`beam-nifti view`: a page to walk through the volume of one record, by nilearn's viewer.

The viewer's own page asks a server for an icon and does not escape its title, so it stands within a page of
ours, whose policy lets nothing be loaded. Source: docs/view.md.
"""

from __future__ import annotations

from typing import Any, Final

import nibabel as nib
import numpy as np
import numpy.typing as npt

from beam_nifti.errors import UsageError
from beam_nifti.extract import StoredVolume
from beam_nifti.templates import load_templates

_WINDOW: Final = (0.5, 99.5)
"""Percentiles of the voxels that are drawn black and white."""

_WIDTH: Final = 900
"""Pixels of the three slices together."""

_MASK_OPACITY: Final = 0.6


def make_view(volume: StoredVolume, *, channel: int | None = None, with_mask: bool = False) -> str:
    """The HTML of a page with three slices through a volume, which are moved with the mouse.

    Args:
        volume: of a record.
        channel: of its last axis, from 0; needed where there are several.
        with_mask: lay the labels of its mask over it.

    Raises:
        UsageError: there is no such channel or no mask, or the affine does not say where the voxels lie.
    """
    values = volume.scaling.apply(_channel(volume, channel)).astype(np.float32)
    if np.linalg.matrix_rank(volume.affine[:3, :3]) < 3:
        raise UsageError(
            f"record {volume.example_id!r} has an affine that gives an axis no direction, so it cannot be "
            "drawn in space; write its image with `beam-nifti extract`"
        )
    labels = volume.of_mask().voxels if with_mask else None
    facts = [
        "×".join(map(str, values.shape)) + " voxels",
        "×".join(f"{zoom:g}" for zoom in volume.zooms) + " mm",
        f"channel {channel} of {volume.voxels.shape[3]}" if channel is not None else "",
        f"{values.min():g} to {values.max():g}",
        f"mask with {np.unique(labels[labels != 0]).size} labels" if labels is not None else "",
    ]
    return (
        load_templates()
        .get_template("view.html")
        .render(
            name=volume.example_id,
            facts=list(filter(None, facts)),
            viewer=_draw(values, labels, volume.affine),
        )
    )


def _channel(volume: StoredVolume, channel: int | None) -> npt.NDArray[Any]:
    voxels = volume.voxels
    if voxels.ndim == 3:
        if channel is not None:
            raise UsageError(f"record {volume.example_id!r} has no channels; leave --channel out")
        return voxels
    last = voxels.shape[3] - 1
    if channel is None or not 0 <= channel <= last:
        given = "--channel is missing" if channel is None else f"--channel is {channel}"
        raise UsageError(f"{given}: record {volume.example_id!r} has the channels 0 to {last}")
    return voxels[..., channel]


def _draw(
    values: npt.NDArray[np.float32], labels: npt.NDArray[Any] | None, affine: npt.NDArray[np.float64]
) -> str:
    """The viewer, as an element of a page."""
    from nilearn.plotting import view_img

    image = nib.Nifti1Image(values, affine)
    if labels is None:
        low, high = (float(end) for end in np.percentile(values, _WINDOW))
        centre = nib.affines.apply_affine(affine, (np.array(values.shape) - 1) / 2)
        shown: dict[str, Any] = {
            "stat_map_img": image,
            "cut_coords": centre.tolist(),
            "threshold": None,
            "cmap": "gray",
            "vmin": low,
            "vmax": high if high > low else low + 1,
        }
    else:
        shown = {
            "stat_map_img": nib.Nifti1Image(labels.astype(np.float32), affine),
            "threshold": 0.5,
            "cmap": "tab10",
            "vmin": 0,
            "vmax": max(float(labels.max()), 1),
            "opacity": _MASK_OPACITY,
        }
    view = view_img(
        **shown,
        bg_img=image,  # without one it draws memory that nothing was written to
        black_bg=True,
        dim=0,
        symmetric_cmap=False,
        resampling_interpolation="nearest",  # voxels as they are
        width_view=_WIDTH,
    )
    element: str = view.get_iframe()
    return element
