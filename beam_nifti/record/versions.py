"""Versions of the software that wrote records, as indexes store them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Final

from beam_nifti.errors import ShardError
from beam_nifti.support.json_types import require_type
from beam_nifti.support.strict_json import dump_json, load_json

VERSIONED: Final = ("apache-beam", "nibabel", "numpy", "scipy", "isal")
"""Libraries whose versions may affect the bytes of a dataset. dataset_info.json stores the versions."""

VERSIONS_FACT: Final = "versions"
"""Key of the versions in the metadata of an index."""

_NO_RECORDS: Final = ("apache-beam",)
"""Software that moves records but does not affect their bytes."""

Versions = Mapping[str, str]


@functools.cache
def installed_version(name: str) -> str:
    """The version of a distribution, in this process."""
    return metadata.version(name)


def record_versions() -> dict[str, str]:
    """Versions, in this process, of the software that decides the bytes of records."""
    return {name: installed_version(name) for name in ("beam-nifti", *VERSIONED) if name not in _NO_RECORDS}


def all_versions() -> dict[str, str]:
    """Versions, in this process, of the software that builds a dataset."""
    return {name: installed_version(name) for name in _NO_RECORDS} | record_versions()


def versions_fact(earlier: Iterable[Versions] = ()) -> dict[str, str]:
    """The versions that an index written by this process stores.

    Args:
        earlier: versions of the software that made records before this process; {} for unknown versions.

    Returns:
        VERSIONS_FACT with a JSON list of objects: each of `earlier` once, then this process's.
    """
    now = record_versions()
    others = {dump_json(v, sort_keys=True): dict(v) for v in earlier if v != now}
    return {VERSIONS_FACT: dump_json([*(others[text] for text in sorted(others)), now])}


def versions_in(facts: Mapping[str, str]) -> list[dict[str, str]]:
    """The versions in the metadata of an index; [{}] if it was written before versions were stored.

    Raises:
        ShardError: they are not a list of versions.
    """
    try:
        found: list[dict[str, str]] = load_json(facts.get(VERSIONS_FACT, "[{}]"), is_modest=True)
        require_type(found, tuple[Mapping[str, str], ...], VERSIONS_FACT)
    except ValueError as e:
        raise ShardError(f"{VERSIONS_FACT} of an index: {e}") from e
    if not found:
        raise ShardError(f"{VERSIONS_FACT} of an index are an empty list")
    return found


def is_written_here(facts: Mapping[str, str]) -> bool:
    """Whether an index and its file were written with the versions of this process."""
    return versions_in(facts)[-1] == record_versions()


def version_changes(was: Versions, now: Versions) -> str:
    """How versions differ, in words.

    >>> version_changes({"numpy": "1.26.4", "scipy": "1.14.0"}, {"numpy": "2.1.0", "scipy": "1.14.0"})
    'numpy 1.26.4, now 2.1.0'
    """
    return "; ".join(
        f"{name} {was.get(name, 'of an unknown version')}, now {version}"
        for name, version in now.items()
        if was.get(name) != version
    )
