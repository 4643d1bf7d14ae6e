# SPDX-License-Identifier: Apache-2.0
"""Gradients of shared genes in eager mode: the table of cases, whatever is checkpointed or learned.

The same cases in compiled graphs, and what a bank does besides, have files of their own.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from expansion_samples import WIDTH, Net, close, gene_grads, gradients_of_copies, unshared
from gradient_samples import (
    CASES,
    LAYERS,
    WHOLE,
    check_sum_of_coefficients,
    check_sums_in_float32,
    draw,
    expect,
    genes_of,
)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_copies(name: str, recompute: bool | None, learn: bool) -> None:
    net = Net(3, learn=learn)
    net.recompute = recompute
    CASES[name](net, lambda fn: fn)


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_reentrant(name: str, learn: bool) -> None:
    net = Net(3, learn=learn)
    net.recompute = True
    CASES[name](net, lambda fn: fn)


def test_reentrant_checkpoints_give_genes_a_gradient_each() -> None:
    """Each is a backward pass of its own; what accumulates in `.grad` is the sum all the same."""
    net = Net(3)
    net.recompute = True
    counts = dict.fromkeys(genes_of(net), 0)
    for name, gene in genes_of(net).items():
        gene.register_hook(lambda grad, name=name: counts.update({name: counts[name] + 1}))
    x, dy = draw()
    net(x).backward(dy)
    expect(net, (x, dy))
    assert set(counts.values()) == {3}


@pytest.mark.parametrize("depth", [1, 2, 12, 48])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_sums_over_layers(depth: int, dtype: torch.dtype, tolerance: float) -> None:
    net = Net(depth, dtype=dtype)
    x, dy = draw(dtype)
    net(x).backward(dy)
    for mine, theirs in zip(gene_grads(net), unshared(net, x, dy), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("tokens", [4, 96])
@pytest.mark.parametrize("depth", [12, 48, 96, 192])
def test_bfloat16_genes_are_summed_in_float32(depth: int, tokens: int) -> None:
    check_sums_in_float32(depth, tokens, lambda fn: fn)


@pytest.mark.parametrize("kind", LAYERS)
def test_coefficients_dot_their_gradients_to_the_outputs(kind: str) -> None:
    check_sum_of_coefficients(kind, lambda fn: fn)


def failing(net: Net) -> Callable[[], None]:
    """A backward pass that ends midway, after layers have added to accumulators."""

    def stop(_: Tensor) -> None:
        raise RuntimeError("on purpose")

    def run() -> None:
        y = net.blocks[0](draw()[0])
        y.register_hook(stop)
        for block in net.blocks[1:]:
            y = block(y)
        with pytest.raises(RuntimeError, match="on purpose"):
            y.sum().backward()

    return run


def gene_shaped(net: Net) -> int:
    """How many living tensors look like a gene of the linear layers."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not is_lazy(o)]
    return sum(tensor.shape == (WIDTH, WIDTH) for tensor in tensors)


@pytest.mark.parametrize("threaded", [False, True], ids=["here", "on a thread that ends"])
def test_a_failed_backward_leaves_no_accumulators(threaded: bool) -> None:
    """Neither after it, nor for the passes that follow, on whatever thread it ran."""
    net = Net(4)
    before = gene_shaped(net)
    for _ in range(3):
        if threaded:
            worker = threading.Thread(target=failing(net))
            worker.start()
            worker.join()
        else:
            failing(net)()
    assert gene_shaped(net) == before
    x, dy = draw()
    net(x).backward(dy)
    expect(net, (x, dy))


def test_many_failed_backwards_are_forgotten() -> None:
    net = Net(2)
    fail = failing(net)
    fail()
    (ledger, *_) = [tap.ledger for tap in net.gene_bank._taps.values()]
    for _ in range(100):
        fail()
        assert len(ledger._open) < 20
    assert not any(each() for each in ledger._open.values())


def test_a_backward_inside_a_backward() -> None:
    """A hook that runs a pass of its own, as penalties on gradients do, adds nothing to the pass around it."""
    net = Net(3)
    (x, dy), (other, upstream) = draw(), draw()
    inner: list[Tensor] = []

    def penalize(_: Tensor) -> None:
        with torch.enable_grad():
            inner.extend(torch.autograd.grad(net(other), list(genes_of(net).values()), upstream))

    y = net.blocks[0](x)
    y.register_hook(penalize)
    net.blocks[2](net.blocks[1](y)).backward(dy)
    expect(net, (x, dy))
    wanted = gradients_of_copies(net, other, upstream)
    close(inner, [wanted[name] for name in genes_of(net)])


def test_low_precision_copies_are_of_one_pass_in_one_thread() -> None:
    """Passes of threads that overlap leave nothing open, so that no layer reads genes as they were before a step."""
    net = Net(2, dtype=torch.float32)
    began, entered, ended = threading.Event(), threading.Event(), threading.Event()
    x = torch.randn(3, WIDTH)

    def meet(block: nn.Module, inputs: object) -> None:
        if threading.current_thread() is first:
            began.set()
            entered.wait(10)
        elif threading.current_thread() is second:
            entered.set()
            ended.wait(10)

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            net(x)
        ended.set()

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    handle = net.blocks[0].register_forward_pre_hook(meet)
    first.start()
    began.wait(10)
    second.start()
    first.join()
    second.join()
    handle.remove()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        net.blocks[1].fc(x)
        for gene in net.gene_bank.parameters():
            gene.data.mul_(-1)
        block = net.blocks[1]
        wanted = nn.functional.linear(x, block.fc.dense_weight(), block.fc.dense_bias())
        torch.testing.assert_close(block.fc(x), wanted, rtol=2e-2, atol=2e-2)
