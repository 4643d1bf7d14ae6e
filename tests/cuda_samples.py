# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA kernel for few tokens: sizes, dtypes and layouts, with guards around memory, and their oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ((F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))
GUARD = 37  # elements before and behind every tensor


@dataclass(frozen=True)
class Case:
    """One call; strides and offsets count elements, `extra` is how much longer than its content a row is."""

    x: torch.dtype
    gene: torch.dtype
    tokens: int = 1
    out: int = 9
    inner: int = 64
    count: int = 2
    bias: str = "none"  # none, plain, or the dtype of bias genes
    extra: int = 0
    offset: int = 0


def cases() -> Iterator[Case]:
    """All dtypes with every K and M, odd sizes, odd addresses, long rows and every kind of bias."""
    for x, gene in PAIRS:
        for count in range(1, 9):
            for tokens in (1, 2, 3, 4, 5, 8, 9, 16):
                yield Case(x, gene, tokens, count=count)
        plain = Case(x, gene, 3)
        yield from (replace(plain, inner=inner, count=3) for inner in (1, 7, 17, 96, 97))
        yield from (replace(plain, out=out, tokens=9) for out in (1, 2, 4, 29))
        yield from (replace(plain, extra=extra) for extra in (1, 2, 8, 16))
        yield from (replace(plain, offset=offset) for offset in (1, 2, 4, 8))
        yield from (replace(plain, bias=bias) for bias in ("plain", "float32", "bfloat16", "float16"))
        yield from (replace(plain, bias=bias, inner=0) for bias in ("none", "plain", "float32"))
        yield replace(plain, inner=2336, tokens=2, out=3, bias="plain")
        yield replace(plain, inner=2337, tokens=16, out=3, count=8)


def place(values: Tensor, device: torch.device, extra: int = 0, offset: int = 0) -> Tensor:
    """The same values in the middle of memory that is NaN otherwise, with rows that are `extra` longer."""
    rows, cols = values.shape
    buffer = values.new_full((2 * GUARD + 64 + rows * (cols + extra),), float("nan"), device=device)
    start = -(-GUARD // 16) * 16 + offset  # of allocations aligned to 64 bytes
    view = buffer.as_strided((rows, cols), (cols + extra, 1), start)
    view.copy_(values)
    return view


def outside(view: Tensor) -> Tensor:
    """The memory around a placed tensor, as bits."""
    whole = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).clone()
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return whole.view(torch.int32 if view.element_size() == 4 else torch.int16)


@dataclass
class Call:
    """The arguments of a case on a device, and what y may be at most away from."""

    y: Tensor
    x: Tensor
    genes: list[Tensor]
    coeffs: Tensor
    bias: Tensor | None
    bias_genes: list[Tensor]

    def run(self, function: Callable[..., object]) -> object:
        return function(self.y, self.x, self.genes, self.coeffs, self.bias, self.bias_genes)

    def error(self) -> float:
        """The largest error as a share of what rounding allows; the oracle is float64 from end to end."""
        x, y, c = self.x.double(), self.y.double(), self.coeffs.double()
        genes, single, unit = torch.stack(self.genes).double(), 2.0**-24, torch.finfo(self.x.dtype).eps / 2
        weight, sizes = torch.einsum("k,koi->oi", c, genes), torch.einsum("k,koi->oi", c.abs(), genes.abs())
        bias = x.new_zeros(y.shape[1])
        if self.bias is not None:
            bias = self.bias.double()
        elif self.bias_genes:
            bias = sum(c[k] * gene.double() for k, gene in enumerate(self.bias_genes))
        expected = x @ weight.T + bias
        bound = unit * (expected.abs() + x.abs() @ weight.abs().T + 2 * bias.abs())
        bound += (x.shape[1] + len(self.genes) + 4) * single * (x.abs() @ sizes.T + bias.abs())
        return float(((y - expected).abs() / (bound + 1e-7)).max())


def draw(case: Case, device: torch.device, seed: int = 0) -> Call:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    layout = {"device": device, "extra": case.extra, "offset": case.offset}
    x = place(normal(case.tokens, case.inner, dtype=case.x), **layout)
    genes = [place(normal(case.out, case.inner, dtype=case.gene), **layout) for _ in range(case.count)]
    y = place(torch.zeros(case.tokens, case.out, dtype=case.x), device, extra=5)
    bias, bias_genes = None, []
    if case.bias == "plain":
        bias = normal(case.out, dtype=case.x).to(device)
    elif case.bias != "none":
        columns = normal(case.out, 2, case.count, dtype=getattr(torch, case.bias)).to(device)
        bias_genes = [columns[:, 0, k] for k in range(case.count)]
    coeffs = normal(case.count, dtype=F32).to(device)
    return Call(y.fill_(float("nan")), x, genes, coeffs, bias, bias_genes)
