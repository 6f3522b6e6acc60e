"""What the documents show is run, and what they name is there."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from beam_nifti import options
from beam_nifti.config import RecordConfig
from beam_nifti.example import decode_example, decode_tensor, encode_example, encode_tensor
from beam_nifti.index import read_index, schema_of
from beam_nifti.prepare import apply_function
from beam_nifti.publish import read_info
from beam_nifti.quantize import numpy_dtype
from beam_nifti.tfrecord import decode_record
from beam_nifti.volume import load_volume
from tests.images import brain, row_of, write_image

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FORMAT = ROOT / "docs/format.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_FENCE = re.compile(r"(?:^<!-- (?P<tag>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(document: Path, language: str, tag: str | None = None) -> list[str]:
    """The fenced blocks of a language; with a tag, those below the comment `<!-- tag -->`."""
    found = _FENCE.finditer(document.read_text())
    return [m["text"] for m in found if m["language"] == language and tag in (None, m["tag"])]


@functools.cache
def _flags(command: str) -> frozenset[str]:
    """The long flags of one of our commands, such as "build" or "manifest bids"."""
    parser = options.make_parser()
    for name in command.split():
        (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = action.choices[name]
    return frozenset(f for f in parser._option_string_actions if f.startswith("--"))


@functools.cache
def _beam_flags() -> frozenset[str]:
    from apache_beam.options import pipeline_options

    parser = pipeline_options._BeamArgumentParser(allow_abbrev=False, add_help=False)
    for view in pipeline_options.PipelineOptions.__subclasses__():
        view._add_argparse_args(parser)
    return frozenset(f.replace("_", "-") for f in parser._option_string_actions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's manifest and images for it, in which its commands were run."""
    folder = tmp_path_factory.mktemp("readme")
    name, text = next(
        (m["tag"].removeprefix("file: "), m["text"])
        for m in _FENCE.finditer(README.read_text())
        if (m["tag"] or "").startswith("file: ")
    )
    manifest = folder / name
    manifest.parent.mkdir()
    manifest.write_text(text)
    for i, row in enumerate(csv.DictReader(text.splitlines(), delimiter="\t")):
        write_image(manifest.parent / row["path"], brain(seed=i))
    commands = blocks(README, "bash", "run")
    assert commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working folder."""
    monkeypatch.chdir(folder)
    return folder


def test_the_commands_of_the_readme_leave_the_files_that_it_shows(folder: Path) -> None:
    (listing,) = (b for b in blocks(README, "") if b.startswith("cohort/dataset/"))
    shown = {line.split()[0] for line in listing.splitlines()[1:]} - {"failures.jsonl"}
    dataset = folder / "cohort/dataset"
    assert shown == {str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.is_file()}


@pytest.mark.tf
@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_the_python_of_the_readme_runs(here: Path, number: int) -> None:
    pytest.importorskip("tensorflow")
    names: dict[str, Any] = {}
    exec(blocks(README, "python")[number], names)
    if "dataset" in names:
        x, y = next(iter(names["dataset"]))
        assert x.shape == (2, 6, 5, 4, 1)
        assert y.shape == (2,)


@pytest.mark.tf
def test_the_tensorflow_of_the_page_on_reading_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorflow")
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/reading.md", "python", "tensorflow"):
        exec(block, names)
    assert capsys.readouterr().out.splitlines() == [f"({b}, 6, 5, 4, 1) ({b},)" for b in (2, 1, 2)]
    x, y = next(iter(names["resumed"]))
    assert (x.shape, y.shape) == ((1, 6, 5, 4, 1), (1,))


def test_the_python_of_the_page_on_reading_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/reading.md", "python", "run"):
        exec(block, names)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "3 (6, 5, 4, 1) 63.5 sub-0001"
    assert second == "['sub-0001', 'sub-0002', 'sub-0004']"
    assert [row["example_id"] for row in eval(third)] == ["sub-0004", "sub-0001", "sub-0002"]


def _defined(start: str) -> Callable[..., Any]:
    """The last function of the block of docs/format.md that begins so."""
    (block,) = (b for b in blocks(FORMAT, "python") if b.startswith(start))
    names: dict[str, Any] = {}
    exec(block, names)
    function: Callable[..., Any] = list(names.values())[-1]
    return function


def _records(dataset: Path, split: str) -> Iterator[bytes]:
    for shard in read_info(str(dataset)).splits[split].shards:
        data = (dataset / shard.name).read_bytes()
        table, _ = read_index(str(dataset / shard.index))
        for row in table.to_pylist():
            yield data[row["offset"] : row["offset"] + row["length"]]


def test_the_reader_of_the_format_reads_every_record(here: Path) -> None:
    read = list(_defined("import gzip")("cohort/dataset"))
    expected = [decode_example(decode_record(r, True)) for r in _records(Path("cohort/dataset"), "train")]
    assert [i for _, _, i in read] == ["sub-0001", "sub-0002", "sub-0003"]
    assert [float(label) for _, label, _ in read] == [63.5, 71, 58]
    for (voxels, _, _), features in zip(read, expected, strict=True):
        assert voxels.dtype == np.float32
        assert voxels.max() == 1
        assert np.array_equal(voxels, decode_tensor(bytes(features["image_raw"])))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "float32", "int16", "uint64"])
def test_the_reader_of_the_format_reads_every_dtype(dtype: str) -> None:
    voxels = np.arange(24).reshape(2, 3, 4).astype(numpy_dtype(dtype))
    read = _defined("import gzip").__globals__["tensor"](b"".join(encode_tensor(voxels)))
    assert np.array_equal(read, np.arange(24).reshape(2, 3, 4))


def test_the_reader_of_the_format_reads_every_kind_of_label() -> None:
    features = {
        "label": np.float32([-1]),
        "label/sex": np.array([-1]),
        "label/site": b"A",
        "label/stage": np.array([300]),
    }
    read = _defined("import gzip").__globals__["example"](encode_example(features))
    assert read == features


def test_the_checksum_of_the_format_is_that_of_the_records() -> None:
    for data in (b"", b"123456789", struct.pack("<Q", 3610774)):
        crc = google_crc32c.value(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert _defined("def masked_crc32c")(data) == masked


def test_the_format_names_every_column_feature_and_field(folder: Path) -> None:
    info = read_info(str(folder / "cohort/dataset"))
    names = {
        *schema_of(RecordConfig(rescale="zscore", mask_dtype="uint8", frames="each")).names,
        *info.features,
        *info.config,
        *info.manifest,
        *vars(info),
        *vars(info.shards[0]),
    }
    text = FORMAT.read_text()
    assert [n for n in sorted(names) if f"`{n}`" not in text] == []


def test_the_example_of_a_function_is_one(tmp_path: Path) -> None:
    (source,) = blocks(ROOT / "docs/preparation.md", "python")
    names: dict[str, Any] = {}
    exec(source, names)
    volume = load_volume(row_of(write_image(tmp_path / "a.nii", slope=0.5)))
    clipped = apply_function(volume, names["clip"], "mylab.brains:clip").voxels
    assert np.array_equal(clipped, np.minimum(0.5 * volume.voxels, clipped.max()))
    assert 0 < np.mean(clipped == clipped.max()) < 0.05


COMMANDS = ("manifest bids", "manifest glob", "check", "build", "verify", "inspect", "extract", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_explains_every_option(command: str) -> None:
    section = README.read_text().split(f"### beam-nifti {command}")[1].split("\n### ")[0]
    explained = {f"--{name}" for name in re.findall(r"^\| `--([\w-]+)", section, re.M)}
    flags = _flags(command) - {"--help"}
    if command == "check":  # what it shares with the build is explained there
        flags -= _flags("build") - {"--workers", "--quiet"}
    assert explained == flags


def test_every_flag_in_the_documents_exists() -> None:
    ours = frozenset({"--version"}).union(*map(_flags, COMMANDS))
    scripts = {"--fast", "--services", "--all"}
    tools = {"--fix", "--dist", "--peers", "--nobrainer", "--hypothesis-profile"}  # of ruff and pytest
    containers = {"--build-arg", "--entrypoint", "--network", "--no-install-recommends", "--rm", "--user"}
    boot = {"--worker-pool"}  # Beam's launcher of workers
    job_server = {"--execution-mode-for-batch"}  # Beam's, of Flink
    gcloud = {
        *("--image", "--location", "--max-workers", "--metadata-file", "--parameters", "--recursive"),
        *("--repository-format", "--sdk-language", "--template-file-gcs-location"),
    }
    nibabel = {"--compressed", "--out-dtype"}  # of its converters
    airflow = {"--conf"}
    scripts |= tools | airflow | containers | boot | job_server | gcloud | nibabel
    for document in DOCUMENTS:
        text = re.sub(r"^<!--.*-->$", "", document.read_text(), flags=re.M)
        flags = {f.replace("_", "-") for f in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
        assert flags - ours - scripts - _beam_flags() == set(), document.name


def test_every_link_in_the_documents_leads_somewhere() -> None:
    broken = [
        f"{document.name}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert broken == []


def test_every_decision_is_listed_by_its_number() -> None:
    numbers = [p.name[:4] for p in sorted((ROOT / "docs/adr").glob("*.md"))]
    assert numbers == [f"{n:04d}" for n in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_a_document_names_exists(name: str) -> None:
    named = re.findall(
        r"`((?:beam_nifti|pipelines|scripts|tests|docs|benchmarks)/[\w./-]*\w)`", (ROOT / name).read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []
