"""Where ids are anonymous, nothing that a command writes or prints tells whose image it was."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.errors import VolumeError
from beam_nifti.manifest.redaction import describe, redact, redacting
from beam_nifti.storage import object_store, stores
from beam_nifti.storage import paths as storage
from tests.datasets import decompressed_files, failures_of
from tests.images import brain, row_of, write_image, write_manifest
from tests.web_server import Redirecting, serve

MARK = "zqx"
"""A part of every name, path and text of the cohort below, and of nothing else."""
HIDDEN = f"{MARK}Home"
"""The folder of the manifest, which commands may print, as it was given to them, and OUTPUT must not have."""

# What texts lose

_LETTERS = st.characters(
    codec="utf-8", exclude_characters="/\\\0%\n\r", exclude_categories=("Cs", "Cc", "Zs")
)
_NAMES = st.text(_LETTERS, min_size=1, max_size=8).map(lambda text: f"{MARK}-{text}1")
_SPELL: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower, quote, repr, ascii, json.dumps)


@settings(max_examples=40)
@given(st.lists(_NAMES, min_size=1, max_size=4), st.sampled_from([".nii.gz", ".img", ""]), st.data())
def test_no_spelling_of_a_path_is_left(names: list[str], ending: str, data: st.DataObject) -> None:
    path = "/".join(names) + ending
    row = row_of(path, pseudonyms=("0123abcd",))
    folder = data.draw(st.sampled_from(["", f"/data/{MARK}-study", f"s3://bucket/{MARK}-study"]))
    whole = f"{folder}/{path}" if folder else path
    other = whole.removesuffix(ending) + ".hdr"
    said = data.draw(st.sampled_from([path, whole, other, whole.rpartition("/")[0], *names]))
    spelled = data.draw(st.sampled_from(_SPELL))(said)
    assume(said.upper().lower() == said.lower())  # not so for ß and the like
    assert MARK not in redact(f"{spelled}: truncated: see ({spelled}) twice", row, folder).lower()


def test_the_pseudonym_stands_for_the_path_and_the_rest_stays() -> None:
    row = row_of("scans of/Ada/first.nii", other_files=("masks/2.nii",), pseudonyms=("aa11", "bb22"))
    said = "scans of/Ada/first.nii: the images and masks of (2, 3) voxels; first of masks/2.nii"
    assert redact(said, row, "/study") == "aa11: the images and masks of (2, 3) voxels; first of bb22"
    assert redact("/study/scans of/Ada/first.mat, /study/scans%20of/Ada", row, "/study") == "aa11.mat, …"
    absolute = row_of("/scans/Ada/1.nii", pseudonyms=("aa11",))
    assert (
        redact("/scans/Ada/1.nii: 1 of 2 files in /scans/Ada", absolute, "/study")
        == "aa11: 1 of 2 files in …"
    )
    named = row_of("scans of/Ada/first.nii")
    assert redact(said, named, "/study") == said


def test_every_letter_is_found_that_ignoring_case_finds() -> None:
    row = row_of("a.nii", pseudonyms=("0123abcd",), names=(("KASIM-ſ9", "p1"),))
    for said in ("kasim-s9", "kasım-S9", "\u212aasİm-ſ9"):
        assert redact(f"of {said}.", row, "/study") == "of …."


def test_a_path_of_many_folders_is_hidden_in_a_moment() -> None:
    path = "é/" * 100 + "z" * 3000
    start = time.process_time()
    assert (
        redact(f"{path}: not found", row_of(path, pseudonyms=("0123abcd",)), "/study")
        == "0123abcd: not found"
    )
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("of mueller, session Base.", "of p1, session s1."),
        ("MUELLER%20base,scan%20Mueller", "p1%20s1,scan%20p1"),
        ("image_Jos%C3%A9-1.x", "image_i1.x"),
        ("muellers database", "muellers database"),
        ("1 of 7 images", "1 of 7 images"),
    ],
)
def test_ids_are_replaced_where_they_are_whole_words(said: str, shown: str) -> None:
    names = (("Mueller", "p1"), ("base", "s1"), ("José-1", "i1"), ("1", "x1"), ("", ""))
    row = row_of("a.nii", pseudonyms=("0123abcd",), names=names)
    assert redact(said, row, "/study") == shown


def test_of_foreign_errors_only_class_and_line_are_kept() -> None:
    try:
        int(MARK)
    except ValueError as e:
        error = e
    assert describe(error, is_anonymous=False).endswith(f"{MARK!r}")
    told = describe(error, is_anonymous=True)
    assert told.startswith("ValueError at test_redaction.py:")
    assert told.endswith(" in test_of_foreign_errors_only_class_and_line_are_kept")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (VolumeError(f"{MARK}1.nii: truncated"), VolumeError, "0123abcd: truncated"),
        (
            OSError(errno.ENOSPC, f"full {MARK}", f"/d/{MARK}1.nii"),
            OSError,
            "No space left on device, in row 1",
        ),
        (
            TimeoutError(errno.ETIMEDOUT, f"failed (HTTP 503 SlowDown), {MARK}"),
            TimeoutError,
            r"timed out \(HTTP 503 SlowDown\), in row 1",
        ),
        (MemoryError(MARK), MemoryError, "in row 1 of the manifest"),
        (TimeoutError(MARK), TimeoutError, "TimeoutError at test_redaction.py:.*, in row 1"),
        (KeyError(MARK), RuntimeError, "KeyError at test_redaction.py:.*, in row 1 of the manifest"),
    ],
)
def test_errors_keep_their_kind_and_lose_their_names(error: Exception, kind: type, said: str) -> None:
    with (
        pytest.raises(kind, match=said) as raised,
        redacting(row_of(f"{MARK}1.nii", pseudonyms=("0123abcd",)), "/d"),
    ):
        raise error from ValueError(MARK)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    assert MARK not in str(raised.value)
    with pytest.raises(type(error)) as same, redacting(row_of(f"{MARK}1.nii"), "/d"):
        raise error
    assert same.value is error


def test_what_has_to_be_installed_for_a_store_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(_: object) -> None:
        raise ImportError("No module named 'boto3'")

    monkeypatch.setitem(stores._STORES, "s3", make)
    monkeypatch.setattr(stores, "_stores", {})
    row = row_of(f"s3://{MARK}/{MARK}1.nii", pseudonyms=("0123abcd",))
    with pytest.raises(OSError, match="in row 1 of the manifest") as raised, redacting(row, "/d"):
        storage.stat(row.path)
    assert str(raised.value).startswith(
        "0123abcd: s3:// is not supported here (No module named 'boto3'); install beam-nifti[aws]"
    )


# What commands tell


def told_in(folder: Path) -> set[str]:
    """The files that hold the mark, or are named by it."""
    files = decompressed_files(folder).items()
    return {name for name, data in files if MARK.encode() in name.encode().lower() + data.lower()}


class Study:
    """A cohort all of whose names have the mark."""

    def __init__(self, folder: Path) -> None:
        self.home, self.key, self.output = folder / HIDDEN, folder / "key", folder / "out"
        self.key.write_bytes(b"not so random, but long enough")
        self.rows = list[dict[str, str]]()

    def add(self, name: str, *, mask: bool = True, **header: object) -> Path:
        """Add a row and its image."""
        number = len(self.rows)
        path = f"{MARK} group/{MARK.upper()}SUB-{number}/{name}-{MARK}é.nii.gz"
        written = write_image(
            self.home / path,
            brain(seed=number),
            fields={"descrip": f"{MARK} descrip", "aux_file": f"{MARK} aux", "db_name": MARK, **header},
        )
        mask_path = f"{MARK} group/{MARK}_mask{number}.nii"
        write_image(self.home / mask_path, (brain(seed=number) > 600).astype(np.uint8))
        if not mask:
            (self.home / mask_path).unlink()
        ids = {"participant_id": f"{MARK}SUB-{number}", "session_id": f"{MARK}ses"}
        self.rows.append({**ids, "path": path, "mask": mask_path, "label": str(number)})
        return written

    def command(self, name: str, *flags: str) -> list[str]:
        manifest = str(write_manifest(self.home / "manifest.tsv", self.rows))
        where = [manifest, str(self.output)] if name == "build" else [manifest]
        options = [f"--anonymous-ids={self.key}", "--mask-column=mask", "--quiet", *flags]
        return [name, *where, *options]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


Told = Callable[[], str]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Told:
    """What was printed since the last call, without the path of the manifest, which the command was given."""

    def read() -> str:
        out, err = capfd.readouterr()
        return (out + err).replace(f"{tmp_path}/{HIDDEN}/manifest.tsv", "MANIFEST")

    return read


def damage(study: Study) -> int:
    """Add images that fail at every step; how many."""
    study.add("junk").write_bytes(b"no image")
    study.add("gone").unlink()
    cut = study.add("cut")
    cut.write_bytes(cut.read_bytes()[:-30])
    folder = study.add("folder")
    folder.unlink()
    folder.mkdir()
    loop = study.add("loop")
    loop.unlink()
    loop.symlink_to(loop.name)
    write_image(study.add("wide"), brain((7, 5, 4)))
    write_image(study.add("flat"), np.zeros((6, 5, 4), np.int16))
    write_image(study.add("holed"), np.full((6, 5, 4), np.nan, np.float32))
    study.add("mask", mask=False)
    for name in ("raise", "unparsable", "absent"):
        study.add(name)
    study.rows.append(
        {**study.rows[-1], "participant_id": f"{MARK}half", "path": f"{MARK} group/{MARK}half.img"}
    )
    (study.home / study.rows[-1]["path"]).write_bytes(bytes(400))
    return 13


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_failure_tells_a_name(study: Study, told: Told, tmp_path: Path, log_format: str) -> None:
    for name in ("a", "b", "c"):
        study.add(name)
    num_failed = damage(study)
    files = [f"--summary-json={tmp_path}/told/summary.json", f"--metrics-file={tmp_path}/told/m.prom"]
    (tmp_path / "told").mkdir()
    function = "--preprocess=tests.user_functions:fail_as_named"
    command = study.command("build", function, f"--log-format={log_format}", *files)
    assert cli.main(command) == cli.FAILED
    said = told()
    assert f"{num_failed} of {num_failed + 3} volumes failed" in said
    assert MARK not in said.lower()
    assert told_in(study.output) == set()
    summary = json.loads((tmp_path / "told/summary.json").read_text())
    assert summary.pop("manifest") == f"{study.home}/manifest.tsv"
    assert MARK not in json.dumps(summary).lower()
    assert MARK not in (tmp_path / "told/m.prom").read_text().lower()
    if log_format == "json":
        return
    assert cli.main([*command, "--max-bad-fraction=0.9"]) == cli.SUCCESS
    assert told_in(study.output) == set()
    lines = failures_of(study.output)
    assert [line["row"] for line in lines] == list(range(4, num_failed + 4))
    messages = {line["row"]: line["message"] for line in lines}
    assert messages[4].startswith(f"{lines[0]['path']}: a text file; copy or download")
    assert "ValueError at user_functions.py:" in messages[13]
    assert f"{lines[8]['mask']}: cannot be read: No such file" in messages[12]
    verify = ["verify", str(study.output), "--manifest", command[1], f"--anonymous-ids={study.key}"]
    verify.append(function)
    assert cli.main([*verify, "--deep=all"]) == cli.SUCCESS
    shutil.move(study.home / study.rows[0]["path"], study.home / study.rows[1]["path"])
    (study.home / study.rows[2]["path"]).write_bytes(b"no image")
    assert cli.main([*verify, "--deep=all"]) == cli.FAILED
    assert cli.main(["inspect", str(study.output)]) == cli.SUCCESS
    said = told()
    assert said.count("cannot be rebuilt: ") == 2
    assert MARK not in said.lower()


@pytest.mark.parametrize(
    ("name", "log_format"), [("memory", "text"), ("full", "text"), ("exit", "text"), ("late", "json")]
)
def test_no_build_that_stops_tells_a_name(study: Study, told: Told, name: str, log_format: str) -> None:
    study.add("first")
    study.add(name)
    flags = ["--preprocess=tests.user_functions:fail_as_named", f"--log-format={log_format}"]
    assert cli.main(study.command("build", *flags)) not in (cli.SUCCESS, cli.FAILED)
    said = told()
    assert "the build stopped: " in said
    assert "row 2 of the manifest" in said or "called sys.exit()" in said
    assert MARK not in said.lower()
    assert told_in(study.output) == set()


def test_a_cohort_without_an_image_that_can_be_used_tells_no_name(study: Study, told: Told) -> None:
    damage(study)
    study.rows = [*study.rows[:2], *study.rows[3:5]]  # those without a header
    assert cli.main(study.command("build")) == cli.USAGE
    said = told()
    assert "none of the first images can be used" in said
    assert MARK not in said.lower()
    study.rows = study.rows[:1]
    study.add("full")
    study.rows = study.rows[1:]
    flags = ["--preprocess=tests.user_functions:fail_as_named", "--crop-foreground=nonzero"]
    assert cli.main(study.command("build", *flags)) not in (cli.SUCCESS, cli.FAILED)
    said = told()
    assert "No space left on device" in said
    assert MARK not in said.lower()


class _Telling(Redirecting):
    """Names in every answer what it was asked for."""

    def end_headers(self) -> None:
        self.send_header("ETag", f'"{self.path}"')
        super().end_headers()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_server_tells_a_name(
    study: Study, told: Told, monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(object_store, "_told", {})
    for name in ("first", "second"):
        study.add(name)
    for path in (f"to/file:///{MARK}2", "to/"):
        study.rows.append({**study.rows[0], "participant_id": f"{MARK}SUB-{len(study.rows)}", "path": path})
    asked = set[str]()
    with serve(study.home, _Telling) as server:
        host = server.url.removeprefix("http://")

        def fail_first(_: str, path: str) -> str:
            is_first = path not in asked
            asked.add(path)
            return "503" if is_first else ""

        server.choose = fail_first
        for row in study.rows:
            row["path"] = f"{server.url}/{quote(row['path'])}"
        flags = ["--max-bad-fraction=0.5", f"--log-format={log_format}"]
        assert cli.main(study.command("build", *flags)) == cli.SUCCESS
        said = told()
        asked.clear()
        assert cli.main(study.command("check", f"--log-format={log_format}")) == cli.FAILED
        said += told()
    assert "a server of an image fails (HTTP 503); trying again" in said
    assert "redirects without end" in said
    assert host not in said
    assert MARK not in said.lower()
    assert told_in(study.output) == set()
    assert not any(host.encode() in data for data in decompressed_files(study.output).values())


def test_a_check_tells_no_name(study: Study, told: Told, tmp_path: Path) -> None:
    study.add("a")
    shutil.copy(study.add("b"), study.add("copy"))
    study.rows[2]["mask"] = study.rows[1]["mask"]
    damage(study)
    assert cli.main(study.command("check", f"--out={tmp_path}/check.json")) == cli.FAILED
    said = told()
    assert "MANIFEST" in said
    assert MARK not in said.lower()
    report = json.loads((tmp_path / "check.json").read_text())
    assert report.pop("manifest") == f"{study.home}/manifest.tsv"
    assert MARK not in json.dumps(report).lower()
    assert report["num_bad"] > 5
    assert len(report["twins"]) == 1
