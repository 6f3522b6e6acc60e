"""The steps of a build, for pipelines of one's own: docs/api.md."""

from beam_nifti.pipeline.transforms import (
    BuildDataset,
    EncodeExample,
    LoadVolume,
    Prepare,
    ReadManifest,
    Rescale,
    WriteToTFRecord,
)

__all__ = [
    "BuildDataset",
    "EncodeExample",
    "LoadVolume",
    "Prepare",
    "ReadManifest",
    "Rescale",
    "WriteToTFRecord",
]
