# SPDX-License-Identifier: Apache-2.0
"""The kinds `linear`, `transposed_linear` and `layer_norm`: PyTorch's own layers, subclasses, and GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylearngene.hosts.kinds._base import LayerKind, Tensors, computes, own_parameters, probe
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
        x = _rows(module.weight)
        return _other(module, where, "Linear", x, functional.linear(x, module.weight, module.bias))

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
        own = own_parameters(module)
        if own.keys() != {"weight", "bias"} or len(list(module.parameters())) != 2 or own["weight"].dim() != 2:
            return False
        rows, columns = own["weight"].shape
        if own["bias"].shape != (columns,) or isinstance(module, nn.Linear):
            return False
        weight = torch.arange(rows * columns, dtype=torch.float32).sin_().view(rows, columns) / rows
        bias = torch.linspace(-1, 1, columns)
        return computes(module, {"weight": weight, "bias": bias}, lambda x: x @ weight + bias, probe(rows))

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
        x = _rows(module.weight)
        normed = functional.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
        return _other(module, where, "LayerNorm", x, normed)

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionLayerNorm`."""
        assert isinstance(plain, nn.LayerNorm)
        return ExpansionLayerNorm(plain.normalized_shape, plain.eps, bias=plain.bias is not None, **options)


def _rows(weight: Tensor) -> Tensor:
    width = weight.shape[-1]
    return torch.linspace(-2, 2, 3 * width, dtype=torch.float64).sin().reshape(3, width).to(weight)


def _other(module: nn.Module, where: str, base: str, x: Tensor, wanted: Tensor) -> str | None:
    """Say that a subclass does not compute what its base does, or return None."""
    with torch.no_grad():
        try:
            same = torch.allclose(module(x), wanted, rtol=1e-2, atol=1e-3)
        except (RuntimeError, TypeError, ValueError, IndexError):
            same = False
    if same:
        return None
    return (
        f"expected '{where}' to compute what nn.{base} computes, but its class "
        f"{type(module).__module__}.{type(module).__qualname__} overrides `forward` with something else"
    )
