"""The options of a build. In: texts, numbers and tuples. Out: frozen dataclasses, checked. No I/O."""

from beam_nifti.config.build import SPLIT_PATTERN, BuildConfig, Sharding, Splitting
from beam_nifti.config.columns import LABEL_KINDS, MISSING_LABELS, Columns, LabelColumn
from beam_nifti.config.preparation import ORIENTATIONS, PREPARATIONS, spell_steps
from beam_nifti.config.record import (
    COMPLEX_PARTS,
    COMPRESSION_LEVELS,
    COMPRESSIONS,
    FORMAT_FEATURES,
    FORMAT_VERSION,
    FRAMES,
    GIVEN_ONLY,
    MASK_DTYPES,
    VOXEL_DTYPES,
    RecordConfig,
)
from beam_nifti.config.rescaling import RESCALE_METHODS, SELECTIONS, Percentile, Window
from beam_nifti.config.statistics import (
    FAR,
    LEAST_COMPARED,
    ChannelStatistics,
    CohortStatistics,
    LabelStatistics,
)

__all__ = [
    "COMPLEX_PARTS",
    "COMPRESSIONS",
    "COMPRESSION_LEVELS",
    "FAR",
    "FORMAT_FEATURES",
    "FORMAT_VERSION",
    "FRAMES",
    "GIVEN_ONLY",
    "LABEL_KINDS",
    "LEAST_COMPARED",
    "MASK_DTYPES",
    "MISSING_LABELS",
    "ORIENTATIONS",
    "PREPARATIONS",
    "RESCALE_METHODS",
    "SELECTIONS",
    "SPLIT_PATTERN",
    "VOXEL_DTYPES",
    "BuildConfig",
    "ChannelStatistics",
    "CohortStatistics",
    "Columns",
    "LabelColumn",
    "LabelStatistics",
    "Percentile",
    "RecordConfig",
    "Sharding",
    "Splitting",
    "Window",
    "spell_steps",
]
