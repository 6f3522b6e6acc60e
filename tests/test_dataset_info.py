"""dataset_info.json: what this version does not know is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from beam_nifti.config import BuildConfig
from beam_nifti.dataset_info import DatasetInfo
from beam_nifti.errors import DatasetError

INFO = DatasetInfo(
    config=BuildConfig("m.tsv", "out").as_dataset_config() | {"fingerprint": "x"},
    manifest={"path": "m.tsv", "num_rows": 0, "digest": "", "columns": ["path"]},
    shape=(1, 1, 1),
    dtype="float32",
    labelled=False,
    features={},
    splits={},
)


def parse(**changes: Any) -> DatasetInfo:
    return DatasetInfo.from_json(json.dumps(json.loads(INFO.to_json()) | changes), "info")


def test_it_comes_back() -> None:
    assert parse() == INFO
    assert json.loads(INFO.to_json())["format_version"] == 2
    assert json.loads(INFO.to_json())["format_features"] == ["sources"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_features": ["sources", "members"]},
            "the format feature 'members', which .* install a newer",
        ),
        ({"format_features": ["members"], "tiles": 1}, "the format feature 'members'"),
        (
            {"format_version": 3, "tiles": 1},
            "format version 3; this beam_nifti reads up to 2: install a newer",
        ),
        ({"label_columns": {}}, "a key 'label_columns', which format version 2 does not have"),
        ({"config": dict(INFO.config) | {"recale": "none"}}, "a key 'recale', which format version 2"),
        ({"format_version": 1}, "a key 'failures', which format version 1 does not have"),
        ({"failures": "../../secret"}, "failures is '../../secret', which names no list of failures"),
        ({"failures": 3}, "info: not a dataset's info"),
    ],
)
def test_what_is_not_known_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse(**changes)
