"""Beam's flags: which there are, and which of them have an effect on a runner. The others are refused."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from beam_nifti.config import BuildConfig
from beam_nifti.errors import UsageError
from beam_nifti.pipeline import local_runner, runners
from beam_nifti.pipeline.runners import UNUSABLE, Engine
from beam_nifti.pipeline.watcher import Watcher
from beam_nifti.support.arguments import dashed, refuse_swallowed, suggest_flag, underscored
from beam_nifti.support.strict_json import dump_json

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

_STORES: Final = frozenset(
    {
        *("project", "job_name", "no_auth", "impersonate_service_account", "gcp_oauth_scopes"),
        *("gcs_custom_audit_entries", "azure_connection_string", "blob_service_endpoint"),
        *("azure_managed_identity_client_id", "s3_access_key_id", "s3_secret_access_key", "s3_session_token"),
        *("s3_endpoint_url", "s3_region_name", "s3_api_version", "s3_verify", "s3_disable_ssl"),
    }
)
"""What Cloud Storage, Azure's `azfs://` and S3 are reached by, whatever the runner is."""

_HERE: Final = frozenset(
    {
        *("runner", "direct_num_workers", "direct_running_mode", "pickle_library"),
        *("direct_runner_bundle_repeat", "direct_test_splits"),
        *("profile_cpu", "profile_memory", "profile_location", "profile_sample_rate"),
    }
)
"""What else has an effect in this process, by the names of the options."""

_EVERYWHERE: Final = frozenset(
    {
        *("sdk_container_image", "max_cache_memory_usage_mb", "element_processing_timeout_minutes"),
        *("default_sdk_harness_log_level", "sdk_harness_log_level_overrides", "parallelism"),
    }
)
"""Options of a runner's group that others use as well: of its Python workers, and what `runners` reads."""

_JOB_SERVERS: Final = frozenset({"FlinkRunner", "SparkRunner", "PortableRunner"})
"""Runners behind a job server, which has flags of its own that Beam's Python SDK does not know."""

_RUNNERS: Final = {
    "DirectOptions": frozenset[str](),
    "TestOptions": frozenset[str](),
    "TestDataflowOptions": frozenset[str](),
    "CrossLanguageOptions": frozenset[str](),
    "HadoopFileSystemOptions": frozenset[str](),
    "KafkaStreamsRunnerOptions": frozenset[str](),
    "FlinkRunnerOptions": frozenset({"FlinkRunner", "PortableRunner"}),
    "SparkRunnerOptions": frozenset({"SparkRunner", "PortableRunner"}),
    "JobServerOptions": frozenset({"FlinkRunner", "SparkRunner"}),
    "PrismRunnerOptions": frozenset({"PrismRunner"}),
    "PortableOptions": _JOB_SERVERS | {"PrismRunner"},
    "GoogleCloudOptions": frozenset({"DataflowRunner"}),
    "WorkerOptions": frozenset({"DataflowRunner"}),
}
"""Runners that use the options of a group; those of the other groups are for every cluster."""


def choose_engine(config: BuildConfig, flags: Sequence[str], watcher: Watcher | None = None) -> Engine:
    """The engine that Beam's flags, written with underscores, ask for. The watcher words the errors.

    Raises:
        UsageError: a flag is unknown, malformed, missing, given twice or without effect, or a path is out
            of the workers' reach. Nothing was read.
    """
    known, unknown = parse_beam_flags(flags)
    refuse_ineffective(flags, unknown, runners.runner_name(known.runner), watcher or Watcher())
    return runners.make_engine(config, flags, known)


def set_stores(flags: Sequence[str]) -> None:
    """Apply Beam's flags for stores, for what is read before the engine is chosen.

    Raises:
        UsageError: as `parse_beam_flags`.
    """
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions

    given = vars(parse_beam_flags(flags)[0])
    FileSystems.set_options(PipelineOptions([], **{name: given[name] for name in _STORES & given.keys()}))


def flags_of(options: PipelineOptions | Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Beam's options as flags, written with underscores; of an object of Beam's, those that are not defaults.

    Raises:
        UsageError: they are neither such an object, values by option, nor flags.
    """
    if isinstance(options, list | tuple) and all(isinstance(flag, str) for flag in options):
        return list(map(underscored, options))
    from apache_beam.options.pipeline_options import PipelineOptions

    if isinstance(options, PipelineOptions):
        # Unknown ones are kept: Java's runners behind a job server have more than Beam's Python knows.
        options = options.get_all_options(drop_default=True, retain_unknown_options=True)
    if not isinstance(options, Mapping):
        raise UsageError(
            f"pipeline_options is {options!r}; give Beam's PipelineOptions, a dict, or a list of flags, such "
            "as ['--region=europe-west1']"
        )
    return [flag for name, value in options.items() for flag in _flags_of_option(name, value)]


def _flags_of_option(name: str, value: Any) -> list[str]:
    from apache_beam.options.pipeline_options import _FLAG_THAT_SETS_FALSE_VALUE

    name = name.removeprefix("--").replace("-", "_")
    if value is None:
        return []
    if isinstance(value, bool):
        off = _FLAG_THAT_SETS_FALSE_VALUE.get(name)
        return [f"--{name}"] if value else [f"--{off}"] if off else []
    if isinstance(value, Mapping):
        return [f"--{name}={dump_json(value)}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{name}={each}" for each in values]


def parse_beam_flags(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What Beam's Python SDK understands of the flags, and the rest. Flags are not abbreviated.

    Raises:
        UsageError: a value is malformed, empty, or one of two of an option that takes one.
    """
    try:
        return _make_parser().parse_known_args(list(flags))
    except argparse.ArgumentError as e:
        raise UsageError(f"{e.argument_name}: {e.message}") from e


def _make_parser(groups: Iterable[str] | None = None) -> argparse.ArgumentParser:
    from apache_beam.options import pipeline_options

    parser = pipeline_options._BeamArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    refuse_swallowed(parser)
    for view in pipeline_options.PipelineOptions.__subclasses__():
        if groups is None or view.__name__ in groups:
            view._add_argparse_args(parser)
    return parser


def refuse_ineffective(flags: Sequence[str], unknown: Sequence[str], runner: str, watcher: Watcher) -> None:
    """Refuse flags that have no effect on a runner, which is "" for the default.

    Of the flags, which are written with underscores, Beam's Python SDK does not know the `unknown` ones.

    Raises:
        UsageError: naming the flag, and what was probably meant.
    """
    options = {flag: action.dest for flag, action in _make_parser()._option_string_actions.items()}
    unused = _unused_options(runner)
    known = [dashed(flag) for flag, name in options.items() if name not in unused]
    given = dict.fromkeys(a.partition("=")[0] for a in flags if a.startswith("--"))
    for flag in (f for f in given if options.get(f) in unused):
        is_local = runner in local_runner.NAMES
        where = f"with {runner}" if runner and not is_local else "without --runner"
        remedy = "name the runner that it is for with --runner, or drop it" if is_local else "drop it"
        raise UsageError(
            f"{flag} is an Apache Beam flag that has no effect {where}; "
            f"{_hint(dashed(flag), watcher.flags) or remedy}"
        )
    may_know_more = runner in _JOB_SERVERS or _is_foreign(runner)
    for before, argument in zip(("", *unknown), unknown, strict=False):
        is_flag = argument.startswith("--")
        is_value = not is_flag and before.startswith("--") and "=" not in before
        is_misspelled = is_flag and suggest_flag(dashed(argument.partition("=")[0]), [*watcher.flags, *known])
        if is_misspelled or not (may_know_more and (is_flag or is_value)):
            raise UsageError(watcher.explain_unknown(argument, known))


def _hint(flag: str, ours: Iterable[str]) -> str:
    """Which of our flags was probably meant by one of Beam's: similarity alone proves little."""
    stem = flag.removesuffix("s")
    meant = [f for f in ours if f.startswith(f"{stem}-") or flag.endswith(f"-{f.removeprefix('--')}")]
    return f"did you mean {meant[0]}?" if meant else ""


def _unused_options(runner: str) -> frozenset[str]:
    """Names of options of Beam's that have no effect on a runner."""
    if _is_foreign(runner):
        return frozenset()
    is_local = runner in local_runner.NAMES
    groups = None if is_local else [name for name, users in _RUNNERS.items() if runner not in users]
    names = {action.dest for action in _make_parser(groups)._actions}
    used = _STORES | (_HERE if is_local else _EVERYWHERE | {"temp_location"})
    return frozenset(names - used - UNUSABLE.keys())


def _is_foreign(runner: str) -> bool:
    """Whether a runner is one of those that nothing is known of."""
    return runner not in local_runner.NAMES and runner not in frozenset[str]().union(*_RUNNERS.values())
