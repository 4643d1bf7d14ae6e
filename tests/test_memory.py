# SPDX-License-Identifier: Apache-2.0
"""The promise that no full weight is held: peaks of forward and backward, what is saved, growth with depth.

Allocator events see every tensor, the resident set sees native buffers too. Each bound is shown to fail on a cheat.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import is_lazy

import pylearngene as plg
from pylearngene.training.memory import peak_bytes

MIB = 1 << 20
SIDE = 4096  # O = I: one float32 weight is 64 MiB
PANELS = 2 * MIB
SMALL = 1 * MIB  # scalars, coefficients, row dots, profiler slack


def materialized(x: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    """The cheat that the bounds must catch: the full weight, by autograd."""
    return F.linear(x, sum(c * g for c, g in zip(coeffs, genes, strict=True)))


def synthesized(x: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    return plg.functional.expansion_linear(x, genes, coeffs)


def inputs(tokens: int, side: int = SIDE) -> tuple[Tensor, list[Tensor], Tensor]:
    x = torch.randn(tokens, side, requires_grad=True)
    genes = [torch.randn(side, side).requires_grad_() for _ in range(2)]
    return x, genes, torch.tensor([1.0, 0.5], requires_grad=True)


def forward_excess(fn: Callable[..., Tensor], tokens: int) -> int:
    """Bytes at the peak of the forward above outputs and panels."""
    x, genes, coeffs = inputs(tokens)
    return peak_bytes(lambda: fn(x, genes, coeffs)) - tokens * SIDE * 4 - PANELS


def backward_excess(fn: Callable[..., Tensor], tokens: int) -> int:
    """Bytes at the peak of the backward above dx, panels and the gradients of the genes."""
    x, genes, coeffs = inputs(tokens)
    y = fn(x, genes, coeffs)
    dy = torch.ones_like(y)
    return peak_bytes(lambda: y.backward(dy)) - tokens * SIDE * 4 - PANELS - 2 * SIDE * SIDE * 4


@pytest.mark.parametrize("tokens", [4, 256])
@pytest.mark.parametrize("excess", [forward_excess, backward_excess])
def test_peak_is_outputs_panels_and_gradients(excess: Callable[..., int], tokens: int) -> None:
    assert excess(synthesized, tokens) <= SMALL
    assert excess(materialized, tokens) > 32 * MIB


RESIDENT = """
import ctypes, sys, torch, pylearngene as plg
import torch.nn.functional as F
tokens, cheat = int(sys.argv[1]), sys.argv[2] == "cheat"
side, c = 4096, torch.tensor([1.0, 0.5])
def high():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
def run(x, genes):
    if cheat:
        return F.linear(x, c[0] * genes[0] + c[1] * genes[1])
    return plg.functional.expansion_linear(x, genes, c)
genes = [torch.randn(side, side) for _ in range(2)]
x = torch.randn(tokens, side)
run(x[:, :64].contiguous(), [g[:64, :64].contiguous() for g in genes])  # loads the libraries
open("/proc/self/clear_refs", "w").write("5")
before = high()
y = run(x, genes)
print(high() - before - y.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tokens", [4, 256])
def test_resident_set_grows_by_outputs_and_panels(tokens: int) -> None:
    """Native buffers too: the BLAS may pack operands, but not a weight."""

    def grown(kind: str) -> int:
        command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-c", RESIDENT, str(tokens), kind]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert grown("ours") <= PANELS + 12 * MIB
    assert grown("cheat") >= 48 * MIB


def saved_tensors(fn: Callable[[], Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fn().sum()
    return seen


@pytest.mark.parametrize("fn", [synthesized, materialized])
def test_nothing_weight_sized_is_saved_but_the_genes(fn: Callable[..., Tensor]) -> None:
    x, genes, coeffs = inputs(3, 64)
    storages = {gene.untyped_storage().data_ptr() for gene in genes}
    foreign = [
        t
        for t in saved_tensors(lambda: fn(x, genes, coeffs))
        if t.numel() >= 64 * 64 and t.untyped_storage().data_ptr() not in storages
    ]
    assert (len(foreign) == 0) == (fn is synthesized)


class Stack(torch.nn.Module):
    """L square layers on one pair of genes."""

    def __init__(self, depth: int, side: int, cheat: bool) -> None:
        super().__init__()
        bank = plg.nn.GeneBank()
        self.cheat = cheat
        self.layers = torch.nn.ModuleList(
            plg.nn.ExpansionLinear(side, side, bank=bank, name="fc", coeffs=[1.0, level / depth])
            for level in range(depth)
        )
        bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            group = layer.bank.group("fc")
            x = materialized(x, list(group.weight), layer.coeffs) if self.cheat else layer(x)
            x = torch.tanh(x)
        return x


def step_peak(depth: int, side: int, cheat: bool = False) -> int:
    model = Stack(depth, side, cheat)
    x = torch.randn(2, side)
    return peak_bytes(lambda: model(x).sum().backward())


def test_peak_does_not_grow_with_depth_times_weight() -> None:
    """Peak of L = 12 minus L = 6 holds activations only, so it scales with the width, not with its square."""
    growth = {side: step_peak(12, side) - step_peak(6, side) for side in (256, 1024)}
    assert growth[1024] <= 4 * max(growth[256], 6 * 2 * 256 * 4 * 4) < 1024 * 1024 * 4
    assert step_peak(12, 1024, cheat=True) - step_peak(6, 1024, cheat=True) >= 6 * 1024 * 1024 * 4


def test_backward_makes_no_gene_sized_transients_per_layer() -> None:
    """One accumulator per gene, whatever the depth: L = 48 needs no more gene-sized memory than L = 12."""
    weight = 512 * 512 * 4
    assert step_peak(48, 512) - step_peak(12, 512) < weight
    assert step_peak(12, 512) <= 2 * weight + PANELS + 12 * 2 * 512 * 4 * 8 + SMALL


def test_no_synthesized_weight_survives_a_step() -> None:
    model = Stack(3, 96, cheat=False)
    model(torch.randn(5, 96)).sum().backward()
    gc.collect()
    genes = {p.data_ptr() for p in model.parameters()} | {p.grad.data_ptr() for p in model.parameters()}
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not is_lazy(o)]
    alive = [o for o in tensors if o.shape == (96, 96)]
    assert [t for t in alive if t.data_ptr() not in genes] == []
