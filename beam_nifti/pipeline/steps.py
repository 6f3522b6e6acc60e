"""The steps between a manifest and its records: DoFns, and PTransforms for any Beam pipeline.

ReadManifest    VolumeRow
LoadVolume      Volume
Preprocess      Volume
Rescale         Volume
EncodeExample   Record

The DoFns call plain functions. The PTransforms give them names, types and, on request, an output of
failures. A build makes its own graph of the same DoFns (`pipeline.transforms`).
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, SupportsFloat, SupportsIndex

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import PBegin, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_nifti.config import (
    MASK_DTYPES,
    PREPARATIONS,
    CohortStatistics,
    Columns,
    Percentile,
    RecordConfig,
    Splitting,
    Window,
)
from beam_nifti.errors import ManifestError, UsageError, VolumeError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.manifest.reading import read_manifest
from beam_nifti.manifest.redaction import redacting
from beam_nifti.pipeline import coders as _coders  # noqa: F401  (registers how elements are encoded)
from beam_nifti.pipeline.configure import make_record_config
from beam_nifti.pipeline.failures import Absence, Failure
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.options import Names, Numbers, Rule, StrPath
from beam_nifti.pipeline.parameters import as_parameters, naming_parameters
from beam_nifti.pipeline.parts import PartFile, PartWriter
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.records import Record
from beam_nifti.pipeline.statistics_file import Analysis
from beam_nifti.record.example import encode_volume
from beam_nifti.record.index import IndexEntry
from beam_nifti.storage import paths as storage
from beam_nifti.support.process import keep_buffers
from beam_nifti.support.wording import counted, one_line
from beam_nifti.volume.files import frames_of
from beam_nifti.volume.notes import counter_name
from beam_nifti.volume.preprocess import prepare_volume, require_volume
from beam_nifti.volume.user_function import load_functions
from beam_nifti.volume.volume import Volume, load_frames, load_volume, require_rescaled, rescale_volume

send_whole_elements()

FAILURES: Final = "failures"
_PREPARED: Final = (*PREPARATIONS, "preprocess_sha256")
_RESCALED: Final = ("rescale", "rescale_within", "rescale_stats", "clip", "voxel_dtype")
_Values = beam.PCollection[Any]


@contextlib.contextmanager
def timed(distribution: Any) -> Iterator[None]:
    """Add the milliseconds that the block takes to a distribution."""
    start = time.perf_counter()
    yield
    distribution.update(round(1e3 * (time.perf_counter() - start)))


def at_end(value: Any) -> WindowedValue:
    """What `finish_bundle` yields, without a window of its own."""
    window = GlobalWindow()
    return WindowedValue(value, window.max_timestamp(), (window,))


class PartsFn(beam.DoFn):
    """A step that has one part file open at a time, no longer than a bundle lasts.

    If a user interrupts the local runner, it calls `teardown` while another thread is still in `process` or
    `finish_bundle`.
    """

    _lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    _open: PartFile | PartWriter | None = None
    _is_torn_down = False

    def teardown(self) -> None:
        """Remove the part of a bundle that failed."""
        with self._lock:
            self._is_torn_down = True
            if self._open is not None:
                self._open.discard()
                self._open = None

    def start_bundle(self) -> None:
        """Start without an open file."""
        self._lock, self._open = threading.Lock(), None


def _joined(earlier: RecordConfig | None, config: RecordConfig, names: Iterable[str]) -> RecordConfig:
    """The configuration of earlier steps with the fields of this one. All steps of a build have the same."""
    if earlier is None or earlier == config:
        return config
    return replace(earlier, **{name: getattr(config, name) for name in names})


class LoadVolumeFn(beam.DoFn):
    """Read an image.

    Args:
        folder: folder that relative paths are relative to: the manifest's.
        shape: required shape of every record; None if shapes may differ, or None for an axis that may.
        dtype: required dtype of every volume on disk; None if dtypes may differ.
        config: configuration of the records that the volumes become.
    """

    def __init__(
        self,
        folder: str = "",
        shape: tuple[int | None, ...] | None = None,
        dtype: str | None = None,
        config: RecordConfig | None = None,
    ) -> None:
        self._folder, self._shape, self._dtype = folder, shape, dtype
        self._config = config or RecordConfig()
        self._msec = Metrics.distribution(type(self), "load-msec")
        self._loaded = Metrics.counter(type(self), "volumes-loaded")
        self._bytes = Metrics.counter(type(self), "bytes-read")

    def setup(self) -> None:
        """Prepare a thread."""
        keep_buffers()

    def process(self, row: VolumeRow) -> Iterable[Any]:
        """Yield the volume; or the volumes of its frames, each made when it is requested.

        Before these, (shard, Absence) on the output FAILURES if the image has fewer frames than others.
        """
        _require_columns(row, self._config)
        arguments = row, self._folder, self._shape, self._dtype, self._config
        with timed(self._msec):
            is_split = self._config.frames == "each"
            volumes = load_frames(*arguments) if is_split else iter([load_volume(*arguments)])
            volume = next(volumes)
        absent = _absent_positions(row, volume)
        self._loaded.inc(len(row.positions) - len(absent))
        if absent:
            yield TaggedOutput(FAILURES, (row.shard, Absence(absent)))
        self._bytes.inc(sum(file.size for files in volume.source.files for file in files))
        yield volume
        yield from volumes


def _absent_positions(row: VolumeRow, volume: Volume) -> tuple[int, ...]:
    """Positions of the wanted frames that an image does not have, by the volume of one of its frames."""
    if row.num_frames is None:
        return ()
    num_frames = frames_of(volume.source.shape)
    return tuple(row.position + frame for frame in row.frames if frame >= num_frames)


def _require_columns(row: VolumeRow, config: RecordConfig) -> None:
    """Refuse a row with other files than the step reads: it would drop some, or take a mask for an image."""
    if row.columns is not None:
        _require_same_columns(row.path, row.columns, config)
    num_read = config.num_channels + (config.mask_dtype is not None)
    if len(row.files) != num_read:
        raise UsageError(
            f"{row.path}: the row has {counted(len(row.files), 'file')}, but LoadVolume reads {num_read}; "
            "give it the channels and mask_dtype of the row"
        )


def _require_same_columns(path: str, columns: Columns, config: RecordConfig) -> None:
    images, mask, has_mask = columns.paths, columns.mask, config.mask_dtype is not None
    channels = images if len(images) > 1 else None
    if (channels, mask is not None) == (config.channels, has_mask):
        return
    given = {"channels": channels, "mask_dtype": mask and (config.mask_dtype or MASK_DTYPES[0])}
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    named = [*map(repr, images), *([f"{mask!r} (mask)"] if mask is not None else [])]
    read = [*(map(repr, config.channels) if config.channels else ["one image"]), *["a mask"] * has_mask]
    raise UsageError(
        f"{path}: ReadManifest names the columns {', '.join(named)}, but LoadVolume reads {', '.join(read)}; "
        f"use LoadVolume({arguments}), or give ReadManifest other columns"
    )


class _VolumeFn(beam.DoFn):
    """A step that gets volumes.

    Attributes:
        follows_any: whether other steps than ours may have made the volumes, which are checked then.
    """

    follows_any = False

    def _checked(self, volume: Volume) -> Volume:
        return require_volume(volume, type(self).__name__.removesuffix("Fn")) if self.follows_any else volume


class PreprocessFn(_VolumeFn):
    """Prepare a volume before its intensities are measured: `prepare_volume`.

    Args:
        config: configuration of the preparation.
        shape: required shape of every record; None if shapes may differ, or None for an axis that may.
        release: whether to empty the input volumes to save memory; only if no other step uses them.
    """

    def __init__(
        self, config: RecordConfig, shape: tuple[int | None, ...] | None = None, *, release: bool = False
    ) -> None:
        self._config, self._shape, self._release = config, shape, release
        self._msec = Metrics.distribution(type(self), "preprocess-msec")

    def setup(self) -> None:
        """Import the user's functions: without them the build must stop, instead of failing every volume."""
        load_functions(self._config)

    def process(self, volume: Volume) -> Iterable[Volume]:
        """Yield the prepared volume."""
        with timed(self._msec):
            volume = self._checked(volume)
            config = _joined(volume.config, self._config, _PREPARED)
            prepared = prepare_volume(volume, config, self._shape, release=self._release)
        yield prepared


class RescaleFn(_VolumeFn):
    """Measure a volume's intensities and rescale its voxels for the record."""

    def __init__(self, config: RecordConfig | None = None) -> None:
        self._config = config or RecordConfig()
        self._msec = Metrics.distribution(type(self), "rescale-msec")

    def process(self, volume: Volume) -> Iterable[Volume]:
        """Yield the rescaled volume."""
        with timed(self._msec):
            volume = self._checked(volume)
            config = _joined(volume.config, self._config, _RESCALED)
            if self.follows_any:
                config.require_own_statistics()
            rescaled = rescale_volume(volume, config)
        yield rescaled


class EncodeExampleFn(_VolumeFn):
    """Serialize a rescaled volume as a tf.train.Example, and count its notes.

    Args:
        joined: whether the Example is bytes. Otherwise its voxels are the volume's, not a copy of them.
    """

    def __init__(self, *, joined: bool = True) -> None:
        self._joined = joined
        self._msec = Metrics.distribution(type(self), "encode-msec")
        self._bytes = Metrics.counter(type(self), "bytes-encoded")

    def process(self, volume: Volume) -> Iterable[Record]:
        """Yield the record."""
        volume = self._checked(volume)
        if not volume.intensities:
            raise VolumeError(
                f"{volume.row.path}: was not rescaled; add Rescale() before EncodeExample, or "
                'Rescale("none") to keep its units'
            )
        with timed(self._msec):
            if self.follows_any:
                require_rescaled(volume)
            pieces = encode_volume(volume)
            example = bytes(pieces) if self._joined else pieces
        self._bytes.inc(len(example))
        for note in volume.notes:
            Metrics.counter(type(self), counter_name(note)).inc()
        row = volume.row
        yield Record(row.example_id, example, row.split, IndexEntry.of(volume), volume.config)


class GuardedFn(beam.DoFn):
    """Run a step. A VolumeError that it raises becomes (shard, Failure) on the output FAILURES.

    Any other error propagates: the runner tries again, or the build stops. Beam's
    `with_exception_handling` would put the element itself, with its voxels, on that output.
    A step may return further results lazily; none of these may fail.

    Args:
        step: step to run.
        folder: folder that the rows' paths are relative to.
        release: whether to release the input volume after the step's first result; only if no other step
            uses it.
    """

    def __init__(self, step: beam.DoFn, folder: str = "", *, release: bool = False) -> None:
        self._step, self._folder, self._release = step, folder, release
        self._stage = type(step).__name__.removesuffix("Fn")
        self._failed = Metrics.counter(type(step), "volumes-failed")
        self._progress = current_progress()

    def setup(self) -> None:
        """Set the step up."""
        self._step.setup()

    def process(self, element: VolumeRow | Volume) -> Iterable[Any]:
        """Yield the step's results, or the failure."""
        row = element if isinstance(element, VolumeRow) else element.row
        results = iter(self._step.process(element))
        try:
            with redacting(row, self._folder):
                first = next(results)
        except VolumeError as e:
            self._failed.inc(len(row.positions))
            self._progress.add(failed=len(row.positions))
            failure = Failure(row, self._stage, type(e).__name__, str(e))
            yield TaggedOutput(FAILURES, (row.shard, failure))
        else:
            if self._release and isinstance(element, Volume):
                element.release()
            yield first
            del first  # frames are many, and this one is done with
            yield from self._further(results, row)

    def _further(self, results: Iterator[Any], row: VolumeRow) -> Iterator[Any]:
        done = object()
        while True:
            with redacting(row, self._folder):
                result = next(results, done)
            if result is done:
                return
            yield result
            del result


def guarded(step: beam.DoFn, output: Any, folder: str = "", *, release: bool = False) -> Any:
    """A step with two outputs: `main`, of type `output`, and FAILURES, of (shard, Failure or Absence)."""
    pardo = beam.ParDo(GuardedFn(step, folder, release=release))
    typed = pardo.with_output_types(output, **{FAILURES: tuple[str, Failure | Absence]})
    return typed.with_outputs(FAILURES, main="main")


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
        if isinstance(self._step, _VolumeFn):
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
        mask_dtype: dtype of the label map that is each row's last file, as named by `Columns.mask`; None if
            rows have none.
        map_labels: labels of masks that become others, as in `BuildOptions`.
        align: "first" brings other images and masks to the voxel grid of the first image, as in
            `BuildOptions`; None refuses other grids.
        interpolation: how values between voxel centres are computed for that, as in `BuildOptions`.
        mask_interpolation: how labels between voxel centres are chosen for that, as in `BuildOptions`.
        antialias: whether images are smoothed for that, as in `BuildOptions`.

    Raises:
        UsageError: an argument is invalid. While the pipeline runs: the rows have other images, or a mask
            where none is read, or the other way round.
    """

    _takes, _gives = VolumeRow, Volume

    def __init__(
        self,
        *,
        frames: str | SupportsIndex | None = None,
        complex: str | None = None,
        channels: Names | None = None,
        mask_dtype: str | None = None,
        map_labels: str | Mapping[Any, SupportsIndex] | None = None,
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
            "map_labels": map_labels,
            "align": align,
            "interpolation": interpolation,
            "mask_interpolation": mask_interpolation,
            "antialias": antialias,
        }
        with naming_parameters(path_column="channels"):
            config = make_record_config(given)
        if config.map_labels is not None and config.mask_dtype is None:
            raise UsageError("map_labels maps labels of masks; give mask_dtype too, or drop it")
        if config.frames == "each":
            raise UsageError(
                "frames is 'each', which makes several records per row, and only a build can number them; "
                "choose 'all', 'first', 'mean' or a number, or use beam-nifti build"
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
