# SPDX-License-Identifier: Apache-2.0
"""Draws a primitive's rows of a result file: how much faster than each baseline, per kind of case; measures nothing.

The grid of networks of `expansion` has pictures of its own, in `curves`.
Colours are Okabe and Ito's, told apart by colour-blind readers; markers and hatches repeat what colour says.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pylearngene.cli.report.plots import pyplot

# call: colour, marker, hatch, label
STYLES = {
    "ours": ("#0072B2", "o", "", "pylearngene"),
    "kernel": ("#0072B2", "o", "..", "pylearngene, kernel alone"),
    "again": ("#0072B2", "o", "//", "pylearngene, pass repeated"),
    "kernel again": ("#0072B2", "o", "xx", "pylearngene, kernel alone, pass repeated"),
    "dense": ("#D55E00", "^", "//", "dense, weights ready"),
    "eager": ("#E69F00", "D", "..", "eager, weight made by torch"),
    "eager again": ("#E69F00", "D", "//", "eager, weight made by torch, pass repeated"),
    "stacked": ("#E69F00", "d", "oo", "eager, coefficients times stacked genes"),
    "checkpointed": ("#999999", "v", "xx", "eager, weight made again in the backward"),
    "compiled": ("#CC79A7", "s", "--", "torch.compile of eager"),
    "copy": ("#009E73", "P", "\\\\", "copy of as many bytes"),
    "function": ("#56B4E9", "<", "||", "plain function"),
    "module": ("#F0E442", ">", "++", "plain module"),
}
INK, PALE = "#222222", "#DDDDDD"
LOOK = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "hatch.linewidth": 0.5,
}
Rows = list[dict[str, str]]


def draw(results: Path, picture: Path, stem: str = "expansion") -> None:
    """Draw what a CSV file of `benchmarks.run` has of one primitive as a PNG.

    Args:
        results: the CSV file.
        picture: the PNG file to write.
        stem: of the primitive.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    rows = _rows_of(results, stem)
    plt = pyplot()
    stacks = {} if stem == "expansion" else grouped([row for row in rows if row["kind"] == "forward"], "shape", "dtype")
    synthesis = [row for row in rows if row["kind"] == "synthesis"]
    training = [row for row in rows if row["kind"] == "training"]
    with plt.rc_context(LOOK):
        figure = plt.figure(figsize=(15, 9.6 if stacks else 7.6), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.08)) if stacks else (None, figure)
        if upper is not None:
            upper.suptitle(
                "Forward of a stack x (qkv, proj, fc1, fc2): time of the baseline / pylearngene's",
                x=0.01, ha="left", weight="bold",
            )  # fmt: skip
            axes = upper.subplots(1, len(stacks), sharey=True, squeeze=False)[0]
            for axis, (key, group) in zip(axes, stacks.items(), strict=True):
                _stack(axis, key, group)
            axes[0].set_ylabel("ratio of medians (log scale)")
        host = [row for row in rows if row["kind"] == "host"]
        left, right, *small = lower.subplots(1, 3 if host else 2, squeeze=False)[0]
        _synthesis(left, synthesis)
        _training(right, training)
        if host:
            _host(small[0], host)
        used = [call for call in STYLES if any(row["call"] == call for row in rows)]
        handles = [_handle(plt, call) for call in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.suptitle(where(rows), fontsize=8.5, color="#555555", x=0.01, ha="left")
        figure.draw_without_rendering()  # lays out, so that widths are known
        for axis in (left, right):
            _apart(axis)
        figure.savefig(picture, dpi=130, facecolor="white")
        plt.close(figure)


def _apart(axis: Any) -> None:
    """Turn all labels of bars where one is wider than its bar: turned, each has the place above its bar for itself."""
    widest = max((label.get_window_extent().width for label in axis.texts if label.get_text()), default=0)
    if widest > min((bar.get_window_extent().width for bar in axis.patches), default=widest):
        for label in axis.texts:
            label.set(rotation=90, verticalalignment="bottom")
        axis.margins(y=0.14)


def _rows_of(results: Path, stem: str) -> Rows:
    """What one picture has room for; the others are drawn by `curves`, or read in the file."""
    with results.open(newline="") as file:
        rows: Rows = [row for row in csv.DictReader(file) if row["stem"] == stem]
    if stem == "expansion":
        rows = [row for row in rows if row["kind"] in ("synthesis", "training", "host")] or rows
    apart = {row["case"] for row in rows if row["call"] == "by layer" or "conv" in row["case"]}
    return [row for row in rows if row["case"] not in apart]


def _stack(axis: Any, key: tuple[str, ...], rows: Rows) -> None:
    shape, dtype = key
    tokens = sorted({int(row["tokens"]) for row in rows})
    switch = [m for m in tokens if any(row["regime"] == "rows" and int(row["tokens"]) == m for row in rows)]
    if switch and switch != tokens:  # between the last M of rows and the first of panel
        border = (switch[-1] * tokens[len(switch)]) ** 0.5
        axis.axvline(border, color=INK, linewidth=0.8, linestyle=":")
        axis.text(border, 0.99, "rows | panel", transform=axis.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    axis.axhline(1, color=STYLES["ours"][0], linewidth=1.6)
    for call in (call for call in STYLES if call != "ours"):
        points = sorted((int(row["tokens"]), float(row["ratio"])) for row in rows if row["call"] == call)
        if points:
            colour, marker, _, _ = STYLES[call]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.7)
    for m in tokens:
        ratios = sorted(float(row["ratio"]) for row in rows if row["call"] != "ours" and int(row["tokens"]) == m)
        for ratio, above in {ratios[0]: -12, ratios[-1]: 6}.items():  # the lowest and the highest, clear of each other
            axis.annotate(f"{ratio:.2f}", (m, ratio), (0, above), textcoords="offset points", ha="center", fontsize=7.5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(tokens, [str(m) for m in tokens])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.margins(x=0.1, y=0.14)
    axis.set(title=f"{shape}, {dtype}", xlabel=f"tokens M (K = {rows[0]['genes']} genes)")


def _synthesis(axis: Any, rows: Rows) -> None:
    groups = grouped(rows, "genes", "dtype")
    names = [f"{genes}\n{dtype}" for genes, dtype in groups]
    _bars(axis, list(groups.values()), "gb_per_s", _share, size=5.5 if len(groups) > 6 else 7)
    axis.set_xticks(range(len(names)), names)
    shape = rows[0]["shape"] if rows else ""
    axis.set_title(f"The weight alone ({shape}): our share of a copy", weight="bold")
    axis.set_ylabel("GB/s, K reads + 1 write")
    axis.set_xlabel("K")


def _share(row: dict[str, str]) -> str:
    return "" if row["call"] != "ours" else f"{100 * float(row['copy_share']):.0f}%"


def _training(axis: Any, rows: Rows) -> None:
    groups = grouped(rows, "shape", "dtype")
    names = [f"{shape}\n{dtype}" for shape, dtype in groups]
    scaled = [_relative(group) for group in groups.values()]
    _bars(axis, scaled, "relative", lambda row: f"{float(row['median_us']) / 1000:.3g}")
    axis.set_xticks(range(len(names)), names)
    tokens = rows[0]["tokens"] if rows else ""
    axis.set_title(f"Forward + backward of blocks (M = {tokens}): time, labels in ms", weight="bold")
    axis.set_ylabel("time / time of dense")


def _host(axis: Any, rows: Rows) -> None:
    groups = list(grouped(rows, "shape").values())
    _bars(axis, groups, "median_us", lambda row: row["above_us"] if row["call"] != "ours" else "", across=True)
    axis.set_yticks(range(len(groups)), [group[0]["shape"] for group in groups], fontsize=7)
    axis.invert_yaxis()
    axis.set_title("Calls without work: time, labels: ours above", weight="bold")
    axis.set_xlabel("us (log scale)")
    axis.set_xscale("log")


def _relative(rows: Rows) -> Rows:
    dense = next(float(row["median_us"]) for row in rows if row["call"] == "dense")
    return [{**row, "relative": str(float(row["median_us"]) / dense)} for row in rows]


def _bars(axis: Any, groups: list[Rows], column: str, label: Any, across: bool = False, size: float = 7) -> None:
    """A bar per row, side by side within its group; `across` lets them lie."""
    for place, rows in enumerate(groups):
        width = 0.84 / len(rows)
        for index, row in enumerate(rows):
            colour, _, hatch, _ = STYLES[row["call"]]
            x = place + (index - (len(rows) - 1) / 2) * width
            height = float(row[column])
            draw, end, beside = (axis.barh, (height, x), (2, -2)) if across else (axis.bar, (x, height), (0, 2))
            draw(x, height, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
            side = "left" if across else "center"
            axis.annotate(label(row), end, beside, textcoords="offset points", ha=side, fontsize=5 if across else size)
    axis.grid(axis="y" if across else "x", visible=False)
    axis.margins(**{"x" if across else "y": 0.1})


def grouped(rows: Rows, *columns: str) -> dict[tuple[str, ...], Rows]:
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _handle(plt: Any, call: str) -> Any:
    colour, marker, hatch, label = STYLES[call]
    return (
        plt.matplotlib.lines.Line2D([], [], color=colour, marker=marker, label=label)
        if not hatch
        else plt.matplotlib.patches.Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label)
    )


def where(rows: Rows) -> str:
    """Machine, versions and commits of rows, in one line."""
    row, commits = rows[0], sorted({row["commit"] or "none" for row in rows})
    return (
        f"{row['device']} ({row['cpu_level']}), threads: {row['threads']}, torch {row['torch']}, "
        f"pylearngene {row['pylearngene']}, commit {', '.join(commits)}; medians, taking turns"
    )
