# SPDX-License-Identifier: Apache-2.0
"""How good the plan's choice is on 40 calls that its table was not made from: other sizes, odd ones among them.

Each is timed in both regimes at every instruction level of this processor; the table and its points are left alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).parents[2]))  # last, so that an installed pylearngene is the one measured

from benchmarks.plan import levels
from benchmarks.plan.points import DTYPES, PRODUCTS, Point, Series, measure
from benchmarks.records import Row, file_name, machine_facts, read_csv, write_csv
from pylearngene import _backends, plan

RESULTS = Path(__file__).resolve().parents[1] / "results"
COUNT, SEED = 40, 20
#: bfloat16 most often: where a processor has instructions for it, both regimes win somewhere.
TURNS = ("bf16", "fp32", "bf16", "fp16")
#: What a choice may take longer than the better regime, as a share of it.
ALLOWED = 0.10
#: Multiplications of a call at most, so that all of them take about a minute.
MOST_WORK = 1_000_000_000
COLUMNS = (
    "product", "dtype", "genes", "outputs", "inputs", "tokens", "rows_us", "panel_us", "chosen", "ratio",
    "device", "cpu_level", "threads", "torch", "pylearngene", "commit",
)  # fmt: skip


def cases(level: str) -> list[tuple[Series, int]]:
    """Calls drawn once and for all: dtypes and products in turns, sizes and tokens evenly by their logarithms."""
    draw, found = random.Random(SEED), []
    while len(found) < COUNT:
        dtype, product = TURNS[len(found) % len(TURNS)], PRODUCTS[len(found) // len(TURNS) % len(PRODUCTS)]
        shape = _size(draw, 96, 3500), _size(draw, 96, 3500)
        genes, tokens = draw.choice((1, 2, 2, 3, 4, 5, 6, 8, 12)), _size(draw, 1, 3000)
        if shape[0] * shape[1] * tokens <= MOST_WORK:
            found.append((Series(level, dtype, product, genes, shape), tokens))
    return found


def _size(draw: random.Random, least: int, most: int) -> int:
    """Odd as often as a multiple of 8."""
    size = round(least * (most / least) ** draw.random())
    return size if draw.random() < 0.5 or size < 8 else size // 8 * 8


def chosen(series: Series, tokens: int) -> str:
    """The regime of the plan."""
    dtype = DTYPES[series.dtype]
    return plan.choose(
        tokens, "cpp", dtype.itemsize, series.genes,
        arch=series.level, product=series.product, float16=series.dtype == "fp16",
    )  # fmt: skip


def ratio(point: Point) -> float:
    """How many times longer than the better regime the chosen one takes."""
    return point.regret(chosen(point.series, point.tokens) == "rows")


def summary(found: Sequence[Point]) -> str:
    """How many choices are within what is allowed, and the worst."""
    within = sum(ratio(point) <= 1 + ALLOWED for point in found)
    worst = max(found, key=ratio)
    return (
        f"{within} of {len(found)} choices ({within / len(found):.0%}) within {ALLOWED:.0%} of the better regime; "
        f"the worst takes {ratio(worst):.2f} times as long: {named(worst)}"
    )


def named(point: Point) -> str:
    """One call for people."""
    of = point.series
    return f"{of.product} {of.dtype} K{of.genes} {of.shape[0]} x {of.shape[1]}, {point.tokens} tokens"


def rows_of(found: Sequence[Point]) -> list[Row]:
    """All calls with the facts of the machine."""
    facts, rows = machine_facts(), []
    for point in found:
        of = point.series
        values = (
            of.product, of.dtype, of.genes, *of.shape, point.tokens, point.rows, point.panel,
            chosen(of, point.tokens), f"{ratio(point):.3f}",
        )  # fmt: skip
        rows.append({**dict(zip(COLUMNS, values, strict=False)), **{name: facts[name] for name in COLUMNS[10:]}})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 where there are no native kernels to choose for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan.held_out", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result (default: benchmarks/results)")
    parser.add_argument("--level", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if _backends.native() is None:
        print(f"{_backends._reason}\nwithout the native module there is one regime only", file=sys.stderr)
        return 1
    if options.level is not None:
        write_csv(_measured(), options.level, COLUMNS)
        return 0
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        for level in levels.here():
            part = Path(folder) / f"{level}.csv"
            levels.run(level, __file__, "--level", str(part))
            rows += read_csv(part)
    path = options.out / f"held-out-{file_name(machine_facts())}.csv"
    write_csv(rows, path, COLUMNS)
    print(path)
    return 0


def _measured() -> list[Row]:
    """The calls at the level of this process."""
    found = []
    for series, tokens in cases(_backends.LEVEL_NAME):
        found.append(point := measure(series, tokens))
        print(f"{named(point):<44} {chosen(series, tokens):<6} {ratio(point):.2f}", flush=True)
    print(f"{_backends.LEVEL_NAME}: {summary(found)}", flush=True)
    return rows_of(found)


if __name__ == "__main__":
    sys.exit(main())
