# SPDX-License-Identifier: Apache-2.0
"""The forward kernels for few tokens: every number of tokens and genes that has a kernel of its own, and the next ones.

Oracles and calls are those of `test_native`; many tokens are in `test_native_pairs`.
"""

from __future__ import annotations

import pytest
import torch
from test_native import CODES, Genes, assert_close, assert_same_bits, per_level, product, rows_forward, synthesize

#: Rows and columns of W: one, whole blocks of both, and what is left beside them.
SIZES = [(1, 3), (8, 32), (16, 1024), (13, 70), (9, 1061)]
COUNTS = range(1, 7)
TOKENS = (*range(1, 14), 16, 17)


def beside_nan(gene: torch.Tensor, gap: int) -> torch.Tensor:
    """The gene with NaN between its rows, where nothing may be read that counts."""
    wide = torch.full((gene.shape[0], gene.shape[1] + gap), float("nan"), dtype=gene.dtype)
    wide[:, : gene.shape[1]] = gene
    return wide[:, : gene.shape[1]]


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_every_number_of_tokens(level: int, dtype: torch.dtype, count: int) -> None:
    for rows, cols in SIZES:
        genes = Genes.random(count, rows, cols, dtype)
        genes = Genes([beside_nan(gene, 5) for gene in genes.matrices], genes.coeffs)
        w, bias = synthesize(level, genes, dtype), torch.randn(rows).to(dtype)
        x = beside_nan(torch.randn(max(TOKENS), cols).to(dtype), 2)
        for tokens in TOKENS:
            exact, size = product(x[:tokens], w.T)
            assert_close(rows_forward(level, x[:tokens], genes, bias), exact + bias.double(), size + 10, cols)


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_a_token_has_the_same_result_among_any_few_others(level: int, dtype: torch.dtype, count: int) -> None:
    for rows, cols in SIZES:
        genes, x = Genes.random(count, rows, cols, dtype), torch.randn(16, cols).to(dtype)
        whole = rows_forward(level, x, genes)
        for tokens in TOKENS[:-1]:
            assert_same_bits(rows_forward(level, x[-tokens:], genes), whole[-tokens:])


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_rows_of_genes_may_lie_apart_by_different_strides(level: int, dtype: torch.dtype, count: int) -> None:
    for rows, cols in SIZES:
        plain, x = Genes.random(count, rows, cols, dtype), torch.randn(9, cols).to(dtype)
        moved = Genes([beside_nan(gene, 1 + k) for k, gene in enumerate(plain.matrices)], plain.coeffs)
        for tokens in (1, 4, 6, 9):
            assert_same_bits(rows_forward(level, x[:tokens], moved), rows_forward(level, x[:tokens], plain))


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_an_infinite_coefficient_stays_in_the_columns(level: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        genes = Genes.random(count, 9, 37, dtype)
        for gene in genes.matrices:
            gene.abs_()
        genes.coeffs[-1] = float("inf")
        for tokens in (1, 2, 5, 6, 8):
            y = rows_forward(level, torch.ones(tokens, 37, dtype=dtype), genes)
            assert (y == float("inf")).all()
