"""Pictures of benchmark results, one PNG per benchmark. Knows rows of figures only: no operation, no device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display where benchmarks run
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["bars", "end_to_end", "prefix_attention"]

Row = dict[str, Any]


def bars(path: Path, rows: Sequence[Row], title: str) -> None:
    """Median time of every contender, one panel per case; a dashed line is the limit."""
    measured = [row for row in rows if "median_s" in row]
    cases = list(dict.fromkeys(row["case"] for row in measured))
    contenders = list(dict.fromkeys(row["contender"] for row in measured))
    colour = {name: f"C{i}" for i, name in enumerate(contenders)}
    height = 0.6 + 0.28 * len(contenders)
    figure, panels = plt.subplots(max(len(cases), 1), 1, figsize=(9, 1 + height * max(len(cases), 1)), squeeze=False)
    for axis, case in zip(panels[:, 0], cases, strict=False):
        of_case = [row for row in measured if row["case"] == case][::-1]
        names = [row["contender"] for row in of_case]
        axis.barh(names, [row["median_s"] * 1e3 for row in of_case], color=[colour[name] for name in names])
        axis.axvline(of_case[0]["limit_s"] * 1e3, color="black", linestyle="--", linewidth=1)
        axis.set_title(case, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("ms (dashed: limit)")
    _save(figure, path, title)


def prefix_attention(path: Path, rows: Sequence[Row], title: str, peers: Sequence[str], ours: Sequence[str]) -> None:
    """Per head shape and phase: TFLOP/s and % of the limit against T at the P with most cases, speed-up over P x T.

    The speed-up is that of the fastest of `ours` over the fastest of `peers`.
    """
    measured = [row for row in rows if "median_s" in row]
    kinds = list(dict.fromkeys((row["heads"], row["phase"]) for row in measured))
    figure, panels = plt.subplots(max(len(kinds), 1), 3, figsize=(17, 4.2 * max(len(kinds), 1)), squeeze=False)
    for line, (heads, phase) in zip(panels, kinds, strict=False):
        here = [row for row in measured if (row["heads"], row["phase"]) == (heads, phase)]
        virtual = [row["P"] for row in here]
        most = max(sorted(set(virtual)), key=virtual.count)
        shown, names = [row for row in here if row["P"] == most], [*peers, *ours]
        _against_length(line[0], shown, "tflops", f"{heads} {phase}, P={most}", names)
        line[0].set_ylabel("TFLOP/s")
        _against_length(line[1], shown, "percent_of_limit", "% of the limit", names)
        line[1].set_ylim(bottom=0)
        _speed_up(line[2], here, peers, ours)
    if kinds:
        panels[0, 0].legend(fontsize=7)
    _save(figure, path, title)


def end_to_end(path: Path, result: dict[str, Any], title: str) -> None:
    """Tokens per second, memory, loss curves, and prompts in one batch against separate steps."""
    figure, panels = plt.subplots(2, 2, figsize=(13, 9))
    steps = [row for row in result["steps"] if "median_s" in row]
    names = [f"{row['case']}\n{row['side']}" for row in steps]
    colours = ["C1" if row["side"] == "ptengine" else "C0" for row in steps]
    panels[0, 0].bar(names, [row["tokens_per_second"] for row in steps], color=colours)
    panels[0, 0].set_ylabel("text tokens/s in training")
    known = [row["peak_bytes_above_weights"] or 0 for row in steps]
    panels[0, 1].bar(names, [size / 2**30 for size in known], color=colours)
    panels[0, 1].set_ylabel("peak memory above the weights, GiB")
    for side, losses in result["losses"].items():
        panels[1, 0].plot(losses, label=side, linestyle="--" if side == "ptengine" else "-")
    panels[1, 0].set_xlabel("step")
    panels[1, 0].set_ylabel("loss")
    if result["losses"]:
        panels[1, 0].legend()
    for kind in dict.fromkeys(row["how"] for row in result["prompts"] if "median_s" in row):
        points = [row for row in result["prompts"] if row["how"] == kind and "median_s" in row]
        panels[1, 1].plot([x["prompts"] for x in points], [x["tokens_per_second"] for x in points], "o-", label=kind)
        panels[1, 1].legend()
    panels[1, 1].set_xlabel("prompts in the batch")
    panels[1, 1].set_ylabel("text tokens/s in training")
    panels[1, 1].set_ylim(bottom=0)
    _save(figure, path, title)


def _against_length(axis: Axes, rows: Sequence[Row], figure: str, title: str, contenders: Sequence[str]) -> None:
    """One colour for a contender in all panels."""
    for i, name in enumerate(contenders):
        points = sorted((row["T"], row[figure]) for row in rows if row["contender"] == name and figure in row)
        style = "o-" if name.startswith("ptengine") else "x--"
        if points:
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=name, color=f"C{i}", markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("T")
    axis.set_title(title, fontsize=9)


def _speed_up(axis: Axes, rows: Sequence[Row], peers: Sequence[str], ours: Sequence[str]) -> None:
    sizes, lengths = sorted({row["P"] for row in rows}), sorted({row["T"] for row in rows})
    table = [[float("nan")] * len(lengths) for _ in sizes]
    for i, size in enumerate(sizes):
        for j, length in enumerate(lengths):
            here = {row["contender"]: row["median_s"] for row in rows if (row["P"], row["T"]) == (size, length)}
            theirs = [here[name] for name in peers if name in here]
            mine = [here[name] for name in ours if name in here]
            if theirs and mine:
                table[i][j] = min(theirs) / min(mine)
                axis.text(j, i, f"{table[i][j]:.2f}", ha="center", va="center", fontsize=7)
    axis.imshow(table, cmap="RdYlGn", vmin=0.5, vmax=2, aspect="auto", origin="lower")
    axis.set_xticks(range(len(lengths)), [str(x) for x in lengths])
    axis.set_yticks(range(len(sizes)), [str(x) for x in sizes])
    axis.set_xlabel("T")
    axis.set_ylabel("P")
    axis.set_title("best of ptengine over best stock way", fontsize=9)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)
