"""What reaches a terminal, and what a stream that cannot be written does to an exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.support import logs
from beam_nifti.support.terminal import Screen, UnwritableError, guarded_streams
from tests.datasets import manifest_of
from tests.images import write_image

TEXTS = st.text(st.characters(codec=None))

HOSTILE = "\x1b]0;owned\x07\x9b2J\r\u202e\u2066\x7f\udcff\n"


def is_harmless(text: str) -> bool:
    """Whether a text, but for its line breaks, moves no cursor and turns no line."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    characters = set(text) - {"\n", "\t"}
    return not characters & {"\u200e", "\u200f", "\u061c"} and not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in turning
        for c in characters
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.attempts = number, 0

    def write(self, _: str) -> int:
        self.attempts += 1
        raise OSError(self.number, "it is broken")


@given(TEXTS)
def test_a_screen_shows_nothing_that_controls_a_terminal_and_keeps_lines(text: str) -> None:
    stream = io.StringIO()
    assert Screen(stream, is_strict=True).write(text) == len(text)
    shown = stream.getvalue()
    assert is_harmless(shown)
    assert [shown.count(c) for c in "\n\t"] == [text.count(c) for c in "\n\t"]


@given(TEXTS)
def test_a_stream_that_lacks_characters_gets_them_escaped(text: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", errors="strict", newline="")
    screen = Screen(stream, is_strict=True)
    screen.write(text)
    screen.flush()
    assert raw.getvalue().isascii()


@pytest.mark.parametrize("make", [Terminal, io.StringIO])
def test_only_a_terminal_gets_a_result_escaped(make: type[io.StringIO]) -> None:
    stream = make()
    Screen(stream, is_strict=True).write_result("a\x1bb\n")
    assert stream.getvalue() == ("a\\x1bb\n" if make is Terminal else "a\x1bb\n")


@pytest.mark.parametrize("is_strict", [True, False])
def test_an_error_of_writing_is_raised_once_or_never(is_strict: bool) -> None:
    stream = Broken(errno.ENOSPC)
    screen = Screen(stream, is_strict=is_strict)
    if is_strict:
        with pytest.raises(UnwritableError, match="standard output: it is broken"):
            screen.write("x")
    for _ in range(3):
        screen.write("x")
        screen.flush()
    assert stream.attempts == 1


def hostile_row(folder: Path) -> dict[str, str]:
    name = f"a{HOSTILE.replace(chr(0xDCFF), '')}b"
    write_image(folder / f"{name}.nii")
    return {"participant_id": name, "path": f"{name}.nii", "label": "1", f"column {name}": name}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A manifest all of whose names hold escape sequences."""
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(hostile_row(tmp_path)))
    return path


def test_no_command_prints_a_control_character(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads(hostile.read_text())
    record, output = row["participant_id"], f"{tmp_path}/out"

    def said(*command: object, fails: bool = False) -> str:
        status, (out, err) = cli.main([*map(str, command)]), capsys.readouterr()
        assert (status != cli.SUCCESS) is fails, (out, err)
        assert is_harmless(out + err), (out, err)
        return out + err

    said("check", hostile, "--json")
    assert "1 in" in said("check", hostile)
    said("build", hostile, output)
    for flags in ([], ["--json"], [f"--record={record}"], [f"--record={record}", "--json"]):
        assert "b" in said("inspect", output, *flags)
    said("verify", output)
    said("diff", output, output)
    assert "\\x1b" in said("extract", output, f"--id={record}", f"--out={tmp_path}/\x1b.nii")
    for command in (
        ["extract", output, f"--id={record}x"],
        ["build", hostile, output, "--label-column=\x1b[2J"],
        ["build", hostile, output, "--\x1b[2J=3"],
        ["\x1b[2J"],
        ["verify", f"{output}\x1b[2J"],
    ):
        assert "\\x1b" in said(*command, fails=True)
    (tmp_path / row["path"]).write_bytes(b"no image")
    assert "\\x1b" in said("check", hostile, fails=True)
    assert "\\x1b" in said("build", hostile, f"{output}2", fails=True)
    assert "\\x1b" in said("verify", output, "--deep=all", "--manifest", manifest_of(output), fails=True)


def test_no_result_of_a_call_holds_a_control_character(hostile: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    bn.build(hostile, output, progress=False)
    (shard,) = output.glob("*.tfrecord.gz")
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 255
    shard.write_bytes(damaged)
    result = bn.verify(output)
    assert not result
    with pytest.raises(bn.DatasetError) as refused:
        bn.extract(output, json.loads(hostile.read_text())["participant_id"])
    for text in (str(result), *result.problems, str(refused.value)):
        assert is_harmless(text)


def test_a_line_break_in_a_name_begins_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_streams(), logs.on_stderr("text"):
        logs.LOGGER.error("%s: no such file\n  of ours", "a\nbeam-nifti: error: forged")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["beam-nifti: error: a", "  beam-nifti: error: forged: no such file", "  of ours"]


def test_the_traceback_of_an_unforeseen_error_is_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr("beam_nifti.cli.dataset_commands.inspect", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["inspect", "out"])
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert is_harmless(said)


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = command.replace("beam-nifti", f"{sys.executable} -m beam_nifti")
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_a_summary_that_cannot_be_printed_changes_no_exit_code(
    cohort: Path, run: Callable[..., str], tmp_path: Path, streams: str
) -> None:
    run("build", cohort, tmp_path / "out")
    done = shell(f"beam-nifti verify out {streams}", tmp_path)
    assert done.returncode == cli.SUCCESS
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("manifest glob a.nii >&-", cli.USAGE),
        ("manifest glob a.nii >/dev/full", cli.TEMPORARY),
        ("--version >/dev/full", cli.TEMPORARY),
    ],
)
def test_a_result_that_cannot_be_printed_is_an_error(tmp_path: Path, command: str, code: int) -> None:
    write_image(tmp_path / "a.nii")
    done = shell(f"beam-nifti {command}", tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith(b"beam-nifti: error: standard output: ")
    assert done.stderr.count(b"\n") == 1


def test_a_manifest_is_the_same_in_an_ascii_locale(tmp_path: Path) -> None:
    write_image(tmp_path / "Jürgen.nii")
    done = shell("beam-nifti manifest glob '*.nii'", tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.stdout.decode() == f"path\n{tmp_path}/Jürgen.nii\n"
