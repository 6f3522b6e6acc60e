"""`beam-nifti build`, `check` and `analyze`: call the functions of the same names, and print the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

from beam_nifti import api
from beam_nifti.cli.printing import complain, print_line, while_read
from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.cli.watching import CommandWatcher
from beam_nifti.errors import BuildSummary, TooManyFailures, UsageError
from beam_nifti.pipeline.options import OPTIONS
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import FAILED, SUCCESS
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import bytes_text, counted, size_text

if TYPE_CHECKING:
    from beam_nifti.pipeline.build import Estimate
    from beam_nifti.pipeline.options import BuildOptions
    from beam_nifti.pipeline.plan import BuildPlan, CheckPlan
    from beam_nifti.pipeline.resume import Reuse

_AGAIN: Final = (
    "nothing was measured; repair the failed images, or accept the failures by adding that --max-bad-fraction"
)
_NO_LABELS: Final = "labels   none: the manifest has no column 'label' (see --label-column)"


def build(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    """`beam-nifti build`."""
    manifest, output = storage.absolute(options.manifest), storage.absolute(options.output)
    run.know(dry_run=options.dry_run, manifest=manifest, output=output)
    watcher = CommandWatcher(run, options)
    try:
        api.build(
            options.manifest,
            options.output,
            pipeline_options=beam_flags,
            like=options.like,
            config=options.config,
            dry_run=options.dry_run,
            progress=watcher,
            **_given(options),
        )
    except TooManyFailures as e:
        run.fail(e)
        if watcher.plan is None:  # while the cohort was measured
            run.know(num_failed=e.summary.num_failed, failures=e.summary.failures)
            return complain(f"{e}\n{_AGAIN}", FAILED)
        with while_read():
            _report(watcher.plan, e.summary, run.counters)
        is_there = watcher.plan.has_published
        return complain(
            f"{e}\n{'the dataset is unchanged' if is_there else 'the dataset is not complete'}; "
            "repair the failed images and run the same command again, which loads only those, or accept the "
            "failures by adding that --max-bad-fraction",
            FAILED,
        )
    sys.stderr.write(watcher.noise.getvalue())
    with while_read():
        if watcher.estimate:
            _print_estimate(watcher.plan, watcher.estimate)
        elif watcher.summary:
            _report(watcher.plan, watcher.summary, run.counters)
    return SUCCESS


def analyze(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    """`beam-nifti analyze`."""
    run.know(manifest=storage.absolute(options.manifest))
    try:
        analysis = api.analyze(
            options.manifest,
            out=options.out,
            pipeline_options=beam_flags,
            like=options.like,
            config=options.config,
            progress=CommandWatcher(run, options),
            **_given(options),
        )
    except TooManyFailures as e:
        run.fail(e)
        run.know(num_failed=e.summary.num_failed)
        return complain(f"{e}\n{_AGAIN}", FAILED)
    found = analysis.statistics
    run.know(num_volumes=found.num_volumes + found.num_failed, num_failed=found.num_failed)
    with while_read():
        print(dump_json(dict(analysis), indent=2) if options.json else analysis)
    return SUCCESS


def check(run: RunSummary, options: argparse.Namespace, beam_flags: list[str]) -> int:
    """`beam-nifti check`."""
    watcher = CommandWatcher(run, options)
    survey = api.check(
        options.manifest,
        voxels=options.voxels,
        out=options.out,
        pipeline_options=beam_flags,
        like=options.like,
        config=options.config,
        progress=watcher,
        **_given(options),
    )
    run.know(num_volumes=survey["num_images"], num_failed=survey["num_bad"])
    with while_read():
        if options.json:
            print(dump_json(dict(survey), indent=2))
        else:
            print(survey)
            _print_unlabelled(watcher.plan)
    if across := survey["twins_across_splits"]:
        logs.LOGGER.warning("%s", _leak_warning(across))
    if survey.refusal:
        raise UsageError(f"a build with these flags would write nothing: {survey.refusal}")
    return SUCCESS if survey.ok else FAILED


def _given(options: argparse.Namespace) -> BuildOptions:
    """The options of a build that were typed."""
    return cast("BuildOptions", {name: getattr(options, name) for name in OPTIONS})


def _report(plan: BuildPlan, summary: BuildSummary, counters: Mapping[str, int]) -> None:
    from beam_nifti.record.dataset_info import read_info

    output = plan.config.output
    if skipped := counters.get("volumes-skipped", 0):
        print_line(f"kept     {counted(skipped, 'example')} of an earlier run")
    if plan.config.recheck and (num_compared := counters.get("examples-compared", 0)):
        num = counters.get("examples-differing", 0)
        found = f"{num:,} {'differs' if num == 1 else 'differ'}" if num else "none differs"
        found += ", rebuilt" if num and summary.complete else ""
        print_line(f"compared {counted(num_compared, 'example')} with their images: {found}")
    print_line(
        f"{'dataset' if summary.complete else 'so far '}  {counted(summary.num_written, 'example')}, "
        f"{counted(summary.num_shards, 'shard')}, {bytes_text(summary.num_bytes)}: {output}"
    )
    if summary.num_failed:
        print_line(f"failed   {counted(summary.num_failed, 'volume')}, listed in {summary.failures_path}")
        if summary.complete:  # else the error has them
            from beam_nifti.pipeline.failures import format_groups

            for line in format_groups(summary.reasons, summary.num_failed):
                print_line(f"         {line}")
    if plan.config.record.nonfinite is not None:
        voxels = counted(summary.num_nonfinite, "NaN or infinite voxel")
        print_line(f"replaced {voxels} of {counted(summary.num_made_finite, 'example')}")
    _print_labels(plan)
    if summary.complete:
        call = read_info(output).loading_call(output, batch_size=8)
        print_line(f"read it  from beam_nifti.reader import load_dataset; dataset = {call}")


def _print_labels(plan: BuildPlan) -> None:
    from beam_nifti.manifest.labels import name_classes

    if plan.config.columns.label is None:
        print_line(_NO_LABELS)
    for number, column in enumerate(plan.config.record.labels or ()):
        classes = column.classes or ()
        shown = name_classes(classes)
        which = f", {len(classes)}: {shown}" if column.kind == "class" else ""
        print_line(f"{'' if number else 'labels':<9}{column.name}: {column.kind}{which}")
    _print_unlabelled(plan)


def _print_unlabelled(plan: BuildPlan | CheckPlan) -> None:
    if plan.num_skipped:
        print_line(f"skipped  {counted(plan.num_skipped, 'row')} without a {plan.config.columns.lacking}")
    if plan.num_unlabelled:
        print_line(f"kept     {counted(plan.num_unlabelled, 'row')} without a label")
    if plan.num_unmasked:
        print_line(f"kept     {counted(plan.num_unmasked, 'row')} without a mask")


def _print_estimate(plan: BuildPlan, estimate: Estimate) -> None:
    splits = ", ".join(f"{name} {count}" for name, count in plan.split_examples.items())
    most = max(len(positions) for split in plan.split_sizes for positions in plan.shard_ranges(split))
    print_line(f"would write to {plan.config.output}")
    of = " of" if plan.shape else ", the first of"
    up_to = "up to " if plan.config.record.max_frames is not None else ""
    print_line(f"volumes  {up_to}{plan.num_examples}{of} {size_text(estimate.shape)} voxels ({splits})")
    print_line(f"shards   {plan.num_shards} of up to {counted(most, 'example')}")
    if plan.config.record.is_of_cohort and plan.config.record.rescale_stats is None:
        measured = plan.config.record.measured_splits
        num = sum(plan.split_examples[split] for split in measured)
        print_line(f"measure  {counted(num, 'volume')} of {' and '.join(measured)}, before the first record")
    print_line(f"bytes    about {bytes_text(estimate.num_bytes)}, estimated from the first image's header")
    if estimate.reuse:
        _print_reuse(estimate.reuse)
    _print_labels(plan)


def _print_reuse(reuse: Reuse) -> None:
    for number, what in ((reuse.num_published, "the dataset"), (reuse.num_unfinished, "an unfinished build")):
        if number:
            unless = "" if reuse.is_checked else ", unless their images have changed"
            print_line(f"keep     {counted(number, 'example')} from {what}{unless}")
    print_line(f"build    {counted(reuse.num_rebuilt, 'example')}")
    if reuse.replaced:
        size = bytes_text(sum(shard.num_bytes for shard in reuse.replaced))
        shards = counted(len(reuse.replaced), "shard")
        print_line(f"delete   {shards} of revision {reuse.revision} ({size}), once the new ones are complete")


def _leak_warning(across: Sequence[Mapping[str, str]]) -> str:
    named = " and ".join(f"{name} ({split})" for name, split in across[0].items())
    return (
        f"{counted(len(across), 'image')} probably in several splits, such as {named}: their sizes and "
        "first 64 KB are equal. Keep one of them, or give them one split"
    )
