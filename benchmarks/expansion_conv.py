# SPDX-License-Identifier: Apache-2.0
"""The cases of `expansion` for convolutions: residual stages of 3x3 convolutions that share genes.

Baselines are dense convolutions on ready weights, and weights made from genes by torch. Listed with the other cases
of `expansion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from benchmarks.cases import Case
from benchmarks.expansion_inputs import powers, synthesize


def convolved(x: Tensor, genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: tuple[float, ...]) -> Tensor:
    """The eager baseline: make the weight, then `F.conv2d`."""
    return F.conv2d(x, synthesize(genes, coeffs), synthesize(biases, coeffs), padding=1)


class Stage:
    """One set of inputs: genes of one 3x3 convolution, L gene-backed layers, the same layers dense, and images.

    Args:
        channels: C = O.
        side: H = W.
        depth: L.
        images: B.
        dtype: of everything; in training bfloat16 means float32 parameters under autocast.
        train: whether parameters and x get gradients.
    """

    def __init__(self, channels: int, side: int, depth: int, images: int, dtype: torch.dtype, train: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        stored = torch.float32 if train else dtype
        self.autocast = train and dtype != torch.float32
        self.bank = plg.nn.GeneBank()
        self.coeffs = [powers(layer, depth, 2) for layer in range(depth)]
        shared = {"padding": 1, "bank": self.bank, "name": "conv"}
        self.ours = [plg.nn.ExpansionConv2d(channels, channels, 3, coeffs=c, **shared) for c in self.coeffs]
        for gene in self.bank.parameters():
            nn.init.normal_(gene, 0.0, gene[0].numel() ** -0.5 if gene.dim() == 4 else 0.1, generator=generator)
        self.bank.to(stored).requires_grad_(train)
        self.dense = [layer.to_dense().requires_grad_(train) for layer in self.ours]
        self.x = torch.randn(images, channels, side, side, generator=generator).to(stored).requires_grad_(train)
        self.dy = torch.randn(images, channels, side, side, generator=generator)

    def layers(self, apply: str) -> Sequence[Callable[[Tensor], Tensor]]:
        """What maps x to y, per layer: for "ours", "dense" or "eager"."""
        group = self.bank.group("conv")
        eager = [
            partial(convolved, genes=group.weights(), biases=group.biases(), coeffs=coeffs) for coeffs in self.coeffs
        ]
        return {"ours": self.ours, "dense": self.dense, "eager": eager}[apply]


def _forward(stage: Stage, apply: str) -> Iterator[tuple[str, Tensor]]:
    for depth, layer in enumerate(stage.layers(apply)):
        yield f"conv.{depth}", layer(stage.x)


def _forward_reference(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    genes, biases = _double(stage)
    for depth, coeffs in enumerate(stage.coeffs):
        yield f"conv.{depth}", convolved(stage.x.double(), genes, biases, coeffs)


def _step(stage: Stage, apply: str) -> Iterator[tuple[str, Tensor]]:
    parameters = list(stage.bank.parameters())
    for tensor in (stage.x, *parameters, *(p for layer in stage.dense for p in layer.parameters())):
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16) if stage.autocast else nullcontext():
        y = _residual(stage.x, stage.layers(apply))
    y.backward(stage.dy)
    yield "y", y
    yield "dx", stage.x.grad
    if apply != "dense":
        for name, gene in stage.bank.named_genes():
            yield f"d {name}", gene.grad


def _step_reference(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    x = stage.x.detach().double().requires_grad_()
    genes, biases = ([gene.requires_grad_() for gene in part] for part in _double(stage))
    y = _residual(x, [partial(convolved, genes=genes, biases=biases, coeffs=coeffs) for coeffs in stage.coeffs])
    y.backward(stage.dy.double())
    yield "y", y
    yield "dx", x.grad
    for (name, _), gene in zip(stage.bank.named_genes(), (*genes, *biases), strict=True):
        yield f"d {name}", gene.grad


def _double(stage: Stage) -> tuple[list[Tensor], list[Tensor]]:
    group = stage.bank.group("conv")
    return [g.detach().double() for g in group.weights()], [b.detach().double() for b in group.biases()]


def _residual(x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for layer in layers:
        x = x + F.gelu(layer(x))
    return x


def cases(stages: Sequence[tuple[int, int]], depth: int, images: int, dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Forward and training cases of every (channels, side)."""
    return [
        _case(channels, side, depth, images, dtype, train=train)
        for channels, side in stages
        for dtype in dtypes
        for train in (False, True)
    ]


def _case(channels: int, side: int, depth: int, images: int, dtype: torch.dtype, *, train: bool) -> Case:
    call = _step if train else _forward
    tolerances = {torch.float32: 1e-4, torch.bfloat16: 5e-2} if train else {}
    return Case(
        "expansion", "training" if train else "forward", "panel", f"{depth} x conv{channels} {side} x {side}",
        images * side * side, 2, dtype,
        make=partial(Stage, channels, side, depth, images, dtype, train),
        ours=partial(call, apply="ours"), reference=_step_reference if train else _forward_reference,
        baselines={"dense": partial(call, apply="dense"), "eager": partial(call, apply="eager")},
        tolerance=tolerances.get(dtype, 0.0),
    )  # fmt: skip
