"""The command line, as a person and as a scheduler meets it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti import __version__
from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.inspection.description import describe_dataset, format_description
from beam_nifti.pipeline import lock
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import decode_example, decode_tensor
from beam_nifti.support import outcomes
from pipelines import build_dataset
from tests.build_helpers import assert_intact, build_config
from tests.datasets import records_of
from tests.images import write_cohort, write_image, write_manifest

Run = Callable[..., int]


@pytest.fixture
def built(cohort: Path, tmp_path: Path) -> Callable[..., Path]:
    """Build the cohort of twelve with some flags: `built("--num-shards=2")` -> the dataset."""

    def run(*flags: str, output: str = "out", code: int = cli.SUCCESS) -> Path:
        assert cli.main(["build", str(cohort), str(tmp_path / output), "--workers=1", *flags]) == code
        return tmp_path / output

    return run


def shards(output: Path) -> list[str]:
    return [shard.name for shard in read_info(str(output)).shards]


def records(output: Path) -> dict[str, dict[str, Any]]:
    """The features of every record, in the order of the dataset, by example id."""
    return {cells["example_id"]: decode_example(payload) for cells, payload in records_of(output)}


def voxels(output: Path, example_id: str = "sub-0003") -> Any:
    return decode_tensor(records(output)[example_id]["image_raw"])


def total_bytes(output: Path) -> int:
    return read_info(str(output)).num_bytes


# Help and parsing


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["build", "--help"],
        ["verify", "--help"],
        ["inspect", "--help"],
        ["manifest", "bids", "--help"],
        ["--version"],
    ],
)
def test_help_loads_nothing_heavy(argv: Sequence[str]) -> None:
    program = (
        "import sys; from beam_nifti.cli import main as cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'apache_beam', 'tensorflow', 'numpy', 'pyarrow', 'nibabel'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "beam-nifti" in done.stdout


def test_the_module_is_the_command_and_names_its_versions() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "beam_nifti", "--version"], capture_output=True, text=True, check=True
    )
    first, *libraries = done.stdout.splitlines()
    assert first == f"beam-nifti {__version__}"
    assert f"numpy {np.__version__}" in libraries
    assert any(line.startswith("apache-beam 2.") for line in libraries)


@pytest.mark.parametrize("flag", options.flags_of_commands()["build"])
def test_help_explains_every_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["build", "--help"])
    text = capsys.readouterr().out
    assert f"{flag} " in text or f"{flag}\n" in text


def test_flags_take_dashes_and_underscores() -> None:
    dashed, _ = options.parse(["build", "m.csv", "out", "--examples-per-shard=3", "--shuffle-seed", "1"])
    under, _ = options.parse(["build", "m.csv", "out", "--examples_per_shard=3", "--shuffle_seed", "1"])
    assert build_config(dashed) == build_config(under)


def test_other_flags_go_to_beam_with_underscores() -> None:
    _, rest = options.parse(["build", "m.csv", "out", "--flink-master=host:8081", "--runner=FlinkRunner"])
    assert rest == ["--flink_master=host:8081", "--runner=FlinkRunner"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["build", "m.csv"], "OUTPUT"),
        (["build", "m.csv", "out", "--rescale", "quantile"], "minmax"),
        (["build", "m.csv", "out", "--examples-per-shard", "3", "--num-shards", "2"], "not both"),
        (["build", "m.csv", "out", "--examples-per-shard", "0"], "at least 1"),
        (["build", "m.csv", "out", "--num-shards", "-1"], "at least 1"),
        (["build", "m.csv", "out", "--compression-level", "9"], "0, 1, 2, 3"),
        (["build", "m.csv", "out", "--max-bad-fraction", "2"], "between 0 and 1"),
        (["build", "m.csv", "out", "--max-bad-fraction", "inf"], "between 0 and 1"),
        (["build", "m.csv", "out", "--max-bad-fraction", "nan"], "invalid float value: 'nan'"),
        (["build", "m.csv", "out", "--workers", "0"], "at least 1"),
        (["build", "m.csv", "out", "--rescle", "none"], "did you mean --rescale?"),
        (["build", "m.csv", "out", "--surprise"], "unknown flag --surprise"),
        (["build", "m.csv", "out", "more"], "unknown argument more"),
        (["build", "m.csv", "out", "--runner=NoSuchRunner"], "NoSuchRunner"),
        (["build", "m.csv", "out"], "no such file"),
        (["verify", "out", "--deeep", "3"], "--deeep"),
        (["inspect", "out", "--quiet"], "--quiet"),
        (["manifest", "bids", "missing", "--suffix", "T1w"], "missing: No such file or directory"),
        (["manifest", "bids", "", "--suffix", "T1w"], "DIR is empty"),
        (["manifest", "glob", "*.nii", "--out", ""], "--out is empty"),
        (["manifest", "glob", "*.nii", "--label", "age"], "not of manifest glob"),
        (["manifest"], "SOURCE"),
        (["bild"], "bild"),
        ([], "COMMAND"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_is_wrong(
    argv: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == cli.USAGE
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Exit codes and what stands on the screen


def test_success(built: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = built()
    said = capsys.readouterr().out
    assert "12 examples, 1 shard," in said
    assert str(output) in said
    assert "load_dataset(" in said


def test_manifest_errors_name_every_row_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii", "label": "x"}, {"path": "", "label": 1}])
    assert cli.main(["build", str(manifest), str(tmp_path / "out")]) == cli.USAGE
    said = capsys.readouterr().err
    assert "row 1" in said
    assert "row 2" in said
    assert not (tmp_path / "out").exists()


def test_bad_volumes_exit_with_1_and_the_list_is_named(
    cohort: Path, built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (cohort.parent / "sub-0002.nii.gz").unlink()
    output = built(code=cli.FAILED)
    streams = capsys.readouterr()
    assert "failed   1 volume," in streams.out
    assert str(output / "failures.jsonl") in streams.out
    assert "1 of 12 volumes failed" in streams.err
    assert "Traceback" not in streams.err
    assert not (output / "dataset_info.json").exists()


def test_another_configuration_is_refused_with_2(
    built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    built()
    built("--rescale=none", code=cli.USAGE)
    assert "--rescale was minmax, now none" in capsys.readouterr().err


def test_a_second_run_says_what_it_kept(
    built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    built()
    built()
    assert "kept     12 examples of an earlier run" in capsys.readouterr().out


def test_verify_and_inspect(
    cohort: Path, built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(built("--num-shards=3"))
    capsys.readouterr()
    assert cli.main(["verify", output, "--manifest", str(cohort), "--deep", "all"]) == cli.SUCCESS
    assert "12 rebuilt" in capsys.readouterr().out
    assert cli.main(["inspect", output, "--json"]) == cli.SUCCESS
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["num_examples"] == 12
    assert cli.main(["inspect", output, "--record", "sub-0004"]) == cli.SUCCESS
    assert "sub-0004" in capsys.readouterr().out
    assert cli.main(["verify", output, "--deep", "some"]) == cli.USAGE


def test_verify_of_a_damaged_dataset_exits_with_1(
    built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = built()
    shard = output / shards(output)[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert cli.main(["verify", str(output)]) == cli.FAILED
    streams = capsys.readouterr()
    assert shard.name in streams.err
    assert "failed " in streams.out


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_no_dataset_exits_with_1(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == cli.FAILED
    assert "no complete dataset here" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "inspect", "report", "card"])
@pytest.mark.parametrize("name", ["dataset_info.json", "manifest.tsv"])
def test_a_file_in_the_place_of_the_folder_is_named(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text("{}")
    assert cli.main([command, str(file)]) == cli.FAILED
    assert f"{file} is not a folder; give the folder of the dataset" in capsys.readouterr().err


def test_the_entry_point_for_schedulers_is_the_same_command(cohort: Path, tmp_path: Path) -> None:
    assert build_dataset.main([str(cohort), str(tmp_path / "out"), "--quiet"]) == cli.SUCCESS
    assert read_info(str(tmp_path / "out")).num_examples == 12
    assert build_dataset.main([str(tmp_path / "none.csv"), str(tmp_path / "out")]) == cli.USAGE


def test_quiet_says_nothing_on_standard_error(
    built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    built("--quiet")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(cohort: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "beam_nifti", "build", str(cohort), str(tmp_path / "out")]
    screen = b""

    def read(descriptor: int) -> bytes:
        nonlocal screen
        screen += (data := os.read(descriptor, 4096))
        return data

    def screen_of(command: list[str]) -> bytes:
        nonlocal screen
        screen = b""
        assert pty.spawn(["sh", "-c", f"stty cols 120 rows 40 && exec {shlex.join(command)}"], read) == 0
        return screen

    first = screen_of(build)
    assert b"12/12" in first
    assert re.search(rb"\d (bytes|kB|MB)/s", first)
    assert b"12/12" not in screen_of([*build, "--quiet"])


def test_a_build_beside_another_exits_with_75(
    built: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock.hold(str(tmp_path / "out")):
        built(code=cli.TEMPORARY)
    assert "another command is writing here" in capsys.readouterr().err
    built()


def test_a_manifest_in_a_store_that_keeps_failing_exits_with_75(
    built: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: str) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "the store failed 6 times in a row (HTTP 503)", path)

    monkeypatch.setattr("beam_nifti.storage.paths.open_read", fail)
    built(code=cli.TEMPORARY)
    assert "the store failed 6 times in a row" in capsys.readouterr().err


def test_a_file_that_may_not_become_so_large_is_named_in_one_line_and_the_build_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_cohort(tmp_path, 4, shape=(20, 20, 20))
    command = ["build", str(manifest), str(tmp_path / "out"), "--quiet"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        assert cli.main(command) == cli.USAGE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        rf"File too large: '{tmp_path}/out/.*\.part'; fix this and run the same command again, which",
        line,
    )
    assert cli.main(command) == 0
    assert_intact(tmp_path / "out")


def test_an_interrupted_build_exits_with_130_and_continues(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 300, shape=(40, 40, 20))
    output = tmp_path / "out"
    command = [sys.executable, "-m", "beam_nifti", "build", str(manifest), str(output), "--workers=1"]
    command.append(f"--summary-json={tmp_path}/summary.json")
    # Who starts the tests in the background of a shell has them ignore this signal, and all their children.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, ours)
    while process.poll() is None and not list(output.glob(".build/*/*/*.part*")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == cli.INTERRUPTED
    assert "continues where it stopped" in said
    assert "Traceback" not in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"], summary["num_volumes"]) == ("interrupted", 130, 300)
    assert cli.main(["build", str(manifest), str(output), "--quiet"]) == cli.SUCCESS
    assert read_info(str(output)).num_examples == 300


# Every option has its effect


def test_dry_run_writes_nothing(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["build", str(cohort), str(tmp_path / "out"), "--dry-run", "--num-shards=3"]
    assert cli.main(argv) == cli.SUCCESS
    said = capsys.readouterr().out
    assert "volumes  12 of 6×5×4 voxels" in said
    assert "shards   3 of up to 4 examples" in said
    assert " kB, estimated from the first image's header" in said
    assert not (tmp_path / "out").exists()


def test_examples_per_shard(built: Callable[..., Path]) -> None:
    info = read_info(str(built("--examples-per-shard=5")))
    assert [shard.num_examples for shard in info.shards] == [5, 5, 2]


def test_num_shards(built: Callable[..., Path]) -> None:
    info = read_info(str(built("--num-shards=5")))
    assert [shard.num_examples for shard in info.shards] == [2, 2, 3, 2, 3]


def test_shuffle_seed(built: Callable[..., Path]) -> None:
    plain = list(records(built()))
    one, again, two = (
        list(records(built(f"--shuffle-seed={seed}", output=f"out{i}"))) for i, seed in enumerate((1, 1, 2))
    )
    assert plain == sorted(plain)
    assert one == again
    assert len({tuple(plain), tuple(one), tuple(two)}) == 3
    assert sorted(one) == sorted(two) == plain


def test_compression(built: Callable[..., Path]) -> None:
    packed, plain = built(output="packed"), built("--compression=none", output="plain")
    assert shards(plain) == [shards(packed)[0].removesuffix(".gz")]
    assert total_bytes(plain) > total_bytes(packed)
    assert list(records(plain)) == list(records(packed))
    np.testing.assert_array_equal(voxels(plain), voxels(packed))


def test_compression_level(cohort: Path, built: Callable[..., Path]) -> None:
    levels = [built(f"--compression-level={level}", output=f"out{level}") for level in (0, 2)]
    assert total_bytes(levels[0]) != total_bytes(levels[1])


def test_rescale(built: Callable[..., Path]) -> None:
    minmax, none = (voxels(built(f"--rescale={r}", output=r)) for r in ("minmax", "none"))
    assert (minmax.min(), minmax.max()) == (0, 1)
    assert none.max() > 1
    np.testing.assert_array_equal(((none - none.min()) / (none.max() - none.min())).astype("f4"), minmax)


def test_rescale_within_and_clip(built: Callable[..., Path]) -> None:
    percentile = built("--rescale=percentile:40,90", output="plain")
    within = built("--rescale=percentile:40,90", "--rescale-within=nonzero", output="within")
    clipped = built("--rescale=percentile:40,90", "--clip", output="clipped")
    plain = voxels(percentile)
    assert plain.min() < 0
    assert plain.max() > 1
    assert not np.array_equal(voxels(within), plain)
    np.testing.assert_array_equal(voxels(clipped), np.clip(plain, 0, 1))
    text = format_description(describe_dataset(str(within)))
    assert "rescale percentile:40,90 within nonzero, compression" in text
    info = read_info(str(clipped))
    assert (info.config["rescale"], info.config["clip"]) == ("percentile:40,90", True)
    assert {"rescale_low", "rescale_high"} <= set(info.features)


def test_voxel_dtype(built: Callable[..., Path]) -> None:
    native = built("--voxel-dtype=native", output="native")
    assert voxels(native).dtype == np.int16
    assert voxels(built(output="float32")).dtype == np.float32
    assert read_info(str(native)).dtype == "int16"


def test_allow_mixed_shapes(cohort: Path, built: Callable[..., Path]) -> None:
    write_image(cohort.parent / "sub-0003.nii.gz", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    built(code=cli.FAILED, output="one")
    assert voxels(built("--allow-mixed-shapes", output="two")).shape == (2, 3, 4)


def test_max_bad_fraction(cohort: Path, built: Callable[..., Path]) -> None:
    (cohort.parent / "sub-0002.nii.gz").write_bytes(b"")
    built("--max-bad-fraction=0.08", code=cli.FAILED)
    info = read_info(str(built("--max-bad-fraction=0.09")))
    assert (info.num_examples, info.num_failures) == (11, 1)


def test_overwrite(built: Callable[..., Path]) -> None:
    built()
    output = built("--rescale=none", "--overwrite")
    assert read_info(str(output)).config["rescale"] == "none"
    assert voxels(output).max() > 1


def test_columns(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.nii")
    rows = [{"file": f"{i}.nii", "age": 30 + i, "scan": f"scan-{i}", "label": "x"} for i in range(3)]
    manifest = write_manifest(tmp_path / "m.csv", rows)
    flags = ["--path-column=file", "--label-column=age", "--id-column=scan", "--quiet"]
    assert cli.main(["build", str(manifest), str(tmp_path / "out"), *flags]) == cli.SUCCESS
    found = records(tmp_path / "out")
    assert {name: features["label"].tolist() for name, features in found.items()} == {
        "scan-0": [30],
        "scan-1": [31],
        "scan-2": [32],
    }


def test_nothing_stays_in_the_temporary_folder(
    built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    output = built()
    assert cli.main(["verify", str(output), "--quiet"]) == cli.SUCCESS
    assert not [*temporary.iterdir()]


def test_temp_location_holds_what_is_needed_only_while_building(
    built: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary = tmp_path / "scratch"
    temporary.write_text("a file, where a folder is to be made")
    built(f"--temp-location={temporary}", "--quiet", code=cli.USAGE)
    assert f"--temp-location is {temporary}" in capsys.readouterr().err
    temporary.unlink()
    output = built(f"--temp-location={temporary}", "--quiet")
    assert list(temporary.iterdir()) == []
    assert sorted(p.name for p in output.iterdir()) == ["dataset_info.json", "index", *shards(output)]


# What a shell and its user get wrong


def test_an_empty_variable_is_not_this_folder(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["build", str(cohort), ""], ["build", "", "out"], ["verify", ""]):
        assert cli.main(argv) == cli.USAGE
        assert "was a variable not set?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "verify", "inspect"])
def test_an_output_that_is_a_file(
    cohort: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    manifest = [str(cohort)] if command == "build" else []
    assert cli.main([command, *manifest, str(tmp_path / "file")]) in (cli.USAGE, cli.FAILED)
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert "Traceback" not in said


@pytest.mark.parametrize("flags", [[], ["--overwrite", "--rescale=zscore"]])
def test_other_files_in_output_are_accepted_and_stay(
    cohort: Path, built: Callable[..., Path], flags: list[str]
) -> None:
    output = cohort.parent.parent / "out"
    foreign = {output / name: name for name in ("README.md", "index/notes.txt", "scans/a.nii", ".build.txt")}
    for path, text in foreign.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    built()
    built(*flags)
    assert {path: path.read_text() for path in foreign} == foreign


def test_a_folder_of_our_name_that_is_not_ours_stays(cohort: Path, built: Callable[..., Path]) -> None:
    precious = cohort.parent.parent / "out" / ".build" / "precious" / "file"
    precious.parent.mkdir(parents=True)
    precious.write_text("kept")
    built(code=cli.USAGE)
    assert precious.read_text() == "kept"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["--version"], outcomes.CUT_SHORT),
        (["manifest", "glob", "cohort/*.nii.gz"], outcomes.CUT_SHORT),
        (["build", "cohort/manifest.tsv", "out"], cli.SUCCESS),
    ],
)
@pytest.mark.parametrize("errors", ["apart", "with it"])
def test_output_that_nobody_reads_to_its_end(
    cohort: Path, command: list[str], code: int, errors: str
) -> None:
    """What a command is for is cut short (141); where it has done its work, its exit code stands."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "beam_nifti", *command],
        cwd=cohort.parent.parent,
        stdout=writer,
        stderr=subprocess.PIPE if errors == "apart" else writer,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr or "") == (code, "")


def test_a_dataset_without_labels_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "a.nii")
    manifest = write_manifest(tmp_path / "m.csv", [{"path": "a.nii"}])
    for flags in (["--dry-run"], []):
        assert cli.main(["build", str(manifest), str(tmp_path / "out"), *flags]) == cli.SUCCESS
        assert "labels   none" in capsys.readouterr().out


def test_a_failed_build_over_a_dataset_says_that_it_stays(
    cohort: Path, built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    built()
    (cohort.parent / "sub-0002.nii.gz").unlink()
    built(code=cli.FAILED)
    assert "the dataset is unchanged" in capsys.readouterr().err


def test_records_of_another_shape_are_not_kept_once_mixed_shapes_are_not_allowed(
    cohort: Path, built: Callable[..., Path]
) -> None:
    write_image(cohort.parent / "sub-0003.nii.gz", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    (cohort.parent / "sub-0005.nii.gz").unlink()
    built("--allow-mixed-shapes", code=cli.FAILED)
    built("--max-bad-fraction=0.5", code=cli.USAGE)  # which would lose the record of another shape
    output = built("--max-bad-fraction=0.5", "--overwrite")
    assert read_info(str(output)).num_failures == 2
    assert cli.main(["verify", str(output)]) == cli.SUCCESS


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_first_image_of_another_kind_is_another_dataset(
    cohort: Path, built: Callable[..., Path], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "--voxel-dtype=native" if change == "dtype" else "--rescale=minmax"
    output = built(flag)
    other = np.arange(120).reshape((6, 5, 4) if change == "dtype" else (4, 5, 6))
    write_image(cohort.parent / "sub-0000.nii.gz", other.astype("f4" if change == "dtype" else "i2"))
    built(flag, code=cli.USAGE)
    assert "the first image had" in capsys.readouterr().err
    assert read_info(str(output)).num_examples == 12


def test_a_level_without_compression_is_refused(
    built: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    built("--compression=none", "--compression-level=1", code=cli.USAGE)
    assert "--compression-level has no effect with --compression none" in capsys.readouterr().err
