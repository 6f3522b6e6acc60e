"""What the documents say is so, and what they name is there. tests/test_pages.py runs what they show."""

from __future__ import annotations

import argparse
import functools
import re
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import parser as options
from beam_nifti.config import RecordConfig, Sharding
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import (
    decode_example,
    decode_tensor,
    encode_example,
    encode_tensor,
    feature_kinds,
)
from beam_nifti.record.index import schema_of
from beam_nifti.record.tiles import Tiles
from beam_nifti.volume import load_volume
from beam_nifti.volume.preprocess import apply_function
from beam_nifti.volume.rescale import numpy_dtype
from tests import pages
from tests.datasets import build_dataset, records_of
from tests.images import brain, row_of, write_image, write_manifest
from tests.pages import README, ROOT

FORMAT = ROOT / "docs/format.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [block.text for block in pages.read_blocks(document) if block.language == language]


def _parser(command: str) -> argparse.ArgumentParser:
    """Of one of our commands, such as "build" or "manifest bids"; "" is for all of them."""
    return {"": options.make_parser(), **dict(options.commands())}[command]


@functools.cache
def _flags(command: str) -> frozenset[str]:
    """The long flags of one of our commands."""
    return frozenset(f for f in _parser(command)._option_string_actions if f.startswith("--"))


@functools.cache
def _beam_flags() -> frozenset[str]:
    from apache_beam.options import pipeline_options

    parser = pipeline_options._BeamArgumentParser(allow_abbrev=False, add_help=False)
    for view in pipeline_options.PipelineOptions.__subclasses__():
        view._add_argparse_args(parser)
    return frozenset(f.replace("_", "-") for f in parser._option_string_actions)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the README's manifest."""
    folder = tmp_path_factory.mktemp("readme")
    pages.STARTS["dataset"](folder)
    return folder / "cohort/dataset"


def test_a_build_leaves_the_files_that_the_readme_shows(dataset: Path) -> None:
    (listing,) = (b for b in blocks(README, "") if b.startswith("cohort/dataset/"))
    shown = {line.split()[0] for line in listing.splitlines()[1:]} - {"failures.jsonl"}
    assert shown == {str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.is_file()}


def _defined(start: str) -> Callable[..., Any]:
    """The last function of the block of docs/format.md that begins so."""
    (block,) = (b for b in blocks(FORMAT, "python") if b.startswith(start))
    names: dict[str, Any] = {}
    exec(block, names)
    function: Callable[..., Any] = list(names.values())[-1]
    return function


def test_the_reader_of_the_format_reads_every_record(dataset: Path) -> None:
    read = list(_defined("import gzip")(dataset))
    stored = {cells["example_id"]: decode_example(payload) for cells, payload in records_of(dataset)}
    assert [i for _, _, i in read] == ["sub-0001", "sub-0002", "sub-0003"]
    assert [float(label) for _, label, _ in read] == [63.5, 71, 58]
    for voxels, _, example_id in read:
        assert voxels.dtype == np.float32
        assert voxels.max() == 1
        assert np.array_equal(voxels, decode_tensor(bytes(stored[example_id]["image_raw"])))


def test_the_reader_of_patches_reads_some_of_the_members(tmp_path: Path) -> None:
    images = [brain((70, 60, 50), seed=i) for i in range(2)]
    for i, voxels in enumerate(images):
        write_image(tmp_path / f"{i}.nii", voxels)
    manifest = write_manifest(tmp_path / "m.csv", [{"path": f"{i}.nii"} for i in range(2)])
    output = build_dataset(
        manifest, tmp_path / "out", RecordConfig(voxel_dtype="native"), sharding=Sharding(num_shards=1)
    )
    read = _defined("import pyarrow.parquet")
    known = {"tile_shape": _defined("import math"), **_defined("import gzip").__globals__}
    read.__globals__.update({name: known[name] for name in ("Path", "gzip", "json", "np", "tile_shape")})
    (shard,) = map(vars, read_info(str(output)).shards)
    for corner, shape in (((3, 4, 5), (40, 50, 30)), ((0, 0, 0), (70, 60, 50)), ((69, 59, 49), (1, 1, 1))):
        box = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        assert np.array_equal(read(output, shard, 1, corner, shape), images[1][box])


@given(st.tuples(*[st.integers(1, 400)] * 3), st.sampled_from([1, 2, 4, 8]))
def test_the_tiles_of_the_format_are_those_of_records(shape: tuple[int, int, int], itemsize: int) -> None:
    tiles = Tiles.of(shape, itemsize, compressed=True)
    if tiles is not None:
        assert _defined("import math")(shape, itemsize) == (tiles.planes, tiles.rows)


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


def test_the_format_names_every_column_feature_and_field(dataset: Path) -> None:
    info = read_info(str(dataset))
    names = {
        *schema_of(RecordConfig(rescale="zscore", mask_dtype="uint8", frames="each")).names,
        *schema_of(RecordConfig(voxel_dtype="native")).names,
        *schema_of(RecordConfig(has_target=True, nonfinite="zero")).names,
        *feature_kinds(RecordConfig(has_target=True)),
        *info.features,
        *info.config,
        *info.manifest,
        *(field.name for field in fields(info)),
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


COMMANDS = (
    *("init", "manifest bids", "manifest msd", "manifest table", "manifest glob", "check", "analyze"),
    *("build", "verify", "convert", "relabel", "withdraw", "inspect", "diff", "extract", "view", "card"),
    "report",
)


def test_every_flag_in_the_documents_exists() -> None:
    ours = frozenset[str]().union(*map(_flags, ("", *COMMANDS)))
    scripts = {"--fast", "--services", "--all", "--coverage", "--oldest", "--newest"}
    tools = {"--fix", "--dist", "--hypothesis-profile"}  # of ruff and pytest
    benchmarks = {"--epochs", "--masks", "--nobrainer", "--peers", "--threads", "--volumes"}
    examples = {"--checkpoint", "--epochs", "--patch", "--steps"}
    containers = {"--build-arg", "--entrypoint", "--network", "--no-install-recommends", "--rm", "--user"}
    boot = {"--worker-pool"}  # Beam's launcher of workers
    job_server = {"--execution-mode-for-batch"}  # Beam's, of Flink
    gcloud = {
        *("--image", "--location", "--max-workers", "--metadata-file", "--parameters", "--recursive"),
        *("--repository-format", "--sdk-language", "--template-file-gcs-location"),
    }
    nibabel = {"--compressed", "--out-dtype"}  # of its converters
    airflow = {"--conf"}
    mkdocs = {"--strict"}
    kubectl = {"--for", "--timeout"}
    scripts |= tools | benchmarks | examples | airflow | mkdocs | kubectl | containers | boot
    scripts |= job_server | gcloud | nibabel
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lists_are_written_as_github_and_the_site_read_them(document: Path) -> None:
    prose = re.sub(r"^( *)```.*?^ *```$", r"\1", document.read_text(), flags=re.M | re.S)
    assert re.findall(r"\n\n {1,3}\S.*", prose) == []  # four spaces below an item
    assert (
        re.findall(r"^(?!\d+\. )\w.*\n(?:- |\d+\. ).*", prose, re.M) == []
    )  # an empty line before the first


def test_every_decision_is_listed_by_its_number() -> None:
    decisions = sorted((ROOT / "docs/adr").glob("0*.md"))
    assert [p.name[:4] for p in decisions] == [f"{n:04d}" for n in range(1, len(decisions) + 1)]
    listed = re.findall(r"^- \[(.*)\]\((.*)\)$", (ROOT / "docs/adr/README.md").read_text(), re.M)
    assert listed == [(p.read_text().partition("\n")[0].removeprefix("# "), p.name) for p in decisions]


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_a_document_names_exists(name: str) -> None:
    named = re.findall(
        r"`((?:beam_nifti|pipelines|scripts|tests|docs|benchmarks)/[\w./-]*\w)`", (ROOT / name).read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []
