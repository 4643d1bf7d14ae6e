# SPDX-License-Identifier: Apache-2.0
"""The networks of the stages `train` and `compile`: a ViT and a GPT-2, dense, gene-backed and materializing.

The gene-backed ones come from the dense ones by `plg.auxiliary`; the materializing ones are the same with every
gene-backed layer replaced by what a user would write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.nn import ExpansionLayerNorm, ExpansionLinear


class Block(nn.Module):
    """A pre-norm transformer block: x [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer: images [B, 3, S, S] -> logits [B, C].

    Args:
        dim: D.
        depth: L.
        heads: of attention.
        image: S.
        patch: side of a patch.
        classes: C.
    """

    def __init__(self, dim: int, depth: int, heads: int, image: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class MaterializedLinear(nn.Module):
    """`F.linear` with a weight that torch makes from the genes in every call."""

    def __init__(self, genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: Sequence[float]) -> None:
        super().__init__()
        self.genes, self.coeffs = nn.ParameterList(genes), tuple(coeffs)
        self.biases = nn.ParameterList(biases)

    def forward(self, x: Tensor) -> Tensor:
        bias = _summed(self.biases, self.coeffs) if len(self.biases) else None
        return F.linear(x, _summed(self.genes, self.coeffs), bias)


class MaterializedNorm(MaterializedLinear):
    """`F.layer_norm` with a gain that torch makes from the genes in every call."""

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = _summed(self.genes, self.coeffs), _summed(self.biases, self.coeffs)
        return F.layer_norm(x, gain.shape, gain, bias)


def _summed(genes: nn.ParameterList, coeffs: tuple[float, ...]) -> Tensor:
    total = coeffs[0] * genes[0]
    for gene, coeff in zip(genes[1:], coeffs[1:], strict=True):
        total = total + coeff * gene
    return total


def materialize(net: nn.Module) -> nn.Module:
    """Replace every gene-backed layer of a network by its materializing form; genes stay shared Parameters."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ExpansionLinear | ExpansionLayerNorm):
                kind = MaterializedLinear if isinstance(layer, ExpansionLinear) else MaterializedNorm
                group = layer.bank.group(layer.name)
                setattr(parent, name, kind(group.weights(), group.biases(), layer.coeffs.tolist()))
    net.gene_bank.detach(net)
    return net


@dataclass(frozen=True)
class Net:
    """A network and its task.

    Attributes:
        name: of the columns.
        build: the dense network, on the CPU.
        batch: one batch on a device: what `loss` takes.
        loss: of a network and a batch.
        tokens: M of its linear layers.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    tokens: int


def vit(name: str, dim: int, depth: int, heads: int, image: int, batch: int) -> Net:
    """A ViT with patches of 16 and 1000 classes (of 4 and 10 below 64 pixels)."""
    patch, classes = (16, 1000) if image >= 64 else (4, 10)

    def draw(device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, image, image, device=device), torch.randint(classes, (batch,), device=device)

    def loss(net: Any, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(images).float(), labels)

    tokens = batch * ((image // patch) ** 2 + 1)
    return Net(name, lambda: ViT(dim, depth, heads, image, patch, classes), draw, loss, tokens)


def gpt2(name: str, dim: int, depth: int, heads: int, length: int, batch: int, words: int) -> Net:
    """A GPT-2 of transformers, without dropout."""

    def build() -> nn.Module:
        import transformers

        config = transformers.GPT2Config(
            vocab_size=words, n_positions=length, n_embd=dim, n_layer=depth, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).train()

    def draw(device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(words, (batch, length), device=device)
        return tokens, tokens.roll(-1, 1)

    def loss(net: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = net(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return Net(name, build, draw, loss, batch * length)


def backed(net: nn.Module, genes: int) -> nn.Module:
    """The gene-backed network: TLEG's two genes, or as many with powers of the depth as coefficients."""
    if genes == 2:
        return plg.auxiliary(net, plg.methods.TLEG())
    rule = plg.methods.Expansion(lambda index, depth: [((index + 1) / depth) ** k for k in range(genes)])
    return plg.auxiliary(net, rule)


def nets(tiny: bool) -> list[Net]:
    """The ViT-B at batch 128 and the medium GPT-2, or tiny ones."""
    if tiny:
        return [vit("vit_b", 32, 2, 2, 16, 2), gpt2("gpt2_medium", 32, 2, 2, 8, 2, 50)]
    return [vit("vit_b", 768, 12, 12, 224, 128), gpt2("gpt2_medium", 1024, 24, 16, 1024, 8, 50257)]
