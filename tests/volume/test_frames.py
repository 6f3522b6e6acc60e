"""4-D images, from the command line to the training batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import RecordConfig
from beam_nifti.record.example import decode_example, decode_tensor, encode_volume
from beam_nifti.volume import load_volume, rescale_volume
from tests.datasets import failures_of, info_of, manifest_of
from tests.images import (
    REAL_DTYPES,
    nifti_header,
    random_voxels,
    rescaled,
    row_of,
    values_of,
    write_image,
    write_manifest,
)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
SHAPE = (6, 5, 4, 7)
Run = Callable[..., str]


def cohort_of(folder: Path, shapes: list[tuple[int, ...]], dtype: str = "int16", **header: Any) -> Path:
    """An image of each shape, `0.nii.gz` and on; the manifest, whose labels are those numbers."""
    for i, shape in enumerate(shapes):
        write_image(folder / f"{i}.nii.gz", random_voxels(shape, dtype, seed=i), **header)
    return write_manifest(
        folder / "m.tsv", [{"path": f"{i}.nii.gz", "label": i} for i, _ in enumerate(shapes)]
    )


@pytest.mark.parametrize("options", [[], ["--voxel-dtype=native"], ["--compression=none", "--rescale=none"]])
def test_a_dataset_of_4d_images(run: Run, tmp_path: Path, options: list[str]) -> None:
    manifest, output = cohort_of(tmp_path / "c", [SHAPE] * 3, slope=0.5, inter=2.0), tmp_path / "out"
    assert "of 6×5×4×7 voxels" in run("build", manifest, output, "--frames=all", "--dry-run", *options)
    run("build", manifest, output, "--frames=all", *options)
    info = info_of(output)
    assert info.shape == SHAPE
    assert info.config["frames"] == "all"
    assert "3 rebuilt" in run("verify", output, "--deep=all", "--manifest", manifest)
    shown = run("inspect", output)
    assert "6×5×4×7" in shown
    assert "frames all" in shown
    record = json.loads(run("inspect", output, "--record=1.nii.gz", "--json"))
    assert record["shape"] == list(SHAPE)
    assert record["zooms"] == [2.0, 2.0, 2.5]
    # The second run finds everything done.
    before = (output / info.shards[0].name).stat()
    run("build", manifest, output, "--frames=all", *options)
    assert (output / info.shards[0].name).stat().st_mtime_ns == before.st_mtime_ns


def test_without_the_option_4d_images_are_refused_with_the_remedy(run: Run, tmp_path: Path) -> None:
    manifest = cohort_of(tmp_path / "c", [SHAPE] * 2)
    told = run("build", manifest, tmp_path / "out", code=cli.USAGE)
    assert "got shape (6, 5, 4, 7); choose frames with --frames all" in told
    assert not (tmp_path / "out").exists()


def test_one_4d_image_among_others_is_a_failure_with_the_remedy(run: Run, tmp_path: Path) -> None:
    manifest, output = cohort_of(tmp_path / "c", [SHAPE[:3], SHAPE, (*SHAPE[:3], 1)]), tmp_path / "out"
    run("build", manifest, output, "--max-bad-fraction=0.5")
    (failure,) = failures_of(output)
    assert (failure["row"], failure["stage"]) == (2, "LoadVolume")
    assert "choose frames with --frames all" in failure["message"]
    assert info_of(output).shape == SHAPE[:3]


def test_other_frames_are_another_dataset(run: Run, tmp_path: Path) -> None:
    manifest, output = cohort_of(tmp_path / "c", [SHAPE[:3]] * 2), tmp_path / "out"
    run("build", manifest, output)
    told = run("build", manifest, output, "--frames=all", code=cli.USAGE)
    assert "--frames was not given, now all" in told


def test_a_run_of_another_length_is_another_shape(run: Run, tmp_path: Path) -> None:
    manifest = cohort_of(tmp_path / "c", [SHAPE, (*SHAPE[:3], 9)])
    run("build", manifest, tmp_path / "one", "--frames=all", code=cli.FAILED)
    message = failures_of(tmp_path / "one")[0]["message"]
    assert "shape (6, 5, 4, 9), but the first image has (6, 5, 4, 7); if the last axis is frames" in message
    run("build", manifest, tmp_path / "frame", "--frames=first")
    run("build", manifest, tmp_path / "two", "--frames=all", "--allow-mixed-shapes")
    assert "ok " in run("verify", tmp_path / "two", "--deep=all", "--manifest", manifest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(REAL_DTYPES),
    st.tuples(*[st.integers(1, 5)] * 3, st.integers(2, 20)),
    st.integers(0, 2**32 - 1),
)
def test_frames_are_stored_bit_equal_to_the_formula(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], seed: int
) -> None:
    voxels = random_voxels(shape, dtype, seed)
    if dtype.endswith("64"):  # which the formula cannot subtract without rounding twice
        voxels = (voxels / 2**12).astype(dtype)
    path = write_image(tmp_path / "a.nii", voxels)
    if voxels.min() == voxels.max():
        return
    config = RecordConfig(frames="all")
    data = bytes(encode_volume(rescale_volume(load_volume(row_of(path), record=config), config)))
    stored = decode_tensor(decode_example(data)["image_raw"])  # type: ignore[arg-type]
    assert stored.shape == shape
    assert stored.tobytes() == (rescaled(values_of(path)) + np.float32(0)).tobytes()


@pytest.mark.tf
@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
def test_frames_are_the_channels_of_a_batch(run: Run, tmp_path: Path, voxel_dtype: str, dtype: str) -> None:
    tf = pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    manifest, output = cohort_of(tmp_path / "c", [SHAPE] * 3, dtype), tmp_path / "out"
    run("build", manifest, output, "--frames=all", f"--voxel-dtype={voxel_dtype}")
    batches = load_dataset(output, batch_size=2)
    assert batches.element_spec[0] == tf.TensorSpec((None, *SHAPE), tf.float32)
    read = {int(label): image for x, y in batches for label, image in zip(y, x.numpy(), strict=True)}
    assert sorted(read) == [0, 1, 2]
    for number, image in read.items():
        assert image.tobytes() == rescaled(values_of(tmp_path / f"c/{number}.nii.gz")).tobytes()


@pytest.mark.tf
@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
def test_3d_and_4d_images_in_one_dataset(run: Run, tmp_path: Path, voxel_dtype: str) -> None:
    tf = pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    shapes = [SHAPE, SHAPE[:3], (3, 4, 5, 2), (2, 3, 4, 1)]
    manifest, output = cohort_of(tmp_path / "c", shapes), tmp_path / "out"
    run("build", manifest, output, "--frames=all", "--allow-mixed-shapes", f"--voxel-dtype={voxel_dtype}")
    volumes = load_dataset(output)
    assert volumes.element_spec[0] == tf.TensorSpec((None, None, None, None), tf.float32)
    read = {int(y): x.numpy() for x, y in volumes}
    assert [read[i].shape for i in range(4)] == [SHAPE, (6, 5, 4, 1), (3, 4, 5, 2), (2, 3, 4, 1)]
    for i in range(4):
        assert read[i].tobytes() == rescaled(values_of(tmp_path / f"c/{i}.nii.gz")).tobytes()


@pytest.mark.parametrize(
    ("options", "shape"),
    [(["--frames=mean"], SHAPE[:3]), (["--frames=3", "--voxel-dtype=native"], SHAPE[:3])],
)
def test_a_dataset_of_one_volume_an_image(
    run: Run, tmp_path: Path, options: list[str], shape: tuple[int, ...]
) -> None:
    manifest, output = (
        cohort_of(tmp_path / "c", [SHAPE, (*SHAPE[:3], 9)], slope=0.5, inter=2.0),
        tmp_path / "out",
    )
    assert "of 6×5×4 voxels" in run("build", manifest, output, *options, "--dry-run")
    run("build", manifest, output, *options)
    assert info_of(output).shape == shape
    assert "2 rebuilt" in run("verify", output, "--deep=all", "--manifest", manifest)
    assert f"frames {options[0].partition('=')[2]}" in run("inspect", output)


COLOURS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.tf
@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
def test_colours_are_the_channels_of_a_batch(run: Run, tmp_path: Path, voxel_dtype: str) -> None:
    pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    for i in range(2):
        write_image(tmp_path / f"c/{i}.nii.gz", random_voxels((6, 5, 4, 3), "uint8", i).view(COLOURS)[..., 0])
    rows = [{"path": f"{i}.nii.gz", "label": i} for i in range(2)]
    manifest, output = write_manifest(tmp_path / "c/m.tsv", rows), tmp_path / "out"
    run("build", manifest, output, f"--voxel-dtype={voxel_dtype}")
    assert "2 rebuilt" in run("verify", output, "--deep=all", "--manifest", manifest_of(output))
    assert "rgb24 (2)" in run("inspect", output)
    for image, label in load_dataset(output):
        assert np.array_equal(image, rescaled(random_voxels((6, 5, 4, 3), "uint8", int(label))))
    run("build", manifest, tmp_path / "mixed", "--allow-mixed-shapes", code=cli.FAILED)
    assert "--frames all" in failures_of(tmp_path / "mixed")[0]["message"]
    run("build", manifest, tmp_path / "mixed", "--allow-mixed-shapes", "--frames=all")
    assert [x.shape.as_list() for x, _ in load_dataset(tmp_path / "mixed")] == [[6, 5, 4, 3]] * 2


def test_a_pair_is_loaded_again_when_either_file_changes(run: Run, tmp_path: Path) -> None:
    voxels = random_voxels((6, 5, 4))
    (tmp_path / "c").mkdir()
    header = nifti_header(voxels, fields={"magic": b"ni1", "vox_offset": 0})
    (tmp_path / "c/a.hdr").write_bytes(header)
    (tmp_path / "c/a.img").write_bytes(voxels.tobytes(order="F"))
    manifest, output = write_manifest(tmp_path / "c/m.tsv", [{"path": "a.img"}]), tmp_path / "out"
    run("build", manifest, output, "--rescale=none")
    name = info_of(output).shards[0].name
    run("build", manifest, output, "--rescale=none")
    assert info_of(output).shards[0].name == name
    (tmp_path / "c/a.hdr").write_bytes(
        nifti_header(voxels, slope=2.0, fields={"magic": b"ni1", "vox_offset": 0})
    )
    os.utime(tmp_path / "c/a.hdr", (0, 0))  # as a restored backup has it
    run("build", manifest, output, "--rescale=none")
    assert info_of(output).shards[0].name != name
    assert "1 rebuilt" in run("verify", output, "--deep=all", "--manifest", manifest_of(output))


@pytest.mark.tf
def test_a_frame_of_its_own_is_a_3d_image(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    from beam_nifti.reader import load_dataset

    manifest, output = cohort_of(tmp_path / "c", [(6, 5, 4, 1), (6, 5, 4)]), tmp_path / "out"
    run("build", manifest, output)
    assert load_dataset(output, batch_size=2).element_spec[0].shape.as_list() == [None, 6, 5, 4, 1]


@pytest.mark.tf
def test_a_shuffle_draws_from_fewer_large_volumes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow")
    from beam_nifti.read import sequential
    from beam_nifti.reader import load_dataset

    manifest, output = cohort_of(tmp_path / "c", [(3, 2, 1)] * 12), tmp_path / "out"
    run("build", manifest, output, "--num-shards=1")

    def labels() -> list[int]:
        examples = load_dataset(output, shuffle=True, seed=1, engine="sequential")
        return [int(y) for _, y in examples]

    assert labels() != list(range(12))
    monkeypatch.setattr(sequential, "_SHUFFLE_BYTES", 24 * 2 - 1)  # of two volumes, but for a byte
    assert labels() == list(range(12))
