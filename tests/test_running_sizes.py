# SPDX-License-Identifier: Apache-2.0
"""Large products on a GPU: peaks of memory that hold no weight, and tensors of more than 2^31 elements.

The CPU runs the same tests on small ones. Offsets of single kernels are in the tests of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from running_samples import HALVES
from torch import Tensor

import pylearngene as plg
from pylearngene import plan
from pylearngene.functional import expansion_linear
from pylearngene.training.memory import peak_bytes

MIB = 1 << 20
#: A weight of 16 bits: 64 MiB on a GPU, 2 MiB on the CPU.
SHAPE = {"cpu": (1024, 1024), "cuda": (4096, 8192)}
TOKENS = {"cpu": (40,), "cuda": (8, 64, 512, 8192)}
#: What may be there besides: results, panels, sums of a split product, row dots, and roundings of the allocator.
SLACK = 4 * MIB


@pytest.fixture
def regime() -> Iterator[None]:
    yield
    plg.set_regime("auto")


def operands(where: torch.device, tokens: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    out, inner = SHAPE[where.type]
    x = torch.randn(tokens, inner, device=where).to(dtype).requires_grad_()
    genes = [torch.randn(out, inner, device=where).div(inner**0.5).to(dtype).requires_grad_() for _ in range(2)]
    dy = torch.randn(tokens, out, device=where).to(dtype)
    return x, genes, torch.tensor([1.0, 0.5], device=where).requires_grad_(), dy


@pytest.mark.parametrize("regime_name", ["auto", "panel"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_peaks_hold_no_weight(where: torch.device, dtype: torch.dtype, regime_name: str, regime: None) -> None:
    """Forward: the result and a workspace. Backward: gradients, accumulators in float32, and a workspace."""
    plg.set_regime(regime_name)
    panel = plan.GPU_PANEL_BYTES if where.type == "cuda" else plan.PANEL_BYTES
    for tokens in TOKENS[where.type]:
        x, genes, coeffs, dy = operands(where, tokens, dtype)
        leaves = [x, *genes, coeffs]

        def forward(x: Tensor = x, genes: list[Tensor] = genes, coeffs: Tensor = coeffs) -> Tensor:
            return expansion_linear(x, genes, coeffs)

        def dense(x: Tensor = x, genes: list[Tensor] = genes, coeffs: Tensor = coeffs) -> Tensor:
            return F.linear(x, (coeffs[0] * genes[0] + coeffs[1] * genes[1]).to(x.dtype))

        excess = []
        for call in (forward, dense):
            y = call()
            torch.autograd.grad(y, leaves, dy, retain_graph=True)  # a BLAS takes its workspace at its first product
            extra = peak_bytes(call, where) - dy.nbytes
            owed = x.nbytes + sum(gene.nbytes for gene in genes)
            if dtype != torch.float32:
                owed += sum(gene.numel() * 4 for gene in genes)
            backward = peak_bytes(
                lambda y=y, dy=dy, of=leaves: torch.autograd.grad(y, of, dy, retain_graph=True), where
            )
            excess.append((extra, backward - owed))
        assert max(excess[0]) <= panel + SLACK, (tokens, excess)
        assert excess[1][0] > min(panel + SLACK, genes[0].nbytes - 1), "the dense product shows that the bound binds"


def room(where: torch.device, size: int) -> None:
    """Skip where a GPU has not so many bytes free."""
    if where.type == "cuda" and torch.cuda.mem_get_info(where)[0] < size:
        pytest.skip(f"needs {size >> 30} GiB of free memory")


@pytest.mark.parametrize("regime_name", ["fused", "panel"])
@pytest.mark.parametrize(("out", "inner"), [(64, 512), (512, 64)])
def test_more_than_two_to_the_31_elements_of_x_or_y(
    where: torch.device, out: int, inner: int, regime_name: str, regime: None
) -> None:
    """All rows but the last are 0: those must come out right, and nothing may be written over them."""
    plg.set_regime(regime_name)
    room(where, 40 << 30)
    tokens, last = ((1 << 31) // 512 if where.type == "cuda" else 1 << 12) + 70, 65
    genes = [torch.randn(out, inner, device=where).div(inner**0.5).bfloat16().requires_grad_() for _ in range(2)]
    coeffs = torch.tensor([1.0, -0.5], device=where)
    x = torch.zeros(tokens, inner, device=where, dtype=torch.bfloat16)
    dy = torch.zeros(tokens, out, device=where, dtype=torch.bfloat16)
    x[-last:], dy[-last:] = (torch.randn(last, width, device=where) for width in (inner, out))
    x.requires_grad_()
    y = expansion_linear(x, genes, coeffs)
    dx, *dgenes = torch.autograd.grad(y, [x, *genes], dy)
    weight = genes[0].detach().double() - 0.5 * genes[1].detach().double()
    end, upstream = x.detach()[-last:].double(), dy[-last:].double()
    for found, expected in (
        (y.detach()[-last:], end @ weight.t()),
        (dx[-last:], upstream @ weight),
        (dgenes[0], upstream.t() @ end),
        (dgenes[1], -0.5 * upstream.t() @ end),
    ):
        assert (found.double() - expected).abs().max() <= 2e-2 * expected.abs().max()
    for found in (y.detach(), dx):
        assert not any(part.any() for part in found[:-last].split(1 << 20))


@pytest.mark.parametrize("regime_name", ["rows", "fused", "panel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_two_to_the_31_elements_of_a_gene(
    where: torch.device, dtype: torch.dtype, regime_name: str, regime: None
) -> None:
    """Two genes that are 0 but for their last rows, on the way there and back."""
    plg.set_regime(regime_name)
    inner = 1 << 15 if where.type == "cuda" else 64
    out, last = ((1 << 31) // inner if where.type == "cuda" else 128) + 16, 16
    room(where, 8 * out * inner * 4)
    genes = [torch.zeros(out, inner, device=where, dtype=dtype) for _ in range(2)]
    for gene in genes:
        gene[-last:] = torch.randn(last, inner, device=where) / inner**0.5
        gene.requires_grad_()
    coeffs = torch.tensor([1.0, -0.5], device=where)
    x = torch.randn(8, inner, device=where).to(dtype).requires_grad_()
    dy = torch.zeros(8, out, device=where, dtype=dtype)
    dy[:, -last:] = torch.randn(8, last, device=where)
    weight = genes[0].detach()[-last:].double() - 0.5 * genes[1].detach()[-last:].double()
    y = expansion_linear(x, genes, coeffs)
    (dx, dgene) = torch.autograd.grad(y, [x, genes[1]], dy)
    upstream = dy[:, -last:].double()
    for found, expected in (
        (y.detach()[:, -last:], x.detach().double() @ weight.t()),
        (dx, upstream @ weight),
        (dgene[-last:], -0.5 * upstream.t() @ x.detach().double()),
    ):
        assert (found.double() - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert not y.detach()[:, :-last].any()
    assert not any(part.any() for part in dgene[:-last].split(1 << 12))
