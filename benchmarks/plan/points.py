# SPDX-License-Identifier: Apache-2.0
"""One product of `expansion` in the regimes `rows` and `panel`: checked, then timed in turns.

Genes of several layers take turns, so that they come from the last cache as between the layers of a network. Where the
regimes cross is found elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

import pylearngene as plg
from benchmarks.cases import TOLERANCES, WrongResultError
from benchmarks.records import Others
from pylearngene import plan
from pylearngene._ops import expansion_regimes as regimes

REGIMES = ("rows", "panel")
PRODUCTS = ("y", "dx", "dw")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Bytes of all sets of genes together, and how many sets there are at most.
SPREAD, MOST_SETS = 8 << 20, 12
#: Seconds for the rounds of a point, and how many are made at least and at most.
SECONDS, FEWEST, MOST = 0.1, 3, 15
#: A point is measured again, so often at most, where a median is so many times its least, or others kept so many cores
#: busy meanwhile: between threads that wait for each other, one that has to share its core costs milliseconds.
ATTEMPTS, UNSTEADY, OTHERS = 4, 1.3, 0.2
#: Rows of a result that are compared with float64.
COMPARED = 8


@dataclass(frozen=True, order=True)
class Series:
    """Points that differ only in their tokens.

    Attributes:
        level: instruction level.
        dtype: "fp32", "bf16" or "fp16".
        product: "y", "dx" or "dw".
        genes: K.
        shape: [O, I].
    """

    level: str
    dtype: str
    product: str
    genes: int
    shape: tuple[int, int]


@dataclass(frozen=True, order=True)
class Point:
    """One measurement: microseconds of both regimes for M tokens, medians of interleaved rounds."""

    series: Series
    tokens: int
    rows: float
    panel: float

    def regret(self, rows: bool) -> float:
        """How many times longer than the better regime the chosen one takes."""
        return (self.rows if rows else self.panel) / min(self.rows, self.panel)


class Call:
    """Inputs of one product for M tokens, and the product in a regime.

    Args:
        series: what is computed.
        tokens: M.
    """

    def __init__(self, series: Series, tokens: int) -> None:
        generator, dtype, (rows, cols) = torch.Generator().manual_seed(0), DTYPES[series.dtype], series.shape
        self.series, self.tolerance = series, TOLERANCES[torch.bfloat16 if dtype.itemsize == 2 else dtype]
        size = rows * cols * dtype.itemsize * series.genes
        sets = max(1, min(SPREAD // size, MOST_SETS))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.genes = [[normal(rows, cols) for _ in range(series.genes)] for _ in range(sets)]
        self.coeffs = torch.rand(series.genes, generator=generator) + 0.5
        self.x, self.dy = normal(tokens, cols), normal(tokens, rows)
        self.buffers = [torch.zeros(rows, cols) for _ in range(series.genes)] if series.product == "dw" else []
        self.turn = cycle(self.genes)

    def run(self) -> Tensor:
        """The product, in the regime that is pinned; for dw the first gene's accumulator."""
        genes, product = next(self.turn), self.series.product
        if product == "y":
            return regimes.forward(self.x, genes, self.coeffs, None)
        if product == "dx":
            return regimes.input_gradient(self.dy, genes, self.coeffs)
        regimes.gene_gradients(self.buffers, self.dy, self.x, genes, self.coeffs, False)
        return self.buffers[0]

    def check(self) -> None:
        """Compare the first rows of what both regimes compute with float64.

        Raises:
            WrongResultError: they differ by more than the tolerance of the dtype.
        """
        few = slice(0, COMPARED)
        for regime in REGIMES:
            self.turn = cycle(self.genes)
            for buffer in self.buffers:
                buffer.zero_()
            with pinned(regime):
                got = self.run()[few].double()
            expected = self._expected(few)
            error = float((got - expected).abs().max() / expected.abs().max())
            if not error <= self.tolerance:  # so that NaN is refused too
                what = f"{self.series}, {len(self.x)} tokens, {regime}"
                raise WrongResultError(f"{what}: expected an error of at most {self.tolerance:g}, got {error:g}")

    def _expected(self, few: slice) -> Tensor:
        if self.series.product == "dw":
            return self.coeffs[0].double() * (self.dy[:, few].double().t() @ self.x.double())
        weight = sum(c * gene.double() for c, gene in zip(self.coeffs.tolist(), self.genes[0], strict=True))
        assert isinstance(weight, Tensor)
        return self.x[few].double() @ weight.t() if self.series.product == "y" else self.dy[few].double() @ weight


@contextmanager
def pinned(regime: str) -> Iterator[None]:
    """Pin a regime, and give back what was pinned before."""
    before = plan.pinned()
    plg.set_regime(regime)
    try:
        yield
    finally:
        plg.set_regime(before)


def measure(series: Series, tokens: int) -> Point:
    """Check a point and time it; one that is disturbed is timed again, and the least disturbed times count.

    Raises:
        WrongResultError: a regime computes something wrong.
    """
    call = Call(series, tokens)
    call.check()
    attempts = []
    for _ in range(ATTEMPTS):
        others = Others()
        times = interleaved(dict.fromkeys(REGIMES, call.run))
        busy, unsteady = others.cores() or 0.0, max(median(kept) / min(kept) for kept in times.values())
        attempts.append((max(busy / OTHERS, unsteady / UNSTEADY), times))
        if attempts[-1][0] <= 1:
            break
        time.sleep(SECONDS)
    _, calm = min(attempts, key=lambda attempt: attempt[0])
    return Point(series, tokens, *(round(median(calm[regime]), 1) for regime in REGIMES))


def interleaved(calls: dict[str, Callable[[], object]], seconds: float = SECONDS) -> dict[str, list[float]]:
    """Microseconds of every round per regime, in turns; a call of another name than a regime's runs unpinned."""
    run = {name: partial(_timed, name, call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in run}
    for once in run.values():
        once()
    end = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for name in sorted(run, reverse=bool(turn % 2)):
            times[name].append(run[name]())
    return times


def _timed(regime: str, call: Callable[[], object]) -> float:
    with pinned(regime if regime in REGIMES else "auto"):
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1000
