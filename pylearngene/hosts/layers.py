# SPDX-License-Identifier: Apache-2.0
"""The layers inside a block that can be gene-backed, and the checks that nothing else holds parameters.

What kinds of layers there are is in `kinds`; putting gene-backed layers in their place is in `backing.py`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from pylearngene.errors import HostError
from pylearngene.hosts.fingerprint import settings
from pylearngene.hosts.kinds import kind_of, own_parameters, supported
from pylearngene.hosts.structure import Blocks


def block_layers(model: nn.Module, path: str, blocks: Blocks) -> tuple[tuple[str, str], ...]:
    """List the layers of a block that hold parameters, as (path inside the block, kind).

    Raises:
        HostError: a parameter is held by something else than a supported layer, is shared between places,
            a later block's layer at the same place is of another kind, or buffers inside the blocks differ from block
            to block.
    """
    _refuse_shared(model, path)
    layers: list[tuple[str, str]] = []
    first = next(iter(blocks._modules))
    for name, module in blocks[0].named_modules():
        where = f"{path}.{first}.{name}".rstrip(".")
        _refuse_statistics(module, where)
        inside = any(name.startswith(f"{outer}.") for outer, _ in layers)
        if own_parameters(module) and not inside:
            layers.append((name, _supported_kind(module, where)))
    _refuse_stateful(path, blocks)
    _refuse_unlike(path, blocks, layers)
    return tuple(layers)


def _supported_kind(module: nn.Module, where: str) -> str:
    """Return the kind of a module that holds parameters itself."""
    kind = kind_of(module)
    if kind is None:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        raise HostError(
            f"model: expected blocks whose parameters are held by {supported()}, "
            f"got '{where}.{next(iter(own_parameters(module)))}' in a {name}"
        )
    reason = kind.refusal(module, where)
    if reason is not None:
        raise HostError(f"model: {reason}")
    return kind.name


def _refuse_statistics(module: nn.Module, where: str) -> None:
    """Refuse norms with running statistics (batch norms): those belong to one block, no gene can hold them."""
    if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None:
        raise HostError(
            f"model: expected blocks without running statistics (those belong to one block alone), got '{where}' "
            f"({type(module).__name__}); use nn.GroupNorm or nn.LayerNorm in its place"
        )


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


def _refuse_unlike(path: str, blocks: Blocks, layers: list[tuple[str, str]]) -> None:
    """Refuse a layer of a later block that is not of the first one's kind; one with the same settings is."""
    start, *names = blocks._modules
    for name, kind in layers:
        first = blocks.get_submodule(f"{start}.{name}".rstrip("."))
        for index in names:
            module = blocks.get_submodule(f"{index}.{name}".rstrip("."))
            if _classes(module) == _classes(first) and settings(module) == settings(first):
                continue
            where = f"{path}.{index}.{name}".rstrip(".")
            found = _supported_kind(module, where)
            if found != kind:
                raise HostError(
                    "model: expected layers of one kind at the same place of all blocks, "
                    f"but '{path}.{start}.{name}' is {kind} and '{where}' is {found}"
                )


def _classes(module: nn.Module) -> list[type[nn.Module]]:
    return [type(part) for part in module.modules()]


def _stored_buffers(block: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a block that are part of its state dict."""
    stored = block.state_dict().keys()
    return {name: value for name, value in block.named_buffers() if name in stored}
