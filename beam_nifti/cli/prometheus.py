"""A build's metrics for the textfile collector of Prometheus's node_exporter: `--metrics-file`.

Names end in their unit, after https://prometheus.io/docs/practices/naming. Every metric has the label
`output`, as node_exporter takes no metric twice and several datasets may be built on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

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
        values = [value or "" for value in facts.values()]
        help_text = "What was built, and with what; always 1."
        yield self._family(GaugeMetricFamily, "info", help_text, list(facts), [(values, 1)])
        times = run.started.timestamp(), run.ended.timestamp()
        for name, help_text, value in (
            ("success", "1 if the dataset is complete, 0 if the build failed.", int(run.exit_code == 0)),
            ("exit_code", "Exit code of the command.", run.exit_code),
            ("start_timestamp_seconds", "Start of the build, in seconds since 1970.", times[0]),
            ("end_timestamp_seconds", "End of the build, in seconds since 1970.", times[1]),
            ("duration_seconds", "Time from start to end, in seconds.", run.seconds),
            ("volumes", "Records, if no volume fails.", run.num_volumes),
            ("examples", "Records in the shards.", run.num_examples),
            ("kept_examples", "Records that an earlier run had made.", run.num_kept),
            ("failed_volumes", "Volumes that failed.", run.num_failed),
            ("shards", "Shards of all splits.", run.num_shards),
            ("shard_bytes", "Size of the shards.", run.num_bytes),
        ):
            if value is not None:
                yield self._family(GaugeMetricFamily, name, help_text, (), [((), value)])
        splits = [((split,), count) for split, count in (run.splits or {}).items()]
        help_text = "Records of a split, if no volume fails."
        yield self._family(GaugeMetricFamily, "split_volumes", help_text, ["split"], splits)
        failures = [
            ((step, error), count)
            for step, errors in (run.failures or {}).items()
            for error, count in errors.items()
        ]
        help_text = "Volumes that failed, by step and class of the error."
        yield self._family(GaugeMetricFamily, "failures", help_text, ["step", "error"], failures)
        counters = [((name,), value) for name, value in run.counters.items()]
        help_text = "Beam's counters of this build."
        yield self._family(CounterMetricFamily, "pipeline", help_text, ["counter"], counters)
        steps = [
            ((name.removesuffix("-msec"),), found.count, found.sum / 1e3)
            for name, found in run.distributions.items()
        ]
        help_text = "Time of a step for each of its elements."
        yield self._family(SummaryMetricFamily, "step_seconds", help_text, ["step"], steps)

    def _family(
        self,
        kind: type[Any],
        name: str,
        help_text: str,
        labels: Sequence[str],
        rows: Iterable[tuple[Any, ...]],
    ) -> Metric:
        """A metric; each row has the values of its labels, and the arguments of a sample."""
        family: Metric = kind(PREFIX + name, help_text, labels=["output", *labels])
        for values, *sample in rows:
            family.add_metric([self._output, *values], *sample)  # type: ignore[attr-defined]
        return family
