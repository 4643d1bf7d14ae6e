# SPDX-License-Identifier: Apache-2.0
"""The picture of a study: one panel per part, means with the spread over seeds, drawn from the CSV rows alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims import tables
from pylearngene.cli.report.plots import pyplot

# Okabe and Ito's colours; markers repeat what colour says.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#222222")
MARKERS = "os^vDPX*"
LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw(rows: tables.Rows, picture: Path) -> None:
    """Draw the rows of one study as a PNG.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    plt = pyplot()
    shown = [(part, group) for part, group in tables.parts(rows) if part is not tables.NETWORK]
    with plt.rc_context(LOOK):
        size = (5.2 * max(len(shown), 1.5), 5.6)
        figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
        for axis, (part, group) in zip(axes[0], shown, strict=True):
            _panel(axis, part, group)
        axes[0][0].set_ylabel("test accuracy (%)")
        if rows[0]["data"] == "digits":
            figure.suptitle("STAND-IN DATA (scikit-learn digits): not a result", color="#B00020", weight="bold")
        figure.savefig(picture, dpi=120, facecolor="white")
        plt.close(figure)


def _panel(axis: Any, part: tables.Part, rows: tables.Rows) -> None:
    lines, columns, found = tables.cells(rows, part)
    numeric = all(line.isdigit() for line in lines)
    places = [int(line) for line in lines] if numeric else list(range(len(lines)))
    for index, column in enumerate(columns):
        points = [
            (place, found[line, column]) for place, line in zip(places, lines, strict=True) if (line, column) in found
        ]
        style: dict[str, Any] = {
            "color": COLOURS[index % 8],
            "marker": MARKERS[index % 8],
            "capsize": 3,
            "label": column,
        }
        at, middle = [place for place, _ in points], [mean(values) for _, values in points]
        errors = [tables.spread(values) for _, values in points]
        axis.errorbar(at, middle, errors, linestyle="-" if numeric else "none", **style)
    axis.set(title=part.heading, xlabel=part.line if numeric else "")
    axis.set_xticks(places, lines, **({} if numeric else {"rotation": 25, "ha": "right"}))
    if len(columns) > 1:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2 if len(columns) > 3 else 1)
