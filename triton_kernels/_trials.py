# SPDX-License-Identifier: Apache-2.0
"""What tuning launches: each use of a kernel on memory of its own, and what it must compute, in float64.

Gradients go to scratch accumulators. Which launches are compared is in `tuning`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from pylearngene.triton_kernels import expansion
from torch import Tensor

# Of the largest element: float32 sums of a few thousand terms, and what is written rounded once.
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_GRADIENT_TOLERANCE = 1e-3
# Of the root of the sum of squares that a dot product adds up: far below what one tile left out would make.
_DOT_TOLERANCE = 1e-2
# What accumulators hold before: a launch adds to it.
_START = 0.5
_PANEL_BYTES = 24 << 20


@dataclass(frozen=True)
class Trial:
    """One use of a kernel.

    Attributes:
        form: "forward" or "dx" of `fused`, "dots" or "no dots" of gradients, "window" of synthesis.
        tokens: M; 0 where there are none.
        outs: O.
        inner: I.
    """

    form: str
    tokens: int
    outs: int
    inner: int

    def __str__(self) -> str:
        tokens = f" of {self.tokens} tokens" if self.tokens else ""
        return f"{self.form}{tokens}, {self.outs} x {self.inner}"


class Problem(ABC):
    """Memory for a trial: genes, coefficients, and what the kernel reads and writes besides."""

    def __init__(self, trial: Trial, genes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.trial, self.dtype = trial, dtype
        self._generator = torch.Generator(device).manual_seed(0)
        self.genes = [self._draw(trial.outs, trial.inner).mul_(trial.inner**-0.5) for _ in range(genes)]
        self.coeffs = torch.tensor([1.0 - 0.6 * k / genes for k in range(genes)], device=device)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device).to(self.dtype)

    def _weight(self) -> Tensor:
        """`sum_k c_k G_k` in float64."""
        total = torch.zeros_like(self.genes[0], dtype=torch.float64)
        for gene, coeff in zip(self.genes, self.coeffs.tolist(), strict=True):
            total.add_(gene.double(), alpha=coeff)
        return total

    @property
    @abstractmethod
    def expected(self) -> dict[str, tuple[Tensor, float]]:
        """Per result its value in float64 and the error allowed."""

    @abstractmethod
    def launch(self) -> object:
        """Launch the kernel once."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """Launch on fresh memory, outputs full of NaN, and return copies of what was written."""

    def held_bytes(self) -> int:
        """Bytes of all tensors."""
        found = [value if isinstance(value, list) else [value] for value in vars(self).values()]
        return sum(one.numel() * one.element_size() for some in found for one in some if isinstance(one, Tensor))


class Product(Problem):
    """`y = x W^T`, or `dx = dy W`."""

    def __init__(self, trial: Trial, genes: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(trial, genes, dtype, device)
        ways = (trial.inner, trial.outs) if trial.form == "forward" else (trial.outs, trial.inner)
        self.x = self._draw(trial.tokens, ways[0])
        self.y = self.x.new_empty((trial.tokens, ways[1]))
        self.seen = self.genes if trial.form == "forward" else [gene.t() for gene in self.genes]

    @cached_property
    def expected(self) -> dict[str, tuple[Tensor, float]]:
        weight = self._weight()
        y = self.x.double() @ (weight.t() if self.trial.form == "forward" else weight)
        return {"y": (y, _TOLERANCES[self.dtype] * float(y.abs().max()))}

    def launch(self) -> object:
        return expansion.product(self.y, self.x, self.seen, self.coeffs)

    def results(self) -> dict[str, Tensor]:
        self.y.fill_(torch.nan)
        self.launch()
        return {"y": self.y.clone()}


class Synthesis(Problem):
    """A window of W, of a panel's size."""

    def __init__(self, trial: Trial, genes: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(trial, genes, dtype, device)
        self.out = self.genes[0].new_empty((_panel_rows(self.genes[0]), trial.inner))

    @cached_property
    def expected(self) -> dict[str, tuple[Tensor, float]]:
        weight = self._weight()[: len(self.out)]
        return {"weight": (weight, _TOLERANCES[self.dtype] * float(weight.abs().max()))}

    def launch(self) -> object:
        return expansion.fill(self.out, self.genes, self.coeffs)

    def results(self) -> dict[str, Tensor]:
        self.out.fill_(torch.nan)
        self.launch()
        return {"weight": self.out.clone()}


class Gradients(Problem):
    """`buffer_k += c_k dW` and `<dW, G_k>`, for dW from dy and x, or from a panel of it."""

    def __init__(self, trial: Trial, genes: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(trial, genes, dtype, device)
        self.dots = trial.form == "dots"
        self.dy = self._draw(trial.tokens, trial.outs) if trial.tokens else None
        self.x = self._draw(trial.tokens, trial.inner) if trial.tokens else None
        self.panel = None if trial.tokens else self._draw(_panel_rows(self.genes[0]), trial.inner)
        self.buffers = [torch.full_like(gene, _START, dtype=torch.float32) for gene in self.genes]

    @cached_property
    def expected(self) -> dict[str, tuple[Tensor, float]]:
        dw = torch.zeros_like(self.genes[0], dtype=torch.float64)
        if self.panel is not None:
            dw[: len(self.panel)] = self.panel
        elif self.dy is not None and self.x is not None:
            dw = self.dy.double().t() @ self.x.double()
        wanted = {}
        for k, coeff in enumerate(self.coeffs.tolist()):
            buffer = _START + coeff * dw
            wanted[f"buffer {k}"] = (buffer, _GRADIENT_TOLERANCE * float(buffer.abs().max()))
            if self.dots:
                terms = dw * self.genes[k].double()
                wanted[f"dot {k}"] = (terms.sum(), _DOT_TOLERANCE * float(terms.square().sum().sqrt()))
        return wanted

    def launch(self) -> Tensor | None:
        sums: Tensor | None
        if self.panel is not None:
            sums = expansion.accumulate(self.panel, self.genes, self.coeffs, self.buffers, 0, self.dots)
        else:
            sums = expansion.gene_gradients(self.buffers, self.dy, self.x, self.genes, self.coeffs, self.dots)
        return sums

    def results(self) -> dict[str, Tensor]:
        for buffer in self.buffers:
            buffer.fill_(_START)
        sums = self.launch()
        found = {f"buffer {k}": buffer.clone() for k, buffer in enumerate(self.buffers)}
        return found if sums is None else found | {f"dot {k}": value for k, value in enumerate(sums)}


PROBLEMS = {"fused": Product, "synthesize": Synthesis, "gene_gradients": Gradients, "accumulate": Gradients}


def wrong(problem: Problem) -> str:
    """What is wrong with two launches of the kernel; empty if both are right, with equal bits."""
    first, second = problem.results(), problem.results()
    for name, (value, allowed) in problem.expected.items():
        if name not in first:
            return f"{name} is missing"
        error = float((first[name].double() - value).abs().max())
        if not error <= allowed:  # so that NaN is refused too
            return f"{name} is wrong by {error:.3g}, {allowed:.3g} is allowed"
        if not torch.equal(first[name], second[name]):
            return f"{name} differs between two launches"
    return ""


def _panel_rows(gene: Tensor) -> int:
    """Rows of W that the workspace of a GPU holds."""
    return min(gene.shape[0], max(1, _PANEL_BYTES // (gene.shape[1] * gene.element_size())))
