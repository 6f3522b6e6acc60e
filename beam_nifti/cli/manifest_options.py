"""The options of `beam-nifti manifest`, which writes a manifest of existing images."""

from __future__ import annotations

import argparse

from beam_nifti.cli.common_options import Commands, add_command, add_overwrite
from beam_nifti.errors import UsageError

_MANIFEST_EXAMPLES = """\
examples:
  beam-nifti manifest bids study --suffix T1w --label age --out manifest.tsv
  beam-nifti manifest bids study/derivatives/fmriprep --suffix T1w \\
      --entity space=MNI152NLin2009cAsym --entity desc=preproc --out mni.tsv
  beam-nifti manifest msd Task02_Heart --out heart.tsv
  beam-nifti manifest glob 'scans/**/*.nii.gz' --out manifest.tsv

"""

_INIT_EXAMPLES = """\
examples:
  beam-nifti init study
  beam-nifti build study.tsv study_dataset --config study.toml

The second command is the one that the first prints. FOLDER is a BIDS study, a dataset in the layout of the
Medical Segmentation Decathlon or nnU-Net, or any folder of images, with or without a table that names them.
Writes the manifest FOLDER.tsv, unless a table in FOLDER names the images, and FOLDER.toml: the options that
the images call for, each with its reason, and what is left to decide. Reads the headers of all images, and
the voxels of a few.

"""

_BIDS_EXAMPLES = """\
examples:
  beam-nifti manifest bids study --suffix T1w --label age --column sex --out manifest.tsv
  beam-nifti manifest bids study --suffix T1w --session baseline --entity run=1 --out manifest.tsv
  beam-nifti manifest bids study --suffix T1w --entity acq= --out manifest.tsv
  beam-nifti manifest bids study --suffix T1w,FLAIR --entity FLAIR:run=1 --out manifest.tsv
  beam-nifti build manifest.tsv dataset --path-column T1w,FLAIR
  beam-nifti manifest bids study --suffix T1w --derivatives fmriprep --mask-suffix mask \\
      --entity mask:desc=brain --entity mask:space= --out manifest.tsv
  beam-nifti manifest bids study --suffix bold --all-images --out manifest.tsv
  beam-nifti build manifest.tsv dataset --id-column image_id --frames each

The first selects the T1w image of every participant with an age in participants.tsv, and keeps sex in the
index. The third selects images whose names have no acq-. Images, participants and sessions that are not used
are reported on standard error.

"""

_MSD_EXAMPLES = """\
examples:
  beam-nifti manifest msd Task02_Heart --out heart.tsv
  beam-nifti build heart.tsv dataset --id-column case_id --mask-column mask --missing-mask skip
  beam-nifti manifest msd nnUNet_raw/Dataset001_BrainTumour --only train --out tumours.tsv
  beam-nifti build tumours.tsv dataset --id-column case_id --path-column FLAIR,T1w,T1gd,T2w --mask-column mask

Files that dataset.json lists and that are missing are an error. The options with which build reads the
manifest, and files that are not used, are reported on standard error.

"""

_TABLE_EXAMPLES = """\
examples:
  beam-nifti manifest table manifest.tsv --join participants.tsv --on participant_id --join-columns age,sex \\
      --out labelled.tsv
  beam-nifti manifest table manifest.tsv --join clinic.csv --on participant_id=Subject,session_id=Visit \\
      --join-columns label=Diagnosis --unmatched skip --out labelled.tsv

"""

_GLOB_EXAMPLES = """\
examples:
  beam-nifti manifest glob 'scans/**/*_T1w.nii.gz' --out manifest.tsv
  beam-nifti manifest glob 'gs://lab/scans/sub-*/T1w.nii' --out manifest.tsv

"""


def add_commands(commands: Commands) -> None:
    """Add `init`, and `manifest` and its sources."""
    summary = "write a manifest and a file of options for a folder of images"
    init = add_command(commands, "init", summary, _INIT_EXAMPLES)
    init.add_argument("folder", metavar="FOLDER", help="folder or URL of images")
    init.add_argument("--out", metavar="DIR", help="folder of the two files; default: the working directory")
    add_overwrite(init, "the two files")
    init.set_defaults(quiet=True)
    manifest = add_command(commands, "manifest", "write a manifest of existing images", _MANIFEST_EXAMPLES)
    sources = manifest.add_subparsers(dest="source", metavar="SOURCE", required=True)
    _add_bids(sources)
    _add_msd(sources)
    _add_table(sources)
    _add_glob(sources)


def _add_bids(sources: Commands) -> None:
    bids = add_command(sources, "bids", "write a manifest of a BIDS study", _BIDS_EXAMPLES)
    bids.add_argument(
        "folder", metavar="DIR", help="folder or URL of the study, or of one of its derivatives"
    )
    bids.add_argument(
        "--suffix",
        required=True,
        metavar="NAME,…",
        help="suffix of the images, such as T1w; several, such as T1w,FLAIR, make one row per session with a "
        "column for each, and skip sessions that lack one",
    )
    bids.add_argument(
        "--session", action="append", metavar="LABEL", help="only images of this session; may be repeated"
    )
    bids.add_argument(
        "--entity",
        action="append",
        metavar="KEY=LABEL",
        help="only images with this entity in their name, such as run=1; KEY= for images without KEY; "
        "SUFFIX:KEY=LABEL for those of one suffix, such as FLAIR:run=1 or mask:desc=brain; may be repeated, "
        "for several keys or several labels of one key",
    )
    bids.add_argument(
        "--mask-suffix",
        metavar="NAME",
        help="suffix of label maps of the (first) images, such as mask or dseg, for a column mask; images "
        "without one are skipped; default: no masks",
    )
    bids.add_argument(
        "--derivatives",
        metavar="NAME",
        help="where the masks are: a folder of DIR/derivatives, such as fmriprep, or the path or URL of "
        "another; default: DIR",
    )
    bids.add_argument(
        "--label",
        metavar="COLUMN",
        help="column of participants.tsv or of the participants' sessions.tsv to use as the label: numbers, "
        "or texts, which build stores as classes; images without a value are skipped; default: no labels",
    )
    bids.add_argument(
        "--column",
        action="append",
        metavar="COLUMN",
        help="column of the same tables to keep in the manifest and in the index of the dataset; may be "
        "repeated; default: none",
    )
    _add_all_images(bids)
    _add_output(bids)


def _add_msd(sources: Commands) -> None:
    summary = "write a manifest of a dataset of the Medical Segmentation Decathlon or nnU-Net"
    msd = add_command(sources, "msd", summary, _MSD_EXAMPLES)
    msd.add_argument("folder", metavar="DIR", help="folder or URL with dataset.json, imagesTr and labelsTr")
    msd.add_argument(
        "--only",
        choices=("train", "validation", "test"),
        help="only the cases of this split; train, whose cases have masks, is listed without a column split, "
        "so that build --split can draw splits; default: all",
    )
    _add_output(msd)


def _add_table(sources: Commands) -> None:
    table = add_command(sources, "table", "add columns of another table to a manifest", _TABLE_EXAMPLES)
    table.add_argument("manifest", metavar="MANIFEST", help=".tsv, .csv, .jsonl or .parquet file or URL")
    _add_output(
        table,
        "file in the folder of MANIFEST, to which its paths are relative; default: TSV on standard output",
        is_table=True,
    )


def _add_glob(sources: Commands) -> None:
    glob = add_command(sources, "glob", "write a manifest of all images that match a pattern", _GLOB_EXAMPLES)
    glob.add_argument(
        "pattern",
        nargs="+",
        metavar="PATTERN",
        help="*, ? and […] match parts of a name, ** matches any number of folders. participant_id and "
        "session_id are taken from sub-… and ses-… in the paths",
    )
    _add_all_images(glob)
    _add_output(glob)


def _add_all_images(source: argparse.ArgumentParser) -> None:
    source.add_argument(
        "--all-images",
        action="store_true",
        help="keep several images of a participant's session, each with a name in a column image_id, for "
        "build --id-column image_id; default: several images are refused",
    )


_OUT_HELP = (
    "file; paths of images below its folder are relative; default: TSV on standard output, with absolute "
    "paths"
)


def _add_output(source: argparse.ArgumentParser, out: str = _OUT_HELP, *, is_table: bool = False) -> None:
    source.add_argument(
        "--join",
        required=is_table,
        metavar="FILE",
        help=".tsv, .csv, .jsonl or .parquet file or URL of which columns are added, such as participants.tsv"
        + ("" if is_table else "; default: none"),
    )
    source.add_argument(
        "--on",
        required=is_table,
        metavar="COLUMN,…",
        help="column of ids, such as participant_id, or NAME=NAME_IN_FILE if the file of --join has "
        "another name for it, such as participant_id=Subject",
    )
    source.add_argument(
        "--join-columns",
        required=is_table,
        metavar="COLUMN,…",
        help="columns of the file of --join to add, or NEW=NAME to rename one, such as label=Age,sex",
    )
    source.add_argument(
        "--unmatched",
        choices=("refuse", "keep", "skip"),
        help="rows of the manifest whose id is not in the file of --join: refuse them (default), keep them "
        "with n/a, or skip them",
    )
    source.add_argument("--out", metavar="FILE", help=f".tsv, .csv, .jsonl or .parquet {out}")
    add_overwrite(source, "the file of --out")


def chosen_entities(options: argparse.Namespace) -> dict[str, list[str]]:
    """The labels by which `manifest bids` selects images, for each key.

    Raises:
        UsageError: an entity is not KEY=LABEL.
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
