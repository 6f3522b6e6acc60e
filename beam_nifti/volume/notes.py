"""What a user should know about images that are accepted. A build prints one warning per kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from beam_nifti.config import FAR
from beam_nifti.support.wording import counted, first_few

TEXTS: Final = {
    "sform-unusable": "the sform is singular or not finite; the qform is used",
    "sform-qform-disagree": (
        "the sform and the qform place a voxel more than a tenth of a voxel apart; the sform is used"
    ),
    "pixdim-disagrees": (
        "the voxel sizes in the header (pixdim) are not those of its affine; those of the affine are used"
    ),
    "units-converted": "the header's spatial unit is not mm; affine and voxel sizes are converted to mm",
    "units-unknown": "the header's spatial unit is not known; mm is assumed",
    "frames-dropped": "the last frames are too few for a clip of --frames each:N, and are dropped",
    "labels-lost-to-crop": (
        "--crop-foreground cut off labelled voxels of the mask; to keep them, use --crop-foreground mask"
    ),
    "far-from-cohort": (
        "the mean of the voxels that --rescale-within selects is far from the means of the volumes in the "
        f"statistics, by more than {FAR} interquartile ranges; look for wrong units, or use --overwrite to "
        "measure the cohort again"
    ),
    "labels-lost-to-shape": "--shape cut off labelled voxels of the mask; to keep them, use a larger --shape",
    "labels-lost-to-reference": "labelled voxels of the mask lie outside the grid of --reference",
    "labels-lost-to-align": (
        "labelled voxels of the mask lie outside the first image of their example, to whose grid --align "
        "brings them"
    ),
    "rounded-target": (
        "integers of the target change by a half or more in float32, which has no odd integers above "
        "16,777,216; store the target in another unit, or subtract an offset"
    ),
    "beyond-field-of-view": (
        "an image does not cover the whole grid of --reference; where it is missing, images and targets have "
        "their least value and masks 0"
    ),
    "beyond-other-image": (
        "an image, mask or target does not cover the whole first image of its example; where it is missing, "
        "--align gives images and targets their least value and masks 0"
    ),
}
"""A sentence for each note."""

OF_VOXELS: Final = frozenset(
    {
        "far-from-cohort",
        "labels-lost-to-crop",
        "labels-lost-to-shape",
        "labels-lost-to-reference",
        "labels-lost-to-align",
        "beyond-field-of-view",
        "rounded-target",
    }
)
"""Notes that headers do not determine, so `check` names their images only with `--voxels`."""


_SHOWN_LABELS: Final = 10  # in a warning


def counter_name(note: str) -> str:
    """Beam's counter of the examples that have a note."""
    return f"note-{note}"


def join_notes(notes: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The notes of several images, each once."""
    return tuple(dict.fromkeys(note for some in notes for note in some))


def warnings_of(counters: Mapping[str, int]) -> Iterator[str]:
    """A warning for each note that is among the counters of a build."""
    for note, text in TEXTS.items():
        if count := counters.get(counter_name(note), 0):
            command = f"check{' --voxels' if note in OF_VOXELS else ''}"
            yield f"warning: {counted(count, 'example')}: {text}; beam-nifti {command} lists these images"


def of_unmapped(labels: Sequence[int]) -> str:
    """That these labels, which `--map-labels` replaces, are in no mask."""
    return f"--map-labels replaces labels that no mask has: {first_few(labels, _SHOWN_LABELS)}"
