# SPDX-License-Identifier: Apache-2.0
"""The kinds `rms_norm`, `group_norm` and `scale`: recognised by what they compute, whichever library they come from.

LayerNorm is in `linear.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylearngene.functional._expansion_norm import rms_norm_gain_last
from pylearngene.hosts.kinds._base import LayerKind, Tensors, computes, own_parameters, plain_inside, probe
from pylearngene.nn import ExpansionGroupNorm, ExpansionLayer, ExpansionRMSNorm, ExpansionScale


class RMSNorm(LayerKind):
    """`nn.RMSNorm`, and every layer with one vector `weight` that computes the same in float32 (Llama's, Qwen's)."""

    name: ClassVar[str] = "rms_norm"
    plain: ClassVar[str] = "RMS norms"

    def holds(self, module: nn.Module) -> bool:
        """By class, or on a probe."""
        if isinstance(module, nn.RMSNorm):
            return True
        return _is_vector(module, "weight") and _eps_of(module) is not None

    def refusal(self, module: nn.Module, where: str, /) -> str | None:
        """Refuse several axes, and a subclass of `nn.RMSNorm` that computes something else."""
        if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) != 1:
            return f"expected norms over the last axis only, got '{where}' over {len(module.normalized_shape)} axes"
        if isinstance(module, nn.RMSNorm) and type(module).forward is nn.RMSNorm.forward:
            return None
        if _is_vector(module, "weight") and _eps_of(module) is not None:
            return None
        return f"expected '{where}' to compute what nn.RMSNorm computes, but its class {_class(module)} does not"

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionRMSNorm`, with the plain layer's order of rounding and gain."""
        assert isinstance(plain.weight, Tensor)
        if type(plain).forward is nn.RMSNorm.forward:
            assert isinstance(plain, nn.RMSNorm)
            return ExpansionRMSNorm(plain.normalized_shape, plain.eps, **options)
        eps = _eps_of(plain)
        last = _rms_norm(plain, eps, torch.bfloat16, gain_last=True)
        return ExpansionRMSNorm(plain.weight.shape[0], eps, gain_last=last, **options)


class GroupNorm(LayerKind):
    """`nn.GroupNorm`."""

    name: ClassVar[str] = "group_norm"
    plain: ClassVar[str] = "nn.GroupNorm"

    def holds(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.GroupNorm)

    def refusal(self, module: nn.Module, where: str, /) -> str | None:
        """Refuse a subclass with another forward."""
        if type(module).forward is nn.GroupNorm.forward:
            return None
        return f"expected '{where}' to compute what nn.GroupNorm computes, but {_class(module)} overrides `forward`"

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionGroupNorm`."""
        assert isinstance(plain, nn.GroupNorm)
        return ExpansionGroupNorm(plain.num_groups, plain.num_channels, plain.eps, **options)


class Scale(LayerKind):
    """A layer with one vector, of any name, that multiplies the last axis (LayerScale)."""

    name: ClassVar[str] = "scale"
    plain: ClassVar[str] = "scales of the last axis"

    def holds(self, module: nn.Module) -> bool:
        """On a probe."""
        if not _is_vector(module):
            return False
        ((name, vector),) = own_parameters(module).items()
        return computes(module, {name: _gain(vector)}, lambda x, made: x * made[name], probe(vector.shape[0]))

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionScale`."""
        (vector,) = own_parameters(plain).values()
        return ExpansionScale(vector.shape[0], **options)

    def parts(self, plain: nn.Module) -> list[Tensors]:
        """The one vector."""
        (vector,) = own_parameters(plain).values()
        return [(vector, None)]


def _is_vector(module: nn.Module, name: str | None = None) -> bool:
    """Say whether one vector, of that name where one is given, is all that the module holds."""
    own = own_parameters(module)
    if len(own) != 1:
        return False
    ((found, vector),) = own.items()
    return plain_inside(module, {found: 1}) and vector.numel() > 0 and name in (None, found)


def _gain(vector: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, vector.shape[0])


def _eps_of(module: nn.Module) -> float | None:
    """Find the number among the module's settings with which it is an RMS norm on a probe."""
    small = (value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1)
    return next((eps for eps in small if _rms_norm(module, eps, torch.float32, gain_last=False)), None)


def _rms_norm(module: nn.Module, eps: float | None, dtype: torch.dtype, *, gain_last: bool) -> bool:
    """Check on a probe, small enough for eps to matter, that the module is this RMS norm."""
    assert isinstance(module.weight, Tensor)
    gain = _gain(module.weight).to(dtype)

    def formula(x: Tensor, made: dict[str, Tensor]) -> Tensor:
        gain = made["weight"]
        return rms_norm_gain_last(x, gain, eps) if gain_last else functional.rms_norm(x, gain.shape, gain, eps)

    x = probe(gain.shape[0]) * (1e-3 if eps is None else 10 * eps**0.5)
    exact = dtype != torch.float32
    return computes(module, {"weight": gain}, formula, x.to(dtype), exact=exact)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
