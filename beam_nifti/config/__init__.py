"""The options of a build. In: texts, numbers and tuples. Out: frozen dataclasses, checked. No I/O."""

from beam_nifti.config.build import SPLIT_PATTERN, BuildConfig, Sharding, Splitting
from beam_nifti.config.columns import (
    LABEL_KINDS,
    LATER_COLUMNS,
    MISSING_LABELS,
    MISSING_MASKS,
    Columns,
    LabelColumn,
)
from beam_nifti.config.preparation import NONFINITE, ORIENTATIONS, PREPARATIONS, spell_steps
from beam_nifti.config.record import (
    COMPLEX_PARTS,
    COMPRESSION_LEVELS,
    COMPRESSIONS,
    FORMAT_FEATURES,
    FORMAT_VERSION,
    FRAMES,
    LATER_OPTIONS,
    MASK_DTYPES,
    MOST_FRAMES,
    VOXEL_DTYPES,
    RecordConfig,
)
from beam_nifti.config.rescaling import RESCALE_METHODS, SELECTIONS, Percentile, Window

__all__ = [
    "COMPLEX_PARTS",
    "COMPRESSIONS",
    "COMPRESSION_LEVELS",
    "FORMAT_FEATURES",
    "FORMAT_VERSION",
    "FRAMES",
    "LABEL_KINDS",
    "LATER_COLUMNS",
    "LATER_OPTIONS",
    "MASK_DTYPES",
    "MISSING_LABELS",
    "MISSING_MASKS",
    "MOST_FRAMES",
    "NONFINITE",
    "ORIENTATIONS",
    "PREPARATIONS",
    "RESCALE_METHODS",
    "SELECTIONS",
    "SPLIT_PATTERN",
    "VOXEL_DTYPES",
    "BuildConfig",
    "Columns",
    "LabelColumn",
    "Percentile",
    "RecordConfig",
    "Sharding",
    "Splitting",
    "Window",
    "spell_steps",
]
