"""Build sharded TFRecord datasets from NIfTI volumes with Apache Beam.

Each name is loaded on first use: `import beam_nifti` alone loads neither Beam, TensorFlow nor numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beam_nifti.api import analyze as analyze
    from beam_nifti.api import build as build
    from beam_nifti.api import check as check
    from beam_nifti.api import convert as convert
    from beam_nifti.api import diff as diff
    from beam_nifti.api import extract as extract
    from beam_nifti.api import inspect as inspect
    from beam_nifti.api import relabel as relabel
    from beam_nifti.api import report as report
    from beam_nifti.api import verify as verify
    from beam_nifti.api import withdraw as withdraw
    from beam_nifti.config import Percentile as Percentile
    from beam_nifti.config import Window as Window
    from beam_nifti.errors import BeamNiftiError as BeamNiftiError
    from beam_nifti.errors import BuildSummary as BuildSummary
    from beam_nifti.errors import DatasetError as DatasetError
    from beam_nifti.errors import EngineError as EngineError
    from beam_nifti.errors import FailedVolume as FailedVolume
    from beam_nifti.errors import ManifestError as ManifestError
    from beam_nifti.errors import OutputError as OutputError
    from beam_nifti.errors import TooManyFailures as TooManyFailures
    from beam_nifti.errors import UsageError as UsageError
    from beam_nifti.errors import VolumeError as VolumeError
    from beam_nifti.inference import Preparation as Preparation
    from beam_nifti.inference import PreparedVolume as PreparedVolume
    from beam_nifti.inference import restore as restore
    from beam_nifti.pipeline.options import BuildOptions as BuildOptions
    from beam_nifti.random_access import Dataset as Dataset
    from beam_nifti.random_access import PatchDataset as PatchDataset
    from beam_nifti.random_access import Patches as Patches
    from beam_nifti.random_access import PatchGrid as PatchGrid
    from beam_nifti.reader import load_dataset as load_dataset
    from beam_nifti.transforms import EncodeExample as EncodeExample
    from beam_nifti.transforms import LoadVolume as LoadVolume
    from beam_nifti.transforms import Preprocess as Preprocess
    from beam_nifti.transforms import ReadManifest as ReadManifest
    from beam_nifti.transforms import Record as Record
    from beam_nifti.transforms import Rescale as Rescale
    from beam_nifti.transforms import WriteToTFRecord as WriteToTFRecord

__version__ = "0.1.0"

_NAMES_IN = {
    "api": "analyze build check convert diff extract inspect relabel report verify withdraw",
    "config": "Percentile Window",
    "errors": "BeamNiftiError BuildSummary DatasetError EngineError FailedVolume ManifestError OutputError "
    "TooManyFailures UsageError VolumeError",
    "inference": "Preparation PreparedVolume restore",
    "random_access": "Dataset PatchDataset PatchGrid Patches",
    "reader": "load_dataset",
    "transforms": "EncodeExample LoadVolume Preprocess ReadManifest Record Rescale WriteToTFRecord",
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names.split()}
_MODULE_OF["BuildOptions"] = "pipeline.options"


def __getattr__(name: str) -> Any:
    if name in _NAMES_IN:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES_IN, *_MODULE_OF})
