"""`beam-nifti manifest`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from beam_nifti.cli.manifest_options import chosen_entities
from beam_nifti.cli.printing import all_read, print_line, while_read
from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.errors import UsageError
from beam_nifti.pipeline.outputs import require_out
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import SUCCESS
from beam_nifti.support.terminal import write_result
from beam_nifti.support.wording import counted

if TYPE_CHECKING:
    from beam_nifti.manifest.discovery import FoundImages
    from beam_nifti.manifest.joining import Join


def write_manifest(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti manifest`."""
    from beam_nifti.manifest.joining import join_table
    from beam_nifti.manifest.tables import format_delimited, write_table

    join = _join_of(options)
    out = options.out and storage.absolute(options.out)
    if out:
        require_out(options.out, overwrite=options.overwrite, inputs=_inputs_of(options, out))
    found = _find_images(options, storage.dirname(out) if out else "")
    if join is not None:
        found = join_table(found, join)
    for note in found.notes:
        logs.LOGGER.warning("%s", note)
    if out:
        write_table(out, found.table)
        with while_read():
            print_line(f"manifest {counted(found.table.num_rows, 'image')}: {options.out}")
        return SUCCESS
    with all_read():
        write_result(format_delimited(found.table, "\t"))
    return SUCCESS


def _find_images(options: argparse.Namespace, folder: str) -> FoundImages:
    """The manifest before `--join`; `folder` is that of `--out`, or ""."""
    from beam_nifti.manifest import discovery
    from beam_nifti.manifest.joining import read_images
    from beam_nifti.manifest.msd import find_msd_images

    if options.source == "bids":
        return discovery.find_bids_images(
            options.folder,
            options.suffix,
            folder,
            entities=chosen_entities(options),
            label=options.label,
            columns=options.column or (),
            all_images=options.all_images,
            mask_suffix=options.mask_suffix,
            derivatives=options.derivatives,
        )
    if options.source == "msd":
        return find_msd_images(options.folder, folder, options.only)
    if options.source == "table":
        return read_images(options.manifest, folder)
    return discovery.find_matching_images(options.pattern, folder, all_images=options.all_images)


def _join_of(options: argparse.Namespace) -> Join | None:
    from beam_nifti.manifest.joining import Join

    texts = {"--join": options.join, "--on": options.on, "--join-columns": options.join_columns}
    given = [flag for flag, text in texts.items() if text is not None]
    given += ["--unmatched"] if options.unmatched else []
    if not given:
        return None
    for flag, text in texts.items():
        if text is None:
            raise UsageError(f"{given[0]} requires {flag}")
    return Join.parse(options.join, options.on, options.join_columns, options.unmatched)


def _inputs_of(options: argparse.Namespace, out: str) -> dict[str, str | None]:
    """The files that a command reads, by what they are."""
    inputs = {"the table of --join": options.join}
    if options.source == "bids":
        inputs["a table of the study"] = out if is_study_table(out, options.folder) else None
    if options.source == "table":
        inputs["MANIFEST"] = options.manifest
    return inputs


def is_study_table(path: str, study: str) -> bool:
    """Whether a path is that of a table of a BIDS study."""
    name = path.rpartition("/")[2]
    return storage.is_within(path, study) and (name == "participants.tsv" or name.endswith("_sessions.tsv"))
