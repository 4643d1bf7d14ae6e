# SPDX-License-Identifier: Apache-2.0
"""Peak bytes of a training step against depth, measured for stacks of transformer blocks made in four ways.

All four checkpoint the activations of every block, so that weights are what is left to compare. Nothing is
computed on paper: every figure is the allocator's own peak over building the stack, AdamW and two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from pylearngene.cli.report.labels import MEMORY_KINDS
from pylearngene.nn import ExpansionLayerNorm, ExpansionLinear, GeneBank
from pylearngene.training import peak_bytes

HEAD_DIM = 64
TOKENS = 16


class Block(nn.Module):
    """A pre-norm transformer block whose layers are made by the two functions given."""

    def __init__(self, dim: int, linear: Callable[[str, int, int], nn.Module], norm: Callable[[str], nn.Module]):
        super().__init__()
        self.heads = max(1, dim // HEAD_DIM)
        self.norm1, self.norm2 = norm("norm1"), norm("norm2")
        self.qkv, self.proj = linear("qkv", dim, 3 * dim), linear("proj", dim, dim)
        self.fc1, self.fc2 = linear("fc1", dim, 4 * dim), linear("fc2", 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, M, D] to the same shape."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def _dense_block(dim: int, device: str = "cpu") -> Block:
    return Block(dim, lambda _, i, o: nn.Linear(i, o, device=device), lambda _: nn.LayerNorm(dim, device=device))


def _gene_block(dim: int, bank: GeneBank, coeffs: tuple[float, float]) -> Block:
    return Block(
        dim,
        lambda name, i, o: ExpansionLinear(i, o, bank=bank, name=name, coeffs=coeffs),
        lambda name: ExpansionLayerNorm(dim, bank=bank, name=name, coeffs=coeffs),
    )


class DenseStack(nn.Module):
    """Blocks with weights of their own, or gene-backed blocks when a bank is given."""

    def __init__(self, dim: int, depth: int, bank: GeneBank | None = None):
        super().__init__()
        blocks = (
            _dense_block(dim) if bank is None else _gene_block(dim, bank, (1.0, layer / depth))
            for layer in range(depth)
        )
        self.blocks = nn.ModuleList(blocks)
        if bank is not None:
            bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        """Run x [B, M, D] through all blocks, each checkpointed."""
        for block in self.blocks:
            x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
        return x


class EagerStack(nn.Module):
    """The same genes and the same rule in plain torch: weights are made by tensor operations, then used."""

    def __init__(self, dim: int, depth: int, recompute: bool):
        super().__init__()
        self.depth, self.recompute = depth, recompute
        self.template = [_dense_block(dim, "meta")]  # in a list: holds no weights and is no part of the module
        names = [name.replace(".", "_") for name, _ in self.template[0].named_parameters()]
        shapes = [parameter.shape for parameter in self.template[0].parameters()]
        self.genes = nn.ParameterDict(
            {
                f"{name}_{k}": 0.02 * torch.randn(shape)
                for name, shape in zip(names, shapes, strict=True)
                for k in (0, 1)
            }
        )

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Make the weights of a block: W = G0 + (l / L) G1."""
        share = layer / self.depth
        genes = self.genes
        return {
            name: genes[f"{name.replace('.', '_')}_0"] + share * genes[f"{name.replace('.', '_')}_1"]
            for name, _ in self.template[0].named_parameters()
        }

    def forward(self, x: Tensor) -> Tensor:
        """Run x [B, M, D] through all blocks, each checkpointed, with the weights made outside or inside of it."""
        for layer in range(self.depth):
            made = None if self.recompute else self.weights(layer)
            x = cast(Tensor, checkpoint(self._block, x, layer, made, use_reentrant=False))
        return x

    def _block(self, x: Tensor, layer: int, made: dict[str, Tensor] | None) -> Tensor:
        weights = self.weights(layer) if made is None else made
        return cast(Tensor, functional_call(self.template[0], weights, (x,)))


def build_stack(kind: str, dim: int, depth: int) -> nn.Module:
    """Build a stack of one of `MEMORY_KINDS`."""
    if kind == "dense":
        return DenseStack(dim, depth)
    if kind == "ours":
        stack = DenseStack(dim, depth, GeneBank())
        for parameter in stack.parameters():
            nn.init.normal_(parameter, std=0.02)
        return stack
    return EagerStack(dim, depth, recompute=kind == "recomputed")


def training_peak(kind: str, dim: int, depth: int) -> int:
    """Measure the peak bytes of building a stack, its AdamW and two training steps of one sample."""

    def steps() -> nn.Module:
        stack = build_stack(kind, dim, depth)
        optimizer = AdamW(stack.parameters(), lr=1e-4, fused=True)  # fused: no temporaries, the same for all kinds
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            stack(torch.ones(1, TOKENS, dim)).square().mean().backward()
            optimizer.step()
        return stack

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peak_bytes(steps)


@dataclass(frozen=True)
class MemoryPoint:
    """One measurement."""

    kind: str
    depth: int
    peak_bytes: int


def measure(dim: int, depths: tuple[int, ...], progress: bool | None) -> list[dict[str, Any]]:
    """Measure every kind at every depth, on one thread: the products of one sample are too small to share."""
    hide = None if progress is None else not progress
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        points = tqdm(_points(dim, depths), "memory", len(MEMORY_KINDS) * len(depths), disable=hide)
        return [vars(point) for point in points]
    finally:
        torch.set_num_threads(threads)


def _points(dim: int, depths: tuple[int, ...]) -> Iterator[MemoryPoint]:
    for depth in depths:
        for kind in MEMORY_KINDS:
            yield MemoryPoint(kind, depth, training_peak(kind, dim, depth))
