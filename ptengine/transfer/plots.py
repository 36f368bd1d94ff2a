"""The figures of a transfer report, as SVG text that goes into a page as it is.

Text stays text, so the reader's fonts draw it, Chinese names included. Knows numbers and names only.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

__all__ = ["gain_heat_map", "learning_curves", "similarity_scatter"]

Point = tuple[str, float, float]
P = ParamSpec("P")


def _literally(draw: Callable[P, str]) -> Callable[P, str]:
    """A picture in whose names a dollar sign begins no formula."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


@_literally
def gain_heat_map(gains: Mapping[str, Mapping[str, float]]) -> str:
    """Source (rows) by target (columns): the gain over scratch in points; a pair that was not tried stays blank."""
    sources = list(gains)
    targets = list(dict.fromkeys(target for row in gains.values() for target in row))
    values = [[100 * gains[source].get(target, math.nan) for target in targets] for source in sources]
    most = max((abs(value) for row in values for value in row if not math.isnan(value)), default=0.0) or 1.0
    figure, axes = _figure(3.4 + 0.9 * len(targets), 2.2 + 0.5 * len(sources))
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(targets)), targets, rotation=30, ha="right")
    axes.set_yticks(range(len(sources)), sources)
    axes.set_xlabel("target")
    axes.set_ylabel("source")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(x, y, f"{value:+.1f}", ha="center", va="center", color=_ink(abs(value) / most))
    figure.colorbar(image, label="points over scratch")
    return _svg(figure)


@_literally
def learning_curves(curves: Mapping[str, Sequence[tuple[int, float]]], metric: str) -> str:
    """`metric` over optimiser steps, one line per name."""
    figure, axes = _figure(6.4, 3.6)
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if len(points) < 40 else "", label=name)
    axes.set_xlabel("optimiser step on the target")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    return _svg(figure)


@_literally
def similarity_scatter(points: Sequence[Point], measure: str) -> str:
    """Similarity of source and target against the gain over scratch in points: (name, similarity, gain) each."""
    figure, axes = _figure(5.6, 3.8)
    axes.axhline(0, color="0.6", linewidth=1)
    axes.scatter([x for _, x, _ in points], [100 * y for _, _, y in points])
    for name, x, y in points:
        axes.annotate(name, (x, 100 * y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(measure)
    axes.set_ylabel("points over scratch")
    axes.grid(alpha=0.3)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Glyphs that matplotlib's own font lacks only matter for the room it reserves: the page's fonts draw them.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ptengine"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, which a page cannot hold


def _ink(strength: float) -> str:
    return "white" if strength > 0.6 else "black"
