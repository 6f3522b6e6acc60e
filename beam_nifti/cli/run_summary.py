"""How a command ended, for schedulers: `--summary-json`. docs/monitoring.md describes the document."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from beam_nifti import __version__
from beam_nifti.errors import UsageError
from beam_nifti.pipeline.metrics import Distribution
from beam_nifti.pipeline.options import flag_of
from beam_nifti.pipeline.outputs import require_apart
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json

FORMAT_VERSION: Final = 1

STATUSES: Final = {
    0: "success",
    1: "failed",
    2: "refused",
    75: "temporary",
    130: "interrupted",
    141: "cut short",
    143: "interrupted",
}
"""The status of a run, by exit code."""


_ENDINGS: Final = {"summary_json": ".json", "metrics_file": ".prom"}
"""Endings of the files that report on a run, by the names of their options."""


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class RunSummary:
    """What is known of a run so far; None for what is not known, or does not concern the command.

    docs/monitoring.md describes the fields. The status is "crashed" until the end.
    """

    command: str
    version: str = __version__
    status: str = "crashed"
    exit_code: int = 1
    error: Mapping[str, str] | None = None
    dry_run: bool = False
    runner: str | None = None
    manifest: str | None = None
    output: str | None = None
    fingerprint: str | None = None
    num_volumes: int | None = None
    splits: Mapping[str, int] | None = None
    num_examples: int | None = None
    num_kept: int | None = None
    num_failed: int | None = None
    failures: Mapping[str, Mapping[str, int]] | None = None
    failure_reasons: Sequence[Mapping[str, Any]] | None = None
    failures_path: str | None = None
    num_shards: int | None = None
    num_bytes: int | None = None
    num_deep: int | None = None
    num_problems: int | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    started: datetime = field(default_factory=_now)
    ended: datetime | None = None

    def know(self, **facts: Any) -> None:
        """Note facts: attributes of this class."""
        for name, value in facts.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def fail(self, error: BaseException, message: str = "") -> None:
        """Note an error, and what was said of it if that is another text."""
        self.error = {"type": type(error).__name__, "message": message or str(error)}

    def end(self, exit_code: int | None) -> None:
        """Note the end; None if an exception that nobody foresaw ends the process."""
        self.ended = _now()
        if exit_code is not None:
            self.exit_code, self.status = exit_code, STATUSES[exit_code]

    @property
    def seconds(self) -> float:
        """From start to end."""
        return ((self.ended or _now()) - self.started).total_seconds()

    def as_document(self) -> dict[str, Any]:
        """The JSON document."""
        facts = {"format_version": FORMAT_VERSION, **asdict(self), "seconds": round(self.seconds, 3)}
        times = (self.started, self.ended)
        facts["started"], facts["ended"] = (t and t.isoformat(timespec="milliseconds") for t in times)
        return facts


def require_reports_writable(options: argparse.Namespace) -> None:
    """Refuse reports that would overwrite something else, that nobody would find, or that cannot be written.

    Those of a store are written to once the engine's flags are known.

    Raises:
        UsageError: a name is wrong, a file is in use otherwise, or its folder does not exist.
        OutputError: it cannot be written.
        OSError: it cannot be written now.
    """
    named = {flag_of(name): path for name in ("out", *_ENDINGS) if (path := getattr(options, name, None))}
    for name, ending in _ENDINGS.items():
        flag, output = flag_of(name), getattr(options, "output", None)
        if (path := named.get(flag)) is None:
            continue
        if not path.endswith(ending):
            raise UsageError(f"{flag} is {path}; give a name that ends in {ending}")
        if output and storage.is_within(path, output):
            raise UsageError(f"{flag} is {path}; choose a path outside OUTPUT, which holds only the dataset")
        if name == "metrics_file" and storage.is_remote(path):
            raise UsageError(f"{flag} is {path}; node_exporter reads only local files: give a local path")
    for (flag, path), (other, same) in itertools.combinations(named.items(), 2):
        if storage.is_same(path, same):
            raise UsageError(f"{flag} and {other} are both {path}; choose another file for one of them")
    for flag, path in named.items():
        if flag != "--out" and not storage.is_remote(path):
            require_apart(path, flag, _inputs(options))
            storage.require_writable(storage.absolute(path), flag)
    if metrics := named.get("--metrics-file"):
        folder = storage.dirname(storage.absolute(metrics))
        if not storage.exists(folder):
            raise UsageError(f"--metrics-file is {metrics}: there is no folder {folder}; create it")


def _inputs(options: argparse.Namespace) -> dict[str, str | None]:
    """Files that a command reads, by what they are."""
    names = {"manifest": "the manifest", "anonymous_ids": "the key of --anonymous-ids"}
    return {what: getattr(options, name, None) for name, what in names.items()}


def forget_earlier(options: argparse.Namespace) -> None:
    """Forget how an earlier run ended; once Beam knows its flags, as some are for the storage."""
    path = getattr(options, "summary_json", None)
    if path is None:
        return
    if storage.is_remote(path):
        require_apart(path, "--summary-json", _inputs(options))
        storage.require_writable(storage.absolute(path), "--summary-json")
    storage.delete(storage.absolute(path))  # so that a process that is killed leaves none


def write_document(path: str, run: RunSummary) -> None:
    """Write the document, whole or not at all."""
    text = dump_json(run.as_document(), indent=2, ensure_ascii=False)
    storage.write(storage.absolute(path), f"{text}\n".encode())
