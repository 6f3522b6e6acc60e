"""What a build reads before it decides anything: the manifest, and the first image."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from beam_nifti.errors import ManifestError, UsageError, VolumeError
from beam_nifti.manifest.manifest import Manifest, VolumeRow
from beam_nifti.manifest.redaction import redacting
from beam_nifti.pipeline.outputs import refuse_own
from beam_nifti.pipeline.plan import BuildPlan, default_sharding, read_build_manifest, with_absolute_paths
from beam_nifti.pipeline.publish import require_writable_output
from beam_nifti.storage import paths as storage
from beam_nifti.volume.header import RecordLayout, VolumeHeader, record_layout
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.user_function import source_sha256
from beam_nifti.volume.volume import load_header, load_volume

_IMAGES_TRIED: Final = 20
"""Images that are tried, in order, for the shape of the dataset."""


@dataclass(frozen=True)
class Inputs:
    """What a build reads before it decides anything.

    Attributes:
        config: configuration with absolute paths.
        header: header of the first image.
        layout: how the first image is loaded.
        shape: shape of its record.
    """

    config: BuildConfig
    manifest: Manifest
    header: VolumeHeader
    layout: RecordLayout
    shape: tuple[int, ...]

    @classmethod
    def of(cls, config: BuildConfig, manifest: Manifest) -> Inputs:
        """The inputs of a build, whose first images are read here.

        Raises:
            ManifestError: none of them can be used.
        """
        return cls(config, manifest, *_first_volume(config, manifest))

    @property
    def num_frames(self) -> int | None:
        """`BuildPlan.num_frames`."""
        if self.layout.frame != "each":
            return None
        return self.config.record.max_frames or self.header.num_frames

    @property
    def itemsize(self) -> int:
        """Bytes of a voxel as it is loaded."""
        return self.layout.dtype.itemsize

    def choose_sharding(self) -> Sharding:
        """How the splits are divided into shards, if no dataset is there yet."""
        if self.config.sharding is not None:
            return self.config.sharding
        num_voxels, frames = math.prod(self.shape), self.num_frames or 1
        return default_sharding(num_voxels, self.itemsize, self.config.record, frames)

    def plan(self, config: BuildConfig) -> BuildPlan:
        """The plan of a build into an empty output."""
        manifest = self.manifest
        return BuildPlan(
            config=replace(config, columns=manifest.columns),
            num_rows=len(manifest),
            column_names=tuple(manifest.table.column_names),
            extra_columns=manifest.extra_columns,
            split_sizes=manifest.split_sizes(),
            shape=None if config.allow_mixed_shapes else self.shape,
            source_dtype=self.header.dtype_name,
            loaded_dtype=self.layout.dtype.name,
            key_check=manifest.key_check,
            manifest_name=manifest.name,
            num_skipped=manifest.num_skipped,
            num_unlabelled=manifest.num_unlabelled,
            num_unmasked=manifest.num_unmasked,
            num_frames=self.num_frames,
        )


def read_inputs(config: BuildConfig, rows: bytes | None) -> Inputs:
    """Read the manifest and the first header, and check that the output can be written.

    Raises:
        ManifestError: the manifest cannot be built from.
        OutputError: nothing can be written to the output.
        UsageError: as `build.plan_build`.
    """
    refuse_own(storage.absolute(config.manifest), storage.absolute(config.output))
    config = with_absolute_paths(config)
    _require_output(config)
    config, manifest = read_rows(config, rows)
    return Inputs.of(config, manifest)


def _require_output(config: BuildConfig) -> None:
    key = config.anonymous_ids
    if key and storage.is_within(key, config.output):
        raise UsageError(
            f"--anonymous-ids is {key}, inside OUTPUT, where it would be shared with the dataset; move it"
        )
    storage.refuse_unwritable(config.output, "OUTPUT")
    if not storage.is_remote(config.output):  # to a store it would write, which is for `open_build`
        require_writable_output(config.output)


def read_rows(config: BuildConfig, rows: bytes | None) -> tuple[BuildConfig, Manifest]:
    """The configuration, completed with the labels of the manifest; and the manifest.

    Raises:
        ManifestError: the manifest cannot be built from, whatever its images are.
        UsageError: as `build.plan_build`.
    """
    digests = tuple(source_sha256(step) for step, _ in config.record.steps)
    config = replace(config, record=replace(config.record, preprocess_sha256=digests))
    storage.refuse_unwritable(config.temp_location or "", "--temp-location")
    if config.temp_location and not storage.is_remote(config.temp_location):
        storage.require_writable(config.temp_location, "--temp-location", is_folder=True)
    manifest = read_build_manifest(config.manifest, config, rows)
    manifest.log_warnings()
    if manifest.label_columns:
        config = replace(config, record=replace(config.record, labels=manifest.label_columns))
    _require_measured_splits(config.record, manifest)
    return config, manifest


def _require_measured_splits(record: RecordConfig, manifest: Manifest) -> None:
    """Refuse a rescaling of the cohort by the volumes of a split that there is not."""
    splits = manifest.split_sizes()
    if not record.is_of_cohort or record.rescale_stats is not None:
        return
    for name in record.measured_splits:
        if name not in splits:
            flag = f"--rescale-split is {record.rescale_split}, but"
            measured = flag if record.rescale_split else f"--rescale {record.rescale} measures train, but"
            raise UsageError(
                f"{measured} the splits are {', '.join(splits) or 'none'}; name those to measure with "
                "--rescale-split"
            )


def _first_volume(
    config: BuildConfig, manifest: Manifest
) -> tuple[VolumeHeader, RecordLayout, tuple[int, ...]]:
    """The header of the first image that can be read, how it is loaded, and the shape of its record."""
    problems, are_missing = list[str](), False
    for row in manifest.rows(manifest.kept_rows()[:_IMAGES_TRIED].tolist()):
        try:
            with redacting(row, manifest.folder):
                header = load_header(row, manifest.folder, config.record)
                layout = record_layout(row.path, header, config.record)
                return header, layout, layout.stored_shape or _prepared_shape(row, layout, manifest, config)
        except VolumeError as e:
            problems.append(f"row {row.row} ({row.example_id}): {e}")
            are_missing |= isinstance(e.__cause__, FileNotFoundError)
    if are_missing:
        of = "working directory" if config.rows is not None else "manifest's folder"
        problems.append(f"relative paths are relative to the {of}")
    what = "none of the first images can be used with these options"
    raise ManifestError(manifest.path, problems, what)


def _prepared_shape(
    row: VolumeRow, layout: RecordLayout, manifest: Manifest, config: BuildConfig
) -> tuple[int, ...]:
    """The shape of a record that the header does not determine."""
    of_one = (
        replace(config.record, frames="first", max_frames=None) if layout.frame == "each" else config.record
    )
    volume = load_volume(row, manifest.folder, record=of_one)
    return prepare_volume(volume, config.record, release=True).voxels.shape
