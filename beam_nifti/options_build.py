"""The options of `beam-nifti build` and `check`: what is made of a manifest."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from beam_nifti.config import (
    COMPLEX_PARTS,
    COMPRESSION_LEVELS,
    COMPRESSIONS,
    FRAMES,
    MASK_DTYPES,
    MISSING_LABELS,
    VOXEL_DTYPES,
    BuildConfig,
    Columns,
    RecordConfig,
    Sharding,
    Splitting,
)
from beam_nifti.errors import UsageError
from beam_nifti.options_common import (
    Commands,
    add_beam,
    add_command,
    add_output,
    add_overwrite,
    add_quiet,
    add_summary,
    add_workers,
    choose_workers,
)

_Number = TypeVar("_Number", int, float)

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
    run.add_argument("--json", action="store_true", help="as JSON")
    run.add_argument(
        "--out",
        metavar="FILE",
        help="write the JSON here too; required on a cluster, within the workers' reach",
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
    add_beam(check)


def _add_content(command: argparse.ArgumentParser) -> None:
    _add_columns(command)
    _add_privacy(command)
    _add_splits(command)


def _add_columns(command: argparse.ArgumentParser) -> None:
    columns = command.add_argument_group("manifest columns")
    columns.add_argument(
        "--path-column",
        default="path",
        metavar="NAME",
        help="of the images; several, with commas, such as T1w,T2w,FLAIR, are the channels of one record, "
        "each rescaled by itself, and must have the same voxels in space; default: path",
    )
    columns.add_argument(
        "--mask-column",
        metavar="NAME",
        help="of label maps, images of whole numbers with the same voxels in space as the images: prepared "
        "with them, by nearest neighbour, and stored as they are; default: none",
    )
    columns.add_argument(
        "--label-column",
        metavar="NAME[:KIND],…",
        help="numbers, or texts of classes; or several columns, such as age,sex:class,subtype, each with a "
        "feature label/NAME of its own. KIND is float; class, stored as the number of the value among all of "
        "the column's; or string; default: float where all values are numbers, class where none is. Default: "
        "label, where there is one",
    )
    columns.add_argument(
        "--missing-label",
        choices=MISSING_LABELS,
        help="what becomes of rows whose label is empty, n/a or NaN. nan: they get NaN, the class -1, or an "
        "empty string; skip: they are left out, and counted; default: they are an error",
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
        help="write keyed hashes in the place of participant_id, session_id, ids and paths. KEYFILE has at "
        "least 16 random bytes, and workers read it too: `head -c 32 /dev/urandom` makes them; default: "
        "names are kept",
    )


def _add_splits(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("splits")
    group.add_argument(
        "--split",
        metavar="NAME=SHARE,…",
        help="deal the participants to splits, such as train=0.8,validation=0.1,test=0.1; all images of a "
        "participant_id go to one, which stays theirs when others are added; default: the manifest's column "
        "split, else all is train",
    )
    group.add_argument(
        "--stratify",
        metavar="COLUMN",
        help="hold the shares within each value of this column, such as site or diagnosis",
    )
    group.add_argument(
        "--split-seed",
        type=int,
        metavar="N",
        help="another number is another draw, as for repeated cross-validation; default: 0",
    )


def _add_shards(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    shards = command.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group()
    size.add_argument(
        "--examples-per-shard",
        type=int,
        metavar="N",
        help="at most; with --frames each as many whole images as that allows, at least one; default: from "
        "the first image's header, for shards of 128 to 256 MB",
    )
    size.add_argument("--num-shards", type=int, metavar="N", help="shards of each split")
    shards.add_argument("--compression", choices=COMPRESSIONS, default="gzip", help="default: gzip")
    return shards


def _add_shuffle_seed(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="shuffle the rows of each split, the same way everywhere; default: the manifest's order",
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
        default="minmax",
        metavar="METHOD",
        help="which intensities of a volume become 0 and 1. minmax (default): its least and largest; "
        "percentile:LO,HI: two of its percentiles, as percentile:0.5,99.5, for MRI with bright outliers; "
        "window:LO,HI: these two in the image's units, as window:-160,240 (HU), for CT; zscore: its mean, "
        "and one standard deviation above it; none: keep the image's units",
    )
    group.add_argument(
        "--rescale-within",
        metavar="VOXELS",
        help="take range, percentiles, mean and deviation over these voxels only: nonzero; above:T, those "
        "above T in the image's units; or mask, those with a label in the mask; default: all",
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
        help="of the labels of masks: uint8 (default), up to 255, or uint16, up to 65535",
    )


def _add_voxels(voxels: argparse._ArgumentGroup) -> None:
    voxels.add_argument(
        "--voxel-dtype",
        choices=VOXEL_DTYPES,
        default="float32",
        help="float32 (default); float16, bfloat16: half the size, 11 and 8 significant bits; uint8: a "
        "quarter, 256 levels of [0, 1]; native: as in the file, and rescaled by the reader, to the bits of "
        "float32",
    )
    voxels.add_argument(
        "--frames",
        metavar="|".join(FRAMES),
        help="of 4-D images; all: every frame, as the channels of one record; each: every frame, as an "
        "example of its own, ID_frame-0000 and on; first, or a number from 0: one of them; mean: their mean; "
        "default: 4-D images are refused",
    )
    voxels.add_argument(
        "--complex",
        choices=COMPLEX_PARTS,
        help="of complex images; magnitude; phase, in radians; real-imag: both parts, as channels; default: "
        "complex images are refused",
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
        metavar="MODULE:FUNCTION",
        help="a function of yours, Volume to Volume, that the workers can import, such as mylab.brains:strip",
    )
    group.add_argument(
        "--orientation",
        default="native",
        metavar="CODE",
        help="turn the axes to where this says that each index grows, such as RAS or LPS; default: native, "
        "as in the file",
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
        default=0.0,
        metavar="F",
        help="complete the dataset if at most this fraction of the volumes failed, with --frames each of all "
        "frames; default: 0",
    )


def _add_overwrite(group: argparse._ArgumentGroup) -> None:
    add_overwrite(group, "a dataset, or discard an unfinished build, of different options or rows")


def _add_recheck(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recheck",
        action="store_true",
        help="make every record again, and replace the shards that differ: for files that were changed and "
        "kept their size and time; default: an image is not read again while these are the same",
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
        ". On a cluster, the least parallelism to cut the work for; default: what the engine's flags give "
        "it, else 32",
    )
    group.add_argument(
        "--temp-location",
        metavar="PATH",
        help="folder or URL for what is needed only while building; default: in OUTPUT",
    )
    add_quiet(group)
    add_summary(group)


def _add_metrics_file(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="write the same as metrics of Prometheus, for the textfile collector of node_exporter: a local "
        ".prom file; not with --dry-run; default: none",
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
    sharding = None
    if options.examples_per_shard is not None or options.num_shards is not None:
        sharding = Sharding(options.examples_per_shard, options.num_shards)
    return BuildConfig(
        manifest=options.manifest,
        output=output,
        record=_record_config(options),
        columns=_columns(options),
        sharding=sharding,
        splitting=_splitting(options),
        shuffle_seed=options.shuffle_seed,
        allow_mixed_shapes=options.allow_mixed_shapes,
        max_bad_fraction=options.max_bad_fraction,
        overwrite=options.overwrite,
        recheck=options.recheck,
        temp_location=options.temp_location,
        workers=choose_workers(options),
        anonymous_ids=options.anonymous_ids,
    )


def _columns(options: argparse.Namespace) -> Columns:
    return Columns(
        options.path_column,
        options.label_column,
        options.id_column,
        options.mask_column,
        options.missing_label,
    )


def _record_config(options: argparse.Namespace) -> RecordConfig:
    level = options.compression_level
    if level is not None and options.compression == "none":
        raise UsageError("--compression-level has no effect with --compression none; leave one of them out")
    return RecordConfig(
        rescale=options.rescale,
        voxel_dtype=options.voxel_dtype,
        compression=options.compression,
        compression_level=RecordConfig.compression_level if level is None else level,
        frames=options.frames,
        clip=options.clip,
        rescale_within=options.rescale_within,
        complex=options.complex,
        preprocess=options.preprocess,
        orientation=None if options.orientation == "native" else options.orientation,
        spacing=_triple("--spacing", options.spacing, float),
        crop_foreground=options.crop_foreground,
        shape=_triple("--shape", options.shape, int),
        mask_dtype=options.mask_dtype,
    )


def _triple(
    flag: str, text: str | None, number: Callable[[str], _Number]
) -> tuple[_Number, _Number, _Number] | None:
    if text is None:
        return None
    try:
        x, y, z = map(number, text.split(","))
    except ValueError:
        example = "160,192,160" if number is int else "1,1,1.5"
        raise UsageError(f"{flag} is {text!r}; give three numbers with commas, such as {example}") from None
    return x, y, z


def _splitting(options: argparse.Namespace) -> Splitting | None:
    if options.split is None:
        for flag, value in (("--stratify", options.stratify), ("--split-seed", options.split_seed)):
            if value is not None:
                raise UsageError(f"{flag} needs --split, such as --split train=0.8,test=0.2")
        return None
    shares = dict[str, float]()
    for part in options.split.split(","):
        name, equals, share = part.strip().partition("=")
        try:
            if not equals or name in shares:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise UsageError(
                f"--split is {options.split!r}; give each split once, with its share, such as "
                "train=0.8,validation=0.1,test=0.1"
            ) from None
    return Splitting(shares, options.split_seed or 0, options.stratify)
