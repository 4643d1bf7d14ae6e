# SPDX-License-Identifier: Apache-2.0
"""Products of `expansion` in every regime, for tests of how they run: small on the CPU, large enough for a GPU on one.

Also streams, graphs and delays that are nothing on the CPU, so that every test shows there that it says what it means.
Which test asks what is in the `test_running_*` files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pylearngene as plg
from pylearngene import _backends
from pylearngene._ops import expansion_regimes

HALVES = (torch.bfloat16, torch.float16)
#: Rows of x, O, I by device and by what is to happen: the regime, `rows` with a sum that Triton splits, or panels that
#: take turns on two streams.
SIZES = {
    "cpu": {
        "rows": (4, 24, 40),
        "split": (20, 24, 40),
        "fused": (70, 24, 40),
        "panel": (9, 530, 513),
        "turns": (40, 24, 40),
    },
    "cuda": {
        "rows": (8, 768, 1024),
        "split": (40, 768, 1024),
        "fused": (300, 768, 1024),
        "panel": (3000, 768, 1024),
        "turns": (8192, 4096, 4096),
    },
}
KINDS = tuple(SIZES["cuda"])


@dataclass
class Work:
    """All tensors of one product, and an upstream gradient.

    Attributes:
        x, genes, coeffs, biases: each a leaf that requires a gradient.
        dy: `[M, O]`.
    """

    x: Tensor
    genes: list[Tensor]
    coeffs: Tensor
    biases: list[Tensor]
    dy: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.genes, self.coeffs, *self.biases]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.leaves, self.dy]

    def forward(self) -> Tensor:
        return plg.functional.expansion_linear(self.x, self.genes, self.coeffs, self.biases)

    def step(self) -> list[Tensor]:
        """The result and the gradient of every leaf."""
        y = self.forward()
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    def empty(self) -> Work:
        """The same with NaN in the place of all values."""
        return self._mapped(lambda tensor: torch.full_like(tensor, torch.nan))

    def copy(self) -> Work:
        return self._mapped(torch.clone)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Work:
        def leaf(tensor: Tensor) -> Tensor:
            return change(tensor.detach()).requires_grad_()

        genes, biases = [leaf(gene) for gene in self.genes], [leaf(bias) for bias in self.biases]
        return Work(leaf(self.x), genes, leaf(self.coeffs), biases, change(self.dy))

    def fill(self, other: Work) -> None:
        """Take the values of another one."""
        with torch.no_grad():
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine.copy_(theirs)


def work(where: torch.device, kind: str, dtype: torch.dtype, genes: int = 4) -> Work:
    """Random values; x and genes in one dtype."""
    tokens, out, inner = SIZES[where.type][kind]

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=where).to(to).requires_grad_()

    stored = [draw(out, inner).detach().div(inner**0.5).requires_grad_() for _ in range(genes)]
    biases = [draw(out) for _ in range(genes)]
    coeffs = draw(genes, to=torch.float64 if dtype == torch.float64 else torch.float32)
    return Work(draw(tokens, inner), stored, coeffs, biases, draw(tokens, out).detach())


def really(case: Work, kind: str) -> bool:
    """Whether a product on a GPU is computed as its size was meant to have it: chips have limits of their own."""
    if _backends.implementation(case.x.device) == "reference":
        return kind == "panel"
    if kind == "turns":
        (rows, cols), count = case.genes[0].shape, len(case.genes)
        return expansion_regimes._count(case.x, rows, cols, count) > 1
    regime = "rows" if kind == "split" else kind
    return case.x.element_size() != 2 or expansion_regimes.regime_of(case.x, case.genes) == regime


def stream_of(where: torch.device) -> Any:
    """A new stream of a GPU; None on the CPU."""
    return torch.cuda.Stream(where) if where.type == "cuda" else None


def current(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def delay(where: torch.device) -> None:
    """Keep the current stream busy for some milliseconds, so that whoever does not wait for it comes too early."""
    if where.type == "cuda":
        torch.cuda._sleep(20_000_000)


def finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def recorded(where: torch.device, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What a call gave while it was captured, and what computes it once more in the same memory.

    On the CPU nothing is captured: the call is made again, and what it gives is copied into what it gave.
    """
    if where.type == "cuda":
        warm = torch.cuda.Stream(where)
        warm.wait_stream(torch.cuda.current_stream(where))
        with torch.cuda.stream(warm):
            for _ in range(3):
                call()
        torch.cuda.current_stream(where).wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = call()
        return given, graph.replay
    given = call()

    def again() -> None:
        for old, new in zip(given, call(), strict=True):
            old.copy_(new)

    return given, again


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit; NaN equals nothing."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
