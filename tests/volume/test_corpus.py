"""Real, odd images: each becomes a right record, or a failure whose message a person can act on.

Not part of the project: set BEAM_NIFTI_CORPUS to a folder of images; its `README.md` and `images.tsv`
are passed over.
"""

from __future__ import annotations

import os
import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from beam_nifti.config import BuildConfig, RecordConfig
from beam_nifti.errors import TooManyFailures, VolumeError
from beam_nifti.record.example import decode_example, decode_tensor
from beam_nifti.volume import Volume, load_volume, rescale_volume
from beam_nifti.volume.grid import is_usable
from tests.datasets import failures_of, records_of
from tests.images import Array, rescaled, row_of, write_manifest

CORPUS = os.environ.get("BEAM_NIFTI_CORPUS", "")
CORPUS = CORPUS and str(Path(CORPUS).resolve())  # a manifest in another folder names its images
pytestmark = pytest.mark.skipif(not CORPUS, reason="BEAM_NIFTI_CORPUS is not set to a folder of odd images")


def files() -> list[str]:
    """Names of all images, listed in the table or not (the table leaves out halves of pairs)."""
    others = {"README.md", "images.tsv"}
    return sorted({p.name for p in Path(CORPUS).iterdir()} - others) if CORPUS else []


FILES = files()

# What a person can do about it stands in the message itself.
ACTIONABLE = re.compile(r"; (choose|copy|convert|extract|leave it out|replace|repair)")
TRIED: dict[str, dict[str, str]] = {
    "": {},
    "`--frames all`": {"frames": "all"},
    "`--frames first`": {"frames": "first"},
    "`--rescale none`": {"rescale": "none"},
}
"""What docs/corpus.md tries, in order, until there is a record."""


def open_with_nibabel(path: Path) -> Any:
    """The image; half of a pair too, which nibabel finds only if both halves are packed alike."""
    with warnings.catch_warnings(action="ignore"):
        halves = path.name.partition(".img")[0]
        if not path.suffixes[0].startswith(".img") or not path.with_name(f"{halves}.hdr").exists():
            return nib.load(path)
        files = {"header": path.with_name(f"{halves}.hdr"), "image": path}
        holders = {name: nib.FileHolder(str(file)) for name, file in files.items()}
        return nib.Nifti1Pair.from_file_map(holders)


def expected_voxels(path: Path) -> Array | None:
    """The voxels in the image's units, of what nibabel reads as a volume; else None."""
    try:
        image = open_with_nibabel(path)
        values = np.asanyarray(image.dataobj)
    except Exception:
        return None
    if isinstance(image, nib.Cifti2Image) or not is_usable(image.affine):
        return None
    is_vector = "intent_code" in image.header and int(image.header["intent_code"]) == 1007
    if values.dtype.names:
        values = np.stack([values[name] for name in values.dtype.names], -1)
    elif is_vector and values.shape[3:4] == (1,):
        values = values[:, :, :, 0]
    elif values.ndim != 3 and not (values.shape[3:] and set(values.shape[3:]) == {1}):
        return None
    values = values.reshape((*values.shape[:3], *(n for n in values.shape[3:] if n > 1)))
    return values if values.ndim <= 4 and values.dtype.kind in "iuf" else None


def has_range(values: Array) -> bool:
    return bool(np.isfinite(values).all() and values.min() < values.max())


@pytest.mark.parametrize("name", FILES)
def test_each_image_is_read_right_or_refused_with_a_reason(name: str) -> None:
    path = Path(CORPUS) / name
    values = expected_voxels(path)
    loaded, message, peak = load(path)
    size = 0 if values is None else values.size
    assert peak < 40 * size + 3 * path.stat().st_size + (4 << 20)  # 2 of them for the footer of an .mgz
    if loaded is None:
        assert values is None or not has_range(values), message
        assert message.startswith(f"{path}: ")
        assert ACTIONABLE.search(message), message
        return
    volume, stored = loaded
    assert values is not None
    assert np.array_equal(volume.scaling.apply(volume.voxels), values)
    assert np.array_equal(stored.voxels, rescaled(values))
    image = open_with_nibabel(path)
    assert np.array_equal(stored.affine, image.affine)
    assert stored.zooms == tuple(map(float, image.header.get_zooms()[:3]))


def load(path: Path) -> tuple[tuple[Volume, Volume] | None, str, int]:
    """An image as it is and as it is stored, or why there is none; and the peak of memory in bytes."""
    tracemalloc.start()
    try:
        volume = load_volume(row_of(path))
        return (volume, rescale_volume(volume, RecordConfig())), "", tracemalloc.get_traced_memory()[1]
    except VolumeError as e:
        return None, str(e), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def told(name: str) -> str:
    """The row of docs/corpus.md about an image."""
    title = name.replace("+", "/", 1).replace("__", ": ", 1).replace("__", "/")
    refusal = ""
    for option, fields in TRIED.items():
        config = RecordConfig(**fields)
        try:
            volume = rescale_volume(load_volume(row_of(name), CORPUS, record=config), config)
        except VolumeError as e:
            refusal = refusal or str(e).removeprefix(f"{name}: ")
            continue
        record = f"{'×'.join(map(str, volume.voxels.shape))} of {volume.dtype}"
        return f"| {title} | {f'{record}, with {option}' if option else record} | {refusal} |"
    return f"| {title} | none | {refusal} |"


def test_the_documents_say_what_becomes_of_each() -> None:
    text = (Path(__file__).parents[2] / "docs/corpus.md").read_text()
    assert [row for row in map(told, FILES) if row not in text] == []


def test_a_build_of_all_of_them(tmp_path: Path, build: Callable[..., Any]) -> None:
    """Also through the pipeline: records and failures together are all images."""
    rows = [{"path": str(Path(CORPUS) / name), "label": i} for i, name in enumerate(FILES)]
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    output = tmp_path / "out"
    config = BuildConfig(str(manifest), str(output), allow_mixed_shapes=True, max_bad_fraction=1.0)
    summary = build(config, 2)
    failures = failures_of(output)
    assert summary.num_written + summary.num_failed == len(FILES)
    assert len(failures) == summary.num_failed
    for failure in failures:
        assert failure["error"] == "VolumeError", failure
        assert ACTIONABLE.search(failure["message"]), failure["message"]
    seen = {f["path"] for f in failures}
    for cells, payload in records_of(output):
        raw = decode_example(payload)["image_raw"]
        assert isinstance(raw, memoryview)
        values = expected_voxels(Path(cells["source"]))
        assert values is not None
        assert np.array_equal(decode_tensor(raw), rescaled(values))
        seen.add(cells["source"])
    assert seen == {row["path"] for row in rows}


def test_without_a_limit_they_are_too_many(tmp_path: Path, build: Callable[..., Any]) -> None:
    names = [name for name in FILES if expected_voxels(Path(CORPUS) / name) is None]
    good = next(name for name in FILES if name not in names)
    rows = [{"path": str(Path(CORPUS) / name)} for name in [good, *names]]
    manifest = write_manifest(tmp_path / "m.tsv", rows)
    with pytest.raises(TooManyFailures, match=f"{len(names)} of {len(names) + 1} volumes failed"):
        build(BuildConfig(str(manifest), str(tmp_path / "out"), allow_mixed_shapes=True), 2)
    assert len(failures_of(tmp_path / "out")) == len(names)
