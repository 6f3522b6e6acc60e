"""The steps of a build as PTransforms and DoFns, for your own pipelines. See docs/steps.md."""

from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.steps import (
    EncodeExample,
    EncodeExampleFn,
    LoadVolume,
    LoadVolumeFn,
    Outcome,
    Preprocess,
    PreprocessFn,
    ReadManifest,
    Rescale,
    RescaleFn,
)
from beam_nifti.pipeline.transforms import BuildDataset
from beam_nifti.pipeline.write import WriteToTFRecord

__all__ = [
    "BuildDataset",
    "EncodeExample",
    "EncodeExampleFn",
    "LoadVolume",
    "LoadVolumeFn",
    "Outcome",
    "Preprocess",
    "PreprocessFn",
    "ReadManifest",
    "Record",
    "Rescale",
    "RescaleFn",
    "WriteToTFRecord",
]
