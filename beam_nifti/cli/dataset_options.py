"""The options of the commands on existing datasets."""

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
from beam_nifti.config import MISSING_LABELS

_DIFF_EXAMPLES = """\
examples:
  beam-nifti diff monday/dataset tuesday/dataset
  beam-nifti diff monday/dataset tuesday/dataset --json | jq '.added[]'

Reads only dataset_info.json and index/ of each dataset. If a dataset is rebuilt every night in one folder,
copies of these are enough. The exit code is 1 if the datasets differ.

"""

_EXTRACT_EXAMPLES = """\
examples:
  beam-nifti extract dataset --id sub-0003
  beam-nifti extract gs://lab/dataset --id sub-0003 --out /tmp/sub-0003.nii
  beam-nifti extract dataset --id sub-0003 --mask --on-source-grid

Voxels are in the image's units. With --voxel-dtype native they are exactly those of the file;
docs/extract.md gives the precision of the other dtypes.

"""

_VIEW_EXAMPLES = """\
examples:
  beam-nifti view dataset --id sub-0003 --open
  beam-nifti view gs://lab/dataset --id sub-0003 --mask --out /tmp/sub-0003.html

The page is one self-contained file. Intensities are in the image's units. Requires beam-nifti[report].

"""

_CARD_EXAMPLES = """\
examples:
  beam-nifti card cohort/dataset
  beam-nifti card gs://lab/dataset --name 'Brains of Lyon' --license CC-BY-4.0 --overwrite

A build does not update these files: run the command again with --overwrite after a build that changed the
dataset.

"""

_CONVERT_EXAMPLES = """\
examples:
  beam-nifti convert cohort/dataset cohort/converted
  beam-nifti convert gs://lab/dataset gs://lab/converted --workers 8

The images are not needed. Records keep their bytes, their order and their shards, and every byte is checked.
OLD is not changed. The same command continues a conversion that was interrupted.

"""

_RELABEL_EXAMPLES = """\
examples:
  beam-nifti relabel cohort/dataset cohort/manifest.tsv
  beam-nifti relabel cohort/dataset cohort/manifest.tsv --label-column age,diagnosis

The images are not needed. OUTPUT becomes the dataset that a build of MANIFEST gives, with the labels, splits,
further columns and order of its rows. The same command continues a change that was interrupted.

"""

_WITHDRAW_EXAMPLES = """\
examples:
  beam-nifti withdraw cohort/dataset --participant sub-0003 --manifest cohort/manifest.tsv
  beam-nifti withdraw dataset --participant sub-0003 --participant sub-0017 --manifest m.tsv \\
      --anonymous-ids key

The images are not needed. OUTPUT becomes the dataset that a build of the other rows gives. Afterwards drop
the participants' rows from the manifest: builds into OUTPUT refuse them. The same command continues a
withdrawal that was interrupted.

"""

_REPORT_EXAMPLES = """\
examples:
  beam-nifti report cohort/dataset
  beam-nifti report cohort/dataset --by site
  beam-nifti report gs://lab/dataset --out gs://lab/report.html --pictures 3000

Reads every record once and checks its bytes. Requires beam-nifti[report], also on the workers of a cluster.
If a shard or a record is damaged, the page is still written, and the exit code is 1. Records of different
splits that have the same image, or nearly the same one, are reported on standard error.

"""


def add_commands(commands: Commands) -> None:
    """Add these commands."""
    _add_verify(commands)
    _add_convert(commands)
    _add_relabel(commands)
    _add_withdraw(commands)
    _add_inspect(commands)
    _add_diff(commands)
    _add_extract(commands)
    _add_view(commands)
    _add_card(commands)
    _add_report(commands)


def _add_verify(commands: Commands) -> None:
    verify = add_command(commands, "verify", "read a dataset back and check every byte of it")
    add_output(verify)
    verify.add_argument(
        "--manifest",
        metavar="MANIFEST",
        help="compare ids, labels, splits, paths and extra columns with this table",
    )
    verify.add_argument(
        "--anonymous-ids",
        metavar="KEYFILE",
        help="file of the key that the dataset was built with; for a dataset with anonymous ids, --manifest "
        "and --deep require it; default: none",
    )
    verify.add_argument(
        "--deep",
        metavar="N",
        help="rebuild N records (or all) from their images and compare them bit for bit; requires "
        "--manifest, which names the images to open",
    )
    verify.add_argument(
        "--preprocess",
        action="append",
        metavar="MODULE:FUNCTION",
        help="for --deep: the function that the dataset was built with, with its arguments; may be repeated, "
        "for several functions. A function that only the dataset names is never run",
    )
    add_workers(verify)
    add_quiet(verify)
    add_summary(verify)


def _add_convert(commands: Commands) -> None:
    convert = add_command(
        commands,
        "convert",
        "convert a dataset of an earlier format to the current one, without its images",
        _CONVERT_EXAMPLES,
    )
    convert.add_argument("old", metavar="OLD", help="folder or URL of the dataset to convert")
    convert.add_argument("output", metavar="OUTPUT", help="folder or URL of the converted dataset")
    add_workers(convert, "; each converts one shard at a time")
    add_quiet(convert)
    add_summary(convert)


def _add_relabel(commands: Commands) -> None:
    summary = "give the records of a dataset the labels, splits and columns of a changed manifest"
    relabel = add_command(commands, "relabel", summary, _RELABEL_EXAMPLES)
    add_output(relabel)
    relabel.add_argument(
        "manifest",
        metavar="MANIFEST",
        help="changed table: one row per example of the dataset, with the same id and images, in any order",
    )
    relabel.add_argument(
        "--label-column",
        metavar="COLUMN[:KIND],…",
        help="columns of labels, as for build; default: those of the dataset",
    )
    relabel.add_argument(
        "--missing-label",
        choices=MISSING_LABELS,
        help="what to do with rows without a label, as for build; default: as in the dataset",
    )
    _add_rewriting(relabel)


def _add_withdraw(commands: Commands) -> None:
    summary = "remove participants from a dataset; no images are needed"
    withdraw = add_command(commands, "withdraw", summary, _WITHDRAW_EXAMPLES)
    add_output(withdraw)
    withdraw.add_argument(
        "--participant",
        action="append",
        required=True,
        metavar="ID",
        help="participant_id as in the manifest, or the example's id if the manifest has no participants; "
        "with anonymous ids also a pseudonym; may be repeated",
    )
    withdraw.add_argument(
        "--manifest",
        required=True,
        metavar="MANIFEST",
        help="table that the dataset was built from, which still has the participants' rows",
    )
    _add_rewriting(withdraw)


def _add_rewriting(command: argparse.ArgumentParser) -> None:
    """Add the options that `relabel` and `withdraw` share."""
    command.add_argument(
        "--anonymous-ids",
        metavar="KEYFILE",
        help="file of the key that the dataset was built with, if its ids are anonymous",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="discard an unfinished build in OUTPUT; default: it is refused",
    )
    add_workers(command, "; each writes one shard at a time")
    add_quiet(command)
    add_summary(command)


def _add_inspect(commands: Commands) -> None:
    inspect = add_command(commands, "inspect", "print a description of a dataset or of one record")
    add_output(inspect)
    inspect.add_argument(
        "--record", metavar="ID", help="print the metadata of the record with this example id"
    )
    inspect.add_argument("--json", action="store_true", help="print as JSON")


def _add_diff(commands: Commands) -> None:
    diff = add_command(
        commands, "diff", "report which examples and options differ between two datasets", _DIFF_EXAMPLES
    )
    diff.add_argument("before", metavar="BEFORE", help="folder or URL of the first dataset")
    diff.add_argument("after", metavar="AFTER", help="folder or URL of the second dataset")
    diff.add_argument("--json", action="store_true", help="print as JSON, with all ids")


def _add_extract(commands: Commands) -> None:
    extract = add_command(
        commands, "extract", "write the images of records as NIfTI files", _EXTRACT_EXAMPLES
    )
    add_output(extract)
    extract.add_argument(
        "--id", action="append", required=True, metavar="ID", help="example id of a record; may be repeated"
    )
    extract.add_argument(
        "--out",
        metavar="FILE",
        help=".nii.gz or .nii file; default: ID.nii.gz, or with --mask ID_mask.nii.gz, and with "
        "--target ID_target.nii.gz, in the working directory; characters of ID that a file name cannot "
        "contain become _",
    )
    extract.add_argument(
        "--mask", action="store_true", help="write the records' masks instead of their images"
    )
    extract.add_argument(
        "--target", action="store_true", help="write the records' targets instead of their images"
    )
    extract.add_argument(
        "--on-source-grid",
        action="store_true",
        help="write them with shape and affine of the images that the records were made of: preparation is "
        "undone as far as possible",
    )
    add_overwrite(extract)


def _add_view(commands: Commands) -> None:
    view = add_command(commands, "view", "make a web page to browse the volume of a record", _VIEW_EXAMPLES)
    add_output(view)
    view.add_argument("--id", required=True, metavar="ID", help="example id of the record")
    view.add_argument(
        "--mask", action="store_true", help="overlay the labels of the record's mask on the image"
    )
    view.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="channel to show, counted from 0; required if the record has several",
    )
    view.add_argument(
        "--out",
        metavar="FILE",
        help=".html file; default: ID.html in the working directory; characters of ID that a file name "
        "cannot contain become _",
    )
    view.add_argument("--open", action="store_true", help="open the page in the browser")
    add_overwrite(view)


def _add_card(commands: Commands) -> None:
    card = add_command(
        commands,
        "card",
        "write a dataset card: README.md for people and croissant.json for programs",
        _CARD_EXAMPLES,
    )
    add_output(card, ", to which the files are written")
    card.add_argument("--name", metavar="TEXT", help="name of the dataset; default: the name of its folder")
    card.add_argument("--description", metavar="TEXT", help="description of the dataset; default: none")
    card.add_argument(
        "--license", metavar="TEXT", help="name or URL of the license, such as CC-BY-4.0; default: none"
    )
    card.add_argument("--citation", metavar="TEXT", help="publication to cite; default: none")
    card.add_argument("--url", metavar="URL", help="web page about the dataset; default: none")
    add_overwrite(card, "existing files")


def _add_report(commands: Commands) -> None:
    report = add_command(
        commands,
        "report",
        "make a web page of pictures and distributions to review a dataset",
        _REPORT_EXAMPLES,
    )
    add_output(report)
    report.add_argument(
        "--out",
        metavar="FILE",
        help=".html file, replaced if it exists; default: report.html in the working directory; required on "
        "a cluster, where the workers must be able to write to it",
    )
    report.add_argument(
        "--pictures",
        type=int,
        default=1000,
        metavar="N",
        help="number of volumes to show besides the outliers, evenly spaced, 5 KB each; default: 1000",
    )
    report.add_argument(
        "--by",
        metavar="COLUMN",
        help="column of the index, such as a site or a scanner, by which to compare intensities; default: "
        "none",
    )
    run = report.add_argument_group("running")
    add_workers(run)
    add_quiet(run)
    add_beam(report)
