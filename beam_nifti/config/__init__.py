"""The options of a build. In: texts, numbers and tuples. Out: frozen dataclasses, checked. No I/O."""

from beam_nifti.config.build import SPLIT_PATTERN, BuildConfig, Sharding, Splitting
from beam_nifti.config.columns import LABEL_KINDS, MISSING_LABELS, Columns, LabelColumn
from beam_nifti.config.preparation import (
    EXCLUSIVE,
    INTERPOLATIONS,
    MASK_INTERPOLATIONS,
    ORIENTATIONS,
    PREPARATIONS,
    RESAMPLING_DETAILS,
    RESAMPLINGS,
    SEPARATE_Z,
    ReferenceGrid,
    spell_steps,
)
from beam_nifti.config.record import (
    COMPLEX_PARTS,
    COMPRESSION_LEVELS,
    COMPRESSIONS,
    FORMAT_FEATURES,
    FORMAT_VERSION,
    FRAMES,
    MASK_DTYPES,
    SINCE_FIRST_FORMAT_2,
    VOXEL_DTYPES,
    RecordConfig,
)
from beam_nifti.config.rescaling import RESCALE_METHODS, SELECTIONS, Percentile, Window

__all__ = [
    "COMPLEX_PARTS",
    "COMPRESSIONS",
    "COMPRESSION_LEVELS",
    "EXCLUSIVE",
    "FORMAT_FEATURES",
    "FORMAT_VERSION",
    "FRAMES",
    "INTERPOLATIONS",
    "LABEL_KINDS",
    "MASK_DTYPES",
    "MASK_INTERPOLATIONS",
    "MISSING_LABELS",
    "ORIENTATIONS",
    "PREPARATIONS",
    "RESAMPLINGS",
    "RESAMPLING_DETAILS",
    "RESCALE_METHODS",
    "SELECTIONS",
    "SEPARATE_Z",
    "SINCE_FIRST_FORMAT_2",
    "SPLIT_PATTERN",
    "VOXEL_DTYPES",
    "BuildConfig",
    "Columns",
    "LabelColumn",
    "Percentile",
    "RecordConfig",
    "ReferenceGrid",
    "Sharding",
    "Splitting",
    "Window",
    "spell_steps",
]
