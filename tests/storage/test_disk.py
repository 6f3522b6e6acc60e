"""What is written and deleted: in OUTPUT alone, and there only what a build has written."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.errors import DatasetError, OutputError, TooManyFailures, UsageError
from beam_nifti.pipeline.outputs import dataset_of, require_apart
from beam_nifti.random_access import Dataset
from beam_nifti.record.dataset_info import read_info
from beam_nifti.storage import paths as storage
from tests.build_helpers import assert_complete, build, build_apart, sha256
from tests.images import name_of, write_cohort, write_image, write_manifest
from tests.pages import ROOT

SHARD = "train-00000-of-00002.tfrecord.gz"
TEMPORARY = f"{'0' * 32}.tmp"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """The content of every file, by its path; None for folders and links."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort and a dataset of two shards, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    build(write_cohort(folder / "cohort", 8), folder / "out")
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of its dataset, for commands that are refused before they read it; the cohort is beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_cohort(tmp_path / "cohort", 8)


@pytest.fixture
def output(manifest: Path, tmp_path: Path) -> Path:
    """A dataset of two shards."""
    build(manifest, tmp_path / "out")
    return tmp_path / "out"


def change(manifest: Path, number: int, value: int) -> None:
    write_image(manifest.parent / name_of(number), np.arange(120, dtype=np.int16).reshape(6, 5, 4) * value)


# Links


@pytest.mark.parametrize(
    "name",
    [".build", "index", ".lock", "dataset_info.json", "failures.jsonl", SHARD, "index/x.parquet", ".build/0"],
)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_link_in_an_output_is_refused(
    copied: Path, tmp_path: Path, name: str, flags: tuple[str, ...], run: Callable[..., str]
) -> None:
    manifest, output = tmp_path / "cohort/manifest.tsv", copied
    victim, path = tmp_path / "victim", output / name
    (victim / "thesis").mkdir(parents=True)
    (victim / "thesis/1.tex").write_text("mine")
    (victim / "train-00000-of-00009.parquet").write_text("mine")
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    is_folder = name in (".build", "index", ".build/0")
    path.symlink_to(victim if is_folder else victim / "thesis/1.tex")
    change(manifest, 0, 1)
    before = snapshot(tmp_path)
    if name == "dataset_info.json":  # which is no JSON, and read first
        assert "dataset_info.json" in run("build", manifest, output, *flags, code=cli.USAGE)
    else:
        assert f"{path}: is a symbolic link" in run("build", manifest, output, *flags, code=cli.USAGE)
    assert snapshot(tmp_path) == before


def test_a_linked_output_is_one_that_the_user_has_chosen(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    build(manifest, tmp_path / "out")
    build(manifest, tmp_path / "plain")
    assert_complete(tmp_path / "disk", tmp_path / "plain")


ENTRIES = st.sampled_from(["a", "b", "c"])


@given(
    links=st.lists(st.tuples(st.lists(ENTRIES, min_size=1, max_size=3), st.booleans()), max_size=3),
    path=st.lists(ENTRIES, min_size=1, max_size=4),
    operation=st.sampled_from(["write", "delete", "delete_tree", "delete_folder", "link"]),
)
def test_nothing_outside_changes(
    tmp_path_factory: pytest.TempPathFactory, links: list[Any], path: list[str], operation: str
) -> None:
    """Whatever links appear below a folder, and at whatever time: no look comes before the use."""
    root = tmp_path_factory.mktemp("root")
    inside, outside = root / "inside", root / "outside"
    for folder in ("a/a", "b/c"):
        (outside / folder).mkdir(parents=True)
        (outside / folder / "c").write_text("mine")
    inside.mkdir()
    for parts, is_file in links:
        with contextlib.suppress(OSError):
            (inside.joinpath(*parts).parent).mkdir(parents=True, exist_ok=True)
            inside.joinpath(*parts).symlink_to(outside / "a/a/c" if is_file else outside)
    before, target = snapshot(outside), str(inside.joinpath(*path))
    calls: dict[str, Callable[[], None]] = {
        "write": lambda: storage.write(target, b"new", str(inside)),
        "delete": lambda: storage.delete(target, str(inside)),
        "delete_tree": lambda: storage.delete_tree(target, str(inside)),
        "delete_folder": lambda: storage.delete_folder(target, str(inside)),
        "link": lambda: storage.link(str(outside / "b/c/c"), target, str(inside)),
    }
    with contextlib.suppress(OutputError, OSError):
        calls[operation]()
    assert snapshot(outside) == before


def test_paths_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for path in (f"{tmp_path}/out/../mine", f"{tmp_path}/mine", f"{tmp_path}/outside/x"):
        for action in (storage.delete, storage.delete_tree):
            with pytest.raises(OutputError, match="is not in"):
                action(path, f"{tmp_path}/out")
    assert (tmp_path / "mine").exists()


def test_a_note_names_no_folder_to_be_removed(manifest: Path, tmp_path: Path) -> None:
    """The note of a received output is input: its folders of parts are those of builds of this output."""
    output, victim = tmp_path / "out", tmp_path / "victim"
    (victim / ("0" * 16)).mkdir(parents=True)
    (victim / ("0" * 16) / "file").write_text("mine")
    assert build_apart(manifest, output, 60).was_killed
    note = output / ".build/plan.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"roots": [str(victim)]}))
    with pytest.raises(OutputError, match=r"names the folder '\S*/victim' for temporary files"):
        build(manifest, output)
    build(manifest, output, overwrite=True)
    assert snapshot(victim)[f"{'0' * 16}/file"] == b"mine"


# Files of others


@pytest.mark.parametrize("further", [{}, {"overwrite": True, "rescale": "none"}])
def test_files_that_only_look_like_ours_stay(manifest: Path, output: Path, further: dict[str, Any]) -> None:
    mine = {
        "mine-00000-of-00002.tfrecord",
        "train-00007-of-00009.tfrecord.gz",
        "failures-r9.jsonl",
        f"mine-00000-of-00002.tfrecord.gz.{TEMPORARY}",
        f"failures-r8.jsonl.{TEMPORARY}",
        "index/mine-00000-of-00002.parquet",
        f"index/mine-00000-of-00002.parquet.{TEMPORARY}",
    }
    for name in mine:
        (output / name).write_text("mine")
    change(manifest, 0, 1)
    build(manifest, output, **further)
    build(manifest, output, **further)
    assert {name for name in mine if (output / name).read_text() == "mine"} == mine
    for name in mine:
        (output / name).unlink()
    assert_complete(output, output)


def test_what_dead_builds_left_goes(manifest: Path, tmp_path: Path) -> None:
    """Also where their note cannot be read: a shard is known by its index."""
    output = tmp_path / "out"
    operations = build_apart(manifest, tmp_path / "undisturbed").operations
    assert build_apart(manifest, output, operations * 8 // 10).was_killed
    assert list(output.glob("*.tfrecord.gz"))
    (output / ".build/plan.json").write_bytes(b"")
    with pytest.raises(OutputError, match="plan of an unfinished build is damaged"):
        build(manifest, output)
    build(manifest, output, overwrite=True, rescale="none", examples_per_shard=2)
    assert_complete(output, output)


# Names


def test_a_published_name_never_has_other_bytes(manifest: Path, tmp_path: Path) -> None:
    """Through changed and failed images, options, sizes of shards, and a damaged dataset_info.json."""
    output, known = tmp_path / "out", dict[str, str]()
    broken, image = manifest.parent / name_of(5), (manifest.parent / name_of(5)).read_bytes()

    def damage() -> None:
        (output / "dataset_info.json").write_text((output / "dataset_info.json").read_text()[:-9])

    steps: list[tuple[Callable[[], object], dict[str, Any]]] = [
        (lambda: None, {}),
        (lambda: change(manifest, 0, 1), {}),
        (lambda: change(manifest, 0, 2), {}),
        (lambda: None, {"overwrite": True, "compression": "none"}),
        (lambda: None, {"overwrite": True, "examples_per_shard": 3}),
        (lambda: broken.write_bytes(b""), {"overwrite": True, "max_bad_fraction": 0.5}),
        (damage, {"overwrite": True}),
        (lambda: broken.write_bytes(image), {"overwrite": True}),
        (lambda: change(manifest, 7, 3), {}),
    ]
    for prepare, options in steps:
        prepare()
        with contextlib.suppress(TooManyFailures):
            build(manifest, output, **options)
        if not (output / "dataset_info.json").exists():
            continue
        info = read_info(str(output))
        files = {name for shard in info.shards for name in (shard.name, shard.index)}
        for name in files | ({info.failures} if info.failures else set()):
            assert known.setdefault(name, sha256(output / name)) == sha256(output / name), name
    assert info.revision > 6


@pytest.mark.parametrize("engine", ["indexed", "sequential"])
def test_a_reader_stops_where_the_dataset_was_built_again(manifest: Path, output: Path, engine: Any) -> None:
    import tensorflow as tf

    from beam_nifti.reader import load_dataset

    dataset = load_dataset(output, engine=engine)
    assert len(list(dataset)) == len(list(dataset)) == 8
    endless = iter(load_dataset(output, engine=engine, repeat=True, batch_size=8).prefetch(0))
    next(endless)
    change(manifest, 0, 1)
    build(manifest, output)
    with pytest.raises(tf.errors.OpError, match="was rebuilt after it was opened; open it again"):
        list(dataset)
    # An epoch that had begun may miss the removed files.
    with pytest.raises(tf.errors.OpError, match=r"was rebuilt after it was opened|No such file"):
        list(itertools.islice(endless, 64))  # some epochs may have been read ahead


def test_random_access_names_a_rebuild(manifest: Path, output: Path) -> None:
    records = Dataset(output)
    for number in (0, 7):
        change(manifest, number, 1)
    build(manifest, output)
    with pytest.raises(DatasetError, match="was rebuilt after it was opened; open it again"):
        list(records)
    with pytest.raises(DatasetError, match="was rebuilt after it was opened; open it again"):
        records[0]


# Datasets of later versions


@pytest.mark.parametrize("newer", [{"format_version": 99}, {"format_features": ["sources", "later"]}])
def test_a_newer_dataset_is_not_overwritten(copied: Path, newer: dict[str, Any]) -> None:
    manifest, output = copied.parent / "cohort/manifest.tsv", copied
    info = json.loads((output / "dataset_info.json").read_text()) | newer
    (output / "dataset_info.json").write_text(json.dumps(info))
    before = snapshot(output)
    with pytest.raises(OutputError, match=r"(format version 99|feature 'later').*--overwrite does not"):
        build(manifest, output, overwrite=True)
    assert snapshot(output) == before


# Reports


@pytest.mark.parametrize(
    ("command", "flag", "target"),
    [
        ("check MANIFEST", "--out", "cohort/manifest.tsv"),
        ("check MANIFEST", "--out", "out/dataset_info.json"),
        ("check MANIFEST", "--out", "link/dataset_info.json"),
        ("check MANIFEST", "--summary-json", "link/dataset_info.json"),
        ("check MANIFEST", "--summary-json", "out/croissant.json"),
        ("build MANIFEST OUTPUT", "--summary-json", "link/new.json"),
        ("build MANIFEST OUTPUT", "--metrics-file", "link/new.prom"),
        ("report OUTPUT", "--out", "out/dataset_info.json"),
        ("extract OUTPUT --id sub-0000 --overwrite", "--out", "link/index/a.nii"),
        ("view OUTPUT --id sub-0000 --overwrite", "--out", f"out/{SHARD}"),
        ("view OUTPUT --id sub-0000 --overwrite", "--out", "out/.build/a.html"),
        ("manifest glob COHORT/*.nii.gz --overwrite", "--out", "out/failures.jsonl"),
        ("manifest bids COHORT --overwrite", "--out", "cohort/participants.tsv"),
    ],
)
def test_a_report_replaces_no_input_and_no_dataset(
    copied: Path, tmp_path: Path, command: str, flag: str, target: str
) -> None:
    manifest, output = tmp_path / "cohort/manifest.tsv", copied
    (tmp_path / "link").symlink_to(output)
    (manifest.parent / "participants.tsv").write_text("participant_id\nsub-0000\n")
    places = {"MANIFEST": manifest, "OUTPUT": output, "COHORT": manifest.parent}
    for word, path in places.items():
        command = command.replace(word, str(path))
    before = snapshot(tmp_path)
    arguments = [*command.split(), f"{flag}={tmp_path / target}"]
    assert cli.main(arguments) == cli.USAGE
    assert snapshot(tmp_path) == before


def test_an_input_is_known_by_whatever_path(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "m.tsv")
    (tmp_path / "soft").symlink_to("m.tsv")
    (tmp_path / "folder").symlink_to(tmp_path)
    for name in ("m.tsv", "hard", "soft", "folder/m.tsv", "folder/../m.tsv"):
        with pytest.raises(UsageError, match="which is the manifest"):
            require_apart(f"{tmp_path}/{name}", "--out", {"the manifest": str(tmp_path / "m.tsv")})
    require_apart(f"{tmp_path}/other", "--out", {"the manifest": str(tmp_path / "m.tsv")})


@pytest.mark.parametrize("is_complete", [True, False])
def test_no_file_that_a_build_or_a_card_writes_is_replaced(
    manifest: Path, tmp_path: Path, is_complete: bool
) -> None:
    output = tmp_path / "out"
    (manifest.parent / name_of(1)).write_bytes(b"no image")
    if is_complete:
        build(manifest, output, max_bad_fraction=0.5)
        assert cli.main(["card", str(output)]) == cli.SUCCESS
        change(manifest, 0, 1)
        build(manifest, output, max_bad_fraction=0.5)  # names of a second revision
    else:
        assert build_apart(manifest, output).result["error"] == "TooManyFailures"
    (output / ".lock").touch()  # gone with the build
    names = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    assert len(names) > 3
    for name in names:
        with pytest.raises(UsageError, match="a file of the dataset in"):
            require_apart(str(output / name), "--summary-json")
    require_apart(f"{output}/other.json", "--summary-json")


@pytest.mark.parametrize("name", ["failures.jsonl", ".build/failures.jsonl", "index/a.tsv", "link.jsonl"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_manifest_that_the_build_would_remove_is_refused(
    tmp_path: Path, name: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_cohort(tmp_path / "cohort", 4)
    (manifest.parent / name_of(1)).write_bytes(b"no image")
    output = tmp_path / "out"
    build(manifest, output, max_bad_fraction=0.5)
    path = tmp_path / name if name.startswith("link") else output / name
    path.parent.mkdir(exist_ok=True)
    if name.startswith("link"):
        path.symlink_to(output / "failures.jsonl")
    elif not path.exists():
        path.write_bytes((output / "failures.jsonl").read_bytes())
    before = snapshot(tmp_path)
    assert cli.main(["build", str(path), str(output), *flags]) == cli.USAGE
    assert f"MANIFEST is {path}, which a build into {output} may replace or rem" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["rows.tsv", "sub/failures.jsonl"])
def test_a_manifest_in_output_that_no_build_touches_stays(tmp_path: Path, name: str) -> None:
    folder, path = write_cohort(tmp_path / "cohort", 4).parent, tmp_path / "out" / name
    rows = [{"participant_id": f"sub-{i}", "path": str(folder / name_of(i))} for i in range(4)]
    path.parent.mkdir(parents=True)
    if name.endswith(".tsv"):
        write_manifest(path, rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    before = path.read_bytes()
    for overwrite in (False, True):
        assert build(path, tmp_path / "out", overwrite=overwrite).summary.num_written == 4
    assert path.read_bytes() == before


def test_files_of_a_dataset_are_known_by_their_names(copied: Path) -> None:
    output = copied
    for name in (SHARD, "index/x", ".build/0/train-00000/0.part", ".lock", "failures-r3.jsonl", "README.md"):
        assert dataset_of(f"{output}/{name}") == str(output)
    for name in ("NOTES.md", "report.html", "pictures/index.html", "../report.html"):
        assert dataset_of(f"{output}/{name}") is None
    assert dataset_of(f"{output.parent}/train-00000-of-00001.tfrecord") is None


# The rule

_OF_OS = """open remove unlink rmdir removedirs rename renames replace mkdir makedirs link symlink
    mkfifo mknod truncate chmod chown utime"""
_OF_SHUTIL = "rmtree move copy copy2 copyfile copytree copymode copystat"
_OF_PATHS = """write_text write_bytes unlink mkdir rmdir rename touch symlink_to hardlink_to chmod
    write_to_textfile to_filename tofile"""
_METHODS = frozenset(_OF_PATHS.split())
_FORBIDDEN = {"os": frozenset(_OF_OS.split()), "shutil": frozenset(_OF_SHUTIL.split())}
_BELOW = {"build", "saved_plan", "failures", "index", "merge", "parts", "publish", "card"}
"""Modules that write into OUTPUT, and therefore name the folder below which no link may be."""

_POSITIONS = {"create": 1, "write": 2, "delete": 1, "delete_tree": 1, "delete_folder": 1, "link": 2}
"""Of the argument `below`."""

_SEEN = {"open", *_METHODS, *_POSITIONS, *_FORBIDDEN["os"], *_FORBIDDEN["shutil"]}


def writes(source: str, module: str) -> Iterator[str]:
    """Calls by which a module may write or delete files, but for those of `disk` and `paths`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.id if isinstance(function, ast.Name) else ""
        last = function.attr if isinstance(function, ast.Attribute) else name
        owner = ast.unparse(function.value) if last in _SEEN and isinstance(function, ast.Attribute) else ""
        is_null = bool(node.args) and ast.unparse(node.args[0]) == "os.devnull"
        is_null |= module == "paths" and "os.O_NONBLOCK" in ast.unparse(node)  # which reads
        modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
        opens = name == "open" and any(ast.unparse(mode) not in ("'r'", "'rb'") for mode in modes)
        is_forbidden = (last in _FORBIDDEN.get(owner, ()) and not is_null) or (owner and last in _METHODS)
        if opens or is_forbidden or (owner == "Path" and last == "open"):
            yield f"{module}: {ast.unparse(node)}"
        elif owner == "storage" and module in _BELOW and len(node.args) <= _POSITIONS.get(last, -1):
            yield f"{module}: {ast.unparse(node)} names no folder below which it is"


def test_one_module_writes_and_deletes() -> None:
    modules = [path for path in (ROOT / "beam_nifti").rglob("*.py") if path.stem != "disk"]
    assert [call for path in modules for call in writes(path.read_text(), path.stem)] == []


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, mode)",
        "os.open(path, flags)",
        "os.remove(path)",
        "shutil.rmtree(folder)",
        "Path(path).write_text('')",
        "path.unlink()",
        "storage.delete(path)",
        "with storage.create(path) as handle: pass",
    ],
)
def test_the_rule_sees(source: str) -> None:
    assert list(writes(source, "merge"))
