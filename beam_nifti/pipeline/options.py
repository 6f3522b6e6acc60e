"""The options of a build, by the names that the command line, Python and TOML files share."""

from __future__ import annotations

import contextlib
import difflib
import math
import operator
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Final, NoReturn, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

from beam_nifti.config import (
    COMPLEX_PARTS,
    COMPRESSIONS,
    FRAMES,
    MASK_DTYPES,
    MISSING_LABELS,
    ORIENTATIONS,
    RESCALE_METHODS,
    SELECTIONS,
    VOXEL_DTYPES,
    BuildConfig,
    Columns,
    Percentile,
    RecordConfig,
    Sharding,
    Splitting,
    Window,
    spell_steps,
)
from beam_nifti.errors import BeamNiftiError, UsageError
from beam_nifti.record.dataset_info import read_info
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.calls import split_call
from beam_nifti.support.cells import as_float, parse_integer, parse_number
from beam_nifti.support.outcomes import may_pass
from beam_nifti.support.wording import one_line
from beam_nifti.volume.user_function import call_of, name_of, source_sha256

Names: TypeAlias = str | Sequence[str]
"""One column, or several: a list of names, or a text with commas between the names."""

Numbers: TypeAlias = str | Sequence[SupportsFloat]
StrPath: TypeAlias = str | os.PathLike[str]
Preprocess: TypeAlias = str | Callable[..., Any] | Mapping[str, Any]
"""A function that can be imported; a `functools.partial` of one with named arguments; a text such as
`package.module:function(threshold=3)`; or {"function": "package.module:function", "threshold": 3}."""

Rule: TypeAlias = str | tuple[str | SupportsFloat, ...]
"""A text such as "above:100", or its parts: ("above", 100)."""


DERIVED: Final = frozenset({"fingerprint", "channels"})
"""Fields of a configuration that follow from others."""

NOT_GIVEN: Final = "not given"


class BuildOptions(TypedDict, total=False):
    """The options of `build` and `check`. None means that an option is not given.

    Each accepts the text of the command line or a Python value. Numbers may be numpy's.

    Attributes:
        path_column: column of image paths; several columns are the channels of one record. Default: "path".
        mask_column: column of paths of label maps on the same voxel grid. Default: no masks.
        label_column: NAME, or NAME:KIND with the kind float, class or string; each of several becomes a
            feature of its own. Default: the column "label", if there is one.
        missing_label: rows without a label: "nan" stores NaN, "skip" skips them. Default: an error.
        id_column: column of unique example ids. Default: participant_id with session_id, else the path.
        anonymous_ids: file of the key that replaces ids and paths by pseudonyms. Default: names are kept.
        split: share of the participants by split, such as {"train": 0.8, "test": 0.2}. Default: the
            manifest's column "split", otherwise all rows go to "train".
        stratify: column whose values each keep the shares of `split`. Default: none.
        split_seed: seed of the draw. Default: 0.
        examples_per_shard: largest number of examples in a shard. Default: for shards of 128 to 256 MB.
        num_shards: number of shards in each split, instead of `examples_per_shard`.
        compression: "gzip" (default) or "none".
        compression_level: level of igzip, 0 (fastest) to 3. Default: 2.
        shuffle_seed: seed that shuffles the rows of each split. Default: the manifest's order.
        rescale: "minmax" (default), "zscore", "none"; `Percentile`, `Window`, ("percentile", low, high),
            ("window", low, high) or their text. A window is in the image's units.
        rescale_within: voxels that `rescale` measures: "nonzero", "mask", or ("above", T) with T in the
            image's units. Default: all.
        clip: whether rescaled voxels outside [0, 1] become 0 or 1. Default: False.
        mask_dtype: "uint8" (default) or "uint16".
        voxel_dtype: "float32" (default), "float16", "bfloat16", "uint8", "native".
        frames: frames of 4-D images: "all", "each", "first", "mean", or a number from 0. Default: 4-D images
            are refused.
        complex: how complex images are stored: "magnitude", "phase" (radians), "real-imag". Default: complex
            images are refused.
        allow_mixed_shapes: whether volumes may differ in shape from the first. Default: False.
        preprocess: function from Volume to Volume that the workers can import; or several, in order.
            Default: none.
        orientation: code of the orientation that axes are reordered and flipped to, such as "RAS". Default:
            "native", which changes nothing.
        spacing: voxel size in mm that volumes are resampled to: (x, y, z), or one number for all three.
            Default: no resampling.
        crop_foreground: voxels whose bounding box is kept, as for `rescale_within`. Default: no cropping.
        shape: (x, y, z) in voxels that volumes are cropped and padded to. Default: unchanged.
        max_bad_fraction: fraction of volumes that may fail, 0 to 1. Default: 0.
        overwrite: whether to replace a dataset with different options or rows. Default: False.
        recheck: whether to rebuild every record, and replace the shards that differ. Default: False.
        workers: threads; on a cluster, the number of workers to divide the work for. Default: all cores.
        temp_location: folder or URL of temporary files. Default: in the output.
        without: options of `like` and `config` to ignore. Default: none.
    """

    path_column: Names | None
    mask_column: str | None
    label_column: Names | None
    missing_label: str | None
    id_column: str | None
    anonymous_ids: StrPath | None
    split: str | Mapping[str, SupportsFloat] | None
    stratify: str | None
    split_seed: str | SupportsIndex | None
    examples_per_shard: str | SupportsIndex | None
    num_shards: str | SupportsIndex | None
    compression: str | None
    compression_level: str | SupportsIndex | None
    shuffle_seed: str | SupportsIndex | None
    rescale: Rule | Percentile | Window | None
    rescale_within: Rule | None
    clip: bool | None
    mask_dtype: str | None
    voxel_dtype: str | None
    frames: str | SupportsIndex | None
    complex: str | None
    allow_mixed_shapes: bool | None
    preprocess: Preprocess | Sequence[Preprocess] | None
    orientation: str | None
    spacing: Numbers | SupportsFloat | None
    crop_foreground: Rule | None
    shape: str | Sequence[SupportsIndex] | None
    max_bad_fraction: str | SupportsFloat | None
    overwrite: bool | None
    recheck: bool | None
    workers: str | SupportsIndex | None
    temp_location: StrPath | None
    without: Names | None


@dataclass(frozen=True)
class Option:
    """An option of `BuildOptions`.

    Attributes:
        read: checks a value, given the flag and the value, and makes it one of a configuration.
        choices: its values, or forms of them such as "window:LO,HI"; empty if there are other values.
        metavar: stands for a value in the help of the command line; "" shows the choices.
    """

    read: Callable[[str, Any], Any]
    choices: tuple[str, ...] = ()
    metavar: str = ""


def flag_of(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def make_config(
    manifest: str,
    output: str,
    given: Mapping[str, object],
    *,
    config: str | None = None,
    like: str | None = None,
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

    Raises:
        UsageError: an option is unknown or invalid, or options cannot be combined; the file of options
            cannot be read; the dataset's function or key is not given again, or its file or the key differs.
        DatasetError: `like` is not a complete dataset.
        OSError: the file, the dataset or a key cannot be read, but another attempt may succeed.
    """
    options = _read_all(given)
    own = set(options)
    if config is not None:
        in_file = _read_file(config)
        like = in_file.pop("like", None) if like is None else like
        options = _beneath(options, in_file)
    if like is not None:
        options = _beneath(options, _options_like(like, options))
    if "without" in own and config is None and like is None:
        raise UsageError("--without ignores options of --like or --config; give one of these, or drop it")
    try:
        return _assemble(manifest, output, options)
    except UsageError as e:
        inherited = set(map(flag_of, options.keys() - own))
        flags = (f"--{match[1]}" for match in _FLAG.finditer(str(e)))
        flag = next((flag for flag in flags if flag in inherited), None)
        if flag is None:
            raise
        raise UsageError(
            f"{e} ({flag} comes from --like or --config; --without {flag[2:]} ignores it)"
        ) from e


def make_record_config(given: Mapping[str, object]) -> RecordConfig:
    """As `make_config`, for a step that has only some of the options. Several paths are channels.

    Raises:
        UsageError: an option is unknown or invalid, or options cannot be combined.
    """
    return _record_of(_read_all(given))


def _record_of(options: Mapping[str, Any]) -> RecordConfig:
    record = _chosen(options, RecordConfig)
    if record.get("orientation") == "native":
        del record["orientation"]
    paths = Columns(options.get("path_column", "path")).paths
    return RecordConfig(**record, channels=paths if len(paths) > 1 else None)


def _beneath(options: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with those of a lower precedence that are neither given again nor in conflict."""
    left_out = set(options.get("without", ()))
    for name, other in _INSTEAD:
        left_out |= {other} if name in options else set()
    if options.get("compression") == "none":
        left_out.add("compression_level")
    left_out |= {name for name, needed in _NEEDS.items() if needed in left_out}
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
            options[name] = storage.path_text("--like", value) if name == "like" else _read(name, value)
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
    if found["compression"] == "none":
        del found["compression_level"]
    return {n: _read(n, value) for n, value in found.items() if n in OPTIONS and n != "preprocess"}


def content_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataset that were given, by name, and what the build has set besides.

    Args:
        config: `config` of its dataset_info.json. Options that did not exist when it was built have their
            defaults.
    """
    given = {**asdict(RecordConfig()), **config}
    columns = {**asdict(Columns()), **given.pop("columns")}
    splitting, sharding = given.pop("splitting", None) or {}, given.pop("sharding") or {}
    given |= {f"{name}_column": columns[name] for name in ("path", "label", "id", "mask")}
    given |= {"missing_label": columns["missing_label"], "split": splitting.get("shares")}
    given |= {"split_seed": splitting.get("seed"), "stratify": splitting.get("stratify"), **sharding}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def value_text(value: Any) -> str:
    """The value of an option that was given, as the command line has it."""
    if value is True:
        return "given"
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


def as_parameters(text: str, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """An error's text for a call in Python: parameters, which may have other names, replace flags.

    >>> as_parameters("--clip cannot be used with --rescale minmax; drop it")
    'clip=True cannot be used with rescale="minmax"; drop it'
    >>> as_parameters("--clip is 5; give True or False")
    'clip is 5; give True or False'
    >>> as_parameters("--spacing is (1, 2); give three sizes in mm, such as 1,1,1.5")
    'spacing is (1, 2); give three sizes in mm, such as (1, 1, 1.5)'
    """

    def parameter(found: re.Match[str]) -> str:
        name, word = found[1].replace("-", "_"), found[2]
        value = _literal(name, word) if word else None
        shown = names.get(name, name) if name in OPTIONS else f"--{found[1]}"
        if value is not None:
            return f"{shown}={value}"
        is_on = name in OPTIONS and OPTIONS[name].read is read_switch and word != "is"
        return f"{shown}{'=True' if is_on else ''}{f' {word}' if word else ''}"

    text = _FLAG.sub(parameter, _CALLS.sub(_assignment_of_calls, text))
    for form, parts in _FORMS.items():
        text = text.replace(form, parts)
    return _EXAMPLE.sub(_value_of_example, text)


def _literal(name: str, word: str) -> str | None:
    """The word after a flag as Python writes it; None if it is no value of the option."""
    if _NUMBERS.fullmatch(word):
        return f"({word.replace(',', ', ')})" if "," in word else word
    named = word.replace("-", "_").split(",")
    if name == "without" and set(named) <= OPTIONS.keys():
        return f'"{",".join(named)}"'
    heads = {choice.partition(":")[0] for choice in OPTIONS[name].choices} if name in OPTIONS else ()
    is_value = word.partition(":")[0] in heads or (name == "split" and "=" in word)
    return f'"{word}"' if is_value else None


def _value_of_example(found: re.Match[str]) -> str:
    cells = found[0].split(",")
    if all(map(_NUMBERS.fullmatch, cells)):
        return f"({', '.join(cells)})"
    if all("=" in cell for cell in cells):
        return (
            f"{{{', '.join(f'{name!r}: {share}' for name, _, share in (c.partition('=') for c in cells))}}}"
        )
    return str(cells)


def _assignment_of_calls(found: re.Match[str]) -> str:
    calls = [word for word in shlex.split(found[0]) if word != "--preprocess"]
    return f"--preprocess={calls if calls[1:] else repr(calls[0])}"


@contextlib.contextmanager
def naming_parameters(**names: str) -> Iterator[None]:
    """Have errors of a block name parameters instead of flags and of OUTPUT, by `as_parameters`."""
    try:
        yield
    except BeamNiftiError as e:
        e.reword(lambda text: _OUTPUT.sub("output", as_parameters(text, names)))
        raise


_MOST_FILE_BYTES: Final = 1 << 16
_MOST_DOTS: Final = 100
"""Limits of a file of options: its bytes, and the dots in a line. The time in which Python parses a key grows
with the square of the number of its dots, and a key ends with its line."""

_INSTEAD: Final = (("examples_per_shard", "num_shards"), ("num_shards", "examples_per_shard"))
_NEEDS: Final = {"mask_dtype": "mask_column", "split_seed": "split", "stratify": "split"}
"""Options that require another one."""


def _read_all(given: Mapping[str, object]) -> dict[str, Any]:
    return {name: _read(name, value) for name, value in given.items() if value is not None}


def _read(name: str, value: object) -> Any:
    if name not in OPTIONS:
        raise UsageError(f"unknown option {name!r}; {_hint(name)}")
    return OPTIONS[name].read(flag_of(name), value)


def _hint(name: str, spell: Callable[[str], str] = str) -> str:
    """Which options an unknown one may stand for."""
    close = difflib.get_close_matches(name, OPTIONS, n=3)
    if close:
        return f"did you mean {' or '.join(map(spell, close))}?"
    return f"choose one of: {', '.join(map(spell, OPTIONS))}"


def _refuse(flag: str, value: object, wanted: str) -> NoReturn:
    raise UsageError(f"{flag} is {one_line(repr(value))}; {wanted}")


def _read_text(flag: str, value: object, wanted: str = "give a text") -> str:
    if not isinstance(value, str):
        _refuse(flag, value, wanted)
    if not value.strip():
        raise UsageError(f"{flag} is empty; {wanted}, or drop it")
    return str(value)


def _one_of(choices: tuple[str, ...]) -> Option:
    wanted = f"choose one of: {', '.join(choices)}"
    return Option(lambda flag, value: _read_text(flag, value, wanted), choices)


def _read_names(flag: str, value: object) -> str:
    wanted = "give the name of a column, or a list of them"
    if isinstance(value, str):
        return _read_text(flag, value, wanted)
    names = _items(value)
    if not names or not all(isinstance(name, str) and name.strip() and "," not in name for name in names):
        _refuse(flag, value, wanted)
    return ",".join(map(str, names))


def _read_without(flag: str, value: object) -> tuple[str, ...]:
    names = [name.strip().replace("-", "_") for name in _read_names(flag, value).split(",")]
    for name in names:
        if name not in OPTIONS:
            hint = _hint(name, lambda each: each.replace("_", "-"))
            raise UsageError(f"{flag} has {name.replace('_', '-')!r}, which is not an option; {hint}")
    return tuple(names)


def read_switch(flag: str, value: object) -> bool:
    """The value of an option that is on or off: a bool, or numpy's. A UsageError names the flag."""
    is_numpys = getattr(value, "dtype", None) == "bool" and getattr(value, "ndim", None) == 0
    if not (isinstance(value, bool) or is_numpys):
        _refuse(flag, value, "give True or False")
    return bool(value)


def read_integer(flag: str, value: object, wanted: str = "give a whole number") -> int:
    """The value of an option that is an integer, as text or as a number of Python or numpy.

    Raises:
        UsageError: it is something else; the text `wanted` follows the flag and the value.
    """
    try:
        return _integer(value)
    except ValueError:
        _refuse(flag, value, wanted)


def read_number(flag: str, value: object) -> float:
    """As `read_integer`, of an option that is a number."""
    try:
        return _number(value)
    except ValueError:
        _refuse(flag, value, "give a number")


def _integer(value: object) -> int:
    if isinstance(value, str):
        return parse_integer(value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError
    return operator.index(value)


def _number(value: object) -> float:
    if isinstance(value, str):
        return parse_number(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError
    try:
        number = as_float(value)
    except OverflowError:
        raise ValueError from None
    if math.isnan(number):
        raise ValueError
    return number


def _items(value: object) -> list[Any] | None:
    """The items of a sequence or a one-dimensional array; None if the value is neither."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping | Set):
        return None
    return list(value) if getattr(value, "ndim", 1) == 1 else None


def _read_triple(flag: str, value: object, number: Callable[[object], Any], wanted: str) -> tuple[Any, ...]:
    items = value.split(",") if isinstance(value, str) else _items(value)
    try:
        if items is None or len(items) != 3:
            raise ValueError
        return tuple(map(number, items))
    except ValueError:
        _refuse(flag, value, wanted)


def _read_shape(flag: str, value: object) -> tuple[int, ...]:
    wanted = "give three whole numbers of voxels, x,y,z without channels, such as 160,192,160"
    return _read_triple(flag, value, _integer, wanted)


def _read_spacing(flag: str, value: object) -> tuple[float, ...]:
    is_one = isinstance(value, Real) and not isinstance(value, bool)
    wanted = "give three sizes in mm, such as 1,1,1.5"
    return _read_triple(flag, [value] * 3 if is_one else value, _number, wanted)


def _rule(forms: tuple[str, ...], metavar: str) -> Option:
    """An option whose values are such as "window:LO,HI", or a name and numbers."""

    def read(flag: str, value: object) -> str:
        wanted = f"choose one of: {', '.join(forms)}"
        if isinstance(value, str):
            return _read_text(flag, value, wanted)
        if isinstance(value, Percentile | Window):
            parts: Sequence[Any] = [type(value).__name__.lower(), value.low, value.high]
        else:
            parts = _items(value) or [None]
        name, *numbers = parts
        try:
            if not isinstance(name, str):
                raise ValueError
            cells = ",".join(repr(_number(number)) for number in numbers)
        except ValueError:
            _refuse(flag, value, wanted)
        return f"{name}:{cells}" if numbers else str(name)

    return Option(read, forms, metavar)


def _read_frames(flag: str, value: object) -> str:
    wanted = f"choose one of: {', '.join(FRAMES)} (from 0)"
    return str(value if isinstance(value, str) else read_integer(flag, value, wanted))


def _read_split(flag: str, value: object) -> dict[str, float]:
    parts: list[tuple[Any, ...]] = list(value.items()) if isinstance(value, Mapping) else []
    if isinstance(value, str):
        parts = [part.strip().partition("=")[::2] for part in value.split(",")]
    shares = dict[str, float]()
    try:
        if not parts:
            raise ValueError
        for name, share in parts:
            if not isinstance(name, str) or name in shares:
                raise ValueError
            shares[name] = _number(share)
    except ValueError:
        wanted = "give each split once, with its share, such as train=0.8,validation=0.1,test=0.1"
        _refuse(flag, value, wanted)
    return shares


def read_steps(value: Preprocess | Sequence[Preprocess] | None) -> str | tuple[str, ...] | None:
    """The functions of an option `preprocess`, as `RecordConfig.preprocess` has them.

    Raises:
        UsageError: an entry is no `Preprocess`, a function cannot be imported by its name, or an argument is
            not a literal.
    """
    several = None if isinstance(value, str | Mapping) or callable(value) else _items(value)
    return spell_steps([_read_step(step) for step in ([value] if several is None else several)])


def _read_step(step: Any) -> str:
    if not isinstance(step, Mapping):
        return step if isinstance(step, str) else name_of(step)
    arguments = dict(step)
    name = arguments.pop("function", None)
    if not isinstance(name, str):
        _refuse("--preprocess", step, 'give the name of a function under "function"')
    return call_of(name, arguments)


OPTIONS: Final[Mapping[str, Option]] = {
    "path_column": Option(_read_names, metavar="NAME"),
    "mask_column": Option(_read_text, metavar="NAME"),
    "label_column": Option(_read_names, metavar="NAME[:KIND],…"),
    "missing_label": _one_of(MISSING_LABELS),
    "id_column": Option(_read_text, metavar="NAME"),
    "anonymous_ids": Option(storage.path_text, metavar="KEYFILE"),
    "split": Option(_read_split, metavar="NAME=SHARE,…"),
    "stratify": Option(_read_text, metavar="COLUMN"),
    "split_seed": Option(read_integer, metavar="N"),
    "examples_per_shard": Option(read_integer, metavar="N"),
    "num_shards": Option(read_integer, metavar="N"),
    "compression": _one_of(COMPRESSIONS),
    "compression_level": Option(read_integer),
    "shuffle_seed": Option(read_integer, metavar="N"),
    "rescale": _rule(RESCALE_METHODS, "METHOD"),
    "rescale_within": _rule(SELECTIONS, "VOXELS"),
    "clip": Option(read_switch),
    "mask_dtype": _one_of(MASK_DTYPES),
    "voxel_dtype": _one_of(VOXEL_DTYPES),
    "frames": Option(_read_frames, FRAMES, metavar="|".join(FRAMES)),
    "complex": _one_of(COMPLEX_PARTS),
    "allow_mixed_shapes": Option(read_switch),
    "preprocess": Option(lambda _, value: read_steps(value), metavar="MODULE:FUNCTION"),
    "orientation": Option(_read_text, ("native", *ORIENTATIONS), metavar="CODE"),
    "spacing": Option(_read_spacing, metavar="X,Y,Z"),
    "crop_foreground": _rule(SELECTIONS, "RULE"),
    "shape": Option(_read_shape, metavar="X,Y,Z"),
    "max_bad_fraction": Option(read_number, metavar="F"),
    "overwrite": Option(read_switch),
    "recheck": Option(read_switch),
    "workers": Option(read_integer),
    "temp_location": Option(storage.path_text, metavar="PATH"),
    "without": Option(_read_without, metavar="NAME,…"),
}
"""The options of `BuildOptions`: flags, keys of TOML files and parameters in Python."""

_FLAG: Final = re.compile(r"(?<![a-z-])--([a-z-]*[a-z])(?: ([^\s;(-][^\s;]*(?<![.,:)])))?")
"""A flag, and the word after it."""

_FORMS: Final = {
    form: f'("{form.partition(":")[0]}", {form.partition(":")[2].replace(",", ", ")})'
    for form in (*RESCALE_METHODS, *SELECTIONS)
    if ":" in form
}
"""Forms of values on the command line, such as "percentile:LO,HI", with the tuples that stand for them."""

_OUTPUT: Final = re.compile(r"(?<![^ ])OUTPUT(?![^ /,;:.)])")
"""The output of a build, in a sentence; not a part of a path."""

_EXAMPLE: Final = re.compile(r"(?<=such as )[\w.=]+(?:,[\w.=]+)+$")
"""A value of an option with several parts, at the end of an error."""

_NUMBERS: Final = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?){0,2}")
_CALL: Final = r"""--preprocess (?:(?:'[^']*'|"[^"]*")+|[\w.]+:\w+(?![\w(:]))"""  # as shlex.quote writes it
_CALLS: Final = re.compile(f"{_CALL}(?: {_CALL})*")
