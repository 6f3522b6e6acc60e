"""The position of a run in a dataset, as JSON values, and the check that another run may continue from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from beam_nifti.errors import DatasetError, UsageError
from beam_nifti.read.order import Order, whole_number
from beam_nifti.read.split_spec import parse_split
from beam_nifti.record.dataset_info import DatasetInfo

_VERSION: Final = 1
_NO_DRAWING: Final = {"balance": None, "weights": None}
"""Arguments that earlier states do not have."""

_OF_DATASET: Final = frozenset(["dataset", "steps_per_epoch", "step"])
"""Keys that are not arguments of the run."""


def describe_state(
    info: DatasetInfo,
    split: str,
    where: str | None,
    order: Order,
    step: int,
    patches: Mapping[str, Any] | None,
    drawing: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The state of a run that has consumed some steps, through all epochs, with these patches and draws."""
    parts = parse_split(split)
    return {
        "version": _VERSION,
        "split": "+".join(map(str, parts)),
        "where": where,
        "batch_size": order.batch_size,
        "drop_remainder": order.drop_remainder,
        "seed": order.seed,
        "patches": patches,
        **_NO_DRAWING,
        **(drawing or {}),
        "shard": [order.host, order.num_hosts],
        "dataset": _digest(
            info, [part.name for part in parts], selects=where is not None or drawing is not None
        ),
        "steps_per_epoch": order.num_steps,
        "step": step,
    }


def _digest(info: DatasetInfo, splits: list[str], selects: bool) -> str:
    """A digest of the records of some splits and, if the indexes decide which are read, of these."""
    shards = [shard for name in splits for shard in info.splits[name].shards]
    content = "".join(f"{s.sha256} {s.index_sha256 if selects else ''}\n" for s in shards)
    return hashlib.sha256(content.encode()).hexdigest()


def require_step(name: str, value: Any) -> int:
    """Convert a number of elements that were consumed to a Python integer.

    Raises:
        UsageError: it is not a whole number of at least 0.
    """
    step = whole_number(name, value)
    if step < 0:
        raise UsageError(f"{name} is {step}; give how many elements were consumed, from 0")
    return step


def check_state(folder: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    """The step from which to continue; `expected` is the state of the run that continues.

    Raises:
        UsageError: `state` is not a state, or that of a run with other arguments.
        DatasetError: the dataset's records are not those of the state.
    """
    if not isinstance(state, Mapping):
        raise UsageError(f"start_state is {state!r:.80}; give the result of state_after")
    state = {**_NO_DRAWING, **state}
    for name in expected:
        if name not in state:
            raise UsageError(f"start_state has no {name}; give the result of state_after of this version")
    if state["version"] != _VERSION or len(state) > len(expected):
        raise UsageError(
            "start_state is of another version, or has other keys; give the result of state_after of this "
            "version"
        )
    step = require_step("the step of start_state", state["step"])
    for name in expected:
        then, now = state[name], expected[name]
        if name in _OF_DATASET or then == now:
            continue
        if name == "seed" and None in (then, now):
            name, then, now = "shuffle", then is not None, now is not None
        raise UsageError(
            f"start_state is of a run with {name} {then!r}, but this one has {now!r}; give the arguments of "
            "that run, or start again without start_state"
        )
    if state["dataset"] != expected["dataset"]:
        raise DatasetError(
            f"{folder}: its records are not those of start_state: it was rebuilt, or is another dataset; "
            "read the dataset of that run, or start again without start_state"
        )
    return step
