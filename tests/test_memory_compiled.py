# SPDX-License-Identifier: Apache-2.0
"""Peaks of compiled training steps: no gene-sized tensor per layer, with aot_eager and Inductor.

Each bound is shown to fail on a cheat. Eager peaks are in `test_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_memory import Stack, materialized
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.training.memory import peak_bytes

SIDE = 512
WEIGHT = SIDE * SIDE * 4
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Leaves(nn.Module):
    """The same layers by a function of the Parameters: plain autograd makes a gradient of each gene per layer."""

    def __init__(self, fn: Callable[..., Tensor], depth: int) -> None:
        super().__init__()
        self.fn, self.stack = fn, Stack(depth, SIDE, cheat=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack.layers:
            group = layer.bank.group("fc")
            x = torch.tanh(self.fn(x, list(group.weight), layer.coeffs))
        return x


def peaks(net: nn.Module, backend: str) -> tuple[int, int]:
    """Bytes at the peak of a backward pass, and of a whole step, of a graph that is ready."""
    call = torch.compile(net, backend=backend, fullgraph=True)
    x = torch.randn(2, SIDE)

    def step() -> None:
        call(x).sum().backward()

    step()
    net.zero_grad()
    loss = call(x).sum()
    backward = peak_bytes(loss.backward)
    net.zero_grad()
    return backward, peak_bytes(step)


def growth(make: Callable[[int], nn.Module], backend: str, depths: tuple[int, int]) -> list[int]:
    few, many = (peaks(make(depth), backend) for depth in depths)
    return [more - less for less, more in zip(few, many, strict=True)]


@pytest.mark.parametrize("depths", [(3, 9), pytest.param((12, 48), marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_hold_no_weight_per_layer(backend: str, depths: tuple[int, int]) -> None:
    """What depth adds, to a backward pass and to a step, are activations: less than one weight for all the layers."""
    more = depths[1] - depths[0]
    backward, step = growth(lambda depth: Stack(depth, SIDE, cheat=False), backend, depths)
    assert step <= more * WEIGHT / 64
    if backend == "aot_eager":  # when it lets its copies of the accumulators go differs: bounded whole, at any depth
        assert peaks(Stack(depths[1], SIDE, cheat=False), backend)[0] <= 4 * WEIGHT + depths[1] * WEIGHT / 64
    else:
        assert backward <= more * WEIGHT / 64
    if backend == "inductor":  # it orders a graph anew: what plain autograd adds up at once, it holds until the end
        assert growth(lambda depth: Leaves(plg.functional.expansion_linear, depth), backend, depths)[0] >= more * WEIGHT
    else:
        assert growth(lambda depth: Leaves(materialized, depth), backend, depths)[1] >= more * WEIGHT


@pytest.mark.parametrize(("backend", "weights"), [("aot_eager", 4), ("inductor", 2)])
def test_compiled_backward_holds_accumulators_and_gradients_alone(backend: str, weights: int) -> None:
    """Two accumulators, which become the gradients; functional graphs copy each of them once more."""
    assert peaks(Stack(8, SIDE, cheat=False), backend)[0] <= (weights + 0.5) * WEIGHT
    # The cheat shows in the whole step: in the backward alone, saved weights that are freed make room for new ones.
    assert peaks(Leaves(materialized, 8), backend)[1] > (weights + 0.5) * WEIGHT
