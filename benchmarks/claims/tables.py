# SPDX-License-Identifier: Apache-2.0
"""The page of a study: one table per part, mean and spread over seeds, written from the CSV rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Part:
    """How one part of a study is laid out: what its lines and columns are, and its heading."""

    heading: str
    line: str
    column: Callable[[dict[str, str]], str] = lambda row: row["arm"]


def _arm_and_genes(row: dict[str, str]) -> str:
    return f"{row['genes']} gene{'s' if row['genes'] != '1' else ''}, {row['arm']}"


def _accuracy(_row: dict[str, str]) -> str:
    return "accuracy"


TITLES = {
    "tleg": "TLEG: descendants over depths",
    "ldr": "LDR: number of genes, basis, order of training",
    "sws": "SWS: one gene per stage",
}
LAYOUT = {
    ("tleg", "depths"): Part("Descendants and baselines", "depth"),
    ("ldr", "number of genes"): Part("Number of genes, Chebyshev basis", "genes"),
    ("ldr", "basis"): Part("Other bases, four genes, trained together", "arm", _accuracy),
    ("ldr", "phases"): Part("Genes trained in phases, earlier ones frozen", "genes"),
    ("ldr", "first genes"): Part("Descendants from the first genes of the last phase", "depth", _arm_and_genes),
    ("sws", "depths"): Part("Descendants and baselines", "depth"),
}
NETWORK = Part("Networks they come from", "arm", _accuracy)


def layout(row: dict[str, str]) -> Part:
    """How the part of a row is laid out."""
    return LAYOUT.get((row["study"], row["part"]), NETWORK)


def cells(rows: Rows, part: Part) -> tuple[list[str], list[str], dict[tuple[str, str], list[float]]]:
    """Lines, columns, and per cell the accuracies of all seeds in percent."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row[part.line], part.column(row)), []).append(100 * float(row["accuracy"]))
    lines = list(dict.fromkeys(line for line, _ in found))
    columns = list(dict.fromkeys(column for _, column in found))
    return sorted(lines, key=lambda line: int(line) if line.isdigit() else 0), columns, found


def parts(rows: Rows) -> list[tuple[Part, Rows]]:
    """The parts of a study in their order, those without a table of their own put together first."""
    grouped: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        grouped.setdefault(layout(row).heading, []).append(row)
    first = grouped.pop(NETWORK.heading, [])
    return [(NETWORK, first)] * bool(first) + [(layout(group[0]), group) for group in grouped.values()]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return stdev(values) if len(values) > 1 else 0.0


def page(rows: Rows) -> str:
    """The whole page in Markdown."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    stem = first["study"]
    text = [
        f"# {TITLES[stem]}",
        "",
        f"Test accuracy in percent on {first['data']}, mean ± standard deviation over {seeds} seeds fixed beforehand; "
        f"{int(first['train_images']):,} training and {int(first['test_images']):,} test images, networks of width "
        f"{first['width']}. Written by `python -m benchmarks.claims.{stem}`: torch {first['torch']}, pylearngene "
        f"{first['pylearngene']}, commit {first['commit']}, {first['processor']}, {first['threads']} thread"
        f"{'s' if first['threads'] != '1' else ''}. Every network and seed: [{stem}.csv]({stem}.csv).",
        "",
        f"![{TITLES[stem]}]({stem}.png)",
    ]
    for part, group in parts(rows):
        lines, columns, found = cells(group, part)
        text += ["", f"## {part.heading}", "", "| " + " | ".join([part.line, *columns]) + " |"]
        text.append("|" + "---|" * (len(columns) + 1))
        for line in lines:
            values = [found.get((line, column)) for column in columns]
            shown = ["" if v is None else f"{mean(v):.1f} ± {spread(v):.1f}" for v in values]
            text.append("| " + " | ".join([line, *shown]) + " |")
    return "\n".join([*text, ""])
