"""What the command line does while a pipeline runs: it notes facts, and keeps noise off the screen."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from beam_nifti.cli.parser import explain_unknown, flags_of_commands
from beam_nifti.cli.run_summary import RunSummary, forget_earlier
from beam_nifti.pipeline.watcher import Watcher

if TYPE_CHECKING:
    from beam_nifti.pipeline.runners import Engine
    from beam_nifti.record.dataset_info import DatasetInfo


class CommandWatcher(Watcher):
    """Follows the run of a command.

    Args:
        run: where facts are noted.
        options: of the command.

    Attributes:
        run: where facts are noted.
        engine: that the command runs on, once it is known.
        noise: what a local runner has written on standard error.
    """

    def __init__(self, run: RunSummary, options: argparse.Namespace) -> None:
        super().__init__(has_progress=not options.quiet)
        self.run, self.noise = run, io.StringIO()
        self.engine: Engine | None = None
        self._options = options
        self.flags = flags_of_commands()[options.command]

    def explain_unknown(self, argument: str, known: Iterable[str]) -> str:
        """Why a command does not take an argument."""
        return explain_unknown(argument, self._options.command, known)

    def load_beam(self) -> None:
        """Load Beam as it suits a process that does nothing else."""
        from beam_nifti.pipeline.runners import import_beam

        import_beam()

    def on_dataset(self, info: DatasetInfo) -> None:
        """Note it."""
        self.run.know(fingerprint=info.config.get("fingerprint"), num_volumes=info.num_examples)

    def on_engine(self, engine: Engine) -> None:
        """Note it, and forget how an earlier run ended, now that Beam knows the flags of the storage."""
        self.engine, self.run.runner = engine, engine.runner
        if not self.run.dry_run:
            forget_earlier(self._options)

    @contextlib.contextmanager
    def around(self, engine: Engine) -> Iterator[None]:
        """Keep what a local runner and its processes write on standard error from the screen."""
        from beam_nifti.pipeline.runners import quiet_processes

        with contextlib.ExitStack() as stack:
            if engine.in_processes:
                stack.enter_context(quiet_processes())
            if engine.is_local:
                stack.enter_context(contextlib.redirect_stderr(self.noise))
            yield
