"""The command line: from arguments to checked values. Imports neither Beam nor TensorFlow."""

from __future__ import annotations

import argparse
import difflib
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NoReturn, TypeVar

from beam_nifti import __version__, storage
from beam_nifti.config import (
    COMPLEX_PARTS,
    COMPRESSION_LEVELS,
    COMPRESSIONS,
    FRAMES,
    MASK_DTYPES,
    MISSING_LABELS,
    VERSIONED,
    VOXEL_DTYPES,
    BuildConfig,
    Columns,
    RecordConfig,
    Sharding,
    Splitting,
)
from beam_nifti.cores import count_cores
from beam_nifti.errors import UsageError
from beam_nifti.logs import FORMATS as LOG_FORMATS

_Number = TypeVar("_Number", int, float)

EXIT_CODES = """\
exit codes:
  0  success
  1  volumes failed beyond the limit, the dataset is not right, or two are not the same
  2  a wrong option, manifest or OUTPUT; nothing was written
  75 another build is in OUTPUT, an engine failed, or a store kept failing; the same command continues
  130 stopped by Ctrl-C
"""

_PATHS = {
    "manifest": "MANIFEST",
    "output": "OUTPUT",
    "folder": "DIR",
    "out": "--out",
    "before": "BEFORE",
    "after": "AFTER",
    "anonymous_ids": "--anonymous-ids",
    "summary_json": "--summary-json",
    "metrics_file": "--metrics-file",
}
"""Arguments that no command takes empty, and how its help calls them."""

_BUILD_EXAMPLES = """\
examples:
  beam-nifti build cohort/manifest.tsv cohort/dataset --dry-run
  beam-nifti build cohort/manifest.tsv cohort/dataset
  beam-nifti build gs://lab/manifest.csv gs://lab/dataset --shuffle-seed 1 \\
      --runner=DataflowRunner --region=europe-west1 --temp-location=gs://lab/tmp

A build that was stopped continues when the same command is given again. Rows that were appended to the
manifest are added; volumes that failed are tried again.

"""

_MANIFEST_EXAMPLES = """\
examples:
  beam-nifti manifest bids study --suffix T1w --label age --out manifest.tsv
  beam-nifti manifest bids study/derivatives/fmriprep --suffix T1w \\
      --entity space=MNI152NLin2009cAsym --entity desc=preproc --out mni.tsv
  beam-nifti manifest glob 'scans/**/*.nii.gz' --out manifest.tsv

"""
_BIDS_EXAMPLES = """\
examples:
  beam-nifti manifest bids study --suffix T1w --label age --column sex --out manifest.tsv
  beam-nifti manifest bids study --suffix T1w --session baseline --entity run=1 --out manifest.tsv
  beam-nifti manifest bids study --suffix T1w --entity acq= --out manifest.tsv
  beam-nifti manifest bids study --suffix bold --all-images --out manifest.tsv
  beam-nifti build manifest.tsv dataset --id-column image_id

The first takes the T1w image of everyone whose age participants.tsv has, and keeps sex in the index. The
third takes those whose names have no acq-. What is left out is said on standard error.

"""
_CHECK_EXAMPLES = """\
examples:
  beam-nifti check cohort/manifest.tsv
  beam-nifti check cohort/manifest.tsv --orientation RAS --spacing 1,1,1 --shape 192,224,192
  beam-nifti check cohort/manifest.tsv --json | jq '.problems[].example_id'

Takes the flags of build that say what a record is. Reads 64 KB of each image. Exits with 1 if a build with
these flags would leave volumes out.

"""
_GLOB_EXAMPLES = """\
examples:
  beam-nifti manifest glob 'scans/**/*_T1w.nii.gz' --out manifest.tsv
  beam-nifti manifest glob 'gs://lab/scans/sub-*/T1w.nii' --out manifest.tsv

"""

_DIFF_EXAMPLES = """\
examples:
  beam-nifti diff monday/dataset tuesday/dataset
  beam-nifti diff monday/dataset tuesday/dataset --json | jq '.came[]'

Reads dataset_info.json and index/ of each: of a dataset that is built on every night in one place, keep
copies of these. Exits with 1 where anything is different.

"""
_REPORT_EXAMPLES = """\
examples:
  beam-nifti report cohort/dataset
  beam-nifti report gs://lab/dataset --out gs://lab/report.html --pictures 3000

Reads every record once, and checks its bytes on the way. Needs beam-nifti[report]; on a cluster the workers
do, too. Exits with 1, after the page is written, if a shard or a record is damaged.

"""
_CARD_EXAMPLES = """\
examples:
  beam-nifti card cohort/dataset
  beam-nifti card gs://lab/dataset --name 'Brains of Lyon' --license CC-BY-4.0 --overwrite

A build does not touch the files: give the command again after one that has changed the dataset.

"""
_VIEW_EXAMPLES = """\
examples:
  beam-nifti view dataset --id sub-0003 --open
  beam-nifti view gs://lab/dataset --id sub-0003 --mask --out /tmp/sub-0003.html

The page is one file that loads nothing. Intensities are in the image's units. Needs beam-nifti[report].

"""
_EXTRACT_EXAMPLES = """\
examples:
  beam-nifti extract dataset --id sub-0003
  beam-nifti extract gs://lab/dataset --id sub-0003 --out /tmp/sub-0003.nii

Voxels are in the image's units; those of --voxel-dtype native are the file's own. docs/extract.md says how
close the others are to them.

"""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print beside the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; see `{self.prog} --help`")


class _Versions(argparse.Action):
    """`--version`; the libraries are looked up only when it is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"beam-nifti {__version__}")
        for name in VERSIONED:
            print(f"{name} {metadata.version(name)}")
        print(f"Python {platform.python_version()}")
        parser.exit()


class _Completion(argparse.Action):
    """`--print-completion`; what makes it is loaded only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> None:
        from beam_nifti.completion import make_completion

        print(make_completion(parser, str(shell)), end="")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser: argparse.ArgumentParser = _Parser(
        prog="beam-nifti",
        description="Turn NIfTI volumes into sharded TFRecords for training, on one machine or a cluster.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Versions, help="show the version, and those of the libraries that decide bytes"
    )
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print what makes a shell complete commands, flags, their values and paths; for bash: "
        'eval "$(beam-nifti --print-completion bash)"',
    )
    _add_log_format(parser, "text")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_manifest(commands)
    _add_check(commands)
    _add_build(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_diff(commands)
    _add_extract(commands)
    _add_view(commands)
    _add_card(commands)
    _add_report(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    epilog: str = EXIT_CODES,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_log_format(command, argparse.SUPPRESS)  # which leaves standing what was given before the command
    return command


def _add_log_format(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default=default,
        help="of what is said on standard error besides results: text (default), or json, an object a line "
        "for what collects logs",
    )


def find_log_format(argv: Sequence[str]) -> str:
    """The `--log-format` of a command line that may be wrong elsewhere."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_log_format(parser, "text")
    try:
        return str(parser.parse_known_args([_dashed(a) for a in argv])[0].log_format)
    except argparse.ArgumentError:
        return "text"


def _add_manifest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    manifest = _command(
        commands,
        "manifest",
        "write the manifest of the images that there are",
        _MANIFEST_EXAMPLES + EXIT_CODES,
    )
    sources = manifest.add_subparsers(dest="source", metavar="SOURCE", required=True)
    bids = _command(sources, "bids", "write the manifest of a BIDS study", _BIDS_EXAMPLES + EXIT_CODES)
    bids.add_argument(
        "folder", metavar="DIR", help="folder or URL of the study, or of one of its derivatives"
    )
    bids.add_argument("--suffix", required=True, metavar="NAME", help="of the images, such as T1w")
    bids.add_argument(
        "--session",
        action="append",
        metavar="LABEL",
        help="only images of this session; several times for several",
    )
    bids.add_argument(
        "--entity",
        action="append",
        metavar="KEY=LABEL",
        help="only images with this in their name, such as run=1; KEY= for those without KEY; several times "
        "for several keys, or for several labels of one",
    )
    bids.add_argument(
        "--label",
        metavar="COLUMN",
        help="of participants.tsv or of the participants' sessions.tsv: a number; images without one are "
        "left out; default: no labels",
    )
    bids.add_argument(
        "--column",
        action="append",
        metavar="COLUMN",
        help="of the same tables, to be kept in the manifest and in the index of the dataset; several times "
        "for several; default: none",
    )
    _add_manifest_output(bids)
    glob = _command(
        sources, "glob", "write the manifest of all images that match", _GLOB_EXAMPLES + EXIT_CODES
    )
    glob.add_argument(
        "pattern",
        nargs="+",
        metavar="PATTERN",
        help="*, ? and […] stand for parts of a name, ** for any folders. participant_id and session_id are "
        "what the paths have as sub- and ses-",
    )
    _add_manifest_output(glob)


def _add_manifest_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--all-images",
        action="store_true",
        help="keep several images of a participant's session; they are named in a column image_id, for "
        "build --id-column image_id; default: they are refused",
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        help=".tsv, .csv, .jsonl or .parquet; images in its folder are written relative to it; default: TSV "
        "on standard output, with absolute paths",
    )
    group.add_argument("--overwrite", action="store_true", help="replace FILE")


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = _command(
        commands,
        "build",
        "write the dataset that a manifest describes",
        _BUILD_EXAMPLES + EXIT_CODES,
    )
    build.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="table of images: .csv, .tsv, .jsonl or .parquet with the columns path, label, "
        "participant_id, session_id, split (all but path optional; further ones are kept in the index)",
    )
    build.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset")

    _add_columns(build)

    privacy = build.add_argument_group("privacy")
    privacy.add_argument(
        "--anonymous-ids",
        metavar="KEYFILE",
        help="write keyed hashes in the place of participant_id, session_id, ids and paths. KEYFILE has at "
        "least 16 random bytes, and workers read it too: `head -c 32 /dev/urandom` makes them; default: "
        "names are kept",
    )

    _add_splits(build.add_argument_group("splits"))

    shards = build.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group()
    size.add_argument(
        "--examples-per-shard",
        type=int,
        metavar="N",
        help="at most; with --frames each as many whole images as that allows, at least one; default: from "
        "the first image's header, for shards of 128 to 256 MB",
    )
    size.add_argument("--num-shards", type=int, metavar="N", help="shards of each split")
    shards.add_argument(
        "--shuffle-seed",
        type=int,
        metavar="N",
        help="shuffle the rows of each split, the same way everywhere; default: the manifest's order",
    )
    shards.add_argument("--compression", choices=COMPRESSIONS, default="gzip", help="default: gzip")
    shards.add_argument(
        "--compression-level",
        type=int,
        choices=COMPRESSION_LEVELS,
        default=2,
        help="igzip level; default: 2, the smallest of the four on float32 voxels",
    )

    _add_voxels(build)
    _add_preparation(build)

    run = build.add_argument_group("running")
    run.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="complete the dataset if at most this fraction of the volumes failed, with --frames each of all "
        "frames; default: 0",
    )
    run.add_argument("--overwrite", action="store_true", help="replace a dataset of another making")
    run.add_argument("--dry-run", action="store_true", help="say what would be written; write nothing")
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"threads; default: all cores ({count_cores()} here). On a cluster, the least parallelism "
        "to cut the work for; default: what the engine's flags give it, else 32",
    )
    run.add_argument(
        "--temp-location",
        metavar="PATH",
        help="folder or URL for what is needed only while building; default: in OUTPUT",
    )
    _add_quiet(run)
    _add_summary(run)
    run.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="write the same as metrics of Prometheus, for the textfile collector of node_exporter: a local "
        ".prom file; default: none",
    )
    build.add_argument_group(
        "Apache Beam",
        "Every other flag goes to Beam: --runner=FlinkRunner --flink_master=… and so on.",
    )


def _add_splits(group: argparse._ActionsContainer) -> None:
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
        help="a number to learn; or several columns, such as age,sex:class,subtype, each with a feature "
        "label/NAME of its own. KIND is float; class, stored as the number of the value among all of the "
        "column's; or string; default: float where all values are numbers, else class. Default: label, where "
        "there is one",
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


def _add_voxels(command: argparse.ArgumentParser) -> None:
    voxels = command.add_argument_group("voxels")
    voxels.add_argument(
        "--rescale",
        default="minmax",
        metavar="METHOD",
        help="which intensities of a volume become 0 and 1. minmax (default): its least and largest; "
        "percentile:LO,HI: two of its percentiles, as percentile:0.5,99.5, for MRI with bright outliers; "
        "window:LO,HI: these two in the image's units, as window:-160,240 (HU), for CT; zscore: its mean, "
        "and one standard deviation above it; none: keep the image's units",
    )
    voxels.add_argument(
        "--rescale-within",
        metavar="VOXELS",
        help="take range, percentiles, mean and deviation over these voxels only: nonzero; above:T, those "
        "above T in the image's units; or mask, those with a label in the mask; default: all",
    )
    voxels.add_argument(
        "--clip",
        action="store_true",
        help="set rescaled voxels outside [0, 1] to 0 or 1; for percentile and window, and for minmax "
        "with --rescale-within; default: keep them as they are",
    )
    voxels.add_argument(
        "--voxel-dtype",
        choices=VOXEL_DTYPES,
        default="float32",
        help="float32 (default); float16, bfloat16: half the size, 11 and 8 significant bits; uint8: a "
        "quarter, 256 levels of [0, 1]; native: as in the file, and rescaled by the reader, to the bits of "
        "float32",
    )
    voxels.add_argument(
        "--mask-dtype",
        choices=MASK_DTYPES,
        help="of the labels of masks: uint8 (default), up to 255, or uint16, up to 65535",
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


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = _command(
        commands,
        "check",
        "read the headers of a manifest's images, and say what a build would make of them",
        _CHECK_EXAMPLES + EXIT_CODES,
    )
    check.add_argument("manifest", metavar="MANIFEST", help="as for build")
    _add_columns(check)
    _add_voxels(check)
    _add_preparation(check)
    run = check.add_argument_group("running")
    run.add_argument("--json", action="store_true", help="as JSON")
    run.add_argument(
        "--out",
        metavar="FILE",
        help="write the JSON here too; on a cluster needed, and within the workers' reach",
    )
    run.add_argument(
        "--workers", type=int, metavar="N", help=f"threads; default: all cores ({count_cores()} here)"
    )
    _add_quiet(run)
    _add_summary(run)
    check.add_argument_group("Apache Beam", "Every other flag goes to Beam, as for build.")


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = _command(commands, "verify", "read a dataset back and check every byte of it")
    verify.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset")
    verify.add_argument(
        "--manifest", metavar="MANIFEST", help="compare ids, labels and splits with this table"
    )
    verify.add_argument(
        "--anonymous-ids",
        metavar="KEYFILE",
        help="of a dataset that was built with it: to compare with --manifest, and for --deep",
    )
    verify.add_argument(
        "--deep",
        metavar="N",
        help="make N records (or: all) again from their images, and compare bit for bit",
    )
    _add_workers(verify, "threads")
    _add_quiet(verify)
    _add_summary(verify)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = _command(commands, "inspect", "say what is in a dataset, or in one of its records")
    inspect.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset")
    inspect.add_argument("--record", metavar="ID", help="one record's metadata, by its example id")
    inspect.add_argument("--json", action="store_true", help="as JSON")


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = _command(
        commands, "diff", "say what came, went and changed between two datasets", _DIFF_EXAMPLES + EXIT_CODES
    )
    diff.add_argument("before", metavar="BEFORE", help="folder or URL of a dataset")
    diff.add_argument("after", metavar="AFTER", help="of another")
    diff.add_argument("--json", action="store_true", help="as JSON, with all ids")


def _add_extract(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    extract = _command(
        commands, "extract", "write the images of records as NIfTI files", _EXTRACT_EXAMPLES + EXIT_CODES
    )
    extract.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset")
    extract.add_argument(
        "--id",
        action="append",
        required=True,
        metavar="ID",
        help="a record, by its example id; several times for several",
    )
    extract.add_argument(
        "--out",
        metavar="FILE",
        help=".nii.gz or .nii; default: ID.nii.gz, or ID_mask.nii.gz with --mask, in this folder, with _ for "
        "what a file name cannot hold",
    )
    extract.add_argument(
        "--mask", action="store_true", help="write the records' masks instead of their images"
    )
    extract.add_argument("--overwrite", action="store_true", help="replace FILE")


def _add_view(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    view = _command(
        commands, "view", "make a page to walk through the volume of a record", _VIEW_EXAMPLES + EXIT_CODES
    )
    view.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset")
    view.add_argument("--id", required=True, metavar="ID", help="the record, by its example id")
    view.add_argument(
        "--mask", action="store_true", help="lay the labels of the record's mask over the image"
    )
    view.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="the channel to show, from 0; needed where the record has several",
    )
    view.add_argument(
        "--out",
        metavar="FILE",
        help="the page; default: ID.html in this folder, with _ for what a file name cannot hold",
    )
    view.add_argument("--open", action="store_true", help="open the page in the browser")
    view.add_argument("--overwrite", action="store_true", help="replace FILE")


def _add_card(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    card = _command(
        commands,
        "card",
        "describe a dataset for others, in README.md and croissant.json",
        _CARD_EXAMPLES + EXIT_CODES,
    )
    card.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset; the files go there")
    card.add_argument("--name", metavar="TEXT", help="of the dataset; default: the name of its folder")
    card.add_argument("--description", metavar="TEXT", help="what it is; default: none")
    card.add_argument("--license", metavar="TEXT", help="its name or URL, such as CC-BY-4.0; default: none")
    card.add_argument("--citation", metavar="TEXT", help="what to cite; default: none")
    card.add_argument("--url", metavar="URL", help="a page about it; default: none")
    card.add_argument("--overwrite", action="store_true", help="replace the files")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = _command(
        commands,
        "report",
        "make a page of pictures and distributions by which a dataset is judged",
        _REPORT_EXAMPLES + EXIT_CODES,
    )
    report.add_argument("output", metavar="OUTPUT", help="folder or URL of the dataset")
    report.add_argument(
        "--out",
        metavar="FILE",
        help="the page, replaced if it is there; default: report.html in this folder; on a cluster needed, "
        "and within the workers' reach",
    )
    report.add_argument(
        "--pictures",
        type=int,
        default=1000,
        metavar="N",
        help="volumes to show besides the outliers, evenly spread; default: 1000; 5 KB each",
    )
    run = report.add_argument_group("running")
    run.add_argument(
        "--workers", type=int, metavar="N", help=f"threads; default: all cores ({count_cores()} here)"
    )
    _add_quiet(run)
    report.add_argument_group("Apache Beam", "Every other flag goes to Beam, as for build.")


def _add_workers(group: argparse._ActionsContainer, what: str) -> None:
    group.add_argument(
        "--workers",
        type=int,
        default=count_cores(),
        metavar="N",
        help=f"{what}; default: all cores ({count_cores()} here)",
    )


def _add_quiet(group: argparse._ActionsContainer) -> None:
    group.add_argument("--quiet", action="store_true", help="no progress; results and errors only")


def _add_summary(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--summary-json",
        metavar="FILE",
        help="write how the command ended, also if it failed: status, counts, times, error; a .json file, or "
        "its URL, outside of OUTPUT; docs/monitoring.md has the fields; default: none",
    )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line.

    Args:
        argv: without the program's name. Flags may be written with - or _.

    Returns:
        Our options, and the flags that are for Beam (none but for `build`, `check` and `report`).

    Raises:
        UsageError: a malformed option, or a flag that no command of ours knows, where Beam gets none.
        SystemExit: argparse's own, after --help and --version.
    """
    parser = make_parser()
    known, rest = parser.parse_known_args([_dashed(a) for a in argv])
    for name, shown in _PATHS.items():
        if getattr(known, name, None) == "":
            raise UsageError(f"{shown} is empty; was a variable not set?")
    _check_monitoring(known)
    if rest and (
        known.command not in ("build", "check", "report") or not all(a.startswith("--") for a in rest[:1])
    ):
        raise UsageError(f"unknown argument {rest[0]}; see `beam-nifti {known.command} --help`")
    return known, [_underscored(a) for a in rest]


def _check_monitoring(options: argparse.Namespace) -> None:
    """Refuse what would overwrite something else, or what nobody would find."""
    output = getattr(options, "output", None)
    for name, ending in (("summary_json", ".json"), ("metrics_file", ".prom")):
        path, flag = getattr(options, name, None), _PATHS[name]
        if path is None:
            continue
        if not path.endswith(ending):
            raise UsageError(f"{flag} is {path}; give a name that ends in {ending}")
        if output and storage.absolute(path).startswith(f"{storage.absolute(output)}/"):
            raise UsageError(f"{flag} is {path}; keep it out of OUTPUT, which holds the dataset alone")
        if name == "metrics_file" and storage.is_remote(path):
            raise UsageError(f"{flag} is {path}; node_exporter reads files of its own machine: give a path")


def _dashed(argument: str) -> str:
    return _renamed(argument, "_", "-")


def _underscored(argument: str) -> str:
    return _renamed(argument, "-", "_")


def _renamed(argument: str, old: str, new: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace(old, new)}{equals}{value}"


def refuse_misspelled(unknown: Sequence[str], *, strict: bool) -> None:
    """Refuse flags that are nobody's.

    Args:
        unknown: flags that neither we nor Beam's Python SDK know.
        strict: whether there is nobody else who could know them; a cluster's job service may.

    Raises:
        UsageError: naming the flag that was probably meant.
    """
    ours = [o for o in _build_flags() if o.startswith("--")]
    for argument in unknown:
        if not argument.startswith("--"):
            continue
        flag = _dashed(argument.partition("=")[0])
        close = difflib.get_close_matches(flag, ours, n=1, cutoff=0.75)
        if close or strict:
            hint = f"; did you mean {close[0]}?" if close else "; see `beam-nifti build --help`"
            raise UsageError(f"unknown flag {flag}{hint}")


def _build_flags() -> list[str]:
    parser = argparse.ArgumentParser()
    _add_build(parser.add_subparsers())
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(action.choices["build"]._option_string_actions)


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


def build_config(options: argparse.Namespace) -> BuildConfig:
    """The build that the options ask for.

    Raises:
        UsageError: a value that no build can have.
    """
    sharding = None
    if options.examples_per_shard is not None or options.num_shards is not None:
        sharding = Sharding(options.examples_per_shard, options.num_shards)
    # A level means nothing without compression, so it makes no difference between two datasets.
    level = options.compression_level if options.compression == "gzip" else RecordConfig.compression_level
    return BuildConfig(
        manifest=options.manifest,
        output=options.output,
        record=_record_config(options, options.compression, level),
        columns=_columns(options),
        sharding=sharding,
        splitting=_splitting(options),
        shuffle_seed=options.shuffle_seed,
        allow_mixed_shapes=options.allow_mixed_shapes,
        max_bad_fraction=options.max_bad_fraction,
        overwrite=options.overwrite,
        temp_location=options.temp_location,
        workers=count_cores() if options.workers is None else options.workers,
        anonymous_ids=options.anonymous_ids,
    )


def check_config(options: argparse.Namespace) -> BuildConfig:
    """The build that `check` looks ahead to; its output is the report, "" for none.

    Raises:
        UsageError: a value that no build can have.
    """
    return BuildConfig(
        manifest=options.manifest,
        output=options.out or "",
        record=_record_config(options),
        columns=_columns(options),
        allow_mixed_shapes=options.allow_mixed_shapes,
        workers=count_cores() if options.workers is None else options.workers,
    )


def report_config(options: argparse.Namespace) -> BuildConfig:
    """The dataset that `report` reads, as the engines know it: no manifest, and OUTPUT in the workers' reach.

    Raises:
        UsageError: a number is out of range.
    """
    if options.pictures < 0:
        raise UsageError(f"--pictures is {options.pictures}; it must be at least 0")
    workers = count_cores() if options.workers is None else options.workers
    return BuildConfig(manifest="", output=options.output, workers=workers)


def _columns(options: argparse.Namespace) -> Columns:
    return Columns(
        options.path_column,
        options.label_column,
        options.id_column,
        options.mask_column,
        options.missing_label,
    )


def _record_config(
    options: argparse.Namespace,
    compression: str = RecordConfig.compression,
    level: int = RecordConfig.compression_level,
) -> RecordConfig:
    return RecordConfig(
        rescale=options.rescale,
        voxel_dtype=options.voxel_dtype,
        compression=compression,
        compression_level=level,
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


def chosen_entities(options: argparse.Namespace) -> dict[str, list[str]]:
    """The labels that `manifest bids` is to choose images by, for each key.

    Raises:
        UsageError: no KEY=LABEL.
    """
    chosen = dict[str, list[str]]()
    for label in options.session or ():
        chosen.setdefault("ses", []).append(label.removeprefix("ses-"))
    for text in options.entity or ():
        key, equals, label = text.partition("=")
        if not (key and equals):
            raise UsageError(f"--entity is {text!r}; give a key and a label, such as run=1")
        chosen.setdefault(key, []).append(label)
    return chosen
