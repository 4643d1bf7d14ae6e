# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps its repeated blocks, what they are made of, and how to build the model at another depth.

Models are understood by structure; a library is imported only to build one of its models again. What becomes of the
blocks is decided by `pylearngene.methods`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pylearngene.hosts import families
from pylearngene.hosts.layers import block_layers
from pylearngene.hosts.structure import Blocks, find_container
from pylearngene.learngene import HostSpec

__all__ = ["Host", "find_blocks"]


@dataclass(frozen=True)
class Host:
    """A model together with where its repeated blocks are and what they are made of.

    Attributes:
        model: the model itself.
        path: where its list of blocks is, for instance "blocks" or "vit.encoder.layer".
        blocks: the list.
        layers: the layers of a block that hold parameters, as (path inside the block, kind).
        spec: the same in a form that can be stored, with what is needed to build the model again.
    """

    model: nn.Module
    path: str
    blocks: Blocks
    layers: tuple[tuple[str, str], ...]
    spec: HostSpec


def find_blocks(model: nn.Module, path: str | None = None) -> Host:
    """Find the repeated blocks of a model by structure.

    A list of blocks is an `nn.ModuleList` or `nn.Sequential` of at least 2 children of equal type with equal parameter
    names, shapes, dtypes and devices; of several the one with most parameters wins, the outermost first.

    Args:
        model: any module; it is not changed.
        path: where the list is, if known; needed where it holds one block only.

    Returns:
        The host.

    Raises:
        ArgumentError: `model` is no module.
        HostError: no list qualifies, or a block holds parameters outside layers of the known kinds, shares them with
            another place, or keeps running statistics or buffers that differ from block to block.

    Example:
        >>> from torch import nn
        >>> net = nn.Module()
        >>> net.body = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3))
        >>> find_blocks(net).path, find_blocks(net).layers
        ('body', (('0', 'layer_norm'), ('1', 'linear')))
    """
    path, blocks = find_container(model, path)
    layers = block_layers(model, path, blocks)
    return Host(model, path, blocks, layers, families.describe(model, path, len(blocks), layers))
