# SPDX-License-Identifier: Apache-2.0
"""The kinds `linear`, `transposed_linear` and `layer_norm`: PyTorch's own layers, subclasses, and GPT-2's `Conv1D`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylearngene.hosts.kinds._base import (
    LayerKind,
    Tensors,
    agrees,
    computes,
    fill,
    own_parameters,
    plain_inside,
    probe,
    scattered,
)
from pylearngene.nn import ExpansionLayer, ExpansionLayerNorm, ExpansionLinear


class Linear(LayerKind):
    """`nn.Linear` and subclasses that compute the same."""

    name: ClassVar[str] = "linear"
    plain: ClassVar[str] = "nn.Linear"
    products: ClassVar[bool] = True

    def holds(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: nn.Module, where: str, /) -> str | None:
        """Refuse a subclass that computes something else."""
        assert isinstance(module, nn.Linear)
        if type(module).forward is nn.Linear.forward or module.weight.is_meta:
            return None
        return _other(module, where, "Linear", lambda twin, x: functional.linear(x, twin.weight, twin.bias))

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionLinear`."""
        assert isinstance(plain, nn.Linear)
        return ExpansionLinear(plain.in_features, plain.out_features, plain.bias is not None, **options)


class TransposedLinear(LayerKind):
    """A linear layer with a `weight` [I, O], as the `Conv1D` of transformers; its genes are [O, I]."""

    name: ClassVar[str] = "transposed_linear"
    plain: ClassVar[str] = "transformers' Conv1D"
    products: ClassVar[bool] = True

    def holds(self, module: nn.Module) -> bool:
        """On a probe."""
        if not plain_inside(module, {"weight": 2, "bias": 1}) or isinstance(module, nn.Linear):
            return False
        own = own_parameters(module)
        rows, columns = own["weight"].shape
        if own["bias"].shape != (columns,) or not own["weight"].numel():
            return False
        values = {"weight": scattered(rows, columns) / rows, "bias": torch.linspace(-1, 1, columns)}
        return computes(module, values, lambda x, made: x @ made["weight"] + made["bias"], probe(rows))

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionLinear`, whose `.weight` reads as [I, O]."""
        assert isinstance(plain.weight, Tensor)
        rows, columns = plain.weight.shape
        return ExpansionLinear(rows, columns, transposed=True, **options)

    def parts(self, plain: nn.Module) -> list[Tensors]:
        """The weight the other way round, and the bias."""
        assert isinstance(plain.weight, Tensor)
        assert isinstance(plain.bias, Tensor)
        return [(plain.weight.t(), plain.bias)]


class LayerNorm(LayerKind):
    """`nn.LayerNorm` over the last axis, and subclasses that compute the same."""

    name: ClassVar[str] = "layer_norm"
    plain: ClassVar[str] = "nn.LayerNorm"

    def holds(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.LayerNorm)

    def refusal(self, module: nn.Module, where: str, /) -> str | None:
        """Refuse several axes, and a subclass that computes something else."""
        assert isinstance(module, nn.LayerNorm)
        axes = len(module.normalized_shape)
        if axes != 1:
            return f"expected norms over the last axis only, got '{where}' over {axes} axes"
        if type(module).forward is nn.LayerNorm.forward or module.weight.is_meta:
            return None
        shape, eps = module.normalized_shape, module.eps
        return _other(
            module, where, "LayerNorm", lambda twin, x: functional.layer_norm(x, shape, twin.weight, twin.bias, eps)
        )

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionLayerNorm`."""
        assert isinstance(plain, nn.LayerNorm)
        return ExpansionLayerNorm(plain.normalized_shape, plain.eps, bias=plain.bias is not None, **options)


def _other(
    module: nn.Linear | nn.LayerNorm, where: str, base: str, formula: Callable[[Any, Tensor], Tensor]
) -> str | None:
    """Say that a subclass does not compute what its base does, or return None."""
    width = module.weight.shape[-1]
    try:
        twin = copy.deepcopy(module)
        own = own_parameters(twin)
        gains = {name: 16 * scattered(*value.shape) / (width if value.dim() > 1 else 1) for name, value in own.items()}
        fill(twin, gains)
        x = probe(width).to(module.weight)
        with torch.no_grad():
            same = all(agrees(twin, each, formula(twin, each), 1e-2, 1e-3) for each in (x, 1e3 * x))
    # Whatever a foreign layer raises says that it wants another input.
    except Exception:
        same = False
    if same:
        return None
    return (
        f"expected '{where}' to compute what nn.{base} computes, but its class "
        f"{type(module).__module__}.{type(module).__qualname__} overrides `forward` with something else"
    )
