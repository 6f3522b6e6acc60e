"""What it takes to make records again as a dataset's build did: its content revision and its functions."""

from __future__ import annotations

import shlex

from beam_nifti.config import RecordConfig
from beam_nifti.errors import UsageError
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.volume.user_function import load_functions


def require_same_content(dataset: str, info: DatasetInfo, purpose: str, further: str = "") -> None:
    """Refuse a dataset whose options this version makes different records from.

    Args:
        dataset: path of the dataset.
        info: dataset_info.json.
        purpose: what requires it, such as "--deep rebuilds records".
        further: a further remedy, such as ", or drop --deep".
    """
    if info.config["fingerprint"] in info.record_config.earlier_fingerprints:
        raise UsageError(
            f"{purpose}, but {dataset} was built by a version of beam-nifti that makes different records "
            f"from the same options; use that version{further}"
        )


def require_functions(
    dataset: str, record: RecordConfig, named: str | tuple[str, ...] | None, by: str
) -> None:
    """Import the functions of a dataset's records, which run only if the user names them.

    Args:
        dataset: path of the dataset.
        record: configuration of its records.
        named: functions that the user names, as `RecordConfig.preprocess`.
        by: what runs them, such as "--deep".

    Raises:
        UsageError: these are not the dataset's functions, or one of them cannot be imported or has changed.
    """
    if named == record.preprocess:
        load_functions(record)
        return
    given = ", ".join(step for step, _ in RecordConfig(preprocess=named).steps)
    if not record.steps:
        raise UsageError(f"--preprocess is {given}, but {dataset} was built without a function; drop it")
    asked = f"--preprocess is {given}" if named else f"{by} runs only a function that you name"
    built_with = ", then ".join(
        f"{step}, defined in a file of sha256 {digest}" for step, digest in record.steps
    )
    flags = " ".join(f"--preprocess {shlex.quote(step)}" for step, _ in record.steps)
    raise UsageError(
        f"{asked}; {dataset} was built with {built_with}; to import and run that function here, give {flags}"
    )
