"""The position of a run in a dataset, as JSON values, and the check that another run may continue from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read.order import Order
from beam_nifti.read.split_spec import parse_split
from beam_nifti.record.dataset_info import DatasetInfo

_VERSION: Final = 1
_OF_DATASET: Final = frozenset(["dataset", "steps_per_epoch", "step"])
"""Keys that are not arguments of the run."""


def describe_state(
    info: DatasetInfo,
    split: str,
    where: str | None,
    order: Order,
    step: int,
    patches: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The state of a run that has consumed some steps, through all epochs, with these patches, if any."""
    parts = parse_split(split)
    return {
        "version": _VERSION,
        "split": "+".join(map(str, parts)),
        "where": where,
        "batch_size": order.batch_size,
        "drop_remainder": order.drop_remainder,
        "seed": order.seed,
        "patches": patches,
        "shard": [order.host, order.num_hosts],
        "dataset": _digest(info, [part.name for part in parts], selects=where is not None),
        "steps_per_epoch": order.num_steps,
        "step": step,
    }


def _digest(info: DatasetInfo, splits: list[str], selects: bool) -> str:
    """A digest of the records of some splits and, if a condition selects from the indexes, of these."""
    shards = [shard for name in splits for shard in info.splits[name].shards]
    content = "".join(f"{s.sha256} {s.index_sha256 if selects else ''}\n" for s in shards)
    return hashlib.sha256(content.encode()).hexdigest()


def check_state(folder: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    """The step from which to continue; `expected` is the state of the run that continues.

    Raises:
        UsageError: `state` is not a state, or that of a run with other arguments.
        DatasetError: the dataset's records are not those of the state.
    """
    is_state = isinstance(state, Mapping) and state.keys() == expected.keys()
    if not is_state or state["version"] != _VERSION or not isinstance(state["step"], int):
        raise UsageError(f"start_state is {state!r}; give the result of state_after of this version")
    for name in expected:
        if name not in _OF_DATASET and state[name] != expected[name]:
            raise UsageError(
                f"start_state is of a run with {name} {state[name]!r}, but this one has {expected[name]!r}; "
                "give the arguments of that run, or start again without start_state"
            )
    if state["dataset"] != expected["dataset"]:
        raise DatasetError(
            f"{folder}: its records are not those of start_state: it was rebuilt, or is another dataset; "
            "read the dataset of that run, or start again without start_state"
        )
    step: int = state["step"]
    return step
