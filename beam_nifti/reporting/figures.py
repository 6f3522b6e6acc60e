"""Histograms and strips as SVG, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

_BINS: Final = 40
_RANGE: Final = (0.5, 99.5)  # percentiles that the bins span; the outermost ones include what is beyond
_INCHES: Final = (3.6, 2.1)
_COLOURS: Final = ("#0a7abf", "#d9822b", "#1a9e77", "#b5539c", "#8a7f00", "#d1495b")
_STYLES: Final = ("-", "--", ":", "-.")
_LONGEST: Final = 24  # characters of the name of a group
INKS: Final = {"light": "#3c4650", "dark": "#c3ccd5"}  # of text and axes, by theme


def draw_histogram(series: Mapping[str, Numbers], ink: str, *, log: bool = False) -> bytes:
    """Draw a histogram of the shares of each split, without a background, as an SVG without a date."""
    edges = _edges(np.concatenate(list(series.values())))

    def draw(axes: Any) -> None:
        for number, (name, values) in enumerate(series.items()):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            colour = _COLOURS[number % len(_COLOURS)]
            shares = counts / max(len(values), 1)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.15)
            style: dict[str, Any] = {
                "color": colour,
                "linewidth": 1.4,
                "linestyle": _STYLES[number % len(_STYLES)],
            }
            axes.stairs(shares, edges, label=name, **style)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=ink, fontsize=8)

    return _draw(draw, _INCHES, ink)


def draw_strips(groups: Mapping[str, Sequence[float]], ink: str) -> bytes:
    """Draw the percentiles of each group as a strip, one below the other, as `draw_histogram` does.

    Args:
        groups: five percentiles of each group: a line from the first to the last, a bar from the second to
            the fourth, and a tick at the third.
        ink: colour of text and axes.
    """

    def draw(axes: Any) -> None:
        lows, lefts, middles, rights, highs = np.array(list(groups.values())).T
        places = np.arange(len(groups))
        axes.hlines(places, lows, highs, color=_COLOURS[0], linewidth=1.2)
        axes.barh(places, rights - lefts, left=lefts, height=0.6, color=_COLOURS[0], alpha=0.45)
        axes.vlines(middles, places - 0.3, places + 0.3, color=ink, linewidth=1.6)
        labels = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in groups]
        axes.set_yticks(places, [label.replace("$", r"\$") for label in labels])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)

    return _draw(draw, (2 * _INCHES[0], 0.5 + 0.24 * len(groups)), ink)


def _draw(draw: Callable[[Any], None], inches: tuple[float, float], ink: str) -> bytes:
    """An SVG of what a function draws on axes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of this machine says
        matplotlib.rcParams.update({"svg.hashsalt": "beam-nifti", "font.size": 9})
        figure = Figure(inches, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(ink)
        axes.tick_params(colors=ink)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _edges(values: Numbers) -> Numbers:
    low, high = np.percentile(values, _RANGE)
    if not low < high:
        low, high = values.min(), values.max()
    if not low < high:
        half = abs(low) / 10 or 0.5
        low, high = low - half, high + half
    return np.linspace(low, high, _BINS + 1)
