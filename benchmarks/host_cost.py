# SPDX-License-Identifier: Apache-2.0
"""The cases of host cost: layers so small that a call is nothing but what Python and PyTorch do around the product.

Every call is repeated within a round, warm, and given per repeat; the columns `above_us` of the baselines are the
cost of a gene-backed call over that of the plain one. Larger sizes are in the file of each primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from benchmarks.cases import Call, Case
from pylearngene import _backends, plan

GENES, COEFFS = 2, (1.0, 0.5)
MODES = ("no grad", "recorded", "backward")
Apply = Callable[[Tensor], Tensor]


class Inputs:
    """One tiny gene-backed layer, the plain layer and the plain function that compute the same, and x.

    Args:
        kind: "linear" or "norm".
        width: I, and O of a linear layer.
        bias: whether there are bias genes.
        train: whether x and the genes get gradients.
    """

    def __init__(self, kind: str, width: int, bias: bool, train: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bank = plg.nn.GeneBank()
        shared = {"bias": bias, "bank": self.bank, "name": "layer", "coeffs": COEFFS}
        self.layer: nn.Module = (
            plg.nn.ExpansionLinear(width, width, **shared)
            if kind == "linear"
            else plg.nn.ExpansionLayerNorm(width, **shared)
        )
        for gene in self.bank.parameters():
            nn.init.normal_(gene, 0.0, width**-0.5, generator=generator)
        self.bank.requires_grad_(train)
        self.plain: nn.Module = self.layer.to_dense().requires_grad_(train)
        group = self.bank.group("layer")
        self.genes, self.biases = group.weights(), group.biases()
        self.coeffs = torch.tensor(COEFFS)
        self.x = torch.randn(1, width, generator=generator).requires_grad_(train)
        self.dy = torch.randn(1, width, generator=generator)


def cases(widths: tuple[int, ...], repeats: int) -> list[Case]:
    """Layers and functions of every width, each without gradients, recorded for a backward pass, and with it."""
    found = []
    for mode in MODES:
        for width in widths:
            for bias in (True, False):
                found.append(_case("linear", width, bias, mode, repeats))
            found.append(_case("functional", width, True, mode, repeats))
        found.append(_case("norm", widths[-1], True, mode, repeats))
    return found


def _case(subject: str, width: int, bias: bool, mode: str, repeats: int) -> Case:
    kind = "norm" if subject == "norm" else "linear"
    ours, function = (_function if subject == "functional" else _layer), (_norm if kind == "norm" else _linear)
    return Case(
        "expansion", "host", plan.choose(1, _backends.implementation(torch.device("cpu"))),
        f"{subject}{'' if bias else ' without bias'} {width}, {mode}", 1, GENES, torch.float32,
        make=partial(Inputs, kind, width, bias, mode != "no grad"),
        ours=_repeated(ours, mode, repeats), reference=partial(_reference, kind=kind, mode=mode),
        baselines={"function": _repeated(function, mode, repeats), "module": _repeated(_module, mode, repeats)},
        repeats=repeats,
    )  # fmt: skip


def _layer(inputs: Inputs) -> Apply:
    return inputs.layer


def _module(inputs: Inputs) -> Apply:
    return inputs.plain


def _function(inputs: Inputs) -> Apply:
    return lambda x: plg.functional.expansion_linear(x, inputs.genes, inputs.coeffs, inputs.biases)


def _linear(inputs: Inputs) -> Apply:
    weight, bias = inputs.plain.weight, inputs.plain.bias
    return lambda x: F.linear(x, weight, bias)


def _norm(inputs: Inputs) -> Apply:
    weight, bias, size = inputs.plain.weight, inputs.plain.bias, inputs.x.shape[-1:]
    return lambda x: F.layer_norm(x, size, weight, bias)


def _repeated(apply_of: Callable[[Inputs], Apply], mode: str, repeats: int) -> Call:
    """The call `repeats` times; what the last one gave is the result."""

    def call(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        apply, x = apply_of(inputs), inputs.x
        with torch.set_grad_enabled(mode != "no grad"):
            for _ in range(repeats):
                y = apply(x)
                if mode == "backward":
                    _forget(inputs)
                    y.backward(inputs.dy)
        yield "y", y
        if mode == "backward":
            yield from _gradients(inputs)

    return call


def _forget(inputs: Inputs) -> None:
    for tensor in (inputs.x, *inputs.genes, *inputs.biases, *inputs.plain.parameters()):
        tensor.grad = None


def _gradients(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """dx, and where the genes were used, theirs; the gradients of dense weights have no counterpart."""
    assert inputs.x.grad is not None
    yield "dx", inputs.x.grad
    for name, gene in inputs.bank.named_genes():
        if gene.grad is not None:
            yield f"d {name}", gene.grad


def _reference(inputs: Inputs, kind: str, mode: str) -> Iterator[tuple[str, Tensor]]:
    """The layer in float64."""
    backward = mode == "backward"
    x = inputs.x.detach().double().requires_grad_(backward)
    genes = {name: gene.detach().double().requires_grad_(backward) for name, gene in inputs.bank.named_genes()}
    tensors = list(genes.values())
    with torch.set_grad_enabled(backward):
        parts = (tensors[:GENES], tensors[GENES:])
        weight, *bias = [sum(c * gene for c, gene in zip(COEFFS, part, strict=True)) for part in parts if part]
        y = F.linear(x, weight, *bias) if kind == "linear" else F.layer_norm(x, x.shape[-1:], weight, *bias)
    yield "y", y
    if backward:
        grads = torch.autograd.grad(y, (x, *tensors), inputs.dy.double())
        yield from zip(("dx", *(f"d {name}" for name in genes)), grads, strict=True)
