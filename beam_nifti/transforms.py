"""The steps of a build as PTransforms and DoFns, for your own pipelines. See docs/steps.md."""

from beam_nifti.pipeline.composable import (
    EncodeExample,
    LoadVolume,
    Outcome,
    Preprocess,
    ReadManifest,
    Rescale,
)
from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.steps import EncodeExampleFn, LoadVolumeFn, PreprocessFn, RescaleFn
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
