# SPDX-License-Identifier: Apache-2.0
"""LDR: every weight is a function of the block's position, expanded in a polynomial or trigonometric basis.

Here are the method, and the phases of its training: more genes for a network, or fewer of a learngene. The bases are
in `_bases.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from pylearngene.errors import ArgumentError, MethodError
from pylearngene.functional.expansion import MAX_GENES
from pylearngene.hosts.backing import bank_of
from pylearngene.learngene import register_method
from pylearngene.methods import _phases
from pylearngene.methods._bases import BASES
from pylearngene.methods._requests import check_choice, check_number, check_seed
from pylearngene.methods.expansion import FixedExpansion


@dataclass(frozen=True)
class LDR(FixedExpansion):
    """N genes per weight, the expansion of the weights over the depth: `W[l] = sum_n a_n(l / L) G[n]`, `l` from 0.

    Linear weights, biases, and the gains and biases of layer norms all expand. `a_n` of the bases, at `x = l / L`:

    - "chebyshev": `T_0 = 1, T_1 = x, T_{n+1} = 2 x T_n - T_{n-1}`, the paper's choice;
    - "taylor": `x^n`; the factors 1 / n! are part of the genes;
    - "fourier": `1, cos 2 pi x, sin 2 pi x, cos 4 pi x, ...`;
    - "legendre": `P_0 = 1, P_1 = x, (n + 1) P_{n+1} = (2 n + 1) x P_n - n P_{n-1}`.

    Genes are ordered: trained in phases (`LDR.grow`), the first k serve alone (`Learngene.first_genes`). Low-precision
    layers read the float32 genes themselves, since terms of high order cancel. More genes than blocks are allowed; a
    network of that depth alone cannot tell them apart.

    Start: linear weights of all genes truncated normal of standard deviation .02, biases 0; layer norms with gain 1 in
    the constant gene and 0 in the others (without a constant gene: the gains nearest to 1 in every block).

    Args:
        num_genes: N, from 1 to 64; the paper goes to 12.
        basis: "chebyshev", "taylor", "fourier" or "legendre".
        order_offset: order of the first gene. 0 starts with the constant: one gene is layer sharing, two (except
            "fourier") are TLEG. 1 is the paper's letter; then the first block of a Chebyshev, Taylor or Legendre
            network has the genes of odd order times 0.

    Raises:
        ArgumentError: an argument is none of these.

    Source:
        Linearly Decomposing and Recomposing Vision Transformers for Diverse-Scale Models, NeurIPS 2024: the sum, the
        Chebyshev coefficients `T_n((l - 1) / L)`, `l` from 1, and the names of the other bases; their formulas are the
        textbook ones, the order of the Fourier terms is ours.

    Example:
        >>> LDR(3).coefficients(4)[2]
        [1.0, 0.5, -0.5]
        >>> LDR(2, basis="fourier").coefficients(4)
        [[1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 0.0]]
    """

    name: ClassVar[str] = "ldr"
    compute_dtype: ClassVar[str] = "param"
    num_genes: int = 4
    basis: str = "chebyshev"
    order_offset: int = 0

    def __post_init__(self) -> None:
        num_genes = check_number("num_genes", self.num_genes)
        if num_genes > MAX_GENES:
            raise ArgumentError(f"num_genes: expected at most {MAX_GENES}, got {num_genes}")
        check_choice("basis", self.basis, tuple(BASES))
        # Numbers of other libraries compare alike, but cannot be stored.
        object.__setattr__(self, "num_genes", num_genes)
        object.__setattr__(self, "order_offset", _checked_offset(self.order_offset))
        super().__post_init__()

    def row(self, index: int, depth: int, /) -> Sequence[float]:
        """Return `a_n(index / depth)` for the orders of all genes."""
        return BASES[self.basis](self.num_genes + self.order_offset, index, depth)[self.order_offset :]

    def start_gains(self, depth: int) -> list[float]:
        """Return 1 for the constant gene and 0 for the others; without a constant gene, the nearest to a gain of 1."""
        if self.order_offset:
            return super().start_gains(depth)
        return [1.0] + [0.0] * (self.num_genes - 1)

    def with_genes(self, num_genes: int) -> LDR:
        """Return the method with another number of genes, in the same order."""
        return replace(self, num_genes=num_genes)

    @staticmethod
    def grow(net: nn.Module, num_genes: int, *, freeze: bool = True, init: str = "zeros", seed: int = 0) -> nn.Module:
        """Begin the next phase of training: give every weight of an LDR network more genes, in place.

        Keys of genes that are there stay, new ones follow: `gene_bank.genes.<layer>.weight.<k>`. An optimizer made
        before does not know the new genes: make another over the parameters that require gradients.

        Args:
            net: a gene-backed network that follows LDR.
            num_genes: how many genes every weight has afterwards, at least as many as now.
            freeze: make the genes that are there keep their values (`requires_grad` False), norms and biases included;
                False leaves them as they are.
            init: "zeros" leaves the function of the network unchanged; "method" starts linear weights from truncated
                normal genes of standard deviation .02.
            seed: of that start.

        Returns:
            `net` itself.

        Raises:
            MethodError: `net` is a plain model, or follows another method.
            ArgumentError: `num_genes` is below the present number or above 64, `init` is unknown, `freeze` is no bool,
                or `seed` no int.

        Source:
            As the class: phases of 1, 2, 4, 8 and 12 genes, genes of earlier phases frozen.

        Example:
            >>> import pylearngene as plg
            >>> model = nn.Module()
            >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
            >>> net = LDR.grow(plg.auxiliary(model, LDR(1)), 3)
            >>> [gene.requires_grad for gene in net.gene_bank.group("1").weight]
            [False, True, True]
        """
        method = bank_of(net).method
        if not isinstance(method, LDR):
            raise MethodError(f"net: expected a network that follows LDR, got one that follows {method!r}")
        if check_number("num_genes", num_genes) < method.num_genes:
            raise ArgumentError(f"num_genes: expected at least the present {method.num_genes}, got {num_genes}")
        check_choice("init", init, ("zeros", "method"))
        if not isinstance(freeze, bool):
            raise ArgumentError(f"freeze: expected True or False, got {freeze!r}")
        seed = check_seed(seed)
        _phases.grow(net, method.with_genes(num_genes), freeze, seed if init == "method" else None)
        return net


def _checked_offset(value: object) -> int:
    """Return 0 or 1 as an int."""
    try:
        offset = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        offset = -1
    if isinstance(value, bool) or offset not in (0, 1):
        raise ArgumentError(f"order_offset: expected 0 or 1, got {value!r}")
    return offset


register_method(LDR.name, LDR.from_config)
