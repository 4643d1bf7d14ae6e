# SPDX-License-Identifier: Apache-2.0
"""The layers inside a block that can be gene-backed, and the checks that nothing else holds parameters.

Supported kinds: `linear` (`nn.Linear`) and `layer_norm` (`nn.LayerNorm`), with subclasses that compute the same.
Putting gene-backed layers in their place is in `backing.py`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylearngene.errors import HostError
from pylearngene.hosts.structure import Blocks

KINDS: dict[str, type[nn.Linear] | type[nn.LayerNorm]] = {"linear": nn.Linear, "layer_norm": nn.LayerNorm}
SUPPORTED = "nn.Linear (linear) and nn.LayerNorm (layer_norm)"


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of layer that `module` is, by its base class, or None."""
    return next((kind for kind, layer in KINDS.items() if isinstance(module, layer)), None)


def block_layers(model: nn.Module, path: str, blocks: Blocks) -> tuple[tuple[str, str], ...]:
    """List the layers of a block that hold parameters, as (path inside the block, kind).

    Raises:
        HostError: a parameter is held by something else than a supported layer, is shared between places,
            or buffers inside the blocks differ from block to block.
    """
    _refuse_shared(model, path)
    _refuse_stateful(path, blocks)
    layers = []
    for name, module in blocks[0].named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own:
            layers.append((name, _supported_kind(module, f"{path}.0.{name}".rstrip("."), own)))
    return tuple(layers)


def _supported_kind(module: nn.Module, where: str, parameters: list[str]) -> str:
    """Return the kind of a module that holds parameters itself."""
    kind = kind_of(module)
    if kind is None or not {"weight"} <= set(parameters) <= {"weight", "bias"}:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        raise HostError(
            f"model: expected blocks whose parameters are held by {SUPPORTED}, "
            f"got '{where}.{parameters[0]}' in a {name}"
        )
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        raise HostError(
            f"model: expected norms over the last axis only, got '{where}' over {len(module.normalized_shape)} axes"
        )
    if not _computes_as(module, KINDS[kind]):
        raise HostError(
            f"model: expected '{where}' to compute what nn.{KINDS[kind].__name__} computes, but its class "
            f"{type(module).__module__}.{type(module).__qualname__} overrides `forward` with something else"
        )
    return kind


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Check that a subclass computes what `base` computes: the same method, or the same values on a probe."""
    weight = module.weight
    if type(module).forward is base.forward or not isinstance(weight, Tensor) or weight.is_meta:
        return True
    width = weight.shape[-1]
    x = torch.linspace(-2, 2, 3 * width, dtype=torch.float64).sin().reshape(3, width).to(weight)
    with torch.no_grad():
        try:
            return torch.allclose(module(x), _plain(module, x), rtol=1e-2, atol=1e-3)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the layer of PyTorch that `module` derives from."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    assert isinstance(module, nn.Linear)
    return functional.linear(x, module.weight, module.bias)


def _refuse_shared(model: nn.Module, path: str) -> None:
    """Refuse a block parameter that is found in more than one place of the model."""
    names = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in names)
    for name, parameter in names:
        if uses[id(parameter)] > 1 and name.startswith(f"{path}."):
            others = [other for other, same in names if same is parameter and other != name]
            raise HostError(f"model: expected every block parameter in one place, but {name!r} is also {others[0]!r}")


def _refuse_stateful(path: str, blocks: Blocks) -> None:
    """Refuse stored buffers that differ between blocks: a learngene does not keep them."""
    first = {name: value for name, value in _stored_buffers(blocks[0]).items() if not value.is_meta}
    for index, block in enumerate(blocks):
        for name, value in _stored_buffers(block).items():
            if name in first and not torch.equal(first[name], value):
                raise HostError(
                    "model: expected equal buffers in all blocks, "
                    f"but '{path}.0.{name}' and '{path}.{index}.{name}' differ"
                )


def _stored_buffers(block: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a block that are part of its state dict."""
    stored = block.state_dict().keys()
    return {name: value for name, value in block.named_buffers() if name in stored}
