"""Every option of every command has an effect, is refused, or is one that `check` only validates."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.cli.build_options import FOR_VOXELS, WITHOUT_EFFECT
from beam_nifti.config import BuildConfig
from beam_nifti.errors import BeamNiftiError, UsageError
from beam_nifti.pipeline.build import plan_check
from beam_nifti.pipeline.plan import read_build_manifest
from beam_nifti.pipeline.survey import Tally, make_report, survey_image
from tests.build_helpers import build_config, check_config
from tests.images import brain, write_image, write_manifest
from tests.pages import ROOT

Row = Sequence[str] | str
"""The value of an option, and further options that it is of use with; or the test of its effect."""

BUILD: dict[str, Row] = {
    "--config": "pipeline/test_build_options.py::test_a_file_has_the_values_of_python",
    "--like": "pipeline/test_build_options.py::test_the_command_line_precedes_the_file_and_that_the_dataset",
    "--without": "pipeline/test_build_options.py::test_what_only_comes_with_an_option_goes_with_it",
    "--path-column": ["second"],
    "--mask-column": ["mask"],
    "--target-column": ["lesion"],
    "--label-column": ["age:class"],
    "--missing-label": ["skip"],
    "--missing-mask": ["skip", "--mask-column=lesion"],
    "--id-column": ["name"],
    "--anonymous-ids": ["key"],
    "--split": ["train=0.5,test=0.5"],
    "--stratify": ["site", "--split=train=0.5,test=0.5"],
    "--split-seed": ["1", "--split=train=0.5,test=0.5"],
    "--examples-per-shard": ["2"],
    "--num-shards": ["3"],
    "--shuffle-seed": ["-3"],
    "--compression": ["none"],
    "--compression-level": ["1"],
    "--rescale": ["window:-160,240"],
    "--rescale-within": ["above:-5"],
    "--rescale-split": "pipeline/test_analyze.py::test_the_measured_splits_are_those_that_are_named",
    "--rescale-stats": "pipeline/test_analyze.py::test_a_build_takes_the_file_of_an_analysis",
    "--clip": ["", "--rescale=percentile:1,99"],
    "--voxel-dtype": ["uint8"],
    "--mask-dtype": ["uint16", "--mask-column=mask"],
    "--map-labels": ["1=0", "--mask-column=mask", "--crop-foreground=mask"],
    "--frames": ["first"],
    "--max-frames": ["2", "--frames=each"],
    "--complex": ["magnitude"],
    "--nonfinite": ["zero"],
    "--preprocess": ["beam_nifti.volume.preprocess:orient"],
    "--orientation": ["SRA"],
    "--spacing": ["1,1,1"],
    "--resize": ["9,9,9"],
    "--resize-longest": ["9"],
    "--align": ["first", "--path-column=path,other"],
    "--reference": ["6.nii"],
    "--antialias": ["", "--spacing=3,3,3"],
    "--separate-z": ["auto", "--spacing=1,1,9"],
    "--interpolation": ["cubic", "--spacing=1,1,1"],
    "--mask-interpolation": ["linear", "--spacing=1,1,1.3", "--mask-column=mask"],
    "--crop-foreground": ["above:-1"],
    "--shape": ["9,9,9"],
    "--allow-mixed-shapes": [""],
    "--max-bad-fraction": ["0.9"],
    "--overwrite": [""],
    "--recheck": "pipeline/test_changes.py::test_recheck_replaces_what_differs_and_keeps_the_rest",
    "--temp-location": ["tmp"],
    "--workers": ["1"],
    "--dry-run": "cli/test_cli.py::test_dry_run_writes_nothing",
    "--quiet": "cli/test_cli.py::test_a_terminal_gets_a_bar",
    "--summary-json": "cli/test_monitoring.py::test_a_build_tells_how_it_ended",
    "--metrics-file": "cli/test_monitoring.py::test_prometheus_can_read_the_metrics_of_a_build",
}
CHECK: dict[str, Row] = {
    "--rescale": ["cohort:zscore"],
    "--rescale-split": "pipeline/test_analyze.py::test_check_tells_what_would_be_measured",
    "--rescale-stats": "pipeline/test_analyze.py::test_check_tells_what_would_be_measured",
    "--json": "pipeline/test_check.py::test_the_table_and_the_file_say_the_same",
    "--out": "pipeline/test_check.py::test_the_table_and_the_file_say_the_same",
    "--voxels": "pipeline/test_check_voxels.py::test_what_voxels_show_is_reported",
    "--max-bad-fraction": "pipeline/test_check_and_build.py::test_check_and_build_of_the_command_line_agree",
    "--workers": "pipeline/test_runners.py::test_workers_of_this_machine",
    "--nonfinite": "volume/test_nonfinite.py::test_check_crops_to_finite_voxels",
    "--quiet": "cli/test_monitoring.py::test_a_log_gets_lines_of_progress",
    "--summary-json": "cli/test_monitoring.py::test_a_dry_run_a_check_and_a_verification_tell_too",
    "--temp-location": "cli/test_options.py::test_beam_gets_the_temporary_folder_of_check",
}
JOINING = "manifest/test_joining.py::"
JOIN: dict[str, Row] = {
    "--join": f"{JOINING}test_every_source_can_be_joined",
    "--on": f"{JOINING}test_ids_of_several_columns",
    "--join-columns": f"{JOINING}test_chosen_columns_are_added_and_renamed",
    "--unmatched": f"{JOINING}test_rows_without_a_partner_are_named",
}
OTHERS: dict[str, dict[str, Row]] = {
    "init": {
        "--out": "cli/test_init.py::test_a_study_of_several_modalities_with_masks_on_another_grid",
        "--overwrite": "cli/test_init.py::test_nothing_is_replaced_and_nothing_written_for_nothing",
    },
    "manifest bids": {
        **JOIN,
        "--suffix": ["T2w"],
        "--session": ["one"],
        "--entity": ["run=1"],
        "--mask-suffix": ["dseg"],
        "--derivatives": ["fs", "--mask-suffix=dseg"],
        "--label": ["age"],
        "--column": ["sex"],
        "--all-images": [""],
        "--out": ["m.tsv"],
        "--overwrite": ["", "--out=old.tsv"],
    },
    "manifest msd": {
        **JOIN,
        "--only": ["train"],
        "--out": ["m.tsv"],
        "--overwrite": ["", "--out=old.tsv"],
    },
    "manifest table": {
        **JOIN,
        "--out": f"{JOINING}test_every_format_is_joined",
        "--overwrite": f"{JOINING}test_no_input_is_replaced_and_paths_stay_true",
    },
    "manifest glob": {
        **JOIN,
        "--all-images": [""],
        "--out": ["m.tsv"],
        "--overwrite": ["", "--out=old.tsv"],
    },
    "verify": {
        "--manifest": ["other.tsv"],
        "--anonymous-ids": ["key"],
        "--deep": ["1", "--manifest=m.tsv"],
        "--preprocess": ["a:b", "--deep=1", "--manifest=m.tsv"],
        "--workers": ["0"],
        "--quiet": "cli/test_monitoring.py::test_a_log_gets_lines_of_progress",
        "--summary-json": ["ended.json"],
    },
    "convert": {
        "--workers": "inspection/test_convert.py::test_workers_do_not_change_the_bytes",
        "--quiet": "inspection/test_convert.py::test_the_command",
        "--summary-json": "inspection/test_convert.py::test_the_command",
    },
    "relabel": {
        "--label-column": "pipeline/test_relabeling.py::test_labels_may_be_of_other_columns",
        "--missing-label": "pipeline/test_relabeling.py::test_rows_are_neither_lost_nor_invented",
        "--anonymous-ids": "pipeline/test_relabeling.py::test_anonymous_ids",
        "--overwrite": "pipeline/test_withdrawal.py::test_what_may_hold_more_records_is_refused_or_discarded",
        "--workers": "pipeline/test_relabeling.py::test_workers_do_not_change_the_bytes",
        "--quiet": "pipeline/test_relabeling.py::test_the_command",
        "--summary-json": "pipeline/test_relabeling.py::test_the_command",
    },
    "withdraw": {
        "--participant": "pipeline/test_withdrawal.py::test_the_command",
        "--manifest": "pipeline/test_withdrawal.py::test_the_command",
        "--anonymous-ids": "pipeline/test_withdrawal.py::test_anonymous_ids",
        "--overwrite": "pipeline/test_withdrawal.py::test_what_may_hold_more_records_is_refused_or_discarded",
        "--workers": "pipeline/test_relabeling.py::test_workers_do_not_change_the_bytes",
        "--quiet": "pipeline/test_withdrawal.py::test_the_command",
        "--summary-json": "pipeline/test_withdrawal.py::test_the_command",
    },
    "inspect": {"--record": ["a"], "--json": [""]},
    "diff": {"--json": [""]},
    "extract": {
        "--id": ["b"],
        "--out": ["x.nii"],
        "--mask": [""],
        "--target": [""],
        "--on-source-grid": "inspection/test_restoring.py::"
        "test_records_are_extracted_on_the_grids_of_their_sources",
        "--overwrite": ["", "--out=old.nii"],
    },
    "view": {
        "--id": "reporting/test_view.py::test_left_is_left",
        "--mask": "reporting/test_view.py::test_left_is_left",
        "--channel": "reporting/test_view.py::test_a_channel_is_chosen",
        "--out": "reporting/test_view.py::test_left_is_left",
        "--open": "reporting/test_view.py::test_it_opens_the_page",
        "--overwrite": "reporting/test_view.py::test_refusals",
    },
    "card": {
        "--name": ["Brains"],
        "--description": ["Heads"],
        "--license": ["MIT"],
        "--citation": ["Us"],
        "--url": ["https://example.org"],
        "--overwrite": "inspection/test_card.py::test_it_is_the_same_every_time_and_replaces_nothing_unasked",
    },
    "report": {
        "--out": "reporting/test_report.py::test_the_command",
        "--pictures": "reporting/test_report.py::test_pictures_are_a_sample_and_the_outliers",
        "--by": "reporting/test_report.py::test_groups_that_differ_are_noted",
        "--workers": "pipeline/test_runners.py::test_workers_of_this_machine",
        "--quiet": "reporting/test_report.py::test_the_command",
    },
}
_ANALYZED = "pipeline/test_analyze.py::test_an_option_changes_what_is_measured"
ANALYZE: dict[str, Row] = {
    **dict.fromkeys(
        (
            *("--path-column", "--mask-column", "--split", "--stratify", "--split-seed", "--frames"),
            *("--max-frames", "--complex", "--rescale", "--rescale-within", "--rescale-split"),
            *("--nonfinite", "--align", "--preprocess", "--orientation", "--reference", "--spacing"),
            *("--resize", "--resize-longest", "--interpolation", "--mask-interpolation", "--antialias"),
            *("--separate-z", "--crop-foreground", "--shape", "--allow-mixed-shapes", "--map-labels"),
            *("--missing-label", "--missing-mask", "--label-column", "--max-bad-fraction", "--id-column"),
            *("--anonymous-ids", "--mask-dtype", "--target-column"),
        ),
        _ANALYZED,
    ),
    **{flag: BUILD[flag] for flag in ("--config", "--like", "--without", "--quiet")},
    **{flag: CHECK[flag] for flag in ("--workers", "--temp-location")},
    "--json": "pipeline/test_analyze.py::test_the_command_prints_and_writes_the_same",
    "--out": "pipeline/test_analyze.py::test_the_command_prints_and_writes_the_same",
    "--summary-json": "pipeline/test_analyze.py::test_the_command_prints_and_writes_the_same",
}
TABLE = {"analyze": ANALYZE, "build": BUILD, "check": {**BUILD, **CHECK}, **OTHERS}


def parser_of(command: str) -> argparse.ArgumentParser:
    return dict(options.commands())[command]


def unused_by_check() -> dict[str, argparse.Action]:
    """The flags that `check` documents as without effect on what headers show."""
    groups = [g for g in parser_of("check")._action_groups if g.title in (FOR_VOXELS, WITHOUT_EFFECT)]
    assert len(groups) == 2
    return {action.option_strings[0]: action for group in groups for action in group._group_actions}


@pytest.mark.parametrize("command", [name for name, _ in options.commands()])
def test_every_option_has_a_row_here(command: str) -> None:
    flags = {f for f in parser_of(command)._option_string_actions if f.startswith("--")}
    assert TABLE[command].keys() == flags - {"--help", "--log-format"}


def test_check_takes_every_flag_of_build() -> None:
    assert set(options.flags_of_commands()["build"]) <= set(options.flags_of_commands()["check"])


def test_the_options_of_check_do_not_speak_of_an_output_that_it_lacks() -> None:
    assert not [a.help for a in parser_of("check")._actions if "OUTPUT" in (a.help or "")]


NAMED = [(c, f, row) for c, rows in TABLE.items() for f, row in rows.items() if isinstance(row, str)]


@pytest.mark.parametrize(("command", "flag", "name"), NAMED)
def test_the_tests_that_rows_name_exist(command: str, flag: str, name: str) -> None:
    module, _, function = name.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / module).read_text(), (command, flag)


# build and check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind that an option is for, and a manifest of them."""
    root = tmp_path_factory.mktemp("options")
    rows = []
    for number in range(7):
        shape, voxels = (6, 5, 4 + number // 6), None
        voxels = brain(shape, number).astype(np.complex64) if number == 5 else brain(shape, number)
        if number == 4:
            voxels = np.stack([voxels] * 2, axis=3)
        write_image(root / f"{number}.nii", voxels)
        write_image(root / f"other{number}.nii", brain((7, 6, 6), number))
        write_image(root / f"mask{number}.nii", np.ones((6, 5, 4), np.uint8))
        rows.append(
            {
                "path": f"{number}.nii",
                "second": f"{(number + 1) % 6}.nii",
                "mask": f"mask{number}.nii",
                "other": f"other{number}.nii",
                "lesion": "" if number == 1 else f"mask{number}.nii",
                "age": "" if number == 1 else number,
                "name": f"n{number}",
                "site": "ab"[number % 2],
                "participant_id": f"p{max(number, 2)}",
                "session_id": f"s{number}",
            }
        )
    write_manifest(root / "m.tsv", rows)
    (root / "key").write_bytes(bytes(range(32)))
    return root


def config_of(command: str, folder: Path, *flags: str) -> BuildConfig:
    output = [str(folder / "out")] if command == "build" else []
    parsed, rest = options.parse([command, str(folder / "m.tsv"), *output, *flags])
    assert rest == []
    return build_config(parsed) if output else check_config(parsed)


def words_of(flag: str, row: Row, folder: Path) -> tuple[list[str], list[str]]:
    """An option with its value; and the further options that it is of use with."""
    value, *further = row
    if flag in ("--anonymous-ids", "--temp-location", "--reference"):
        value = str(folder / value)
    if flag == "--missing-label":
        further = ["--label-column=age"]
    return ([f"{flag}={value}"] if value else [flag]), further


def outcome_of(folder: Path, *flags: str) -> object:
    """What `check` finds, without a pipeline."""
    try:
        plan, survey = plan_check(config_of("check", folder, *flags)), Tally()
        manifest = read_build_manifest(plan.config.manifest, plan.config)
        for row in manifest.rows(manifest.kept_rows().tolist()):
            survey.add(survey_image(row, manifest.folder, plan)[0])
        return make_report(survey, [], plan)
    except BeamNiftiError as e:
        return str(e)


RUN = [(flag, row) for flag, row in BUILD.items() if not isinstance(row, str)]


@pytest.mark.parametrize(("flag", "row"), RUN)
def test_an_option_of_build_makes_another_build(flag: str, row: Row, folder: Path) -> None:
    given, further = words_of(flag, row, folder)
    assert config_of("build", folder, *given, *further) != config_of("build", folder, *further)


@pytest.mark.parametrize(("flag", "row"), [(f, row) for f, row in RUN if f not in CHECK])
def test_an_option_has_an_effect_on_check_or_is_documented_to_have_none(
    flag: str, row: Row, folder: Path
) -> None:
    given, further = words_of(flag, row, folder)
    is_alike = outcome_of(folder, *given, *further) == outcome_of(folder, *further)
    assert is_alike == (flag in unused_by_check())


@pytest.mark.parametrize("flag", [f for f, action in unused_by_check().items() if action.nargs != 0])
def test_check_refuses_what_build_refuses(
    flag: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["build", "m.tsv", "out"], ["check", "m.tsv"]):
        assert cli.main([*words, f"{flag}=1e3"]) == cli.USAGE
        assert flag in capsys.readouterr().err


def test_beam_gets_the_temporary_folder_of_check(folder: Path) -> None:
    assert config_of("check", folder, "--temp-location=gs://lab/tmp").temp_location == "gs://lab/tmp"


# The other commands

COMMANDS = [(c, f, row) for c, rows in OTHERS.items() for f, row in rows.items() if not isinstance(row, str)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BIDS study, and a dataset of two images."""
    root = tmp_path_factory.mktemp("study")
    for subject in ("a", "b"):
        for rest in ("ses-one/anat/sub-{}_ses-one_run-1_T1w", "ses-two/anat/sub-{}_ses-two_run-1_T1w"):
            write_image(root / f"bids/sub-{subject}" / f"{rest.format(subject)}.nii")
    write_image(root / "bids/sub-a/ses-one/anat/sub-a_ses-one_T2w.nii")
    for folder in ("bids", "bids/derivatives/fs"):
        write_image(root / folder / "sub-a/ses-one/anat/sub-a_ses-one_run-1_dseg.nii")
    write_image(root / "bids/sub-b/ses-one/anat/sub-b_ses-one_run-2_T1w.nii")
    listed = {"training": [{"image": "x.nii", "label": "y.nii"}], "test": ["z.nii"]}
    for name in ("x", "y", "z"):
        write_image(root / f"msd/{name}.nii")
    (root / "msd/dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, **listed}))
    write_manifest(
        root / "bids/participants.tsv",
        [{"participant_id": f"sub-{s}", "age": 3 + i, "sex": "F"} for i, s in enumerate("ab")],
    )
    rows = []
    for name in ("a", "b"):
        write_image(root / f"{name}.nii", brain(seed=ord(name)))
        rows.append({"path": f"{name}.nii", "participant_id": name, "label": 1})
    write_manifest(root / "m.tsv", rows)
    write_manifest(root / "other.tsv", rows[:1])
    (root / "key").write_bytes(bytes(32))
    for name in ("old.nii", "old.tsv"):
        (root / name).write_bytes(b"")
    assert cli.main(["build", str(root / "m.tsv"), str(root / "out"), "--quiet", "--workers=1"]) == 0
    shutil.copytree(root / "out", root / "out2")
    return root


BASES: dict[str, list[str]] = {
    "manifest bids": ["bids", "--session=one", "--entity=run=1", "--suffix=T1w"],
    "manifest msd": ["msd"],
    "manifest glob": ["bids/**/*_T1w.nii"],
    "verify": ["out"],
    "inspect": ["out"],
    "diff": ["out", "out2"],
    "extract": ["out", "--id=a"],
    "card": ["out"],
}


@pytest.fixture
def observe(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str]], Any]:
    """Run a command in a copy of the study: exit code, text, and the files that there are then."""

    def run(argv: Sequence[str]) -> Any:
        place = tmp_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(study, place)
        monkeypatch.chdir(place)
        capsys.readouterr()
        code = cli.main(argv)
        return code, capsys.readouterr(), {p.name: p.read_bytes() for p in place.rglob("*") if p.is_file()}

    return run


@pytest.mark.parametrize(("command", "flag", "row"), COMMANDS)
def test_an_option_of_another_command_has_an_effect(
    command: str, flag: str, row: Row, observe: Callable[[Sequence[str]], Any]
) -> None:
    value, *further = row
    base = [*command.split(), *BASES[command], *further]
    if flag in ("--session", "--entity", "--suffix"):
        base = [word for word in base if not word.startswith(flag)]
    without = [*base, "--suffix=T1w"] if flag == "--suffix" else base
    assert observe([*base, f"{flag}={value}" if value else flag]) != observe(without)


# What no option takes


SINGLE = [
    (command, flag)
    for command, parser in options.commands()
    for flag, action in parser._option_string_actions.items()
    if flag.startswith("--") and action.nargs is None and not isinstance(action, argparse._AppendAction)
]
REPEATABLE = {"--session", "--entity", "--column", "--participant", "--id", "--preprocess"}


@pytest.mark.parametrize(("command", "flag"), SINGLE)
def test_no_option_takes_a_second_value(command: str, flag: str) -> None:
    action = parser_of(command)._option_string_actions[flag]
    number = action.type if callable(action.type) else str
    values = list(action.choices)[:2] if action.choices else [number("1"), number("2")]
    with pytest.raises(UsageError, match=rf"{flag} is given twice, as {values[0]} and {values[1]}"):
        options.parse([*command.split(), *(f"{flag}={value}" for value in values)])


@pytest.mark.parametrize("command", [name for name, _ in options.commands()])
def test_an_option_that_may_be_repeated_is_documented_so(command: str) -> None:
    for action in parser_of(command)._actions:
        if isinstance(action, argparse._AppendAction):
            assert set(action.option_strings) <= REPEATABLE
            assert re.search("may be repeated", action.help or "")


@pytest.mark.parametrize("value", ["", " "])
def test_no_argument_is_empty(value: str) -> None:
    for command, parser in options.commands():
        for action in parser._actions:
            if action.nargs == 0 or action.choices or action.type is not None:
                continue  # whose values are refused as no number and none of the choices
            positional = parser._get_positional_actions()
            words = ["x"] * len(positional)
            if action in positional:
                name, words[positional.index(action)] = action.metavar, value
            else:
                name = action.option_strings[0]
                words.append(f"{name}={value}")
            with pytest.raises(UsageError, match=rf"{name} is empty; was a variable not set\?"):
                options.parse([*command.split(), *words])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["verify", "out", "--shape=1,2,3"],
            "--shape is an option of check, analyze and build, not of verify",
        ),
        (["inspect", "out", "--jsn"], "unknown flag --jsn; did you mean --json?"),
        (["verify", "out", "--manifes=x"], "did you mean --manifest?"),
        (
            ["build", "--parallelism", "3", "m.tsv", "out"],
            "write the values of Apache Beam's flags as --flag=VALUE",
        ),
        (["--log-format=json", "inspect", "out", "--log-format=text"], "--log-format is given twice"),
        (["build", "m.tsv", "out", "--rescale=none", "--rescale", "minmax"], "--rescale is given twice"),
        (["build", "m.tsv", "out", "--shuffle-seed=1e3"], "invalid int value: '1e3'"),
    ],
)
def test_what_is_refused_names_the_remedy(argv: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        options.parse(argv)


NUMBERS = [
    "--workers={}",
    "--max-bad-fraction={}",
    "--shuffle-seed={}",
    "--shape={},9,10",
    "--resize=9,{},10",
    "--resize-longest={}",
    "--spacing=1,{},1",
    "--rescale=window:{},1e99",
    "--rescale-within=above:{}",
    "--split=train={},test=.1",
]


@pytest.mark.parametrize("number", ["1_0", "\uff11\uff10", "1e1_0", "0x10", "1 0", "\u22121", "nan", "1d2"])
@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_are_those_that_every_program_reads_alike(flag: str, number: str) -> None:
    argument = flag.format(number)
    with pytest.raises(UsageError, match=re.escape(number)):
        build_config(options.parse(["build", "m.tsv", "out", argument])[0])
