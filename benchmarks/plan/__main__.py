# SPDX-License-Identifier: Apache-2.0
"""`make plan`: measures every series of points at every instruction level that this processor has, writes the table.

A level below the best one runs in a process whose libraries are kept from better instructions. What is measured is
kept in a file, so that a run may end after some seconds and another go on; the table is written when all is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # last, so that an installed pylearngene is the one measured

from benchmarks.plan import levels, search, table
from benchmarks.plan import points as timed
from benchmarks.plan.points import Point, Series
from benchmarks.records import file_name, machine_facts
from pylearngene import _backends
from pylearngene.files import write_atomic
from pylearngene.plan.cpu_rows import RATES, ROWS_UP_TO

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = REPOSITORY / "pylearngene" / "plan" / "cpu_rows.py"
RESULTS = REPOSITORY / "benchmarks" / "results"
#: [O, I] of the layers that are measured: expanding and contracting, within and above what the second cache keeps.
SHAPES = ((1152, 384), (768, 3072))
#: Numbers of genes that are measured at levels below the best.
BELOW = (2, 12)


def all_series(level: str, best: str) -> list[Series]:
    """What is measured at a level, on a processor whose best level is known."""
    return [
        Series(level, dtype, product, genes, shape)
        for dtype in timed.DTYPES
        for product in timed.PRODUCTS
        for genes in (table.GENES if level == best else BELOW)
        for shape in SHAPES
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 3 where something is left to be measured."""
    options = _parser().parse_args(arguments)
    if options.level:
        return _measure_level(options.level, options.best or options.level, options.points, options.seconds)
    end = time.monotonic() + options.seconds
    best = _backends.LEVEL_NAME
    for level in levels.here():
        if _missing(level, best, options.points):
            seconds = str(max(0.0, end - time.monotonic()))
            given = ("--best", best, "--points", str(options.points), "--seconds", seconds)
            levels.run(level, __file__, "--level", level, *given)
    left = sum(len(_missing(level, best, options.points)) for level in levels.here())
    if left:
        print(f"{left} series are left: run again, what is measured is kept in {options.points}")
        return 3
    write_table(options.points, options.out)
    kept = RESULTS / f"plan-{file_name(machine_facts())}.csv" if options.out == TABLE else None
    if kept is not None:
        write_atomic(kept, options.points.read_bytes())
    print(*(path for path in (options.out, kept) if path is not None), sep="\n")
    return 0


def write_table(points: Path, out: Path) -> None:
    """Generate the table from a file of points; levels without points keep the limits that the plan has."""
    measured, facts = table.read_points(points)
    found, reached = {**ROWS_UP_TO, **table.limits(measured)}, {**RATES, **table.rates(measured)}
    write_atomic(out, table.text(found, reached, facts).encode())


def _missing(level: str, best: str, path: Path) -> list[Series]:
    done = {point.series for point in table.read_points(path)[0]} if path.exists() else set()
    return [series for series in all_series(level, best) if series not in done]


def _measure_level(level: str, best: str, path: Path, seconds: float) -> int:
    """Measure what is missing at the level of this process, as long as the time lasts."""
    if level != _backends.LEVEL_NAME:
        print(f"--level: expected {_backends.LEVEL_NAME}, which this process runs at, got {level}", file=sys.stderr)
        return 2
    end, facts = time.monotonic() + seconds, machine_facts()
    path.parent.mkdir(parents=True, exist_ok=True)
    for series in _missing(level, best, path):
        if time.monotonic() > end:
            break
        found = [Point(series, *point) for point in search.search(lambda tokens, of=series: _times(of, tokens))]
        rows = table.points_csv(found, facts)
        with path.open("a", encoding="utf-8") as file:
            file.write(rows.split("\n", 1)[1] if file.tell() else rows)
        print(_line(series, found), flush=True)
    return 0


def _times(series: Series, tokens: int) -> tuple[float, float]:
    point = timed.measure(series, tokens)
    return point.rows, point.panel


def _line(series: Series, found: Sequence[Point]) -> str:
    """One series: the limit that suits it alone, and panel's time as a multiple of rows' for every number of tokens."""
    limit = table.limit(found)
    ratios = "  ".join(f"{point.tokens}: {point.panel / point.rows:.2f}" for point in found)
    name = f"{series.level} {series.dtype} {series.product} K{series.genes} {series.shape[0]} x {series.shape[1]}"
    return f"{name:<38} {'always' if limit == table.ALWAYS else limit:>6}   {ratios}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="Measure, then write the CPU table.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no series after so many seconds")
    parser.add_argument("--points", type=Path, default=REPOSITORY / "build" / "plan.csv", help="what is measured")
    parser.add_argument("--out", type=Path, default=TABLE, help="file of the table")
    parser.add_argument("--level", default="", help=argparse.SUPPRESS)
    parser.add_argument("--best", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
