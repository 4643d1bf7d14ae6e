# SPDX-License-Identifier: Apache-2.0
"""From measured points to the table that the plan reads: limits of tokens, rates, the file's text, and points as CSV.

The same points always give the same text. What is measured, and when, is not here.
"""

from __future__ import annotations

import csv
import io
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.plan.levels import LEVELS
from benchmarks.plan.points import DTYPES, PRODUCTS, Point, Series
from benchmarks.plan.search import TIE

ALWAYS = sys.maxsize
#: Numbers of genes that have a limit; each stands for those above the one before it.
GENES = (1, 2, 4, 8, 12)
COLUMNS = ("level", "dtype", "product", "genes", "outputs", "inputs", "tokens", "rows_us", "panel_us")
FACTS = ("device", "threads", "torch", "pylearngene", "commit")
#: Level -> dtype -> product -> a limit for each of `GENES`.
Limits = dict[str, dict[str, dict[str, tuple[int, ...]]]]
#: Level -> dtype -> TFLOP/s in `rows` and in `panel`.
Rates = dict[str, dict[str, tuple[float, ...]]]

_MADE = (
    "Measured on {device}, {threads} threads, with torch {torch} and pylearngene {pylearngene}, commit {commit}. "
    "Levels below the best one of that processor are what its libraries do when they are kept from better instructions."
)
_HEAD = '''# SPDX-License-Identifier: Apache-2.0
"""Rows of x up to which `rows` is faster than `panel` on a CPU: written by `make plan`, not by hand.

{made}
"""

import sys

MEASURED_ON = "{short}, {threads} threads"
ALWAYS = sys.maxsize
#: Each of the limits below is for so many genes and those above the number before it; the last for all above, too.
GENES = {genes}
'''


def limits(points: Iterable[Point]) -> Limits:
    """The limits that lose least against the better regime of every point; levels without points are left out."""
    groups: dict[tuple[str, str, str], dict[int, list[Point]]] = {}
    for point in sorted(points):
        of = point.series
        groups.setdefault((of.level, of.dtype, of.product), {}).setdefault(of.genes, []).append(point)
    measured = [level for level in LEVELS if any(key[0] == level for key in groups)]
    return {
        level: {
            dtype: {
                product: tuple(limit(_nearest(groups[level, dtype, product], genes)) for genes in GENES)
                for product in PRODUCTS
            }
            for dtype in DTYPES
        }
        for level in measured
    }


def _nearest(known: Mapping[int, list[Point]], genes: int) -> list[Point]:
    """The points of so many genes; where there are none, those of the next fewer and of the next more together."""
    if genes in known:
        return known[genes]
    fewer, more = (max((k for k in known if k < genes), default=0), min((k for k in known if k > genes), default=0))
    return [*known.get(fewer, ()), *known.get(more, ())]


def rates(points: Iterable[Point]) -> Rates:
    """What the most tokens of every series reach; of a level and dtype the median."""
    most: dict[Series, Point] = {point.series: point for point in sorted(points)}
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for of, point in sorted(most.items()):
        flops = 2e-6 * math.prod(of.shape) * point.tokens
        found = groups.setdefault(of.level, {}).setdefault(of.dtype, [])
        found.append((flops / point.rows, flops / point.panel))
    return {
        level: {
            dtype: tuple(_shown(values) for values in zip(*groups[level][dtype], strict=True))
            for dtype in DTYPES
            if dtype in groups[level]
        }
        for level in LEVELS
        if level in groups
    }


def _shown(values: Iterable[float]) -> float:
    """A median of two digits."""
    return float(f"{median(values):.2g}")


def limit(points: Sequence[Point]) -> int:
    """The most tokens for which `rows` is to run; of limits that are as good, the largest."""
    tokens = sorted({point.tokens for point in points})
    best = min((0, *tokens), key=lambda most: (loss(points, most), -most))
    return ALWAYS if best == tokens[-1] else best


def loss(points: Iterable[Point], most: int) -> float:
    """How much a limit loses: squared logarithms of what the choice takes longer, where it is no tie."""
    total = 0.0
    for point in points:
        rows = point.tokens <= most
        total += max(0.0, math.log(point.regret(rows) / (TIE if rows else 1))) ** 2
    return round(total, 6)


def text(found: Limits, reached: Rates, facts: Mapping[str, object]) -> str:
    """The file that the plan reads.

    Args:
        found: the limits.
        reached: the rates.
        facts: on what they were measured.
    """
    lines = ["#: Instruction level -> dtype -> product -> limits.", "ROWS_UP_TO = {"]
    for level, dtypes in found.items():
        lines.append(f'    "{level}": {{')
        for dtype, products in dtypes.items():
            lines.append(f'        "{dtype}": {{')
            for product, values in products.items():
                shown = ", ".join("ALWAYS" if value == ALWAYS else str(value) for value in values)
                lines.append(f'            "{product}": ({shown}),')
            lines.append("        },")
        lines.append("    },")
    lines += ["}", "#: Instruction level -> dtype -> TFLOP/s of `rows` and of `panel` with many tokens.", "RATES = {"]
    for level, pairs in reached.items():
        lines.append(f'    "{level}": {{')
        lines += [f'        "{dtype}": ({rows:g}, {panel:g}),' for dtype, (rows, panel) in pairs.items()]
        lines.append("    },")
    made = textwrap.fill(_MADE.format(**facts), width=118)
    short = textwrap.shorten(str(facts["device"]), 60)
    return _HEAD.format(**facts, short=short, made=made, genes=GENES) + "\n".join(lines) + "\n}\n"


def points_csv(points: Iterable[Point], facts: Mapping[str, object]) -> str:
    """Points as CSV with the facts of the machine in every row."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*COLUMNS, *FACTS))
    writer.writerows((*_row(point), *(facts[name] for name in FACTS)) for point in points)
    return file.getvalue()


def read_points(path: Path) -> tuple[list[Point], dict[str, str]]:
    """The points of a CSV file and their facts, several values joined.

    Raises:
        ValueError: the file's head or a row of it is not as `points_csv` writes them.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
        if not rows or tuple(rows[0]) != (*COLUMNS, *FACTS):
            raise ValueError(f"{path}: expected the columns {', '.join((*COLUMNS, *FACTS))} and rows below them")
    points = [_point(path, row) for row in rows]
    return points, {name: ", ".join(dict.fromkeys(row[name] for row in rows)) for name in FACTS}


def _row(point: Point) -> tuple[object, ...]:
    of = point.series
    return of.level, of.dtype, of.product, of.genes, *of.shape, point.tokens, point.rows, point.panel


def _point(path: Path, row: Mapping[str, str]) -> Point:
    try:
        shape = int(row["outputs"]), int(row["inputs"])
        series = Series(row["level"], row["dtype"], row["product"], int(row["genes"]), shape)
        point = Point(series, int(row["tokens"]), float(row["rows_us"]), float(row["panel_us"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected numbers, got {row}") from error
    known = series.level in LEVELS and series.dtype in DTYPES and series.product in PRODUCTS
    if not known or not all(0 < time < math.inf for time in (point.rows, point.panel)) or None in row.values():
        raise ValueError(f"{path}: expected a level, a dtype, a product and times above 0, got {row}")
    return point
