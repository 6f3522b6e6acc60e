"""Small NIfTI files of every kind, byte by byte, for the tests.

The header goes through nibabel's header classes, which let any field hold any value; the rest of the
file is put together here, so that a test can break every part of it.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from beam_nifti.manifest import VolumeRow

Array = npt.NDArray[Any]

REAL_DTYPES = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float32",
    "float64",
)
"""Every real dtype of NIfTI but the 128-bit float."""

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])


def random_voxels(shape: Sequence[int] = (5, 4, 3), dtype: str = "int16", seed: int = 0) -> Array:
    """Voxels that fill a dtype's whole range; floats have both signs and many magnitudes."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape)).astype(kind)
    if kind.kind == "c":
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(kind)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, shape, kind, endpoint=True)


def brain(shape: Sequence[int] = (6, 5, 4), seed: int = 0) -> Array:
    """Voxels as a scanner gives them: int16, zero outside the head."""
    rng = np.random.default_rng(seed)
    voxels = rng.integers(1, 1200, shape).astype(np.int16)
    voxels[0] = 0
    return voxels


def nifti_header(
    voxels: Array,
    *,
    version: int = 1,
    byte_order: str = "<",
    slope: float | None = None,
    inter: float = 0.0,
    affine: Array | None = AFFINE,
    fields: Mapping[str, Any] | None = None,
) -> bytes:
    """A header of 348 or 540 bytes and its empty extension flag.

    Args:
        voxels: their shape and dtype are announced; a dtype of three or four bytes is RGB or RGBA.
        version: of NIfTI, 1 or 2.
        byte_order: "<" or ">".
        slope: scl_slope; None writes 0, which means no scaling.
        inter: scl_inter.
        affine: goes into the sform; None leaves sform and qform unset.
        fields: any further fields of the header, set last.
    """
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    header = kind(endianness=byte_order)
    header.set_data_dtype(voxels.dtype.newbyteorder("="))
    header.set_data_shape(voxels.shape)
    if affine is not None:
        header.set_sform(affine, code=1)
        header["pixdim"][1:4] = np.sqrt((affine[:3, :3] ** 2).sum(0))
    header["magic"] = b"n+1" if version == 1 else b"n+2"
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"] = 0.0 if slope is None else slope
    header["scl_inter"] = inter
    for name, value in (fields or {}).items():
        header[name] = value
    return bytes(header.binaryblock) + bytes(4)


def nifti_bytes(voxels: Array, *, byte_order: str = "<", **header: Any) -> bytes:
    """An uncompressed single-file image; the arguments are those of `nifti_header`."""
    stored = voxels.astype(voxels.dtype.newbyteorder(byte_order))
    return nifti_header(voxels, byte_order=byte_order, **header) + stored.tobytes(order="F")


def write_image(path: Path, voxels: Array | None = None, **header: Any) -> Path:
    """Write an image, compressed if its name ends in `.gz`; the arguments are `nifti_header`'s."""
    data = nifti_bytes(brain() if voxels is None else voxels, **header)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 1, mtime=0) if path.suffix == ".gz" else data)
    return path


def row_of(path: Path | str, label: float | None = 1.0, **fields: Any) -> VolumeRow:
    """The manifest row of an image."""
    return VolumeRow(row=1, example_id="sub-01", path=str(path), label=label, **fields)


def values_of(path: Path) -> Array:
    """What nibabel gives of an image."""
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj)


def rescaled(values: Array) -> Array:
    """Their range onto [0, 1], by the formula that the project grew from, in float64."""
    x = values.astype(np.float64)
    return ((x - x.min()) / (x.max() - x.min())).astype(np.float32)


def numbers_of(values: Array) -> Array:
    """Nibabel's values with frames, components or colours as the fourth axis, and no axis of one number."""
    if values.dtype.names:
        values = np.stack([values[name] for name in values.dtype.names], -1)
    return values.reshape((*values.shape[:3], *(n for n in values.shape[3:] if n > 1)))


def write_manifest(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a .tsv, which has no quotes, or a .csv of dictionaries that have the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        if path.suffix == ".tsv":
            for cells in [list(rows[0]), *(row.values() for row in rows)]:
                handle.write("\t".join(map(str, cells)) + "\n")
        else:
            writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


def name_of(number: int) -> str:
    """The file of an image of a cohort."""
    return f"sub-{number:04d}.nii.gz"


def write_cohort(
    folder: Path,
    count: int,
    *,
    shape: Sequence[int] = (6, 5, 4),
    split: Sequence[str] = (),
    first: int = 0,
) -> Path:
    """Write `count` different images, `sub-0000.nii.gz` and on, and their manifest.tsv.

    Args:
        folder: is made.
        count: of images.
        shape: of all of them.
        split: names of splits, taken in turn; none leaves the column out.
        first: number of the first image; rows of earlier ones are written, but not their images.

    Returns:
        The manifest. Labels are the images' numbers; `age` is an extra column.
    """
    rows = []
    for i in range(first + count):
        if i >= first:
            write_image(folder / name_of(i), brain(shape, seed=i))
        cells = {"participant_id": f"sub-{i:04d}", "path": name_of(i), "label": i, "age": 20 + i}
        rows.append(cells | ({"split": split[i % len(split)]} if split else {}))
    return write_manifest(folder / "manifest.tsv", rows)
