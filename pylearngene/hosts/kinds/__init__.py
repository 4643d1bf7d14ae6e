# SPDX-License-Identifier: Apache-2.0
"""The kinds of layers inside repeated blocks that can be gene-backed, one entry each.

A new kind is a class in a file of this folder and a line in `_ENTRIES`; nothing else in the package lists kinds.
"""

from __future__ import annotations

from torch import nn

from pylearngene.hosts.kinds._base import LayerKind, Tensors, own_parameters, with_memory, without_values
from pylearngene.hosts.kinds.attention import Attention
from pylearngene.hosts.kinds.conv import Conv2d
from pylearngene.hosts.kinds.linear import LayerNorm, Linear, TransposedLinear
from pylearngene.hosts.kinds.norms import GroupNorm, RMSNorm, Scale
from pylearngene.learngene import register_layer_kind

__all__ = [
    "KINDS",
    "LayerKind",
    "Tensors",
    "group_names",
    "kind_of",
    "own_parameters",
    "supported",
    "with_memory",
    "without_values",
]

# The first that holds a module decides.
_ENTRIES: tuple[LayerKind, ...] = (
    Linear(),
    LayerNorm(),
    Conv2d(),
    TransposedLinear(),
    RMSNorm(),
    GroupNorm(),
    Scale(),
    Attention(),
)
KINDS: dict[str, LayerKind] = {entry.name: entry for entry in _ENTRIES}
for _name in KINDS:
    register_layer_kind(_name)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of layer that `module` is, or None."""
    return next((entry for entry in _ENTRIES if entry.holds(module)), None)


def group_names(path: str, kind: str) -> list[str]:
    """Return the names that the gene groups of a layer have in the bank."""
    return [f"{path}.{group}".rstrip(".") for group in KINDS[kind].groups]


def supported() -> str:
    """Name what can hold the parameters of a block, in words."""
    words = [f"{entry.plain} ({entry.name})" for entry in _ENTRIES]
    return f"{', '.join(words[:-1])} and {words[-1]}"
