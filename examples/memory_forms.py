# SPDX-License-Identifier: Apache-2.0
"""One vision transformer in several forms, for `memory_limited.py`: dense, formed by autograd, gene-backed.

All compute the same kind of step. The forms with genes have two per layer, and W = G0 + l/L G1 as in TLEG.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylearngene as plg

PIXELS, CLASSES, HEAD = 768, 1000, 64

# form: what is trained, and how weights come to be
FORMS = {
    "dense": "a weight per layer",
    "eager": "two genes, every W formed by autograd operations and saved",
    "checkpointed": "two genes, every W formed again in the backward pass",
    "ours": "two genes, no W formed (pylearngene)",
    "dense+blocks": "a weight per layer, blocks checkpointed",
    "ours+blocks": "two genes, no W formed, blocks checkpointed",
}
WITH_GENES = ("eager", "checkpointed", "ours", "ours+blocks")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the network and of its batch.

    Attributes:
        width: D, a multiple of 64, which is the width of a head.
        batch: images.
        tokens: patches of an image.
    """

    width: int = 1024
    batch: int = 16
    tokens: int = 196


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, M, D] to the same shape."""
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, width // HEAD, HEAD)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Network(nn.Module):
    """Blocks between an embedding of patches and a head."""

    def __init__(self, sizes: Sizes, depth: int):
        super().__init__()
        self.embed = nn.Linear(PIXELS, sizes.width)
        self.position = nn.Parameter(torch.zeros(1, sizes.tokens, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes.width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, CLASSES)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Map patches [B, M, pixels] to logits."""
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(self.norm(x).mean(1))


class Combined(nn.Module):
    """A linear layer whose weight autograd forms from two genes, saved or formed again in the backward pass."""

    def __init__(self, genes: nn.ParameterList, biases: nn.ParameterList, share: float, again: bool):
        super().__init__()
        self.genes, self.biases, self.share, self.again = genes, biases, share, again

    def product(self, x: Tensor) -> Tensor:
        """Multiply x by W = G0 + share G1, which autograd forms."""
        weight = self.genes[0] + self.share * self.genes[1]
        return F.linear(x, weight, self.biases[0] + self.share * self.biases[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map x [*, I] to [*, O]."""
        return checkpoint(self.product, x, use_reentrant=False) if self.again else self.product(x)


def combine(net: Network, again: bool) -> Network:
    """Let the linear layers of all blocks share two genes each, those of the first two blocks."""
    for name, _ in list(net.blocks[0].named_children()):
        layers = [getattr(block, name) for block in net.blocks]
        if isinstance(layers[0], nn.Linear):
            first = (layers * 2)[:2] if len(layers) > 1 else [layers[0], nn.Linear(*layers[0].weight.shape[::-1])]
            genes = nn.ParameterList(layer.weight for layer in first)
            biases = nn.ParameterList(layer.bias for layer in first)
            for level, block in enumerate(net.blocks):
                setattr(block, name, Combined(genes, biases, level / len(net.blocks), again))
    return net


def network(form: str, sizes: Sizes, depth: int) -> nn.Module:
    """Build one form on the meta device, so that no weights exist that the form does without."""
    ours = form.startswith("ours")
    with torch.device("meta"):
        net: nn.Module = Network(sizes, 2 if ours else depth)
        if form in ("eager", "checkpointed"):
            combine(net, again=form == "checkpointed")
    if ours:
        net = plg.set_depth(plg.auxiliary(net, plg.methods.TLEG()), depth)
    net.recompute = form.endswith("+blocks")
    return net


@torch.no_grad()
def fill(net: nn.Module, device: torch.device) -> nn.Module:
    """Give a network of the meta device values: small and random, they only have to be finite."""
    net.to_empty(device=device)
    for parameter in net.parameters():
        parameter.normal_(std=0.02)
    return net


def loss(logits: Tensor) -> Tensor:
    """Cross entropy, with every image of the first class."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def estimate(form: str, sizes: Sizes, device: torch.device) -> Callable[[int], int]:
    """The estimated peak of a training step as a function of the depth."""
    batch = (sizes.batch, sizes.tokens, PIXELS)

    def at(depth: int) -> int:
        autocast = torch.bfloat16 if device.type == "cuda" else None
        found = plg.estimate_memory(network(form, sizes, depth), batch, loss=loss, autocast=autocast, device=device)
        return found.peak

    return at
