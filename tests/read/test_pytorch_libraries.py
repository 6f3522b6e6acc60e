"""Datasets in MONAI, TorchIO and Lightning, and the examples that use these.

scripts/check --services has an environment for it.
"""

from __future__ import annotations

import itertools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

import beam_nifti as bn

_REASON = "{} is not installed; scripts/check --services does it"
torch = pytest.importorskip("torch", reason=_REASON.format("PyTorch"))
monai = pytest.importorskip("monai", reason=_REASON.format("MONAI"))
tio = pytest.importorskip("torchio", reason=_REASON.format("TorchIO"))
pytest.importorskip("lightning", reason=_REASON.format("Lightning"))
transforms = monai.transforms

pytestmark = [
    pytest.mark.torch,
    # Lightning advises workers, and warns of a folder of checkpoints that is not empty or has none.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = (20, 18, 16)
LANDMARK = (15, 4, 9)
PATCH = (8, 8, 8)
COLUMNS = ["image", "mask", "affine", "id"]

# Oblique, with other voxel sizes along each axis, x towards the posterior and y towards the left.
_TURN = nib.eulerangles.euler2mat(z=0.2, y=-0.1, x=0.3) @ np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1]])
AFFINE = nib.affines.from_matvec(_TURN * [2.0, 1.5, 2.5], [40, 70, -50])
WORLD = nib.affines.apply_affine(AFFINE, LANDMARK)

Volumes = dict[str, Any]
Example = Callable[..., str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a sphere of label 1, and one voxel of label 2 that is the brightest."""
    folder = tmp_path_factory.mktemp("libraries")
    random = np.random.default_rng(0)
    rows = []
    for number in range(6):
        centre = random.uniform(7, 9, 3)
        inside = np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - centre, axis=-1) < 5
        image = random.normal(100 + 200 * inside, 20).astype(np.int16)
        mask = inside.astype(np.uint8)
        image[LANDMARK], mask[LANDMARK] = 1000, 2
        paths = {kind: str(folder / f"{number}_{kind}.nii.gz") for kind in ("path", "mask")}
        for path, voxels in zip(paths.values(), (image, mask), strict=True):
            nib.save(nib.Nifti1Image(voxels, AFFINE), path)
        split = {4: "validation", 5: "test"}.get(number, "train")
        rows.append({"participant_id": f"sub-{number}", "split": split, **paths})
    bn.build(rows, folder / "dataset", mask_column="mask", progress=False, workers=1)
    return folder / "dataset"


@pytest.fixture
def records(dataset: Path) -> bn.Dataset:
    return bn.Dataset(dataset, columns=COLUMNS, channels_first=True)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs an example in this process, where its libraries are loaded already; what it prints."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def function(example: str, name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / example))[name]


def place(volume: Any, affine: Any) -> npt.NDArray[np.float64]:
    """The position of the brightest voxel, in millimetres."""
    voxels = np.asarray(volume)
    peak = np.unravel_index(voxels.argmax(), voxels.shape)[-3:]
    return nib.affines.apply_affine(np.asarray(affine), peak)


def test_monai_finds_a_landmark_where_it_is(dataset: Path, records: bn.Dataset) -> None:
    to_monai = function("monai_segmentation.py", "to_monai")
    source = {"image": str(dataset.parent / "0_path.nii.gz"), "mask": str(dataset.parent / "0_mask.nii.gz")}
    load = transforms.Compose(
        [transforms.LoadImaged([*source], ensure_channel_first=True), transforms.ScaleIntensityd("image")]
    )
    theirs, ours = load(source), to_monai(records[records.ids.index("sub-0")])
    for key in source:
        assert torch.equal(ours[key].as_tensor(), theirs[key].as_tensor())
        torch.testing.assert_close(ours[key].affine, theirs[key].affine)
    turned = transforms.Orientationd([*source], "RAS", labels=None)(ours)
    patches = bn.PatchDataset(records, bn.Patches(PATCH, foreground=1, label_weights={2: 1}), seed=1)
    for found in (ours, turned, *map(to_monai, patches)):
        for key in source:
            np.testing.assert_allclose(place(found[key][0], found[key].affine), WORLD, atol=1e-4)


@pytest.mark.parametrize(("kind", "workers"), [("DataLoader", 2), ("ThreadDataLoader", 0)])
def test_loaders_and_caches_of_monai_read_records(records: bn.Dataset, kind: str, workers: int) -> None:
    to_monai = function("monai_segmentation.py", "to_monai")
    crop = transforms.RandCropByPosNegLabeld(["image", "mask"], "mask", PATCH, num_samples=2)
    cached = monai.data.CacheDataset(records, transforms.Compose([to_monai, crop]), progress=False)
    loader = getattr(monai.data, kind)(cached, batch_size=2, num_workers=workers)
    items = [item for batch in loader for item in monai.data.decollate_batch(batch)]
    assert [item["id"] for item in items] == [name for name in records.ids for _ in range(2)]
    for item in items:
        whole = records.by_id(item["id"])["image"]
        corner = nib.affines.apply_affine(np.linalg.inv(AFFINE), item["image"].affine[:3, 3]).round()
        box = tuple(slice(int(a), int(a) + b) for a, b in zip(corner, PATCH, strict=True))
        assert np.array_equal(item["image"][0], whole[0][box])


def test_sliding_windows_of_monai_are_saved_where_the_record_lies(
    records: bn.Dataset, tmp_path: Path
) -> None:
    image = monai.data.MetaTensor(records[0]["image"], affine=records[0]["affine"])
    found = monai.inferers.sliding_window_inference(
        image[None], PATCH, 4, lambda x: torch.cat([1 - x, x], 1), overlap=0.5
    )[0]
    records.save_nifti(0, found.argmax(0), tmp_path / "labels.nii.gz")
    restored = bn.restore(found, (records, records.ids[0]), argmax=True)
    for saved in (nib.load(tmp_path / "labels.nii.gz"), restored):
        assert np.array_equal(saved.dataobj, records[0]["image"][0] > 0.5)
        np.testing.assert_allclose(saved.affine, AFFINE, atol=1e-6)


def test_torchio_finds_a_landmark_where_it_is(dataset: Path, records: bn.Dataset, tmp_path: Path) -> None:
    subjects = function("torchio_queue.py", "Subjects")
    source = tio.ScalarImage(dataset.parent / "0_path.nii.gz")
    number = records.ids.index("sub-0")
    subject = subjects(records)[number]
    np.testing.assert_allclose(subject.image.affine, source.affine, atol=1e-6)
    assert torch.equal(subject.image.data, tio.RescaleIntensity()(source).data)
    assert torch.equal(subject.mask.data, tio.LabelMap(dataset.parent / "0_mask.nii.gz").data)
    patches = bn.PatchDataset(records, bn.Patches(PATCH, foreground=1, label_weights={2: 1}), seed=1)
    for found in (subject, subjects(records, tio.ToCanonical())[number], *subjects(patches)):
        for image in (found.image, found.mask):
            np.testing.assert_allclose(place(image.data[0], image.affine), WORLD, atol=1e-4)
    lps = subject.image.as_sitk().TransformIndexToPhysicalPoint(LANDMARK)
    np.testing.assert_allclose(lps * np.array([-1, -1, 1]), WORLD, atol=1e-4)
    subject.image.save(tmp_path / "image.nii.gz")
    saved = nib.load(tmp_path / "image.nii.gz")
    np.testing.assert_allclose(place(saved.dataobj, saved.affine), WORLD, atol=1e-4)


def test_grids_of_torchio_are_those_of_grid_patches(records: bn.Dataset) -> None:
    def predict(image: Any) -> Any:
        return torch.cat([image, image * torch.linspace(0, 1, PATCH[2])], dim=-4)

    grid = records.grid_patches(0, PATCH, overlap=0.75)
    sampler = tio.GridSampler(function("torchio_queue.py", "Subjects")(records)[0], PATCH, 6)
    assert [tuple(corner[:3]) for corner in sampler.locations.tolist()] == list(grid.corners)
    aggregator = tio.GridAggregator(sampler, "average")
    for batch in tio.SubjectsLoader(sampler, batch_size=5):
        aggregator.add_batch(predict(batch["image"][tio.DATA]), batch[tio.LOCATION])
    stitched = grid.stitch((predict(torch.tensor(patch["image"])) for patch in grid), "constant")
    np.testing.assert_allclose(stitched, aggregator.get_output_tensor(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_queue_of_torchio_takes_patches_of_each_record(records: bn.Dataset, workers: int) -> None:
    subjects = function("torchio_queue.py", "Subjects")(records)
    queue = tio.Queue(subjects, 8, 3, tio.LabelSampler(PATCH, "mask"), num_workers=workers)
    assert len(queue) == 3 * len(records)
    batches = list(tio.SubjectsLoader(queue, batch_size=4))
    assert sorted(name for batch in batches for name in batch["id"]) == sorted(3 * records.ids)
    for patch, corners in zip(batches[0]["image"][tio.DATA], batches[0][tio.LOCATION], strict=True):
        assert any(
            np.array_equal(patch, records[n]["image"][(..., *map(slice, *corners.reshape(2, 3)))])
            for n in range(len(records))
        )


def test_the_example_of_monai_learns(dataset: Path, example: Example, tmp_path: Path) -> None:
    printed = example("monai_segmentation.py", dataset, tmp_path, "--patch=8", "--epochs=12", "--workers=0")
    sphere, _ = map(float, printed.removeprefix("Dice of each label:").split())
    assert sphere > 0.8
    (saved,) = tmp_path.iterdir()
    assert saved.name == "sub-5.nii.gz"
    np.testing.assert_allclose(nib.load(saved).affine, AFFINE, atol=1e-6)


def test_the_example_of_torchio_learns(dataset: Path, example: Example, tmp_path: Path) -> None:
    printed = example("torchio_queue.py", dataset, tmp_path, "--patch=8", "--epochs=8", "--workers=0")
    assert float(printed.removeprefix("sub-5:")) > 0.9
    np.testing.assert_allclose(nib.load(tmp_path / "sub-5.nii.gz").affine, AFFINE, atol=1e-6)


def steps(printed: str) -> list[str]:
    """The lines of steps among what Lightning prints."""
    return re.findall(r"process \d, epoch \d, batch \d: .*", printed)


def test_lightning_continues_within_an_epoch(dataset: Path, example: Example, tmp_path: Path) -> None:
    command = ["lightning_training.py", dataset, "--patch=8", "--workers=0", "--checkpoints"]
    torch.manual_seed(0)
    whole = steps(example(*command, tmp_path / "whole"))
    torch.manual_seed(0)
    begun = steps(example(*command, tmp_path / "parts", "--steps=5"))
    rest = steps(example(*command, tmp_path / "parts"))
    assert len(whole) == 16
    assert begun + rest == whole
    assert len({line.partition("loss")[2] for line in whole}) == 16


def test_lightning_refuses_the_checkpoint_of_another_run(
    dataset: Path, example: Example, tmp_path: Path
) -> None:
    command = ["lightning_training.py", "--patch=8", "--workers=0", "--checkpoints", tmp_path / "kept"]
    example(*command, dataset, "--steps=1")
    row = {kind: str(dataset.parent / f"0_{kind}.nii.gz") for kind in ("path", "mask")}
    bn.build([row], tmp_path / "other", mask_column="mask", progress=False, workers=1)
    for changed in ([tmp_path / "other"], [dataset, "--batch-size=3"], [dataset, "--patch=9"]):
        with pytest.raises(ValueError, match="of another dataset, patch, batch size or number of devices"):
            example(*command, *changed)


def test_processes_of_lightning_share_an_epoch(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "lightning_training.py", dataset, "--patch=8", "--workers=0"]
    options = ["--devices=2", f"--checkpoints={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    batches = steps(done.stdout)
    assert [
        sum(line.startswith(f"process {n}, epoch {epoch}") for line in batches)
        for n in (0, 1)
        for epoch in (0, 1)
    ] == 4 * [4]
    for epoch in (0, 1):
        read = [line.split(": ")[1].split(", ") for line in batches if f"epoch {epoch}" in line]
        assert sorted(itertools.chain(*read)) == sorted(4 * bn.Dataset(dataset).ids)
