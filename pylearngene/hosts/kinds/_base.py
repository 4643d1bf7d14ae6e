# SPDX-License-Identifier: Apache-2.0
"""What a kind of layer owes to be gene-backed, and making plain layers without values from plain ones with them.

The kinds themselves are in the other files of this folder; their list is in `__init__.py`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pylearngene.nn import ExpansionModule

Tensors = tuple[Tensor, Tensor | None]


class LayerKind(ABC):
    """One kind of plain layer that a gene-backed one can replace.

    Attributes:
        name: as it is stored with a learngene.
        plain: the plain layers, in words.
        groups: what the layer's groups of genes are called below its path; "" is the path itself.
        products: whether the genes are matrices that x is multiplied by; they start small and random, and a regime
            computes them. Genes of other kinds are gains, which start so that every layer's gain is 1.
        regime: the regime of the products where it does not depend on the number of tokens, or None.
    """

    name: ClassVar[str]
    plain: ClassVar[str]
    groups: ClassVar[tuple[str, ...]] = ("",)
    products: ClassVar[bool] = False
    regime: ClassVar[str | None] = None

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Say whether `module` is a layer of this kind, by its class or by what it computes on a probe."""

    def refusal(self, _module: nn.Module, _where: str, /) -> str | None:
        """Say why this one layer of the kind cannot be gene-backed, in the words of an error, or return None."""
        return None

    @abstractmethod
    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionModule:
        """Make the gene-backed layer of the same sizes and settings.

        Args:
            plain: the plain layer.
            options: `bank`, `name`, `coeffs`, `learn_coeffs`, `device` and `dtype` of the gene-backed layer.
        """

    def parts(self, plain: nn.Module) -> list[Tensors]:
        """Return the weight and bias of every group, in the genes' orientation; writing into them fills `plain`."""
        weight, bias = plain.weight, getattr(plain, "bias", None)
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return [(weight, bias)]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that `module` holds itself."""
    return dict(module.named_parameters(recurse=False))


def without_values(plain: nn.Module) -> nn.Module:
    """Copy a layer with its parameters on the meta device; what else it refers to (a configuration) is shared."""
    copied = type(plain).__new__(type(plain))
    for key, value in vars(plain).items():
        registry = key.startswith("_") and isinstance(value, dict)
        vars(copied)[key] = value.copy() if registry else value
    for name, parameter in own_parameters(plain).items():
        copied._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for name, child in plain.named_children():
        copied._modules[name] = without_values(child)
    return copied


def with_memory(hollow: nn.Module, device: torch.device | None, dtype: torch.dtype) -> nn.Module:
    """Copy a layer made by `without_values` and give its parameters memory; `device` None keeps them on meta."""
    layer = without_values(hollow)
    for module in layer.modules():
        for name, parameter in own_parameters(module).items():
            empty = torch.empty(parameter.shape, dtype=dtype, device="meta" if device is None else device)
            module._parameters[name] = nn.Parameter(empty)
    return layer


def computes(
    module: nn.Module,
    values: dict[str, Tensor],
    formula: Callable[[Tensor], Tensor],
    x: Tensor,
    exact: bool = False,
) -> bool:
    """Check what a layer computes on a probe: a copy on the CPU with the given parameters, in the dtype of x.

    A layer that cannot take x computes something else. `exact` wants the same bits.
    """
    twin = copy.deepcopy(with_memory(module, x.device, x.dtype)).eval()
    with torch.no_grad():
        for name, value in values.items():
            twin.get_parameter(name).copy_(value)
        try:
            found, wanted = twin(x.clone()), formula(x)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            return False
    fits = isinstance(found, Tensor) and found.shape == wanted.shape and found.dtype == wanted.dtype
    tolerance = 0.0 if exact else 8 * torch.finfo(x.dtype).eps
    return fits and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


def probe(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make an x [2, 3, width] of varied values, without the random generator."""
    return torch.linspace(-2, 2, 6 * width, dtype=torch.float64).mul(7).sin().reshape(2, 3, width).to(dtype)
