"""Histograms as SVG, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_BINS: Final = 40
_RANGE: Final = (0.5, 99.5)  # percentiles that the bins span; the outermost ones include what is beyond
_INCHES: Final = (3.6, 2.1)
_COLOURS: Final = ("#0a7abf", "#d9822b", "#1a9e77", "#b5539c", "#8a7f00", "#d1495b")
_STYLES: Final = ("-", "--", ":", "-.")
INKS: Final = {"light": "#3c4650", "dark": "#c3ccd5"}  # of text and axes, by theme


def draw_histogram(series: Mapping[str, npt.NDArray[np.float64]], ink: str, *, log: bool = False) -> bytes:
    """Draw a histogram of the shares of each split, without a background, as an SVG without a date."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of this machine says
        matplotlib.rcParams.update({"svg.hashsalt": "beam-nifti", "font.size": 9})
        figure = Figure(_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        edges = _edges(np.concatenate(list(series.values())))
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
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(ink)
        axes.tick_params(colors=ink)
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=ink, fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = np.percentile(values, _RANGE)
    if not low < high:
        low, high = values.min(), values.max()
    if not low < high:
        half = abs(low) / 10 or 0.5
        low, high = low - half, high + half
    return np.linspace(low, high, _BINS + 1)
