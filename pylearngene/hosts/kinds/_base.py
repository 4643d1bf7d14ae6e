# SPDX-License-Identifier: Apache-2.0
"""What a kind of layer owes to be gene-backed, and making plain layers without values from plain ones with them.

The kinds themselves are in the other files of this folder; their list is in `__init__.py`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pylearngene.nn import ExpansionModule

Tensors = tuple[Tensor, Tensor | None]

# A layer that clamps, or loses the sign of its parameters, differs in one of these.
_FACTORS = (1.0, -32.0)
_SIZES = (1.0, 1e-4, 1e6)


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


def plain_inside(module: nn.Module, shapes: dict[str, int]) -> bool:
    """Say whether parameters of these names and numbers of axes are all that a module holds: no child, no buffer."""
    own = {name: parameter.dim() for name, parameter in own_parameters(module).items()}
    return own == shapes and not list(module.children()) and not list(module.buffers())


def computes(
    module: nn.Module,
    values: dict[str, Tensor],
    formula: Callable[[Tensor, dict[str, Tensor]], Tensor],
    x: Tensor,
    exact: bool = False,
) -> bool:
    """Check what a layer computes on probes: a copy on the CPU with the given parameters, in the dtype of x.

    Probes are x in several sizes, with the parameters and with their large negatives, in training and evaluation. A
    layer that cannot take one computes something else. `exact` wants the same bits, for x in its own size alone.
    """
    tolerance = 0.0 if exact else 8 * torch.finfo(x.dtype).eps
    try:
        twin = copy.deepcopy(with_memory(module, x.device, x.dtype))
        for factor in _FACTORS:
            scaled = {name: value * factor for name, value in values.items()}
            fill(twin, scaled)
            sized = [x] if exact else [x * size for size in _SIZES]
            if not all(agrees(twin, each, formula(each, scaled), tolerance, tolerance) for each in sized):
                return False
    # Whatever a foreign layer raises says that it wants another input.
    except Exception:
        return False
    return True


def fill(twin: nn.Module, values: dict[str, Tensor]) -> None:
    """Write values into the parameters of a copy of a layer."""
    with torch.no_grad():
        for name, value in values.items():
            twin.get_parameter(name).copy_(value)


def agrees(twin: nn.Module, x: Tensor, wanted: Tensor, rtol: float, atol: float) -> bool:
    """Say whether a layer, a copy whose mode may change, gives `wanted` in training and in evaluation.

    `atol` is relative to the largest value wanted. A layer that draws random numbers does not agree.
    """
    atol *= float(wanted.abs().max())
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        for mode in (True, False):
            before = _random_state(x)
            found = twin.train(mode)(x.clone())
            if not torch.equal(_random_state(x), before):
                return False
            fits = isinstance(found, Tensor) and found.shape == wanted.shape and found.dtype == wanted.dtype
            if not (fits and torch.allclose(found, wanted, rtol=rtol, atol=atol)):
                return False
    return True


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def probe(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make an x [2, 3, width] of varied values, without the random generator."""
    return torch.linspace(-2, 2, 6 * width, dtype=torch.float64).mul(7).sin().reshape(2, 3, width).to(dtype)


def scattered(*shape: int) -> Tensor:
    """Make values in [-1, 1] whose sums do not cancel along any axis, without the random generator."""
    return torch.arange(math.prod(shape), dtype=torch.float32).square_().sin_().view(shape)
