"""Datasets without names: nothing in OUTPUT tells them, and resuming, appending and checking work on."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import BuildConfig, Columns, Splitting
from beam_nifti.errors import ManifestError, OutputError, UsageError
from beam_nifti.inspection.description import describe_dataset, describe_record, format_description
from beam_nifti.inspection.extract import read_volume
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.manifest import Manifest, read_manifest
from beam_nifti.manifest.pseudonyms import Pseudonyms, read_pseudonyms
from beam_nifti.record.dataset_info import read_info
from tests.build_helpers import build, build_apart
from tests.datasets import decompressed_files, failures_of, index_rows
from tests.images import brain, write_image, write_manifest

SECRET = b"not so random, but long enough"
NAMES = ("Ada", "Grace", "Emmy", "Lise")
SESSIONS = ("first", "second")


def expected(name: str, kind: str) -> str:
    """What docs/format.md says."""
    key = hashlib.sha256(SECRET).digest()
    return hashlib.blake2b(name.encode(), key=key, person=kind.encode(), digest_size=16).hexdigest()


def write_study(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Two sessions of everybody; the manifest. Names are in paths, too, and sites are an extra column."""
    rows = []
    for name in names:
        for session in SESSIONS:
            path = f"scans of/{name}/{session}.nii.gz"
            if not (folder / path).exists():
                write_image(folder / path, brain(seed=len(rows)))
            ids = {"participant_id": name, "session_id": session}
            rows.append({**ids, "path": path, "label": len(rows), "site": "Jena"})
    return write_manifest(folder / "manifest.tsv", rows)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_bytes(SECRET)
    return str(path)


def names_in(output: Path) -> set[tuple[str, str]]:
    """Files and the names of persons, sessions and folders that they hold."""
    told = (*NAMES, *SESSIONS, "scans of", "scans%20of")
    files = decompressed_files(output).items()
    return {(file, name) for file, data in files for name in told if name.encode() in data}


def test_nothing_of_the_output_tells_a_name(manifest: Path, key: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (manifest.parent / "scans of/Emmy/second.nii.gz").write_bytes(b"no image")
    build(manifest, output, anonymous_ids=key, max_bad_fraction=0.5)
    assert names_in(output) == set()
    assert SECRET not in b"".join(decompressed_files(output).values())
    (line,) = failures_of(output)
    assert line["row"] == 6
    assert line["path"] == expected("scans of/Emmy/second.nii.gz", "path")
    assert line["message"].startswith(f"{line['path']}: ")
    for cells, row in zip(index_rows(output), [1, 2, 3, 4, 5, 7, 8], strict=True):
        name, session = NAMES[(row - 1) // 2], SESSIONS[(row - 1) % 2]
        assert cells["row"] == row
        assert cells["participant_id"] == expected(name, "participant_id")
        assert cells["session_id"] == expected(session, "session_id")
        assert cells["example_id"] == f"{cells['participant_id']}_{cells['session_id']}"
        assert cells["source"] == expected(f"scans of/{name}/{session}.nii.gz", "path")
        assert cells["site"] == "Jena"
    assert "(8 rows, anonymous ids)" in format_description(describe_dataset(str(output)))
    some = index_rows(output)[3]
    assert describe_record(str(output), some["example_id"])["source"] == some["source"]


@pytest.mark.parametrize("columns", [Columns(), Columns(id="name"), Columns(id="path")])
def test_every_kind_of_id_is_hashed(tmp_path: Path, key: str, columns: Columns) -> None:
    path = write_manifest(tmp_path / "m.csv", [{"path": "Ada.nii", "name": "Ada", "age": 3}])
    found = read_manifest(str(path), columns, pseudonyms=read_pseudonyms(key))
    (row,) = found.rows([0])
    assert row.example_id == (expected("Ada", "id") if columns.id == "name" else expected("Ada.nii", "path"))
    assert (row.path, row.source) == ("Ada.nii", expected("Ada.nii", "path"))
    assert row.extras == (("3",) if columns.id == "name" else ("Ada", "3"))


def test_equal_names_of_two_kinds_have_nothing_in_common() -> None:
    names = Pseudonyms(SECRET)
    assert len({names.of("1", kind) for kind in ("participant_id", "session_id", "path", "id")}) == 4
    assert names.of("", "session_id") == ""
    assert names.of("1", "id") != Pseudonyms(SECRET + b"!").of("1", "id")
    column = pa.chunked_array([["a", ""], ["b", "a"]])
    assert names.of_column(column, "id").to_pylist() == [names.of(n, "id") for n in ("a", "", "b", "a")]


def test_neither_order_nor_splits_follow_from_the_names(tmp_path: Path, key: str) -> None:
    rows = [{"participant_id": f"p{i}", "path": f"{i}.nii"} for i in range(200)]
    path = str(write_manifest(tmp_path / "m.csv", rows))
    splitting = Splitting({"train": 0.5, "test": 0.5})

    def splits(pseudonyms: Pseudonyms | None) -> list[str]:
        return list(read_manifest(path, splitting=splitting, pseudonyms=pseudonyms).splits.to_pylist())

    drawn = [splits(None), splits(read_pseudonyms(key)), splits(Pseudonyms(b"another key"))]
    same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(drawn)]
    assert all(60 < count < 140 for count in same)
    assert splits(read_pseudonyms(key)) == drawn[1]


def test_the_digest_says_nothing_without_the_key(manifest: Path, key: str) -> None:
    digests = [
        read_manifest(str(manifest), pseudonyms=p).digest()
        for p in (None, Pseudonyms(SECRET + b"!"), read_pseudonyms(key), read_pseudonyms(key))
    ]
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]


def test_the_key_does_not_travel(manifest: Path, key: str, tmp_path: Path) -> None:
    from beam_nifti.pipeline.build import plan_build

    with pytest.raises(TypeError, match="cannot be sent to workers"):
        pickle.dumps(read_pseudonyms(key))
    plan, _ = plan_build(BuildConfig(str(manifest), str(tmp_path / "out"), anonymous_ids=key))
    packed = pickle.dumps(plan)
    assert key.encode() in packed
    assert SECRET not in packed
    assert hashlib.sha256(SECRET).digest() not in packed


@pytest.mark.parametrize("seed", [None, 3])
def test_it_resumes_and_appends(tmp_path: Path, key: str, seed: int | None) -> None:
    output = tmp_path / "out"
    few, options = write_study(tmp_path / "study", NAMES[:3]), {"anonymous_ids": key, "shuffle_seed": seed}
    assert len(build(few, output, **options).read) > 0
    assert build(few, output, **options).counters["volumes-skipped"] == 6
    (tmp_path / "study/scans of/Ada/first.nii.gz").touch()
    again = build(few, output, **options)
    assert again.counters["volumes-loaded"] == 1
    assert build(write_study(tmp_path / "study"), output, **options).summary.num_written == 8
    assert names_in(output) == set()
    report = verify_dataset(str(output), manifest=str(few), anonymous_ids=key, deep=ALL)
    assert (report.problems, report.num_deep) == ((), 8)
    write_study(tmp_path / "study", NAMES[:3])
    (problem,) = verify_dataset(str(output), manifest=str(few), anonymous_ids=key).problems
    assert f"2 examples are not in the manifest: {expected('Lise', 'participant_id')}_" in problem


def test_an_unfinished_build_with_names_leaves_none(manifest: Path, key: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (manifest.parent / "scans of/Lise/second.nii.gz").write_bytes(b"no image")
    ended = build_apart(manifest, output)
    assert ended.result["error"] == "TooManyFailures"
    assert names_in(output) != set()
    with pytest.raises(OutputError, match="its ids are not anonymous, but --anonymous-ids was given"):
        build(manifest, output, anonymous_ids=key, max_bad_fraction=0.5)
    build(manifest, output, anonymous_ids=key, max_bad_fraction=0.5, overwrite=True)
    assert names_in(output) == set()


@pytest.mark.parametrize("has_key", [True, False])
def test_a_list_of_failures_without_paths_is_no_manifest(
    manifest: Path, key: str, tmp_path: Path, *, has_key: bool
) -> None:
    (manifest.parent / "scans of/Lise/second.nii.gz").write_bytes(b"no image")
    build(manifest, tmp_path / "out", anonymous_ids=key, max_bad_fraction=0.5)
    given = {"anonymous_ids": key} if has_key else {}
    with pytest.raises(
        ManifestError, match="its paths are pseudonyms, and each 'row' is that of the manifest "
    ):
        build(tmp_path / "out/failures.jsonl", tmp_path / "retry", **given)
    assert not (tmp_path / "retry").exists()


def test_another_key_is_another_making(manifest: Path, key: str, tmp_path: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "other"
    other.write_bytes(SECRET[::-1])
    build(manifest, output, anonymous_ids=key)
    before = decompressed_files(output)
    for now, reason in ((str(other), "another key was given"), (None, "no key was given")):
        with pytest.raises(OutputError, match=f"its ids are anonymous, but {reason}"):
            build(manifest, output, anonymous_ids=now)
    assert decompressed_files(output) == before
    build(manifest, output, anonymous_ids=str(other), overwrite=True)
    assert index_rows(output)[0]["source"] == Pseudonyms(SECRET[::-1]).of("scans of/Ada/first.nii.gz", "path")
    build(manifest, tmp_path / "named")
    assert "key_check" not in read_info(str(tmp_path / "named")).manifest
    with pytest.raises(OutputError, match="its ids are not anonymous, but --anonymous-ids was given"):
        build(manifest, tmp_path / "named", anonymous_ids=key)


NAMED = ("sub-01", "sub-02", "sub-03", "sub-04")


def read_anonymous(
    tmp_path: Path, key: str, names: Sequence[str], column: str, cells: Sequence[str]
) -> Manifest:
    """A manifest of these participants with an extra column, read with the key."""
    rows = [
        {"participant_id": name, "path": f"images/{i}.nii", column: cell}
        for i, (name, cell) in enumerate(zip(names, cells, strict=True))
    ]
    return read_manifest(str(write_manifest(tmp_path / "m.tsv", rows)), pseudonyms=read_pseudonyms(key))


@pytest.mark.parametrize("column", ["label", "subject"])
@pytest.mark.parametrize(
    ("names", "cells", "row"),
    [
        (NAMED, NAMED, 1),
        (NAMED, ("n/a", "n/a", "Sub-2", "n/a"), 3),  # another one's, and spelled in another way
        (NAMED, ("n/a", "see /scans/SUB-02_old", "n/a", "n/a"), 2),
        (NAMED, ("n/a", "n/a", "images/2.nii", "n/a"), 3),
        (("100307", "100408"), ("scan 100307", "no"), 1),
        (("AB", "CD", "EF"), ("ab", "cd", "n/a"), None),
    ],
)
def test_a_column_that_would_give_names_away_is_refused(
    tmp_path: Path, key: str, column: str, names: Sequence[str], cells: Sequence[str], row: int | None
) -> None:
    with pytest.raises(ManifestError) as raised:
        read_anonymous(tmp_path, key, names, column, cells)
    (problem,) = raised.value.problems
    where = (
        f"row {row}: {column} has the name of a participant" if row else f"{column} has the name or number"
    )
    assert problem.startswith(where)
    assert "which --anonymous-ids does not replace there; drop the column, or replace its values" in problem
    assert not any(name in problem for name in names)


@pytest.mark.parametrize(
    ("names", "cells", "warnings"),
    [
        (NAMED, ("1", "02", "3", "n/a"), 1),
        (NAMED, ("1", "2", "3", "5"), 0),
        (NAMED, ("1", "1", "1", "1"), 0),
        (NAMED, ("sub-05", "sub-011", "n/a", ""), 0),
        (("12", "7", "40", "41"), ("40", "12", "7", "40"), 0),  # ages
        (("AD", "MB", "CN", "XY"), ("CN", "AD", "AD", "CN"), 0),  # initials, and diagnoses
    ],
)
def test_what_may_be_there_by_chance_is_not_refused(
    tmp_path: Path, key: str, names: Sequence[str], cells: Sequence[str], warnings: int
) -> None:
    manifest = read_anonymous(tmp_path, key, names, "score", cells)
    found = [text for text in manifest.warnings if text.startswith("score has the name or number of")]
    assert len(found) == warnings


def leaks_of(tmp_path: Path, key: str, columns: Columns | None = None, **cells: Sequence[str]) -> str:
    """The problem or warning of a manifest of these columns; "" for none. No name is in it."""
    rows = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    path = str(write_manifest(tmp_path / "m.tsv", rows))
    try:
        found = read_manifest(path, columns, pseudonyms=read_pseudonyms(key)).warnings
    except ManifestError as e:
        found = tuple(f"refused: {problem}" for problem in e.problems)
    assert len(found) <= 1
    assert not any(text in found[0] for text in itertools.chain(*cells.values()) if found and len(text) > 4)
    return "".join(found)


PEOPLE = ("P1", "P2", "P3")
FILES = tuple(f"im/Maier_Hans-{name}.nii.gz" for name in "abc")


@pytest.mark.parametrize("column", ["label", "split", "note"])
@pytest.mark.parametrize("prefix", ["ses-", ""])
@pytest.mark.parametrize(
    ("cells", "row"),
    [
        (("x", "ses-20210301", "x"), 2),
        (("x", "20210301", "x"), 2),
        (("SES_20210300", "x", "x"), 1),
        (("ses.20210300", "x", "x"), 1),
        (("x", "m12", "x"), 2),
    ],
)
def test_copies_of_sessions_are_refused(
    tmp_path: Path, key: str, column: str, prefix: str, cells: Sequence[str], row: int
) -> None:
    sessions = tuple(f"{prefix}{name}" for name in ("20210300", "20210301", "m12"))
    given = {"participant_id": PEOPLE, "path": FILES, "session_id": sessions, column: cells}
    found = leaks_of(tmp_path, key, **given)
    assert found.startswith(f"refused: row {row}: {column} has the name of a participant, a session or ")


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (("x", "test", "x"), "row 2: note has the name of a participant, a session or an image, perhaps by"),
        (("n/a", "test", "retest"), "refused: note has the name or number of the participant, session or"),
        (("a test", "no test", "x"), ""),
    ],
)
def test_words_that_are_sessions_may_be_there_by_chance(
    tmp_path: Path, key: str, cells: Sequence[str], expected: str
) -> None:
    sessions = ("test", "test", "retest")
    found = leaks_of(tmp_path, key, participant_id=PEOPLE, path=FILES, session_id=sessions, note=cells)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("files", "cell", "expected"),
    [
        (FILES, "Maier_Hans-b.nii.gz", "refused: row 3: note"),
        (FILES, "maier hans_B", "refused: row 3: note"),
        (FILES, "copies/Maier_Hans-b_seg.mgz", ""),  # of another row
        (FILES, "copies/Maier_Hans-c_seg.mgz", "refused: row 3: note"),
        (FILES, "file:///data/im/Maier%5FHans-b.nii", "refused: row 3: note"),
        ([f"file:///data/{path}" for path in FILES], FILES[0], "refused: row 3: note"),
        (("im/v0.nii", "im/v1.nii", "im/v2.nii"), "v1.nii.gz", "refused: row 3: note"),
        (
            ("im/v0.nii", "im/v1.nii", "im/v2.nii"),
            "v1",
            "row 3: note has the name of a participant, a session",
        ),
        (("a/brain_t1.nii", "b/brain_t1.nii", "c/brain_t1.nii"), "brain_t1", ""),
        (("a/brain_t1.nii", "b/brain_t1.nii", "c/brain_t1.nii"), "/x/c/brain_t1.nii", "refused: row 3: note"),
        (("/x/a/t1.nii", "/x/b/t1.nii", "/x/c/t1.nii"), "file:///y/c/t1.nii", "refused: row 3: note"),
        (FILES, "im/", ""),
        (FILES, "scan of Maier at 3pm", ""),
    ],
)
def test_copies_of_names_of_images_are_refused(
    tmp_path: Path, key: str, files: Sequence[str], cell: str, expected: str
) -> None:
    found = leaks_of(tmp_path, key, participant_id=PEOPLE, path=files, note=("", "", cell))
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("header", "is_name"),
    [("sub-Maier", True), ("maier", True), ("100307", True), ("brain_of_k", True), ("20210", False)],
)
def test_headers_that_are_names_are_refused(tmp_path: Path, key: str, header: str, *, is_name: bool) -> None:
    people, files = ("sub-Maier", "sub-100307", "sub-x"), ("a.nii", "b.nii", "brain-of-k.nii")
    found = leaks_of(tmp_path, key, participant_id=people, path=files, **{header: ("1", "2", "3")})
    assert (
        found.startswith("refused: the name of column 3 is that of a participant, a session or an") == is_name
    )
    assert header not in found


def test_verify_needs_the_key_for_manifest_and_images(manifest: Path, key: str, tmp_path: Path) -> None:
    output, other = str(tmp_path / "out"), tmp_path / "other"
    other.write_bytes(SECRET[::-1])
    (manifest.parent / "scans of/Lise/second.nii.gz").write_bytes(b"no image")
    build(manifest, output, anonymous_ids=key, max_bad_fraction=0.5)
    assert verify_dataset(output).problems == ()
    assert verify_dataset(output, manifest=str(manifest), anonymous_ids=key, deep=ALL).problems == ()
    with pytest.raises(UsageError, match="not the key that"):
        verify_dataset(output, manifest=str(manifest), anonymous_ids=str(other))
    for given in ({"manifest": str(manifest)}, {"deep": 1}, {"anonymous_ids": key, "deep": 1}):
        with pytest.raises(UsageError, match="give both --manifest and --anonymous-ids"):
            verify_dataset(output, **given)
    write_image(manifest.parent / "scans of/Ada/first.nii.gz", slope=2.0)
    (problem,) = verify_dataset(output, manifest=str(manifest), anonymous_ids=key, deep=ALL).problems
    assert f"what is stored differs from {expected('scans of/Ada/first.nii.gz', 'path')} in" in problem
    build(manifest, tmp_path / "named", max_bad_fraction=0.5)
    with pytest.raises(UsageError, match="its ids are not anonymous"):
        verify_dataset(str(tmp_path / "named"), anonymous_ids=key)


@pytest.mark.parametrize("is_anonymous", [True, False])
def test_another_label_is_no_fault_of_an_image(tmp_path: Path, key: str, is_anonymous: bool) -> None:
    study, output = write_study(tmp_path / "study"), str(tmp_path / "out")
    given = {"anonymous_ids": key} if is_anonymous else {}
    build(study, output, **given)
    head, first, *rest = study.read_text().splitlines()
    cells = dict(zip(head.split("\t"), first.split("\t"), strict=True)) | {"label": "77"}
    study.write_text("\n".join([head, "\t".join(cells.values()), *rest]))
    (problem,) = verify_dataset(output, manifest=str(study), deep=ALL, **given).problems
    assert "1 example has another label in the manifest" in problem
    assert problem.endswith("or run the build again with --overwrite")


def test_verify_says_which_image_the_manifest_lacks(tmp_path: Path, key: str) -> None:
    few = write_study(tmp_path / "study", NAMES[:1])
    output = str(tmp_path / "out")
    build(few, output, anonymous_ids=key)
    text = few.read_text().replace("scans of/Ada/first", "elsewhere/first")
    few.write_text(text)
    report = verify_dataset(output, manifest=str(few), anonymous_ids=key, deep=ALL)
    source = expected("scans of/Ada/first.nii.gz", "path")
    record, row = sorted(report.problems)
    assert f"its image, {source}, is not in the manifest" in record + row
    assert "another path in the manifest (dataset's, manifest's): " in record + row


@pytest.mark.parametrize(
    ("secret", "flags", "message"),
    [
        (b"fifteen bytes!!", [], "15 bytes are too few for a key, which requires 16; make one with"),
        (None, [], "key, which cannot be read: No such file"),
        (SECRET, ["--anonymous-ids="], "--anonymous-ids is empty"),
        (SECRET, ["--anonymous-ids=out/key"], "where it would be shared with the dataset; move it"),
    ],
)
def test_keys_that_are_refused(
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    secret: bytes | None,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if secret:
        (tmp_path / "key").write_bytes(secret)
    flags = flags or [f"--anonymous-ids={tmp_path}/key"]
    arguments = ["build", str(manifest), str(tmp_path / "out"), *flags]
    assert cli.main(arguments) == cli.USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line(
    manifest: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, flag = str(tmp_path / "out"), f"--anonymous-ids={key}"
    assert cli.main(["build", str(manifest), output, flag, "--quiet"]) == cli.SUCCESS
    assert cli.main(["verify", output, "--manifest", str(manifest), flag, "--deep=all"]) == cli.SUCCESS
    said = capsys.readouterr()
    assert "8 rebuilt from their images" in said.out
    assert not any(name in said.out + said.err for name in NAMES)


def test_the_configuration_and_the_voxels_are_those_of_the_names(
    manifest: Path, key: str, tmp_path: Path
) -> None:
    outputs = [str(tmp_path / name) for name in ("named", "out")]
    for output, given in zip(outputs, (None, key), strict=True):
        build(manifest, output, anonymous_ids=given)
    one, other = map(read_info, outputs)
    assert one.config == other.config
    assert [s.sha256 for s in one.shards] != [s.sha256 for s in other.shards]
    ids = "Ada_second", f"{expected('Ada', 'participant_id')}_{expected('second', 'session_id')}"
    volumes = [read_volume(*place) for place in zip(outputs, ids, strict=True)]
    assert np.array_equal(volumes[0].voxels, volumes[1].voxels)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"label": "Doe"}, "row 2: label is {}, not a finite float32 number"),
        ({"label": "n/a"}, "row 2: label is {}, a missing label"),
        ({"split": "Doe!"}, "row 2: split is {}; use up to 128 letters"),
        ({"split": "TRAIN"}, "row 2: split is {}, and {} in row 1; give them one spelling"),
        ({"split": "Doe", "participant_id": "s0"}, "is in split {}, and in row 1 in {}; give all rows"),
        ({"split": "Doe", "path": "0.nii"}, "is in split {} and, in row 1, in {}; keep one"),
    ],
)
def test_problems_show_no_cell_of_a_manifest_with_names(
    tmp_path: Path, cells: dict[str, str], message: str
) -> None:
    rows = [{"participant_id": f"s{i}", "path": f"{i}.nii", "label": "1", "split": "train"} for i in range(2)]
    path = str(write_manifest(tmp_path / "m.tsv", [rows[0], rows[1] | cells]))
    hidden = "(hidden by --anonymous-ids)"
    with pytest.raises(ManifestError) as told:
        read_manifest(path, pseudonyms=Pseudonyms(SECRET))
    assert message.format(hidden, hidden) in str(told.value)
    assert "Doe" not in str(told.value)
    with pytest.raises(ManifestError) as told:
        read_manifest(path)
    assert hidden not in str(told.value)


def test_warnings_show_no_cell_of_a_manifest_with_names(tmp_path: Path) -> None:
    rows = [{"participant_id": f"s{i}", "path": f"{i}.nii", "label": f"1234567{i}1"} for i in range(2)]
    path = str(write_manifest(tmp_path / "m.tsv", rows))
    (plain,) = read_manifest(path).warnings
    (warning,) = read_manifest(path, pseudonyms=Pseudonyms(SECRET)).warnings
    assert "123456701" in plain
    assert "1234567" not in warning
    assert "label is (hidden by --anonymous-ids) in row 1, but records store float32" in warning
