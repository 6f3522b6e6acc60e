"""Which software wrote what: records of two versions are not mixed in one build, and verify knows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.config import RecordConfig
from beam_nifti.config import record as config_of_records
from beam_nifti.errors import OutputError, UsageError
from beam_nifti.inspection.record_checks import differ_in_rounding
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.build import open_build, run_build
from beam_nifti.record import versions
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import encode_tensor
from beam_nifti.record.index import read_index
from beam_nifti.volume.rescale import numpy_dtype
from tests.build_helpers import assert_complete, build, build_apart, make_config, make_options
from tests.datasets import manifest_of
from tests.images import name_of, write_cohort

COUNT = 10
SMALL: dict[str, Any] = {"examples_per_shard": 4, "unit_rows": 2}
NAMES = ["beam-nifti", "nibabel", "numpy", "scipy", "isal"]


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    """As if another version of a library were installed."""
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda n: version if n == name else real(n))


def made_by(output: Path, name: str = "numpy") -> list[list[str]]:
    """Versions of a library that wrote each shard."""
    facts = [read_index(str(output / s.index))[1] for s in read_info(str(output)).shards]
    return [[written[name] for written in json.loads(f["versions"])] for f in facts]


@pytest.fixture(scope="module")
def cohort12(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of twelve images, with a shorter one beside it; no test changes them."""
    manifest = write_cohort(tmp_path_factory.mktemp("cohort"), COUNT + 2)
    lines = manifest.read_text().splitlines()
    (manifest.parent / "short.tsv").write_text("\n".join(lines[: COUNT + 1]) + "\n")
    return manifest


@pytest.fixture
def short(cohort12: Path) -> Path:
    return cohort12.parent / "short.tsv"


def test_a_shard_names_the_versions_that_decide_its_bytes(short: Path, tmp_path: Path) -> None:
    build(short, tmp_path / "out", **SMALL)
    for shard in read_info(str(tmp_path / "out")).shards:
        (written,) = json.loads(read_index(str(tmp_path / "out" / shard.index))[1]["versions"])
        assert list(written) == NAMES
        assert written["numpy"] == np.__version__


@pytest.mark.parametrize("name", ["beam-nifti", "nibabel", "numpy", "scipy", "isal"])
def test_unfinished_work_of_other_versions_is_made_again(
    short: Path, tmp_path: Path, killed: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    output = Path(shutil.copytree(killed, tmp_path / "out"))
    was = versions.installed_version(name)
    pretend(monkeypatch, name, "9.9")
    with open_build(make_config(short, output, examples_per_shard=4)) as plan:
        assert not plan.earlier
    reason = f"of an unfinished build, built with other versions: {name} {was}, now 9.9"
    assert reason in caplog.text
    assert list(output.rglob("*.part")) == []
    assert list(output.glob("*.tfrecord.gz")) == []


@pytest.fixture(scope="module")
def killed(cohort12: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that was killed when it had parts and shards; no test changes it."""
    tmp = tmp_path_factory.mktemp("killed")
    short = cohort12.parent / "short.tsv"
    operations = build_apart(short, tmp / "whole", **SMALL).operations
    assert build_apart(short, tmp / "out", round(0.8 * operations), **SMALL).was_killed
    return tmp / "out"


def test_no_shard_has_records_of_two_versions_after_an_upgrade(
    short: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(killed, tmp_path / "out"))
    pretend(monkeypatch, "isal", "9.9")
    assert build(short, output, **SMALL).read == {name_of(i) for i in range(COUNT)}
    assert made_by(output, "isal") == [["9.9"]] * 3
    build(short, tmp_path / "fresh", **SMALL)
    assert_complete(output, tmp_path / "fresh")


def test_workers_take_no_parts_of_other_versions(
    short: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the command runs on one machine and its workers on others, which were upgraded."""
    output = Path(shutil.copytree(killed, tmp_path / "out"))
    with open_build(make_config(short, output, examples_per_shard=4)) as plan:
        assert plan.earlier
        pretend(monkeypatch, "scipy", "9.9")
        _, metrics = run_build(plan, make_options())
    assert metrics.counters.get("volumes-skipped", 0) == 0
    assert made_by(output, "scipy") == [["9.9"]] * 3


def test_a_published_dataset_is_kept_and_appended_to_after_an_upgrade(
    cohort12: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    build(short, output, **SMALL)
    pretend(monkeypatch, "numpy", "9.9")
    assert build(short, output, **SMALL).read == set()
    assert made_by(output) == [[np.__version__]] * 3
    assert build(cohort12, output, **SMALL).read == {name_of(COUNT), name_of(COUNT + 1)}
    assert made_by(output) == [[np.__version__]] * 2 + [[np.__version__, "9.9"]]
    assert read_info(str(output)).versions["numpy"] == "9.9"
    report = verify_dataset(str(output), manifest=manifest_of(output), deep=ALL)
    assert (report.problems, report.notes) == ((), ())


def test_another_revision_of_content_is_refused(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    build(short, output, **SMALL)
    before = RecordConfig().fingerprint
    monkeypatch.setattr(config_of_records, "CONTENT_REVISION", 2)
    assert RecordConfig().fingerprint != before
    with pytest.raises(
        OutputError, match="this version of beam-nifti makes different records from the same options"
    ):
        build(short, output, **SMALL)


def test_a_dataset_of_an_earlier_revision_of_content_is_verified(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    made = []
    for revision in (1, 2, 3):
        monkeypatch.setattr(config_of_records, "CONTENT_REVISION", revision)
        build(short, output / str(revision), **SMALL)
        made.append(read_info(str(output / str(revision))).config["fingerprint"])
    assert len(set(made)) == 3
    for revision in (1, 2, 3):
        assert verify_dataset(str(output / str(revision)), manifest=str(short)).problems == ()
    for revision in (1, 2):
        with pytest.raises(UsageError, match="by a version of beam-nifti that makes different records"):
            verify_dataset(str(output / str(revision)), manifest=str(short), deep=1)
    monkeypatch.setattr(config_of_records, "CONTENT_REVISION", 2)
    (problem,) = verify_dataset(str(output / "3")).problems
    assert "the fingerprint is" in problem


# verify --deep


@pytest.mark.parametrize(("name", "factor"), [("rounding", 1.00000001), ("damage", 1.001)])
def test_verify_tells_rounding_of_other_versions_from_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, factor: float
) -> None:
    """A function stands for a library that rounds otherwise from one version to the next."""
    (tmp_path / f"{name}_lab.py").write_text(
        "from dataclasses import replace\nfactor = 1.0\n"
        "def scale(volume):\n    return replace(volume, voxels=volume.voxels ** 1.0 * factor)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    manifest, output = write_cohort(tmp_path / "images", 3), tmp_path / "out"
    build(manifest, output, **SMALL, preprocess=f"{name}_lab:scale", rescale="window:0,5000")
    monkeypatch.setattr(f"{name}_lab.factor", factor)
    options = {"manifest": str(manifest), "preprocess": f"{name}_lab:scale"}
    report = verify_dataset(str(output), **options, deep=ALL)
    assert len(report.problems) == 3  # the same versions, the same bytes
    pretend(monkeypatch, "numpy", "9.9")
    report = verify_dataset(str(output), **options, deep=ALL)
    changes = f"numpy {np.__version__}, now 9.9"
    if name == "rounding":
        assert report.problems == ()
        (note,) = report.notes
        assert "3 records differ only by rounding from those rebuilt here" in note
        assert changes in note
    else:
        assert [changes in problem for problem in report.problems] == [True] * 3
        assert report.notes == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int16"])
def test_voxels_may_differ_by_one_step_of_their_dtype(dtype: str) -> None:
    voxels = np.linspace(0, 1 if dtype != "int16" else 900, 60).astype(numpy_dtype(dtype))
    if dtype == "uint8":
        voxels = np.arange(60, dtype=np.uint8)
    for steps in (1, 3):
        bits = voxels.view(f"u{voxels.itemsize}").copy()
        bits[30] += steps
        other = bits.view(voxels.dtype)
        records = ({"image_raw": memoryview(b"".join(encode_tensor(v)))} for v in (voxels, other))
        assert differ_in_rounding(*records, ["image_raw"]) == (steps == 1 and dtype != "int16")


def test_ids_labels_and_masks_do_not_differ_in_rounding() -> None:
    mask = np.ones(8, np.uint8)
    masks = ({"mask_raw": memoryview(b"".join(encode_tensor(m)))} for m in (mask, mask + 1))
    assert not differ_in_rounding(*masks, ["mask_raw"])
    assert not differ_in_rounding({"id": memoryview(b"a")}, {"id": memoryview(b"b")}, ["id"])
    one, other = {"label": np.array([1.0], np.float32)}, {"label": np.array([1.1], np.float32)}
    assert not differ_in_rounding(one, other, ["label"])
    assert not differ_in_rounding(one, {}, ["label"])
