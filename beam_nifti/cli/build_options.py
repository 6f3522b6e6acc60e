"""The options of `beam-nifti build`, `check` and `analyze`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

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
from beam_nifti.config import COMPRESSION_LEVELS, PREPARATIONS
from beam_nifti.pipeline.options import OPTIONS, flag_of, read_integer, read_number, read_switch

WITHOUT_EFFECT = "without effect on check"
"""Title of the flags that `check` accepts only because `build` does."""

FOR_VOXELS = "with an effect only with --voxels"
"""Title of the flags that make no difference to what headers show."""

_BUILD_EXAMPLES = """\
examples:
  beam-nifti build cohort/manifest.tsv cohort/dataset --dry-run
  beam-nifti build cohort/manifest.tsv cohort/dataset
  beam-nifti build gs://lab/manifest.csv gs://lab/dataset --shuffle-seed 1 \\
      --runner=DataflowRunner --project=lab --region=europe-west1 --temp-location=gs://lab/tmp \\
      --sdk-container-image=europe-west1-docker.pkg.dev/lab/images/beam-nifti:0.1.0

Run the same command again to continue a stopped build, to add rows that were appended to the manifest, and to
retry volumes that failed.

"""

_ANALYZE_EXAMPLES = """\
examples:
  beam-nifti analyze cohort/manifest.tsv --rescale-within nonzero --out cohort/statistics.json
  beam-nifti build cohort/manifest.tsv cohort/dataset --rescale cohort:zscore --rescale-within nonzero \\
      --rescale-stats cohort/statistics.json

Reads every volume of the measured splits, by default train. The numbers are the same on every runner, with
any number of workers.
`build --rescale cohort:zscore` without --rescale-stats does the same before it writes records.

"""

_CHECK_EXAMPLES = """\
examples:
  beam-nifti check cohort/manifest.tsv
  beam-nifti check cohort/manifest.tsv --orientation RAS --spacing 1,1,1 --shape 192,224,192
  beam-nifti check cohort/manifest.tsv --json | jq '.problems[].example_id'
  beam-nifti check cohort/manifest.tsv --voxels --mask-column lesion

Accepts every flag of build, so a script can pass the same flags to both. Reads the first 64 KB of each image,
or with --voxels whole images.
The exit code is that of a build with these flags, as far as headers, or voxels, can show.

"""


_HELP: Final = {
    "config": 'TOML file whose keys are option names, such as rescale = "zscore", spacing = [1, 1, 1] or '
    'like = "cohort/dataset"; default: none',
    "like": "use the options that decided the content of this dataset; --preprocess and --anonymous-ids "
    "must be given again: another key, or a changed file of the function, is refused; another function "
    "replaces the dataset's; default: none",
    "without": "options of --config and --like to ignore, such as clip,spacing; default: none",
    "path_column": "column of image paths. The images of several comma-separated columns, such as "
    "T1w,T2w,FLAIR, become the channels of one record: each is rescaled separately, and all must have the "
    "same voxel grid, unless --align is given; default: path",
    "mask_column": "column of label maps: images of whole numbers, on the voxel grid of the images unless "
    "--align is given. They are prepared like the images, and stored without rescaling. Those of several "
    "comma-separated columns, such as organs,lesions, become the channels of one mask; default: none",
    "target_column": "column of images of real values that a network predicts for each voxel, such as dose "
    "maps, on the voxel grid of the images unless --align is given. They are prepared like the images, and "
    "stored as float32 without rescaling; default: none",
    "label_column": "column of labels: numbers, or the names of classes; or several columns, such as "
    "age,sex:class,subtype, each stored in its own feature label/NAME. NAME:KIND chooses how the values are "
    "stored: as float, class (the number of the class) or string; without KIND, float if all values are "
    "numbers, and class if none is. Default: the column label, if there is one",
    "missing_label": "what to do with rows whose label is empty, n/a or NaN. nan: store NaN, the class -1, "
    "or an empty string; skip: skip and count these rows; default: report an error",
    "missing_mask": "what to do with rows whose cell of a mask is empty, n/a or NaN. empty: store zeros in "
    "its place; skip: skip and count these rows; default: report an error",
    "id_column": "column with a unique name for each example; default: participant_id, joined with "
    "session_id if there is one, or else the path",
    "anonymous_ids": "replace participant_id, session_id, ids and paths with keyed hashes. The file must "
    "hold at least 16 random bytes, such as from `head -c 32 /dev/urandom`, and the workers must be able "
    "to read it; default: names are kept",
    "split": "assign participants to splits at random, in these shares, which sum to 1, such as "
    "train=0.8,validation=0.1,test=0.1; all images of a participant_id go to one split, which does not "
    "change when other participants are added. kfold:5 draws fold0 to fold4 for cross-validation, and "
    "kfold:5,test=0.2 also a test set; default: the manifest's column split, or else all go to train",
    "stratify": "apply the shares of --split within each value of this column, such as site or diagnosis; "
    "participants then keep their splits only if new ones are appended to the manifest",
    "split_seed": "seed of --split; change it to draw different splits, as in repeated cross-validation; "
    "default: 0",
    "examples_per_shard": "largest number of examples in a shard; with --frames each, a shard still holds "
    "at least one whole image; default: chosen from the first image's header, for shards of about 200 MB",
    "num_shards": "number of shards in each split, instead of --examples-per-shard",
    "compression": "compression of the shards; default: gzip",
    "shuffle_seed": "shuffle the rows of each split; the same seed gives the same order on every machine; "
    "default: the manifest's order",
    "compression_level": "level of igzip, 0 (fastest) to 3; default: 2, which compresses float32 voxels best",
    "rescale": "which intensities of a volume become 0 and 1. minmax (default): the smallest and the "
    "largest; percentile:LO,HI: two percentiles, such as percentile:0.5,99.5 for MRI with bright outliers; "
    "window:LO,HI: these two values in the image's units, such as window:-160,240 (HU) for CT; zscore: the "
    "mean, and one standard deviation above it; cohort:zscore, cohort:percentile:LO,HI: the same of the "
    "voxels of all volumes together, measured by the first build and kept by later ones; none: keep the "
    "image's units",
    "rescale_within": "compute range, percentiles, mean and standard deviation from these voxels only: "
    "nonzero; above:T, those above T in the image's units; or mask, those with a label in the mask; "
    "default: all",
    "rescale_split": "splits whose volumes are measured for cohort:zscore and cohort:percentile; default: "
    "train",
    "rescale_stats": "file of `beam-nifti analyze` with the statistics for cohort:zscore and "
    "cohort:percentile; default: those of the dataset, or else they are measured",
    "clip": "set rescaled voxels outside [0, 1] to 0 or 1; for percentile and window, and for minmax with "
    "--rescale-within; default: keep them as they are",
    "mask_dtype": "dtype of mask labels: uint8 (default) for labels up to 255, or uint16 for labels up to "
    "65535",
    "map_labels": "labels of masks to replace by others, all at once, such as 4=3 or 4=3,10=0; or a table "
    "with the columns from and to, such as labels.tsv; other labels stay; default: none",
    "voxel_dtype": "dtype of the stored voxels: float32 (default); float16, bfloat16: half the size, 11 and "
    "8 significant bits; uint8: a quarter, 256 levels of [0, 1]; native: the voxels of the file, which the "
    "reader rescales to exactly the values of float32",
    "frames": "what to store of a 4-D image. all: every frame, as channels of one record; each: every "
    "frame, as a separate example (ID_frame-0000, ID_frame-0001, …); each:N: every N frames, as channels of "
    "a separate example; first, or a number from 0: that "
    "frame; mean: the mean of the frames; default: 4-D images are refused",
    "max_frames": "with --frames each, the largest number of frames of any image, if images differ in it; "
    "default: all images must have as many frames as the first",
    "complex": "what to store of a complex image. magnitude; phase, in radians; real-imag: both parts, as "
    "channels; default: complex images are refused",
    "allow_mixed_shapes": "accept volumes whose shape differs from the first image's",
    "nonfinite": "what to replace NaN and infinite voxels with, before all that follows. zero: 0; min: the "
    "least finite voxel of the image; value:V: V, in the image's units; default: error, the volume fails",
    "preprocess": "your own function from Volume to Volume, which the workers must be able to import, such "
    "as mylab.brains:strip or, with arguments, 'mylab.brains:strip(threshold=3)'; may be repeated, to "
    "apply several functions in order",
    "orientation": "reorder and flip the axes so that they point in these directions, such as RAS (right, "
    "anterior, superior) or LPS; default: native, as in the file",
    "align": "first: resample the other images of an example, its mask and its target to the voxel grid of "
    "its first image, by positions in mm; nothing is registered; default: never, so that other grids are "
    "refused",
    "reference": "resample to the voxel grid of this image, such as a template, by positions in mm; nothing "
    "is registered",
    "spacing": "resample to this voxel size in mm, such as 1,1,1",
    "resize": "resample the whole field of view to this many voxels, such as 128,128,64",
    "resize_longest": "resample so that the longest axis has N voxels and the others keep their proportion "
    "to it, then pad to N×N×N",
    "interpolation": "values between voxel centres. linear (default); nearest: the nearest voxel's, so that "
    "no new values arise; cubic: by B-splines of order 3, which keep edges sharper and may overshoot",
    "mask_interpolation": "labels between voxel centres. nearest (default); linear: the label with the "
    "largest share when each is interpolated linearly, which gives smoother surfaces",
    "antialias": "smooth images with a Gaussian along the axes that get fewer voxels, before resampling; its "
    "standard deviation is (factor - 1) / 2 voxels",
    "separate_z": "auto: as in nnU-Net, use nearest neighbours along one axis if its voxels are more than "
    "three times as long as along another; default: never",
    "crop_foreground": "crop to the bounding box of these voxels: nonzero; above:T, those above T in the "
    "image's units; or mask, those with a label in the mask",
    "shape": "crop and pad around the centre to this many voxels, such as 160,192,160",
    "voxels": "also read and prepare every image, as the build would, and find damaged images; volumes that "
    "differ strongly from the others in mean intensity, field of view or voxel size; constant volumes; and "
    "masks that are empty or have rare labels. Takes about as long as the build",
    "json": "print the report as JSON",
    "out": "also write the report as JSON to FILE; required on a cluster, where the workers must be able to "
    "write to it",
    "max_bad_fraction": "complete the dataset if at most this fraction of the volumes (with --frames each, "
    "of all frames) failed; default: 0",
    "recheck": "rebuild every record, and replace the shards that differ. Use it when files have changed "
    "but kept their size and time; by default, such files are assumed to be unchanged",
    "dry_run": "print what would be written, kept, rebuilt and deleted; write nothing",
    "temp_location": "folder or URL for temporary files of the build; default: in OUTPUT",
    "metrics_file": "write the contents of --summary-json as Prometheus metrics, for the textfile collector "
    "of node_exporter: a local .prom file; not written with --dry-run; default: none",
}
"""Descriptions of the options that no other command has."""

_HELP_OF_CHECK: Final = _HELP | {
    "max_bad_fraction": "exit with 0 if at most this fraction of the volumes (with --frames each, of all "
    "frames) would fail; default: 0",
    "temp_location": "folder or URL for temporary files on a cluster; default: the folder of --out",
}

_HELP_OF_ANALYZE: Final = _HELP | {
    "rescale": "statistics to compute: cohort:zscore (default), or cohort:percentile:LO,HI, which adds these "
    "two percentiles",
    "rescale_within": "measure these voxels only: nonzero; above:T, those above T in the image's units; or "
    "mask, those with a label in the mask; default: all",
    "rescale_split": "splits whose volumes are measured; default: train",
    "max_bad_fraction": "give statistics if at most this fraction of the volumes (with --frames each, of all "
    "frames) failed; default: 0",
    "temp_location": "folder or URL for temporary files on a cluster; default: the folder of --out",
    "json": "print the statistics as JSON",
    "out": "also write the statistics as JSON to FILE, which is replaced if it exists, for --rescale-stats; "
    "required on a cluster",
}

_OF_COMMANDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "config": {"metavar": "FILE"},
    "like": {"metavar": "DATASET"},
    "json": {"action": "store_true"},
    "voxels": {"action": "store_true"},
    "out": {"metavar": "FILE"},
    "dry_run": {"action": "store_true"},
    "metrics_file": {"metavar": "FILE"},
    "compression_level": {"type": int, "choices": COMPRESSION_LEVELS},
    "preprocess": {"action": "append"},
}
"""Arguments of `add_argument` that do not follow from OPTIONS."""

_SHARED: Final[Mapping[str, Callable[[argparse._ArgumentGroup], None]]] = {
    "overwrite": lambda group: add_overwrite(
        group, "a dataset, or discard an unfinished build, that was built with different options or rows"
    ),
    "workers": lambda group: add_workers(
        group,
        ". On a cluster, the number of workers that the work is divided for; default: taken from the "
        "engine's flags, or 32",
    ),
    "quiet": add_quiet,
    "summary_json": add_summary,
}
"""Functions that add the other options."""

_GROUPS: Final[Mapping[str, tuple[str | None, tuple[str, ...]]]] = {
    "options from a file or a dataset": (
        "The command line overrides --config, and --config overrides --like.",
        ("config", "like", "without"),
    ),
    "manifest columns": (
        None,
        (
            *("path_column", "mask_column", "missing_mask", "target_column", "label_column"),
            *("missing_label", "id_column"),
        ),
    ),
    "privacy": (None, ("anonymous_ids",)),
    "splits": (None, ("split", "stratify", "split_seed")),
    "shards": (
        None,
        ("examples_per_shard", "num_shards", "compression", "shuffle_seed", "compression_level"),
    ),
    "voxels": (
        None,
        (
            *("rescale", "rescale_within", "rescale_split", "rescale_stats", "clip", "mask_dtype"),
            *("map_labels", "voxel_dtype", "frames", "max_frames", "complex", "allow_mixed_shapes"),
        ),
    ),
    "preparation": (
        "Applied to each volume between loading and rescaling, in this order; default: none.",
        (
            *("nonfinite", "align", "preprocess", "orientation", "reference", "spacing", "resize"),
            *("resize_longest", "interpolation", "mask_interpolation", "antialias", "separate_z"),
            *("crop_foreground", "shape"),
        ),
    ),
    "running": (
        None,
        (
            *("max_bad_fraction", "overwrite", "recheck", "dry_run"),
            *("workers", "temp_location", "quiet", "summary_json", "metrics_file"),
        ),
    ),
}
"""Title, description and options of each group."""

_UNUSED_BY_CHECK: Final = (
    *("shuffle_seed", "compression_level", "overwrite", "recheck", "dry_run", "metrics_file"),
)
_USED_FOR_VOXELS: Final = (
    *("rescale_within", "clip", "mask_dtype", "interpolation", "mask_interpolation", "antialias"),
    "separate_z",
)


_USED_BY_ANALYZE: Final = (
    *("config", "like", "without", "path_column", "mask_column", "missing_mask", "target_column"),
    *("label_column",),
    *("missing_label", "id_column", "anonymous_ids", "split", "stratify", "split_seed", "rescale"),
    *("rescale_within", "rescale_split", "mask_dtype", "map_labels", "frames", "max_frames", "complex"),
    *("allow_mixed_shapes", "align", *PREPARATIONS),
    *("json", "out", "max_bad_fraction", "workers", "temp_location", "quiet", "summary_json"),
)


def add_commands(commands: Commands) -> None:
    """Add `check`, `analyze` and `build`."""
    check = add_command(
        commands,
        "check",
        "read the headers of a manifest's images and report what a build would do",
        _CHECK_EXAMPLES,
    )
    check.add_argument("manifest", metavar="MANIFEST", help="table of images, as for build")
    for title, (about, names) in _GROUPS.items():
        further: tuple[str, ...] = ("voxels", "json", "out") if title == "running" else ()
        used = [n for n in (*further, *names) if n not in (*_UNUSED_BY_CHECK, *_USED_FOR_VOXELS)]
        _add_group(check, title, about, used, _HELP_OF_CHECK)
    _add_group(check, FOR_VOXELS, "Headers do not depend on these.", _USED_FOR_VOXELS)
    about = "Accepted and validated, so that check and build can be given the same flags."
    _add_group(check, WITHOUT_EFFECT, about, _UNUSED_BY_CHECK)
    add_beam(check)

    analyze = add_command(
        commands,
        "analyze",
        "measure the intensities, sizes and labels of a cohort",
        _ANALYZE_EXAMPLES,
    )
    analyze.add_argument("manifest", metavar="MANIFEST", help="table of images, as for build")
    for title, (about, names) in _GROUPS.items():
        further = ("json", "out") if title == "running" else ()
        used = [name for name in (*further, *names) if name in _USED_BY_ANALYZE]
        if used:
            _add_group(analyze, title, about, used, _HELP_OF_ANALYZE)
    add_beam(analyze)

    build = add_command(commands, "build", "write the dataset that a manifest describes", _BUILD_EXAMPLES)
    build.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="table of images: .csv, .tsv, .jsonl or .parquet with the columns path, label, "
        "participant_id, session_id, split (only path is required; other columns are kept in the index)",
    )
    add_output(build)
    for title, (about_it, names) in _GROUPS.items():
        _add_group(build, title, about_it, names)
    add_beam(build)


def _add_group(
    command: argparse.ArgumentParser,
    title: str,
    about: str | None,
    names: Sequence[str],
    texts: Mapping[str, str] = _HELP,
) -> None:
    group = command.add_argument_group(title, about)
    for name in names:
        if name in _SHARED:
            _SHARED[name](group)
        else:
            group.add_argument(flag_of(name), help=texts[name], **_arguments(name))
    # The defaults are in `make_config`, which receives only the options that were given.
    command.set_defaults(**dict.fromkeys(OPTIONS))


def _arguments(name: str) -> dict[str, Any]:
    arguments = dict(_OF_COMMANDS.get(name, {}))
    if name in OPTIONS and "choices" not in arguments:
        option = OPTIONS[name]
        if option.read is read_switch:
            return {"action": "store_true"}
        arguments |= {"metavar": option.metavar} if option.metavar else {"choices": option.choices}
        if option.read in (read_integer, read_number):
            arguments["type"] = int if option.read is read_integer else float
    return arguments
