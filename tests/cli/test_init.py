"""`beam-nifti init`: the command that it prints builds every image of a folder, and nothing is replaced."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.manifest.recognition import recognize
from beam_nifti.manifest.tables import read_table
from tests.datasets import index_rows
from tests.images import AFFINE, brain, write_image, write_manifest

Capture = pytest.CaptureFixture[str]
Shape = tuple[int, ...]
FLIPPED = AFFINE * np.array([[-1], [1], [1], [1]])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labels(path: str, shape: Shape = (6, 5, 4), most: int = 2, **header: Any) -> None:
    voxels = np.random.default_rng(0).integers(0, most, shape, endpoint=True)
    write_image(Path(path), voxels.astype(np.uint16), **header)


def init(capsys: Capture, *arguments: str, code: int = cli.SUCCESS) -> tuple[str, str]:
    """What the command prints on both streams."""
    assert cli.main(["init", *arguments]) == code
    said = capsys.readouterr()
    return said.out, said.err


def build(printed: str) -> list[dict[str, Any]]:
    """Run the command that `init` has printed; the index of the dataset."""
    command = shlex.split(printed.splitlines()[-1].removeprefix("next     "))
    assert command[:2] == ["beam-nifti", "build"]
    assert cli.main([*command[1:], "--quiet", "--workers=1"]) == cli.SUCCESS
    return [row | {"folder": Path(command[2]).parent} for row in index_rows(Path(command[3]))]


def options_of(path: str = "data.toml") -> Mapping[str, Any]:
    return tomllib.loads(Path(path).read_text())


def sources(rows: list[dict[str, Any]], *columns: str) -> set[str]:
    """The files of the records, as absolute paths."""
    return {str((row["folder"] / row[column]).resolve()) for row in rows for column in ("source", *columns)}


# Folders of every kind


def write_bids(seeds: int, write: Callable[[str, int], None]) -> None:
    for i in range(seeds):
        write(f"data/sub-{i:02d}/ses-1/anat/sub-{i:02d}_ses-1_T1w.nii.gz", i)


def write_runs(seeds: int, write: Callable[[str, int], None]) -> None:
    for i in range(seeds):
        write(f"data/sub-{i // 2}/func/sub-{i // 2}_task-rest_run-{i % 2}_bold.nii", i)


def write_decathlon(seeds: int, write: Callable[[str, int], None]) -> None:
    training = []
    for i in range(seeds):
        training.append({"image": f"./imagesTr/a_{i}.nii.gz", "label": f"./labelsTr/a_{i}.nii.gz"})
        write(f"data/imagesTr/a_{i}.nii.gz", i)
        write(f"data/labelsTr/a_{i}.nii.gz", -1 - i)
    Path("data/dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "training": training}))


def write_files(seeds: int, write: Callable[[str, int], None]) -> None:
    for i in range(seeds):
        write(f"data/{'ab'[i % 2]}/scan {i}.nii", i)


def write_pairs(seeds: int, write: Callable[[str, int], None]) -> None:
    for i in range(seeds):
        write(f"data/images/case{i}.nii.gz", i)
        write(f"data/labels/case{i}.nii.gz", -1 - i)


def write_table(seeds: int, write: Callable[[str, int], None]) -> None:
    for i in range(seeds):
        write(f"data/nii/{i}.nii", i)
    write_manifest(
        Path("data/cohort.csv"), [{"file": f"nii/{i}.nii", "age": i, "who": f"p{i}"} for i in range(seeds)]
    )


KINDS = (write_bids, write_runs, write_decathlon, write_files, write_pairs, write_table)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(
        st.tuples(
            st.sampled_from([(6, 5, 4), (6, 5, 6), (7, 5, 4)]),
            st.sampled_from([(), (), (2,), (3,)]),
            st.booleans(),
            st.sampled_from([1.0, 1.5]),
        ),
        min_size=2,
        max_size=4,
    ),
)
def test_the_printed_command_builds_every_image(
    kind: Callable[..., None], images: list[tuple[Shape, Shape, bool, float]], tmp_path_factory: Any
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("init"))
        written = set()

        def write(path: str, seed: int) -> None:
            shape, frames, is_flipped, zoom = images[seed if seed >= 0 else -1 - seed]
            affine = (FLIPPED if is_flipped else AFFINE) @ np.diag([1, 1, zoom, 1])
            if seed < 0:
                labels(path, shape, affine=affine)
                return
            write_image(Path(path), brain(shape + frames, seed), affine=affine)
            written.add(str(Path(path).resolve()))

        kind(len(images), write)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(["init", "data"]) == cli.SUCCESS
        assert sources(build(out.getvalue())) == written


# What is chosen


def test_nothing_is_chosen_where_nothing_is_needed(capsys: Capture) -> None:
    write_files(3, lambda path, i: write_image(Path(path), brain(seed=i)) and None)
    out, err = init(capsys, "data")
    assert err == "reading the headers of 3 examples\n"
    assert out.splitlines() == [
        "found    a folder of images: 3 examples",
        "manifest data.tsv",
        "options  none is needed: data.toml",
        "decide   labels, splits: at the end of data.toml",
        "next     beam-nifti build data.tsv data_dataset --config data.toml",
    ]
    assert options_of() == {}
    text = Path("data.toml").read_text()
    assert "# shapes: 6×5×4: 3\n" in text
    assert "\n# split = {train = 0.8, validation = 0.1, test = 0.1}\n" in text
    assert len(build(out)) == 3


def test_a_study_of_several_modalities_with_masks_on_another_grid(capsys: Capture) -> None:
    for i in range(3):
        name = f"sub-0{i}/anat/sub-0{i}"
        write_image(Path(f"data/{name}_T1w.nii"), brain(seed=i))
        write_image(Path(f"data/{name}_FLAIR.nii"), brain((7, 6, 6), seed=i))
        labels(f"data/derivatives/seg/{name}_dseg.nii")
        labels(f"data/derivatives/seg/{name}_space-MNI_dseg.nii")
    write_image(Path("data/sub-00/func/sub-00_task-rest_bold.nii"), brain((6, 5, 4, 3)))
    write_manifest(Path("data/participants.tsv"), [{"participant_id": "sub-00", "age": 3, "sex": "F"}])
    out, err = init(capsys, "data", "--out", "made/here")
    assert "not used: images of other suffixes: bold (1)" in err
    given = options_of("made/here/data.toml")
    assert given == {"path_column": ["T1w", "FLAIR"], "mask_column": "mask", "align": "first"}
    rows = build(out)
    assert len(sources(rows, "FLAIR", "mask")) == 9
    # The command for labels is the one that wrote the manifest.
    text = Path("made/here/data.toml").read_text()
    (command,) = (line[2:] for line in text.splitlines() if line.startswith("# beam-nifti manifest"))
    assert "age, sex" in text
    words = shlex.split(command)
    before = read_table("made/here/data.tsv")
    assert cli.main([w for w in words[1:] if w not in ("--label", "age")]) == cli.SUCCESS
    assert read_table("made/here/data.tsv").equals(before)
    assert cli.main(words[1:]) == cli.SUCCESS
    assert read_table("made/here/data.tsv")["label"].to_pylist() == ["3"]


def test_masks_that_some_images_of_a_study_lack_are_empty(capsys: Capture) -> None:
    write_bids(3, lambda path, i: write_image(Path(path), brain(seed=i)) and None)
    for i in (0, 2):
        labels(f"data/sub-0{i}/ses-1/anat/sub-0{i}_ses-1_dseg.nii")
    write_manifest(Path("data/participants.tsv"), [{"participant_id": f"sub-0{i}", "age": i} for i in "01"])
    _, err = init(capsys, "data")
    assert "not used" not in err
    assert options_of() == {"mask_column": "mask", "missing_mask": "empty"}
    masks = read_table("data.tsv")["mask"].to_pylist()
    assert [Path(path).name[:6] for path in masks] == ["sub-00", "", "sub-02"]
    # The command for labels keeps the image without a mask.
    assert cli.main(shlex.split(printed_command())[1:]) == cli.SUCCESS
    assert read_table("data_labelled.tsv").select(["mask", "label"]).to_pydict() == {
        "mask": masks,
        "label": ["0", "1", "n/a"],
    }


def printed_command(path: str = "data.toml") -> str:
    """The only command of the file that writes a manifest."""
    lines = Path(path).read_text().splitlines()
    (command,) = (line[2:] for line in lines if line.startswith("# beam-nifti manifest"))
    return command


def test_a_channel_that_a_participant_lacks_is_left_to_the_user(capsys: Capture) -> None:
    for i in range(3):
        for suffix in ("T1w", "FLAIR")[: 1 if i == 1 else 2]:
            write_image(Path(f"data/sub-{i}/anat/sub-{i}_{suffix}.nii"), brain(seed=i))
    init(capsys, "data")
    assert "FLAIR images are not used, because sub-1 has none." in decided()
    assert cli.main(shlex.split(printed_command())[1:]) == cli.SUCCESS
    table = read_table("data.tsv")
    assert {"T1w", "FLAIR"} <= {*table.column_names}
    assert table["participant_id"].to_pylist() == ["sub-0", "sub-2"]


def test_masks_that_must_be_selected_have_a_command(capsys: Capture) -> None:
    for i in range(2):
        write_image(Path(f"data/sub-{i}/anat/sub-{i}_T1w.nii"), brain(seed=i))
        for rater in "ab":
            labels(f"data/sub-{i}/anat/sub-{i}_desc-{rater}_dseg.nii")
    _, err = init(capsys, "data")
    command = printed_command()
    assert f"init has no --entity; this command has it: {command}" in err
    words = shlex.split(command.replace("KEY=LABEL", "desc=a"))
    assert cli.main(words[1:]) == cli.SUCCESS
    assert read_table("data.tsv")["mask"].to_pylist()[0].endswith("sub-0_desc-a_dseg.nii")


def test_channels_and_masks_in_the_folders_of_cases(capsys: Capture) -> None:
    for i in range(3):
        for role in ("t1", "flair"):
            write_image(Path(f"data/B_{i}/B_{i}_{role}.nii"), brain(seed=i))
        if i:
            labels(f"data/B_{i}/B_{i}_seg.nii", most=300)
    rows = build(init(capsys, "data")[0])
    assert options_of() == {
        "id_column": "case_id",
        "path_column": ["flair", "t1"],
        "mask_column": "mask",
        "missing_mask": "empty",
        "mask_dtype": "uint16",
    }
    assert [row["example_id"] for row in rows] == ["B_0", "B_1", "B_2"]
    assert [Path(row["mask"]).name for row in rows] == ["", "B_1_seg.nii", "B_2_seg.nii"]


def test_cases_that_have_different_images_are_not_combined(capsys: Capture) -> None:
    for name in ("a_t1", "a_t2", "b_t1", "b_seg", "c_seg"):
        write_image(Path(f"data/{name}.nii"), brain(seed=ord(name[0])))
    out, err = init(capsys, "data")
    assert "not used: 1 mask named seg" in err
    assert "not used: the masks of 1 case (c) without an image" in err
    assert {Path(path).name for path in sources(build(out))} == {"a_t1.nii", "a_t2.nii", "b_t1.nii"}


def test_files_of_the_same_names_in_folders_are_columns(capsys: Capture) -> None:
    for i in range(5):
        for name in ("ct", "dose")[: 1 if i == 4 else 2]:
            write_image(Path(f"data/case{i}/{name}.nii"), brain(seed=i))
    labels("data/case0/ptv_mask.nii")
    labels("data/case1/ptv_mask.nii")
    write_image(Path("data/case2/extra.nii"))
    _, err = init(capsys, "data")
    assert "not used: case4, which has no dose\n" in err
    assert "not used: 1 image (case2/extra.nii) that few folders have\n" in err
    assert options_of() == {
        "id_column": "case_id",
        "path_column": ["ct", "dose"],
        "mask_column": "mask",
        "missing_mask": "empty",
    }
    text = " ".join(Path("data.toml").read_text().replace("\n# ", " ").split())
    assert 'path_column = ["ct"] and target_column = "dose".' in text
    survey = bn.check("data.tsv", **{**options_of(), "path_column": ["ct"], "target_column": "dose"})
    assert (survey["num_images"], survey["num_bad"]) == (4, 0)


def test_channels_of_4d_images_are_named_with_their_common_range(capsys: Capture) -> None:
    def write(path: str, seed: int) -> None:
        write_image(Path(path), brain((6, 5, 4, 2), seed))

    write_decathlon(2, lambda path, i: write(path, i) if i >= 0 else labels(path))
    content = json.loads(Path("data/dataset.json").read_text())
    Path("data/dataset.json").write_text(json.dumps(content | {"modality": {"0": "FLAIR", "1": "T1w"}}))
    init(capsys, "data")
    assert options_of()["frames"] == "all"
    text = " ".join(Path("data.toml").read_text().replace("\n# ", " ").split())
    assert "become channels: FLAIR, T1w. All channels of an image share one range" in text


def test_a_table_is_the_manifest(capsys: Capture) -> None:
    rows = []
    for i in range(3):
        write_image(Path(f"data/i/{i}.nii"), brain(seed=i))
        labels(f"data/m/{i}.nii")
        cells = {"file": f"i/{i}.nii", "copy": f"./i/{i}.nii", "outline": f"m/{i}.nii" if i else "n/a"}
        rows.append({"participant_id": "one", **cells, "label": i or "", "split": "train"})
    write_image(Path("data/i/other.nii"))
    before = write_manifest(Path("data/cohort.tsv"), rows).read_bytes()
    out, err = init(capsys, "data")
    assert "not used: 2 images that cohort.tsv does not name" in err  # the mask of row 1, and the other one
    assert "decide" not in out
    assert options_of() == {
        "id_column": "file",
        "path_column": ["file"],
        "mask_column": "outline",
        "missing_mask": "empty",
        "missing_label": "nan",
    }
    assert [row["label"] for row in build(out)][1:] == [1, 2]
    assert Path("data/cohort.tsv").read_bytes() == before
    assert not Path("data.tsv").exists()


def test_a_table_of_a_few_of_the_images_is_not_the_manifest(capsys: Capture) -> None:
    write_files(5, lambda path, i: write_image(Path(path), brain(seed=i)) and None)
    write_manifest(Path("data/bad.csv"), [{"path": "a/scan 0.nii"}, {"path": "a/scan 2.nii"}])
    out, err = init(capsys, "data")
    assert "not used: bad.csv, which names 2 of 5 images\n" in err
    assert len(build(out)) == 5


def test_ct_is_known_by_its_air(capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        voxels = rng.choice([-1000, 40, 60, 400], (6, 5, 4), p=[0.4, 0.3, 0.2, 0.1]).astype(np.int16)
        voxels[0, 0, 0] = -1000
        write_image(Path(f"data/{i}.nii"), voxels)
    init(capsys, "data")
    assert options_of() == {"rescale": "window:-1024,3071"}
    assert "-1,000 to 400 in 2 images" in Path("data.toml").read_text()


def ct(path: str) -> None:
    voxels = np.random.default_rng(0).choice([-1000, 40, 60, 400], (6, 5, 4), p=[0.4, 0.3, 0.2, 0.1])
    write_image(Path(path), voxels.astype(np.int16))


def decided(path: str = "data.toml") -> str:
    """The part of the file for what is not decided, on one line."""
    return " ".join(Path(path).read_text().partition("Not decided:")[2].replace("\n# ", " ").split())


def test_images_of_which_some_are_ct_are_left_to_the_user(capsys: Capture) -> None:
    for i in range(3):
        ct(f"data/scan{i}.nii")
    write_image(Path("data/scan3.nii"), brain())
    assert "intensities" in init(capsys, "data")[0]
    assert "rescale" not in options_of()
    assert "4 images read, 3 of them like CT; scan3.nii is not. By default" in decided()
    assert '# rescale = "window:-1024,3071"\n' in Path("data.toml").read_text()


@pytest.mark.parametrize("name", ["ct", "scan"])
def test_a_channel_of_ct_is_named(capsys: Capture, name: str) -> None:
    for i in range(2):
        ct(f"data/{i}/{name}.nii")
        write_image(Path(f"data/{i}/pet.nii"), brain(seed=i))
    init(capsys, "data")
    assert "rescale" not in options_of()
    assert f"{name} looks like CT. By default, each image is scaled" in decided()


def test_bright_voxels_and_nan_are_found_in_voxels(capsys: Capture) -> None:
    for i in range(2):
        voxels = brain((10, 10, 10), seed=i).astype(np.float32)
        voxels[5, 5, 5] = 9000
        voxels[1, 1, 1] = np.nan if i else 5
        write_image(Path(f"data/{i}.nii"), voxels)
    assert len(build(init(capsys, "data")[0])) == 2
    assert options_of() == {"nonfinite": "zero", "rescale": "percentile:0.5,99.5"}
    assert "1 of 2 images whose voxels were read have NaN or infinite voxels" in Path("data.toml").read_text()


def test_images_that_would_fail_are_named_and_a_line_accepts_them(capsys: Capture) -> None:
    write_files(3, lambda path, i: write_image(Path(path), brain(seed=i)) and None)
    Path("data/bad.nii").write_bytes(bytes(400))
    out, err = init(capsys, "data")
    assert err.replace(f"{Path.cwd()}/", "") == (
        "reading the headers of 4 examples\n"
        "would fail: row 4 (data/bad.nii): zeros where a header should be, as after an interrupted copy; "
        "copy it again\n"
    )
    assert "failing  1 example, as far as headers show" in out
    text = Path("data.toml").read_text()
    assert "\n# max_bad_fraction = 0.25\n" in text
    Path("data.toml").write_text(text.replace("# max_bad", "max_bad"))
    assert len(build(out)) == 3


# Files


def test_nothing_is_replaced_and_nothing_written_for_nothing(capsys: Capture) -> None:
    Path("data/sub-01").mkdir(parents=True)
    Path("data/notes.csv").write_text("path\nnowhere.nii\n")
    for name, why in (
        ("data", "data: no images, neither there nor in a folder below; name a folder of images"),
        ("missing", "missing: no such folder; name a folder of images"),
    ):
        assert why in init(capsys, name, code=cli.USAGE)[1]
    assert [path.name for path in Path().iterdir()] == ["data"]
    write_image(Path("data/a.nii"))
    for name in ("data.tsv", "data.toml"):
        Path(name).write_text("mine")
        why = f"{name}: already exists; choose another folder with --out DIR, or"
        assert why in init(capsys, "data", code=cli.USAGE)[1]
        assert sorted(path.name for path in Path().iterdir()) == ["data", name]
        assert Path(name).read_text() == "mine"
        Path(name).unlink()
    Path("data.tsv").write_text("mine")
    out, err = init(capsys, "data", "--overwrite")
    assert "not used: notes.csv, which has no column of paths of images" in err
    assert len(build(out)) == 1


def test_a_name_that_no_tsv_can_hold_is_to_be_changed(capsys: Capture) -> None:
    write_image(Path("data/a\tb.nii"))
    assert (
        "has a tab or a line break, which no .tsv can hold; rename the file"
        in (init(capsys, "data", code=cli.USAGE)[1])
    )


def test_files_of_a_table_that_are_not_there_are_named(capsys: Capture) -> None:
    write_files(2, lambda path, i: write_image(Path(path), brain(seed=i)) and None)
    write_manifest(Path("data/t.csv"), [{"file": f"{'ab'[i % 2]}/scan {i}.nii"} for i in range(3)])
    why = "not used: the column file of t.csv, which names 1 file that is not there: a/scan 2.nii; copy"
    err = init(capsys, "data")[1]
    assert why in err
    assert "has no column" not in err


def test_each_file_is_used_once(capsys: Capture) -> None:
    write_image(Path("data/z/1.nii"), brain(seed=1))
    write_image(Path("data/z/2.nii"), brain(seed=2))
    write_image(Path("data/z/2.nii.gz"), brain(seed=3))
    write_image(Path("elsewhere/3.nii"), brain(seed=4))
    Path("data/above.nii").symlink_to("z/1.nii")
    write_image(Path("data/4.nii"), brain(seed=4))
    Path("data/z/loop").symlink_to("..")
    for name in ("c", "d"):
        Path(f"data/{name}").symlink_to("../elsewhere")
    _, err = init(capsys, "data")
    assert "links to files that are there under another name\n" in err
    assert "same name but for the ending: z/2.nii, z/2.nii.gz; each is an image" in err
    files = [
        str(Path(path).resolve().relative_to(Path.cwd()))
        for path in read_table("data.tsv")["path"].to_pylist()
    ]
    assert sorted(files) == [
        *("data/4.nii", "data/z/1.nii", "data/z/2.nii", "data/z/2.nii.gz", "elsewhere/3.nii")
    ]


def test_a_table_may_name_links(capsys: Capture) -> None:
    write_image(Path("data/z/1.nii"), brain())
    Path("data/b.nii").symlink_to("z/1.nii")
    write_manifest(Path("data/t.csv"), [{"path": "b.nii", "age": 3}])
    assert "found    images that t.csv lists: 1 example" in init(capsys, "data")[0]


def test_links_of_git_annex_to_one_file_stay(capsys: Capture) -> None:
    write_image(Path("data/.git/annex/one.nii"), brain())
    for name in "ab":
        Path(f"data/{name}.nii").symlink_to(".git/annex/one.nii")
    init(capsys, "data")
    assert read_table("data.tsv")["path"].to_pylist() == ["data/a.nii", "data/b.nii"]


def test_folders_may_be_classes_and_orientations_may_tie(capsys: Capture) -> None:
    for i in range(2):
        write_image(Path(f"data/covid/{i}.nii"), brain(seed=i))
        write_image(Path(f"data/normal/{i}.nii"), brain(seed=i), affine=FLIPPED)
    init(capsys, "data")
    assert "The names of the folders (covid, normal) may be labels." in decided()
    assert "are equally frequent" in " ".join(Path("data.toml").read_text().replace("\n# ", " ").split())


def test_empty_columns_are_no_labels(capsys: Capture) -> None:
    rows = []
    for i in range(2):
        write_image(Path(f"data/{i}.nii"), brain(seed=i))
        rows.append({"path": f"{i}.nii", "label": "", "stage": "", "age": i})
    write_manifest(Path("data/t.csv"), rows)
    out, _ = init(capsys, "data")
    assert "can be labels: age. label_column" in decided().replace("# ", "")
    build(out)


def test_all_images_that_fail_leave_no_file(capsys: Capture) -> None:
    Path("data").mkdir()
    Path("data/bad.nii").write_bytes(bytes(400))
    assert "a build would write nothing" in init(capsys, "data", code=cli.USAGE)[1]
    assert [path.name for path in Path().iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("paths", "images", "mask"),
    [
        ("x/images/1 x/images/2 x/masks/1 x/masks/2", ("path",), True),
        ("1/t1 1/seg 2/t1 2/seg", ("path",), True),
        ("images/1_t1 images/1_t2 labels/1_seg", ("t1", "t2"), True),
        ("sub-0001 sub-0002", ("path",), False),
        ("a_mask b_mask", ("path",), False),
        ("a a_t2", ("image", "t2"), False),
        ("a/scan1 a/scan2 b/scan1 b/scan2", ("path",), False),
        ("a/x a/y b/x b/y", ("x", "y"), False),
        ("a/one_ct a/mask b/one_ct b/mask", ("path",), True),
    ],
)
def test_roles_in_names(paths: str, images: tuple[str, ...], mask: bool) -> None:
    for path in paths.split():
        write_image(Path(f"data/{path}.nii"))
    found = recognize("data", "data.tsv")
    assert (found.images, bool(found.mask)) == (images, mask)
