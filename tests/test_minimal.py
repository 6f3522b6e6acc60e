from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beam_nifti.config import BuildConfig, RecordConfig, Sharding
from pipelines import minimal
from tests.build_helpers import stray_files
from tests.datasets import records_of

Flags = Callable[..., list[str]]


def test_records_are_those_of_build(
    cohort: Path, tmp_path: Path, local_flags: Flags, build: Callable[..., Any]
) -> None:
    record = RecordConfig(rescale="zscore")
    build(BuildConfig(str(cohort), str(tmp_path / "built"), record, sharding=Sharding(num_shards=1)))

    minimal.main([str(cohort), str(tmp_path / "out"), *local_flags(2)])

    ours, theirs = ([payload for _, payload in records_of(tmp_path / name)] for name in ("out", "built"))
    assert ours == theirs
    assert stray_files(tmp_path / "out") == set()


def test_a_broken_image_fails_the_pipeline(cohort: Path, tmp_path: Path, local_flags: Flags) -> None:
    broken = cohort.parent / "sub-0007.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-20])

    with pytest.raises(Exception, match=r"sub-0007\.nii\.gz: truncated gzip stream"):
        minimal.main([str(cohort), str(tmp_path / "out"), *local_flags()])

    assert not (tmp_path / "out" / "dataset_info.json").exists()
