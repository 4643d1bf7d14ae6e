# SPDX-License-Identifier: Apache-2.0
"""A plain vision transformer in three forms for whole models: dense, gene-backed, weights made by torch in every pass.

All three compute the same: the dense one is baked from the gene-backed one, the eager one has the same genes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from benchmarks.expansion_inputs import synthesize

FORMS = ("ours", "dense", "eager")


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision transformer: width D, blocks, heads, pixels of a side, of a patch's side, classes."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    side: int = 224
    patch: int = 16
    classes: int = 1000

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.side // self.patch) ** 2 + 1


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[B, T, D]` to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Patches, a class token, blocks, a norm and a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.positions = nn.Parameter(torch.randn(1, shape.tokens, shape.width) * 0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Eager(nn.Module):
    """A layer whose weight and bias torch makes from genes in every pass, then the plain function."""

    def __init__(self, genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: Sequence[float]) -> None:
        super().__init__()
        self.genes, self.biases = nn.ParameterList(genes), nn.ParameterList(biases)
        self.parts = (list(genes), list(biases))  # read in every pass, without the lists' bookkeeping
        self.coeffs = [float(coeff) for coeff in coeffs]

    def forward(self, x: Tensor) -> Tensor:
        """Apply a linear layer where the genes are matrices, a layer norm where they are vectors."""
        weight, bias = (synthesize(part, self.coeffs) for part in self.parts)
        return F.linear(x, weight, bias) if weight.dim() == 2 else F.layer_norm(x, weight.shape, weight, bias)


def gene_backed(shape: Shape) -> nn.Module:
    """A vision transformer with two genes per layer of a block; TLEG's coefficients."""
    torch.manual_seed(0)
    return plg.auxiliary(Vit(shape), plg.methods.TLEG())


def forms(net: nn.Module, wanted: Sequence[str] = FORMS) -> dict[str, nn.Module]:
    """The wanted forms of a gene-backed network, each with parameters of its own, all of the same values."""
    made: dict[str, nn.Module] = {}
    for form in wanted:
        if form == "dense":
            made[form] = plg.bake(net)
        elif form == "eager":
            made[form] = eager(copy.deepcopy(net))
        else:
            made[form] = copy.deepcopy(net)
    return made


def eager(net: nn.Module) -> nn.Module:
    """The network with every gene-backed layer replaced by `Eager`, on the same genes."""
    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, plg.nn.ExpansionLinear | plg.nn.ExpansionLayerNorm):
                group = layer._bank[0].group(layer.name)
                setattr(module, name, Eager(group.weights(), group.biases(), layer.coeffs))
    return net
