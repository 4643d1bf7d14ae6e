# SPDX-License-Identifier: Apache-2.0
"""The GPU cases of few tokens through many layers that share genes, and of what a call costs on the host.

A stack is every linear layer of L blocks, one after the other as a network calls them: its dense weights come from
memory every time, its genes stay in L2 where they fit. Single products are in `expansion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import pylearngene as plg
from benchmarks.cases import Call, Case
from benchmarks.expansion_inputs import LAYERS, powers, synthesize

HOST_COEFFS = (1.0, 0.5)
MODES = ("no grad", "recorded", "backward")


class Stack:
    """Genes of four layers, coefficients per block, ready weights, and one x per width.

    Args:
        dim: D.
        depth: L.
        genes: K.
        tokens: M.
        dtype: of x, genes and weights.
        device: of all.
    """

    def __init__(self, dim: int, depth: int, genes: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        self.numbers = [powers(layer, depth, genes) for layer in range(depth)]
        self.coeffs = [torch.tensor(numbers, device=device) for numbers in self.numbers]
        self.genes = {
            name: [draw(out * dim, inner * dim).mul_((inner * dim) ** -0.5) for _ in range(genes)]
            for name, (out, inner) in LAYERS.items()
        }
        self.weights = [
            {name: synthesize(tensors, numbers) for name, tensors in self.genes.items()} for numbers in self.numbers
        ]
        self.x = {name: draw(tokens, inner * dim) for name, (_, inner) in LAYERS.items()}


def _ours(s: Stack) -> Iterator[tuple[str, Tensor]]:
    for layer, coeffs in enumerate(s.coeffs):
        for name, genes in s.genes.items():
            yield f"{name}.{layer}", plg.functional.expansion_linear(s.x[name], genes, coeffs)


def _dense(s: Stack) -> Iterator[tuple[str, Tensor]]:
    for layer, weights in enumerate(s.weights):
        for name, weight in weights.items():
            yield f"{name}.{layer}", F.linear(s.x[name], weight)


def _eager(s: Stack) -> Iterator[tuple[str, Tensor]]:
    for layer, numbers in enumerate(s.numbers):
        for name, genes in s.genes.items():
            yield f"{name}.{layer}", F.linear(s.x[name], synthesize(genes, numbers))


def _reference(s: Stack) -> Iterator[tuple[str, Tensor]]:
    for layer, coeffs in enumerate(s.coeffs):
        for name, genes in s.genes.items():
            weight = synthesize([gene.double() for gene in genes], coeffs.double().tolist())
            yield f"{name}.{layer}", s.x[name].double() @ weight.t()


def stack_case(
    dim: int, depth: int, genes: int, tokens: int, device: torch.device, pinned: Callable[[str, Call], Call]
) -> Case:
    """Every layer of L blocks on M tokens; `pinned` makes a call that takes one regime."""
    weights = sum(out * inner for out, inner in LAYERS.values()) * dim * dim
    return Case(
        "expansion", "stack", "auto", f"{depth} x D{dim}", tokens, genes, torch.bfloat16,
        make=partial(Stack, dim, depth, genes, tokens, torch.bfloat16, device),
        ours=_ours, reference=_reference,
        baselines={
            "dense": _dense, "eager": _eager,
            **{f"ours, {regime}": pinned(regime, _ours) for regime in ("rows", "fused", "panel")},
        },
        weights=depth * weights, moved=2 * genes * weights,
    )  # fmt: skip


class Tiny:
    """One tiny gene-backed layer, the plain weight that computes the same, and x.

    Args:
        width: I = O.
        dtype: of all.
        device: of all.
        train: whether x, genes and the weight get gradients.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, train: bool) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        self.bank = plg.nn.GeneBank()
        self.layer = plg.nn.ExpansionLinear(
            width, width, False, device, dtype, bank=self.bank, name="layer", coeffs=HOST_COEFFS
        )
        with torch.no_grad():
            for gene in self.bank.parameters():
                gene.copy_(draw(width, width) * width**-0.5)
        self.bank.requires_grad_(train)
        self.genes = self.bank.group("layer").weights()
        self.coeffs = torch.tensor(HOST_COEFFS, device=device)
        self.weight = synthesize([gene.detach() for gene in self.genes], HOST_COEFFS).requires_grad_(train)
        self.x, self.dy = draw(1, width).requires_grad_(train), draw(1, width)


def host_case(width: int, mode: str, repeats: int, device: torch.device) -> Case:
    """A layer and the function against `F.linear`, called over and over: the time of the host."""

    def repeated(apply: Callable[[Tiny], Tensor], parameters: Callable[[Tiny], list[Tensor]]) -> Call:
        def call(s: Tiny) -> Iterator[tuple[str, Tensor]]:
            with torch.set_grad_enabled(mode != "no grad"):
                for _ in range(repeats):
                    y = apply(s)
                    if mode == "backward":
                        grads = torch.autograd.grad(y, (s.x, *parameters(s)), s.dy)
            yield "y", y
            if mode == "backward":
                yield "dx", grads[0]

        return call

    def genes(s: Tiny) -> list[Tensor]:
        return list(s.genes)

    def reference(s: Tiny) -> Iterator[tuple[str, Tensor]]:
        weight = synthesize([gene.detach().double() for gene in s.genes], HOST_COEFFS)
        yield "y", s.x.detach().double() @ weight.t()
        if mode == "backward":
            yield "dx", s.dy.double() @ weight

    return Case(
        "expansion", "host", "auto", f"linear {width}, {mode}", 1, 2, torch.bfloat16,
        make=partial(Tiny, width, torch.bfloat16, device, mode != "no grad"),
        ours=repeated(lambda s: s.layer(s.x), genes), reference=reference,
        baselines={
            "dense": repeated(lambda s: F.linear(s.x, s.weight), lambda s: [s.weight]),
            "ours, function": repeated(lambda s: plg.functional.expansion_linear(s.x, s.genes, s.coeffs), genes),
        },
        repeats=repeats,
    )  # fmt: skip
