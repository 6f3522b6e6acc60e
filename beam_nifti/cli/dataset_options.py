"""The options of the commands that read a dataset."""

from __future__ import annotations

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

_DIFF_EXAMPLES = """\
examples:
  beam-nifti diff monday/dataset tuesday/dataset
  beam-nifti diff monday/dataset tuesday/dataset --json | jq '.came[]'

Reads dataset_info.json and index/ of each: of a dataset that is built on every night in one place, keep
copies of these. Exits with 1 where anything is different.

"""

_EXTRACT_EXAMPLES = """\
examples:
  beam-nifti extract dataset --id sub-0003
  beam-nifti extract gs://lab/dataset --id sub-0003 --out /tmp/sub-0003.nii

Voxels are in the image's units; those of --voxel-dtype native are the file's own. docs/extract.md says how
close the others are to them.

"""

_VIEW_EXAMPLES = """\
examples:
  beam-nifti view dataset --id sub-0003 --open
  beam-nifti view gs://lab/dataset --id sub-0003 --mask --out /tmp/sub-0003.html

The page is one file that loads nothing. Intensities are in the image's units. Needs beam-nifti[report].

"""

_CARD_EXAMPLES = """\
examples:
  beam-nifti card cohort/dataset
  beam-nifti card gs://lab/dataset --name 'Brains of Lyon' --license CC-BY-4.0 --overwrite

A build does not touch the files: give the command again after one that has changed the dataset.

"""

_REPORT_EXAMPLES = """\
examples:
  beam-nifti report cohort/dataset
  beam-nifti report gs://lab/dataset --out gs://lab/report.html --pictures 3000

Reads every record once, and checks its bytes on the way. Needs beam-nifti[report]; on a cluster the workers
do, too. Exits with 1, after the page is written, if a shard or a record is damaged.

"""


def add_commands(commands: Commands) -> None:
    """Add them all."""
    _add_verify(commands)
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
        help="compare ids, labels, splits, paths and further columns with this table",
    )
    verify.add_argument(
        "--anonymous-ids",
        metavar="KEYFILE",
        help="the key that the dataset was built with; required for --deep, and to compare with --manifest",
    )
    verify.add_argument(
        "--deep",
        metavar="N",
        help="make N records (or: all) again from their images, and compare bit for bit; requires "
        "--manifest, which names the images that are opened",
    )
    verify.add_argument(
        "--preprocess",
        action="append",
        metavar="MODULE:FUNCTION",
        help="for --deep, of a dataset that was built with it: the function to import and run, with its "
        "arguments; one that only the dataset names is not run; may be repeated, for several",
    )
    add_workers(verify)
    add_quiet(verify)
    add_summary(verify)


def _add_inspect(commands: Commands) -> None:
    inspect = add_command(commands, "inspect", "print what is in a dataset, or in one of its records")
    add_output(inspect)
    inspect.add_argument("--record", metavar="ID", help="one record's metadata, by its example id")
    inspect.add_argument("--json", action="store_true", help="as JSON")


def _add_diff(commands: Commands) -> None:
    diff = add_command(
        commands, "diff", "report what came, went and changed between two datasets", _DIFF_EXAMPLES
    )
    diff.add_argument("before", metavar="BEFORE", help="folder or URL of a dataset")
    diff.add_argument("after", metavar="AFTER", help="folder or URL of another dataset")
    diff.add_argument("--json", action="store_true", help="as JSON, with all ids")


def _add_extract(commands: Commands) -> None:
    extract = add_command(
        commands, "extract", "write the images of records as NIfTI files", _EXTRACT_EXAMPLES
    )
    add_output(extract)
    extract.add_argument(
        "--id",
        action="append",
        required=True,
        metavar="ID",
        help="a record, by its example id; may be repeated",
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
    add_overwrite(extract)


def _add_view(commands: Commands) -> None:
    view = add_command(commands, "view", "make a page to walk through the volume of a record", _VIEW_EXAMPLES)
    add_output(view)
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
    add_overwrite(view)


def _add_card(commands: Commands) -> None:
    card = add_command(
        commands,
        "card",
        "describe a dataset for others, in README.md and croissant.json",
        _CARD_EXAMPLES,
    )
    add_output(card, "; the files go there")
    card.add_argument("--name", metavar="TEXT", help="of the dataset; default: the name of its folder")
    card.add_argument("--description", metavar="TEXT", help="what it is; default: none")
    card.add_argument("--license", metavar="TEXT", help="its name or URL, such as CC-BY-4.0; default: none")
    card.add_argument("--citation", metavar="TEXT", help="what to cite; default: none")
    card.add_argument("--url", metavar="URL", help="a page about it; default: none")
    add_overwrite(card, "the files")


def _add_report(commands: Commands) -> None:
    report = add_command(
        commands,
        "report",
        "make a page of pictures and distributions by which a dataset is judged",
        _REPORT_EXAMPLES,
    )
    add_output(report)
    report.add_argument(
        "--out",
        metavar="FILE",
        help="the page, replaced if it is there; default: report.html in this folder; required on a "
        "cluster, where workers must be able to write to it",
    )
    report.add_argument(
        "--pictures",
        type=int,
        default=1000,
        metavar="N",
        help="volumes to show besides the outliers, evenly spread; default: 1000; 5 KB each",
    )
    run = report.add_argument_group("running")
    add_workers(run)
    add_quiet(run)
    add_beam(report)
