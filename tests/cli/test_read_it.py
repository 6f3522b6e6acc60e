"""The line that a build prints last runs as it stands, whatever the dataset is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from beam_nifti.cli import main as cli
from tests.images import brain, write_image, write_manifest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
pytest.importorskip("tensorflow")

pytestmark = pytest.mark.tf


@pytest.mark.parametrize(
    ("columns", "flags", "target"),
    [
        ({"label": [1, 2, 3]}, [], (3,)),
        ({}, ["--allow-mixed-shapes"], None),
        ({"name": "abc"}, ["--label-column=name:string"], (3,)),
        ({"name": "abc", "label": [1, 2, 3]}, ["--label-column=label,name:class"], (3,)),
        ({"label": [1, 2, 3], "split": ["left"] * 3}, [], (3,)),
        (
            {"mask": ["m0.nii", "m1.nii", "m2.nii"]},
            ["--mask-column=mask", "--allow-mixed-shapes"],
            (3, 6, 5, 5),
        ),
    ],
    ids=["numbers", "mixed shapes", "strings", "several labels", "other split", "masks"],
)
def test_it_runs(
    columns: dict[str, list[object]],
    flags: list[str],
    target: tuple[int, ...] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "it's here"
    for number in range(3):
        shape = (6, 5, 4 + number % 2) if "--allow-mixed-shapes" in flags else (6, 5, 4)
        write_image(folder / f"{number}.nii", brain(shape, number))
        write_image(folder / f"m{number}.nii", np.ones(shape, np.uint8))
    rows = [{"path": f"{i}.nii", **{name: cells[i] for name, cells in columns.items()}} for i in range(3)]
    manifest = write_manifest(folder / "m.tsv", rows)
    assert cli.main(["build", str(manifest), str(folder / "out"), "--quiet", "--workers=1", *flags]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("read it"))
    names: dict[str, object] = {}
    exec(line.removeprefix("read it").strip(), names)
    (batch,) = names["dataset"]  # type: ignore[attr-defined]
    x, y = batch if isinstance(batch, tuple) else (batch, None)
    assert x.shape[0] == 3
    assert x.shape[1:3] == (6, 5)
    assert target is None if y is None else tuple(y.shape)[: len(target or ())] == target
