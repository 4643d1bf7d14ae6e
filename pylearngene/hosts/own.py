# SPDX-License-Identifier: Apache-2.0
"""The `own` family: models of a user's own class, made from a prototype by copying it.

A learngene kept in memory carries a prototype without block weights; one read from disk needs the model from its user.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from pylearngene.errors import ArgumentError, HostError
from pylearngene.hosts.depth import resize_blocks
from pylearngene.hosts.layers import block_layers
from pylearngene.hosts.structure import find_container
from pylearngene.learngene import HostSpec

NAME = "own"


def config_of(model: nn.Module, why: str | None) -> dict[str, Any]:
    """Describe a class that only its owner can build; `why` says what kept it from a library's family."""
    config: dict[str, Any] = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    return config if why is None else {**config, "why": why}


def build(spec: HostSpec, depth: int, num_classes: int | None, prototype: nn.Module | None) -> nn.Module:
    """Copy `prototype` and give the copy `depth` blocks, and a new head where `num_classes` is given.

    Raises:
        ArgumentError: there is no prototype.
        HostError: the prototype's blocks are not those of the learngene.
    """
    if prototype is None:
        raise ArgumentError(
            f"model: expected a model of class {spec.config.get('class')} (a gene folder cannot build a class of "
            "your own), got None; pass model=YourClass(...), of any depth"
        )
    path, blocks = find_container(prototype, spec.blocks)
    layers = block_layers(prototype, path, blocks)
    if layers != spec.layers:
        raise HostError(f"model: expected blocks with the layers {_names(spec.layers)}, got {_names(layers)}")
    model = copy.deepcopy(prototype)
    resize_blocks(model, path, depth)
    if num_classes is not None:
        _replace_head(model, path, num_classes)
    return model


def _names(layers: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in layers)


def _replace_head(model: nn.Module, path: str, num_classes: int) -> None:
    """Put a new linear layer in place of the last one outside the blocks."""
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{path}.")
    ]
    if not heads:
        raise HostError("num_classes: expected a model with an nn.Linear outside its blocks as the head, got none")
    parent, _, name = heads[-1].rpartition(".")
    old = model.get_submodule(heads[-1])
    assert isinstance(old, nn.Linear)
    head: nn.Module = old
    if num_classes == 0:
        head = nn.Identity()
    elif num_classes != old.out_features:
        like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        head = nn.Linear(old.in_features, num_classes, bias=old.bias is not None, **like)
    setattr(model.get_submodule(parent), name, head)
