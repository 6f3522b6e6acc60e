"""The steps as PTransforms for any Beam pipeline.

ReadManifest    VolumeRow
LoadVolume      Volume
Preprocess      Volume
Rescale         Volume
EncodeExample   Record

They give the DoFns of `pipeline.steps` names, types and, on request, an output of failures. A build makes its
own graph of the same DoFns (`pipeline.transforms`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, SupportsFloat, SupportsIndex

import apache_beam as beam
from apache_beam.pvalue import PBegin

from beam_nifti.config import CohortStatistics, Columns, Percentile, Splitting, Window
from beam_nifti.errors import ManifestError, UsageError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.pipeline.configure import make_record_config
from beam_nifti.pipeline.failures import Failure
from beam_nifti.pipeline.options import Names, Numbers, Rule, StrPath, read_switch
from beam_nifti.pipeline.parameters import as_parameters, naming_parameters
from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.statistics_file import Analysis
from beam_nifti.pipeline.steps import (
    FAILURES,
    EncodeExampleFn,
    LoadVolumeFn,
    PreprocessFn,
    RescaleFn,
    VolumeFn,
    guarded,
)
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import one_line
from beam_nifti.volume.volume import Volume

_Values = beam.PCollection[Any]


class Outcome(NamedTuple):
    """The two outputs of a step `with_failures()`.

    Attributes:
        done: results for the elements that did not fail.
        failures: one `Failure` for each element that failed.
    """

    done: _Values
    failures: _Values


class _Step(beam.PTransform[Any, Any]):
    """A PTransform around a DoFn, from one type to another."""

    _takes: type
    _gives: type
    _step: beam.DoFn
    _has_failures = False

    def with_failures(self) -> Any:
        """Give the step two outputs, an `Outcome`, so that a failed volume does not fail the pipeline."""
        self._has_failures = True
        return self

    def expand(self, elements: _Values) -> Any:
        """To what the DoFn yields; with failures, to an Outcome."""
        if isinstance(self._step, VolumeFn):
            self._step.follows_any = True
        if not self._has_failures:
            pardo = beam.ParDo(self._step).with_input_types(self._takes)
            return elements | pardo.with_output_types(self._gives)
        outputs = elements | guarded(self._step, self._gives)
        failures = outputs[FAILURES] | "Failures" >> beam.Values().with_output_types(Failure)
        return Outcome(outputs.main, failures)


@contextlib.contextmanager
def _naming_columns() -> Iterator[None]:
    """Have errors of a manifest name fields of `Columns` and `Splitting` instead of flags."""
    try:
        yield
    except ManifestError as e:
        e.reword(lambda text: as_parameters(_OF_COMMANDS.sub("", text), _OF_MANIFEST))
        raise


class _ReadRowsFn(beam.DoFn):
    """Read a manifest where the pipeline runs, so that its rows are not in the job graph."""

    def __init__(self, columns: Columns, splitting: Splitting | None) -> None:
        self._columns, self._splitting = columns, splitting

    def process(self, path: str) -> Iterable[VolumeRow]:
        """Yield the rows that are in a split."""
        with _naming_columns():
            manifest = read_manifest(path, self._columns, self._splitting)
        extra_columns = tuple(manifest.extra_columns)
        kept = manifest.kept_rows().tolist()
        for start in range(0, len(kept), _ROWS_AT_A_TIME):
            for row in manifest.rows(kept[start : start + _ROWS_AT_A_TIME]):
                files = [file and storage.join(manifest.folder, file) for file in row.files]
                yield replace(
                    row,
                    path=files[0],
                    other_files=tuple(files[1:]),
                    extra_columns=extra_columns,
                    columns=self._columns,
                )


_ROWS_AT_A_TIME: Final = 1 << 12
_OF_MANIFEST: Final = {
    "path_column": "Columns.path",
    "label_column": "Columns.label",
    "id_column": "Columns.id",
    "mask_column": "Columns.mask",
    "missing_label": "Columns.missing_label",
    "missing_mask": "Columns.missing_mask",
    "target_column": "Columns.target",
    "split": "splitting",
    "split_seed": "Splitting.seed",
    "stratify": "Splitting.stratify",
}
"""What gives `ReadManifest` the options of a build."""
_OF_COMMANDS: Final = re.compile(r" \(--without [^)]*\)")


class ReadManifest(beam.PTransform[Any, Any]):
    """Read a manifest: from a pipeline to `VolumeRow`, with absolute paths.

    Args:
        path: path of the manifest, local or a URL.
        columns: the roles of the manifest's columns.
        splitting: how participants are assigned to splits; None uses the manifest.

    Raises:
        UsageError: an argument is invalid.
        ManifestError: while the pipeline runs: the manifest cannot be used.
    """

    def __init__(
        self, path: StrPath, *, columns: Columns | None = None, splitting: Splitting | None = None
    ) -> None:
        super().__init__()
        self._path = storage.absolute(storage.path_text("path", path))
        for name, value, kind in (("columns", columns, Columns), ("splitting", splitting, Splitting)):
            if not isinstance(value, kind | None):
                raise UsageError(
                    f"{name} is {one_line(repr(value))}; give a beam_nifti.config.{kind.__name__}"
                )
        self._arguments = columns or Columns(), splitting

    def expand(self, pipeline: beam.Pipeline | PBegin) -> _Values:
        """To VolumeRow."""
        rows: _Values = (
            pipeline
            | "Create" >> beam.Create([self._path], reshuffle=False)  # str
            | "ReadRows" >> beam.ParDo(_ReadRowsFn(*self._arguments)).with_output_types(VolumeRow)
            | "Reshuffle" >> beam.Reshuffle().with_output_types(VolumeRow)  # VolumeRow
        )
        return rows


class LoadVolume(_Step):
    """Read images: from `VolumeRow` to `Volume`.

    Args:
        frames: frames of 4-D images, as in `BuildOptions`; None refuses 4-D images. "each" is only for
            builds.
        complex: how complex voxels are stored, as in `BuildOptions`; None refuses them.
        channels: names of the columns of the images that are the channels of a record, in the order of
            `Columns.path`; None for one image.
        mask_dtype: dtype of the label maps that follow each row's images, as named by `Columns.mask`; None if
            rows have none.
        masks: names of the columns of the label maps that are the channels of a mask, in the order of
            `Columns.mask`; None for one label map.
        has_target: whether each row's last file is a target, as named by `Columns.target`.
        map_labels: labels of masks that become others, as in `BuildOptions`.
        nonfinite: what becomes of NaN and infinite voxels, as in `BuildOptions`; None leaves them. With
            `align`, give it here and not to `Preprocess`, because they would spread to their neighbours.
        align: "first" brings other images, masks and targets to the voxel grid of the first image, as in
            `BuildOptions`; None refuses other grids.
        interpolation: how values between voxel centres are computed for that, as in `BuildOptions`.
        mask_interpolation: how labels between voxel centres are chosen for that, as in `BuildOptions`.
        antialias: whether images are smoothed for that, as in `BuildOptions`.

    Raises:
        UsageError: an argument is invalid. While the pipeline runs: the rows have other images, or a mask or
            a target where none is read, or the other way round.
    """

    _takes, _gives = VolumeRow, Volume

    def __init__(
        self,
        *,
        frames: str | SupportsIndex | None = None,
        complex: str | None = None,
        channels: Names | None = None,
        mask_dtype: str | None = None,
        masks: Names | None = None,
        has_target: bool = False,
        map_labels: StrPath | Mapping[Any, SupportsIndex] | None = None,
        nonfinite: Rule | None = None,
        align: str | None = None,
        interpolation: str | None = None,
        mask_interpolation: str | None = None,
        antialias: bool | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, object] = {
            "frames": frames,
            "complex": complex,
            "path_column": channels,
            "mask_dtype": mask_dtype,
            "mask_column": masks,
            "map_labels": map_labels,
            "nonfinite": nonfinite,
            "align": align,
            "interpolation": interpolation,
            "mask_interpolation": mask_interpolation,
            "antialias": antialias,
        }
        with naming_parameters(path_column="channels", mask_column="masks"):
            config = make_record_config(given)
        config = replace(config, has_target=True if read_switch("has_target", has_target) else None)
        if config.map_labels is not None and config.mask_dtype is None:
            raise UsageError("map_labels maps labels of masks; give mask_dtype too, or drop it")
        if masks is not None and config.mask_dtype is None:
            raise UsageError("masks names the columns of masks; give mask_dtype too, or drop it")
        if config.splits_frames:
            raise UsageError(
                f"frames is {config.frames!r}, which makes several records per row, and only a build can "
                "number them; choose 'all', 'first', 'mean' or a number, or use beam-nifti build"
            )
        self._step = LoadVolumeFn(config=config)


class Preprocess(_Step):
    """Make finite, reorient, resample, crop and pad volumes, in this order: from `Volume` to `Volume`.

    To apply your own function, add a step: `beam.Map(function)`.

    Args:
        nonfinite: what becomes of NaN and infinite voxels, as in `BuildOptions`; None leaves them.
        orientation: code of the orientation that axes are reordered and flipped to, such as "RAS".
        reference: image whose voxel grid volumes are resampled to, or the grid, as in `BuildOptions`. The
            image is read when the step is made.
        spacing: voxel size in mm that volumes are resampled to: (x, y, z), or one number for all three.
        resize: (X, Y, Z) that the whole field of view is resampled to.
        resize_longest: voxels that the longest axis is resampled to, and the others by the same factor; then
            padded to a cube.
        interpolation: how values between voxel centres are computed, as in `BuildOptions`.
        mask_interpolation: how labels between voxel centres are chosen, as in `BuildOptions`.
        antialias: whether images are smoothed along the axes that get fewer voxels.
        separate_z: whether anisotropic volumes are resampled by nearest neighbours along one axis, as in
            `BuildOptions`.
        crop_foreground: which voxels' bounding box to crop to, as in `BuildOptions`.
        shape: (X, Y, Z) that volumes are cropped and padded to.

    Raises:
        UsageError: an argument is invalid.
    """

    _takes, _gives = Volume, Volume

    def __init__(
        self,
        *,
        nonfinite: Rule | None = None,
        orientation: str | None = None,
        reference: StrPath | Mapping[str, Any] | None = None,
        spacing: Numbers | SupportsFloat | None = None,
        resize: str | Sequence[SupportsIndex] | None = None,
        resize_longest: str | SupportsIndex | None = None,
        interpolation: str | None = None,
        mask_interpolation: str | None = None,
        antialias: bool | None = None,
        separate_z: str | None = None,
        crop_foreground: Rule | None = None,
        shape: str | Sequence[SupportsIndex] | None = None,
    ) -> None:
        super().__init__()
        given = {
            "nonfinite": nonfinite,
            "orientation": orientation,
            "reference": reference,
            "spacing": spacing,
            "resize": resize,
            "resize_longest": resize_longest,
            "interpolation": interpolation,
            "mask_interpolation": mask_interpolation,
            "antialias": antialias,
            "separate_z": separate_z,
            "crop_foreground": crop_foreground,
            "shape": shape,
        }
        with naming_parameters():
            self._step = PreprocessFn(make_record_config(given))


class Rescale(_Step):
    """Rescale voxels to what a record stores: from `Volume` to `Volume`.

    Args:
        rescale: which intensities become 0 and 1, as in `BuildOptions`.
        within: which voxels are measured, as `rescale_within` of `BuildOptions`; None means all.
        stats: statistics of the cohort, as `rescale_stats` of `BuildOptions`; required by "cohort:zscore" and
            ("cohort:percentile", low, high). A file is read here, not by the workers.
        clip: whether rescaled voxels outside [0, 1] are set to 0 or 1.
        voxel_dtype: same as in `BuildOptions`.

    Raises:
        UsageError: an argument is invalid.
    """

    _takes, _gives = Volume, Volume

    def __init__(
        self,
        rescale: Rule | Percentile | Window | None = "minmax",
        *,
        within: Rule | None = None,
        stats: StrPath | CohortStatistics | Analysis | None = None,
        clip: bool | None = False,
        voxel_dtype: str | None = "float32",
    ) -> None:
        super().__init__()
        given = {"rescale": rescale, "rescale_within": within, "clip": clip, "voxel_dtype": voxel_dtype}
        with naming_parameters(rescale_within="within", rescale_stats="stats"):
            config = make_record_config({**given, "rescale_stats": stats})
            _ = config.cohort_ranges  # an error without statistics, or if they lack a percentile
            self._step = RescaleFn(config)


class EncodeExample(_Step):
    """Serialize rescaled volumes: from `Volume` to `Record`, for `WriteToTFRecord`."""

    _takes, _gives = Volume, Record

    def __init__(self) -> None:
        super().__init__()  # not with Beam's label, for which a column of labels could be mistaken
        self._step = EncodeExampleFn()
