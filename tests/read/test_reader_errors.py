"""What is wrong with a dataset is said by both engines of `load_dataset`, at once where it can be known."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beam_nifti.errors import BeamNiftiError
from tests.build_helpers import build
from tests.datasets import edit_index, edit_info, edit_record, set_cell
from tests.images import write_cohort

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import load_dataset  # noqa: E402

pytestmark = pytest.mark.tf

SHARD = "train-00001-of-00002.tfrecord"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six records in two uncompressed shards, in which every byte has its place."""
    folder = tmp_path_factory.mktemp("dataset")
    manifest = write_cohort(folder / "cohort", 6, shape=(5, 4, 3))
    build(manifest, folder / "out", num_shards=2, compression="none")
    return folder / "out"


def edit_shard(edit: Callable[[bytearray], bytes | bytearray], agree: bool = False) -> Damage:
    """Change the bytes of the second shard; `agree` makes dataset_info.json say their new number."""

    def damage(folder: Path) -> None:
        content = bytes(edit(bytearray((folder / SHARD).read_bytes())))
        (folder / SHARD).write_bytes(content)

        def set_size(facts: dict[str, Any]) -> None:
            split = facts["splits"]["train"]
            split["shards"][1]["num_bytes"] = len(content)
            split["num_bytes"] = sum(shard["num_bytes"] for shard in split["shards"])

        if agree:
            edit_info(folder, set_size)

    return damage


def flip(content: bytearray) -> bytearray:
    """Another bit in the voxels of the second record of three."""
    content[len(content) // 2] ^= 1
    return content


def third(content: bytes) -> int:
    """Bytes of each of three records of one size."""
    assert len(content) % 3 == 0
    return len(content) // 3


def without_index(folder: Path) -> None:
    (folder / "index/train-00001-of-00002.parquet").unlink()


def swap_indexes(folder: Path) -> None:
    shutil.copyfile(
        folder / "index/train-00000-of-00002.parquet", folder / "index/train-00001-of-00002.parquet"
    )


def without_info(folder: Path) -> None:
    (folder / "dataset_info.json").unlink()


def cut_info(folder: Path) -> None:
    path = folder / "dataset_info.json"
    path.write_text(path.read_text()[:-20])


def from_the_future(folder: Path) -> None:
    edit_info(folder, lambda facts: facts.update(format_version=99))


BOTH = ("indexed", "sequential")
REBUILD = "copy the dataset again, or"


@pytest.mark.parametrize(
    ("damage", "engines", "message"),
    [
        (
            lambda f: (f / "dataset_info.json").unlink(),
            BOTH,
            r"no complete dataset here .*`beam-nifti build`",
        ),
        (cut_info, BOTH, r"dataset_info\.json: not a dataset's info: .*, or rebuild the dataset"),
        (from_the_future, BOTH, r"dataset_info\.json: format version 99; .* install a newer one"),
        (lambda f: (f / SHARD).unlink(), BOTH, rf"{SHARD}: the shard is missing; {REBUILD} rebuild it"),
        (
            edit_shard(lambda c: c[:-1]),
            BOTH,
            rf"{SHARD}: the shard has \d+ bytes, but .* gives \d+; {REBUILD}",
        ),
        (
            edit_shard(lambda c: c + c),
            BOTH,
            rf"{SHARD}: the shard has \d+ bytes, but .* gives \d+; {REBUILD}",
        ),
        (
            edit_shard(lambda c: c[: third(c)], agree=True),
            BOTH[:1],
            rf"00002\.parquet: record 1 \(sub-0004\) has .* not in {SHARD}; run beam-nifti",
        ),
        (without_index, BOTH[:1], r"train-00001-of-00002\.parquet: is missing; copy it again"),
        (swap_indexes, BOTH[:1], rf"00002\.parquet: is not the index of {SHARD}; run beam-nifti verify"),
    ],
)
def test_known_when_it_is_opened(
    dataset: Path, tmp_path: Path, damage: Damage, engines: tuple[Any, ...], message: str
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    damage(copy)
    for engine in engines:
        with pytest.raises(BeamNiftiError, match=message) as caught:
            load_dataset(copy, engine=engine)
        assert str(caught.value).startswith(str(copy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no split 'test'; the dataset has train"),
        ({"as_dict": True, "columns": ["agee"]}, "records have no column 'agee'; choose one of: .*affine"),
        ({"label": "agee"}, "label is 'agee'; the dataset has label"),
        ({"target": "mask"}, "has no masks; build it with --mask-column"),
    ],
)
@pytest.mark.parametrize("engine", BOTH)
def test_what_is_asked_and_is_not_there(
    dataset: Path, engine: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BeamNiftiError, match=message) as caught:
        load_dataset(dataset, engine=engine, **options)
    assert str(dataset) in str(caught.value)


NAMED = rf"{SHARD}: record 'sub-0004', number 1 from 0, cannot be read \(.*\); run beam-nifti verify"
UNREAD = rf"{SHARD}: record number 1 from 0, of 3 in .*, cannot be read; {REBUILD} run beam-nifti verify"


@pytest.mark.parametrize(
    ("damage", "engine", "message"),
    [
        (edit_shard(flip), "indexed", NAMED),
        (edit_shard(flip), "sequential", UNREAD),
        (
            edit_shard(lambda c: c[: third(c)], agree=True),
            "sequential",
            UNREAD,
        ),
        (
            edit_shard(lambda c: c + c[: third(c)], agree=True),
            "sequential",
            rf"{SHARD}: it has more records than the 3 in .*; {REBUILD} run beam-nifti verify",
        ),
        (
            lambda f: edit_index(f, set_cell("example_id", 1, "sub-0009"), 1),
            "indexed",
            "'sub-0009', number 1 from 0",
        ),
        (lambda f: edit_index(f, set_cell("offset", 1, 7), 1), "indexed", NAMED),
        (lambda f: edit_record(f, 1, lambda payload: payload[:-1], 1), "indexed", NAMED),
    ],
)
def test_known_when_it_is_read(
    dataset: Path, tmp_path: Path, damage: Damage, engine: Any, message: str
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    damage(copy)
    elements = load_dataset(copy, batch_size=2, engine=engine)
    with pytest.raises(tf.errors.OpError, match=message):
        list(elements)


def test_a_damaged_gzip_member_is_named_by_the_sequential_engine(tmp_path: Path) -> None:
    build(write_cohort(tmp_path / "cohort", 4, shape=(5, 4, 3)), tmp_path / "out", num_shards=2)
    shard = tmp_path / "out/train-00000-of-00002.tfrecord.gz"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(tf.errors.OpError, match=f"{shard}: record number 1 from 0, of 2 "):
        list(load_dataset(tmp_path / "out", engine="sequential"))


@pytest.mark.parametrize("engine", BOTH)
def test_a_shard_that_goes_missing_while_it_is_open(dataset: Path, tmp_path: Path, engine: Any) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    elements = load_dataset(copy, engine=engine)
    assert len(list(elements)) == 6
    (copy / SHARD).unlink()
    with pytest.raises(tf.errors.OpError, match=f"{copy / SHARD}.*No such file"):
        list(elements)


@pytest.mark.parametrize("engine", BOTH)
def test_control_characters_in_a_path_are_escaped(dataset: Path, tmp_path: Path, engine: Any) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "a\x1b[2J"))
    with (copy / SHARD).open("r+b") as handle:
        handle.write(b"\xff")
    with pytest.raises(tf.errors.OpError, match=rf"a\\+x1b\[2J/{SHARD}") as caught:
        list(load_dataset(copy, engine=engine))
    assert "\x1b" not in str(caught.value)


def test_a_url_of_tensorflow(dataset: Path) -> None:
    """One list of the folder says which shards are there, and reading that they are whole."""
    url = "ram://reader/errors"
    for path in (dataset / "dataset_info.json", *dataset.glob("*.tfrecord")):
        with tf.io.gfile.GFile(f"{url}/{path.name}", "wb") as handle:
            handle.write(path.read_bytes())
    elements = load_dataset(url, as_dict=True, columns=["id"], engine="sequential")
    assert sorted(e["id"].numpy() for e in elements) == [f"sub-000{i}".encode() for i in range(6)]
    with tf.io.gfile.GFile(f"{url}/{SHARD}", "wb") as handle:
        handle.write((dataset / SHARD).read_bytes() * 2)
    with pytest.raises(tf.errors.OpError, match=rf"{url}/{SHARD}: it has more records than the 3"):
        list(load_dataset(url))
    tf.io.gfile.remove(f"{url}/{SHARD}")
    with pytest.raises(BeamNiftiError, match=rf"{url}/{SHARD}: the shard is missing; {REBUILD} rebuild it"):
        load_dataset(url)
