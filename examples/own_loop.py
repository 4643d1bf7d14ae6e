# SPDX-License-Identifier: Apache-2.0
"""A training loop of your own over several processes, with gradients accumulated over two parts of each batch.

    torchrun --nproc-per-node 2 examples/own_loop.py
    python examples/own_loop.py

Both print the same losses. A gene-backed network needs no option of DistributedDataParallel: each gene is one
parameter with one gradient, however many layers use it.
"""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pylearngene as plg

BATCH, PARTS, STEPS = 24, 2, 5


class Block(nn.Module):
    """A residual block of the network below."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, D] to the same shape."""
        return x + torch.tanh(self.fc(self.norm(x)))


class Network(nn.Module):
    """A small classifier with repeated blocks."""

    def __init__(self, width: int = 16, depth: int = 4, classes: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, D] to logits [B, classes]."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(net: nn.Module, images: Tensor, labels: Tensor, rank: int, world: int) -> list[float]:
    """Train on this process's share of every batch; returns the loss of every step, the same in every process."""
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        mine = torch.arange(step * BATCH, (step + 1) * BATCH).tensor_split(world)[rank].tensor_split(PARTS)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for number, index in enumerate(mine):
            last = number == PARTS - 1
            with model.no_sync() if world > 1 and not last else contextlib.nullcontext():
                loss = F.cross_entropy(model(images[index]), labels[index], reduction="sum") / BATCH
                # gradients are averaged over the processes, and the parts are to be added up
                (loss * world).backward()
                total += loss.detach()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def main() -> list[float]:
    """Train in as many processes as were launched; returns and prints the losses."""
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    torch.manual_seed(0)
    net = plg.auxiliary(Network(), plg.methods.TLEG()).double()
    images = torch.randn(STEPS * BATCH, 16, dtype=torch.float64)
    labels = torch.randint(3, (STEPS * BATCH,))
    losses = train(net, images, labels, rank, world)
    if rank == 0:
        print(" ".join(repr(loss) for loss in losses))
    if several:
        dist.destroy_process_group()  # after the last use of DistributedDataParallel: the wrapper is gone
    return losses


if __name__ == "__main__":
    main()
