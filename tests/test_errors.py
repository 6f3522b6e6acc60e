"""One root, and messages that survive the way from a worker to the launcher."""

from __future__ import annotations

import pickle

import pytest

from beam_nifti import errors
from beam_nifti.errors import BeamNiftiError, ManifestError, VolumeError


def test_every_error_has_the_one_root() -> None:
    classes = [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
    assert len(classes) > 5
    assert all(issubclass(c, BeamNiftiError) for c in classes)


@pytest.mark.parametrize(
    "error",
    [ManifestError("m.csv", ["row 1: empty path", "row 3: empty path"], "of no use"), VolumeError("a")],
)
def test_errors_are_the_same_after_pickling(error: BeamNiftiError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_manifest_error_prints_a_line_a_problem() -> None:
    error = ManifestError("m.csv", ["row 1: empty path", "row 3: empty path"])
    assert str(error).splitlines() == [
        "m.csv: not usable as a manifest",
        "  row 1: empty path",
        "  row 3: empty path",
    ]
