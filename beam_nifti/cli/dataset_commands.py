"""The commands on existing datasets: they call the functions of the same names, and print the results."""

from __future__ import annotations

import argparse
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from beam_nifti import api
from beam_nifti.cli.printing import all_read, print_line, while_read
from beam_nifti.cli.run_summary import RunSummary, forget_earlier
from beam_nifti.cli.watching import CommandWatcher
from beam_nifti.errors import UsageError
from beam_nifti.pipeline.outputs import require_ending, require_out
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import FAILED, SUCCESS
from beam_nifti.support.process import require_modules
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import bytes_text, counted, size_text

if TYPE_CHECKING:
    from beam_nifti.record.dataset_info import DatasetInfo

_SHOWN_LEAKS = 20  # pairs of records in different splits to print; the page has more


def verify(run: RunSummary, options: argparse.Namespace, _: list[str]) -> int:
    """`beam-nifti verify`."""
    forget_earlier(options)
    run.output = storage.absolute(options.output)
    run.manifest = storage.absolute(options.manifest) if options.manifest else None
    report = api.verify(
        options.output,
        manifest=options.manifest,
        deep=options.deep,
        preprocess=options.preprocess,
        anonymous_ids=options.anonymous_ids,
        workers=options.workers,
        progress=CommandWatcher(run, options),
    )
    run.know(
        num_examples=report.num_examples,
        num_shards=report.num_shards,
        num_bytes=report.num_bytes,
        num_deep=report.num_deep,
        num_problems=len(report.problems),
    )
    for problem in report.problems:
        logs.LOGGER.warning("%s", problem)
    for note in report.notes:
        logs.LOGGER.info("%s", note)
    rebuilt = f", {report.num_deep} rebuilt from their images" if report.num_deep else ""
    problems = "" if report.ok else f"{counted(len(report.problems), 'problem')} in "
    with while_read():
        print_line(
            f"{'ok' if report.ok else 'failed':<9}{problems}{counted(report.num_examples, 'example')}, "
            f"{counted(report.num_shards, 'shard')}, {bytes_text(report.num_bytes)}{rebuilt}: "
            f"{options.output}"
        )
    return SUCCESS if report.ok else FAILED


def convert(run: RunSummary, options: argparse.Namespace, _: list[str]) -> int:
    """`beam-nifti convert`."""
    forget_earlier(options)
    run.output = output = storage.absolute(options.output)
    info = api.convert(
        options.old, options.output, workers=options.workers, progress=CommandWatcher(run, options)
    )
    _know(run, info)
    with while_read():
        if run.num_kept:
            print_line(f"kept     {counted(run.num_kept, 'example')} of an earlier run")
        print_line(f"dataset  {_size_of(info)}: {output}")
        if info.failures:
            print_line(f"failed   {counted(info.num_failures, 'volume')}, listed in {run.failures_path}")
        call = info.loading_call(output, batch_size=8)
        print_line(f"read it  from beam_nifti.reader import load_dataset; dataset = {call}")
    return SUCCESS


def relabel(run: RunSummary, options: argparse.Namespace, _: list[str]) -> int:
    """`beam-nifti relabel`."""
    forget_earlier(options)
    run.output, run.manifest = storage.absolute(options.output), storage.absolute(options.manifest)
    info = api.relabel(
        options.output,
        options.manifest,
        label_column=options.label_column,
        missing_label=options.missing_label,
        anonymous_ids=options.anonymous_ids,
        overwrite=options.overwrite,
        workers=options.workers,
        progress=CommandWatcher(run, options),
    )
    _know(run, info)
    with while_read():
        print_line(f"dataset  {_size_of(info)}: {run.output}")
    return SUCCESS


def _know(run: RunSummary, info: DatasetInfo) -> None:
    """Note the dataset that was made of another one."""
    assert run.output is not None
    run.know(
        fingerprint=info.config["fingerprint"],
        num_examples=info.num_examples,
        num_failed=info.num_failures,
        failures_path=storage.join(run.output, info.failures) if info.failures else None,
        num_shards=len(info.shards),
        num_bytes=info.num_bytes,
    )


def _size_of(info: DatasetInfo) -> str:
    examples, shards = counted(info.num_examples, "example"), counted(len(info.shards), "shard")
    return f"{examples}, {shards}, {bytes_text(info.num_bytes)}"


def withdraw(run: RunSummary, options: argparse.Namespace, _: list[str]) -> int:
    """`beam-nifti withdraw`."""
    from beam_nifti.inspection.description import withdrawal_text

    forget_earlier(options)
    run.output, run.manifest = storage.absolute(options.output), storage.absolute(options.manifest)
    info = api.withdraw(
        options.output,
        options.participant,
        manifest=options.manifest,
        anonymous_ids=options.anonymous_ids,
        overwrite=options.overwrite,
        workers=options.workers,
        progress=CommandWatcher(run, options),
    )
    _know(run, info)
    with while_read():
        print_line(f"withdrawn {withdrawal_text(asdict(info.withdrawals[-1]))}")
        print_line(f"dataset   {_size_of(info)}: {run.output}")
    return SUCCESS


def inspect(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti inspect`."""
    description = api.inspect(options.output, options.record)
    with all_read():
        print(dump_json(dict(description), indent=2) if options.json else description)
    return SUCCESS


def diff(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti diff`."""
    from beam_nifti.inspection.diff import diff_as_json

    difference = api.diff(options.before, options.after)
    with all_read():
        print(dump_json(diff_as_json(difference), indent=2) if options.json else difference)
    return FAILED if difference else SUCCESS


def extract(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti extract`."""
    from beam_nifti.inspection.extract import choose_paths, read_volumes, refuse_sources

    ids = list(dict.fromkeys(options.id))
    if options.mask and options.target:
        raise UsageError("--mask and --target each name what to write; drop one of them")
    paths = choose_paths(ids, options.out, "_mask" if options.mask else "_target" if options.target else "")
    for path in paths:
        require_out(path, overwrite=options.overwrite)
    refuse_sources(options.output, paths)
    for volume, path in zip(read_volumes(options.output, ids), paths, strict=True):
        volume = volume.on_source_grid() if options.on_source_grid else volume
        written = volume.of_mask() if options.mask else volume.of_target() if options.target else volume
        written.save(storage.absolute(path))
        with while_read():
            print_line(f"image    {size_text(written.voxels.shape)} {written.voxels.dtype}: {path}")
    return SUCCESS


def report(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    """`beam-nifti report`."""
    summary = api.report(
        options.output,
        options.out,
        pictures=options.pictures,
        by=options.by,
        workers=options.workers,
        pipeline_options=beam_flags,
        progress=CommandWatcher(run, options),
    )
    for problem in summary.problems:
        logs.LOGGER.warning("%s", problem)
    leaks = [copy for copy in summary.copies if copy.is_leak][:_SHOWN_LEAKS]
    for leak in leaks:
        logs.LOGGER.warning("%s", leak)
    if (more := summary.num_leaks - len(leaks)) > 0:
        logs.LOGGER.warning("and %s in different splits", counted(more, "more pair"))
    with while_read():
        examples = counted(summary.num_examples, "example")
        outliers = counted(summary.num_outliers, "outlier")
        failed, skipped = counted(summary.num_failures, "volume"), counted(summary.num_skipped, "row")
        print_line(
            f"report   {examples}, {outliers}, {failed} failed, {skipped} skipped, "
            f"{bytes_text(summary.num_bytes)}: {options.out or 'report.html'}"
        )
    return FAILED if summary.problems else SUCCESS


def view(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti view`."""
    from beam_nifti.inspection.extract import file_name, read_volume
    from beam_nifti.reporting.view import make_view

    require_ending(options.out, ".html")
    require_modules("jinja2", "nilearn")
    out = options.out or file_name(options.id, ".html")
    path = storage.absolute(out)
    if options.open and storage.is_remote(path):
        raise UsageError(f"--open requires a local file, but --out is {out}; drop one of them")
    require_out(out, overwrite=options.overwrite)
    volume = read_volume(options.output, options.id)
    page = make_view(volume, channel=options.channel, with_mask=options.mask).encode()
    storage.write(path, page)
    with while_read():
        print_line(f"view     {bytes_text(len(page))}: {out}")
    if options.open:
        webbrowser.open(Path(path).as_uri())
    return SUCCESS


def card(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti card`."""
    from beam_nifti.inspection.card import write_card

    words = {
        "name": options.name,
        "description": options.description,
        "license": options.license,
        "url": options.url,
        "citeAs": options.citation,
    }
    about = {key: text for key, text in words.items() if text is not None}
    for path in write_card(options.output, about, overwrite=options.overwrite):
        with while_read():
            print_line(f"card     {path}")
    return SUCCESS
