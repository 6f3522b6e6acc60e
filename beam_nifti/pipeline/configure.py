"""Make a configuration from the options of a call, a file and a dataset; and options from a configuration."""

from __future__ import annotations

import hashlib
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, fields
from typing import Any, Final

from beam_nifti.config import (
    EXCLUSIVE,
    RESAMPLING_DETAILS,
    BuildConfig,
    Columns,
    RecordConfig,
    ReferenceGrid,
    Sharding,
    Splitting,
)
from beam_nifti.errors import UsageError
from beam_nifti.pipeline.options import FLAG, OPTIONS, flag_of, read_option, read_options
from beam_nifti.pipeline.statistics_file import read_statistics
from beam_nifti.record.dataset_info import read_info
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.calls import split_call
from beam_nifti.support.outcomes import may_pass
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted
from beam_nifti.volume.user_function import source_sha256

DERIVED: Final = frozenset({"fingerprint", "channels", "masks", "has_target"})
"""Fields of a configuration that follow from others."""

NOT_GIVEN: Final = "not given"

_OF_COHORT: Final = "cohort:zscore"
_ONLY_WRITTEN: Final = (
    *("clip", "rescale_stats", "compression", "compression_level", "examples_per_shard", "num_shards"),
    *("shuffle_seed", "overwrite", "recheck"),
)
"""Options that do not change what is measured."""

_MOST_FILE_BYTES: Final = 1 << 16
_MOST_DOTS: Final = 100
"""Limits of a file of options: its bytes, and the dots in a line. The time in which Python parses a key grows
with the square of the number of its dots, and a key ends with its line."""

_INSTEAD: Final = (
    *(("examples_per_shard", "num_shards"), ("num_shards", "examples_per_shard")),
    *((one, other) for pair in EXCLUSIVE for one, other in (pair, pair[::-1]) if "orientation" not in pair),
)
_NEEDS: Final[Sequence[tuple[str, Set[str]]]] = (
    ("mask_dtype", {"mask_column"}),
    ("mask_interpolation", {"mask_column"}),
    ("map_labels", {"mask_column"}),
    ("missing_mask", {"mask_column"}),
    ("max_frames", {"frames"}),
    ("align", {"mask_column", "path_column", "target_column"}),
    ("split_seed", {"split"}),
    ("stratify", {"split"}),
    *((name, set(needed)) for name, needed in RESAMPLING_DETAILS.items()),
)
"""Options that require another one, or one of several."""


def make_config(
    manifest: str,
    output: str,
    given: Mapping[str, object],
    *,
    config: str | None = None,
    like: str | None = None,
    is_analysis: bool = False,
) -> BuildConfig:
    """Combine options into a configuration. Given options precede those of a file, then those of a dataset.

    Args:
        manifest: path or URL of the table of images.
        output: folder or URL of the dataset; "" for none.
        given: values by the names of `BuildOptions`; None means that an option is not given.
        config: path or URL of a TOML file of options by the same names, with - or _. It may contain `like`.
        like: folder or URL of a dataset whose content options are used. A user's function and the key of
            anonymous ids are never taken from it and must be given. A function of the same name and the key
            are compared with the dataset's; a function of another name replaces it, with a warning.
        is_analysis: whether to ignore options that only concern how records are written.

    Raises:
        UsageError: an option is unknown or invalid, or options cannot be combined; the file of options
            cannot be read; the dataset's function or key is not given again, or its file or the key differs.
        DatasetError: `like` is not a complete dataset.
        OSError: the file, the dataset or a key cannot be read, but another attempt may succeed.
    """
    options = read_options(given)
    own = set(options)
    if config is not None:
        in_file = _read_file(config)
        like = in_file.pop("like", None) if like is None else like
        options = _beneath(options, in_file)
    if like is not None:
        options = _beneath(options, _options_like(like, options))
    if "without" in own and config is None and like is None:
        raise UsageError("--without ignores options of --like or --config; give one of these, or drop it")
    if is_analysis:
        options = _measured_only(options)
    try:
        return _assemble(manifest, output, options)
    except UsageError as e:
        inherited = set(map(flag_of, options.keys() - own))
        flags = (f"--{name}" for name in re.findall(FLAG, str(e)))
        flag = next((flag for flag in flags if flag in inherited), None)
        if flag is None:
            raise
        raise UsageError(
            f"{e} ({flag} comes from --like or --config; --without {flag[2:]} ignores it)"
        ) from e


def make_analysis_config(
    manifest: str, given: Mapping[str, object], *, config: str | None = None, like: str | None = None
) -> BuildConfig:
    """As `make_config`, for an analysis, whose `rescale` is of the cohort.

    Options of a file or a dataset that only concern how records are written are ignored.

    Raises:
        UsageError: as `make_config`; or such an option is given.
    """
    own = read_options(given)
    rescale = own.get("rescale", _OF_COHORT)
    if not rescale.startswith("cohort:"):
        raise UsageError(
            f"--rescale is {rescale}, which needs no statistics of the cohort; use cohort:zscore or "
            "cohort:percentile:LO,HI, or drop it"
        )
    if unused := [name for name in _ONLY_WRITTEN if own.get(name)]:
        raise UsageError(f"{flag_of(unused[0])} has no effect on an analysis; drop it")
    return make_config(manifest, "", given, config=config, like=like, is_analysis=True)


def _measured_only(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a build that concern what is measured."""
    kept = {name: value for name, value in options.items() if name not in _ONLY_WRITTEN}
    if kept.get("voxel_dtype") != "native":  # which requires images of one dtype
        kept.pop("voxel_dtype", None)
    if not kept.get("rescale", "").startswith("cohort:"):
        kept["rescale"] = _OF_COHORT
    return kept


def make_record_config(given: Mapping[str, object]) -> RecordConfig:
    """As `make_config`, for a step that has only some of the options. Several paths are channels.

    Raises:
        UsageError: an option is unknown or invalid, or options cannot be combined.
    """
    return _record_of(read_options(given))


def _record_of(options: Mapping[str, Any]) -> RecordConfig:
    record = _chosen(options, RecordConfig)
    if isinstance(path := record.get("rescale_stats"), str):
        record["rescale_stats"] = read_statistics(path)
    if record.get("orientation") == "native":
        del record["orientation"]
    columns = Columns(options.get("path_column", "path"), mask=options.get("mask_column"))
    channels, masks = (names if len(names) > 1 else None for names in (columns.paths, columns.masks))
    return RecordConfig(**record, channels=channels, masks=masks)


def _beneath(options: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with those of a lower precedence that are neither given again nor in conflict."""
    left_out = set(options.get("without", ()))
    for name, other in _INSTEAD:
        left_out |= {other} if name in options else set()
    if options.get("compression") == "none":
        left_out.add("compression_level")
    remaining = (options.keys() | lower.keys()) - left_out
    left_out |= {name for name, needed in _NEEDS if needed & left_out and not needed & remaining}
    kept = {name: value for name, value in lower.items() if name not in left_out}
    without = (*options.get("without", ()), *lower.get("without", ()))
    return {**kept, **options, "without": without}


def _read_file(path: str) -> dict[str, Any]:
    """The options of a TOML file."""
    try:
        text = storage.read_bounded(storage.absolute(path), _MOST_FILE_BYTES).decode()
        if max(line.count(".") for line in text.split("\n")) > _MOST_DOTS:
            raise ValueError(f"a line has more than {_MOST_DOTS} dots")
        found = tomllib.loads(text)
    except OSError as e:
        if may_pass(e):
            raise
        reason = f"cannot be read: {e.strerror or e}"
        raise UsageError(f"--config is {path}, which {reason}; give a TOML file of options") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"--config is {path}, which is not valid TOML: {e}; correct it") from e
    options = dict[str, Any]()
    for key, value in found.items():
        name = key.replace("-", "_")
        try:
            if name in options:
                raise UsageError(f"{name} is given twice; give it once")
            options[name] = storage.path_text("--like", value) if name == "like" else read_option(name, value)
        except UsageError as e:
            raise UsageError(f"{path}: {e}") from e
    return options


def _options_like(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The content options of a dataset; its function and its key are compared with those that are given."""
    info = read_info(storage.absolute(path))
    without = options.get("without", ())
    if "preprocess" in options:
        _compare_functions(path, info.record_config, RecordConfig(preprocess=options["preprocess"]))
    elif info.record_config.steps and "preprocess" not in without:
        flags = " ".join(f"--preprocess {shlex.quote(step)}" for step, _ in info.record_config.steps)
        raise UsageError(
            f"--like is {path}, which was built with {flags}; a function is never taken from a dataset: give "
            "it again, or drop it with --without preprocess"
        )
    if "anonymous_ids" not in without:
        _compare_key(path, info.manifest.get("key_check"), options.get("anonymous_ids"))
    found = content_options(info.config)
    if "rescale_stats" in found:
        found["rescale_stats"] = info.record_config.rescale_stats
    if found["compression"] == "none":
        del found["compression_level"]
    return {n: read_option(n, value) for n, value in found.items() if n in OPTIONS and n != "preprocess"}


def content_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataset that were given, by name, and what the build has set besides.

    Args:
        config: `config` of its dataset_info.json. Options that did not exist when it was built have their
            defaults.
    """
    given = {**asdict(RecordConfig()), **config}
    columns = {**asdict(Columns()), **given.pop("columns")}
    splitting, sharding = given.pop("splitting", None) or {}, given.pop("sharding") or {}
    given |= {f"{name}_column": columns[name] for name in ("path", "label", "id", "mask", "target")}
    given |= {name: columns[name] for name in ("missing_label", "missing_mask")}
    given |= {"split": splitting.get("shares")}
    given |= {"split_seed": splitting.get("seed"), "stratify": splitting.get("stratify"), **sharding}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def value_text(value: Any) -> str:
    """The value of an option that was given, as the command line has it; of statistics, their numbers."""
    if value is True:
        return "given"
    if isinstance(value, Mapping) and "num_volumes" in value:
        of_channels = (f"mean {c['mean']:.6g}, std {c['std']:.6g}" for c in value["channels"])
        digest = hashlib.sha256(dump_json(value, sort_keys=True).encode()).hexdigest()[:8]
        return f"{digest}: {counted(value['num_volumes'], 'volume')}, {'; '.join(of_channels)}"
    if isinstance(value, Mapping) and value.keys() == ReferenceGrid.__dataclass_fields__.keys():
        affine = ",".join(map(value_text, value["affine"]))
        return f"{ReferenceGrid(**value)} with the affine {affine}"
    if isinstance(value, Mapping):  # shares of splits, whose order makes no difference
        return ",".join(f"{name}={value_text(each)}" for name, each in sorted(value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(value_text, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _compare_functions(path: str, record: RecordConfig, given: RecordConfig) -> None:
    """Refuse functions of a dataset that are given again and whose files have changed; warn of others."""
    digests = {split_call(step)[0]: digest for step, digest in record.steps}
    for step, _ in given.steps:
        wanted = digests.get(split_call(step)[0])
        if wanted is not None and (found := source_sha256(step)) != wanted:
            raise UsageError(
                f"--preprocess {step}: its file has sha256 {found}, but {path}, which --like names, was "
                f"built with sha256 {wanted}; restore that version of the file, or drop --like"
            )
    before, after = ([step for step, _ in each.steps] for each in (record, given))
    if before and after and before != after:
        logs.LOGGER.warning("%s replaces %s of %s", " ".join(after), " ".join(before), path)


def _compare_key(path: str, check: str | None, given: str | None) -> None:
    """Require the key of a dataset's pseudonyms, and no other."""
    if check is None:
        return
    if given is None:
        raise UsageError(
            f"--like is {path}, whose ids are anonymous; the dataset does not contain its key: give it with "
            "--anonymous-ids, or keep the names with --without anonymous-ids"
        )
    from beam_nifti.manifest.pseudonyms import read_pseudonyms  # which loads pyarrow

    if read_pseudonyms(storage.absolute(given)).check != check:
        raise UsageError(f"--anonymous-ids is {given}, not the key that {path} was built with; give that key")


def _assemble(manifest: str, output: str, options: dict[str, Any]) -> BuildConfig:
    if "compression_level" in options and options.get("compression") == "none":
        raise UsageError("--compression-level has no effect with --compression none; drop one of them")
    sizes = _chosen(options, Sharding)
    columns = {f.name: options[f"{f.name}_column"] for f in fields(Columns) if f"{f.name}_column" in options}
    return BuildConfig(
        manifest=manifest,
        output=output,
        record=_record_of(options),
        columns=Columns(**columns, **_chosen(options, Columns)),
        sharding=Sharding(**sizes) if sizes else None,
        splitting=_splitting(options),
        **_chosen(options, BuildConfig),
    )


def _chosen(options: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """The options that are fields of a configuration under their own names."""
    return {f.name: options[f.name] for f in fields(kind) if f.name in options}


def _splitting(options: Mapping[str, Any]) -> Splitting | None:
    if "split" in options:
        return Splitting(options["split"], options.get("split_seed", 0), options.get("stratify"))
    for name in ("stratify", "split_seed"):
        if name in options:
            raise UsageError(f"{flag_of(name)} requires --split, such as --split train=0.8,test=0.2")
    return None
