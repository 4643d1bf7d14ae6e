# SPDX-License-Identifier: Apache-2.0
"""The kernels for many tokens: sizes about their blocks, poisoned memory beside what they read, threads, one order.

Written for the products of bfloat16 in pairs, whose blocks are the largest; every level and dtype has to pass. Few
tokens are in `test_native`, whose oracles are used here.
"""

from __future__ import annotations

import threading

import pytest
import torch
from test_native import (
    CODES,
    LAYOUTS,
    Genes,
    assert_close,
    assert_same_bits,
    gene_grads,
    per_level,
    product,
    rows_dx,
    rows_forward,
    synthesize,
)

#: M, O, I: beside whole blocks of 12, 384 and 512 tokens, of 32 and 120 lines, of 32, 384 and 3072 columns.
SIZES = [(17, 33, 31), (24, 32, 32), (25, 31, 33), (29, 257, 65), (513, 121, 385), (385, 3, 3073), (30, 3075, 35)]
EACH_DTYPE = pytest.mark.parametrize("gene_dtype", [torch.bfloat16, torch.float32], ids=str)


def poisoned(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values between columns that are no numbers."""
    whole = torch.full((tokens, cols + 3), torch.nan, dtype=dtype)
    whole[:, 1:-2] = torch.randn(tokens, cols)
    return whole[:, 1:-2]


def poisoned_genes(count: int, rows: int, cols: int, dtype: torch.dtype) -> Genes:
    genes = [poisoned(rows, cols, dtype) for _ in range(count)]
    return Genes(genes, torch.randn(count))


@per_level
@EACH_DTYPE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(level: int, gene_dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    tokens, rows, cols = size
    genes, bias = poisoned_genes(2, rows, cols, gene_dtype), torch.randn(rows)
    x, dy = poisoned(tokens, cols, torch.bfloat16), poisoned(tokens, rows, torch.bfloat16)
    weight = synthesize(level, genes, torch.bfloat16)
    exact, terms = product(x, weight.t())
    assert_close(rows_forward(level, x, genes, bias), exact + bias.double(), terms + 10, cols)
    assert_close(rows_dx(level, dy, genes), *product(dy, weight), rows)


@per_level
@EACH_DTYPE
@pytest.mark.parametrize("size", [(17, 25, 31), (64, 96, 384), (515, 121, 385), (1027, 3, 70)], ids=str)
def test_gene_gradients(level: int, gene_dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    tokens, rows, cols = size
    genes = poisoned_genes(2, rows, cols, gene_dtype)
    x, dy = poisoned(tokens, cols, torch.bfloat16), poisoned(tokens, rows, torch.bfloat16)
    exact, terms = product(dy.t(), x)
    buffers, dots = gene_grads(level, genes, (dy, x))
    for k, (gene, c) in enumerate(zip(genes.matrices, genes.coeffs.double(), strict=True)):
        assert_close(buffers[k], 1 + c * exact, 1 + c.abs() * terms, tokens)
        error = (dots[:, k] - (exact * gene.double()).sum(1)).abs()
        assert (error <= torch.finfo(torch.float32).eps * (tokens + 4) * (terms * gene.double().abs()).sum(1)).all()


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_token_has_the_same_result_among_any_number_of_others(level: int, dtype: torch.dtype) -> None:
    genes = Genes.random(2, 40, 70, dtype)
    x, dy = torch.randn(401, 70).to(dtype), torch.randn(401, 40).to(dtype)
    y, dx = rows_forward(level, x, genes), rows_dx(level, dy, genes)
    for tokens in (*range(17, 30), 97, 200):
        assert_same_bits(rows_forward(level, x[-tokens:], genes), y[-tokens:])
        assert_same_bits(rows_dx(level, dy[-tokens:], genes), dx[-tokens:])


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_thread_count_changes_nothing(level: int, dtype: torch.dtype) -> None:
    for tokens, rows, cols in [(401, 33, 65), (200, 130, 31), (18, 70, 400)]:
        genes = Genes.random(2, rows, cols, dtype)
        x, dy = torch.randn(tokens, cols).to(dtype), torch.randn(tokens, rows).to(dtype)
        y, dx = rows_forward(level, x, genes), rows_dx(level, dy, genes)
        buffers, dots = gene_grads(level, genes, (dy, x))
        for threads in (2, 3, 7):
            assert_same_bits(rows_forward(level, x, genes, threads=threads), y)
            assert_same_bits(rows_dx(level, dy, genes, threads=threads), dx)
            again, dots_again = gene_grads(level, genes, (dy, x), threads=threads)
            for a, b in zip([*again, dots_again], [*buffers, dots], strict=True):
                assert_same_bits(a, b)


@per_level
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_genes_changes_nothing(level: int, layout: str) -> None:
    plain = Genes.random(3, 37, 301, torch.bfloat16)
    moved = Genes([LAYOUTS[layout](gene) for gene in plain.matrices], plain.coeffs)
    same = Genes([gene.contiguous() for gene in moved.matrices], plain.coeffs)
    x, dy = torch.randn(19, 301).bfloat16(), torch.randn(19, 37).bfloat16()
    assert_same_bits(rows_forward(level, x, moved), rows_forward(level, x, same))
    assert_same_bits(rows_dx(level, dy, moved), rows_dx(level, dy, same))
    for got, expected in zip(gene_grads(level, moved, (dy, x)), gene_grads(level, same, (dy, x)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@per_level
@pytest.mark.parametrize("cols", [19, 32, 45])
def test_infinities_stay_where_they_belong(level: int, cols: int) -> None:
    dtype = torch.bfloat16
    genes = Genes([torch.ones(21, cols, dtype=dtype)], torch.tensor([torch.inf]))
    assert (rows_forward(level, torch.ones(27, cols, dtype=dtype), genes) == torch.inf).all()
    assert (rows_dx(level, torch.ones(27, 21, dtype=dtype), genes) == torch.inf).all()
    genes.coeffs.fill_(1)
    x, dy = torch.ones(27, cols, dtype=dtype), torch.ones(27, 21, dtype=dtype)
    x[5, cols - 1] = dy[5, 20] = torch.inf
    y, dx = rows_forward(level, x, genes), rows_dx(level, dy, genes)
    for got, plain in ((y, cols), (dx, 21)):
        assert (got[5] == torch.inf).all()
        assert (got[torch.arange(27) != 5] == plain).all()
    (buffer,), dots = gene_grads(level, genes, (dy, torch.ones(27, cols, dtype=dtype)))
    assert (buffer[20] == torch.inf).all()
    assert (buffer[:20] == 28).all()
    assert dots[:, 0].tolist() == [27 * cols] * 20 + [torch.inf]


@per_level
@pytest.mark.parametrize("count", [1, 64])
def test_a_stack_of_half_a_mebibyte_is_enough_for_the_largest_blocks(level: int, count: int) -> None:
    done = []
    before = threading.stack_size(512 << 10)
    try:
        for rows, cols in ((33, 3100), (3100, 33)):
            one = Genes.random(1, cols, rows, torch.bfloat16).matrices[0].t()
            genes = Genes([one] * count, torch.randn(count))
            x, dy = torch.randn(400, cols).bfloat16(), torch.randn(400, rows).bfloat16()
            bias = Genes([torch.randn(rows, 1).bfloat16()] * count, genes.coeffs)
            for call in (
                lambda x=x, genes=genes, bias=bias: rows_forward(level, x, genes, bias),
                lambda dy=dy, genes=genes: rows_dx(level, dy, genes),
                lambda x=x, dy=dy, genes=genes: gene_grads(level, genes, (dy, x)),
            ):
                thread = threading.Thread(target=lambda call=call: done.append(call()))
                thread.start()
                thread.join()
    finally:
        threading.stack_size(before)
    assert len(done) == 6
