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
from triton_samples import DEVICE, LAYOUTS, PRODUCTS, SHAPES, draw, genes_of, guarded, guards_hold, near

pytest.importorskip("triton")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")
divisions: Any = importlib.import_module("pylearngene.triton_kernels._splits")

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


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(
    ("shape", "whole", "splits"),
    [
        ((1, 32, 64), 32, 1),
        ((65, 32, 64), 0, 3),
        ((300, 33, 17), 0, 2),
        ((100, 160, 64), 128, 4),
        ((97, 150, 61), 128, 4),
    ],
)
def test_programs_that_share_the_tokens_of_a_tile(
    dtype: torch.dtype, shape: tuple[int, int, int], whole: int, splits: int
) -> None:
    """With 4 programs at once: no row of tiles, every one or the last one is split; 9 genes are two launches."""
    tokens, out, inner = shape
    if DEVICE == "cpu":
        launch = table.row_for("gene_gradients", "interpreter", out * inner, 2, 4)
        assert divisions.splits_for(launch, "interpreter", tokens, out, inner, 4)[:2] == (whole, splits)
    x, dy = draw(tokens, inner).to(dtype), draw(tokens, out).to(dtype)
    for count in (1, 9):
        genes, coeffs = genes_of(count, out, inner, dtype), draw(count, dtype=torch.float32)
        expected = [1 + c.double() * (dy.double().t() @ x.double()) for c in coeffs]
        pairs = [guarded(out, inner, torch.float32, 1.0) for _ in range(count)]
        dots = launchers.gene_gradients([inside for inside, _ in pairs], dy, x, genes, coeffs, True)
        for (inside, guards), right in zip(pairs, expected, strict=True):
            near(inside, right, torch.float32, 4)
            assert guards_hold(guards)
        sums = [(dy.double().t() @ x.double() * gene.double()).sum() for gene in genes]
        near(dots, torch.stack(sums), torch.float32, 16)
        again = [torch.ones_like(inside) for inside, _ in pairs]
        assert torch.equal(launchers.gene_gradients(again, dy, x, genes, coeffs, True), dots)
        assert all(torch.equal(one, two) for one, (two, _) in zip(again, pairs, strict=True)), "bit for bit"


@pytest.mark.parametrize("count", range(1, 17))
def test_any_number_of_genes(count: int) -> None:
    """Every third gene is frozen; the identity of the sums: `sum_k c_k <dW, G_k> = <dW, W>`."""
    x, dy, dtype = draw(40, 36).half(), draw(40, 20).half(), torch.float16
    genes, coeffs = genes_of(count, 20, 36, dtype), draw(count, dtype=torch.float32)
    buffers = [None if k % 3 == 2 else torch.zeros(20, 36, device=DEVICE) for k in range(count)]
    panel = (dy.float().t() @ x.float()).contiguous()
    for launch in (
        lambda into: launchers.gene_gradients(into, dy, x, genes, coeffs, True),
        lambda into: launchers.accumulate(panel, genes, coeffs, into, 0, True),
    ):
        into = [None if buffer is None else torch.zeros_like(buffer) for buffer in buffers]
        dots = launch(into)
        dw = dy.double().t() @ x.double()
        for buffer, c in zip(into, coeffs, strict=True):
            if buffer is not None:
                near(buffer, c.double() * dw, torch.float32, 4)
        near(dots, torch.stack([(dw * gene.double()).sum() for gene in genes]), torch.float32, 16)
        weight = torch.einsum("k,k...->...", coeffs.double(), torch.stack(genes).double())
        near((coeffs.double() * dots).sum(), (dw * weight).sum(), torch.float32, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gene_gradients_of_any_layout(layout: str) -> None:
    change = LAYOUTS[layout]
    x, dy = change(draw(40, 32).half()), change(draw(40, 48).half())
    genes, coeffs = [change(gene) for gene in genes_of(2, 48, 32, torch.float16)], draw(2, dtype=torch.float32)
    buffers = [torch.ones(48, 32, device=DEVICE) for _ in genes]
    dw = dy.double().t() @ x.double()
    for dots in (
        launchers.gene_gradients(buffers, dy, x, genes, coeffs, True),
        launchers.accumulate(dw[8:].float(), genes, coeffs, buffers, 8, True)
        + launchers.accumulate(dw[:8].float(), genes, coeffs, buffers, 0, True),
    ):
        near(dots, torch.stack([(dw * gene.double()).sum() for gene in genes]), torch.float32, 16)
    for buffer, c in zip(buffers, coeffs, strict=True):
        near(buffer, 1 + 2 * c.double() * dw, torch.float32, 4)


def test_splits_leave_no_token_and_no_row_out() -> None:
    """The last rows in whole tiles, steps that cover all tokens once, and never more than 24 MiB of partial sums."""
    for row in table.ROWS:
        if row.kernel != "gene_gradients":
            continue
        out_block, _, token_block = row.tile
        for tokens, out, inner in product((1, 100, 4096, 25216), (1, 384, 768, 3072, 4096), (16, 768, 1000, 4096)):
            whole, splits, chunk = divisions.splits_for(row, row.chips[0], tokens, out, inner, 132)
            assert (whole, splits) == (out, 1) or (whole < out and whole % out_block == 0 and splits > 1)
            steps = -(-tokens // token_block)
            assert (splits - 1) * chunk < steps <= splits * chunk
            assert splits == 1 or splits * (out - whole) * inner * 4 <= 24 << 20


def test_splits_fill_the_last_wave() -> None:
    """36 tiles on 132 multiprocessors are shared by 3 or 7 programs each; 6 x 24 tiles keep one row of tiles back."""
    row = table.row_for("gene_gradients", "sm_90", 768 * 768, 4, 2, regular=True)
    assert divisions.splits_for(row, "sm_90", 4096, 768, 768, 132) == (0, 3, 22)
    assert divisions.splits_for(row, "sm_90", 25216, 768, 768, 132) == (0, 7, 57)
    assert divisions.splits_for(row, "sm_90", 25216, 768, 3072, 132) == (640, 5, 79)
    assert divisions.splits_for(row, "sm_90", 25216, 4096, 4096, 132) == (4096, 1, 394)
    assert divisions.splits_for(row, "sm_90", 197, 768, 768, 132) == (768, 1, 4)


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
