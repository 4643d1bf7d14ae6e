# SPDX-License-Identifier: Apache-2.0
"""Pictures of the grid of `expansion`: ratios against tokens for networks, and per case for all other products.

One line per number of genes; filled markers are the layers, open ones the kernels alone. Everything else is in `plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import INK, LOOK, STYLES, Rows, grouped, where
from pylearngene.cli.report.plots import pyplot

# K: colour (Okabe and Ito's), marker
GENES = {
    "1": ("#009E73", "s"),
    "2": ("#0072B2", "o"),
    "4": ("#E69F00", "D"),
    "8": ("#CC79A7", "^"),
    "12": ("#D55E00", "v"),
}
BASELINES = {"dense": "F.linear on ready weights", "eager": "weights made by torch, then F.linear"}
CHARTS = {
    "dx": "dX alone",
    "wgrad": "Gradients of genes, coefficients",
    "model": "Whole models (95 % intervals)",
}


def draw_networks(rows: Rows, picture: Path, baseline: str) -> None:
    """Draw how much faster than a baseline forward passes of networks are, as a PNG.

    Args:
        rows: of a result file.
        picture: the file to write.
        baseline: "dense" or "eager".
    """
    plt = pyplot()
    rows = [row for row in rows if row["kind"] == "forward" and "conv" not in row["case"]]
    widths = sorted({_width(row) for row in rows})
    tokens = sorted({int(row["tokens"]) for row in rows})
    dtypes = [dtype for dtype in ("fp32", "bf16") if any(row["dtype"] == dtype for row in rows)]
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            len(dtypes), len(widths), figsize=(5 * len(widths), 4 * len(dtypes) + 1), squeeze=False,
            sharex=True, sharey="row", layout="constrained",
        )  # fmt: skip
        for line, dtype in zip(axes, dtypes, strict=True):
            for axis, width in zip(line, widths, strict=True):
                _panel(axis, [row for row in rows if _width(row) == width and row["dtype"] == dtype], baseline, tokens)
                axis.set_title(f"D = {width}, {dtype}")
            line[0].set_ylabel("ratio of medians (log scale)")
        for axis in axes[-1]:
            axis.set_xlabel("tokens M: 12 layers up to 256, one from 512 on")
        figure.legend(
            handles=_handles(plt, rows), loc="outside lower center", ncols=8, frameon=False, fontsize=9,
        )  # fmt: skip
        title = f"Forward through qkv, proj, fc1, fc2: time of {BASELINES[baseline]} / pylearngene's"
        figure.suptitle(f"{title}\n{where(rows)}", fontsize=10, x=0.01, ha="left")
        figure.savefig(picture, dpi=120, facecolor="white")
        plt.close(figure)


def _panel(axis: Any, rows: Rows, baseline: str, tokens: Sequence[int]) -> None:
    axis.axhline(1, color=INK, linewidth=1.2)
    for (genes,), group in grouped(rows, "genes").items():
        colour, marker = GENES.get(genes, (INK, "x"))
        for call, style, face in (("kernel", ":", "white"), ("ours", "-", colour)):
            points = sorted(_ratios(group, baseline, call))
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=style, mfc=face, ms=5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(tokens, [str(m) for m in tokens], fontsize=8)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.tick_params(labelbottom=True)


def _ratios(rows: Rows, baseline: str, call: str) -> list[tuple[int, float]]:
    """(M, time of the baseline / time of the call), per case that has both."""
    times = {(row["case"], row["call"]): float(row["median_us"]) for row in rows}
    tokens = {row["case"]: int(row["tokens"]) for row in rows}
    return [
        (m, times[case, baseline] / times[case, call])
        for case, m in tokens.items()
        if (case, call) in times and (case, baseline) in times
    ]


def _width(row: Any) -> int:
    return int(row["shape"].partition("D")[2])


def _handles(plt: Any, rows: Rows) -> list[Any]:
    line = plt.matplotlib.lines.Line2D
    found = [genes for genes in GENES if any(row["genes"] == genes for row in rows)]
    lines = [line([], [], color=GENES[k][0], marker=GENES[k][1], label=f"K = {k}") for k in found]
    layers = line([], [], color=INK, marker="o", label="through the layers")
    return [*lines, layers, line([], [], color=INK, marker="o", linestyle=":", mfc="white", label="kernel alone")]


def draw_products(rows: Rows, picture: Path) -> None:
    """Draw the ratios of single products of a backward pass and of whole models as a PNG.

    Args:
        rows: of a result file.
        picture: the file to write.
    """
    plt = pyplot()
    kinds = [kind for kind in CHARTS if any(row["kind"] == kind for row in rows)]
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(1, len(kinds), figsize=(5.4 * len(kinds), 7), squeeze=False, layout="constrained")
        for axis, kind in zip(axes[0], kinds, strict=True):
            _chart(axis, [row for row in rows if row["kind"] == kind], intervals=kind == "model")
            axis.set_title(CHARTS[kind], weight="bold")
            axis.set_xlabel("baseline's time / pylearngene's (log scale)")
        line = plt.matplotlib.lines.Line2D
        handles = [
            line([], [], color=STYLES[call][0], marker=STYLES[call][1], linestyle="", label=STYLES[call][3])
            for call in BASELINES
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.suptitle(where(rows), fontsize=8.5, color="#555555", x=0.01, ha="left")
        figure.savefig(picture, dpi=120, facecolor="white")
        plt.close(figure)


def _chart(axis: Any, rows: Rows, intervals: bool) -> None:
    """A line per case, a mark per baseline; of two marks the left one has its number on the left."""
    cases = grouped([row for row in rows if row["call"] in BASELINES], "case")
    axis.axvline(1, color=INK, linewidth=1.2)
    for place, group in enumerate(cases.values()):
        for rank, row in enumerate(sorted(group, key=lambda row: float(row["ratio"]))):
            colour, marker, _, _ = STYLES[row["call"]]
            ratio, ends = float(row["ratio"]), (float(row["ratio_low"]), float(row["ratio_high"]))
            axis.plot(ratio, place, color=colour, marker=marker, linestyle="")
            if intervals:
                axis.plot(ends, (place, place), color=colour, linewidth=1.5)
            offset, side = ((-7, -9 * intervals), "right") if rank == 0 else ((7, 9 * intervals), "left")
            axis.annotate(
                f"{ratio:.2f}", (ratio, place), offset, textcoords="offset points", ha=side, va="center", fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},  # the line at 1 does not cross a number
            )  # fmt: skip
    axis.set_yticks(range(len(cases)), [_name(group[0]) for group in cases.values()], fontsize=8)
    axis.set_ylim(len(cases) - 0.4, -0.6)
    _ratio_axis(axis)


def _ratio_axis(axis: Any) -> None:
    """A log axis of ratios from the smallest to the largest with room for numbers beside the marks."""
    axis.set_xscale("log", base=2)
    axis.margins(x=0.2)
    low, high = axis.get_xlim()
    ticks = [tick for tick in (0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()


def _name(row: Any) -> str:
    if row["kind"] == "model":
        return f"{row['shape'].replace(', ', chr(10))}\n{row['dtype']}"
    return f"{row['shape']}, M {row['tokens']}, K {row['genes']}, {row['dtype']}"
