"""dataset_info.json: what this version does not know, and what no build writes, is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.config import BuildConfig, Sharding
from beam_nifti.errors import DatasetError
from beam_nifti.record import dataset_files
from beam_nifti.record.dataset_info import DatasetInfo, ShardInfo, SplitInfo, content_digest, read_info

SHARD = ShardInfo(
    "train-00000-of-00001.tfrecord", "index/train-00000-of-00001.parquet", 2, 800, "a" * 64, "b" * 64
)
CONFIG = BuildConfig("m.tsv", "out", sharding=Sharding(2))
INFO = DatasetInfo(
    config=BuildConfig("m.tsv", "out", sharding=Sharding(2)).as_dataset_config()
    | {"fingerprint": "0" * 16, "compression": "none"},
    manifest={"path": "m.tsv", "num_rows": 3, "digest": "", "columns": ["path"]},
    shape=(1, 2, 3),
    dtype="float32",
    labelled=False,
    features={"image_raw": "bytes"},
    splits={"train": SplitInfo((SHARD,))},
    num_failures=1,
    failures="failures.jsonl",
    failures_sha256="c" * 64,
)


def parse(**changes: Any) -> DatasetInfo:
    facts = json.loads(INFO.to_json()) | changes
    return DatasetInfo.from_json(json.dumps(facts | {"digest": content_digest(facts)}), "info")


def with_shard(**changes: Any) -> dict[str, Any]:
    shard = vars(SHARD) | changes
    sums = {key: shard[key] for key in ("num_examples", "num_bytes")}
    return {"splits": {"train": {**sums, "shards": [shard]}}}


def with_config(**changes: Any) -> dict[str, Any]:
    return {"config": dict(INFO.config) | changes}


def with_manifest(**changes: Any) -> dict[str, Any]:
    return {"manifest": dict(INFO.manifest) | changes}


def test_it_is_shown_in_one_line() -> None:
    assert repr(INFO) == "<DatasetInfo: train 2; 1×2×3 float32, revision 1>"


def test_it_comes_back() -> None:
    assert parse() == INFO
    facts = json.loads(INFO.to_json())
    assert facts["format_version"] == 2
    assert facts["format_features"] == ["sources", "digests", "members", "positions"]
    assert facts["digest"] == content_digest(facts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_features": ["sources", "digests", "tiles"]},
            "the format feature 'tiles', which .* install a newer",
        ),
        ({"format_features": ["tiles"], "tiles": 1}, "the format feature 'tiles'"),
        ({"format_features": ["members"]}, r"format_features is \['members'\], expected"),
        ({"format_features": ["sources"]}, r"format_features is \['sources'\], expected"),
        (
            {"format_version": 3, "tiles": 1},
            "format version 3; this beam_nifti reads up to 2: install a newer",
        ),
        ({"format_version": 0}, "format_version is 0"),
        ({"format_version": True}, "format_version is True, expected a whole number"),
        ({"format_version": "2"}, "format_version is '2', expected a whole number"),
        ({"label_columns": {}}, "has a key 'label_columns' that this format does not have"),
        (with_config(recale="none"), "config has a key 'recale' that"),
        (with_manifest(rows=1), "manifest has a key 'rows' that"),
        ({"format_version": 1}, "a key '(digest|failures|failures_sha256)' that this format does not have"),
        ({"failures": "../../secret"}, "failures is '../../secret', which names no list of failures"),
        ({"failures": "failures-r2.jsonl"}, "failures is 'failures-r2.jsonl', which names no list"),
        ({"failures": 3}, "info: not a dataset's info: failures is 3, expected text"),
        ({"failures_sha256": None}, "failures is 'failures.jsonl', but failures_sha256 is None"),
        ({"shape": "large"}, "shape is 'large', expected a list"),
        ({"shape": [1, 2]}, r"shape is \[1, 2\]"),
        ({"shape": [1 << 20, 1 << 20, 2]}, "shape is .*expected the numbers of voxels"),
        ({"shape": [1, 2, 10**30]}, "shape is"),
        ({"shape": [1, 2, 0]}, "shape is"),
        ({"dtype": "object"}, "dtype is 'object', expected one of float32"),
        ({"labelled": 1}, "labelled is 1, expected true or false"),
        ({"features": {"image_raw": "float[99999999]"}}, r"features.image_raw is 'float\[99999999\]'"),
        ({"features": {}}, "features has no image_raw"),
        ({"revision": 10**12}, "revision is 1000000000000"),
        ({"num_failures": -1}, "num_failures is -1"),
        ({"versions": {"numpy": 2}}, "versions.numpy is 2, expected text"),
        ({"mask_labels": [0, 1]}, "mask_labels are given, but the records have no masks"),
        ({"labels": {"age": {"kind": "float"}}}, "labels are age:float, but the columns are ''"),
        ({"labels": {"age": {"kind": "class"}}}, "labels.age is"),
        ({"splits": {}}, "names no shards"),
        ({"splits": {"../train": {}}}, r"splits has the name '\.\./train'"),
        ({"splits": {"train": []}}, r"splits.train is \[\], expected an object"),
        (with_shard(name="/dev/zero"), "shard 0 of split train is /dev/zero with"),
        (with_shard(name="../train-00000-of-00001.tfrecord"), "shard 0 of split train is ../train"),
        (with_shard(name="http://host/train-00000-of-00001.tfrecord"), "shard 0 of split train is http:"),
        (with_shard(name="train-00000-of-00001-r02.tfrecord"), "shard 0 of split train is train-00000"),
        (with_shard(name="train-٠0000-of-00001.tfrecord"), "shard 0 of split train is"),
        (with_shard(index="index/../../train-00000-of-00001.parquet"), "shard 0 of split train is"),
        (with_shard(index="/dev/zero"), "with /dev/zero, expected"),
        (
            with_shard(
                name="train-00000-of-00001-r2.tfrecord", index="index/train-00000-of-00001-r2.parquet"
            ),
            "names train-00000-of-00001-r2.tfrecord, but is revision 1",
        ),
        (with_shard(sha256="A" * 64), "sha256 of train-00000-of-00001.tfrecord is 'AAA"),
        (with_shard(num_examples=10**12), "has 1000000000000 examples in 800 bytes"),
        (with_shard(num_bytes=1 << 70), "examples in 1180591620717411303424 bytes"),
        (with_config(rescale="quantile"), "--rescale is 'quantile'"),
        (with_config(spacing=[1, 1]), "config.spacing has 2 values, expected 3"),
        (with_config(columns={"age": 1}), "config.columns has a key 'age'"),
        (with_config(sharding=None), "names no shards, or config.sharding is null"),
        (with_config(sharding={"num_shards": 0, "examples_per_shard": None}), "--num-shards is 0"),
        (
            with_config(sharding={"num_shards": None, "examples_per_shard": 1}),
            "split train has 1 shards, expected 2 to 3 for its 2 examples by config.sharding",
        ),
        ({"dtype": "uint8"}, "dtype is 'uint8', but config.voxel_dtype 'float32'"),
        ({"labels": {"a": {"kind": "class", "classes": ["x", "x"]}}}, "labels.a.classes has a class twice"),
        (with_config(fingerprint="../.."), "config.fingerprint is '../..', expected 16 hex digits"),
        (with_config(compression="gzip"), "is revision 1 with compression gzip"),
        (with_config(frames="each"), "manifest.num_frames is None, but config.frames is 'each'"),
        (with_manifest(num_rows=1.5), "manifest.num_rows is 1.5, expected a whole number"),
        (with_manifest(num_frames=4), "manifest.num_frames is 4, but config.frames is None"),
        (with_manifest(columns=["a", 1]), r"manifest.columns\[1\] is 1, expected text"),
    ],
)
def test_what_no_build_writes_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        parse(**changes)
    assert str(caught.value).startswith("info: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"format_version": 2, "format_version": 2}', "has the key 'format_version' twice"),
        (b'{"format_version": NaN}', "holds NaN"),
        (b'{"format_version": 1e999}', "holds 1e999"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "4300 digits"),
        (b"[]", r"it is \[\], expected an object"),
        (b"\xff", "can't decode byte 0xff"),
        ('{"format_version": 2}'.encode("utf-16"), "can't decode byte"),
        (b'{"format_version": 1}', "lacks the key"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_named(content: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=f"^info: not a dataset's info: .*{message}"):
        DatasetInfo.from_json(content, "info")


def test_lone_surrogates_are_no_text() -> None:
    with pytest.raises(DatasetError, match=r"manifest.path is .*, which is not Unicode text"):
        parse(**with_manifest(path="\ud800"))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text(INFO.to_json())
    assert read_info(str(tmp_path)) == INFO
    monkeypatch.setattr(dataset_files, "MAX_INFO_BYTES", 100)
    with pytest.raises(DatasetError, match=r"dataset_info.json: has more than the 100 bytes"):
        read_info(str(tmp_path))


TEXT = INFO.to_json()


@settings(max_examples=200)
@given(st.integers(0, len(TEXT) - 1), st.sampled_from('0123456789abcdefxX"{}[],:. '))
def test_a_changed_character_is_found(at: int, character: str) -> None:
    """Whatever it says then, the digest is of what it said."""
    changed = TEXT[:at] + character + TEXT[at + 1 :]
    try:
        same = json.loads(changed) == json.loads(TEXT)
    except ValueError:
        same = False
    if same:
        assert DatasetInfo.from_json(changed, "info") == INFO
    else:
        with pytest.raises(DatasetError, match=r"^info: "):
            DatasetInfo.from_json(changed, "info")


STATEMENT: dict[str, Any] = {
    "revision": 2,
    "time": "2026-03-01T12:00:00Z",
    "num_people": 1,
    "num_rows": 2,
    "num_examples": 1,
    "num_failures": 1,
    "info_sha256": "a" * 64,
    "shards": [{"name": "train-00000-of-00001.tfrecord.gz", "sha256": "b" * 64}],
}


def with_withdrawals(*withdrawals: Any, withdrawn: Any = ("c" * 32,)) -> dict[str, Any]:
    return {"revision": 3, "withdrawn": list(withdrawn), "withdrawals": list(withdrawals)}


def test_withdrawals_come_back_and_are_absent_without_one() -> None:
    info = parse(**with_withdrawals(STATEMENT))
    assert DatasetInfo.from_json(info.to_json(), "x") == info
    assert json.loads(info.to_json())["withdrawals"] == [STATEMENT]
    assert not {"withdrawn", "withdrawals"} & json.loads(INFO.to_json()).keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_withdrawals(), "withdrawn has 1 participants, but withdrawals have 0"),
        (with_withdrawals(STATEMENT, withdrawn=()), "withdrawn has 0 participants, but withdrawals have 1"),
        (with_withdrawals(STATEMENT, withdrawn=["p1"]), "withdrawn has 'p1', expected 32 hex digits"),
        (with_withdrawals(STATEMENT, withdrawn="c"), "withdrawn has 'c', expected 32 hex digits"),
        (with_withdrawals(STATEMENT, withdrawn=[5]), r"withdrawn\[0\] is 5, expected text"),
        (with_withdrawals([]), r"withdrawals\[0\] is \[\], expected an object"),
        (with_withdrawals(STATEMENT | {"name": "p1"}), "has a key 'name' that this format does not have"),
        (with_withdrawals(STATEMENT | {"revision": 1}), "withdrawals has the revision 1 after 1"),
        (with_withdrawals(STATEMENT | {"revision": 4}), "withdrawals has the revision 4 after 1"),
        (
            with_withdrawals(STATEMENT | {"num_people": 0}),
            "withdrawn has 1 participants, but withdrawals have",
        ),
        (with_withdrawals(STATEMENT | {"num_rows": -1}), "has counts that none can have"),
        (with_withdrawals(STATEMENT | {"time": "today"}), "does not match format"),
        (with_withdrawals(STATEMENT | {"info_sha256": "a"}), "has the sha256 'a', expected 64 hex digits"),
        (
            with_withdrawals(STATEMENT | {"shards": [{"name": "../x", "sha256": "b" * 64}]}),
            "names '../x', wh",
        ),
    ],
)
def test_withdrawals_of_others_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse(**changes)
