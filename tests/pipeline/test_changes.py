"""What changes between two builds of one output is noticed, whatever it is."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apache_beam.pvalue import TaggedOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.errors import BeamNiftiError, OutputError, TooManyFailures, UsageError
from beam_nifti.inspection.verify import ALL, verify_dataset
from beam_nifti.pipeline.build import open_build
from beam_nifti.pipeline.parts import Part
from beam_nifti.pipeline.plan import BuildPlan, WorkUnit
from beam_nifti.pipeline.transforms import ReadUnitsFn, SkipFinished
from beam_nifti.record.example import encode_volume
from beam_nifti.record.index import read_index, row_cells
from beam_nifti.record.tfrecord import decode_record
from beam_nifti.storage import paths as storage
from beam_nifti.volume import load_volume, rescale_volume
from beam_nifti.volume.preprocess import prepare_volume
from tests.build_helpers import SHAPE, assert_complete, build, build_apart, make_config
from tests.datasets import info_of, manifest_of, set_times
from tests.images import brain, name_of, nifti_header, write_cohort, write_image, write_manifest

COLUMNS = {"path": "T1w,T2w", "mask": "mask"}
Rows = list[dict[str, Any]]


@dataclass
class Study:
    """A folder of images, their table, and the output that was built of them."""

    folder: Path
    rows: Rows
    options: dict[str, Any]

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "images").iterdir())

    def write(self) -> Path:
        return write_manifest(self.folder / "manifest.tsv", self.rows)

    def again(self) -> Study:
        """The study as it was built, in its place: in another one the images would be others."""
        shutil.rmtree(self.folder)
        shutil.copytree(f"{self.folder}-kept", self.folder)
        return Study(self.folder, [dict(row) for row in self.rows], dict(self.options))


def make_study(folder: Path) -> Study:
    """Five examples of two images and a mask; two first images are pairs, and one file is missing."""
    images, rows = folder / "images", []
    for i in range(5):
        named = {kind: f"images/{i}-{kind}.nii" for kind in ("T1w", "T2w", "mask", "mask2")}
        for number, path in enumerate(named.values()):
            write_image(folder / path, brain((4, 3, 2), seed=10 * i + number) % 200)
        cells = {"participant_id": f"sub-{i}", "label": i, "split": ("train", "test")[i % 2], "site": "A"}
        rows.append(cells | named)
    voxels = brain((4, 3, 2))
    for i in (0, 1):
        stem, header = images / f"{i}-T1w", {"magic": b"ni1", "vox_offset": 0}
        stem.with_suffix(".hdr").write_bytes(nifti_header(voxels, fields=header))
        stem.with_suffix(".img").write_bytes((voxels + np.int16(i)).tobytes(order="F"))
        stem.with_suffix(".nii").unlink()
        rows[i]["T1w"] = f"images/{i}-T1w.hdr"
    (images / "4-T2w.nii").unlink()
    set_times(images)
    return Study(folder, rows, {"columns": COLUMNS, "examples_per_shard": 2, "max_bad_fraction": 0.5})


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Study]:
    """A study whose dataset is published, and one whose build is unfinished."""
    made = {}
    for is_published in (True, False):
        study = made[is_published] = make_study(tmp_path_factory.mktemp("study"))
        allowed = {} if is_published else {"max_bad_fraction": 0.0}
        with contextlib.nullcontext() if is_published else pytest.raises(TooManyFailures):
            build(study.write(), study.output, **study.options | allowed)
        shutil.copytree(study.folder, f"{study.folder}-kept")
    return made


def kept_records(study: Study) -> dict[str, bool]:
    """By id, the records that a build would keep: whether they are what it would make."""
    config = make_config(study.write(), study.output, **study.options)
    with open_build(config) as plan:
        read = ReadUnitsFn(plan).process(plan.config.manifest)
        units = [unit for unit in read if isinstance(unit, WorkUnit)]
        skipping = SkipFinished(plan)
        return {
            example_id: is_right
            for unit in units
            for found in skipping.process(unit)
            if isinstance(found, TaggedOutput)
            for example_id, is_right in _compare(found.value[1], unit, plan).items()
        }


def _compare(part: Part, unit: WorkUnit, plan: BuildPlan) -> dict[str, bool]:
    record, folder = plan.config.record, storage.dirname(plan.config.manifest)
    cells = {c["position"]: c for c in read_index(part.index)[0].to_pylist()}
    data = Path(part.data).read_bytes()
    found = {}
    for row in (row for row in unit.rows if row.position in (part.positions or ())):
        start, length = (cells[row.position][name] for name in ("offset", "length"))
        stored = decode_record(data[start : start + length], record.compression == "gzip")
        try:
            volume = prepare_volume(load_volume(row, folder, record=record), record)
            is_right = bytes(encode_volume(rescale_volume(volume, record))) == stored
        except BeamNiftiError:
            is_right = False
        of_row = row_cells(row, plan.extra_columns)
        found[row.example_id] = is_right and of_row.items() <= cells[row.position].items()
    return found


# Every change, one at a time


def exchange(one: Path, other: Path) -> None:
    """What `mv` does: contents and times go together."""
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def _exchange(draw: st.DrawFn, study: Study) -> None:
    exchange(*draw(st.permutations(study.files).map(lambda files: files[:2])))


def _replace(draw: st.DrawFn, study: Study) -> None:
    """Another content of the same size, and perhaps of almost the same time."""
    path, later = draw(st.sampled_from(study.files)), draw(st.sampled_from([-3600, -1e-6, 1e-6, 1, 2]))
    data, time = bytearray(path.read_bytes()), path.stat().st_mtime
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (time + later, time + later))


def _grow(draw: st.DrawFn, study: Study) -> None:
    path = draw(st.sampled_from(study.files))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=times)


def _remove(draw: st.DrawFn, study: Study) -> None:
    draw(st.sampled_from(study.files)).unlink()


def _cell(draw: st.DrawFn, study: Study) -> None:
    row, column = draw(st.sampled_from(study.rows)), draw(st.sampled_from(list(study.rows[0])))
    row[column] = draw(st.sampled_from([*{r[column] for r in study.rows}, "B", "7"]))


def _row(draw: st.DrawFn, study: Study) -> None:
    rows, at = study.rows, draw(st.integers(0, 4))
    changes: list[Callable[[], object]] = [
        lambda: rows.pop(at),
        rows.reverse,
        lambda: rows.insert(at, rows.pop()),
        lambda: rows.append(rows[at] | {"participant_id": "new"}),
    ]
    draw(st.sampled_from(changes))()


def _column(draw: st.DrawFn, study: Study) -> None:
    names = draw(st.permutations(list(study.rows[0])))
    renamed = draw(st.sampled_from(["", *names]))
    study.rows[:] = [
        {(f"{name}_" if name == renamed else name): row[name] for name in names} for row in study.rows
    ]


OPTIONS: list[dict[str, Any]] = [
    *({"columns": COLUMNS | {"path": path}} for path in ("T2w,T1w", "T1w", "T2w,mask2")),
    *({"columns": COLUMNS | {"mask": mask}} for mask in ("mask2", None)),
    *({"columns": COLUMNS | change} for change in ({"id": "T2w"}, {"label": "label:class"})),
    *({"rescale": rescale} for rescale in ("zscore", "none", "percentile:1,99")),
    *({"orientation": "RAS"}, {"shape": (4, 4, 4)}, {"voxel_dtype": "float16"}, {"compression": "none"}),
    *({"shuffle_seed": 1}, {"examples_per_shard": 1}, {"mask_dtype": "uint16"}, {"compression_level": 1}),
    *({"allow_mixed_shapes": True}, {"max_bad_fraction": 0.5}, {"workers": 2}),
]


def _option(draw: st.DrawFn, study: Study) -> None:
    study.options.update(draw(st.sampled_from(OPTIONS)))


CHANGES = (_exchange, _replace, _grow, _remove, _cell, _row, _column, _option)


@pytest.mark.parametrize("is_published", [True, False])
@settings(max_examples=40)
@given(data=st.data())
def test_no_single_change_leaves_a_record_that_a_new_build_would_not_make(
    studies: Mapping[bool, Study], is_published: bool, data: st.DataObject
) -> None:
    """It is refused, or the record is made again: of any file, any row, any column and any option."""
    study, change = studies[is_published].again(), data.draw(st.sampled_from(CHANGES))
    change(data.draw, study)
    try:
        kept = kept_records(study)
    except BeamNiftiError:
        return
    assert all(kept.values()), (change.__name__, kept)


@pytest.mark.parametrize("is_published", [True, False])
def test_without_a_change_every_record_is_kept(studies: Mapping[bool, Study], is_published: bool) -> None:
    """Or the test above would show nothing."""
    kept = kept_records(studies[is_published].again())
    assert kept == dict.fromkeys(("sub-0", "sub-1", "sub-2", "sub-3"), True)


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (("1-T1w.hdr", "0-T1w.hdr"), {0, 1}),
        (("1-T1w.img", "0-T1w.img"), {0, 1}),
        (("2-T1w.nii", "2-mask.nii"), {2}),
        (("2-T1w.nii", "2-T2w.nii"), {2}),
        (("2-T1w.nii", "3-T1w.nii"), {2, 3}),
        (("2-mask.nii", "3-mask.nii"), {2, 3}),
        (("0-T1w.img", "3-T2w.nii"), {0, 3}),
    ],
)
def test_an_exchange_of_two_files_is_noticed(
    studies: Mapping[bool, Study], names: tuple[str, str], lost: set[int]
) -> None:
    study = studies[True].again()
    one, other = (study.folder / "images" / name for name in names)
    exchange(one, other)
    assert set(kept_records(study)) == {f"sub-{i}" for i in range(4)} - {f"sub-{i}" for i in lost}


# What cannot be noticed, and --recheck


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The manifest of images that the test may change."""
    return write_cohort(tmp_path / "own", 6, shape=SHAPE)


def change_unnoticed(path: Path) -> None:
    """Replace an image by another one of the same size and time."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    size = path.stat().st_size
    write_image(path, brain(SHAPE, seed=99))
    data = path.read_bytes()
    path.write_bytes(data[:size] + bytes(size - len(data)))
    os.utime(path, ns=times)


def identities(output: Path) -> list[tuple[str, int]]:
    return [(s.name, (output / s.name).stat().st_ino) for s in info_of(output).shards]


def as_nii(manifest: Path) -> Path:
    """The same cohort uncompressed: all images have one size."""
    for path in manifest.parent.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    manifest.write_text(manifest.read_text().replace(".nii.gz", ".nii"))
    return manifest


def test_a_file_of_the_same_size_that_is_half_a_microsecond_younger_is_noticed(
    own: Path, tmp_path: Path
) -> None:
    manifest, output = as_nii(own), tmp_path / "out"
    image = own.parent / "sub-0003.nii"
    build(manifest, output)
    times = image.stat()
    change_unnoticed(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns + 500))
    assert build(manifest, output).read == {image.name}


def test_a_manifest_of_another_name_with_equal_rows_changes_nothing(own: Path, tmp_path: Path) -> None:
    build(own, tmp_path / "out")
    before = (tmp_path / "out/dataset_info.json").read_bytes()
    again = build(own.rename(own.with_name("renamed.tsv")), tmp_path / "out")
    assert again.read == frozenset()
    assert (tmp_path / "out/dataset_info.json").read_bytes() == before


def test_recheck_replaces_what_differs_and_keeps_the_rest(own: Path, tmp_path: Path) -> None:
    manifest, output = as_nii(own), tmp_path / "out"
    build(manifest, output, examples_per_shard=2)
    before = identities(output)
    change_unnoticed(own.parent / "sub-0003.nii")
    assert build(manifest, output, examples_per_shard=2).read == frozenset()
    (problem,) = verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems
    assert " in image_raw" in problem
    assert "--recheck" in problem
    again = build(manifest, output, examples_per_shard=2, recheck=True)
    assert len(again.read) == 6
    assert (again.counters["examples-compared"], again.counters["examples-differing"]) == (6, 1)
    after = identities(output)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems == ()
    build(manifest, tmp_path / "fresh", examples_per_shard=2)
    assert_complete(output, tmp_path / "fresh")
    build(manifest, output, examples_per_shard=2, recheck=True)
    assert identities(output) == after
    assert info_of(output).revision == 2


def test_recheck_replaces_a_damaged_shard(own: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    output = tmp_path / "out"
    build(own, output, examples_per_shard=2)
    shard = output / info_of(output).shards[1].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert build(own, output, examples_per_shard=2).read == frozenset()
    said = run("build", own, output, "--recheck", "--workers=1")
    assert "\ncompared 6 examples with their images: 1 differs, rebuilt\n" in f"\n{said}"
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems == ()
    said = run("build", own, output, "--recheck", "--workers=1")
    assert "\ncompared 6 examples with their images: none differs\n" in f"\n{said}"
    (output / info_of(output).shards[0].name).unlink()
    said = run("build", own, output, "--recheck", "--workers=1")
    assert "\ncompared 6 examples with their images: 2 differ, rebuilt\n" in f"\n{said}"
    more = write_cohort(own.parent, 7, shape=SHAPE)
    said = run("build", more, output, "--recheck", "--workers=1")
    assert "\ncompared 6 examples with their images: none differs\n" in f"\n{said}"
    assert "compared" not in run("build", more, output, "--workers=1")


def test_no_records_of_a_damaged_shard_are_copied(own: Path, tmp_path: Path) -> None:
    """Their copies would be in a shard with a sha256 that matches."""
    output = tmp_path / "out"
    build(own, output, examples_per_shard=4)
    shard = output / info_of(output).shards[1].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    write_image(own.parent / name_of(6), brain(SHAPE, seed=6))
    last = own.read_text().splitlines()[-1]
    own.write_text(own.read_text() + last.replace("0005", "0006") + "\n")
    with pytest.raises(OutputError, match=rf"{shard.name}: is damaged, so no records .* use --recheck"):
        build(own, output, examples_per_shard=4)
    build(own, output, examples_per_shard=4, recheck=True)
    assert verify_dataset(str(output), manifest=manifest_of(output), deep=ALL).problems == ()


def test_recheck_reports_what_differs_also_where_images_fail(
    own: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    manifest, output = as_nii(own), tmp_path / "out"
    build(manifest, output, examples_per_shard=2)
    change_unnoticed(own.parent / "sub-0003.nii")
    (own.parent / "sub-0004.nii").unlink()
    again = ("build", manifest, output, "--examples-per-shard=2", "--recheck", "--workers=1")
    said = run(*again, code=1)
    assert "\ncompared 5 examples with their images: 1 differs\n" in f"\n{said}"
    assert "the dataset is unchanged" in said
    said = run(*again, "--max-bad-fraction=0.5")
    assert "\ncompared 5 examples with their images: 1 differs, rebuilt\n" in f"\n{said}"


def test_a_recheck_that_is_killed_continues(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options: dict[str, Any] = {"examples_per_shard": 2, "unit_rows": 1, "recheck": True}
    build(own, output, examples_per_shard=2)
    before, undisturbed = identities(output), tmp_path / "undisturbed"
    shutil.copytree(output, undisturbed)
    operations = build_apart(own, undisturbed, **options).operations
    killed = build_apart(own, output, operations // 2, **options)
    assert killed.was_killed
    again = build_apart(own, output, **options)
    assert len(again.read) < 6
    assert identities(output) == before
    assert_complete(output, undisturbed)


def test_recheck_uses_nothing_of_another_build(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (own.parent / name_of(5)).rename(tmp_path / "away")
    with pytest.raises(TooManyFailures):
        build(own, output)
    (tmp_path / "away").rename(own.parent / name_of(5))
    assert len(build(own, output, recheck=True).read) == 6


def test_recheck_beside_overwrite_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--overwrite already rebuilds every record; drop --recheck"):
        make_config(own, tmp_path / "out", recheck=True, overwrite=True)
