# SPDX-License-Identifier: Apache-2.0
"""Draws the result file of a stage: speed against dense over M, memory and time of training steps.

Colours, markers and look are those of `benchmarks.plots`. Stages that only pass or fail have no picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.records import read
from benchmarks.plots import INK, LOOK, STYLES
from pylearngene.cli.report.plots import pyplot
from pylearngene.errors import ArgumentError

Rows = list[dict[str, str]]
#: Marker and colour of the number of genes.
GENES = {"1": ("v", "#999999"), "2": ("o", "#0072B2"), "4": ("^", "#D55E00"), "8": ("s", "#009E73")}
PARTS = {
    "weights": "#0072B2", "gradients": "#56B4E9", "optimizer": "#009E73", "saved": "#E69F00", "workspace": "#999999",
}  # fmt: skip


def draw(stage: str, folder: Path) -> str:
    """Draw `<stage>.csv` as `<stage>.png`; returns a line about why not, or nothing."""
    rows = [row for row in read(folder / f"{stage}.csv") if row["status"] == "ok"]
    if stage not in DRAWN or not rows:
        return ""
    try:
        plt = pyplot()
    except ArgumentError as error:
        return f"no picture: {error}"
    with plt.rc_context(LOOK):
        figure = DRAWN[stage](plt, rows)
        row = rows[0]
        where = f"{row['device']}, torch {row['torch']}, Triton {row['triton']}, commit {row['commit'] or 'none'}"
        figure.suptitle(where, fontsize=8.5, color="#555555", x=0.01, ha="left")
        figure.savefig(folder / f"{stage}.png", dpi=130, facecolor="white")
        plt.close(figure)
    return ""


def _speed(plt: Any, rows: Rows) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    panels = [("forward", "dense"), ("dx", "dense"), ("wgrad", "dense"), ("forward", "hand panel"), ("stack", "dense")]
    for axis, (kind, call) in zip(axes.flat, panels, strict=False):
        _ratios(axis, [row for row in rows if row["kind"] == kind and row["call"] == call])
        axis.set(title=f"{kind}: time of {call} / ours", xlabel="tokens M")
    _synthesis(axes.flat[-1], [row for row in rows if row["kind"] == "synthesis" and row["call"] == "ours"])
    handles = [
        plt.matplotlib.lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=f"K = {genes}")
        for genes, (marker, colour) in GENES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _ratios(axis: Any, rows: Rows) -> None:
    axis.axhline(1, color=INK, linewidth=1)
    for genes, (marker, colour) in GENES.items():
        points = [(int(row["tokens"]), float(row["ratio"])) for row in rows if row["genes"] == genes]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, alpha=0.8)
    tokens = sorted({int(row["tokens"]) for row in rows})
    if tokens:
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens], rotation=45)
        axis.minorticks_off()


def _synthesis(axis: Any, rows: Rows) -> None:
    names = [f"{row['shape']}, K = {row['genes']}" for row in rows]
    axis.barh(range(len(rows)), [float(row["copy_share"] or 0) for row in rows], color=STYLES["ours"][0])
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.set(title="the weight alone: share of a copy's bandwidth", xlim=(0, None))
    axis.invert_yaxis()


def _train(plt: Any, rows: Rows) -> Any:
    rows = [row for row in rows if row["median_ms"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.42 * len(rows) + 2.5), layout="constrained")
    names = [f"{row['net']}: {row['variant']}" for row in rows]
    left.barh(range(len(rows)), [float(row["median_ms"]) for row in rows], color=STYLES["ours"][0])
    left.set(title="a training step, ms")
    start = [0.0] * len(rows)
    for part, colour in PARTS.items():
        sizes = [float(row[f"{part}_mib"] or 0) for row in rows]
        right.barh(range(len(rows)), sizes, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    right.set(title="memory, MiB")
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
    return figure


def _compile(plt: Any, rows: Rows) -> Any:
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(rows) + 2), layout="constrained")
    axis.barh(range(len(rows)), [float(row["median_us"]) for row in rows], color=STYLES["compiled"][0])
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(title="compiled calls, us", xscale="log")
    return figure


DRAWN: dict[str, Callable[[Any, Rows], Any]] = {"speed": _speed, "train": _train, "compile": _compile}
