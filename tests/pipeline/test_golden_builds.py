"""Builds write the bytes that earlier versions of this package wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.make_builds import BUILDS, GOLDEN, digests, write_inputs


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("what", BUILDS)
def test_shards_and_indexes_are_those_of_earlier_versions(what: str, manifest: Path, tmp_path: Path) -> None:
    assert digests(manifest, tmp_path / "out", BUILDS[what]) == json.loads(GOLDEN.read_text())[what]
