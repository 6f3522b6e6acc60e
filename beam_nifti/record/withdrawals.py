"""What a dataset states about participants whose consent was withdrawn: hashes of their ids, and counts.

Source: docs/format.md, "dataset_info.json"; docs/adr/0028-withdrawal.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from beam_nifti.record.sharding import ShardName

_HASH_BYTES: Final = 16
_HASH: Final = re.compile(f"[0-9a-f]{{{2 * _HASH_BYTES}}}")
_SHA256: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class RemovedShard:
    """A shard that held records of withdrawn participants: its file name, and its sha256 in hex."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Withdrawal:
    """One withdrawal from a dataset.

    Attributes:
        revision: revision of the dataset without the participants.
        time: when it was published, in UTC, such as "2026-03-01T12:00:00Z".
        num_people: participants that were withdrawn.
        num_rows: rows of theirs in the manifest.
        num_examples: records that were removed.
        num_failures: failed volumes that were removed from the list of failures.
        info_sha256: sha256 of the dataset_info.json before, in hex.
        shards: shards before that held their records.
    """

    revision: int
    time: str
    num_people: int
    num_rows: int
    num_examples: int
    num_failures: int
    info_sha256: str
    shards: tuple[RemovedShard, ...]


def hash_person(name: str, withdrawals: Sequence[Withdrawal]) -> str:
    """The hash of a participant's id, or pseudonym, in a dataset with these withdrawals."""
    key = bytes.fromhex(withdrawals[0].info_sha256)
    return hashlib.blake2b(name.encode(), digest_size=_HASH_BYTES, key=key, person=b"withdrawn").hexdigest()


def find_withdrawn(
    names: Iterable[str], withdrawn: Sequence[str], withdrawals: Sequence[Withdrawal]
) -> set[str]:
    """Which of some participants were withdrawn."""
    known = frozenset(withdrawn)
    return {name for name in names if hash_person(name, withdrawals) in known} if known else set()


def withdrawals_of(facts: Sequence[dict[str, object]]) -> tuple[Withdrawal, ...]:
    """The withdrawals in a dataset_info.json, whose types are checked."""
    found = []
    for fact in facts:
        shards: list[dict[str, str]] = fact["shards"]  # type: ignore[assignment]
        removed = tuple(RemovedShard(**shard) for shard in shards)
        found.append(Withdrawal(**fact | {"shards": removed}))  # type: ignore[arg-type]
    return tuple(found)


def check_withdrawals(withdrawn: Sequence[str], withdrawals: Sequence[Withdrawal], revision: int) -> None:
    """Refuse what no withdrawal writes; `revision` is that of the dataset. Anything else is a ValueError."""
    for name in withdrawn:
        if not _HASH.fullmatch(name):
            raise ValueError(f"withdrawn has {name!r}, expected {2 * _HASH_BYTES} hex digits")
    num_people = sum(each.num_people for each in withdrawals)
    if len(set(withdrawn)) != len(withdrawn) or num_people != len(withdrawn):
        raise ValueError(f"withdrawn has {len(withdrawn)} participants, but withdrawals have {num_people}")
    earlier = 1
    for each in withdrawals:
        if not earlier < each.revision <= revision:
            raise ValueError(f"withdrawals has the revision {each.revision} after {earlier}")
        earlier = each.revision
        counts = (each.num_people - 1, each.num_rows, each.num_examples, each.num_failures)
        if not all(0 <= count < 1 << 31 for count in counts):
            raise ValueError(f"the withdrawal of revision {each.revision} has counts that none can have")
        datetime.strptime(each.time, "%Y-%m-%dT%H:%M:%S%z")
        for sha256 in (each.info_sha256, *(shard.sha256 for shard in each.shards)):
            if not _SHA256.fullmatch(sha256):
                raise ValueError(f"withdrawals has the sha256 {sha256!r}, expected 64 hex digits")
        for shard in each.shards:
            if ShardName.parse(shard.name) is None:
                raise ValueError(f"withdrawals names {shard.name!r}, which is no shard")
