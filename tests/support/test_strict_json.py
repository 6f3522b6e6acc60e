"""Every JSON that is written can be read by parsers that know no NaN, as the standard has none."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.support.strict_json import dump_json
from beam_nifti.volume import geometry
from tests.images import brain, write_image, write_manifest

SOURCES = sorted((Path(__file__).parents[2] / "beam_nifti").rglob("*.py"))


def strict(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats()
NESTED = st.recursive(
    SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(), v) | st.tuples(v, v), max_leaves=8
)


@settings(max_examples=30)
@given(NESTED)
def test_what_is_finite_stays_and_the_rest_is_null(value: Any) -> None:
    by_python = json.loads(json.dumps(value), parse_constant=lambda _: None)
    assert strict(dump_json(value)) == by_python


def test_numpy_numbers_are_numbers() -> None:
    assert dump_json([np.float64("inf"), np.float64(2), (float("nan"),)]) == "[null, 2.0, [null]]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_all_json_is_written_by_one_function(path: Path) -> None:
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert path.stem == "strict_json" or not {"json.dumps", "json.dump"} & set(calls)


def test_every_command_writes_it(
    tmp_path: Path,
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a dataset whose voxel sizes are NaN, as earlier versions stored them."""
    for i in range(3):
        write_image(tmp_path / f"{i}.nii", brain(seed=i) if i else np.ones((6, 5, 4), np.int16))
    rows = [{"participant_id": f"sub-{i}", "path": f"{i}.nii", "label": i or "nan"} for i in range(3)]
    manifest, out = write_manifest(tmp_path / "m.tsv", rows), tmp_path / "out"
    monkeypatch.setattr(geometry, "agreed_zooms", lambda affine, stated: np.full(3, np.nan))
    options = ("--missing-label=nan", "--max-bad-fraction=0.5", f"--summary-json={tmp_path}/run.json")
    run("build", manifest, out, *options, "--log-format=json")
    run("build", manifest, tmp_path / "other", *options, "--rescale=percentile:1,99")
    monkeypatch.undo()
    assert cli.main(["check", str(manifest), "--json", "--quiet", "--missing-label=nan"]) == 0
    assert strict(capsys.readouterr().out)
    assert strict(run("inspect", out, "--json"))
    assert strict(run("inspect", out, "--json", "--record=sub-1"))["zooms"] == [None] * 3
    assert cli.main(["diff", str(out), str(tmp_path / "other"), "--json"]) == 1
    assert strict(capsys.readouterr().out)
    assert cli.main(["card", str(out)]) == 0
    written = [path for path in tmp_path.rglob("*.json*") if path.is_file()]
    assert {path.name for path in written} >= {
        "dataset_info.json",
        "failures.jsonl",
        "run.json",
        "croissant.json",
    }
    for path in written:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            assert strict(text)
