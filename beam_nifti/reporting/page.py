"""The page of a report: a single HTML file that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from beam_nifti.inspection.record_checks import RecordSpec
from beam_nifti.pipeline.statistics_file import statistics_rows
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.reporting.appearance import label_columns, unit_of
from beam_nifti.reporting.copies import MOST_COMPARED
from beam_nifti.reporting.figures import INKS, draw_histogram, draw_strips
from beam_nifti.reporting.groups import LIMIT as GROUP_LIMIT
from beam_nifti.reporting.groups import PERCENTILES as GROUP_PERCENTILES
from beam_nifti.reporting.groups import compare_groups
from beam_nifti.reporting.outliers import FEWEST, LIMIT
from beam_nifti.reporting.summary import Summary
from beam_nifti.reporting.templates import load_templates
from beam_nifti.reporting.thumbnail import CELL, LABEL_COLOURS
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import counted

_WORST: Final = 12  # outliers at the top of the page
_MOST_KINDS: Final = 8  # lines of a table of counts; the rest are added up
_MOST_CLASSES: Final = 40  # the same, of a label
_MOST_LABELS: Final = 150  # labels of masks in the table; FreeSurfer's segmentations have about a hundred
_FEW_VALUES: Final = 12  # largest number of values of a label that are counted instead of drawn
_PERCENTILES: Final = (0, 5, 50, 95, 100)

Lines = list[tuple[str, list[int]]]


def make_page(
    name: str,
    info: DatasetInfo,
    spec: RecordSpec,
    summary: Summary,
    failures: Sequence[Mapping[str, Any]],
    by: str | None = None,
) -> str:
    """The HTML of a report. The same dataset gives the same text. `by` is the column of the groups."""
    environment = load_templates()
    environment.policies["json.dumps_function"] = dump_json
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"number": format_number, "count": "{:,}".format, "counted": counted}
    style, script = (
        environment.get_template(f"report.{kind}").render(colours=LABEL_COLOURS) for kind in ("css", "js")
    )
    splits = summary.rows["split"].to_numpy(zero_copy_only=False)
    cards = [_card(number, summary) for number in summary.pictures]
    by_number = dict(zip(summary.pictures, cards, strict=True))
    return environment.get_template("report.html").render(
        name=name,
        info=info,
        style=style,
        script=script,
        style_source=_hash(style),
        script_source=_hash(script),
        unit=unit_of(spec),
        summary=summary,
        labels=list(label_columns(spec)),
        by=by,
        group_limit=GROUP_LIMIT,
        groups=_groups(summary) if by is not None else None,
        legend=_labels_of_masks(info) if any(card["overlay"] for card in cards) else [],
        num_colours=len(LABEL_COLOURS),
        balance=list(_balance(spec, summary, splits)),
        mask_balance=_mask_balance(info, summary, splits) if spec.config.mask_dtype else None,
        most_compared=MOST_COMPARED,
        cards=cards,
        worst=[by_number[number] for number in summary.outliers[:_WORST].tolist()],
        mean_picture=_base64(summary.mean_picture) if summary.mean_picture else None,
        cell=CELL,
        limit=LIMIT,
        fewest=FEWEST,
        figures=list(_figures(spec, summary, splits)) if len(splits) else [],
        statistics=list(_statistics(summary, splits, info.splits)),
        splits=list(dict.fromkeys(splits.tolist())),
        kinds=list(_kinds(summary, splits)),
        sizes=Counter(splits.tolist()),
        failures=failures,
        lacking=info.columns.lacking,
        nonfinite=_nonfinite(info, summary),
        settings=dict(_settings(info)),
    )


def _nonfinite(info: DatasetInfo, summary: Summary) -> tuple[int, int] | None:
    """How many voxels were replaced because they were not finite, and in how many records."""
    if not info.config.get("nonfinite"):
        return None
    counts = summary.rows["nonfinite"].to_numpy()
    return int(counts.sum()), int(np.count_nonzero(counts))


def _hash(text: str) -> str:
    """A digest in the form that a Content-Security-Policy requires."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def format_number(value: float) -> str:
    """Three significant digits, and no exponent for numbers that are read with ease.

    >>> format_number(0.12), format_number(1234.5), format_number(227.1), format_number(98765432.0)
    ('0.120', '1,234', '227', '9.88e+07')
    """
    size = abs(value)
    if 1000 <= size < 1e6 or not size:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def _card(number: int, summary: Summary) -> dict[str, Any]:
    """The description of a record on the page."""
    row = summary.rows.slice(number, 1).to_pylist()[0]
    return {
        "id": row["example_id"],
        "participant": row["participant_id"],
        "split": row["split"],
        "labels": row["labels"],
        "shape": row["shape"],
        "spacing": row["spacing"],
        "orientation": row["orientation"],
        "numbers": {
            measure.name: float(format(values[number], ".4g")) for measure, values in summary.measures.items()
        },
        "score": round(float(summary.ranking.scores[number]), 2),
        "reasons": summary.ranking.reasons(number),
        "picture": _base64(summary.pictures[number][0]),
        "overlay": _base64(summary.pictures[number][1] or b""),
    }


def _labels_of_masks(info: DatasetInfo) -> list[int]:
    return [label for label in info.mask_labels or () if label]


def _groups(summary: Summary) -> dict[str, Any]:
    """The groups of records, their strips by theme, and how many groups are not shown."""
    groups, num_more = compare_groups(summary.rows, summary.measures)
    strips = {group.name: group.percentiles for group in groups}
    drawn = {theme: _base64(draw_strips(strips, ink)) for theme, ink in INKS.items()} if groups else None
    return {"groups": groups, "more": num_more, "strips": drawn, "percentiles": GROUP_PERCENTILES}


def _figures(
    spec: RecordSpec, summary: Summary, splits: npt.NDArray[Any]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The title of each histogram, and its SVG by theme."""
    quantiles = pc.list_flatten(summary.rows["quantiles"]).to_numpy().reshape(len(splits), -1)
    drawn = {"voxels, logarithmic": quantiles}
    drawn |= {measure.name: values for measure, values in summary.measures.items()}
    for name, texts in _labels(spec, summary).items():
        if _is_drawn(name, texts, spec):
            drawn[_label_title(name)] = np.array([np.nan if text is None else float(text) for text in texts])
    for title, values in drawn.items():
        series = {name: values[splits == name].ravel() for name in dict.fromkeys(splits.tolist())}
        series = {name: numbers[np.isfinite(numbers)] for name, numbers in series.items()}
        # Of most volumes the background is the largest part by far.
        is_log = values is quantiles
        yield title, {theme: _base64(draw_histogram(series, ink, log=is_log)) for theme, ink in INKS.items()}


def _labels(spec: RecordSpec, summary: Summary) -> dict[str, list[str | None]]:
    """Each label of every record, as text."""
    of_rows = summary.rows["labels"].to_pylist()
    return {name: [labels[number] for labels in of_rows] for number, name in enumerate(label_columns(spec))}


def _label_title(name: str) -> str:
    return name if name == "label" else f"label {name}"


def _is_drawn(name: str, texts: Iterable[str | None], spec: RecordSpec) -> bool:
    """Whether a label is a number with too many values to count each."""
    kinds = {column.name: column.kind for column in spec.config.labels or ()}
    return kinds.get(name, "float") == "float" and len(set(texts) - {None}) > _FEW_VALUES


def _statistics(
    summary: Summary, splits: npt.NDArray[Any], names: Iterable[str]
) -> Iterator[tuple[str, str, list[float]]]:
    """Measure, split, and percentiles of the measure in the split."""
    for measure, values in summary.measures.items():
        for name in names:
            if (of_split := values[splits == name]).size:
                yield measure.name, name, np.percentile(of_split, _PERCENTILES).tolist()


def _kinds(summary: Summary, splits: npt.NDArray[Any]) -> Iterator[tuple[str, Lines]]:
    """Each property with its values, and the number of records of each split that have them."""
    columns = {
        "shape": "shape",
        "voxel size, mm": "spacing",
        "orientation": "orientation",
        "dtype on disk": "dtype",
    }
    for title, name in columns.items():
        yield title, _counts(summary.rows[name].to_pylist(), splits, _MOST_KINDS)


def _balance(spec: RecordSpec, summary: Summary, splits: npt.NDArray[Any]) -> Iterator[tuple[str, Lines]]:
    """Each label that is no measurement, as `_kinds`."""
    for name, texts in _labels(spec, summary).items():
        if not _is_drawn(name, texts, spec):
            yield _label_title(name), _counts(texts, splits, _MOST_CLASSES)


def _counts(cells: Sequence[str | None], splits: npt.NDArray[Any], most: int) -> Lines:
    """The values, and the number of records of each split that have them; rare values are added up."""
    names = list(dict.fromkeys(splits.tolist()))
    counts = Counter(zip(cells, splits.tolist(), strict=True))
    values = [value for value, _ in Counter(cells).most_common()]
    lines = [
        ("none" if value is None else value, [counts[value, name] for name in names]) for value in values
    ]
    if rest := lines[most:]:
        totals = np.sum([numbers for _, numbers in rest], axis=0).tolist()
        lines = [*lines[:most], (counted(len(rest), "other"), totals)]
    return lines


def _mask_balance(info: DatasetInfo, summary: Summary, splits: npt.NDArray[Any]) -> dict[str, Any]:
    """Each label of the masks, except 0: its records and its share of the labelled voxels, by split."""
    names, labels = dict.fromkeys(splits.tolist()), _labels_of_masks(info)
    records, voxels, sums = summary.masks.records, summary.masks.voxels, summary.masks.labelled
    lines = [
        (label, [(records[name, label], voxels[name, label] / max(sums[name], 1)) for name in names])
        for label in labels[:_MOST_LABELS]
    ]
    background = [voxels[name, 0] / max(sums[name] + voxels[name, 0], 1) for name in names]
    return {"lines": lines, "more": len(labels) - len(lines), "background": background}


def _settings(info: DatasetInfo) -> Iterator[tuple[str, dict[str, str]]]:
    """The facts in dataset_info.json about how the dataset was built."""
    config = {key: value for key, value in info.config.items() if value is not None and value is not False}
    if statistics := config.pop("rescale_stats", None):
        texts, title = dict[str, str](), ""
        for name, text in statistics_rows(statistics):
            title = name or title
            texts[title] = f"{texts[title]}; {text}" if title in texts else text
        yield "Statistics", texts
    yield "Configuration", {key: _show(value) for key, value in config.items()}
    yield "Manifest", {key: _show(value) for key, value in info.manifest.items()}
    yield "Records", {key: str(value) for key, value in info.features.items()}
    yield "Versions", {key: str(value) for key, value in info.versions.items()}


def _show(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
