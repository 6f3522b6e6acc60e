"""Folds for cross-validation: as a build draws them, and as both readers put them together."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.errors import DatasetError, UsageError
from tests.datasets import info_of
from tests.images import brain, write_image, write_manifest

NUM_PEOPLE, FOLDS = 24, 4


def write_rows(folder: Path, count: int) -> Path:
    rows = [
        {
            "participant_id": f"sub-{n // 2:02d}",
            "session_id": n % 2,
            "path": "a.nii",
            "site": "AB"[n // 2 % 2],
            "label": n,
        }
        for n in range(2 * count)
    ]
    for n, row in enumerate(rows):
        row["path"] = f"{n}.nii"
        write_image(folder / f"{n}.nii", brain((3, 3, 2), seed=n))
    return write_manifest(folder / "m.csv", rows)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four folds and a test set of participants with two images each, stratified by site."""
    folder = tmp_path_factory.mktemp("folds")
    manifest = write_rows(folder, NUM_PEOPLE)
    bn.build(manifest, folder / "out", split=f"kfold:{FOLDS},test=0.2", stratify="site", progress=False)
    return folder / "out"


def people(ids: list[str]) -> set[str]:
    return {name.partition("_")[0] for name in ids}


def test_each_participant_is_validated_once(dataset: Path) -> None:
    assert info_of(dataset).folds == ("fold0", "fold1", "fold2", "fold3")
    test = people(bn.Dataset(dataset, "test").ids)
    validated = Counter[str]()
    for fold in range(FOLDS):
        train, validation = (bn.Dataset(dataset, name, fold=fold) for name in ("train", "validation"))
        assert validation.ids == bn.Dataset(dataset, f"fold{fold}").ids
        assert len(train) + len(validation) + 2 * len(test) == 2 * NUM_PEOPLE
        assert not people(train.ids) & (people(validation.ids) | test)
        validated.update(people(validation.ids))
        sites = Counter(bn.Dataset(dataset, "validation", fold=fold).index(["site"])["site"].to_pylist())
        assert abs(sites["A"] - sites["B"]) <= 4
    assert validated == Counter({f"sub-{n:02d}" for n in range(NUM_PEOPLE)} - test)


def test_who_is_added_moves_nobody(dataset: Path, tmp_path: Path) -> None:
    before = {fold: set(bn.Dataset(dataset, fold).ids) for fold in info_of(dataset).folds}
    shutil.copytree(dataset, tmp_path / "out")
    manifest = write_rows(tmp_path, NUM_PEOPLE + 6)
    bn.build(manifest, tmp_path / "out", like=dataset, progress=False)
    assert all(ids <= set(bn.Dataset(tmp_path / "out", fold).ids) for fold, ids in before.items())


def test_folds_are_shares_of_equal_size() -> None:
    from tests.build_helpers import combine

    def shares(split: object) -> dict[str, float]:
        config = combine("m.csv", "out", {"split": split})
        assert config.splitting is not None
        return dict(config.splitting.shares)

    assert shares("kfold:5") == {f"fold{n}": 0.2 for n in range(5)}
    assert shares("kfold:5") == shares({f"fold{n}": 0.2 for n in range(5)})
    assert shares("test=0.2, kfold:2") == {"fold0": 0.4, "fold1": 0.4, "test": 0.2}
    for split, message in (
        ("kfold:1", "kfold:1; the number of folds must be from 2 to 100"),
        ("kfold:101", "the number of folds must be from 2 to 100"),
        ("kfold:x", "give each split once, with its share"),
        ("kfold:2,kfold:2", "give each split once, with its share"),
        ("kfold:2=0.5", "--split names 'kfold:2'; use up to 128 letters"),
        (
            "kfold:2,train=0.5",
            "names 'train' besides kfold:2, but readers use that name for folds",
        ),
        ("kfold:2,fold7=0.5", "names 'fold7' besides kfold:2"),
        ("kfold:2,test=1", "leaves the folds a share of 0; it must be above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            shares(split)
    with pytest.raises(UsageError, match=r"^split is kfold:1; the number"):
        bn.build("m.csv", "out", split="kfold:1")


def test_a_manifest_may_name_the_folds(tmp_path: Path) -> None:
    for n in range(3):
        write_image(tmp_path / f"{n}.nii", brain((3, 3, 2), seed=n))
    manifest = write_manifest(
        tmp_path / "m.csv", [{"path": f"{n}.nii", "split": f"fold{n}"} for n in range(3)]
    )
    bn.build(manifest, tmp_path / "out", progress=False)
    assert bn.Dataset(tmp_path / "out", fold=1).ids == ["0.nii", "2.nii"]


def test_what_is_no_fold_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fold is 4, but .*out has the folds 0 to 3"):
        bn.Dataset(dataset, fold=4)
    with pytest.raises(UsageError, match=r"fold is -1, but .*out has the folds 0 to 3"):
        bn.Dataset(dataset, fold=-1)
    with pytest.raises(UsageError, match="fold is True; give a whole number"):
        bn.Dataset(dataset, fold=True)
    for split in ("test", "train[:50%]", "fold1", "train+test"):
        with pytest.raises(
            UsageError, match="but fold is 1; use split='train' or 'validation', or drop fold"
        ):
            bn.Dataset(dataset, split, fold=1)
    with pytest.raises(
        DatasetError, match=r"no split 'train'; .*; give the number of a fold, such as fold=0"
    ):
        bn.Dataset(dataset)
    write_image(tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", brain(seed=3))
    bn.build([{"path": str(tmp_path / "a.nii")}], tmp_path / "one", progress=False)
    with pytest.raises(UsageError, match=r"one has no folds fold0, .*, only train; build it with"):
        bn.Dataset(tmp_path / "one", fold=0)
    rows = [
        {"path": str(tmp_path / f"{n}.nii"), "split": split}
        for n, split in zip("ab", ("fold0", "fold1"), strict=True)
    ]
    write_image(tmp_path / "c.nii", brain(seed=4))
    rows.append({"path": str(tmp_path / "c.nii"), "split": "train"})
    bn.build(rows, tmp_path / "both", progress=False)
    gap = [{**row, "split": split} for row, split in zip(rows, ("fold0", "fold1", "fold3"), strict=True)]
    bn.build(gap, tmp_path / "gap", progress=False)
    with pytest.raises(UsageError, match=r"gap has no folds fold0, .*, only fold0, fold1, fold3; build"):
        bn.Dataset(tmp_path / "gap", fold=0)
    with pytest.raises(
        UsageError, match="has a split 'train' besides its folds; drop fold, and name the folds"
    ):
        bn.Dataset(tmp_path / "both", fold=0)


def test_a_build_says_how_to_read_a_fold(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, options = str(dataset.parent / "m.csv"), ["--split=kfold:3", "--split-seed=1", "--quiet"]
    assert cli.main(["build", manifest, str(tmp_path / "out"), *options]) == cli.SUCCESS
    assert "out', 'train', batch_size=8, fold=0)" in capsys.readouterr().out


@pytest.mark.tf
def test_tensorflow_reads_the_same_and_continues(dataset: Path) -> None:
    from beam_nifti.reader import load_dataset, state_after

    for split in ("train", "validation"):
        records = bn.Dataset(dataset, split, fold=2, columns=["label"])
        expected = [record["label"] for record in records]
        read = load_dataset(dataset, split, fold=2, as_dict=True, columns=["label"])
        assert [element["label"].numpy() for element in read] == expected
    state = state_after(3, dataset, fold=2, batch_size=5, shuffle=True, seed=1)
    assert state["split"] == "fold0+fold1+fold3"
    arguments = {"batch_size": 5, "shuffle": True, "seed": 1, "repeat": 1}
    whole = [y.numpy() for _, y in load_dataset(dataset, fold=2, **arguments)]
    for rest in (
        load_dataset(dataset, fold=2, start_state=state, **arguments),
        load_dataset(dataset, "fold0+fold1+fold3", start_state=state, **arguments),
    ):
        found = [y.numpy() for _, y in rest]
        assert all(map(np.array_equal, found, whole[3:]))
        assert len(found) == len(whole) - 3
    with pytest.raises(UsageError, match=r"fold requires a dataset_info.json, but layout='plain' has none"):
        load_dataset("*.gz", layout="plain", fold=1)
