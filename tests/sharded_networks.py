# SPDX-License-Identifier: Apache-2.0
"""The small network that the samples shard, its training, and how two results are compared.

Which ways of sharding are tried is in sharding_samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import pylearngene as plg

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
WIDTH, BATCH, STEPS = 8, 8, 5


class Plain(nn.Module):
    """Four equal blocks between a stem and a head; `recompute` says how blocks are checkpointed."""

    def __init__(self, stem: bool = True, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH) if stem else nn.Identity()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3) if stem else nn.Identity()
        self.recompute: bool | None = None
        self.skipped: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number == self.skipped:
                continue
            y = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
            x = x + torch.tanh(y)
        return self.head(x)


class LowRank(Plain):
    """The same with layers of shared directions, whose strengths and biases are their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        bank = plg.nn.GeneBank()
        for block in self.blocks:
            block[1] = plg.nn.LowRankLinear(WIDTH, WIDTH, rank=3, bank=bank, name="fc", gate=True)
        bank.attach(self)


def network(learn: bool = False, seed: int = 0, low_rank: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    if low_rank:
        return LowRank(**options)
    method = plg.methods.Expansion(coeffs=lambda l, L: [1.0, l / L], learn=learn)  # noqa: E741
    net = plg.auxiliary(Plain(**options), method, blocks="blocks")
    for gene in net.gene_bank.parameters():
        nn.init.normal_(gene, std=0.5)
    return net


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def sharded(learn: bool = False, **options: Any) -> nn.Module:
    return plg.fully_shard_genes(network(learn, **options), mesh())


def batch(step: int) -> Tensor:
    return torch.randn(STEPS * 4, BATCH, WIDTH, generator=torch.Generator().manual_seed(1))[step]


def mine(x: Tensor, alone: bool) -> Tensor:
    return x if alone else x.tensor_split(WORLD)[RANK]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).float().square().sum(1).mean()


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def steps(
    net: nn.Module, alone: bool, numbers: Any = range(STEPS), optimizer: Any = None, parts: int = 1
) -> list[float]:
    """Train; returns the norms of the whole gradients, which are clipped. `parts` of each batch are accumulated."""
    optimizer, norms = optimizer or adamw(net), []
    for number in numbers:
        optimizer.zero_grad()
        pieces = batch(number).tensor_split(parts)
        for part, piece in enumerate(pieces):
            if not alone:
                net.set_requires_gradient_sync(part == parts - 1)
            (loss_of(net, mine(piece, alone)) / parts).backward()
        norms.append(float(whole(nn.utils.clip_grad_norm_(net.parameters(), 1.0))))
        optimizer.step()
    return norms


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def full(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).float() for name, tensor in net.state_dict().items()}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest difference of two states."""
    assert one.keys() == two.keys()
    return max(difference(one[name], two[name]) for name in one)


def difference(one: Tensor, two: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest element where that is above 1."""
    return float((one - two).abs().max() / one.abs().max().clamp(min=1.0))


def compared(
    shard: Callable[[nn.Module], Any], learn: bool = False, change: Any = None, **options: Any
) -> dict[str, Any]:
    """Train one network in this process alone and one in both; returns how far they are apart."""
    parts = options.pop("parts", 1)
    one, two = network(learn, **options), network(learn, **options)
    for net in (one, two):
        if change is not None:
            change(net)
    shard(two)
    first, second = steps(one, True, parts=parts), steps(two, False, parts=parts)
    slots = len(adamw(two).param_groups[0]["params"])
    return {
        "state": apart(full(one), full(two)),
        "norms": max(abs(a - b) / a for a, b in zip(first, second, strict=True)),
        "moved": apart(full(one), full(network(learn, **options))),
        "parameters": [slots, len(list(one.parameters()))],
    }
