"""What a build saves of its plan in its output: for its own workers, and for the build after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from beam_nifti.config import SPLIT_PATTERN, Sharding
from beam_nifti.errors import DatasetError, OutputBusyError, OutputError, UsageError
from beam_nifti.pipeline.parts import BUILD_FOLDER, parts_root
from beam_nifti.pipeline.statistics_file import STATISTICS_NAME
from beam_nifti.record.dataset_files import FAILURES_FILE, MAX_INFO_BYTES, revision_of_failures
from beam_nifti.record.dataset_info import LAST_REVISION, DatasetInfo
from beam_nifti.record.sharding import Layout, ShardName
from beam_nifti.storage import paths as storage
from beam_nifti.support.json_types import hints_of, require_keys
from beam_nifti.support.strict_json import dump_json, load_json

SUMMARY_NAME: Final = "summary.json"
"""The file, in the folder of a build, with the result of the build."""

_PLAN_NAME: Final = "plan.json"
_WRITE_NAME: Final = "write.json"
_BESIDE: Final = (SUMMARY_NAME, STATISTICS_NAME, FAILURES_FILE, _WRITE_NAME)
SAVED_FILES: Final = (f"{BUILD_FOLDER}/{_PLAN_NAME}", f"{BUILD_FOLDER}/{_WRITE_NAME}")
"""Paths of both plans in an output."""

_VERSION: Final = 2
_MOST_SHARDS: Final = 1 << 19  # that a plan names: a dataset_info.json has room for 180,000

_DAMAGED: Final = (
    *(storage.FileTooLargeError, ValueError, KeyError, TypeError, AttributeError),
    *(DatasetError, UsageError),
)
"""What a file raises that is no plan of this version."""


@dataclass(frozen=True)
class SavedPlan:
    """The plan of a build, in its output. It contains what would make the job graph large.

    Attributes:
        info: the dataset that it makes, without its shards; `versions` are those that make records.
        layouts: how this build, and the unfinished ones that it continues, divide the rows into shards.
        roots: folders of their part files: absolute, or BUILD_FOLDER for the one in the output.
        identity: `BuildPlan.identity`.
        from_images: whether every record is made from its image, and none is taken from a published dataset.
        published: names of the shards, and of the list of failures, of the dataset that the output holds,
            which are not modified.
    """

    info: DatasetInfo
    layouts: tuple[Layout, ...]
    roots: tuple[str, ...]
    identity: str
    from_images: bool
    published: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the configuration that makes the records."""
        return str(self.info.config["fingerprint"])

    def is_like(self, published: DatasetInfo) -> bool:
        """Whether a published dataset has the options and rows of this build."""
        return (self.info.config, self.info.manifest) == (published.config, published.manifest)

    def is_of(self, published: DatasetInfo) -> bool:
        """Whether a published dataset is the one that this build was to make."""
        wanted, found = (
            (i.revision, i.config, i.manifest, i.labels, i.shape, i.dtype) for i in (self.info, published)
        )
        return wanted == found

    def parts_roots(self, output: str) -> list[str]:
        """Folders in which there may be parts of it."""
        return [_folder(output, root) for root in self.roots]

    @property
    def written(self) -> set[str]:
        """Names of files that this build, and those that it continues, may have written or will replace."""
        compressed = self.info.config["compression"] == "gzip"
        return {*self.published} | {
            str(name)
            for layout in self.layouts
            for split in layout.split_sizes
            for name in layout.names(split, compressed=compressed, revision=self.info.revision)
        }

    def write(self, output: str) -> None:
        """Save it in an output."""
        facts = asdict(self) | {"info": load_json(self.info.to_json())}
        text = dump_json({"note_version": _VERSION, **facts})
        storage.write(storage.join(output, BUILD_FOLDER, _PLAN_NAME), text.encode(), output)

    @staticmethod
    def remove(output: str) -> None:
        """Remove it, and other files of builds that are beside it; files of other programs stay."""
        folder = storage.join(output, BUILD_FOLDER)
        for name in storage.list_files(folder):
            if name in _BESIDE or storage.temporary_of(name) in {*_BESIDE, _PLAN_NAME}:
                storage.delete(storage.join(folder, name), output)
        storage.delete(storage.join(folder, _PLAN_NAME), output)
        storage.delete_folder(folder, output)

    @classmethod
    def read(cls, output: str) -> SavedPlan | None:
        """The plan of an unfinished build, if there is one.

        Raises:
            OutputError: it is damaged, or of another version of this package, or names a folder in which no
                build of this output keeps its parts.
        """
        path = storage.join(output, BUILD_FOLDER, _PLAN_NAME)
        try:
            saved = cls._parse(
                load_json(storage.read_bounded(path, MAX_INFO_BYTES, output), is_modest=True), path
            )
            foreign = [root for root in saved.roots if not _is_own(output, root)]
        except FileNotFoundError:
            return None
        except _DAMAGED as e:
            # A loss of power can leave an empty one.
            raise OutputError(
                f"{path}: the plan of an unfinished build is damaged, or was written by another version of "
                "beam-nifti; continue with that version, choose another OUTPUT, or use --overwrite to "
                "discard the unfinished build"
            ) from e
        if foreign:  # what is in there is removed when the build ends
            raise OutputError(
                f"{path}: names the folder {foreign[0]!r} for temporary files, which belongs to no build of "
                f"{output}; move OUTPUT back if it was moved, choose another OUTPUT, or use --overwrite "
                "to discard what is unfinished"
            )
        return saved

    @classmethod
    def _parse(cls, facts: dict[str, Any], path: str) -> SavedPlan:
        if facts.pop("note_version") != _VERSION:
            raise ValueError("of another version")
        kinds = {**hints_of(cls), "info": dict}
        require_keys(facts, kinds, kinds, "")
        layouts = [_layout_of(layout) for layout in facts["layouts"]]
        if sum(map(_num_shards, layouts)) + len(facts["published"]) > _MOST_SHARDS:
            raise ValueError("names too many shards")
        for name in facts["published"]:
            if not (ShardName.parse(name) or revision_of_failures(name)):
                raise ValueError(f"published has {name!r}, which no build publishes")
        info = DatasetInfo.from_json(dump_json(facts["info"]), path, is_complete=False)
        tuples = {name: tuple(facts[name]) for name in ("roots", "published")}
        return cls(**facts | tuples | {"info": info, "layouts": tuple(layouts)})


@dataclass(frozen=True)
class SavedWrite:
    """The plan of a `WriteToTFRecord` or a conversion, in its output.

    Attributes:
        token: 16 hex digits that identify the pipeline.
        root: folder of its part files: absolute, or BUILD_FOLDER for the one in the output.
        revision: revision of the dataset that it makes.
        published: names of the shards, and of the list of failures, of the dataset that it replaces.
        shards: names of the shards, and of the list of failures, that it may have written; empty before they
            are planned.
    """

    token: str
    root: str
    revision: int
    published: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()

    def parts_roots(self, output: str) -> list[str]:
        """As for `SavedPlan`."""
        return [_folder(output, self.root)]

    @property
    def written(self) -> set[str]:
        """As for `SavedPlan`."""
        return {*self.published, *self.shards}

    def write(self, output: str) -> None:
        """Save it in an output."""
        path = storage.join(output, BUILD_FOLDER, _WRITE_NAME)
        storage.write(path, dump_json(asdict(self)).encode(), output)

    @classmethod
    def read(cls, output: str) -> SavedWrite | None:
        """The plan of a running or dead pipeline; None if there is none, or it is damaged.

        Raises:
            OutputError: a symbolic link is in its place, or above it.
        """
        try:
            path = storage.join(output, BUILD_FOLDER, _WRITE_NAME)
            facts = load_json(storage.read_bounded(path, MAX_INFO_BYTES, output), is_modest=True)
            require_keys(facts, hints_of(cls), hints_of(cls), "")
        except (FileNotFoundError, storage.FileTooLargeError, ValueError):
            return None
        saved = cls(**facts | {name: tuple(facts[name]) for name in ("published", "shards")})
        if len(saved.written) > _MOST_SHARDS:
            return None
        # Otherwise files of others would be removed.
        are_own = all(ShardName.parse(n) or revision_of_failures(n) for n in saved.written)
        is_known = 1 <= saved.revision <= LAST_REVISION and _is_own(output, saved.root)
        return saved if are_own and is_known else None


def _folder(output: str, root: str) -> str:
    return storage.join(output, root) if root == BUILD_FOLDER else root


def _is_own(output: str, root: str) -> bool:
    return root in (BUILD_FOLDER, parts_root(output, storage.dirname(root)))


def _layout_of(facts: Mapping[str, Any]) -> Layout:
    layout = Layout(facts["split_sizes"], Sharding(**facts["sharding"]), facts["num_frames"])
    for name in layout.split_sizes:
        if not SPLIT_PATTERN.fullmatch(name):
            raise ValueError(f"a layout has a split {name!r}")
    sizes = layout.split_sizes.values()
    counts = [count for count in asdict(layout.sharding).values() if count is not None]
    are_whole = all(type(n) is int for n in (*sizes, *counts, layout.num_frames))
    if not are_whole or layout.num_frames < 1 or min(sizes, default=0) < 0:
        raise ValueError(f"a layout is {layout}")
    return layout


def _num_shards(layout: Layout) -> int:
    """How many shards a layout has, counted without making them."""
    sizes, per_shard = layout.split_sizes.values(), layout.sharding.examples_per_shard
    if per_shard is None:
        return sum(min(size, layout.sharding.num_shards or 0) for size in sizes)
    return sum(-(-size // max(1, per_shard // layout.num_frames)) for size in sizes)


def require_current(output: str, identity: str) -> SavedPlan:
    """The plan in an output, which must be that of the build with this identity.

    Raises:
        OutputBusyError: another build has taken the output. A cluster's job can outlive its launcher, and
            with it the launcher's lock.
    """
    saved = SavedPlan.read(output)
    if saved is None or saved.identity != identity:
        what = "the build here has ended" if saved is None else "another build has started here"
        raise OutputBusyError(
            f"{output}: {what}, so this one stops. Before the next build, cancel any jobs that a stopped "
            "command left running"
        )
    return saved
