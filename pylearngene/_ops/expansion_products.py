# SPDX-License-Identifier: Apache-2.0
"""The linear maps of x whose weight is a sum of genes, `Linear` and `Conv2d`: which operators compute each.

Autograd, eager and compiled, is written once for all of them. The operators themselves are in `expansion` and
`expansion_conv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylearngene._ops import expansion_direct as _direct
from pylearngene._ops.expansion import plain, tokens
from pylearngene._ops.expansion_kernels import column_sums, work_dtype
from pylearngene.reference import expansion as specification

_ops = torch.ops.pylearngene


class Linear(NamedTuple):
    """`y = activation(x W^T + b)`: x `[*, I]` -> `[*, O]`.

    Attributes:
        activation: None, "relu", "gelu" or "silu"; only where no gradient is needed.
    """

    activation: str | None = None

    def specification(
        self, x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, bias: Tensor | None, bias_genes: Sequence[Tensor]
    ) -> Tensor:
        """The product with a full weight, without the activation."""
        return specification.linear(x, genes, coeffs, bias, bias_genes)

    def forward(self, *tensors: Any) -> Tensor:
        """(x, genes, coeffs, bias, bias_genes) -> y."""
        y: Tensor = _ops.expansion_linear.default(*tensors, *self)
        return y

    def tapped(self, tensors: Sequence[Any], tap: Sequence[Any]) -> Tensor:
        """As `forward`, in a compiled graph with accumulators."""
        y: Tensor = _ops.expansion_linear_tapped.default(*tensors, *self, *tap)
        return y

    def input_gradient(self, dy: Tensor, size: Sequence[int], genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
        """dx, of the size that x has."""
        dx = _direct.input_gradient(dy, genes, coeffs)
        return _ops.expansion_linear_dx.default(dy, genes, coeffs) if dx is None else dx

    def at_once(self, *arguments: Any) -> Tensor | bool | None:
        """All gradients but those of coefficients in one call, as `expansion_direct.gradients`; None: not done."""
        return _direct.gradients(*arguments)

    def add_gradients(self, *arguments: Any) -> Tensor:
        """Add to accumulators and return dcoeffs; arguments as `expansion_linear_wgrad_`."""
        dots: Tensor = _ops.expansion_linear_wgrad_.default(*arguments)
        return dots

    def gradients(self, *arguments: Any) -> list[Tensor]:
        """New gradients, the last of them dcoeffs; arguments as `expansion_linear_wgrad`."""
        grads: list[Tensor] = _ops.expansion_linear_wgrad.default(*arguments)
        return grads

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """The sum of dy over all but its channels, in the work dtype."""
        if _direct.traced(dy):
            axes = tuple(range(dy.dim() - 1))
            return dy.sum(axes, dtype=work_dtype(dy)) if axes else dy.to(work_dtype(dy))  # no axes would be all
        plain(dy, ("dy", dy))
        return column_sums(tokens(dy.resolve_neg()))


class Conv2d(NamedTuple):
    """`y = conv2d(x, W) + b`: x `[B, C, H, W]` -> `[B, O, H', W']`.

    Attributes:
        stride, padding, dilation: along height and width; padding is by zeros.
        groups: of channels.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def specification(
        self, x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, bias: Tensor | None, bias_genes: Sequence[Tensor]
    ) -> Tensor:
        """The product with a full weight."""
        return specification.conv2d(x, genes, coeffs, bias, bias_genes, *self)

    def forward(self, *tensors: Any) -> Tensor:
        """(x, genes, coeffs, bias, bias_genes) -> y."""
        y: Tensor = _ops.expansion_conv2d.default(*tensors, *self)
        return y

    def tapped(self, tensors: Sequence[Any], tap: Sequence[Any]) -> Tensor:
        """As `forward`, in a compiled graph with accumulators."""
        y: Tensor = _ops.expansion_conv2d_tapped.default(*tensors, *self, *tap)
        return y

    def input_gradient(self, dy: Tensor, size: Sequence[int], genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
        """dx, of the size that x has."""
        dx: Tensor = _ops.expansion_conv2d_dx.default(dy, size, genes, coeffs, *self)
        return dx

    def at_once(self, *arguments: Any) -> None:
        """There is no such call."""

    def add_gradients(self, *arguments: Any) -> Tensor:
        """Add to accumulators; arguments and result as those of `Linear`."""
        dots: Tensor = _ops.expansion_conv2d_wgrad_.default(*arguments, *self)
        return dots

    def gradients(self, *arguments: Any) -> list[Tensor]:
        """New gradients; arguments as `expansion_linear_wgrad`."""
        grads: list[Tensor] = _ops.expansion_conv2d_wgrad.default(*arguments, *self)
        return grads

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """The sum of dy over all but its channels, in the work dtype."""
        if not _direct.traced(dy):
            plain(dy, ("dy", dy))
        return dy.sum((0, 2, 3), dtype=work_dtype(dy))


Product = Linear | Conv2d


def weight(genes: Sequence[Tensor], coeffs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`W = sum_k c_k G_k` without a graph, on checked arguments."""
    w = _direct.weight(genes, coeffs) if dtype is None else None
    made: Tensor = _ops.expansion_weight.default(genes, coeffs, dtype) if w is None else w
    return made
