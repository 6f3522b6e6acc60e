"""Extracts records as images, in the image's units.

A record is read at its offset in the index, and passes all checks of `verify` before it is used. Source:
docs/extract.md.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError, UsageError, unreadable
from beam_nifti.inspection.description import describe_records
from beam_nifti.inspection.record_checks import RecordSpec, affine_of, check_record
from beam_nifti.manifest.image_names import stem_of
from beam_nifti.read.opening import open_dataset
from beam_nifti.read.restoring import source_grid
from beam_nifti.record.dataset_files import path_of
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import MASK_FEATURE, TARGET_FEATURE, decode_example, decode_tensor, scaling_of
from beam_nifti.record.tfrecord import require_stored_size
from beam_nifti.storage import paths as storage
from beam_nifti.support.wording import size_text, with_beside
from beam_nifti.volume.grid import Grid, agreed_zooms
from beam_nifti.volume.nifti_writer import make_image, require_nifti_name, write_nifti
from beam_nifti.volume.rescale import RescaleRange, Scaling, Voxels, restore_units
from beam_nifti.volume.restoring import restore_voxels

if TYPE_CHECKING:
    import nibabel as nib

_UNFIT: Final = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')  # characters that file names cannot have


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StoredVolume:
    """The volume that a record holds.

    Attributes:
        example_id: id of the record.
        voxels: read-only array (X, Y, Z) or (X, Y, Z, C), in C order. Native voxels are those of the image's
            file. Others are in the image's units, as float32, or as float64 if float32 cannot hold them.
        scaling: scaling from `voxels` to the image's units; for native voxels, that of the image's header.
        affine: float64 (4, 4), voxel indices to millimetres in RAS+.
        zooms: voxel size along each axis, in millimetres, as in the affine.
        mask: labels of the voxels, uint8 or uint16 of shape (X, Y, Z), or (X, Y, Z, C) if a record has
            several masks, read-only; None if the dataset has no masks.
        target: values to predict, in their own units, float32 of shape (X, Y, Z), read-only; None if the
            dataset has no targets.
        source_shape: shape of the image that the record was made of; None if the index does not have it.
        source_affine: affine of that image, float64 (4, 4); None if the index does not have it.
    """

    example_id: str
    voxels: Voxels
    scaling: Scaling
    affine: npt.NDArray[np.float64]
    zooms: tuple[float, float, float]
    mask: Voxels | None = None
    source_shape: tuple[int, ...] | None = None
    source_affine: npt.NDArray[np.float64] | None = None
    target: Voxels | None = None

    def __repr__(self) -> str:
        voxels = f"{size_text(self.voxels.shape)} {self.voxels.dtype}"
        beside = with_beside(self.mask, self.target)
        return f"<StoredVolume {self.example_id!r}: {voxels}, {size_text(self.zooms)} mm{beside}>"

    def to_nibabel(self) -> nib.Nifti1Image | nib.Nifti2Image:
        """An image of nibabel with the header that `save` writes."""
        return make_image(self.voxels, self.scaling, self.affine, self.zooms)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the volume as a NIfTI image, replacing any file of that name.

        Args:
            path: ends in .nii or .nii.gz; local or a URL.

        Raises:
            UsageError: the path has another ending.
            OSError: it cannot be written.
        """
        write_nifti(storage.absolute(path), self.voxels, self.scaling, self.affine, self.zooms)

    def of_mask(self) -> StoredVolume:
        """The mask as a volume. A record without a mask is a UsageError."""
        if self.mask is None:
            raise UsageError(f"record {self.example_id!r} has no mask; build the dataset with --mask-column")
        return replace(self, voxels=self.mask, scaling=Scaling())

    def of_target(self) -> StoredVolume:
        """The target as a volume. A record without a target is a UsageError."""
        if self.target is None:
            raise UsageError(
                f"record {self.example_id!r} has no target; build the dataset with --target-column"
            )
        return replace(self, voxels=self.target, scaling=Scaling())

    def on_source_grid(self) -> StoredVolume:
        """The volume, its mask and its target on the grid of the image that the record was made of.

        As `beam_nifti.restore`: floats are interpolated linearly where the record was resampled, and integers
        never. Where the record does not cover the image, voxels have the least value of their channel or of
        the target in the record, as in padding, and the mask is 0.

        Raises:
            DatasetError: the index does not have the grid of that image.
        """
        cells = {"source_shape": self.source_shape, "source_affine": self.source_affine}
        source = source_grid(f"record {self.example_id!r}", cells)
        grid, voxels = Grid.of(self.voxels.shape, self.affine), self.voxels
        mask, target = self.mask, self.target
        least = voxels.min if self.scaling.slope > 0 else voxels.max
        return replace(
            self,
            voxels=restore_voxels(
                voxels, grid, source, least(axis=(0, 1, 2)), is_linear=voxels.dtype.kind == "f"
            ),
            affine=source.affine,
            zooms=source.zooms,
            mask=None if mask is None else restore_voxels(mask, grid, source, 0, is_linear=False),
            target=None
            if target is None
            else restore_voxels(target, grid, source, target.min(), is_linear=True),
        )


def read_volume(output: str, example_id: str) -> StoredVolume:
    """As `read_volumes`, for a single record."""
    (volume,) = read_volumes(output, [example_id])
    return volume


def read_volumes(output: str, example_ids: Sequence[str]) -> Iterator[StoredVolume]:
    """Read some records of a dataset, one at a time, and its indexes once.

    Args:
        output: folder or URL of the dataset.
        example_ids: ids of the records.

    Yields:
        The volumes, in the order of `example_ids`.

    Raises:
        DatasetError: there is no complete dataset, or a record is missing or damaged. Ids that no record has
            are found before any record is read.
    """
    output = storage.absolute(output)
    spec = RecordSpec(read_info(output))
    for cells in describe_records(output, example_ids):
        try:
            yield _read_record(path_of(output, cells["shard"]), cells, spec)
        except (ShardError, OSError) as e:
            raise unreadable(f"{output}: record {cells['example_id']!r} of {cells['shard']}", e) from e


def _read_record(path: str, cells: Mapping[str, Any], spec: RecordSpec) -> StoredVolume:
    require_stored_size(cells["length"], spec.most_bytes(cells))
    with storage.open_read(path) as handle:
        handle.seek(cells["offset"])
        data = handle.read(cells["length"])
    payload = spec.unpack(data, cells)
    for problem in check_record(payload, cells, spec):
        raise ShardError(problem)
    features = decode_example(payload)
    voxels, scaling = decode_tensor(features["image_raw"]), scaling_of(features)  # type: ignore[arg-type]
    if spec.config.voxel_dtype != "native":
        voxels = _restore(voxels, cells, spec.config)
    affine = affine_of(cells)
    x, y, z = agreed_zooms(affine, cells["zooms"]).tolist()
    mask, target = (
        decode_tensor(features[name]) if name in features else None  # type: ignore[arg-type]
        for name in (MASK_FEATURE, TARGET_FEATURE)
    )
    shape, source_affine = cells.get("source_shape"), cells.get("source_affine")
    return StoredVolume(
        cells["example_id"],
        voxels,
        scaling,
        affine,
        (x, y, z),
        mask,
        None if shape is None else tuple(shape),
        None if source_affine is None else np.array(source_affine, np.float64).reshape(4, 4),
        target,
    )


def _restore(voxels: Voxels, cells: Mapping[str, Any], config: RecordConfig) -> Voxels:
    """The values in the units of the image, or of each channel."""
    if config.method == "none":
        return restore_units(voxels, None)
    names = ("rescale_low", "rescale_high") if config.has_range else ("min", "max")
    for name in names:
        if cells[name] is None:
            raise ShardError(f"the index has no {name}, without which its voxels have no unit")
    if config.channels is None:
        return restore_units(voxels, RescaleRange(*(cells[name] for name in names)))
    ends = itertools.starmap(RescaleRange, zip(*(cells[name] for name in names), strict=True))
    images = (np.ascontiguousarray(voxels[..., number]) for number in range(voxels.shape[3]))
    return np.stack(list(map(restore_units, images, ends)), -1)


def choose_paths(example_ids: Sequence[str], out: str | None, suffix: str = "") -> list[str]:
    """The paths for the images of some records: `out` for a single one, or else each id and the suffix.

    Raises:
        UsageError: two images would have one path, or `out` is not the name of a NIfTI image.
    """
    if out is not None:
        if len(example_ids) > 1:
            raise UsageError(
                f"--out names one file, but there are {len(example_ids)} ids; drop it to name each file "
                "after its id"
            )
        require_nifti_name(out)
        return [out]
    named: dict[str, str] = {}
    for example_id in example_ids:
        path = file_name(example_id, f"{suffix}.nii.gz")
        if path in named:
            raise UsageError(
                f"--id {named[path]!r} and --id {example_id!r} would both be written to {path}; extract one "
                "after the other, with --out"
            )
        named[path] = example_id
    return list(named)


def refuse_sources(output: str, paths: Sequence[str]) -> None:
    """Refuse to replace an image that the dataset was built from.

    Raises:
        UsageError: a path is that of one.
        DatasetError: the dataset cannot be read.
    """
    existing = [path for path in map(storage.absolute, paths) if storage.exists(path)]
    if existing:
        opened = open_dataset(storage.absolute(output))
        for path in existing:
            opened.require_no_source(path)


def file_name(example_id: str, ending: str) -> str:
    r"""The name of a file for a record: its id, with `_` for invalid characters, and an ending.

    >>> file_name("sub-01_ses-2", "_mask.nii.gz"), file_name("scans/sub-01/T1w.nii.gz", ".html")
    ('sub-01_ses-2_mask.nii.gz', 'scans_sub-01_T1w.html')
    """
    stem = stem_of(example_id) or example_id
    return f"{_UNFIT.sub('_', stem)}{ending}"
