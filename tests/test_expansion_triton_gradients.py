# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `expansion` that add to gradients against float64: on a CUDA device, or in the interpreter.

Products and the public functions are tested in `test_expansion_triton`, what is compiled in `test_triton_offline`.
"""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

import pytest
import torch
from triton_samples import DEVICE, PRODUCTS, SHAPES, draw, genes_of, guarded, guards_hold, near

pytest.importorskip("triton")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")

# Triton's own: its interpreter turns arrays of one element into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("shape", "count"), [*product(SHAPES, [2]), ((37, 31, 17), 1), ((21, 19, 23), 9)])
def test_gene_gradients(dtype: torch.dtype, shape: tuple[int, int, int], count: int) -> None:
    """Gene 1 is frozen; accumulators start from 1, so that overwriting shows."""
    tokens, out, inner = shape
    x, dy, genes = draw(tokens, inner).to(dtype), draw(tokens, out).to(dtype), genes_of(count, out, inner, dtype)
    coeffs = draw(count, dtype=torch.float32)
    pairs = [guarded(out, inner, torch.float32, 1.0) for _ in range(count)]
    buffers = [None if k == 1 else inside for k, (inside, _) in enumerate(pairs)]
    dots = launchers.gene_gradients(buffers, dy, x, genes, coeffs, True)
    dw = dy.double().t() @ x.double()
    for k, buffer in enumerate(buffers):
        if buffer is not None:
            near(buffer, 1 + coeffs[k].double() * dw, torch.float32, 4)
        assert guards_hold(pairs[k][1])
    near(dots, torch.stack([(dw * gene.double()).sum() for gene in genes]), torch.float32, 16)
    assert (pairs[-1][0] == 1).all() == (count == 2), "only the frozen gene's accumulator stays as it was"
    again = [None if buffer is None else torch.ones_like(buffer) for buffer in buffers]
    assert launchers.gene_gradients(again, dy, x, genes, coeffs, False) is None
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, buffers, strict=True)), "bit for bit"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_from_a_panel(dtype: torch.dtype) -> None:
    genes, coeffs, panel = genes_of(3, 50, 33, torch.float32), draw(3, dtype=dtype), draw(41, 33, dtype=dtype)
    genes = [gene.to(dtype) for gene in genes]
    pairs = [guarded(50, 33, dtype, 1.0) for _ in genes]
    buffers = [inside if k != 1 else None for k, (inside, _) in enumerate(pairs)]
    dots = launchers.accumulate(panel, genes, coeffs, buffers, 9, True)
    for k, (buffer, whole) in enumerate(pairs):
        expected = torch.ones(50, 33, dtype=torch.float64, device=DEVICE)
        if k != 1:
            expected[9:] += coeffs[k].double() * panel.double()
        near(buffer, expected, dtype, 4)
        assert guards_hold(whole)
    near(dots, torch.stack([(panel.double() * gene.double()[9:]).sum() for gene in genes]), dtype, 16)
