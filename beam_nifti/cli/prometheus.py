"""A build's metrics for the textfile collector of Prometheus's node_exporter: `--metrics-file`.

Names end in their unit, after https://prometheus.io/docs/practices/naming. Every metric has the label
`output`, as node_exporter takes no metric twice and several datasets may be built on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.storage import paths as storage

PREFIX: Final = "beam_nifti_build_"


def write_metrics(path: str, run: RunSummary) -> None:
    """Replace a .prom file by the metrics of a build that has ended, whole or not at all.

    Raises:
        OSError: its folder is not there, or cannot be written.
    """
    storage.write(storage.absolute(path), generate_latest(_Build(run)))


class _Build(Collector):
    """Gives the metrics of one build, once."""

    def __init__(self, run: RunSummary) -> None:
        self._run, self._output = run, run.output or ""

    def collect(self) -> Iterator[Metric]:
        run = self._run
        assert run.ended is not None
        facts = {"version": run.version, "runner": run.runner, "fingerprint": run.fingerprint}
        yield self._gauge("info", "What was built, and with what; always 1.", 1, facts)
        success = int(run.exit_code == 0)
        yield self._gauge("success", "1 if the dataset is complete, 0 if the build failed.", success)
        yield self._gauge("exit_code", "Exit code of the command.", run.exit_code)
        yield self._gauge(
            "start_timestamp_seconds", "Start of the build, in seconds since 1970.", run.started.timestamp()
        )
        yield self._gauge(
            "end_timestamp_seconds", "End of the build, in seconds since 1970.", run.ended.timestamp()
        )
        yield self._gauge("duration_seconds", "Time from start to end, in seconds.", run.seconds)
        for name, help_text, value in (
            ("volumes", "Records, if no volume fails.", run.num_volumes),
            ("examples", "Records in the shards.", run.num_examples),
            ("kept_examples", "Records that an earlier run had made.", run.num_kept),
            ("failed_volumes", "Volumes that failed.", run.num_failed),
            ("shards", "Shards of all splits.", run.num_shards),
            ("shard_bytes", "Size of the shards.", run.num_bytes),
        ):
            if value is not None:
                yield self._gauge(name, help_text, value)
        yield from self._of_splits()
        yield from self._of_failures()
        yield from self._of_steps()

    def _gauge(
        self, name: str, help_text: str, value: float, labels: Mapping[str, str | None] | None = None
    ) -> Metric:
        labels = {"output": self._output, **(labels or {})}
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=list(labels))
        family.add_metric([label or "" for label in labels.values()], value)
        return family

    def _of_splits(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            f"{PREFIX}split_volumes", "Records of a split, if no volume fails.", labels=["output", "split"]
        )
        for split, count in (self._run.splits or {}).items():
            family.add_metric([self._output, split], count)
        yield family

    def _of_failures(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            f"{PREFIX}failures",
            "Volumes that failed, by step and class of the error.",
            labels=["output", "step", "error"],
        )
        for step, errors in (self._run.failures or {}).items():
            for error, count in errors.items():
                family.add_metric([self._output, step, error], count)
        yield family

    def _of_steps(self) -> Iterator[Metric]:
        counters = CounterMetricFamily(
            f"{PREFIX}pipeline", "Beam's counters of this build.", labels=["output", "counter"]
        )
        for name, value in self._run.counters.items():
            counters.add_metric([self._output, name], value)
        yield counters
        times = SummaryMetricFamily(
            f"{PREFIX}step_seconds", "Time of a step for each of its elements.", labels=["output", "step"]
        )
        for name, found in self._run.distributions.items():
            times.add_metric([self._output, name.removesuffix("-msec")], found.count, found.sum / 1e3)
        yield times
