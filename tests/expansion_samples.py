# SPDX-License-Identifier: Apache-2.0
"""A small gene-backed network, and the oracle that its gene gradients are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pylearngene.nn import ExpansionLayerNorm, ExpansionLinear, GeneBank

WIDTH = 6


class Block(nn.Module):
    def __init__(self, bank: GeneBank, level: int, depth: int, learn: bool, dtype: torch.dtype) -> None:
        super().__init__()
        shared = {"bank": bank, "coeffs": [1.0, level / depth], "learn_coeffs": learn}
        self.norm = ExpansionLayerNorm(WIDTH, dtype=dtype, name="norm", **shared)
        self.fc = ExpansionLinear(WIDTH, WIDTH, dtype=dtype, name="mlp.fc", **shared)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Net(nn.Module):
    """L gene-backed blocks; `recompute` says how they are checkpointed."""

    def __init__(
        self, depth: int = 4, learn: bool = False, dtype: torch.dtype = torch.float64, compute: str = "auto"
    ) -> None:
        super().__init__()
        bank = GeneBank(compute)
        self.blocks = nn.ModuleList(Block(bank, level, depth, learn, dtype) for level in range(depth))
        bank.attach(self)
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.recompute: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.recompute)
        return x


def unshared(net: Net, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Oracle: every layer gets its own copies of the genes, gradients are summed over copies in float64."""
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.gene_bank.named_genes()}
    copies = []
    y = x.double()
    for block in net.blocks:
        own = {name: p.detach().double().requires_grad_() for name, p in net.gene_bank.named_genes()}
        copies.append(own)

        def expand(part: str, layer: nn.Module, own: dict[str, Tensor] = own) -> Tensor:
            return sum(layer.coeffs.detach().double()[k] * own[f"{part}.{k}"] for k in range(2))

        h = nn.functional.layer_norm(y, (WIDTH,), expand("norm.weight", block.norm), expand("norm.bias", block.norm))
        y = y + torch.tanh(nn.functional.linear(h, expand("mlp.fc.weight", block.fc), expand("mlp.fc.bias", block.fc)))
    y.backward(dy.double())
    for own in copies:
        for name, leaf in own.items():
            sums[name] += leaf.grad
    return list(sums.values())


def gene_grads(net: Net) -> list[Tensor]:
    return [p.grad for _, p in net.gene_bank.named_genes()]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
