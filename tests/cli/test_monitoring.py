"""What a scheduler and a monitoring system see of a run: its summary, its metrics, its log."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from beam_nifti.cli import main as cli
from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.pipeline import lock
from beam_nifti.pipeline.progress import current_progress, show_progress
from beam_nifti.record.dataset_info import read_info
from beam_nifti.support import logs
from beam_nifti.volume.notes import counter_name
from tests.images import write_manifest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/monitoring.md").read_text()


@pytest.fixture
def summarize(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a command with `--summary-json`: `summarize("verify", output, code=0)` -> the document."""
    path = tmp_path / "summaries" / "summary.json"

    def run(*arguments: object, code: int = cli.SUCCESS) -> dict[str, Any]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of an earlier run")
        assert cli.main([*map(str, arguments), f"--summary-json={path}", "--quiet"]) == code
        summary: dict[str, Any] = json.loads(path.read_text())
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert summary["exit_code"] == code
        return summary

    return run


def metrics_of(path: Path) -> dict[tuple[str, ...], float]:
    """The samples of a .prom file by name and values of their labels, but for `output`."""
    samples = [s for family in text_string_to_metric_families(path.read_text()) for s in family.samples]
    found = {
        (
            s.name.removeprefix("beam_nifti_build_"),
            *(v for k, v in sorted(s.labels.items()) if k != "output"),
        ): s.value
        for s in samples
    }
    assert len(found) == len(samples), "a metric occurs twice"
    assert {s.labels["output"] for s in samples} == {samples[0].labels["output"]}
    assert all(s.name.startswith("beam_nifti_build_") for s in samples)
    return found


# Summaries


def test_a_build_tells_how_it_ended(cohort: Path, tmp_path: Path, summarize: Callable[..., Any]) -> None:
    output = tmp_path / "out"
    (cohort.parent / "sub-0002.nii.gz").unlink()
    failed = summarize("build", cohort, output, code=cli.FAILED)
    assert (failed["status"], failed["num_failed"], failed["num_examples"]) == ("failed", 1, 11)
    assert failed["failures"] == {"LoadVolume": {"VolumeError": 1}}
    assert failed["failures_path"] == str(output / "failures.jsonl")
    assert failed["error"]["type"] == "TooManyFailures"
    assert failed["counters"]["volumes-loaded"] == 11
    assert failed["distributions"]["load-msec"]["count"] == 11

    built = summarize("build", cohort, output, "--max-bad-fraction=0.1")
    info = read_info(str(output))
    assert built == built | {
        "command": "build",
        "status": "success",
        "error": None,
        "dry_run": False,
        "runner": "DirectRunner",
        "manifest": str(cohort),
        "output": str(output),
        "fingerprint": info.config["fingerprint"],
        "num_volumes": 12,
        "num_examples": 11,
        "num_kept": 11,
        "num_failed": 1,
        "num_shards": 1,
        "num_bytes": info.num_bytes,
        "splits": {"train": 12},
    }
    start, end = (datetime.fromisoformat(built[key]) for key in ("started", "ended"))
    assert (end - start).total_seconds() == pytest.approx(built["seconds"], abs=0.01)
    assert start.tzinfo is not None


def test_a_dry_run_a_check_and_a_verification_tell_too(
    cohort: Path, tmp_path: Path, summarize: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    planned = summarize("build", cohort, output, "--num-shards=3", "--dry-run")
    assert (planned["dry_run"], planned["num_volumes"], planned["num_shards"]) == (True, 12, 3)
    assert planned["num_examples"] is None
    assert cli.main(["build", str(cohort), str(output), "--quiet"]) == cli.SUCCESS
    (cohort.parent / "sub-0002.nii.gz").unlink()
    checked = summarize("check", cohort, code=cli.FAILED)
    assert (checked["status"], checked["num_volumes"], checked["num_failed"]) == ("failed", 12, 1)
    verified = summarize("verify", output, "--deep=1", "--manifest", cohort)
    assert (verified["num_examples"], verified["num_deep"], verified["num_problems"]) == (12, 1, 0)
    assert verified["manifest"] == str(cohort)
    (output / read_info(str(output)).shards[0].name).write_bytes(b"")
    damaged = summarize("verify", output, code=cli.FAILED)
    assert damaged["num_problems"] > 0
    assert damaged["manifest"] is None


def test_what_is_refused_or_may_pass_is_told_with_its_error(
    cohort: Path, tmp_path: Path, summarize: Callable[..., Any]
) -> None:
    output = tmp_path / "out"
    misspelled = summarize("build", cohort, output, "--rescale=quantile", code=cli.USAGE)
    assert (misspelled["error"]["type"], misspelled["output"]) == ("UsageError", str(output))
    bad = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii", "label": "x"}])
    refused = summarize("build", bad, output, code=cli.USAGE)
    assert (refused["status"], refused["error"]["type"]) == ("refused", "ManifestError")
    assert "row 1" in refused["error"]["message"]
    assert refused["num_examples"] is None
    with lock.hold(str(output)):
        busy = summarize("build", cohort, output, code=cli.TEMPORARY)
    assert (busy["status"], busy["error"]["type"]) == ("temporary", "OutputBusyError")
    (tmp_path / "file").write_text("where a folder is to be made")
    stopped = summarize("build", cohort, output, f"--temp-location={tmp_path}/file", code=cli.USAGE)
    assert (stopped["status"], stopped["error"]["type"]) == ("refused", "OutputError")
    assert stopped["num_examples"] is None


def test_an_error_that_nobody_foresaw_is_told_of(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert not path.exists(), "a process that is killed would leave the summary of an earlier run"
        raise ZeroDivisionError("one by none")

    monkeypatch.setattr("beam_nifti.pipeline.launch.run_build", fail)
    path = tmp_path / "s.json"
    path.write_text("of an earlier run")
    with pytest.raises(SystemExit, match="1"):
        cli.main(["build", str(cohort), str(tmp_path / "out"), f"--summary-json={path}"])
    found = json.loads(path.read_text())
    assert (found["status"], found["exit_code"]) == ("crashed", 1)
    assert found["error"] == {"type": "ZeroDivisionError", "message": "one by none"}


def test_a_summary_that_cannot_be_written_is_refused_before_the_work(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--summary-json={cohort}/s.json"
    assert cli.main(["build", str(cohort), str(tmp_path / "out"), "--dry-run", flag]) == cli.USAGE
    assert f"--summary-json is {cohort}/s.json, which cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--summary-json=summary.txt", "ends in .json"),
        ("--summary-json=out/summary.json", "choose a path outside OUTPUT"),
        ("--summary-json=", "is empty"),
        ("--metrics-file=metrics.txt", "ends in .prom"),
        ("--metrics-file=out/metrics.prom", "choose a path outside OUTPUT"),
        ("--metrics-file=s3://lab/metrics.prom", "only local files"),
    ],
)
def test_files_that_nobody_would_want_are_refused(
    flag: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", "m.tsv", "out", flag]) == cli.USAGE
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--out=r.json", "--summary-json=sub/../r.json"), "--out and --summary-json are both r.json"),
        (
            ("--summary-json=r.json", "--metrics-file=r.prom"),
            "--summary-json and --metrics-file are both r.json",
        ),
        (("--out=r.json", "--metrics-file=r.prom"), "--out and --metrics-file are both r.json"),
    ],
)
def test_one_file_for_two_results_is_refused(
    cohort: Path,
    tmp_path: Path,
    flags: Sequence[str],
    names: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "r.json").write_text("{}")
    (tmp_path / "r.prom").symlink_to("r.json")
    assert cli.main(["check", str(cohort), *flags]) == cli.USAGE
    assert names in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == "{}"


# Metrics


def test_prometheus_can_read_the_metrics_of_a_build(cohort: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "cohort.prom"
    path.parent.mkdir()
    output = tmp_path / 'out "of\\ quotes'
    arguments = ["build", str(cohort), str(output), "--quiet", f"--metrics-file={path}"]
    (cohort.parent / "sub-0002.nii.gz").unlink()
    assert cli.main(arguments) == cli.FAILED
    found = metrics_of(path)
    assert (found["success",], found["exit_code",], found["failed_volumes",]) == (0, 1, 1)
    assert found["failures", "VolumeError", "LoadVolume"] == 1
    assert cli.main([*arguments, "--max-bad-fraction=0.1"]) == cli.SUCCESS
    found = metrics_of(path)
    assert (found["success",], found["volumes",], found["examples",], found["kept_examples",]) == (
        1,
        12,
        11,
        11,
    )
    assert found["split_volumes", "train"] == 12
    assert found["shard_bytes",] == read_info(str(output)).num_bytes
    assert found["pipeline_total", "volumes-skipped"] == 11
    assert found["step_seconds_count", "commit"] == 1
    assert found["end_timestamp_seconds",] - found["start_timestamp_seconds",] == pytest.approx(
        found["duration_seconds",], abs=0.01
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    before = path.read_text()
    assert cli.main([*arguments, "--max-bad-fraction=0.1", "--dry-run"]) == cli.SUCCESS
    assert path.read_text() == before
    named = set(re.findall(r"^\| `beam_nifti_build_(\w+)`", PAGE, re.M))
    assert named == {re.sub("_(count|sum)$", "", name) for name, *_ in found} | {"failures"}


# What the page says


def test_the_page_names_every_field_of_a_summary() -> None:
    fields = {field.name for field in dataclasses.fields(RunSummary)} | {"format_version", "seconds"}
    assert set(re.findall(r"^\| `(\w+)`", PAGE.split("## Metrics")[0], re.M)) == fields


def test_the_page_names_every_counter_and_distribution() -> None:
    source = "".join(path.read_text() for path in (ROOT / "beam_nifti").rglob("*.py"))
    made = re.findall(r'Metrics\.(counter|distribution)\([^,]+, "([\w-]+)"\)', source)
    of_notes = source.count("Metrics.counter(type(self), counter_name(note))")
    assert len(made) + of_notes == len(re.findall(r"Metrics\.(?:counter|distribution)\(", source))
    assert of_notes == 1
    assert f"`{counter_name('NOTE')}`" in PAGE
    in_code = {(name, kind) for kind, name in made}
    assert set(re.findall(r"^\| `([\w-]+)` \| (counter|distribution) \|", PAGE, re.M)) == in_code


# Logs


def test_every_line_of_a_json_log_is_an_object_and_at_info_none_names_a_participant(
    cohort: Path, tmp_path: Path
) -> None:
    (cohort.parent / "sub-0002.nii.gz").unlink()
    (tmp_path / "noisy.py").write_text(
        "import sys, warnings\n"
        "def loud(volume):\n"
        "    print('from a function', file=sys.stderr)\n"
        "    warnings.warn('beware')\n"
        "    return volume\n"
    )
    arguments = ["build", str(cohort), str(tmp_path / "out"), "--preprocess=noisy:loud", "--log-format=json"]
    done = subprocess.run(
        [sys.executable, "-m", "beam_nifti", *arguments],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == cli.FAILED
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    assert datetime.fromisoformat(records[0]["time"]).tzinfo is not None
    at_info = [json.dumps(record) for record in records if record["level"] in ("INFO", "DEBUG")]
    assert at_info
    assert not [line for line in at_info if "sub-" in line or ".nii" in line]
    ended = records[-1]
    assert (ended["level"], ended["exit_code"], ended["num_failed"]) == ("INFO", 1, 1)
    (error,) = (record for record in records if record["level"] == "ERROR")
    assert error["message"].startswith("1 of 12 volumes failed")
    assert "12 examples" not in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["build", "--log-format=json"],
        ["--log-format=json", "inspect", "none"],
        ["verify", "none", "--deeep", "--log_format", "json"],
    ],
)
def test_a_complaint_is_a_record_too(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) in (cli.USAGE, cli.FAILED)
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [r["message"] for r in records if r["level"] == "ERROR"]


def test_records_of_other_libraries_are_json_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*_: object) -> int:
        logging.getLogger("apache_beam.runners").info("job state changed to %s", "RUNNING")
        logging.getLogger("elsewhere").debug("unheard")
        print("written\nby hand", file=sys.stderr)
        warnings.warn("beware", UserWarning, stacklevel=1)
        raise ZeroDivisionError("one\nby none")

    monkeypatch.setattr("beam_nifti.cli.dataset_commands.inspect", noisy)
    monkeypatch.setattr(warnings, "filters", [("always", None, Warning, None, 0)])
    with pytest.raises(SystemExit):
        cli.main(["inspect", "out", "--log-format=json"])
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(r["logger"], r["level"], r["message"]) for r in records[:3]] == [
        ("apache_beam.runners", "INFO", "job state changed to RUNNING"),
        ("stderr", "WARNING", "written"),
        ("stderr", "WARNING", "by hand"),
    ]
    assert (records[3]["logger"], "beware" in records[3]["message"]) == ("py.warnings", True)
    assert records[-1]["level"] == "CRITICAL"
    assert "ZeroDivisionError" in records[-1]["exception"]


def test_builds_of_one_process_count_apart() -> None:
    with show_progress(2):
        first = current_progress()
        with ThreadPoolExecutor(1) as other, show_progress(1):
            assert other.submit(current_progress).result() not in (first, current_progress())
            current_progress().add(volumes=1)
        pickle.loads(pickle.dumps(first)).add(volumes=2)  # as a step of a local runner
        assert (first.done, current_progress()) == (2, first)
    current_progress().add(volumes=3)
    assert first.done == 2


def test_a_log_gets_lines_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beam_nifti.pipeline.progress._LINE_SECONDS", 0.01)
    for log_format in logs.FORMATS:
        with logs.on_stderr(log_format), show_progress(8000):
            current_progress().add(volumes=900, kept=100, failed=20)
            said = ""
            while "1,020 of 8,000 volumes" not in said:
                said += capsys.readouterr().err
        line = next(line for line in said.splitlines() if "1,020" in line)
        if log_format == "json":
            record = json.loads(line)
            assert (record["done"], record["total"], record["unit"]) == (1020, 8000, "volume")
            assert record["level"] == "INFO"
        else:
            assert re.fullmatch(r"1,020 of 8,000 volumes, [\d.]+ per second, 20 failed, [\d:]+ left", line)
