"""The output of `WriteToTFRecord`: whether it may be written, what it holds, and whose it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from beam_nifti.config import BuildConfig
from beam_nifti.errors import OutputBusyError, OutputError
from beam_nifti.pipeline.parameters import naming_parameters
from beam_nifti.pipeline.parts import BUILD_FOLDER, parts_folder, parts_root, remove_parts
from beam_nifti.pipeline.publish import (
    files_of,
    find_replaceable,
    next_revision,
    refuse_foreign,
    remove_files,
    require_writable_output,
)
from beam_nifti.pipeline.saved_plan import SavedPlan, SavedWrite
from beam_nifti.record.dataset_files import FILE_NAME
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.storage import paths as storage


@dataclass(frozen=True)
class Occupied:
    """What an output holds.

    Attributes:
        published: dataset; None if there is none, or if it is damaged and will be replaced.
        saved: plan of a pipeline that has not published its dataset, this one or another.
        build: plan of an unfinished build.
    """

    published: DatasetInfo | None
    saved: SavedWrite | None
    build: SavedPlan | None


@dataclass(frozen=True)
class Target:
    """Where a dataset is written, and how.

    Attributes:
        config: configuration of the dataset, as far as it is given, with absolute paths.
        token: 16 hex digits, unique to this pipeline.
    """

    config: BuildConfig
    token: str

    @property
    def output(self) -> str:
        """The folder of the dataset."""
        return self.config.output

    @property
    def root(self) -> str:
        """The folder of all part files."""
        return parts_root(self.output, self.config.temp_location)

    @property
    def folder(self) -> str:
        """The folder of this pipeline's part files."""
        return parts_folder(self.root, self.token, "records", 0)

    def find_published(self) -> DatasetInfo | None:
        """The existing dataset, if it may be replaced and can be read.

        Raises:
            OutputError: it may not be replaced.
            DatasetError: it is damaged.
        """
        published = find_replaceable(self.output, overwrite=self.config.overwrite)
        if published is not None and published.withdrawn:
            raise OutputError(
                f"{self.output}: holds a dataset from which participants were withdrawn, and records without "
                "a manifest do not show whose they are; choose another output"
            )
        if published is not None and not self.config.overwrite:
            raise OutputError(
                f"{self.output}: holds a dataset; choose another output, or use overwrite=True to replace it"
            )
        return published

    def require_available(self) -> Occupied:
        """What the output holds, all of which may be replaced.

        Raises:
            OutputError: it may not be replaced, or the output cannot be written.
            DatasetError: it is damaged.
        """
        with naming_parameters():
            self.require_writable()
            published, saved = self.find_published(), SavedWrite.read(self.output)
            build = None if saved and saved.token == self.token else self._find_build()
            if not (published or (saved and saved.token == self.token)):
                unfinished = set[str]().union(*(found.written for found in (saved, build) if found))
                refuse_foreign(self.output, unfinished, overwrite=self.config.overwrite)
        return Occupied(published, saved, build)

    def _find_build(self) -> SavedPlan | None:
        try:
            build = SavedPlan.read(self.output)
        except OutputError:
            if self.config.overwrite:
                return None
            raise
        if build is not None and not self.config.overwrite:
            raise OutputError(
                f"{self.output}: holds an unfinished build; finish it, choose another output, or use "
                "overwrite=True to discard it"
            )
        return build

    def require_writable(self) -> None:
        """Refuse folders to which nothing can be written."""
        folders = {"OUTPUT": self.output}
        if self.root != parts_root(self.output, None):
            folders["temp_location"] = storage.dirname(self.root)
        for name, folder in folders.items():
            storage.require_writable(folder, name, is_folder=True)
        if not storage.is_remote(self.output):
            require_writable_output(self.output)

    def require_current(self) -> SavedWrite:
        """The saved plan of this pipeline.

        Raises:
            OutputBusyError: another build or pipeline has taken over the output.
        """
        saved = SavedWrite.read(self.output)
        if saved is None or saved.token != self.token or SavedPlan.read(self.output) is not None:
            raise OutputBusyError(
                f"{self.output}: another pipeline has started to write here, so this one stops; give each "
                "its own output, or run one after the other"
            )
        return saved

    @contextlib.contextmanager
    def reading_parts(self) -> Iterator[None]:
        """If a part file is gone during the block, say what has removed it."""
        try:
            yield
        except FileNotFoundError as e:
            self.require_current()
            raise OutputBusyError(
                f"{e.filename}: is gone; another pipeline that started here at the same time may have "
                "removed it, so run one after the other"
            ) from e

    def take_over(self, occupied: Occupied) -> SavedWrite:
        """Make the output this pipeline's, and remove what dead pipelines left. The lock is held."""
        output, published, dead = self.output, occupied.published, occupied.saved
        kept = files_of(published) if published else ()
        unfinished = [saved for saved in (dead, occupied.build) if saved is not None]
        own_root = parts_root(output, None)
        revision = next_revision(output, published, dead.revision if dead else None)
        if unfinished:  # else they may be those of a pipeline that starts now, too, and will be refused later
            for root in {self.root, own_root}.union(*(saved.parts_roots(output) for saved in unfinished)):
                remove_parts(root, keep=self.token)
        remove_files(output, set[str]().union(*(saved.written for saved in unfinished)), keep=kept)
        if published is None:  # a damaged one, which is to be replaced
            storage.delete(storage.join(output, FILE_NAME), output)
        root = BUILD_FOLDER if self.root == own_root else self.root
        saved = SavedWrite(self.token, root, revision, kept)
        SavedPlan.remove(output)
        saved.write(output)
        return saved
