"""The options of `beam-nifti build` and `check`: what is made of a manifest."""

from __future__ import annotations

import argparse

from beam_nifti.cli.common_options import (
    Commands,
    add_beam,
    add_command,
    add_output,
    add_overwrite,
    add_quiet,
    add_summary,
    add_workers,
)
from beam_nifti.config import (
    COMPLEX_PARTS,
    COMPRESSION_LEVELS,
    COMPRESSIONS,
    FRAMES,
    MASK_DTYPES,
    MISSING_LABELS,
    VOXEL_DTYPES,
    BuildConfig,
)
from beam_nifti.pipeline.options import OPTIONS, make_config

WITHOUT_EFFECT = "without effect on check"
"""Title of the flags that `check` takes only because `build` does."""

_BUILD_EXAMPLES = """\
examples:
  beam-nifti build cohort/manifest.tsv cohort/dataset --dry-run
  beam-nifti build cohort/manifest.tsv cohort/dataset
  beam-nifti build gs://lab/manifest.csv gs://lab/dataset --shuffle-seed 1 \\
      --runner=DataflowRunner --region=europe-west1 --temp-location=gs://lab/tmp

A build that was stopped continues when the same command is given again. Rows that were appended to the
manifest are added; volumes that failed are tried again.

"""

_CHECK_EXAMPLES = """\
examples:
  beam-nifti check cohort/manifest.tsv
  beam-nifti check cohort/manifest.tsv --orientation RAS --spacing 1,1,1 --shape 192,224,192
  beam-nifti check cohort/manifest.tsv --json | jq '.problems[].example_id'

Takes every flag of build, so that a script can give both the same. Reads 64 KB of each image. The exit code
is that of a build with these flags, as far as headers tell.

"""


def add_commands(commands: Commands) -> None:
    """Add `check` and `build`."""
    _add_check(commands)
    _add_build(commands)


def _add_build(commands: Commands) -> None:
    build = add_command(commands, "build", "write the dataset that a manifest describes", _BUILD_EXAMPLES)
    build.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="table of images: .csv, .tsv, .jsonl or .parquet with the columns path, label, "
        "participant_id, session_id, split (all but path optional; further ones are kept in the index)",
    )
    add_output(build)

    _add_content(build)
    order = _add_shards(build)
    _add_shuffle_seed(order)
    _add_compression_level(order)
    voxels = build.add_argument_group("voxels")
    _add_rescaling(voxels)
    _add_voxels(voxels)
    _add_preparation(build)
    run = build.add_argument_group("running")
    _add_max_bad_fraction(run)
    _add_overwrite(run)
    _add_recheck(run)
    _add_dry_run(run)
    _add_running(run)
    _add_metrics_file(run)
    _default_to_none(build)
    add_beam(build, "with their values after =, as --runner=FlinkRunner --flink_master=HOST:8081")


def _add_check(commands: Commands) -> None:
    check = add_command(
        commands,
        "check",
        "read the headers of a manifest's images, and report what a build would make of them",
        _CHECK_EXAMPLES,
    )
    check.add_argument("manifest", metavar="MANIFEST", help="as for build")
    _add_content(check)
    _add_shards(check)
    _add_voxels(check.add_argument_group("voxels"))
    _add_preparation(check)
    run = check.add_argument_group("running")
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    run.add_argument(
        "--out",
        metavar="FILE",
        help="also write the report as JSON to FILE; required on a cluster, where workers must reach it",
    )
    _add_max_bad_fraction(run)
    _add_running(run)
    unused = check.add_argument_group(
        WITHOUT_EFFECT,
        "Their values are checked as build checks them, so that both can be given the same flags.",
    )
    _add_rescaling(unused)
    _add_shuffle_seed(unused)
    _add_compression_level(unused)
    _add_overwrite(unused)
    _add_recheck(unused)
    _add_dry_run(unused)
    _add_metrics_file(unused)
    _default_to_none(check)
    add_beam(check)


def _default_to_none(command: argparse.ArgumentParser) -> None:
    """Tell options that were typed from the others, whose defaults are those of `make_config`."""
    command.set_defaults(**dict.fromkeys(OPTIONS))


def _add_content(command: argparse.ArgumentParser) -> None:
    _add_sources(command)
    _add_columns(command)
    _add_privacy(command)
    _add_splits(command)


def _add_sources(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "options from elsewhere", "What the command line gives precedes --config, and that precedes --like."
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help='TOML file of options by their names, such as rescale = "zscore", spacing = [1, 1, 1] or '
        'like = "cohort/dataset"; default: none',
    )
    group.add_argument(
        "--like",
        metavar="DATASET",
        help="take the options that decided the content of this dataset; --preprocess and --anonymous-ids "
        "must be given again, and are compared; default: none",
    )
    group.add_argument(
        "--without",
        metavar="NAME,…",
        help="options of --config and --like that are not taken, such as clip,spacing; default: none",
    )


def _add_columns(command: argparse.ArgumentParser) -> None:
    columns = command.add_argument_group("manifest columns")
    columns.add_argument(
        "--path-column",
        metavar="NAME",
        help="column of image paths; several, separated by commas, such as T1w,T2w,FLAIR, become the "
        "channels of one record: each is rescaled separately, and all must have the same voxel grid; "
        "default: path",
    )
    columns.add_argument(
        "--mask-column",
        metavar="NAME",
        help="column of label maps: images of whole numbers on the same voxel grid as the images. They are "
        "prepared like the images, by nearest neighbour, and stored without rescaling; default: none",
    )
    columns.add_argument(
        "--label-column",
        metavar="NAME[:KIND],…",
        help="column of labels: numbers, or the names of classes; or several columns, such as "
        "age,sex:class,subtype, each stored in its own feature label/NAME. KIND is float, class (stored as "
        "the number of the class) or string; without it, float if all values are numbers, and class if none "
        "is. Default: the column label, if there is one",
    )
    columns.add_argument(
        "--missing-label",
        choices=MISSING_LABELS,
        help="what to do with rows whose label is empty, n/a or NaN. nan: store NaN, the class -1, or an "
        "empty string; skip: skip and count these rows; default: report an error",
    )
    columns.add_argument(
        "--id-column",
        metavar="NAME",
        help="unique name of each example; default: participant_id, joined with session_id, else the path",
    )


def _add_privacy(command: argparse.ArgumentParser) -> None:
    privacy = command.add_argument_group("privacy")
    privacy.add_argument(
        "--anonymous-ids",
        metavar="KEYFILE",
        help="replace participant_id, session_id, ids and paths with keyed hashes. KEYFILE must hold at "
        "least 16 random bytes, such as from `head -c 32 /dev/urandom`, and the workers must be able to "
        "read it; default: names are kept",
    )


def _add_splits(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("splits")
    group.add_argument(
        "--split",
        metavar="NAME=SHARE,…",
        help="assign participants to splits at random, in these shares, such as "
        "train=0.8,validation=0.1,test=0.1; all images of a participant_id go to one split, which does not "
        "change when other participants are added; default: the manifest's column split, or else all go to "
        "train",
    )
    group.add_argument(
        "--stratify",
        metavar="COLUMN",
        help="keep these shares within each value of this column, such as site or diagnosis",
    )
    group.add_argument(
        "--split-seed",
        type=int,
        metavar="N",
        help="seed of the draw; change it for another draw, as in repeated cross-validation; default: 0",
    )


def _add_shards(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    shards = command.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group()
    size.add_argument(
        "--examples-per-shard",
        type=int,
        metavar="N",
        help="largest number of examples in a shard; with --frames each, a shard still holds at least one "
        "whole image; default: chosen from the first image's header, for shards of 128 to 256 MB",
    )
    size.add_argument("--num-shards", type=int, metavar="N", help="number of shards in each split")
    shards.add_argument(
        "--compression", choices=COMPRESSIONS, help="compression of the shards; default: gzip"
    )
    return shards


def _add_shuffle_seed(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="shuffle the rows of each split; the same N gives the same order on every machine; default: the "
        "manifest's order",
    )


def _add_compression_level(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compression-level",
        type=int,
        choices=COMPRESSION_LEVELS,
        help="igzip level; default: 2, the smallest of the four on float32 voxels",
    )


def _add_rescaling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rescale",
        metavar="METHOD",
        help="which intensities of a volume become 0 and 1. minmax (default): the smallest and the largest; "
        "percentile:LO,HI: two percentiles, such as percentile:0.5,99.5 for MRI with bright outliers; "
        "window:LO,HI: these two values in the image's units, such as window:-160,240 (HU) for CT; zscore: "
        "the mean, and one standard deviation above it; none: keep the image's units",
    )
    group.add_argument(
        "--rescale-within",
        metavar="VOXELS",
        help="compute range, percentiles, mean and standard deviation from these voxels only: nonzero; "
        "above:T, those above T in the image's units; or mask, those with a label in the mask; default: all",
    )
    group.add_argument(
        "--clip",
        action="store_true",
        help="set rescaled voxels outside [0, 1] to 0 or 1; for percentile and window, and for minmax "
        "with --rescale-within; default: keep them as they are",
    )
    group.add_argument(
        "--mask-dtype",
        choices=MASK_DTYPES,
        help="dtype of mask labels: uint8 (default) for labels up to 255, or uint16 for labels up to 65535",
    )


def _add_voxels(voxels: argparse._ArgumentGroup) -> None:
    voxels.add_argument(
        "--voxel-dtype",
        choices=VOXEL_DTYPES,
        help="float32 (default); float16, bfloat16: half the size, 11 and 8 significant bits; uint8: a "
        "quarter, 256 levels of [0, 1]; native: as in the file; the reader rescales them to exactly the "
        "values of float32",
    )
    voxels.add_argument(
        "--frames",
        metavar="|".join(FRAMES),
        help="what to store of a 4-D image. all: every frame, as channels of one record; each: every frame, "
        "as a separate example (ID_frame-0000, ID_frame-0001, …); first, or a number from 0: that frame; "
        "mean: the mean of the frames; default: 4-D images are refused",
    )
    voxels.add_argument(
        "--complex",
        choices=COMPLEX_PARTS,
        help="what to store of a complex image. magnitude; phase, in radians; real-imag: both parts, as "
        "channels; default: complex images are refused",
    )
    voxels.add_argument(
        "--allow-mixed-shapes",
        action="store_true",
        help="accept volumes of another shape than the first image's",
    )


def _add_preparation(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "preparation",
        "What is done to each volume between loading and rescaling, in this order; default: nothing.",
    )
    group.add_argument(
        "--preprocess",
        action="append",
        metavar="MODULE:FUNCTION",
        help="a function of yours, Volume to Volume, that the workers can import, such as mylab.brains:strip "
        "or, with arguments, 'mylab.brains:strip(threshold=3)'; may be repeated, for several in this order",
    )
    group.add_argument(
        "--orientation",
        metavar="CODE",
        help="reorder and flip the axes so that they point in these directions, such as RAS (right, "
        "anterior, superior) or LPS; default: native, as in the file",
    )
    group.add_argument(
        "--spacing",
        metavar="X,Y,Z",
        help="resample to this voxel size in mm, such as 1,1,1, linearly and without smoothing first",
    )
    group.add_argument(
        "--crop-foreground",
        metavar="RULE",
        help="crop to the bounding box of the voxels that are nonzero; above:T, in the image's units; or "
        "mask, those with a label in the mask",
    )
    group.add_argument(
        "--shape",
        metavar="X,Y,Z",
        help="crop and pad around the centre to this many voxels, such as 160,192,160",
    )


def _add_max_bad_fraction(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="F",
        help="complete the dataset if at most this fraction of the volumes (with --frames each, of all "
        "frames) failed; default: 0",
    )


def _add_overwrite(group: argparse._ArgumentGroup) -> None:
    add_overwrite(
        group, "a dataset, or discard an unfinished build, that was made with different options or rows"
    )


def _add_recheck(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recheck",
        action="store_true",
        help="rebuild every record, and replace the shards that differ. Use it when files have changed but "
        "kept their size and time; by default, such files are taken as unchanged",
    )


def _add_dry_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be written, kept, rebuilt and deleted; write nothing",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    add_workers(
        group,
        ". On a cluster, the number of workers that the work is divided for; default: taken from the "
        "engine's flags, or 32",
    )
    group.add_argument(
        "--temp-location",
        metavar="PATH",
        help="folder or URL for temporary files of the build; default: in OUTPUT",
    )
    add_quiet(group)
    add_summary(group)


def _add_metrics_file(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="write the contents of --summary-json as Prometheus metrics, for the textfile collector of "
        "node_exporter: a local .prom file; not with --dry-run; default: none",
    )


def build_config(options: argparse.Namespace) -> BuildConfig:
    """The build that the options ask for.

    Raises:
        UsageError: a value that no build can have.
    """
    return _config(options, options.output)


def check_config(options: argparse.Namespace) -> BuildConfig:
    """The build that `check` looks ahead to; its output is the report, "" for none.

    Raises:
        UsageError: a value that no build can have.
    """
    return _config(options, options.out or "")


def _config(options: argparse.Namespace, output: str) -> BuildConfig:
    given = {name: getattr(options, name) for name in OPTIONS}
    return make_config(options.manifest, output, given, config=options.config, like=options.like)
