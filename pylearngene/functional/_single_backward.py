# SPDX-License-Identifier: Apache-2.0
"""A backward pass that refuses to be differentiated, for `autograd.Function`s without a second derivative.

PyTorch's own `once_differentiable` leaves gradients without a graph where the upstream gradient has none, so that a
second derivative through saved tensors is silently lost. Here, under `create_graph=True`, every result hangs on all
tensors it depends on through a node that raises, so that every path of a second derivative crosses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pylearngene.errors import DOUBLE_BACKWARD, DoubleBackwardError

_Backward = Callable[..., tuple[Any, ...]]


class _Refuse(Function):
    @staticmethod
    def forward(ctx: Any, count: int, *anchors_and_values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return anchors_and_values[count:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise DoubleBackwardError(DOUBLE_BACKWARD)


_refuse: Callable[..., tuple[Tensor, ...]] = _Refuse.apply


def anchor(ctx: Any, *tensors: Tensor | None) -> None:
    """Name tensors that the results of the running backward depend on, besides the upstream gradients."""
    if getattr(ctx, "anchors", None) is not None:
        ctx.anchors.extend(tensors)


def anchors_of(ctx: Any) -> list[Tensor | None]:
    """What `anchor` was given so far; nothing unless `create_graph=True`, so that no activation is kept alive."""
    return getattr(ctx, "anchors", None) or []


def single_backward(backward: _Backward) -> _Backward:
    """Run `backward` without a graph; under `create_graph=True` its results raise when differentiated.

    The function calls `anchor(ctx, ...)` with what it read from `ctx`.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx.anchors = list(grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        anchors = [t for t in ctx.anchors if isinstance(t, Tensor) and t.requires_grad]
        ctx.anchors = None
        tensors = [value for value in results if isinstance(value, Tensor)]
        if not anchors or not tensors:
            return results
        refusing = iter(_refuse(len(anchors), *anchors, *tensors))
        return tuple(next(refusing) if isinstance(value, Tensor) else value for value in results)

    return run
