"""The file of a cohort's statistics: what `analyze` writes, and `--rescale-stats` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from beam_nifti.config import CohortStatistics
from beam_nifti.errors import FailedVolume, UsageError
from beam_nifti.storage import paths as storage
from beam_nifti.support.document import Document
from beam_nifti.support.json_types import hints_of, require_keys, require_type
from beam_nifti.support.outcomes import may_pass
from beam_nifti.support.strict_json import dump_json, load_json
from beam_nifti.support.wording import counted, format_rows, size_text

STATISTICS_NAME: Final = "statistics.json"
"""The file, in the folder of a build, with what it has measured."""

_VERSION: Final = 1
_MOST_BYTES: Final = 1 << 26  # of a file: 65,535 labels have 4 MB, 100,000 failures 40 MB
_SHOWN: Final = 5  # labels and failures that a table shows


@dataclass(frozen=True)
class UnusualVolume:
    """A measured volume whose voxels are far from those of the others; see `ChannelStatistics.is_far`.

    Attributes:
        row: number of its row in the manifest, from 1.
        example_id: id of the example.
        channel: column of its image; "" if there is only one.
        mean: mean of its selected voxels, in the image's units.
    """

    row: int
    example_id: str
    channel: str
    mean: float


@dataclass(frozen=True)
class Measured:
    """What the pipeline of an analysis has found.

    Attributes:
        statistics: the statistics; None if there are none.
        problem: why there are none; "" if there are.
        failures: volumes that failed, in the manifest's order.
        unusual: volumes that are far from the others, in the manifest's order.
        num_failed: number of failures; with `--frames each`, that of all frames.
        key: digest of what was measured; see `analyze.key_of`.
    """

    statistics: CohortStatistics | None
    problem: str
    failures: tuple[FailedVolume, ...]
    unusual: tuple[UnusualVolume, ...]
    num_failed: int
    key: str

    def to_json(self) -> str:
        """As JSON, for the process that has started the pipeline."""
        return dump_json(asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> Measured:
        """Parse what others may have changed.

        Raises:
            ValueError: it is something else.
        """
        facts: Any = load_json(content, is_modest=True)
        require_keys(facts, hints_of(cls), hints_of(cls), "")
        found = facts["statistics"]
        return cls(
            **facts | {"statistics": None if found is None else CohortStatistics.of(found)} | _lists_of(facts)
        )


def _lists_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The volumes that a file names."""
    return {
        "failures": tuple(FailedVolume(**failure) for failure in facts["failures"]),
        "unusual": tuple(UnusualVolume(**volume) for volume in facts["unusual"]),
    }


class Analysis(Document):
    """Statistics of a cohort; `print(analysis)` shows them as a table.

    Its items are those of the file that `analyze` writes. `build(rescale_stats=analysis)` uses them.

    Attributes:
        statistics: the statistics.
        failures: volumes that failed and are not in the statistics.
        unusual: volumes in the statistics whose voxels are far from those of the others.
    """

    def __init__(
        self,
        statistics: CohortStatistics,
        failures: tuple[FailedVolume, ...] = (),
        unusual: tuple[UnusualVolume, ...] = (),
    ) -> None:
        facts = {
            "statistics_version": _VERSION,
            "statistics": asdict(statistics),
            "failures": list(map(asdict, failures)),
            "unusual": list(map(asdict, unusual)),
        }
        super().__init__(facts)
        self.statistics, self.failures, self.unusual = statistics, failures, unusual
        self._words: Callable[[str], str] = str

    def reworded(self, words: Callable[[str], str]) -> Analysis:
        """The analysis with its table changed; the items stay those of the JSON."""
        analysis = Analysis(self.statistics, self.failures, self.unusual)
        analysis._words = words
        return analysis

    def to_json(self) -> str:
        """The content of the file."""
        return dump_json(dict(self), indent=2, ensure_ascii=False) + "\n"

    def __repr__(self) -> str:
        """On one line."""
        found = self.statistics
        channels = counted(len(found.channels), "channel")
        return f"<Analysis of {counted(found.num_volumes, 'volume')}, {channels}>"

    def __str__(self) -> str:
        """As a table."""
        return self._words(format_rows(_rows_of(self), 14))


def _rows_of(analysis: Analysis) -> Iterator[tuple[str, str]]:
    found = analysis.statistics
    yield "volumes", f"{found.num_volumes:,} of {', '.join(found.splits)}"
    yield from statistics_rows(asdict(found))
    if found.num_failed:
        yield "failed", f"{counted(found.num_failed, 'volume')}, not in the statistics"
    failed = [f"row {f.row} ({f.example_id}): {f.message}" for f in analysis.failures]
    yield from _listed("", failed)
    unusual = [
        f"row {v.row} ({v.example_id}): mean {v.mean:.6g}{f' of {v.channel}' if v.channel else ''}"
        for v in analysis.unusual
    ]
    yield from _listed("unusual", unusual)


def _listed(title: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines[:_SHOWN]):
        yield "" if number else title, line
    if len(lines) > _SHOWN:
        yield "", f"and {len(lines) - _SHOWN:,} more"


def statistics_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines of a table about the statistics in a file or a dataset."""
    options = dict(found["options"])
    if found["num_empty"]:
        yield "empty", f"{counted(found['num_empty'], 'volume')} without a voxel to measure"
    yield "median size", f"{size_text(found['shape'])} voxels of {size_text(found['spacing'])} mm"
    names = options["channels"].split(",") if "channels" in options else ["intensity"]
    for name, channel in zip(names, found["channels"], strict=True):
        within = f" ({options['rescale_within']})" if "rescale_within" in options else ""
        yield (
            name,
            f"mean {channel['mean']:.6g}, std {channel['std']:.6g}, {channel['min']:g} to {channel['max']:g} "
            f"in {counted(channel['num_voxels'], 'voxel')}{within}",
        )
        values = ", ".join(f"{p:g} %: {value:g}" for p, value in channel["percentiles"])
        error = channel["percentile_error"]
        yield "", f"{values}{f' (within {100 * error:.2g} %)' if error else ''}"
    for label in found["labels"][:_SHOWN]:
        voxels, volumes = counted(label["num_voxels"], "voxel"), counted(label["num_volumes"], "volume")
        yield f"label {label['label']}", f"{voxels} in {volumes}"
    if len(found["labels"]) > _SHOWN:
        yield "", f"and {counted(len(found['labels']) - _SHOWN, 'more label')}"


def parse_statistics(content: str | bytes) -> Analysis:
    """The analysis in the content of a file that anybody may have written.

    Raises:
        ValueError: it is no such file.
    """
    facts: Any = load_json(content, is_modest=True)
    require_type(facts, dict, "it")
    if (version := facts.get("statistics_version")) != _VERSION:
        raise ValueError(f"statistics_version is {version!r}, expected {_VERSION}")
    kinds = {
        "statistics_version": int,
        "statistics": dict,
        "failures": tuple[FailedVolume, ...],
        "unusual": tuple[UnusualVolume, ...],
    }
    require_keys(facts, kinds, kinds, "")
    return Analysis(CohortStatistics.of(facts["statistics"]), **_lists_of(facts))


def read_statistics(path: str) -> CohortStatistics:
    """The statistics in a file, for `--rescale-stats`.

    Raises:
        UsageError: it is missing, or is no file of `analyze`.
        OSError: it cannot be read, but another attempt may succeed.
    """
    try:
        return parse_statistics(storage.read_bounded(storage.absolute(path), _MOST_BYTES)).statistics
    except OSError as e:
        if may_pass(e):
            raise
        reason = f"cannot be read: {e.strerror or e}"
        raise UsageError(f"--rescale-stats is {path}, which {reason}; give a file of `analyze`") from e
    except ValueError as e:
        reason = f"is no file of `beam-nifti analyze`: {e}"
        raise UsageError(f"--rescale-stats is {path}, which {reason}; give the file that it wrote") from e
