"""One root, and messages that survive the way from a worker to the launcher."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from beam_nifti import errors
from beam_nifti.errors import (
    BeamNiftiError,
    BuildSummary,
    DatasetError,
    EngineError,
    FailedVolume,
    ManifestError,
    TooManyFailures,
    VolumeError,
)

FAILED = FailedVolume(1, "sub-01", "/data/a.nii", "LoadVolume", "VolumeError", "no such file")


def test_every_error_has_the_one_root() -> None:
    own = [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
    classes = [e for e in own if issubclass(e, BaseException)]
    assert len(classes) > 5
    assert all(issubclass(c, BeamNiftiError) for c in classes)


@pytest.mark.parametrize(
    "error",
    [
        ManifestError("m.csv", ["row 1: empty path", "row 3: empty path"], "of no use"),
        VolumeError("a"),
        TooManyFailures("1 of 2 volumes failed", BuildSummary(1, 1, 10, 1, False), [FAILED]),
        EngineError("the build stopped", "no workers", 75, True),
    ],
)
def test_errors_are_the_same_after_pickling(error: BeamNiftiError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args


@pytest.mark.parametrize(
    "error",
    [
        DatasetError("a\x1b[2J\x9b\u202e\udcff\tb\nc"),
        ManifestError("a\x1b", ["b\r"], "c\x07"),
        TooManyFailures("a\x1b", BuildSummary(1, 1, 10, 1, False), [FAILED]),
        EngineError("a\x1b", "b\r", 75, True),
    ],
)
def test_errors_show_control_characters_as_python_writes_them(error: BeamNiftiError) -> None:
    text = str(error)
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert "\\x1b" in text


def test_errors_are_reworded_in_all_their_texts() -> None:
    error = ManifestError("m.csv", ["choose one with --id-column", "--clip"])
    error.reword(lambda text: text.replace("--", ""))
    assert error.problems == ("choose one with id-column", "clip")
    assert str(error).splitlines()[1:] == ["  choose one with id-column", "  clip"]
    failed = TooManyFailures("more than --max-bad-fraction", BuildSummary(1, 1, 10, 1, False), [FAILED])
    failed.reword(str.upper)
    assert str(failed) == "MORE THAN --MAX-BAD-FRACTION"
    assert failed.failures == failed.args[2] == (replace(FAILED, message=FAILED.message.upper()),)
    assert pickle.loads(pickle.dumps(failed)).failures == failed.failures


def test_manifest_error_prints_a_line_a_problem() -> None:
    error = ManifestError("m.csv", ["row 1: empty path", "row 3: empty path"])
    assert str(error).splitlines() == [
        "m.csv: not usable as a manifest",
        "  row 1: empty path",
        "  row 3: empty path",
    ]
