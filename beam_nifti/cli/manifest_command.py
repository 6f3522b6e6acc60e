"""`beam-nifti manifest`."""

from __future__ import annotations

import argparse

from beam_nifti.cli.manifest_options import chosen_entities
from beam_nifti.cli.printing import all_read, print_line, while_read
from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.pipeline.outputs import require_out
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.outcomes import SUCCESS
from beam_nifti.support.terminal import write_result
from beam_nifti.support.wording import counted


def write_manifest(_: RunSummary, options: argparse.Namespace, __: list[str]) -> int:
    """`beam-nifti manifest`."""
    from beam_nifti.manifest import discovery
    from beam_nifti.manifest.msd import find_msd_images
    from beam_nifti.manifest.tables import format_delimited, write_table

    out = options.out and storage.absolute(options.out)
    if out:
        is_table = options.source == "bids" and _is_study_table(out, options.folder)
        inputs = {"a table of the study": out if is_table else None}
        require_out(options.out, overwrite=options.overwrite, inputs=inputs)
    folder = storage.dirname(out) if out else ""
    if options.source == "bids":
        found = discovery.find_bids_images(
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
    elif options.source == "msd":
        found = find_msd_images(options.folder, folder, options.only)
    else:
        found = discovery.find_matching_images(options.pattern, folder, all_images=options.all_images)
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


def _is_study_table(path: str, study: str) -> bool:
    name = path.rpartition("/")[2]
    return storage.is_within(path, study) and (name == "participants.tsv" or name.endswith("_sessions.tsv"))
