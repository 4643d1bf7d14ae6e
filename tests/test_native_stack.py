# SPDX-License-Identifier: Apache-2.0
"""The kernel that synthesizes several layers in one pass over the genes, on every level this machine has.

Oracles: the kernel of one layer, bit for bit, which is tested by itself; exact fractions for sums that are added to.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from test_native import (
    CODES,
    KERNELS,
    LEVELS,
    Genes,
    Guarded,
    assert_same_bits,
    nearest,
    per_level,
    per_pair,
    synthesize,
    work,
)
from torch import Tensor

SHAPES = [(1, 1), (2, 3), (5, 61), (9, 513), (2, 4099)]


def stack(
    level: int,
    genes: list[Tensor],
    coeffs: Tensor,
    dtype: torch.dtype,
    threads: int = 1,
    add: bool = False,
    start: Tensor | None = None,
) -> list[Tensor]:
    """W of every row of coeffs; with `add` on top of `start`, [L, rows, cols]."""
    rows, cols = genes[0].shape
    outs = [Guarded(rows, cols, dtype, offset=layer % 5, gap=layer % 3) for layer in range(len(coeffs))]
    for layer, out in enumerate(outs):
        if start is not None:
            out.view.copy_(start[layer])
    dst = [(out.view.data_ptr(), out.view.stride(0)) for out in outs]
    args = Genes(genes, coeffs).args
    KERNELS.synthesize_stack(level, threads, dst, CODES[dtype], rows, cols, add, *args)
    return [out.result() for out in outs]


def random(count: int, layers: int, rows: int, cols: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    genes = Genes.random(count, rows, cols, dtype).matrices
    return genes, torch.randn(layers, count, dtype=torch.float64).to(work(dtype))


@per_level
@per_pair
@pytest.mark.parametrize(("count", "layers"), [(1, 3), (2, 1), (5, 4), (12, 12), (64, 2)])
def test_every_layer_has_the_bits_of_its_own_synthesis(
    level: int, dtype: torch.dtype, gene_dtype: torch.dtype, count: int, layers: int
) -> None:
    for rows, cols in SHAPES:
        genes, coeffs = random(count, layers, rows, cols, gene_dtype)
        for got, row in zip(stack(level, genes, coeffs, dtype), coeffs, strict=True):
            assert_same_bits(got, synthesize(level, Genes(genes, row.contiguous()), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_gives_the_same_bits(dtype: torch.dtype) -> None:
    genes, coeffs = random(3, 4, 7, 1003, dtype)
    genes[1][0, :5] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0], dtype=dtype)
    start = torch.randn(4, 7, 1003, dtype=dtype)
    for add in (False, True):
        first = stack(LEVELS[0], genes, coeffs, dtype, add=add, start=start)
        for level in LEVELS[1:]:
            for got, expected in zip(stack(level, genes, coeffs, dtype, add=add, start=start), first, strict=True):
                assert_same_bits(got, expected)


@per_level
@pytest.mark.parametrize(
    ("dtype", "digits", "lowest"), [(torch.float32, 24, -149), (torch.float64, 53, -1074)], ids=["float32", "float64"]
)
def test_added_terms_are_fused_and_in_order(level: int, dtype: torch.dtype, digits: int, lowest: int) -> None:
    for rows, cols in [(1, 5), (3, 70)]:
        genes, coeffs = random(3, 2, rows, cols, dtype)
        start = torch.randn(2, rows, cols, dtype=dtype)
        for layer, got in enumerate(stack(level, genes, coeffs, dtype, add=True, start=start)):
            expected = start[layer].flatten().tolist()
            for k, gene in enumerate(genes):
                c = Fraction(coeffs[layer, k].item())
                terms = zip(expected, gene.flatten().tolist(), strict=True)
                expected = [nearest(Fraction(total) + c * Fraction(value), digits, lowest) for total, value in terms]
            assert got.flatten().tolist() == expected


@per_level
@pytest.mark.parametrize("gene_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matrices_are_added_in_float32(level: int, gene_dtype: torch.dtype) -> None:
    genes, coeffs = random(6, 3, 9, 133, gene_dtype)
    start = torch.randn(3, 9, 133)
    exact = start.double() + torch.einsum("lk,kij->lij", coeffs.double(), torch.stack(genes).double())
    size = start.double().abs() + torch.einsum("lk,kij->lij", coeffs.double().abs(), torch.stack(genes).double().abs())
    got = torch.stack(stack(level, genes, coeffs, torch.float32, add=True, start=start))
    assert ((got.double() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * size).all()


@per_level
def test_thread_count_changes_nothing(level: int) -> None:
    for rows, cols in [(50, 70), (3, 5000)]:
        genes, coeffs = random(4, 5, rows, cols, torch.float32)
        pair = (stack(level, genes, coeffs, torch.float32, threads=threads) for threads in (1, 2))
        for one, two in zip(*pair, strict=True):
            assert_same_bits(one, two)


@per_level
def test_gaps_between_rows_and_shared_rows_of_genes(level: int) -> None:
    genes, coeffs = random(3, 2, 18, 133, torch.float32)
    moved = [torch.cat([genes[0], genes[0]], 1)[:, :133], genes[1][:1].expand(18, 133), genes[2]]
    plain = [gene.contiguous() for gene in moved]
    for got, expected in zip(
        stack(level, moved, coeffs, torch.float32), stack(level, plain, coeffs, torch.float32), strict=True
    ):
        assert_same_bits(got, expected)


@per_level
def test_empty_sizes(level: int) -> None:
    for shape in ((0, 5), (4, 0)):
        results = stack(level, [torch.empty(shape)] * 2, torch.ones(3, 2), torch.float32)
        assert [result.shape for result in results] == [shape] * 3


def refused(message: str, **changed: Any) -> None:
    good = {"level": 0, "threads": 1, "dst": [(8, 0)], "dst_dtype": 0, "rows": 0, "cols": 0, "add": False}
    good |= {"genes": [(8, 0, 1)], "gene_dtype": 0, "coeffs": 8}
    KERNELS.synthesize_stack(**good)
    with pytest.raises(ValueError, match=f"^{message}$"):
        KERNELS.synthesize_stack(**{**good, **changed})


def test_refusals() -> None:
    refused("level: expected 0 to .*, got -1", level=-1)
    refused("threads: expected at least 1, got 0", threads=0)
    refused("dst_dtype: expected 0 to 3, got 4", dst_dtype=4)
    refused("dst_dtype: expected float64 exactly where gene_dtype is, got 1", dst_dtype=1)
    refused("dst_dtype: expected 0 or 1 where the sum is added, got 2", dst_dtype=2, add=True)
    refused("rows: expected at least 0, got -1", rows=-1)
    refused("cols: expected at least 0, got -1", cols=-1)
    refused("genes: expected 1 to 64, got 0", genes=[])
    refused("genes: expected column stride 1, got 2", genes=[(8, 0, 1), (8, 0, 2)], rows=1, cols=2)
    refused("genes: expected an address, got 0", genes=[(0, 0, 1)], rows=1, cols=1)
    refused("coeffs: expected an address, got 0", coeffs=0)
    refused("dst: expected 1 to 64, got 0", dst=[])
    refused("dst: expected 1 to 64, got 65", dst=[(8, 0)] * 65)
    refused("dst: expected an address, got 0", dst=[(8, 0), (0, 0)], rows=1, cols=1)
    refused("dst: expected tuples of 2 integers, got tuple", dst=[(8, 0, 1)])
