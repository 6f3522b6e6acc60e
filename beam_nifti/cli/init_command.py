"""`beam-nifti init`: a manifest and a file of options for a folder of images, with the reason for each."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from beam_nifti import api
from beam_nifti.cli.manifest_command import is_study_table
from beam_nifti.cli.printing import print_line, while_read
from beam_nifti.cli.run_summary import RunSummary
from beam_nifti.cli.watching import CommandWatcher
from beam_nifti.errors import UsageError, VolumeError
from beam_nifti.pipeline.outputs import require_out
from beam_nifti.storage import paths as storage
from beam_nifti.support import logs
from beam_nifti.support.cells import is_missing
from beam_nifti.support.outcomes import SUCCESS
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted, first_few, one_line

if TYPE_CHECKING:
    from beam_nifti.manifest.recognition import Recognized
    from beam_nifti.pipeline.survey import Survey

_WIDTH: Final = 100  # characters of a line of comments
_SHOWN: Final = 4  # values of a property that a comment names
_MOST_COLUMNS: Final = 20  # that a comment names
_NUM_SAMPLES: Final = 5  # images whose voxels are read
_BRIGHT: Final = 2.0  # range of an image in ranges of its percentiles, from which bright voxels decide
_PERCENTILES: Final = (0.5, 99.5)
_AIR: Final = (-1100.0, -850.0)  # HU, which at least this share of the voxels of CT has:
_AIR_SHARE: Final = 0.01
_LEAST_HU: Final = -3500.0  # scanners write -1,024, -2,048 or -3,024 outside of their field of view
_CT_WINDOW: Final = "window:-1024,3071"
_MOST_LABEL: Final = 255  # of a mask of uint8

_Look = Callable[[Mapping[str, Any]], "Survey"]


@dataclass(frozen=True)
class _Choice:
    """An option of `build`, and why it is chosen."""

    value: Any
    reason: str


_Choices = dict[str, _Choice]
_Left = dict[str, tuple[str, str]]  # what a user should decide: a comment and a line to use, "" for none


@dataclass(frozen=True)
class _Sample:
    """What the voxels of an image show, in its units.

    Attributes:
        low, high: least and greatest finite voxel.
        percentiles: the _PERCENTILES of the finite voxels.
        air: share of voxels that would be air if they were Hounsfield units.
        nonfinite: share of voxels that are NaN or infinite.
    """

    low: float
    high: float
    percentiles: tuple[float, float]
    air: float
    nonfinite: float


def init(run: RunSummary, options: argparse.Namespace, _: list[str]) -> int:
    """`beam-nifti init`."""
    from beam_nifti.manifest.recognition import recognize
    from beam_nifti.manifest.tables import write_table

    name = storage.absolute(options.folder).rpartition("/")[2] or "images"
    out = storage.path_text("--out", options.out) if options.out is not None else ""
    manifest, config, dataset = (storage.join(out, name + end) for end in (".tsv", ".toml", "_dataset"))
    found = recognize(options.folder, manifest)
    if not found.path:
        for cell in (cell for name in found.read().column_names for cell in found.cells(name)):
            if re.search("[\0\t\r\n]", cell):
                raise UsageError(
                    f"{cell!r} has a tab or a line break, which no .tsv can hold; rename the file"
                )
    inputs = {"a table of the study": manifest if is_study_table(manifest, options.folder) else None}
    for path in (config,) if found.path else (manifest, config):
        require_out(path, overwrite=options.overwrite, inputs=inputs, other="another folder with --out DIR")
    command = shlex.join(["beam-nifti", "build", found.path or manifest, dataset, "--config", config])
    with _each_once():
        for note in found.notes:
            logs.LOGGER.warning("%s", note)

        def look(given: Mapping[str, Any]) -> Survey:
            watcher = CommandWatcher(run, options)  # without progress, which would count what fails so far
            return api.check(found.path or found.read(), progress=watcher, **given)

        logs.LOGGER.info("reading the headers of %s", counted(found.read().num_rows, "example"))
        choices, survey, of_voxels = _choose(found, look)
    if survey.refusal:
        raise UsageError(f"{options.folder}: a build would write nothing: {survey.refusal}")
    for problem in survey.problems[:_SHOWN]:
        logs.LOGGER.warning("would fail: %s", problem)
    left = _undecided(found, survey, manifest) | of_voxels
    text = _format(options.folder, command, choices, survey, left)
    if not found.path:
        write_table(
            storage.absolute(manifest), found.relative_to(storage.dirname(storage.absolute(manifest)))
        )
    storage.write(storage.absolute(config), text.encode())
    with while_read():
        print_line(f"found    {found.kind}: {counted(survey['num_images'], 'example')}")
        if survey["num_bad"]:
            print_line(f"failing  {counted(survey['num_bad'], 'example')}, as far as headers show")
        print_line(f"manifest {found.path or manifest}")
        print_line(f"options  {', '.join(choices) or 'none is needed'}: {config}")
        if left:
            print_line(f"decide   {', '.join(left)}: at the end of {config}")
        print_line(f"next     {command}")
    return SUCCESS


@contextlib.contextmanager
def _each_once() -> Iterator[None]:
    """Log each message once, because the manifest is read again for other options."""
    seen = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        is_seen = record.getMessage() in seen
        seen.add(record.getMessage())
        return not is_seen

    logs.LOGGER.addFilter(is_new)
    try:
        yield
    finally:
        logs.LOGGER.removeFilter(is_new)


# Options by the headers


def _choose(found: Recognized, look: _Look) -> tuple[_Choices, Survey, _Left]:
    """The options of a build that keeps every image, as far as headers and some of the images show.

    Returns:
        The options, the survey with them, and what the voxels leave to the user.
    """
    choices = _choose_columns(found)
    survey = look(_values(choices))

    def choose(more: Mapping[str, _Choice]) -> None:
        nonlocal survey
        if more:
            choices.update(more)
            survey = look(_values(choices))

    def attempt(name: str, value: Any, reason: str) -> None:
        nonlocal survey
        if survey["num_bad"]:
            again = look(_values(choices) | {name: value})
            if again["num_bad"] < survey["num_bad"]:
                counts = f"{counted(survey['num_bad'] - again['num_bad'], 'example')} would fail otherwise: "
                choices[name], survey = _Choice(value, counts + reason), again

    choose(_choose_frames(found, survey))
    if len(found.images) > 1 or found.mask:
        attempt(
            "align",
            "first",
            "images of an example, or its mask, have other voxel grids than its first image. They are "
            "resampled onto that one by positions in mm; nothing is registered.",
        )
    for _ in range(2):  # what makes images alike may uncover what else differs
        choose({k: v for k, v in _choose_by_advice(survey).items() if k not in choices})
    attempt(
        "allow_mixed_shapes",
        True,
        f"shapes differ ({_counts(survey['records'])}). Records keep them; train on patches, or choose "
        "shape = [X, Y, Z] to crop and pad.",
    )
    more, left = _choose_by_voxels(found, {problem["row"] for problem in survey["problems"]})
    return choices | more, survey, left


def _values(choices: _Choices) -> dict[str, Any]:
    return {name: choice.value for name, choice in choices.items()}


def _choose_columns(found: Recognized) -> _Choices:
    from beam_nifti.manifest.recognition import is_target

    choices: _Choices = {}
    if found.id_column:
        choices["id_column"] = _Choice(found.id_column, "Ids of examples.")
    if found.images != ("path",):
        reason = (
            f"The images of these {len(found.images)} columns become the channels of one record."
            if len(found.images) > 1
            else "The column of paths."
        )
        targets = [name for name in found.images if is_target(name)]
        if targets and (rest := [name for name in found.images if name != targets[0]]):
            reason += (
                f' To store "{targets[0]}" as a target to predict instead of a channel: '
                f"path_column = {_toml(rest)} and target_column = {_toml(targets[0])}."
            )
        choices["path_column"] = _Choice([*found.images], reason)
    if found.mask:
        choices["mask_column"] = _Choice(found.mask, "Label maps are stored with their images.")
    if found.without_mask:
        splits = " and ".join(f"{count:,} of {split}" for split, count in found.without_mask.items())
        choices["missing_mask"] = _Choice(
            "empty",
            f"Examples without a mask ({splits}) are kept with a mask of zeros, which is not to be scored; "
            'their cell in the index is empty. "skip" omits these examples.',
        )
    labels = found.cells("label")
    if missing := sum(map(is_missing, labels)):
        reason = (
            f'{missing:,} of {counted(len(labels), "row")} have no label, and are kept. "skip" omits them.'
        )
        choices["missing_label"] = _Choice("nan", reason)
    return choices


def _choose_frames(found: Recognized, survey: Survey) -> _Choices:
    sizes = {shape: shape.split("×") for shape in survey["shapes"]}
    numbers = {shape: int(axes[3]) if len(axes) > 3 else 1 for shape, axes in sizes.items()}
    counts = sorted(set(numbers.values()))
    if max(counts, default=1) == 1:
        return {}
    num = sum(count for shape, count in survey["shapes"].items() if numbers[shape] > 1)
    have = f"{num:,} of {counted(survey['num_images'], 'image')} have several frames"
    if len(found.images) > 1:
        reason = f"{have}, and an example of several images takes one of each; the others are lost."
        return {"frames": _Choice("first", reason)}
    if len(counts) == 1:
        reason = f'{have}, {counts[0]} each, which become channels. "each" makes every frame an example.'
        if len(found.modality) == counts[0]:
            reason = (
                f"{have}, which become channels: {', '.join(found.modality)}. All channels of an image share "
                "one range: rescale applies to them together. Only images of separate files, given with "
                "path_column, are rescaled separately."
            )
        return {"frames": _Choice("all", reason)}
    reason = f'{have}, from {counts[0]} to {counts[-1]}. Every frame becomes an example. "first" keeps one.'
    return {
        "frames": _Choice("each", reason),
        "max_frames": _Choice(counts[-1], "Raise it if images with more frames will be added."),
    }


def _choose_by_advice(survey: Survey) -> _Choices:
    """What `check` suggests, which crops no image."""
    reasons = {
        "orientation": f"Orientations differ ({_counts(survey['orientations'])}). Axes are reordered and "
        "flipped, without interpolation.",
        "spacing": f"Voxel sizes in mm differ ({_counts(survey['spacings'])}). Images that have the most "
        "frequent one keep their voxels; the others are resampled.",
        "shape": f"Shapes differ ({_counts(survey['shapes'])}). Images are padded to the largest, none is "
        "cropped. For training on patches, allow_mixed_shapes = true instead keeps them as they are.",
        "complex": f'There are complex images ({_counts(survey["dtypes"])}). "phase" and "real-imag" are '
        "the other choices.",
        "frames": f"Images differ in their frames ({_counts(survey['shapes'])}).",
        "voxel_dtype": f"Dtypes differ ({_counts(survey['dtypes'])}).",
    }
    most = max(survey["orientations"].values(), default=0)
    if len(tied := [name for name, count in survey["orientations"].items() if count == most]) > 1:
        reasons["orientation"] += f" {' and '.join(tied)} are equally frequent; any of them will do."
    choices: _Choices = {}
    for flag in survey["suggested_flags"]:
        dashed, _, text = flag.partition(" ")
        name = dashed.removeprefix("--").replace("-", "_")
        value = [*map(_number, text.split(","))] if name in ("spacing", "shape") else text
        choices[name] = _Choice(value, reasons[name])
    return choices


def _number(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)


def _counts(of: Mapping[str, int]) -> str:
    return first_few([f"{kind}: {count:,}" for kind, count in of.items()], _SHOWN)


# Options by the voxels of some images


def _choose_by_voxels(found: Recognized, failing: Collection[int]) -> tuple[_Choices, _Left]:
    of_columns = {
        column: {
            path: sample for path in _sampled(found, column, failing) if (sample := _sample(path)) is not None
        }
        for column in found.images
    }
    samples = [sample for of_column in of_columns.values() for sample in of_column.values()]
    masks = _sampled(found, found.mask, failing) if found.mask else []
    labels = [*filter(None, map(_sample, masks))]
    of, choices = counted(len(samples), "image"), _Choices()
    if bad := [sample.nonfinite for sample in samples if sample.nonfinite]:
        choices["nonfinite"] = _Choice(
            "zero",
            f"{len(bad)} of {of} whose voxels were read have NaN or infinite voxels, at most "
            f"{max(bad):.2%}. Without this option, such images fail.",
        )
    left = _find_some_ct(found, of_columns)
    if not left:
        choices |= _choose_rescale(found, samples, of)
    if (most := max((sample.high for sample in labels), default=0)) > _MOST_LABEL:
        reason = f"Labels are up to {most:,.0f} in {counted(len(labels), 'mask')} that were read."
        choices["mask_dtype"] = _Choice("uint16", reason)
    return choices, left


def _find_some_ct(found: Recognized, of_columns: Mapping[str, Mapping[str, _Sample]]) -> _Left:
    """What to decide where only some of the images, or of the channels, are CT."""
    loss = "By default, each image is scaled by its own minimum and maximum, which loses Hounsfield units."
    if len(found.modality) > 1 and len(of_columns) in (1, len(found.modality)):
        voxels = of_columns.values() if len(of_columns) > 1 else [{}] * len(found.modality)
        channels = dict(zip(found.modality, voxels, strict=True))
        ct = [
            name
            for name, images in channels.items()
            if name.lower() == "ct" or (images and all(map(_is_ct, images.values())))
        ]
        if not 0 < len(ct) < len(channels):
            return {}
        text = (
            f"Of the channels {', '.join(channels)}, {', '.join(ct)} look{'s' * (len(ct) == 1)} like CT. "
            f"{loss} One window would be that of all channels. This line keeps the units of each:"
        )
        return {"intensities": (text, 'rescale = "none"')}
    images = {path: sample for each in of_columns.values() for path, sample in each.items()}
    others = [path.rpartition("/")[2] for path, sample in images.items() if not _is_ct(sample)]
    if found.modality or not 0 < len(others) < len(images):
        return {}
    text = (
        f"{counted(len(images), 'image')} read, {len(images) - len(others)} of them like CT; "
        f"{first_few(others, _SHOWN)} {'is' if len(others) == 1 else 'are'} not. {loss} "
        "If all images are CT, use this line:"
    )
    return {"intensities": (text, f"rescale = {_toml(_CT_WINDOW)}")}


def _choose_rescale(found: Recognized, samples: Sequence[_Sample], of: str) -> _Choices:
    if not samples:
        return {}
    low, high = min(sample.low for sample in samples), max(sample.high for sample in samples)
    is_named = bool(found.modality) and all(name.lower() == "ct" for name in found.modality)
    if is_named or ((not found.modality or len(found.images) > 1) and all(map(_is_ct, samples))):
        why = "The images are CT by name" if is_named else "Images have voxels like those of air in CT"
        return {
            "rescale": _Choice(
                _CT_WINDOW,
                f"{why}: {low:,.0f} to {high:,.0f} in {of} that were read. One scale for all of them keeps "
                'Hounsfield units comparable, and nothing is clipped. For soft tissue: "window:-160,240" '
                "with clip = true.",
            )
        }
    widths = [(s.high - s.low, s.percentiles[1] - s.percentiles[0]) for s in samples]
    if all(narrow > 0 for _, narrow in widths) and (
        bright := [wide / narrow for wide, narrow in widths if wide > _BRIGHT * narrow]
    ):
        return {
            "rescale": _Choice(
                "percentile:{:g},{:g}".format(*_PERCENTILES),
                f"In {len(bright)} of {of} that were read, few bright or dark voxels make the range up to "
                f"{max(bright):.1f} times that of 99 % of the voxels. Nothing is clipped; clip = true cuts "
                "values outside of [0, 1].",
            )
        }
    return {}


def _is_ct(sample: _Sample) -> bool:
    return sample.air >= _AIR_SHARE and sample.low >= _LEAST_HU and sample.high > 0


def _sampled(found: Recognized, column: str, failing: Collection[int]) -> list[str]:
    """Paths of some of the images of a column, evenly spread over the rows that do not fail."""
    folder = storage.dirname(storage.absolute(found.path)) if found.path else ""
    cells = [cell for row, cell in enumerate(found.cells(column), 1) if row not in failing]
    paths = [storage.join(folder, cell) for cell in cells if not is_missing(cell)]
    step = max(1, math.ceil(len(paths) / _NUM_SAMPLES))
    return paths[::step]


def _sample(path: str) -> _Sample | None:
    """Read the voxels of an image, the first frame of several; None, with a warning, if that fails."""
    import numpy as np

    from beam_nifti.config import RecordConfig
    from beam_nifti.manifest import VolumeRow
    from beam_nifti.volume import load_volume

    record = RecordConfig(frames="first", complex="magnitude")
    try:
        volume = load_volume(VolumeRow(1, path, path), record=record)
    except VolumeError as e:
        logs.LOGGER.warning("would fail: %s", e)
        return None
    values = volume.scaling.apply(volume.voxels)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = map(float, np.percentile(finite, _PERCENTILES))
    return _Sample(
        float(finite.min()),
        float(finite.max()),
        (low, high),
        float(np.mean((finite >= _AIR[0]) & (finite <= _AIR[1]))),
        1 - finite.size / values.size,
    )


# The file


def _undecided(found: Recognized, survey: Survey, manifest: str) -> _Left:
    """What a user should decide, as far as files and headers show."""
    left = _Left()
    columns = found.read().column_names
    if found.is_empty("label"):
        columns.remove("label")
    names = first_few(found.label_columns, _MOST_COLUMNS)
    if "label" not in columns and found.path:
        if names:
            text = f"No labels. Columns of {found.path} that can be labels: {names}."
            left["labels"] = (text, f"label_column = {_toml(found.label_columns[0])}")
        else:
            left["labels"] = (f"No labels. For labels, fill a column label of {found.path}.", "")
    elif "label" not in columns and found.command:
        of = f", which has {names}" if names else ""
        text = f"No labels. This command takes them from a column of participants.tsv{of}:"
        left["labels"] = (text, found.command)
    elif "label" not in columns:
        folders = first_few(found.class_folders, _MOST_COLUMNS)
        of = f" The names of the folders ({folders}) may be labels." if folders else ""
        how = f"add a column label to {manifest}, or see `beam-nifti manifest table`"
        text = f"No labels.{of} For labels, {how}."
        left["labels"] = (text, "")
    if "split" not in columns:
        by = "participant" if "participant_id" in columns else "example, as there is no column participant_id"
        line = "split = {train = 0.8, validation = 0.1, test = 0.1}"
        left["splits"] = (f'All examples go to "train". This line draws splits by {by}.', line)
    if num := survey["num_bad"]:
        share = math.ceil(1000 * num / survey["num_images"]) / 1000
        text = f"{counted(num, 'example')} would fail. Repair the images, or accept failures."
        left["failures"] = (text, f"max_bad_fraction = {share:g}")
    return left | dict(found.left)


def _format(
    folder: str, command: str, choices: _Choices, survey: Survey, left: Mapping[str, tuple[str, str]]
) -> str:
    """The options as TOML."""
    lines = [
        *_comment(f"Options that `beam-nifti init {shlex.quote(folder)}` chose, for"),
        f"#   {command}",
        "#",
    ]
    for name in ("shapes", "spacings", "orientations", "dtypes"):
        unit = " in mm" if name == "spacings" else ""
        lines += _comment(f"{name}{unit}: {_counts(survey[name])}")
    for name, choice in choices.items():
        lines += ["", *_comment(choice.reason), f"{name} = {_toml(choice.value)}"]
    if left:
        lines += ["", "# Not decided:"]
    for text, line in left.values():
        lines += ["", *_comment(text), *([f"# {line}"] if line else [])]
    return "".join(f"{one_line(line)}\n" for line in lines)


def _comment(text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in wrapped]


def _toml(value: Any) -> str:
    # JSON's texts, numbers, lists and booleans are TOML's.
    return dump_json(value, ensure_ascii=False)
