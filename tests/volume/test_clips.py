"""`--frames each:N`: clips of N frames as examples, whose frames are channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.config import RecordConfig
from beam_nifti.errors import OutputError, TooManyFailures, UsageError
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.configure import make_config
from beam_nifti.random_access import Dataset
from beam_nifti.volume.volume import load_frames
from tests.build_helpers import CUTTING_RUNNER, Built, assert_complete, build
from tests.datasets import failures_of, index_rows, info_of
from tests.images import Array, random_voxels, rescaled, row_of, write_image, write_manifest

GRID = (6, 5, 4)


def write_runs(folder: Path, lengths: tuple[int, ...]) -> Path:
    rows = []
    for i, length in enumerate(lengths):
        if not (folder / f"{i}.nii.gz").exists():
            write_image(folder / f"{i}.nii.gz", random_voxels((*GRID, length), seed=i), slope=0.5, inter=2.0)
        rows.append({"participant_id": f"sub-{i}", "path": f"{i}.nii.gz", "label": i})
    return write_manifest(folder / "m.tsv", rows)


def build_clips(manifest: Path, output: Path, **changes: Any) -> Built:
    return build(manifest, output, **{"frames": "each:3", "unit_rows": 1, **changes})


def values(folder: Path, number: int) -> Array:
    image: Any = nib.load(folder / f"{number}.nii.gz")
    return np.asanyarray(image.dataobj)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=4),
    st.sampled_from([{"examples_per_shard": 4}, {"num_shards": 2}]),
    st.booleans(),
)
def test_clips_are_those_that_numpy_cuts(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sharding: dict[str, int], is_equal: bool
) -> None:
    """Each clip is rescaled by itself, and the frames that do not fill one are dropped."""
    folder = tmp_path_factory.mktemp("clips")
    lengths = [lengths[0]] * len(lengths) if is_equal else lengths
    manifest, most = write_runs(folder, tuple(lengths)), None if is_equal else max(lengths) + 1
    build_clips(manifest, folder / "out", frames="each:2", max_frames=most, **sharding)
    wanted = [(i, first) for i, length in enumerate(lengths) for first in range(0, length - 1, 2)]
    rows, records = index_rows(folder / "out"), list(Dataset(folder / "out"))
    assert [(row["row"] - 1, row["frame"]) for row in rows] == wanted
    stride = (most or lengths[0]) // 2
    assert [row["position"] for row in rows] == [i * stride + first // 2 for i, first in wanted]
    for (i, first), record in zip(wanted, records, strict=True):
        assert record["id"] == f"sub-{i}_frame-{first:04d}"
        assert np.array_equal(record["image"], rescaled(values(folder, i)[..., first : first + 2]))
    assert verify_dataset(str(folder / "out"), manifest=str(manifest), deep=ALL).problems == ()
    assert (
        build_clips(manifest, folder / "out", frames="each:2", max_frames=most, **sharding).read
        == frozenset()
    )


def test_a_dataset_of_clips(tmp_path: Path, run: Callable[..., str]) -> None:
    from beam_nifti.reader import load_dataset

    manifest, output = write_runs(tmp_path / "c", (7, 6, 8)), tmp_path / "out"
    printed = run("check", manifest, "--frames=each:3")
    assert "would make    6 examples" in printed
    warning = "2 images: the last frames are too few for a clip of --frames each:N, and are dropped"
    assert warning in printed
    printed = run("build", manifest, output, "--frames=each:3", "--rescale=none")
    assert warning.replace("images", "examples") in printed
    assert info_of(output).shape == (*GRID, 3)
    assert "of 2 clips" in run("inspect", output)
    batch = next(iter(load_dataset(output, batch_size=4)))[0]
    assert batch.shape == (4, *GRID, 3)
    image: Any = bn.extract(output, "sub-2_frame-0003").to_nibabel()
    assert np.allclose(image.dataobj, values(tmp_path / "c", 2)[..., 3:6])
    assert make_config("m", "x", {}, like=str(output)).record.frames == "each:3"
    with pytest.raises(OutputError, match="--frames was each:3, now each"):
        build(manifest, output, frames="each", rescale="none", max_frames=8)


def test_a_runner_that_breaks_fusion_makes_the_same(tmp_path: Path) -> None:
    manifest = write_runs(tmp_path / "c", (7, 3, 9))
    build_clips(manifest, tmp_path / "a", max_frames=9, examples_per_shard=6)
    build_clips(manifest, tmp_path / "b", max_frames=9, examples_per_shard=6, runner=CUTTING_RUNNER)
    assert_complete(tmp_path / "b", tmp_path / "a")


def test_failures_and_repair(tmp_path: Path) -> None:
    voxels = random_voxels((*GRID, 9), seed=1)
    voxels[..., 3:6] = 7
    write_image(tmp_path / "c/0.nii.gz", voxels)
    manifest, output = write_runs(tmp_path / "c", (9, 4)), tmp_path / "out"
    with pytest.raises(TooManyFailures, match="4 of 6 volumes failed"):
        build_clips(manifest, output)  # 9 frames are 3 clips, but 4 only one, so that image fails
    built = build_clips(manifest, tmp_path / "mixed", max_frames=9, max_bad_fraction=0.3)
    assert (built.summary.num_written, built.summary.num_failed) == (3, 1)
    assert failures_of(tmp_path / "mixed")[0]["frames"] == "3"
    assert verify_dataset(str(tmp_path / "mixed"), manifest=str(manifest), deep=ALL).problems == ()
    assert build_clips(manifest, tmp_path / "mixed", max_frames=9, max_bad_fraction=0.3).read == {"0.nii.gz"}


def test_shapes_may_differ(tmp_path: Path) -> None:
    write_image(tmp_path / "c/1.nii.gz", random_voxels((4, 4, 4, 7), seed=5))
    manifest, output = write_runs(tmp_path / "c", (7, 7)), tmp_path / "out"
    build_clips(manifest, output, allow_mixed_shapes=True)
    assert [record["image"].shape for record in Dataset(output)] == [(*GRID, 3)] * 2 + [(4, 4, 4, 3)] * 2
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()


def test_preparation_and_masks(tmp_path: Path) -> None:
    write_image(tmp_path / "c/mask.nii.gz", np.random.default_rng(0).integers(0, 3, GRID, np.uint8))
    write_runs(tmp_path / "c", (6, 6))
    rows = [{"path": f"{i}.nii.gz", "mask": "mask.nii.gz"} for i in range(2)]
    manifest, output = write_manifest(tmp_path / "c/n.tsv", rows), tmp_path / "out"
    options: dict[str, Any] = {"spacing": (1.0, 3.0, 2.0), "crop_foreground": "mask", "shape": (5, 5, 5)}
    build_clips(manifest, output, columns={"mask": "mask"}, **options)
    assert info_of(output).shape == (5, 5, 5, 3)
    assert verify_dataset(str(output), manifest=str(manifest), deep=ALL).problems == ()


@pytest.mark.parametrize("voxels", [random_voxels((*GRID, 6, 2)), random_voxels((*GRID, 2))])
def test_images_that_give_no_clip(tmp_path: Path, voxels: Array, run: Callable[..., str]) -> None:
    write_image(tmp_path / "a.nii", voxels)
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii"}])
    message = "has 3 × 2 numbers per voxel" if voxels.ndim == 5 else "is 2, fewer than those of a clip of"
    assert message in run("check", manifest, "--frames=each:3", code=2)


def test_memory_of_a_clip_is_its_own(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii", random_voxels((*GRID, 6), "float32"))
    record = RecordConfig(frames="each:3", voxel_dtype="native")
    first, second = load_frames(row_of(path, num_frames=2, clip_frames=3), record=record)
    first.voxels[...] = 0
    assert second.voxels.any()
    assert (first.row.frame, second.row.frame) == (0, 3)


@pytest.mark.parametrize("text", ["each:0", "each:", "each:-1", "each:x", "each:123456", "first:2"])
def test_what_is_no_clip_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--frames is '{text}'; choose one of: all, each, each:N"):
        RecordConfig(frames=text)


def test_spellings_and_limits() -> None:
    assert RecordConfig(frames="each:1") == RecordConfig(frames="each")
    with pytest.raises(UsageError, match="--max-frames is 2; give 3 to 65536"):
        RecordConfig(frames="each:3", max_frames=2)
    with pytest.raises(UsageError, match="--frames each makes examples"):
        RecordConfig(frames="each:3", channels=("a", "b"))
