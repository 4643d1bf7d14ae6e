# SPDX-License-Identifier: Apache-2.0
"""What the cases of `expansion` share: genes of one block position for L layers, and every way to get a weight.

A weight is gene-backed, ready, or made again from genes by torch. Training steps of blocks are here, single products
in `expansion_products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylearngene as plg

# name of a layer: (O, I) in units of D
LAYERS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
HEAD = 64

# x, weight genes, bias genes, coefficients -> y
Apply = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], tuple[float, ...]], Tensor]


def powers(layer: int, depth: int, genes: int) -> tuple[float, ...]:
    """Coefficients of layer l of L, counted from 0: powers of (l + 1) / L, none of them zero."""
    return tuple(((layer + 1) / depth) ** k for k in range(genes))


def synthesize(genes: Sequence[Tensor], coeffs: Sequence[float]) -> Tensor:
    """`sum_k c_k G_k` by the fewest torch operations; differentiable."""
    weight = genes[0] * coeffs[0]
    for gene, coeff in zip(genes[1:], coeffs[1:], strict=True):
        weight.add_(gene, alpha=coeff)
    return weight


def materialized(x: Tensor, genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: Sequence[float]) -> Tensor:
    """The eager baseline: make the weight, then `F.linear`."""
    return F.linear(x, synthesize(genes, coeffs), synthesize(biases, coeffs))


def checkpointed(x: Tensor, genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: Sequence[float]) -> Tensor:
    """The eager baseline that keeps no weight for the backward pass, but makes it again there."""
    y: Tensor = checkpoint(materialized, x, genes, biases, coeffs, use_reentrant=False, preserve_rng_state=False)
    return y


def compiled() -> Apply:
    """`materialized` as `torch.compile` likes it best: coefficients in tensors, static shapes, one graph a layer."""
    function = torch.compile(_materialized_by_tensor, fullgraph=True, dynamic=False)
    return lambda x, genes, biases, coeffs: function(x, genes, biases, _tensor(coeffs))


def _materialized_by_tensor(x: Tensor, genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    weight = sum(coeff * gene for coeff, gene in zip(coeffs, genes, strict=True))
    bias = sum(coeff * gene for coeff, gene in zip(coeffs, biases, strict=True))
    return F.linear(x, weight.to(genes[0].dtype), bias.to(genes[0].dtype))


@lru_cache
def _tensor(coeffs: tuple[float, ...]) -> Tensor:
    return torch.tensor(coeffs)


class Network:
    """One set of inputs of a training step: genes of four layers, L gene-backed layers each, the same dense, and x.

    Args:
        dim: D.
        depth: L.
        genes: K.
        leading: axes of x ahead of D.
        dtype: of everything; in training bfloat16 means float32 parameters under autocast.
        train: whether parameters and x get gradients.
    """

    def __init__(
        self, dim: int, depth: int, genes: int, leading: tuple[int, ...], dtype: torch.dtype, train: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        stored = torch.float32 if train else dtype
        self.autocast = train and dtype != torch.float32
        self.bank = plg.nn.GeneBank()
        self.coeffs = [powers(layer, depth, genes) for layer in range(depth)] if depth > 1 else [powers(7, 12, genes)]
        self.ours: list[dict[str, nn.Module]] = [
            {
                name: plg.nn.ExpansionLinear(inner * dim, outer * dim, bank=self.bank, name=name, coeffs=coeffs)
                for name, (outer, inner) in LAYERS.items()
            }
            for coeffs in self.coeffs
        ]
        for gene in self.bank.parameters():
            scale = gene.shape[-1] ** -0.5 if gene.dim() == 2 else 0.1
            nn.init.normal_(gene, 0.0, scale, generator=generator)
        self.bank.to(stored).requires_grad_(train)
        self.dense = [
            {name: layer.to_dense().requires_grad_(train) for name, layer in row.items()} for row in self.ours
        ]
        self.genes = {name: (group.weights(), group.biases()) for name, group in self.bank.groups.items()}
        self.x = torch.randn(*leading, dim, generator=generator).to(stored).requires_grad_(train)
        self.dy = torch.randn(*leading, dim, generator=generator)

    def layers(self, apply: Apply | str) -> list[dict[str, Callable[[Tensor], Tensor]]]:
        """Per depth and name what maps x to y: modules for "ours" and "dense", else `apply` on the genes."""
        if isinstance(apply, str):
            return {"ours": self.ours, "dense": self.dense}[apply]
        return [
            {name: lambda x, g=genes, c=coeffs: apply(x, *g, c) for name, genes in self.genes.items()}
            for coeffs in self.coeffs
        ]

    def parameters(self, apply: Apply | str) -> list[Tensor]:
        """What a training step differentiates by, x aside."""
        if apply == "dense":
            return [parameter for row in self.dense for layer in row.values() for parameter in layer.parameters()]
        return list(self.bank.parameters())


def step(net: Network, apply: Apply | str) -> Iterator[tuple[str, Tensor]]:
    """Forward and backward of L blocks; the gradients of dense weights have no counterpart and are not given."""
    parameters = net.parameters(apply)
    for tensor in (net.x, *parameters):
        tensor.grad = None
    if apply == "ours":  # an optimizer has changed the genes since the last step, so that copies of them are stale
        torch.autograd.graph.increment_version(parameters)
    with torch.autocast("cpu", torch.bfloat16) if net.autocast else nullcontext():
        y = blocks(net.x, net.layers(apply))
    y.backward(net.dy)
    yield "y", y
    yield "dx", net.x.grad
    if apply != "dense":
        for name, gene in net.bank.named_genes():
            yield f"d {name}", gene.grad


def step_reference(net: Network) -> Iterator[tuple[str, Tensor]]:
    """`step` in float64."""
    x = net.x.detach().double().requires_grad_()
    genes = {key: tuple([g.requires_grad_() for g in double(part)] for part in pair) for key, pair in net.genes.items()}
    layers = [{n: lambda x, g=g, c=c: materialized(x, *g, c) for n, g in genes.items()} for c in net.coeffs]
    y = blocks(x, layers)
    y.backward(net.dy.double())
    yield "y", y
    yield "dx", x.grad
    for name, pair in genes.items():
        for part, tensors in zip(("weight", "bias"), pair, strict=True):
            for k, gene in enumerate(tensors):
                yield f"d {name}.{part}.{k}", gene.grad


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def blocks(x: Tensor, layers: Sequence[dict[str, Callable[[Tensor], Tensor]]]) -> Tensor:
    """Pre-norm transformer blocks with plain norms: x `[B, T, D]` -> `[B, T, D]`."""
    width = x.shape[-1]
    for row in layers:
        qkv = row["qkv"](F.layer_norm(x, (width,)))
        q, k, v = qkv.unflatten(-1, (3, max(1, width // HEAD), -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + row["proj"](attended)
        x = x + row["fc2"](F.gelu(row["fc1"](F.layer_norm(x, (width,)))))
    return x
