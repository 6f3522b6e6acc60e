"""Builds write the bytes that earlier versions of this package wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.make_builds import (
    BUILDS,
    CONTENT,
    GOLDEN,
    LARGE,
    LARGE_SHAPE,
    content_digests,
    digests,
    write_inputs,
)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Of large images and of others."""
    shapes = {True: LARGE_SHAPE, False: None}
    return {large: write_inputs(tmp_path_factory.mktemp("images"), shape) for large, shape in shapes.items()}


@pytest.mark.parametrize("what", BUILDS)
def test_shards_and_indexes_are_those_of_earlier_versions(
    what: str, manifests: dict[bool, Path], tmp_path: Path
) -> None:
    is_large = what.startswith(LARGE)
    found = digests(manifests[is_large], tmp_path / "out", BUILDS[what])
    assert found == json.loads(GOLDEN.read_text())[what]
    if is_large:
        assert content_digests(tmp_path / "out") == json.loads(CONTENT.read_text())[what]
