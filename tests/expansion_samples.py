# SPDX-License-Identifier: Apache-2.0
"""A small gene-backed network, and the oracle that its gene gradients are compared with."""

from __future__ import annotations

from collections.abc import Sequence

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

    def forward(self, x: Tensor, keep: Sequence[bool] | None = None) -> Tensor:
        """Through the blocks that `keep` says, or all of them."""
        for level, block in enumerate(self.blocks):
            if keep is not None and not keep[level]:
                continue
            if self.recompute is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.recompute)
        return x


def gradients_of_copies(net: Net, x: Tensor, dy: Tensor, keep: Sequence[bool] | None = None) -> dict[str, Tensor]:
    """Oracle: every layer has copies of the genes and its coefficients, all in float64; gradients of copies are summed.

    Returns:
        Gradients by name: of the net's parameters, of fixed coefficients, and of "x".
    """
    genes = {f"gene_bank.genes.{name}": p.detach().double() for name, p in net.gene_bank.named_genes()}
    sums = {name: torch.zeros_like(gene) for name, gene in genes.items()}
    leaf = x.detach().double().requires_grad_()
    y, copies, coefficients = leaf, [], {}
    for level, block in enumerate(net.blocks):
        if keep is not None and not keep[level]:
            continue
        own = {name: gene.clone().requires_grad_() for name, gene in genes.items()}
        coeffs = {part: getattr(block, part).coeffs.detach().double().requires_grad_() for part in ("norm", "fc")}
        copies.append(own)
        coefficients.update({f"blocks.{level}.{part}.coeffs": tensor for part, tensor in coeffs.items()})

        def expand(group: str, part: str, own: dict[str, Tensor] = own, coeffs: dict[str, Tensor] = coeffs) -> Tensor:
            c = coeffs["norm" if group == "norm" else "fc"]
            return sum(c[k] * own[f"gene_bank.genes.{group}.{part}.{k}"] for k in range(2))

        h = nn.functional.layer_norm(y, (WIDTH,), expand("norm", "weight"), expand("norm", "bias"))
        y = y + torch.tanh(nn.functional.linear(h, expand("mlp.fc", "weight"), expand("mlp.fc", "bias")))
    y.backward(dy.double())
    for own in copies:
        for name, tensor in own.items():
            sums[name] += tensor.grad
    return {**sums, **{name: tensor.grad for name, tensor in coefficients.items()}, "x": leaf.grad}


def unshared(net: Net, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The genes' gradients among `gradients_of_copies`, in their order."""
    found = gradients_of_copies(net, x, dy)
    return [found[f"gene_bank.genes.{name}"] for name, _ in net.gene_bank.named_genes()]


def gene_grads(net: Net) -> list[Tensor]:
    return [p.grad for _, p in net.gene_bank.named_genes()]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
