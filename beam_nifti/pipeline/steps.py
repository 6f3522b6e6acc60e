"""The DoFns between a row of the manifest and its record, which call plain functions.

LoadVolumeFn      VolumeRow to Volume
PreprocessFn      Volume to Volume
RescaleFn         Volume to Volume
EncodeExampleFn   Volume to Record
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_nifti.config import (
    MASK_DTYPES,
    PREPARATIONS,
    Columns,
    RecordConfig,
)
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.manifest.redaction import redacting
from beam_nifti.pipeline import coders as _coders  # noqa: F401  (registers how elements are encoded)
from beam_nifti.pipeline.failures import Absence, Failure
from beam_nifti.pipeline.local_runner import send_whole_elements
from beam_nifti.pipeline.parts import PartFile, PartWriter
from beam_nifti.pipeline.progress import current_progress
from beam_nifti.pipeline.records import Record
from beam_nifti.record.example import encode_volume
from beam_nifti.record.index import IndexEntry
from beam_nifti.support.process import keep_buffers
from beam_nifti.support.wording import counted
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
            is_split = self._config.splits_frames
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
    return tuple(row.position_of(f) for f in row.frames if f + row.clip_frames > num_frames)


def _require_columns(row: VolumeRow, config: RecordConfig) -> None:
    """Refuse a row with other files than the step reads: it would drop some, or take a mask for an image."""
    if row.columns is not None:
        _require_same_columns(row.path, row.columns, config)
    num_read = config.num_files
    if len(row.files) != num_read:
        raise UsageError(
            f"{row.path}: the row has {counted(len(row.files), 'file')}, but LoadVolume reads {num_read}; "
            "give it the channels, mask_dtype, masks and has_target that match the row"
        )


def _require_same_columns(path: str, columns: Columns, config: RecordConfig) -> None:
    channels, masks = (names if len(names) > 1 else None for names in (columns.paths, columns.masks))
    has_target, expected = columns.target is not None, (config.channels, config.masks, config.num_masks)
    if (channels, masks, len(columns.masks), has_target) == (*expected, bool(config.has_target)):
        return
    given: dict[str, object] = {
        "channels": channels,
        "mask_dtype": (config.mask_dtype or MASK_DTYPES[0]) if columns.masks else None,
        "masks": masks,
        "has_target": has_target or None,
    }
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    named = [*map(repr, columns.paths), *(f"{name!r} (mask)" for name in columns.masks)]
    named += [f"{columns.target!r} (target)"] * has_target
    read = [*map(repr, config.channels)] if config.channels else ["one image"]
    read += [f"{name!r} (mask)" for name in config.masks] if config.masks else ["a mask"] * config.num_masks
    read += ["a target"] * bool(config.has_target)
    raise UsageError(
        f"{path}: ReadManifest names the columns {', '.join(named)}, but LoadVolume reads {', '.join(read)}; "
        f"use LoadVolume({arguments}), or give ReadManifest other columns"
    )


class VolumeFn(beam.DoFn):
    """A step that gets volumes.

    Attributes:
        follows_any: whether other steps than ours may have made the volumes, which are checked then.
    """

    follows_any = False

    def _checked(self, volume: Volume) -> Volume:
        return require_volume(volume, type(self).__name__.removesuffix("Fn")) if self.follows_any else volume


class PreprocessFn(VolumeFn):
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
            earlier = volume.config.nonfinite if volume.config else None
            prepared = prepare_volume(volume, config, self._shape, release=self._release)
            if config.nonfinite is None and earlier is not None:  # LoadVolume has replaced them
                prepared = replace(prepared, config=replace(config, nonfinite=earlier))
        yield prepared


class RescaleFn(VolumeFn):
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


class EncodeExampleFn(VolumeFn):
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


def guarded(
    step: beam.DoFn, output: Any, folder: str = "", *, release: bool = False, failure: Any = Failure
) -> Any:
    """A step with two outputs: `main`, of type `output`, and FAILURES, of (shard, `failure`)."""
    pardo = beam.ParDo(GuardedFn(step, folder, release=release))
    typed = pardo.with_output_types(output, **{FAILURES: tuple[str, failure]})
    return typed.with_outputs(FAILURES, main="main")
