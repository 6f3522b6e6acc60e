"""The options of a build, by the names that the command line, Python and TOML files share."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final, NoReturn, SupportsFloat, SupportsIndex, TypeAlias, TypedDict

from beam_nifti.config import (
    ALIGNMENTS,
    COMPLEX_PARTS,
    COMPRESSIONS,
    FRAMES,
    INTERPOLATIONS,
    MASK_DTYPES,
    MASK_INTERPOLATIONS,
    MISSING_LABELS,
    MISSING_MASKS,
    NONFINITE,
    ORIENTATIONS,
    RESCALE_METHODS,
    SELECTIONS,
    SEPARATE_Z,
    SPLIT_PATTERN,
    VOXEL_DTYPES,
    CohortStatistics,
    Percentile,
    ReferenceGrid,
    Window,
    fold_shares,
    spell_steps,
)
from beam_nifti.config.label_map import make_label_map, spell_label_map
from beam_nifti.errors import ManifestError, UsageError, VolumeError
from beam_nifti.pipeline.statistics_file import Analysis
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.cells import as_float, parse_integer, parse_number
from beam_nifti.support.wording import one_line
from beam_nifti.volume.user_function import call_of, name_of

Names: TypeAlias = str | Sequence[str]
"""One column, or several: a list of names, or a text with commas between the names."""

Numbers: TypeAlias = str | Sequence[SupportsFloat]
StrPath: TypeAlias = str | os.PathLike[str]
Preprocess: TypeAlias = str | Callable[..., Any] | Mapping[str, Any]
"""A function that can be imported; a `functools.partial` of one with named arguments; a text such as
`package.module:function(threshold=3)`; or {"function": "package.module:function", "threshold": 3}."""

Rule: TypeAlias = str | tuple[str | SupportsFloat, ...]
"""A text such as "above:100", or its parts: ("above", 100)."""


class BuildOptions(TypedDict, total=False):
    """The options of `build`, `check` and `analyze`. None means that an option is not given.

    Each accepts the text of the command line or a Python value. Numbers may be numpy's.

    Attributes:
        path_column: column of image paths; several columns are the channels of one record. Default: "path".
        mask_column: column of paths of label maps, on the voxel grid of the images unless `align` is given;
            several columns are the channels of one mask. Default: no masks.
        target_column: column of paths of images of real values to predict, on the voxel grid of the images
            unless `align` is given. They are prepared like the images, and stored as float32 without
            rescaling. Default: no targets.
        label_column: NAME, or NAME:KIND with the kind float, class or string; each of several becomes a
            feature of its own. Default: the column "label", if there is one.
        missing_label: rows without a label: "nan" stores NaN, "skip" skips them. Default: an error.
        missing_mask: rows that lack a mask: "empty" stores zeros, "skip" skips them. Default: an error.
        id_column: column of unique example ids. Default: participant_id with session_id, else the path.
        anonymous_ids: file of the key that replaces ids and paths by pseudonyms. Default: names are kept.
        split: share of the participants by split, such as {"train": 0.8, "test": 0.2}; or "kfold:5" for
            the splits fold0 to fold4 of equal shares, of which readers make a training set by their
            argument `fold`; or "kfold:5,test=0.2". Default: the manifest's column "split", otherwise all
            rows go to "train".
        stratify: column within each of whose values the shares of `split` apply. Default: none.
        split_seed: seed of the draw. Default: 0.
        examples_per_shard: largest number of examples in a shard. Default: for shards of about 200 MB.
        num_shards: number of shards in each split, instead of `examples_per_shard`.
        compression: "gzip" (default) or "none".
        compression_level: level of igzip, 0 (fastest) to 3. Default: 2.
        shuffle_seed: seed that shuffles the rows of each split. Default: the manifest's order.
        rescale: "minmax" (default), "zscore", "none"; `Percentile`, `Window`, ("percentile", low, high),
            ("window", low, high) or their text. A window is in the image's units. "cohort:zscore" and
            ("cohort:percentile", low, high) use the voxels of all volumes together.
        rescale_within: voxels that `rescale` measures: "nonzero", "mask", or ("above", T) with T in the
            image's units. Default: all.
        rescale_split: splits whose volumes are measured for a `rescale` of the cohort. Default: "train".
        rescale_stats: statistics for a `rescale` of the cohort: the result of `analyze`, or the file that it
            wrote. Default: the dataset's own, which its first build measures.
        clip: whether rescaled voxels outside [0, 1] become 0 or 1. Default: False.
        mask_dtype: "uint8" (default) or "uint16".
        map_labels: labels of masks that become others, all at once, such as {4: 3} or "4=3"; or a table with
            the columns "from" and "to", as a path or URL. Default: none.
        voxel_dtype: "float32" (default), "float16", "bfloat16", "uint8", "native".
        frames: frames of 4-D images: "all", "each", "each:N" (clips of N frames), "first", "mean", or a
            number from 0. Default: 4-D images are refused.
        max_frames: with frames="each", the largest number of frames of any image, if images differ in it.
            Default: every image has as many as the first.
        complex: how complex images are stored: "magnitude", "phase" (radians), "real-imag". Default: complex
            images are refused.
        allow_mixed_shapes: whether volumes may differ in shape from the first. Default: False.
        nonfinite: what becomes of NaN and infinite voxels, before everything else: "zero"; "min", the least
            finite voxel of the image; ("value", V) with V in the image's units. Default: "error".
        preprocess: function from Volume to Volume that the workers can import; or several, in order.
            Default: none.
        orientation: code of the orientation that axes are reordered and flipped to, such as "RAS". Default:
            "native", which changes nothing.
        align: "first" resamples the other images of an example, its mask and its target to the voxel grid of
            its first image. Default: "never", so that other grids are refused.
        reference: image whose voxel grid all volumes are resampled to, as a path or URL; or its grid,
            {"shape": (x, y, z), "affine": 16 numbers}. Default: no resampling.
        spacing: voxel size in mm that volumes are resampled to: (x, y, z), or one number for all three.
            Default: no resampling.
        resize: (x, y, z) in voxels that the whole field of view is resampled to. Default: no resampling.
        resize_longest: number of voxels that the longest axis is resampled to, and the others by the same
            factor; then padded to a cube. Default: no resampling.
        interpolation: values between voxel centres: "linear" (default), "nearest", or "cubic", B-splines of
            order 3.
        mask_interpolation: labels between voxel centres: "nearest" (default), or "linear", the label with the
            largest share.
        antialias: whether images are smoothed by a Gaussian before axes get fewer voxels. Default: False.
        separate_z: "auto" resamples anisotropic volumes by nearest neighbours along the axis with the longest
            voxels, as nnU-Net does. Default: "never".
        crop_foreground: voxels whose bounding box is kept, as for `rescale_within`. Default: no cropping.
        shape: (x, y, z) in voxels that volumes are cropped and padded to. Default: unchanged.
        max_bad_fraction: fraction of volumes that may fail, 0 to 1. Default: 0.
        overwrite: whether to replace a dataset that was built with different options or rows. Default: False.
        recheck: whether to rebuild every record, and replace the shards that differ. Default: False.
        workers: threads; on a cluster, the number of workers to divide the work for. Default: all cores; on a
            cluster, by the engine's flags, or 32.
        temp_location: folder or URL of temporary files. Default: in the output; for `check` and `analyze`,
            the folder of `out`.
        without: options of `like` and `config` to ignore. Default: none.
    """

    path_column: Names | None
    mask_column: Names | None
    target_column: str | None
    label_column: Names | None
    missing_label: str | None
    missing_mask: str | None
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
    rescale_split: Names | None
    rescale_stats: StrPath | CohortStatistics | Analysis | None
    clip: bool | None
    mask_dtype: str | None
    map_labels: StrPath | Mapping[Any, SupportsIndex] | None
    voxel_dtype: str | None
    frames: str | SupportsIndex | None
    max_frames: str | SupportsIndex | None
    complex: str | None
    allow_mixed_shapes: bool | None
    nonfinite: Rule | None
    preprocess: Preprocess | Sequence[Preprocess] | None
    orientation: str | None
    align: str | None
    reference: StrPath | Mapping[str, Any] | None
    spacing: Numbers | SupportsFloat | None
    resize: str | Sequence[SupportsIndex] | None
    resize_longest: str | SupportsIndex | None
    interpolation: str | None
    mask_interpolation: str | None
    antialias: bool | None
    separate_z: str | None
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


FLAG: Final = r"(?<![a-z-])--([a-z-]*[a-z])"
"""Pattern of a flag in a text; the group is its name without the dashes."""


def flag_of(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def read_options(given: Mapping[str, object]) -> dict[str, Any]:
    """Check the values of options by name, and make them those of a configuration; None is not given.

    Raises:
        UsageError: an option is unknown or invalid.
    """
    return {name: read_option(name, value) for name, value in given.items() if value is not None}


def read_option(name: str, value: object) -> Any:
    """As `read_options`, of one option."""
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


def _read_splits(flag: str, value: object) -> str:
    wanted = "give the name of a split, or a list of them"
    names = value.split(",") if isinstance(value, str) else _items(value)
    if not names or not all(isinstance(name, str) and SPLIT_PATTERN.fullmatch(name) for name in names):
        _refuse(flag, value, wanted)
    return ",".join(sorted({str(name) for name in names}))


def _read_statistics(flag: str, value: object) -> str | CohortStatistics:
    if isinstance(value, Analysis):
        return value.statistics
    if isinstance(value, CohortStatistics):
        return value
    return storage.path_text(flag, value)


def _read_without(flag: str, value: object) -> tuple[str, ...]:
    given = [name.strip() for name in _read_names(flag, value).split(",")]
    names = [name.replace("-", "_") for name in given]
    for name in names:
        if name not in OPTIONS:
            hint = _hint(name, str if name in given else lambda each: each.replace("_", "-"))
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


def _read_triple(
    flag: str, value: object, number: Callable[[object], Any], wanted: str
) -> tuple[Any, Any, Any]:
    items = value.split(",") if isinstance(value, str) else _items(value)
    try:
        if items is None or len(items) != 3:
            raise ValueError
        x, y, z = map(number, items)
        return x, y, z
    except ValueError:
        _refuse(flag, value, wanted)


def _read_shape(flag: str, value: object) -> tuple[int, ...]:
    wanted = "give three whole numbers of voxels, x,y,z without channels, such as 160,192,160"
    return _read_triple(flag, value, _integer, wanted)


def _read_spacing(flag: str, value: object) -> tuple[float, ...]:
    is_one = isinstance(value, Real) and not isinstance(value, bool)
    wanted = "give three sizes in mm, such as 1,1,1.5"
    return _read_triple(flag, [value] * 3 if is_one else value, _number, wanted)


def _read_reference(flag: str, value: object) -> ReferenceGrid:
    if isinstance(value, ReferenceGrid):
        return value
    wanted = 'give the path of an image, or {"shape": (x, y, z), "affine": 16 numbers}'
    if isinstance(value, Mapping):
        if value.keys() != {"shape", "affine"}:
            _refuse(flag, value, wanted)
        rows = value["affine"]
        try:
            rows = rows.tolist() if hasattr(rows, "tolist") else list(rows)
            affine = tuple(_number(n) for row in rows for n in (row if isinstance(row, Sequence) else [row]))
        except (TypeError, ValueError):
            _refuse(flag, value, wanted)
        return ReferenceGrid(_read_triple(flag, value["shape"], _integer, wanted), affine)
    from beam_nifti.volume.notes import TEXTS
    from beam_nifti.volume.volume import read_grid  # which loads nibabel

    path = storage.absolute(storage.path_text(flag, value))
    try:
        grid, notes = read_grid(path)
    except VolumeError as e:
        raise UsageError(f"{flag}: {e}") from e
    for note in notes:
        logs.LOGGER.warning("%s: %s: %s", flag, path, TEXTS[note])
    return ReferenceGrid(grid.shape, tuple(grid.affine.ravel().tolist()))


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


_LABEL_TABLE: Final = ("from", "to")
_TABLE_NAME: Final = re.compile(r"\.(?:csv|tsv|jsonl|ndjson|parquet)$", re.I)


def _read_label_map(flag: str, value: object) -> str:
    table = f"the path of a table with the columns {' and '.join(_LABEL_TABLE)}"
    wanted = f"give the new label of each label to change, such as 4=3, or {table}"
    if isinstance(value, Mapping):
        try:
            return ",".join(f"{_integer(old)}={_integer(new)}" for old, new in value.items()) or _refuse(
                flag, value, wanted
            )
        except ValueError:
            _refuse(flag, value, wanted)
    if isinstance(value, str) and not _TABLE_NAME.search(value) and ("=" in value or not value.strip()):
        return _read_text(flag, value, wanted)
    if not isinstance(value, str | os.PathLike):
        _refuse(flag, value, wanted)
    path = storage.path_text(flag, value)
    return spell_label_map(make_label_map(path, _label_rows(flag, path, wanted)))


def _label_rows(flag: str, path: str, wanted: str) -> Iterator[tuple[str, int, int]]:
    """Where each row of a table is, its old label and its new one."""
    from beam_nifti.manifest.tables import read_table  # which loads pyarrow

    try:
        table = read_table(storage.absolute(path))
    except ManifestError as e:
        raise UsageError(
            f"{flag} is {path!r}, which is no label map: {'; '.join(e.problems)}; {wanted}"
        ) from e
    if not {*_LABEL_TABLE} <= {*table.column_names}:
        found = ", ".join(table.column_names)
        raise UsageError(f"{flag} is {path!r}, whose columns are {found}; {wanted}")
    if not table.num_rows:
        raise UsageError(f"{flag} is {path!r}, which has no rows; {wanted}")
    columns = [table[name].to_pylist() for name in _LABEL_TABLE]
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        where = f"{flag}: {path}: row {number}"
        try:
            old, new = map(parse_integer, cells)
        except ValueError as e:
            raise UsageError(f"{where}: {e}; give whole numbers, or drop the row") from e
        yield where, old, new


_KFOLD: Final = re.compile(r"kfold:([0-9]{1,9})", re.A)


def _read_split(flag: str, value: object) -> dict[str, float]:
    parts: list[tuple[Any, ...]] = list(value.items()) if isinstance(value, Mapping) else []
    if isinstance(value, str):
        parts = [part.strip().partition("=")[::2] for part in value.split(",")]
    shares, folds = dict[str, float](), list[int]()
    try:
        if not parts:
            raise ValueError
        for name, share in parts:
            if isinstance(name, str) and (found := _KFOLD.fullmatch(name)) and share == "" and not folds:
                folds.append(int(found[1]))
                continue
            if not isinstance(name, str) or name in shares:
                raise ValueError
            shares[name] = _number(share)
    except ValueError:
        wanted = "give each split once, with its share, such as train=0.8,validation=0.1,test=0.1"
        _refuse(flag, value, wanted)
    return fold_shares(folds[0], shares) if folds else shares


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
    "mask_column": Option(_read_names, metavar="NAME"),
    "target_column": Option(_read_text, metavar="NAME"),
    "label_column": Option(_read_names, metavar="NAME[:KIND],…"),
    "missing_label": _one_of(MISSING_LABELS),
    "missing_mask": _one_of(MISSING_MASKS),
    "id_column": Option(_read_text, metavar="NAME"),
    "anonymous_ids": Option(storage.path_text, metavar="KEYFILE"),
    "split": Option(_read_split, metavar="NAME=SHARE,…|kfold:N"),
    "stratify": Option(_read_text, metavar="COLUMN"),
    "split_seed": Option(read_integer, metavar="N"),
    "examples_per_shard": Option(read_integer, metavar="N"),
    "num_shards": Option(read_integer, metavar="N"),
    "compression": _one_of(COMPRESSIONS),
    "compression_level": Option(read_integer),
    "shuffle_seed": Option(read_integer, metavar="N"),
    "rescale": _rule(RESCALE_METHODS, "METHOD"),
    "rescale_within": _rule(SELECTIONS, "VOXELS"),
    "rescale_split": Option(_read_splits, metavar="NAME,…"),
    "rescale_stats": Option(_read_statistics, metavar="FILE"),
    "clip": Option(read_switch),
    "mask_dtype": _one_of(MASK_DTYPES),
    "map_labels": Option(_read_label_map, metavar="OLD=NEW,…|FILE"),
    "voxel_dtype": _one_of(VOXEL_DTYPES),
    "frames": Option(_read_frames, FRAMES, metavar="|".join(FRAMES)),
    "max_frames": Option(read_integer, metavar="N"),
    "complex": _one_of(COMPLEX_PARTS),
    "allow_mixed_shapes": Option(read_switch),
    "nonfinite": _rule(NONFINITE, "RULE"),
    "preprocess": Option(lambda _, value: read_steps(value), metavar="MODULE:FUNCTION"),
    "orientation": Option(_read_text, ("native", *ORIENTATIONS), metavar="CODE"),
    "align": _one_of(ALIGNMENTS),
    "reference": Option(_read_reference, metavar="FILE"),
    "spacing": Option(_read_spacing, metavar="X,Y,Z"),
    "resize": Option(_read_shape, metavar="X,Y,Z"),
    "resize_longest": Option(read_integer, metavar="N"),
    "interpolation": _one_of(INTERPOLATIONS),
    "mask_interpolation": _one_of(MASK_INTERPOLATIONS),
    "antialias": Option(read_switch),
    "separate_z": _one_of(SEPARATE_Z),
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
