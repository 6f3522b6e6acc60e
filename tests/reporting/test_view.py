"""The page of one record: what the viewer draws lies where the image's affine says."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig
from beam_nifti.errors import UsageError
from beam_nifti.inspection.extract import StoredVolume
from beam_nifti.reporting.view import make_view
from beam_nifti.volume.rescale import Scaling
from tests.datasets import build_dataset
from tests.images import brain, write_image, write_manifest

for module in ("jinja2", "nilearn", "PIL"):
    pytest.importorskip(module)

NASTY = "</title><script>alert(1)</script>"
SHAPE = (10, 12, 14)
AFFINE = np.array([[2.0, 0, 0, -9], [0, 2, 0, -11], [0, 0, 2, -13], [0, 0, 0, 1]])
SPOT = (2, 9, 11)
"""The only bright voxel: left of the middle, in front, above."""

View = Callable[..., str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same volume stored in three orientations, with a mask of the spot; one has a nasty name."""
    folder = tmp_path_factory.mktemp("view")
    voxels = np.zeros(SHAPE, np.int16)
    voxels[SPOT] = 700
    rows = []
    for code, name in (("RAS", "ras"), ("LPI", "lpi"), ("SAL", NASTY)):
        turns = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code)
        )
        image = nib.Nifti1Image(voxels, AFFINE).as_reoriented(turns)
        nib.save(image, folder / f"{code}.nii")
        mask = nib.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.uint8), image.affine)
        nib.save(mask, folder / f"{code}-mask.nii")
        rows.append({"participant_id": name, "path": f"{code}.nii", "mask": f"{code}-mask.nii"})
    return build_dataset(
        write_manifest(folder / "m.csv", rows),
        folder / "out",
        RecordConfig(mask_dtype="uint8"),
        columns=Columns(mask="mask"),
        allow_mixed_shapes=True,
    )


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> View:
    """Run the command in an empty folder: the page, or with another exit code what is complained of."""
    monkeypatch.chdir(tmp_path)

    def run(output: Path, *flags: str, code: int = cli.SUCCESS) -> str:
        assert cli.main(["view", str(output), *flags]) == code
        said = capsys.readouterr()
        return said.err if code else Path(said.out.rpartition(": ")[2].strip()).read_text()

    return run


def drawn(page: str, which: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """What the viewer draws, below ("spriteImg") and above ("overlayImg"): greys of voxels, and the affine.

    It has the sagittal slices as tiles of one picture, front to the right and top up.
    """
    from PIL import Image

    (inner,) = re.findall(r'srcdoc="([^"]*)"', page)
    inner = html.unescape(inner)
    (params,) = (json.loads(found) for found in re.findall(r"brainsprite\((\{.*\})\);", inner))
    (data,) = re.findall(rf'id="{which}-[^>]*base64,([^"]+)"', inner)
    tiles = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
    tiles = np.where(tiles[..., 3] > 0, tiles[..., :3].mean(-1).round(), 0).astype(np.uint8)
    x, y, z = (params["nbSlice"][axis] for axis in "XYZ")
    voxels = tiles.reshape(-1, z, tiles.shape[1] // y, y).swapaxes(1, 2).reshape(-1, z, y)[:x]
    from_one = np.eye(4)
    from_one[:3, 3] = 1  # it counts voxels from 1
    return voxels[:, ::-1].swapaxes(1, 2), np.array(params["affine"]) @ from_one


def brightest(page: str, which: str) -> list[float]:
    """Where it is in space, in millimetres."""
    voxels, affine = drawn(page, which)
    assert np.count_nonzero(voxels == voxels.max()) == 1
    place = np.unravel_index(voxels.argmax(), voxels.shape)
    found: list[float] = nib.affines.apply_affine(affine, place).tolist()
    return found


@pytest.mark.parametrize("example_id", ["ras", "lpi", NASTY])
def test_left_is_left(dataset: Path, view: View, example_id: str) -> None:
    expected = nib.affines.apply_affine(AFFINE, SPOT).tolist()
    assert brightest(view(dataset, "--id", example_id), "overlayImg") == expected
    page = view(dataset, "--id", example_id, "--mask", "--overwrite")
    assert brightest(page, "spriteImg") == expected
    labels, _ = drawn(page, "overlayImg")
    assert np.argwhere(labels).tolist() == [list(SPOT)]


def made(values: Any, affine: Any = AFFINE, mask: Any = None) -> StoredVolume:
    """A volume as `extract` reads it."""
    zooms = tuple(np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(0)))
    return StoredVolume("a", values, Scaling(), np.asarray(affine), zooms, mask)


def test_contrast_is_the_same_below_a_mask() -> None:
    values = np.random.default_rng(0).normal(500, 100, SHAPE).astype(np.float32)
    values[SPOT] = 30000
    mask = np.zeros(SHAPE, np.uint8)
    mask[:3] = 1
    plain, below = (
        drawn(make_view(made(values, mask=mask), with_mask=with_mask), which)[0]
        for with_mask, which in ((False, "overlayImg"), (True, "spriteImg"))
    )
    assert np.abs(plain.astype(int) - below).max() <= 1
    assert 100 < np.median(below) < 155


def test_around_a_tilted_volume_it_is_black() -> None:
    turn = np.array([[0.94, -0.34, 0, 0], [0.34, 0.94, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    values = np.full(SHAPE, -1024, np.float32)
    values[3:7, 4:9, 4:9] = 40
    mask = (values > 0).astype(np.uint8)
    voxels, _ = drawn(make_view(made(values, turn @ AFFINE, mask), with_mask=True), "spriteImg")
    assert voxels.size > values.size
    assert voxels[0, 0, 0] == 0
    assert voxels.max() > 200


def test_labels_of_any_numbers_have_colours_of_their_own() -> None:
    mask = np.zeros(SHAPE, np.uint16)
    for number, label in enumerate((1, 2, 2035, 9000)):
        mask[number + 1] = label
    page = make_view(made(brain(SHAPE), mask=mask), with_mask=True)
    voxels, _ = drawn(page, "overlayImg")
    assert "mask labels 0, 1, 2, 2035, 9000" in page
    assert len({int(voxels[number + 1, 5, 5]) for number in range(4)}) == 4


def test_an_empty_mask_leaves_the_image_as_it_is() -> None:
    far = AFFINE + np.array([[0, 0, 0, 500]] * 3 + [[0] * 4])
    page = make_view(made(brain(SHAPE), far, np.zeros(SHAPE, np.uint8)), with_mask=True)
    assert "mask labels 0<" in page
    assert html.escape('"numSlice": {"X": 5, "Y": 6, "Z": 7}') in page


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(UsageError, match="has intensities beyond float32, so it cannot be drawn"):
        make_view(made(np.full(SHAPE, 1e300)))


@pytest.mark.parametrize("sizes", [(1e9, 1, 1), (1, 1e6, 1e-6), (1, 1, 5000), (1e30, 1, 1e-30)], ids=str)
def test_voxels_that_would_fill_the_memory_as_cubes_are_refused(sizes: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="mm, which are too unlike cubes to be drawn"):
        make_view(made(np.zeros(SHAPE, np.float32), np.diag([*sizes, 1.0])))


def test_a_name_is_no_markup_and_nothing_may_be_loaded(dataset: Path, view: View, tmp_path: Path) -> None:
    page = view(dataset, "--id", NASTY)
    assert [path.name for path in tmp_path.iterdir()] == ["__title__script_alert(1)__script_.html"]
    assert NASTY not in html.unescape(re.sub(r"<(title|h1)>.*?</\1>", "", page))
    assert page.count(html.escape(NASTY)) == 2
    assert "default-src 'none'; img-src data:;" in page
    assert "14×12×10 voxels · 2×2×2 mm · 0 to 700" in page


def test_a_channel_is_chosen(tmp_path: Path, view: View) -> None:
    frames = np.stack([brain(seed=1), 2 * brain(seed=2)], -1)
    write_image(tmp_path / "images/a.nii", frames)
    write_image(tmp_path / "images/b.nii", frames[:, ::-1])
    rows = [{"participant_id": name, "path": f"{name}.nii"} for name in "ab"]
    config = RecordConfig(frames="all", voxel_dtype="native")
    dataset = build_dataset(write_manifest(tmp_path / "images/m.csv", rows), tmp_path / "out", config)
    said = view(dataset, "--id=a", code=cli.USAGE)
    assert "--channel is missing: record 'a' has the channels 0 to 1" in said
    assert "--channel is 2: record 'a' has" in view(dataset, "--id=a", "--channel=2", code=cli.USAGE)
    page = view(dataset, "--id=a", "--channel=1")
    assert f"channel 1 of 2 · {frames[..., 1].min()} to {frames[..., 1].max()}" in page


def test_it_opens_the_page(dataset: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    view(dataset, "--id=ras")
    assert opened == []
    view(dataset, "--id=ras", "--out=other.html", "--open")
    assert opened == [Path("other.html").absolute().as_uri()]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--id=rsa"], cli.FAILED, "no record 'rsa'; did you mean 'ras'?"),
        (["--id=ras", "--channel=0"], cli.USAGE, "record 'ras' has no channels; drop --channel"),
        (["--id=ras", "--open", "--out=s3://lab/a.html"], cli.USAGE, "--open requires a local file"),
        (["--id=ras", "--out=there.html"], cli.USAGE, "there.html: already exists"),
    ],
)
def test_refusals(dataset: Path, view: View, flags: list[str], code: int, says: str) -> None:
    Path("there.html").touch()
    assert says in view(dataset, *flags, code=code)
    assert [path.name for path in Path().iterdir()] == ["there.html"]


def test_without_the_extra(dataset: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nilearn" else name)
    said = view(dataset, "--id=ras", code=cli.USAGE)
    assert "not installed: nilearn; pip install 'beam-nifti[report]'" in said
