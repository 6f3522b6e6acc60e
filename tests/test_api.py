"""The functions of `import beam_nifti`: each does what its command does, wherever Python runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from apache_beam.runners.direct import DirectRunner
from apache_beam.utils import interactive_utils

import beam_nifti as bn
from beam_nifti.cli import main as cli
from beam_nifti.inspection.diff import diff_as_json
from beam_nifti.manifest.in_memory import NAME, parquet_of
from beam_nifti.pipeline.beam_flags import flags_of
from beam_nifti.pipeline.build import open_build
from beam_nifti.pipeline.configure import make_config
from beam_nifti.pipeline.runners import Engine
from beam_nifti.pipeline.watcher import Watcher
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.support.process import count_cores
from tests.build_helpers import stray_files
from tests.images import write_cohort, write_image
from tests.user_functions import fail_as_named, scale

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a cohort of six images and its manifest.tsv."""
    write_cohort(tmp_path, 6, split=["train", "train", "test"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort as that of `folder`, with a dataset `out` and another one, `other`; only to be copied."""
    made = tmp_path_factory.mktemp("datasets")
    manifest = write_cohort(made, 6, split=["train", "train", "test"])
    bn.build(manifest, made / "out", progress=False)
    bn.build(manifest, made / "other", rescale="zscore", progress=False)
    return made


@pytest.fixture
def built(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of `datasets`."""
    shutil.copytree(datasets, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digests(info: DatasetInfo) -> list[tuple[str, str, str]]:
    return [(shard.name, shard.sha256, shard.index_sha256) for shard in info.shards]


def frame() -> pd.DataFrame:
    return pd.read_csv("manifest.tsv", sep="\t")


# A command and its call


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        ("--num-shards=2 --shuffle-seed=7 --workers=2", {"num_shards": 2, "shuffle_seed": 7, "workers": 2}),
        (
            "--rescale=percentile:1,99 --clip --orientation=RAS --spacing=3,3,3 --shape=4,4,4",
            {
                "rescale": bn.Percentile(1, 99),
                "clip": True,
                "orientation": "RAS",
                "spacing": 3.0,
                "shape": np.array([4, 4, 4]),
            },
        ),
        (
            "--label-column=age:float --rescale=window:0,900 --voxel-dtype=float16 --compression=none",
            {
                "label_column": ["age:float"],
                "rescale": ("window", np.float32(0), np.int16(900)),
                "voxel_dtype": "float16",
                "compression": "none",
            },
        ),
        (
            "--preprocess=tests.user_functions:scale(by=(2,0.5)) --max-bad-fraction=0.5",
            {"preprocess": partial(scale, by=(2, 0.5)), "max_bad_fraction": np.float64(0.5)},
        ),
    ],
    ids=["defaults", "shards", "prepared", "window", "function"],
)
def test_build_builds_what_the_command_builds(folder: Path, flags: str, options: dict[str, Any]) -> None:
    assert cli.main(["build", "manifest.tsv", "by_command", "--quiet", *flags.split()]) == cli.SUCCESS
    info = bn.build("manifest.tsv", folder / "by_call", progress=False, **options)
    wanted = read_info("by_command")
    assert info == read_info("by_call") == wanted
    assert digests(info) == digests(wanted)


def test_a_build_like_another_takes_its_options_and_those_of_a_file(built: Path) -> None:
    Path("options.toml").write_text("num-shards = 2\nshuffle_seed = 3\n")
    flags = ["--like=other", "--config=options.toml", "--shuffle-seed=4", "--quiet"]
    assert cli.main(["build", "manifest.tsv", "by_command", *flags]) == cli.SUCCESS
    info = bn.build("manifest.tsv", "by_call", like="other", config="options.toml", shuffle_seed=4)
    assert info.config["rescale"] == "zscore"
    assert digests(info) == digests(read_info("by_command"))


def test_the_dataset_of_like_is_reached_as_the_flags_of_its_store_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import S3Options

    from tests.object_store import MemoryFileSystem

    given = list[Any]()
    monkeypatch.setattr(FileSystems, "_pipeline_options", None)
    monkeypatch.setattr(
        MemoryFileSystem, "__init__", lambda _, pipeline_options: given.append(pipeline_options)
    )
    flags = ["--s3_endpoint_url=http://store"]
    with pytest.raises(bn.DatasetError, match="no complete dataset"):
        bn.check("manifest.tsv", like="memory://lab/dataset", pipeline_options=flags, progress=False)
    assert given[0].view_as(S3Options).s3_endpoint_url == "http://store"


def test_a_file_of_options_may_state_the_number_of_cores(folder: Path) -> None:
    Path("options.toml").write_text(f"workers = {count_cores()}\n")
    engines = list[Engine]()

    class Noting(Watcher):
        def on_engine(self, engine: Engine) -> None:
            engines.append(engine)

    flags, watcher = ["--direct_num_workers=1"], Noting(has_progress=False)
    bn.check("manifest.tsv", pipeline_options=flags, progress=watcher, config="options.toml")
    bn.check("manifest.tsv", pipeline_options=flags, progress=watcher)
    assert [engine.config.workers for engine in engines] == [count_cores(), 1]


def test_the_log_names_parameters(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "out/.build").mkdir(parents=True)
    (folder / "out/.build/plan.json").touch()
    bn.build("manifest.tsv", "out", overwrite=True, progress=False)
    assert "or use overwrite=True to discard the unfinished build" in caplog.text


def test_a_dry_run_tells_what_would_be_built_and_writes_nothing(folder: Path) -> None:
    before = set(folder.rglob("*"))
    planned = bn.build("manifest.tsv", "out", dry_run=True)
    assert (planned.shape, planned.splits, set(folder.rglob("*"))) == ((6, 5, 4), {}, before)
    info = bn.build("manifest.tsv", "out", progress=False)
    assert (info.config, info.manifest) == (planned.config, planned.manifest)


def test_check_finds_what_the_command_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sub-0001.nii.gz").write_bytes(b"no image")
    assert cli.main(["check", "manifest.tsv", "--json", "--quiet"]) == cli.FAILED
    survey = bn.check("manifest.tsv", out="check.json", progress=False)
    document = json.loads(capsys.readouterr().out)
    assert dict(survey) == document == json.loads(Path("check.json").read_text())
    assert not survey
    assert survey.problems[0].startswith("row 2 (sub-0001): ")
    assert bn.check(frame(), progress=False, max_bad_fraction=0.5)


def test_verify_finds_what_the_command_finds(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = bn.verify("out", manifest="manifest.tsv", deep=np.int64(2), workers=1, progress=False)
    assert whole
    assert (whole.num_examples, whole.num_deep, whole.problems) == (6, 2, ())
    shard = built / "out" / read_info("out").shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = bn.verify(built / "out", manifest=frame(), deep="all", progress=False)
    assert not damaged
    assert cli.main(["verify", "out", "--manifest=manifest.tsv", "--deep=all", "--quiet"]) == cli.FAILED
    assert list(damaged.problems) == capsys.readouterr().err.splitlines()
    assert str(damaged).splitlines() == [repr(damaged), *(f"  {problem}" for problem in damaged.problems)]


def test_verify_runs_the_functions_that_are_named(folder: Path) -> None:
    bn.build("manifest.tsv", "out", preprocess=[scale, partial(scale, by=[3])], progress=False)
    steps = ["tests.user_functions:scale", "tests.user_functions:scale(by=[3])"]
    assert bn.verify("out", manifest="manifest.tsv", deep=1, preprocess=steps, progress=False)
    with pytest.raises(bn.UsageError, match="runs only a function that you name"):
        bn.verify("out", manifest="manifest.tsv", deep=1, progress=False)


def test_inspect_and_diff_give_the_documents_of_the_commands(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def document(*arguments: str, code: int = cli.SUCCESS) -> Any:
        assert cli.main([*arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    assert dict(bn.inspect("out")) == document("inspect", "out")
    assert dict(bn.inspect("out", "sub-0004")) == document("inspect", "out", "--record=sub-0004")
    difference = bn.diff("out", "other")
    assert json.loads(json.dumps(diff_as_json(difference))) == document("diff", "out", "other", code=1)
    assert difference
    assert not bn.diff("out", "out")


@pytest.mark.parametrize("shape", [(6, 5, 4), (1, 40_000, 2)])  # of NIfTI-1 and NIfTI-2
@pytest.mark.parametrize("dtype", ["float32", "native"])
def test_extract_gives_the_image_that_the_command_writes(
    folder: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    import nibabel as nib

    voxels = np.arange(np.prod(shape)).astype(np.int16).reshape(shape)
    write_image(folder / "sub-0000.nii.gz", voxels, version=2, slope=0.5, inter=3)
    bn.build([{"path": "sub-0000.nii.gz", "label": 1}], "out", voxel_dtype=dtype, progress=False)
    image = bn.extract("out", "sub-0000.nii.gz").to_nibabel()
    assert cli.main(["extract", "out", "--id=sub-0000.nii.gz", "--out=by_command.nii"]) == cli.SUCCESS
    written = nib.load("by_command.nii")
    assert type(image) is type(written)
    assert image.header == written.header
    assert np.array_equal(image.get_fdata(), written.get_fdata())
    assert np.allclose(image.get_fdata(), 0.5 * voxels.astype(float) + 3, rtol=0, atol=1e-2)


def test_report_makes_the_page_of_the_command(built: Path) -> None:
    summary = bn.report("out", built / "by_call.html", pictures=np.int8(3), progress=False)
    assert cli.main(["report", "out", "--out=by_command.html", "--pictures=3", "--quiet"]) == cli.SUCCESS
    assert Path("by_call.html").read_bytes() == Path("by_command.html").read_bytes()
    assert (summary.num_examples, summary.problems) == (6, ())


def test_every_result_is_shown_on_a_line(built: Path) -> None:
    results = [
        bn.build("manifest.tsv", "out", progress=False),
        bn.check("manifest.tsv", progress=False),
        bn.verify("out", progress=False),
        bn.inspect("out"),
        bn.inspect("out", "sub-0000"),
        bn.diff("out", "other"),
        bn.extract("out", "sub-0000"),
        bn.report("out", "page.html", progress=False),
    ]
    for result in results:
        assert type(result).__name__ in repr(result)
        assert len(repr(result)) < 200
        assert "\n" not in repr(result)
    assert "6×5×4 float32" in repr(results[6])
    assert "examples      6 in" in str(results[3])


# Tables in the place of a manifest


def rows() -> list[dict[str, Any]]:
    return frame().to_dict("records")


TABLES: Mapping[str, Callable[[], Any]] = {
    "DataFrame": frame,
    "filtered DataFrame": lambda: pd.concat([frame(), frame()]).iloc[6:],
    "Arrow table": lambda: pa.Table.from_pandas(frame()),
    "Arrow batch": lambda: pa.RecordBatch.from_pandas(frame()),
    "dicts": rows,
    "generator of dicts": lambda: (row for row in rows()),
    "Paths and numpy scalars": lambda: [
        {**row, "path": Path(row["path"]), "label": np.int16(row["label"]), "age": np.float32(row["age"])}
        for row in rows()
    ],
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_built_as_the_same_table_in_a_file(folder: Path, kind: str) -> None:
    wanted = bn.build("manifest.tsv", "from_file", num_shards=2, progress=False)
    info = bn.build(TABLES[kind](), "from_table", num_shards=2, progress=False)
    assert digests(info) == digests(wanted)
    assert info.manifest | {"path": ""} == wanted.manifest | {"path": ""}
    assert info.manifest["path"] == f"{folder}/{NAME}"
    assert stray_files(folder / "from_table") == set()


def test_a_build_logs_what_is_kept_and_built(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "beam_nifti")
    (folder / "sub-0004.nii.gz").rename("away")
    bn.build(frame(), "out", max_bad_fraction=0.5, num_shards=1, progress=False)
    Path("away").rename("sub-0004.nii.gz")
    bn.build(frame(), "out", max_bad_fraction=0.5, num_shards=1, dry_run=True)
    bn.build(frame(), "out", max_bad_fraction=0.5, num_shards=1, progress=False)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        "kept 0 and built 5 examples; 1 failed",
        "would keep 5 and build 1 examples",
        "kept 5 and built 1 examples; 0 failed",
    ]


def test_rows_of_a_table_are_appended_and_failures_tried_again(folder: Path) -> None:
    table = frame()
    first = bn.build(table[:4], "out", examples_per_shard=2, progress=False)
    image = (folder / "sub-0005.nii.gz").read_bytes()
    (folder / "sub-0005.nii.gz").unlink()
    with pytest.raises(bn.TooManyFailures, match="1 of 6 volumes failed, more than max_bad_fraction allows"):
        bn.build(table, "out", examples_per_shard=2, progress=False)
    (folder / "sub-0005.nii.gz").write_bytes(image)
    info = bn.build(table, "out", examples_per_shard=2, progress=False)
    assert (first.num_examples, info.num_examples, info.revision) == (4, 6, 2)
    assert bn.verify("out", manifest=table, deep="all", progress=False)
    assert bn.build(table, "out", progress=False) == info
    other = table.assign(label=0)
    assert not bn.verify("out", manifest=other, progress=False)
    with pytest.raises(bn.OutputError, match="different options or rows"):
        bn.build(other, "out", progress=False)


def test_rows_lie_beside_the_parts_for_workers_elsewhere_and_never_in_the_graph(folder: Path) -> None:
    table = pd.concat([frame()] * 500, ignore_index=True)
    table["participant_id"] = [f"sub-{i:04d}" for i in range(len(table))]
    table["path"] = [f"{folder}/./{'./' * (i // 40)}{path}" for i, path in enumerate(table["path"])]
    config = replace(make_config(NAME, "out", {}), rows="")
    with open_build(config, parquet_of(table), is_local=False) as plan:
        path = folder / "out/.build/rows.parquet"
        assert (plan.config.rows, path.exists()) == (str(path), True)
        assert len(pickle.dumps(plan)) < 10_000
        units = list(plan.read_units(plan.config.manifest))
        assert sum(len(unit.rows) for unit in units if hasattr(unit, "rows")) == len(table)
    assert not path.exists()


def test_errors_of_rows_with_names_show_none_of_them(folder: Path) -> None:
    (folder / "key").write_bytes(bytes(range(32)))
    (folder / "options.toml").write_text("anonymous_ids = 'key'")
    rows = [{"path": "a.nii", "participant_id": name} for name in ("Doe", 3)]
    for call in (
        lambda: bn.build(rows, "out", anonymous_ids="key"),
        lambda: bn.build(rows, "out", config="options.toml"),
        lambda: bn.check(rows, anonymous_ids="key"),
    ):
        with pytest.raises(bn.ManifestError, match=r"row 2: participant_id is \(hidden by ") as raised:
            call()
        assert "Doe" not in str(raised.value)


def test_rows_with_names_are_not_written_into_an_output_of_pseudonyms(folder: Path) -> None:
    (folder / "key").write_bytes(bytes(range(32)))
    bn.build(frame(), "out", anonymous_ids="key", progress=False)
    assert bn.verify("out", manifest=frame(), anonymous_ids=folder / "key", deep=1, progress=False)
    assert not any(b"sub-0003" in path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file())
    config = replace(make_config(NAME, "far", {"anonymous_ids": "key"}), rows="")
    with (
        pytest.raises(bn.UsageError, match="give --temp-location"),
        open_build(config, parquet_of(frame()), is_local=False),
    ):
        pass
    config = replace(config, temp_location=str(folder / "tmp"))
    with open_build(config, parquet_of(frame()), is_local=False) as plan:
        assert plan.config.rows is not None
        assert Path(plan.config.rows).is_relative_to(folder / "tmp")
    assert list((folder / "tmp").rglob("*.parquet")) == []


def test_a_killed_launcher_leaves_no_rows_beyond_the_next_build(folder: Path) -> None:
    config = replace(make_config(NAME, "out", {}), rows="")
    with contextlib.suppress(KeyboardInterrupt), open_build(config, parquet_of(frame()), is_local=False) as p:
        assert p.config.rows is not None
        kept = Path(p.config.rows).read_bytes()
        raise KeyboardInterrupt
    (folder / "out/.build/rows.parquet").write_bytes(kept)
    bn.build(frame(), "out", progress=False)
    assert stray_files(folder / "out") == set()


# Errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bn.build("manifest.tsv", "o", clip=True), '^clip=True cannot be used with rescale="minmax"'),
        (lambda: bn.build("manifest.tsv", "o", num_shards=0), "^num_shards is 0; it must be at least 1"),
        (lambda: bn.build("manifest.tsv", "o", num_shard=2), "did you mean num_shards?"),
        (lambda: bn.build("manifest.tsv", "o", preprocess=lambda v: v), "^preprocess is a lambda"),
        (lambda: bn.build("manifest.tsv", "o", spacing=(1, 2)), r"sizes in mm, such as \(1, 1, 1.5\)$"),
        (lambda: bn.build("manifest.tsv", "o", shape=5), r"such as \(160, 192, 160\)$"),
        (
            lambda: bn.build("manifest.tsv", "o", rescale=("percentile", 1)),
            r"write it as \(\"percentile\", LO, HI\), with finite",
        ),
        (lambda: bn.build("manifest.tsv", "o", path_column="a,,b"), r"such as \['T1w', 'FLAIR'\]$"),
        (
            lambda: bn.build("manifest.tsv", "o", split=0.5),
            "such as {'train': 0.8, 'validation': 0.1, 'test': 0.1}$",
        ),
        (
            lambda: bn.build(frame().assign(split="a"), "o", split={"a": 1}),
            r'drop split \(without="split" if like or config gives it\)',
        ),
        (lambda: bn.verify("out", manifest="nowhere"), "nowhere: not usable as a manifest\n  no such file$"),
        (lambda: bn.build(frame(), "o", id_column="none"), "choose one with id_column"),
        (lambda: bn.build({"path": ["a.nii"]}, "o"), "of type dict; give a path, a pandas DataFrame"),
        (lambda: bn.build(frame(), "o", runner="NoSuchRunner"), "NoSuchRunner"),
        (lambda: bn.build(frame(), "o", runner="FlinkRunner"), "--flink_master is missing"),
        (lambda: bn.build(frame(), "o", pipeline_options={"num_workers": 3}), "no effect without runner"),
        (lambda: bn.build(frame(), "o", pipeline_options=["--rescle=none"]), "is not a flag of Apache Beam"),
        (lambda: bn.build(frame(), "o", pipeline_options="--region=x"), "^pipeline_options is '--region=x'"),
        (lambda: bn.build(frame(), "o", pipeline_options={"streaming": True}), "finite manifest"),
        (lambda: bn.check(frame(), label_column="age:floot"), "^label_column gives age the kind 'floot'"),
        (lambda: bn.verify("out", deep=-1), "^deep is -1; give a number of records, or all"),
        (lambda: bn.verify("out", deep=1), "add manifest with the manifest that"),
        (lambda: bn.verify("out", preprocess="a.b:c"), "^preprocess is for deep"),
        (lambda: bn.inspect("out", "sub-000"), "no record 'sub-000'; did you mean"),
        (lambda: bn.extract("nowhere", "sub-0000"), "no complete dataset here"),
        (lambda: bn.diff("out", "nowhere"), "no complete dataset here"),
        (lambda: bn.report("out", "notes.csv"), "^out is notes.csv; give a name that ends in .html"),
        (lambda: bn.report("out", "out/index/page.html"), "^out is .*, a file of the dataset in "),
        (lambda: bn.check(frame(), out="manifest.tsv"), "^out is manifest.tsv; .* ends in .json"),
        (lambda: bn.check(frame(), out="out/dataset_info.json"), "^out is .*, a file of the dataset in "),
        (lambda: bn.report("out", "page.html", pictures=-1), "^pictures is -1; it must be at least 0"),
        (lambda: bn.report("out", "page.html", workers=0), "^workers is 0; it must be at least 1"),
        (lambda: bn.report("out", "page.html", pictures=1.5), "^pictures is 1.5; give a whole number"),
        (lambda: bn.report("out", "page.html", by=1), "^by is 1; give the name of a column of the index"),
        (
            lambda: bn.report("out", "page.html", by="lable"),
            "^by is 'lable', which is .* did you mean 'label'",
        ),
        (lambda: bn.report("out", ""), "^out is empty; was a variable not set"),
        (lambda: bn.verify("out", workers="x"), "^workers is 'x'; give a whole number"),
        (lambda: bn.verify(""), "^dataset is empty; was a variable not set"),
        (lambda: bn.inspect(5), "^dataset is 5; give a path"),
        (lambda: bn.extract("", "sub-0000"), "^dataset is empty; was a variable not set"),
        (lambda: bn.diff("out", ""), "^after is empty; was a variable not set"),
        (lambda: bn.Dataset(""), "^path is empty; was a variable not set"),
        (lambda: bn.load_dataset(""), "^path is empty; was a variable not set"),
        (lambda: bn.build("manifest.tsv", ""), "^output is empty; was a variable not set"),
        (lambda: bn.build("manifest.tsv", None), "^output is None; give a path"),
        (lambda: bn.build("manifest.tsv", b"o"), "^output is b'o'; give a path"),
        (lambda: bn.build("", "o"), "^manifest is empty; was a variable not set"),
        (lambda: bn.build("manifest.tsv", "o", like=""), "^like is empty; was a variable not set"),
        (lambda: bn.build("manifest.tsv", "o", like=5), "^like is 5; give a path"),
        (
            lambda: bn.build("manifest.tsv", "o", config={"clip": True}),
            "^config is {'clip': True}; give a path",
        ),
        (
            lambda: bn.build("manifest.tsv", "out", rescale="none"),
            "choose another output, or use overwrite=True",
        ),
        (lambda: bn.build("manifest.tsv", "o", temp_location=""), "^temp_location is empty; was a variable"),
        (lambda: bn.build("manifest.tsv", "o", dry_run="no"), "^dry_run is 'no'; give True or False"),
        (lambda: bn.build("manifest.tsv", "o", dry_run=1), "^dry_run is 1; give True or False"),
        (lambda: bn.build("manifest.tsv", "o", progress="x"), "^progress is 'x'; give True or False"),
        (lambda: bn.build("manifest.tsv", "o", overwrite=5), "^overwrite is 5; give True or False"),
        (lambda: bn.build("manifest.tsv", "o", runner=DirectRunner()), "^runner is <.*>; give its name"),
    ],
)
def test_errors_name_parameters(built: Path, call: Callable[[], object], text: str) -> None:
    with pytest.raises(bn.BeamNiftiError, match=text) as raised:
        call()
    ours = "clip|rescale|num-shards|id-column|preprocess|deep|manifest|pictures|workers|runner"
    assert not any(f"--{name}" in str(raised.value) for name in ours.split("|"))
    assert not Path("o").exists()


def test_a_tilde_is_the_home_folder_for_every_function(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(built))
    bn.build("~/manifest.tsv", "~/new", like="~/out", dry_run=np.True_, progress=np.False_)
    assert not (built / "new").exists()
    bn.build("~/manifest.tsv", "~/new", like="~/out", progress=np.False_)
    assert bn.verify("~/new", manifest="~/manifest.tsv", progress=False)
    assert not bn.diff("~/new", "~/out")
    assert str(bn.inspect("~/new")) == str(bn.inspect("new"))
    assert np.array_equal(bn.extract("~/new", "sub-0000").voxels, bn.extract("out", "sub-0000").voxels)
    assert bn.Dataset("~/new").ids == bn.Dataset("out").ids
    bn.report("~/new", "~/page.html", progress=False)
    assert (built / "page.html").exists()
    assert not (built / "~").exists()


def test_errors_carry_their_data(folder: Path) -> None:
    table = frame().astype({"path": object, "label": object})
    table.loc[1, "path"] = None
    table.loc[3, "participant_id"] = "sub-0002"
    with pytest.raises(bn.ManifestError) as wrong:
        bn.build(table, "out", progress=False)
    assert [problem.split(":")[0] for problem in wrong.value.problems] == ["row 2", "row 4", "row 4"]
    assert str(wrong.value).startswith("the table in memory: not usable as a manifest")
    assert repr(bn.check(frame(), progress=False)).startswith("<Survey of the table in memory: 6 images")
    (folder / "sub-0002.nii.gz").unlink()
    with pytest.raises(bn.TooManyFailures) as failed:
        bn.build(frame(), "out", progress=False)
    (failure,) = failed.value.failures
    assert (failure.row, failure.example_id, failure.stage, failure.error) == (
        3,
        "sub-0002",
        "LoadVolume",
        "VolumeError",
    )
    assert failure.path == str(folder / "sub-0002.nii.gz")
    assert "No such file" in failure.message
    assert (failed.value.summary.num_failed, failed.value.summary.num_written) == (1, 5)


def test_results_and_failures_name_parameters_and_files_name_flags(folder: Path) -> None:
    write_image(folder / "sub-0001.nii.gz", np.zeros((6, 5, 3), np.int16))
    survey = bn.check("manifest.tsv", out="check.json", progress=False)
    assert "allow_mixed_shapes=True" in survey.problems[0]
    assert "use shape=(6, 5, 4)" in str(survey)
    assert "--" not in str(survey)
    assert dict(survey) == json.loads(Path("check.json").read_text())
    assert "--allow-mixed-shapes" in survey["problems"][0]["message"]
    with pytest.raises(bn.TooManyFailures) as raised:
        bn.build("manifest.tsv", "out", progress=False)
    assert "allow_mixed_shapes=True" in raised.value.failures[0].message
    assert "allow_mixed_shapes=True" in raised.value.summary.reasons[0].message
    (listed,) = map(json.loads, Path("out/failures.jsonl").read_text().splitlines())
    assert "--allow-mixed-shapes" in listed["message"]


def test_a_failure_of_a_worker_has_its_reason_and_its_cause(folder: Path) -> None:
    (folder / "sub-0003.nii.gz").rename("memory.nii.gz")
    table = frame().replace("sub-0003.nii.gz", "memory.nii.gz")
    with pytest.raises(bn.EngineError, match=r"^the build stopped: MemoryError: memory\.nii\.gz") as raised:
        bn.build(table, "out", preprocess=fail_as_named, progress=False)
    assert raised.value.__cause__ is not None
    assert raised.value.exit_code == 75
    assert list(Path("out").rglob("*.tmp")) == [], "the part that was open is removed"


# Options of Beam


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["--direct-num-workers=2", "--no-auth"], ["--direct_num_workers=2", "--no_auth"]),
        (
            {"direct_num_workers": 2, "no-auth": True, "labels": ["a=1", "b=2"], "region": None},
            ["--direct_num_workers=2", "--no_auth", "--labels=a=1", "--labels=b=2"],
        ),
        ({"use_public_ips": False, "streaming": False}, ["--no_use_public_ips"]),
    ],
)
def test_beam_options_are_flags_a_dict_or_an_object(options: Any, flags: list[str]) -> None:
    from apache_beam.options.pipeline_options import PipelineOptions

    assert flags_of(options) == flags
    assert sorted(flags_of(PipelineOptions(flags))) == sorted(flags)


def test_an_object_of_beam_decides_the_engine_and_stays_as_it_is(folder: Path) -> None:
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

    options = PipelineOptions([])
    options.view_as(DirectOptions).direct_num_workers = 2
    before = options.get_all_options()
    info = bn.build(frame(), "out", pipeline_options=options, progress=False)
    assert info.num_examples == 6
    assert options.get_all_options() == before


# Hosts


def test_nothing_is_printed_and_messages_go_to_the_logger(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "sub-0004.nii.gz").unlink()
    table = frame().assign(path=[f" {path}" for path in frame()["path"]])
    bn.build(table, "out", max_bad_fraction=0.5, progress=False)
    bn.verify("out", progress=False)
    bn.check(table, progress=False)
    assert capfd.readouterr() == ("", "")
    assert "white space at the ends" in caplog.text
    assert {record.name for record in caplog.records} == {"beam_nifti"}


def test_a_notebook_needs_nothing_of_beams_interactive_runner(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interactive_utils, "is_in_ipython", lambda: True)
    monkeypatch.setitem(sys.modules, "apache_beam.runners.interactive", None)  # not to be imported
    assert bn.check("manifest.tsv", progress=False)
    assert bn.build("manifest.tsv", "in_notebook", progress=False).num_examples == 6


def test_a_notebook_gets_a_bar_without_a_terminal(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", logging)  # any module: a kernel is known by its name
    bn.build(frame(), "out")
    shown = capfd.readouterr().err
    assert "100%" in shown
    assert "6/6" in shown
    bn.verify("out", progress=False)
    assert capfd.readouterr() == ("", "")


def test_it_runs_in_threads_and_within_a_running_event_loop(folder: Path) -> None:
    async def cell() -> DatasetInfo:
        return bn.build(frame(), "in_loop", progress=False)

    infos = [asyncio.run(cell())]
    threads = [
        threading.Thread(target=lambda n=n: infos.append(bn.build("manifest.tsv", f"in_{n}", progress=False)))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [digests(info) for info in infos] == [digests(infos[0])] * 4
    assert logging.getLogger("apache_beam").level == logging.NOTSET


SCRIPT = """
import gc, logging, os, signal, sys, warnings
from pathlib import Path

def state():
    root, beam = logging.getLogger(), logging.getLogger("apache_beam")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    logs = (root.level, root.handlers[:], root.filters[:], root.manager.disable, beam.level, beam.handlers[:])
    return (handlers, logs, sys.stdout, sys.stderr, sys.excepthook, gc.isenabled(), gc.get_freeze_count(),
            dict(os.environ), Path.cwd())

before = state()
import beam_nifti as bn
info = bn.build("manifest.tsv", "out", progress=False)
bn.check("manifest.tsv", progress=False)
assert bn.verify("out", progress=False)
try:
    bn.build([{"path": "none.nii"}], "other", progress=False)
except bn.ManifestError:
    pass
after = state()
assert before == after, [pair for pair in zip(before, after) if pair[0] != pair[1]]
assert "tensorflow" not in sys.modules
"""
"""A plain script: nothing of it stands behind `if __name__ == "__main__"`."""


def run_python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter with no environment but the package."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_plain_script_is_left_as_it_was(folder: Path) -> None:
    Path("script.py").write_text(SCRIPT)
    done = run_python("script.py", home=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_script_without_a_guard_may_start_processes(folder: Path) -> None:
    options = {"direct_running_mode": "multi_processing"}
    call = f"bn.build('manifest.tsv', 'out', workers=2, pipeline_options={options}, progress=False)"
    Path("script.py").write_text(f"import beam_nifti as bn\nprint({call}.num_examples)\n")
    assert run_python("script.py", home=folder).stdout == "6\n"


FORKING = """
import os
import beam_nifti as bn

def attempt():
    child = os.fork()
    if child == 0:
        try:
            bn.check("manifest.tsv", progress=False)
        except bn.UsageError as e:
            print(e, flush=True)
        os._exit(0)
    os.waitpid(child, 0)

attempt()
bn.check("manifest.tsv", progress=False)
attempt()
"""


def test_a_process_forked_after_beam_has_run_is_told_to_be_spawned(folder: Path) -> None:
    (refusal,) = run_python("-c", FORKING, home=folder).stdout.splitlines()
    assert "forked" in refusal
    assert 'get_context("spawn")' in refusal


def test_the_package_lists_what_it_gives() -> None:
    names = {"build", "check", "verify", "inspect", "diff", "extract", "report", "load_dataset", "Dataset"}
    assert names | {"BuildOptions", *bn.random_access.__all__} <= set(dir(bn))
    assert bn.PatchGrid is bn.random_access.PatchGrid
    assert "rescale" in bn.BuildOptions.__annotations__
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        bn.bild  # noqa: B018
