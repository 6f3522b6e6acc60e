"""Prepares a new image as the records of a dataset were prepared, by the steps of a build.

Source: docs/cookbook/inference.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from beam_nifti.config import MOST_FRAMES, RecordConfig
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.inspection.rebuilding import require_functions, require_same_content
from beam_nifti.manifest.manifest import VolumeRow
from beam_nifti.pipeline.options import Preprocess, read_integer, read_steps
from beam_nifti.pipeline.parameters import naming_parameters
from beam_nifti.read.decoding import restore_image
from beam_nifti.read.grid import PatchGrid
from beam_nifti.read.opening import open_dataset
from beam_nifti.read.patches import Box, cut_patch
from beam_nifti.read.random_access import Dataset
from beam_nifti.read.records import Element
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import counted, size_text, with_beside
from beam_nifti.volume.header import requires_frames
from beam_nifti.volume.preprocess import prepare_volume
from beam_nifti.volume.volume import Volume, load_frames, load_header, load_volume, rescale_volume

Path: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PreparedVolume:
    """An image prepared and rescaled as the records of a dataset.

    Attributes:
        image: float32 of shape (X, Y, Z, C), or (C, X, Y, Z) with `channels_first`, C order: what
            `Dataset` and `load_dataset` return as "image". It may share memory with `volume`.
        mask: labels of shape (X, Y, Z, C), or (C, X, Y, Z) with `channels_first`, as `Dataset` returns
            them; None if no mask was given.
        target: float32 of shape (X, Y, Z, 1), or (1, X, Y, Z) with `channels_first`; None if no target was
            given.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+.
        zooms: float64 (3,), voxel sizes in millimetres.
        volume: the voxels in the dtype in which a record stores them, and with them how they were rescaled
            (`intensities`, `rescale_ranges`) and the grid of the source (`source`).
        channels_first: whether the channel axis of image and mask is their first.
    """

    image: npt.NDArray[np.float32]
    mask: npt.NDArray[Any] | None
    affine: npt.NDArray[np.float64]
    zooms: npt.NDArray[np.float64]
    volume: Volume
    channels_first: bool = False
    target: npt.NDArray[np.float32] | None = None

    @property
    def space(self) -> tuple[int, ...]:
        """The number of voxels along x, y and z."""
        return self.volume.voxels.shape[:3]

    def grid_patches(self, patch: Sequence[SupportsIndex], overlap: float = 0.5) -> PatchGrid:
        """Patches that cover the volume, as `Dataset.grid_patches`.

        A patch is a dictionary of image, affine and zooms, and of mask and target if there are any.

        Raises:
            UsageError: as for `Dataset.grid_patches`.
        """
        return PatchGrid(self, patch, overlap)

    def read_patch(self, box: Box) -> Element:
        """The patch in a box of voxels, for `grid_patches`."""
        config = self.volume.config or RecordConfig()
        cut = partial(cut_patch, box=box, config=config, channels_first=self.channels_first)
        volumes = {"image": self.image, "mask": self.mask, "target": self.target}
        patches = {name: cut(volume, name=name) for name, volume in volumes.items() if volume is not None}
        return {**patches, "affine": box.place(self.affine), "zooms": self.zooms.copy()}

    def __repr__(self) -> str:
        beside = with_beside(self.mask, self.target)
        shape, zooms = size_text(self.image.shape), size_text(self.volume.zooms)
        return f"<PreparedVolume {self.volume.row.path!r}: {shape}, {zooms} mm{beside}>"


@dataclass(frozen=True, repr=False)
class Preparation:
    """The steps that made the records of a dataset, to apply to new images.

    It can be pickled, and used from several threads.

    Attributes:
        dataset: absolute path or URL of the dataset.
        info: contents of its dataset_info.json. Nothing else of the dataset is read.
        preprocess: names of the functions that the dataset was built with, as the user gave them.
        channels_first: whether the channel axis of prepared volumes is their first.
    """

    dataset: str
    info: DatasetInfo
    preprocess: str | tuple[str, ...] | None = None
    channels_first: bool = False

    def __post_init__(self) -> None:
        """Refuse a dataset whose records cannot be made here, or whose functions the user did not name."""
        if not self.info.has_manifest:
            raise UsageError(
                f"{self.dataset}: WriteToTFRecord wrote it, so the steps that made its records are unknown; "
                "apply those steps to the image"
            )
        with naming_parameters():
            require_same_content(self.dataset, self.info, "Preparation makes records again")
            require_functions(self.dataset, self.info.record_config, self.preprocess, "Preparation")

    @classmethod
    def of(
        cls,
        dataset: Path | Dataset,
        *,
        preprocess: Preprocess | Sequence[Preprocess] | None = None,
        channels_first: bool | None = None,
    ) -> Preparation:
        """The preparation of a dataset.

        Args:
            dataset: folder or URL of the dataset, or a `Dataset`.
            preprocess: function of the dataset, as for `build`. Required if the dataset was built with one,
                because a function that only the dataset names is never run.
            channels_first: whether the channel axis is the first. Default: as in the `Dataset`, otherwise
                False.

        Raises:
            DatasetError: there is no complete dataset.
            UsageError: `preprocess` is not that of the dataset, its file has changed, or this version cannot
                make the records of the dataset again.
        """
        if isinstance(dataset, Dataset):
            path, info, is_first = dataset.path, dataset.info, dataset.channels_first
        else:
            path, is_first = storage.absolute(storage.path_text("dataset", dataset)), False
            info = open_dataset(path).info
        with naming_parameters():
            named = None if preprocess is None else read_steps(preprocess)
        return cls(path, info, named, is_first if channels_first is None else channels_first)

    def __repr__(self) -> str:
        return f"<Preparation of {self.dataset!r}>"

    @property
    def channels(self) -> tuple[str, ...]:
        """The columns of the images of a record, in the order in which `apply` takes them."""
        return self.info.columns.paths

    @property
    def masks(self) -> tuple[str, ...]:
        """The columns of the masks of a record, in the order in which `apply` takes them."""
        return self.info.columns.masks

    def apply(
        self,
        image: Path | Sequence[Path],
        *,
        mask: Path | Sequence[Path] | None = None,
        target: Path | None = None,
        frame: SupportsIndex | None = None,
    ) -> PreparedVolume:
        """Prepare and rescale an image as a build of this dataset would, equal to the last bit.

        Args:
            image: path or URL of the image; a list of paths, in the order of `channels`, if a record has
                several images.
            mask: path or URL of a label map, if the dataset has masks; a list of paths, in the order of
                `masks`, if a record has several. It is required only where the options of the dataset use it.
            target: path or URL of an image to predict, if the dataset has targets; for validation.
            frame: number from 0 of the frame to prepare, or of the first frame of the clip; required if each
                frame, or each clip of frames, became a record of the dataset.

        Returns:
            What a record of this dataset would hold.

        Raises:
            VolumeError: a file is missing or cannot be a record of this dataset: the reason for which a build
                would list it as failed.
            UsageError: there are too few or too many images or masks, or `mask` or `frame` is missing, or
                `mask`, `target` or `frame` has no effect.
            OSError: a disk or a store failed.
        """
        row = self._row_of(image, mask, target)
        config = self._config_for(mask, target, frame)
        with naming_parameters():
            shape = config.required_shape(None) if self.info.shape is None else None
            if config.splits_frames:  # of clips
                wanted = (read_integer("frame", frame),)
                row = replace(row, num_frames=MOST_FRAMES, clip_frames=config.clip_frames, wanted=wanted)
                volume = next(load_frames(row, shape=shape, record=config))
            else:
                volume = self._load(row, shape, config)
            volume = prepare_volume(volume, config, shape, release=True)
            volume = rescale_volume(volume, config)
        if self.info.shape not in (None, volume.voxels.shape):
            raise VolumeError(
                f"{row.path}: shape {volume.voxels.shape}, but the records of {self.dataset} have "
                f"{self.info.shape}; build the dataset with shape, which gives all images one shape, or with "
                "allow_mixed_shapes"
            )
        found = volume.voxels.dtype.name
        if found != self.info.dtype:  # of native voxels
            raise VolumeError(
                f"{row.path}: {found} voxels, but the records of {self.dataset} hold {self.info.dtype} as in "
                "their files; convert the image"
            )
        ends, labels = list(volume.rescale_ranges) or None, volume.mask
        if labels is not None and not config.mask_axes:
            labels = labels[..., np.newaxis]
        return PreparedVolume(
            self._as_read(restore_image(volume.voxels, config, volume.scaling, ends)),
            None if labels is None else self._as_read(labels),
            volume.affine,
            np.array(volume.zooms),
            volume,
            self.channels_first,
            None if volume.target is None else self._as_read(volume.target[..., np.newaxis]),
        )

    def _config_for(
        self, mask: Path | Sequence[Path] | None, target: Path | None, frame: SupportsIndex | None
    ) -> RecordConfig:
        config = self.info.record_config
        if target is None:
            config = replace(config, has_target=None)
        elif not config.has_target:
            raise UsageError(f"target is {target}, but {self.dataset} was built without targets; drop it")
        if config.splits_frames:
            if frame is None:
                raise UsageError(
                    f"frame is missing: each record of {self.dataset} is a frame of an image; give its "
                    "number, from 0"
                )
            number = read_integer("frame", frame)
            if number < 0:
                raise UsageError(f"frame is {number}; frames are numbered from 0")
            if number % config.clip_frames:
                raise UsageError(
                    f"frame is {number}; clips of {config.clip_frames} begin with multiples of that"
                )
            is_clip = config.clip_frames > 1
            config = replace(
                config,
                frames=config.frames if is_clip else str(number),
                max_frames=MOST_FRAMES if is_clip else None,
            )
        elif frame is not None:
            raise UsageError(
                f"frame is {frame}, but the records of {self.dataset} are not single frames; drop it"
            )
        if mask is not None:
            if config.mask_dtype is None:
                raise UsageError(f"mask is {mask}, but {self.dataset} was built without masks; drop it")
            return config
        # A range of the cohort is known without the mask in which it was measured.
        for name in ("crop_foreground", *(() if config.is_of_cohort else ("rescale_within",))):
            if getattr(config, name) == "mask":
                raise UsageError(
                    f'mask is missing: {self.dataset} was built with {name}="mask"; give the mask'
                )
        return replace(config, mask_dtype=None, masks=None)

    def _load(self, row: VolumeRow, shape: tuple[int | None, ...] | None, config: RecordConfig) -> Volume:
        try:
            return load_volume(row, shape=shape, record=config)
        except VolumeError:
            for path in row.files[: config.num_channels]:
                header = load_header(VolumeRow(1, path, path), record=config, is_any=True)
                if requires_frames(header, config):  # which is not an option here
                    raise VolumeError(
                        f"{path}: expected a 3-D image, because {self.dataset} was built without frames, got "
                        f"shape {header.shape}; extract the frame to prepare"
                    ) from None
            raise

    def _row_of(
        self, image: Path | Sequence[Path], mask: Path | Sequence[Path] | None, target: Path | None
    ) -> VolumeRow:
        first, *others = self._paths_of("image", image, self.channels)
        if mask is not None and self.masks:
            others += self._paths_of("mask", mask, self.masks)
        if target is not None:
            others.append(storage.absolute(storage.path_text("target", target)))
        return VolumeRow(1, first, first, other_files=tuple(others))

    def _paths_of(self, what: str, given: Path | Sequence[Path], columns: Sequence[str]) -> list[str]:
        paths = [*given] if isinstance(given, list | tuple) else [given]
        if len(paths) != len(columns):
            raise UsageError(
                f"{what} has {counted(len(paths), 'path')}, but a record of {self.dataset} has "
                f"{counted(len(columns), what)}: {', '.join(columns)}; give one path for each"
            )
        return [storage.absolute(storage.path_text(what, path)) for path in paths]

    def _as_read(self, volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(np.moveaxis(volume, -1, 0)) if self.channels_first else volume
