"""What the functions of `beam_nifti.api` share: their arguments, and their words."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar, cast

from beam_nifti.errors import BeamNiftiError, UsageError, printable
from beam_nifti.pipeline.watcher import LogWatcher, Watcher
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.process import ForkGuard
from beam_nifti.support.wording import one_line

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from apache_beam.options.pipeline_options import PipelineOptions

    from beam_nifti.config import BuildConfig
    from beam_nifti.pipeline.options import BuildOptions
    from beam_nifti.pipeline.runners import Engine

Path: TypeAlias = "str | os.PathLike[str]"
ManifestTable: TypeAlias = "Path | pd.DataFrame | pa.Table | Iterable[Mapping[str, Any]]"
"""A path or URL; or a table, whose relative image paths are relative to the working directory."""

BeamOptions: TypeAlias = "PipelineOptions | Mapping[str, Any] | Sequence[str] | None"

_P = ParamSpec("_P")
_T = TypeVar("_T")

_FLAGS: Final = re.compile(r"(?<![\w-])--(manifest|deep|pictures|by|out|like|config|runner)(?![\w-])")
"""Flags that are parameters of these functions, besides the options of a build."""

_BEAM: Final = ForkGuard()


def callable_from_python(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Adapt a function for calls from Python; calls from the command line are not changed.

    Errors, records of the log and the sentences of results name parameters instead of flags and show control
    characters as Python writes them, and the logging of the calling program is not changed.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if isinstance(kwargs.get("progress"), Watcher):
            return function(*args, **kwargs)
        try:
            with logs.unconfigured(), _rewording_logs():
                result: Any = function(*args, **kwargs)
            return cast("_T", result.reworded(_as_parameters) if hasattr(result, "reworded") else result)
        except BeamNiftiError as e:
            from beam_nifti.pipeline.parameters import OUTPUT

            e.reword(lambda text: OUTPUT.sub("output", _as_parameters(text)))
            raise

    return call


@logs.shared
@contextlib.contextmanager
def _rewording_logs() -> Iterator[None]:
    def reword(record: logging.LogRecord) -> bool:
        record.msg, record.args = _as_parameters(record.getMessage()), ()
        return True

    logs.LOGGER.addFilter(reword)
    try:
        yield
    finally:
        logs.LOGGER.removeFilter(reword)


def _as_parameters(text: str) -> str:
    from beam_nifti.manifest.in_memory import NAME
    from beam_nifti.pipeline.parameters import as_parameters

    text = text.replace(storage.absolute(NAME), "the table in memory")
    return printable(_FLAGS.sub(r"\1", as_parameters(text)))


def watcher_of(progress: bool | Watcher) -> Watcher:
    """The watcher of a call; by default one that logs."""
    if isinstance(progress, Watcher):
        return progress
    from beam_nifti.pipeline.options import read_switch

    return LogWatcher(has_progress=read_switch("progress", progress))


def flags_for(runner: str | None, options: BeamOptions, watcher: Watcher) -> list[str]:
    """Beam's flags, with underscores."""
    if not isinstance(runner, str | None):
        raise UsageError(f"--runner is {one_line(repr(runner))}; give its name, such as 'FlinkRunner'")
    flags = [] if runner is None else [f"--runner={runner}"]
    if options is None or options == []:
        return flags  # without loading Beam
    if not isinstance(options, list):
        watcher.load_beam()
    from beam_nifti.pipeline.beam_flags import flags_of

    return [*flags, *flags_of(options)]


def engine_for(config: BuildConfig, flags: Sequence[str], watcher: Watcher) -> Engine:
    """The engine of a call; a UsageError in a process that was forked from one that has run Beam."""
    if not _BEAM.enter():
        raise UsageError(
            "this process was forked from one that has run Apache Beam, which would hang here; start it with "
            'multiprocessing.get_context("spawn")'
        )
    watcher.load_beam()
    from beam_nifti.pipeline.beam_flags import choose_engine

    engine = choose_engine(config, flags, watcher)
    watcher.on_engine(engine)
    return engine


def configure(
    manifest: ManifestTable,
    make: Callable[..., BuildConfig],
    options: BuildOptions,
    config: Path | None,
    like: Path | None,
    flags: Sequence[str],
    watcher: Watcher,
) -> tuple[BuildConfig, bytes | None]:
    """The configuration of a build, and the rows of a manifest that is no file, as a Parquet file."""
    files = (config, like, *(options.get(name) for name in ("rescale_stats", "reference", "map_labels")))
    if flags and any(file is not None for file in files):
        watcher.load_beam()
        from beam_nifti.pipeline.beam_flags import set_stores

        set_stores(flags)
    file, dataset = text_of("config", config), text_of("like", like)
    wanted = make(path_of(manifest), given=options, config=file, like=dataset)
    rows = rows_of(manifest, wanted.anonymous_ids)
    return wanted if rows is None else replace(wanted, rows=""), rows


def path_of(manifest: ManifestTable) -> str:
    """The path of a manifest; of one that is no file, the one that it would have."""
    if isinstance(manifest, str | os.PathLike):
        return storage.path_text("manifest", manifest)
    from beam_nifti.manifest.in_memory import NAME

    return NAME


def rows_of(manifest: ManifestTable, anonymous_ids: str | None) -> bytes | None:
    """The rows of a manifest that is no file, as a Parquet file; with anonymous ids errors show no cell."""
    if isinstance(manifest, str | os.PathLike):
        return None
    from beam_nifti.manifest.in_memory import parquet_of

    return parquet_of(manifest, hides_cells=anonymous_ids is not None)


def text_of(name: str, path: Path | None) -> str | None:
    """An optional path as text."""
    return None if path is None else storage.path_text(name, path)


def dataset_path(path: Path, name: str = "dataset") -> str:
    """The absolute path of a dataset."""
    return storage.absolute(storage.path_text(name, path))
