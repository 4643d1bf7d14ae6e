# SPDX-License-Identifier: Apache-2.0
"""What the tests of Triton kernels share: the device, dtypes and tolerances, drawn genes, layouts, guarded memory.

No test stands here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
# The fused kernels multiply 16 bits on a GPU; the interpreter shows their logic in float32 as well.
PRODUCTS = HALVES if DEVICE == "cuda" else (torch.float32, *HALVES)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 1, 1), (2, 7, 13), (37, 31, 17), (70, 45, 67), (16, 64, 48), (128, 33, 96)]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def genes_of(count: int, out: int, inner: int, dtype: torch.dtype) -> list[Tensor]:
    return [draw(out, inner).div(max(1, inner) ** 0.5).to(dtype) for _ in range(count)]


def total(genes: list[Tensor], coeffs: Tensor) -> Tensor:
    return torch.einsum("k,k...->...", coeffs.double(), torch.stack([gene.double() for gene in genes]))


def near(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    """The largest error against the largest value: sums of many terms have no meaningful relative error each."""
    assert got.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max().clamp(min=1.0)
        assert (got.double() - expected).abs().max() <= factor * TOLERANCE[dtype] * scale


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "row of ones": lambda t: t[:1].expand_as(t),
    "column of ones": lambda t: t[:, :1].expand_as(t),
    "cut of a cat": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "offset 1": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view_as(t),
    "offset 7": lambda t: torch.cat([t.new_zeros(7), t.reshape(-1)])[7:].view_as(t),
    "every second": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
}


def guarded(rows: int, cols: int, dtype: torch.dtype, value: float = float("nan")) -> tuple[Tensor, Tensor]:
    """A matrix of `value` with 64 marks before and after it, and all of that."""
    whole = torch.full((rows * cols + 128,), 7.0, dtype=dtype, device=DEVICE)
    inside = whole[64 : 64 + rows * cols].view(rows, cols)
    inside.fill_(value)
    return inside, whole


def guards_hold(whole: Tensor) -> bool:
    return bool((whole[:64] == 7).all() and (whole[-64:] == 7).all())
