# SPDX-License-Identifier: Apache-2.0
"""A backward pass that refuses to be differentiated, for `autograd.Function`s without a second derivative.

PyTorch's own `once_differentiable` leaves gradients without a graph where the upstream gradient has none, so that a
second derivative through saved tensors is silently lost; here every result of a `create_graph=True` pass refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pylearngene.errors import DoubleBackwardError

MESSAGE = (
    "double backward: expected one differentiation of a gene-backed layer, got a second one; "
    "its fused backward pass has no derivative (use pylearngene.reference for higher orders)"
)
_Backward = Callable[..., tuple[Any, ...]]


class _Refuse(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise DoubleBackwardError(MESSAGE)


_refuse: Callable[..., tuple[Tensor, ...]] = _Refuse.apply


def single_backward(backward: _Backward) -> _Backward:
    """Run `backward` without a graph; under `create_graph=True` its results raise when differentiated."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        tensors = [value for value in results if isinstance(value, Tensor)]
        anchor = torch.zeros((), requires_grad=True)
        refusing = iter(_refuse(anchor, *tensors) if tensors else ())
        return tuple(next(refusing) if isinstance(value, Tensor) else value for value in results)

    return run
