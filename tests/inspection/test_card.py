"""A dataset's description: what programs read of it is so, and what people read runs."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, RecordConfig
from beam_nifti.record.example import decode_example, decode_tensor
from beam_nifti.record.index import read_index
from tests.datasets import build_dataset, info_of, records_of
from tests.images import brain, write_cohort, write_image, write_manifest

NASTY = "a | <b>`x`: \"y\" # \\ 'z'"
WORDS = [
    f"--name={NASTY}",
    "--description=Of *us*",
    "--license=CC0-1.0",
    "--citation=Us",
    "--url=https://example.org",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of two shards, labels of two kinds, and a column whose name has a space."""
    folder = tmp_path_factory.mktemp("card")
    rows = []
    for number in range(7):
        name = f"secret-{number}"
        write_image(folder / f"{name}.nii", brain(seed=number))
        cells = {"participant_id": name, "path": f"{name}.nii", "age": 50 + number, "scan site": "Lyon"}
        rows.append(
            {**cells, "sex": "F<|" if number % 2 else "M", "split": "test" if number < 3 else "train"}
        )
    manifest = write_manifest(folder / "manifest.csv", rows)
    return build_dataset(manifest, folder / "out", columns=Columns(label="age,sex:class"))


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    """A copy of `built`."""
    return shutil.copytree(built, tmp_path / "out")


@pytest.fixture
def card(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command: what it says."""

    def run(output: Path, *flags: str, code: int = cli.SUCCESS) -> str:
        assert cli.main(["card", str(output), *flags]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


# mlcroissant's calls of rdflib and pandas.
of_mlcroissant = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def croissant_of(dataset: Path) -> Any:
    mlcroissant = pytest.importorskip("mlcroissant")
    return mlcroissant.Dataset(jsonld=str(dataset / "croissant.json"))


@of_mlcroissant
def test_croissant_gives_the_rows_of_the_index(dataset: Path, card: Callable[..., str]) -> None:
    card(dataset)
    found = croissant_of(dataset).records("records")
    read = [{key.removeprefix("records/"): value for key, value in row.items()} for row in found]
    rows = [
        {"split": split, **row}
        for split, of_split in info_of(dataset).splits.items()
        for shard in of_split.shards
        for row in read_index(str(dataset / shard.index))[0].to_pylist()
    ]
    assert len(read) == 7
    assert set(rows[0]) == {key.replace("%20", " ") for key in read[0]}
    by_id = {row["example_id"]: row for row in rows}
    for row in read:
        wanted = by_id[row["example_id"].decode()]
        for name, value in row.items():
            text = value.decode() if isinstance(value, bytes) else value
            assert text == wanted[name.replace("%20", " ")], name


@of_mlcroissant
def test_croissant_lacks_only_what_nobody_gave(dataset: Path, card: Callable[..., str]) -> None:
    def missing() -> set[str]:
        issues = croissant_of(dataset).metadata.ctx.issues
        assert issues.errors == set()
        return set(re.findall(r'Property "\S+/(\w+)" is recommended', "".join(issues.warnings)))

    card(dataset)
    assert missing() == {"citeAs", "datePublished", "license"}
    card(dataset, *WORDS, "--overwrite")
    assert missing() == {"datePublished"}


def test_croissant_has_the_checksum_of_every_file(dataset: Path, card: Callable[..., str]) -> None:
    card(dataset)
    files = json.loads((dataset / "croissant.json").read_text())["distribution"]
    listed = {file["contentUrl"]: file["sha256"] for file in files if "sha256" in file}
    paths = [*dataset.glob("*.tfrecord.gz"), *dataset.glob("index/*.parquet")]
    assert len(paths) == 8
    digests = {str(p.relative_to(dataset)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    assert listed == digests


@pytest.mark.tf
def test_the_python_of_the_card_runs(
    dataset: Path, card: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow")
    card(dataset)
    monkeypatch.chdir(dataset.parent)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (dataset / "README.md").read_text(), re.S):
        exec(code, names)
    assert names["element"]["image"].shape == (6, 5, 4, 1)
    assert next(iter(names["dataset"]))[0].shape == (6, 5, 4, 1)


def test_words_are_escaped_and_nobody_is_named(built: Path, dataset: Path, card: Callable[..., str]) -> None:
    yaml = pytest.importorskip("yaml")
    card(dataset, *WORDS)
    text = (dataset / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "pretty_name": NASTY,
        "tags": ["nifti", "tfrecord"],
        "license": "cc0-1.0",
        "size_categories": ["n<1K"],
    }
    assert "# a \\| &lt;b&gt;\\`x\\`: \"y\" \\# \\\\ 'z'\n\nOf \\*us\\*\n" in body
    assert "    examples      7 in" in body
    assert "    manifest      manifest.csv  (7 rows)" in body
    assert all(
        words in body for words in ("License: CC0-1.0", "Please cite: Us", "More: https://example.org")
    )
    assert "secret" not in text
    assert str(built.parent) not in text + (dataset / "croissant.json").read_text()


@pytest.mark.parametrize(
    ("given", "header"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("https://example.org/X", {"license": "other", "license_link": "https://example.org/X"}),
        ("Of Lyon only", {"license": "other", "license_name": "Of Lyon only"}),
    ],
)
def test_a_license_is_as_the_hub_has_it_and_else_as_it_was_given(
    dataset: Path, card: Callable[..., str], given: str, header: dict[str, str]
) -> None:
    yaml = pytest.importorskip("yaml")
    card(dataset, f"--license={given}")
    text = (dataset / "README.md").read_text()
    said = yaml.safe_load(text.split("---\n")[1])
    assert {key: value for key, value in said.items() if key.startswith("license")} == header
    assert f"License: {given}\n" in text
    assert json.loads((dataset / "croissant.json").read_text())["license"] == given


def test_a_description_is_a_paragraph(dataset: Path, card: Callable[..., str]) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt()
    for words in ("- one", "1. one", "12) one", "+ one", "* one", "> one", "# one", "---", "1.5-2.5 T"):
        card(dataset, f"--description={words}", "--overwrite")
        page = markdown.render((dataset / "README.md").read_text().split("---\n", 2)[2])
        assert f"<p>{html.escape(words)}</p>" in page


def test_what_a_run_left_that_was_stopped_is_no_obstacle(dataset: Path, card: Callable[..., str]) -> None:
    card(dataset, "--name=A")
    whole = (dataset / "croissant.json").read_bytes()
    (dataset / "croissant.json").unlink()
    assert "README.md: already exists" in card(dataset, "--name=B", code=cli.USAGE)
    assert not (dataset / "croissant.json").exists()
    card(dataset, "--name=A")
    assert (dataset / "croissant.json").read_bytes() == whole


@pytest.mark.parametrize("voxel_dtype", ["float32", "native"])
def test_the_features_are_those_of_the_records(
    tmp_path: Path, card: Callable[..., str], voxel_dtype: str
) -> None:
    rows = [{"path": f"{i}.nii", "mask": "mask.nii", "side": "left", "a|b": i} for i in range(2)]
    for row in rows:
        write_image(tmp_path / row["path"], brain(), slope=0.5)
    write_image(tmp_path / "mask.nii", (brain() > 0).astype(np.uint8))
    manifest = write_manifest(tmp_path / "manifest.csv", rows)
    columns, record = Columns(label="side,a|b", mask="mask"), RecordConfig(voxel_dtype=voxel_dtype)
    dataset = build_dataset(manifest, tmp_path / "out", record, columns=columns)
    card(dataset)
    listed = re.findall(r"^\| (\S+) \| (.+?) \| (.*?) \|$", (dataset / "README.md").read_text(), re.M)[1:]
    table = {name.replace("\\", ""): (dtype, shape) for name, dtype, shape in listed}
    for _, payload in records_of(dataset):
        features = decode_example(payload)
        assert features.keys() == table.keys()
        for name, value in features.items():
            if isinstance(value, np.ndarray):
                assert table[name] == (value.dtype.name, str(value.size))
            elif name.endswith("_raw"):
                voxels = decode_tensor(bytes(value))
                assert table[name] == (f"tensor of {voxels.dtype.name}", "×".join(map(str, voxels.shape)))
            else:
                assert table[name] == ("bytes", "")


def test_it_is_the_same_every_time_and_replaces_nothing_unasked(
    dataset: Path, card: Callable[..., str]
) -> None:
    (dataset / "README.md").write_text("mine")
    assert "README.md: already exists; --overwrite replaces it" in card(dataset, code=cli.USAGE)
    assert (dataset / "README.md").read_text() == "mine"
    assert not (dataset / "croissant.json").exists()
    texts = []
    for _ in range(2):
        said = card(dataset, "--overwrite")
        texts.append([(dataset / name).read_bytes() for name in ("README.md", "croissant.json")])
    assert [line.rpartition("/")[2] for line in said.splitlines()] == ["README.md", "croissant.json"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", ["README.md", "croissant.json"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_that_leads_out_is_refused(
    dataset: Path, card: Callable[..., str], tmp_path: Path, name: str, is_there: bool, flags: tuple[str, ...]
) -> None:
    target, path = tmp_path / "other", dataset / name
    if is_there:
        target.write_text("mine")
    path.symlink_to(target)
    assert f"{path}: is a link that leads out of its dataset" in card(dataset, *flags, code=cli.USAGE)
    assert path.is_symlink()
    assert not is_there or target.read_text() == "mine"
    assert {"README.md", "croissant.json"} & {each.name for each in dataset.iterdir()} == {name}


def test_a_build_leaves_it_and_verify_tells_when_it_is_of_another_revision(
    tmp_path: Path, card: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, output = write_cohort(tmp_path / "cohort", 4), tmp_path / "out"

    def run(*arguments: object, code: int = cli.SUCCESS) -> str:
        assert cli.main([*map(str, arguments), "--quiet"]) == code
        return capsys.readouterr().err

    run("build", manifest, output)
    card(output)
    before = (output / "croissant.json").read_bytes()
    run("build", manifest, output)
    run("verify", output)
    write_cohort(tmp_path / "cohort", 6)
    run("build", manifest, output)
    assert (output / "croissant.json").read_bytes() == before
    assert "croissant.json: is not of revision 2" in run("verify", output, code=cli.FAILED)
    card(output, "--overwrite")
    run("verify", output)


def test_a_description_of_other_files_is_told(
    dataset: Path, card: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    card(dataset)
    path = dataset / "croissant.json"
    path.write_text(path.read_text().replace(info_of(dataset).shards[0].sha256, "0" * 64))
    assert cli.main(["verify", str(dataset), "--quiet"]) == cli.FAILED
    assert "croissant.json: is not of revision 1 of this dataset" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\x7fb", "a\nb"])
def test_words_that_are_no_text_are_refused(dataset: Path, card: Callable[..., str], name: str) -> None:
    assert f"name is {name!r}; give printable text" in card(dataset, f"--name={name}", code=cli.USAGE)
    assert not (dataset / "README.md").exists()


def test_without_a_dataset(tmp_path: Path, card: Callable[..., str]) -> None:
    assert "no complete dataset here" in card(tmp_path, code=cli.FAILED)
