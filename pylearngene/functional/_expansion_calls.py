# SPDX-License-Identifier: Apache-2.0
"""Which autograd path a checked call of `expansion` takes: plain operator, eager function, tapped or not.

Compiled graphs call the registered operators, whose formulas are traceable; eager calls with gradients use the cheaper
functions; calls without gradients go straight to the operator. functorch transforms (`vmap`, `grad`, `jvp`, ...) get
the specification itself, which builds full weights but composes with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pylearngene._ops.expansion_products import Linear, Product
from pylearngene._ops.expansion_products import weight as plain_weight
from pylearngene.functional._context import transformed
from pylearngene.functional._expansion_functions import ProductFunction, Use, WeightFunction
from pylearngene.functional._tap import Tap
from pylearngene.reference import expansion as specification

_registered = torch.ops.pylearngene
_product: Callable[..., Tensor] = ProductFunction.apply
_weight: Callable[..., Tensor] = WeightFunction.apply
# What `apply` is beneath its care for functorch, of which there is none on the short way.
_recorded: Callable[..., Tensor] = super(Function, ProductFunction).apply
_LINEAR = Linear()
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass
class TracedTap:
    """A tap inside one compiled graph: its token, and the accumulators made at the start of the pass.

    Attributes:
        token: what layers consume.
        buffers, bias_buffers: accumulators of the trainable weight and bias genes.
        wanted, bias_wanted: which genes they belong to.
    """

    token: Tensor
    buffers: list[Tensor]
    bias_buffers: list[Tensor]
    wanted: list[int]
    bias_wanted: list[int]

    def part(self, used: slice) -> TracedTap:
        """The tap for a layer that is given only some of the genes, those at `used` of weights and of biases."""
        wanted, buffers = _chosen(self.wanted, self.buffers, used)
        bias_wanted, bias_buffers = _chosen(self.bias_wanted, self.bias_buffers, used)
        return TracedTap(self.token, buffers, bias_buffers, wanted, bias_wanted)


def _chosen(wanted: list[int], buffers: list[Tensor], used: slice) -> tuple[list[int], list[Tensor]]:
    """Positions among the genes at `used`, and accumulators, of those of them that get a gradient."""
    places = {k: place for place, k in enumerate(range(max(wanted, default=-1) + 1)[used])}
    kept = [(places[k], buffer) for k, buffer in zip(wanted, buffers, strict=True) if k in places]
    return [place for place, _ in kept], [buffer for _, buffer in kept]


AnyTap = Tap | TracedTap | None


def linear(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None = None,
    bias_genes: Sequence[Tensor] = (),
    activation: str | None = None,
    tap: AnyTap = None,
) -> Tensor:
    """`y = activation(x W^T + b)` on checked arguments; x is already in its compute dtype."""
    if activation is None:
        return product(_LINEAR, x, genes, coeffs, bias, bias_genes, tap)
    if transformed() or (torch.is_grad_enabled() and _any_grad(x, coeffs, bias, tap, genes, bias_genes)):
        return ACTIVATIONS[activation](product(_LINEAR, x, genes, coeffs, bias, bias_genes, tap))
    return product(Linear(activation), x, genes, coeffs, bias, bias_genes, tap)


def recorded(
    y: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None = None,
    bias_genes: Sequence[Tensor] = (),
    tap: AnyTap = None,
) -> Tensor:
    """What `linear` returns where y was had the short way: y, in the graph where something needs a gradient."""
    if not torch.is_grad_enabled() or not _any_grad(x, coeffs, bias, tap, genes, bias_genes):
        return y
    if isinstance(tap, Tap):
        return _recorded(x, coeffs, bias, tap.token, Use(_LINEAR, x.shape, len(genes), tap), genes, bias_genes, [y])
    use = Use(_LINEAR, x.shape, len(genes), None)
    return _recorded(x, coeffs, bias, None, use, genes, bias_genes, [y], *genes, *bias_genes)


def product(
    kind: Product,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None = None,
    bias_genes: Sequence[Tensor] = (),
    tap: AnyTap = None,
) -> Tensor:
    """The linear map `kind` of x with the weight `sum_k c_k G_k`, on checked arguments."""
    if transformed():
        return kind.specification(x, genes, coeffs, bias, bias_genes)
    if isinstance(tap, TracedTap):
        accumulators = (tap.token, tap.buffers, tap.bias_buffers, tap.wanted, tap.bias_wanted)
        return kind.tapped((x, genes, coeffs, bias, bias_genes), accumulators)
    grad = torch.is_grad_enabled() and _any_grad(x, coeffs, bias, tap, genes, bias_genes)
    if not grad or torch.compiler.is_compiling():
        return kind.forward(x, genes, coeffs, bias, bias_genes)
    if tap is not None:
        return _product(x, coeffs, bias, tap.token, Use(kind, x.shape, len(genes), tap), genes, bias_genes, [])
    use = Use(kind, x.shape, len(genes), None)
    return _product(x, coeffs, bias, None, use, genes, bias_genes, [], *genes, *bias_genes)


def weight(
    genes: Sequence[Tensor],
    coeffs: Tensor,
    dtype: torch.dtype | None = None,
    tap: AnyTap = None,
    is_bias: bool = False,
) -> Tensor:
    """`W = sum_k c_k G_k` on checked arguments; `is_bias` says which genes of the tap these are."""
    if transformed():
        return specification.weight(genes, coeffs, dtype)
    if isinstance(tap, TracedTap):
        buffers = tap.bias_buffers if is_bias else tap.buffers
        wanted = tap.bias_wanted if is_bias else tap.wanted
        traced: Tensor = _registered.expansion_weight_tapped(genes, coeffs, dtype, tap.token, buffers, wanted)
        return traced
    if not (torch.is_grad_enabled() and _any_grad(None, coeffs, None, tap, genes)) or torch.compiler.is_compiling():
        return plain_weight(genes, coeffs, dtype)
    if tap is not None:
        return _weight(coeffs, tap.token, tap, dtype, genes, is_bias)
    return _weight(coeffs, None, None, dtype, genes, is_bias, *genes)


def _any_grad(x: Tensor | None, coeffs: Tensor, bias: Tensor | None, tap: AnyTap, *genes: Sequence[Tensor]) -> bool:
    if tap is not None or coeffs.requires_grad:
        return True
    if (x is not None and x.requires_grad) or (bias is not None and bias.requires_grad):
        return True
    for group in genes:  # a loop, since small products wait for it
        for gene in group:
            if gene.requires_grad:
                return True
    return False
