# SPDX-License-Identifier: Apache-2.0
"""Ways to run forward and backward passes over shared genes, each compared with copies of the genes in float64.

Every case takes a network and what makes it ready to be called: nothing, or a compiler. The tests of eager and of
compiled networks run the same table.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from expansion_samples import WIDTH, Net, close, gradients_of_copies
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pylearngene.nn import ExpansionConv2d, ExpansionLayerNorm, ExpansionLinear, GeneBank

Ready = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
Case = Callable[[Net, Ready], None]
Given = tuple[Any, ...]  # x, dy, and perhaps which blocks are kept

CASES: dict[str, Case] = {}
WHOLE: set[str] = set()  # cases whose passes run to the end: what reentrant checkpoints take


def case(name: str, whole: bool = False) -> Callable[[Case], Case]:
    def add(fn: Case) -> Case:
        CASES[name] = fn
        if whole:
            WHOLE.add(name)
        return fn

    return add


def draw(dtype: torch.dtype = torch.float64, tokens: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True), torch.randn(tokens, WIDTH, dtype=dtype)


def genes_of(net: Net) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if name.startswith("gene_bank.")}


def summed(net: Net, *given: Given) -> dict[str, Tensor]:
    """The oracle over several passes."""
    total: dict[str, Tensor] = {}
    for one in given:
        for name, grad in gradients_of_copies(net, *one).items():
            total[name] = total[name] + grad if name in total else grad
    return total


def expect(net: Net, *given: Given, tolerance: float = 1e-10) -> None:
    """`.grad` of every trained parameter is the oracle's sum over these passes; of all others there is none."""
    wanted = summed(net, *given)
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad or name not in wanted:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            close([parameter.grad], [wanted[name]], tolerance)


@case("one pass", whole=True)
def one_pass(net: Net, ready: Ready) -> None:
    x, dy = draw()
    ready(net)(x).backward(dy)
    expect(net, (x, dy))
    close([x.grad], [gradients_of_copies(net, x, dy)["x"]])


@case("x without a gradient")
def constant_x(net: Net, ready: Ready) -> None:
    x, dy = draw()
    ready(net)(x.detach()).backward(dy)
    expect(net, (x, dy))


@case("retain_graph and two backwards", whole=True)
def two_backwards(net: Net, ready: Ready) -> None:
    x, dy = draw()
    y = ready(net)(x)
    y.backward(dy, retain_graph=True)
    y.backward(2 * dy)
    expect(net, (x, dy), (x, 2 * dy))


@case("autograd.grad of x, then backward")
def grad_then_backward(net: Net, ready: Ready) -> None:
    x, dy = draw()
    y = ready(net)(x)
    (dx,) = torch.autograd.grad(y, x, 3 * dy, retain_graph=True)
    close([dx], [gradients_of_copies(net, x, 3 * dy)["x"]])
    y.backward(dy, inputs=[x], retain_graph=True)
    assert all(p.grad is None for p in net.parameters())
    y.backward(dy)
    expect(net, (x, dy))


@case("autograd.grad of all genes, and of each alone")
def grad_of_genes(net: Net, ready: Ready) -> None:
    x, dy = draw()
    genes, wanted = genes_of(net), gradients_of_copies(net, x, dy)
    y = ready(net)(x)
    grads = torch.autograd.grad(y, list(genes.values()), dy, retain_graph=True)
    close(list(grads), [wanted[name] for name in genes])
    for name, gene in genes.items():
        close(list(torch.autograd.grad(y, gene, dy, retain_graph=True)), [wanted[name]])
    y.backward(dy, inputs=list(genes.values()))
    close([gene.grad for gene in genes.values()], [wanted[name] for name in genes])
    assert x.grad is None


@case("accumulation over three batches", whole=True)
def accumulation(net: Net, ready: Ready) -> None:
    call = ready(net)
    given = [draw() for _ in range(3)]
    for x, dy in given:
        call(x).backward(dy)
    expect(net, *given)


@case("two forwards, backwards in either order", whole=True)
def any_order(net: Net, ready: Ready) -> None:
    call = ready(net)
    given = [draw() for _ in range(3)]
    results = [call(x) for x, _ in given]
    for index in (2, 0, 1):
        results[index].backward(given[index][1])
    expect(net, *given)


@case("two forwards, one backward", whole=True)
def two_forwards(net: Net, ready: Ready) -> None:
    call = ready(net)
    first, second = draw(), draw()
    torch.autograd.backward([call(first[0]), call(second[0])], [first[1], second[1]])
    (call(first[0]) + call(second[0])).backward(first[1])
    expect(net, first, second, first, (second[0], first[1]))


@case("create_graph without a second derivative")
def create_graph(net: Net, ready: Ready) -> None:
    x, dy = draw()
    wanted = {**gradients_of_copies(net, x, dy)}
    named = {**dict(net.named_parameters()), "x": x}
    grads = torch.autograd.grad(ready(net)(x), list(named.values()), dy, create_graph=True)
    close(list(grads), [wanted[name] for name in named])


@case("each gene and each coefficient frozen in turn", whole=True)
def frozen_in_turn(net: Net, ready: Ready) -> None:
    call = ready(net)
    x, dy = draw()
    for parameter in list(net.parameters()):
        parameter.requires_grad_(False)
        net.zero_grad()
        call(x).backward(dy)
        expect(net, (x, dy))
        parameter.requires_grad_(True)


@case("only one gene, only x, only coefficients trained", whole=True)
def all_but_one_frozen(net: Net, ready: Ready) -> None:
    call = ready(net)
    x, dy = draw()
    genes = list(genes_of(net).values())
    coefficients = [p for name, p in net.named_parameters() if name.endswith("coeffs")]
    for trained in ([], genes[:1], genes[-1:], coefficients):
        for parameter in net.parameters():
            parameter.requires_grad_(any(parameter is p for p in trained))
        net.zero_grad()
        x.grad = None
        call(x).backward(dy)
        expect(net, (x, dy))
        close([x.grad], [gradients_of_copies(net, x, dy)["x"]])


@case("layers skipped at run time", whole=True)
def skipped(net: Net, ready: Ready) -> None:
    call = ready(net)
    choices = ((True, False, False), (False, True, True), None, (False, True, False))
    given = [(*draw(), keep) for keep in choices]
    for x, dy, keep in given:
        call(x, keep).backward(dy)
    expect(net, *given)


@case("hooks run once per pass")
def hooks(net: Net, ready: Ready) -> None:
    counts: dict[tuple[str, str], int] = {}

    def counted(*key: str) -> Callable[[Tensor], None]:
        counts[key] = 0

        def count(_: Tensor) -> None:
            counts[key] += 1

        return count

    for name, parameter in net.named_parameters():
        parameter.register_hook(counted(name, "gradient"))
        parameter.register_post_accumulate_grad_hook(counted(name, "accumulated"))
    call = ready(net)
    first, second = draw(), draw()
    call(first[0]).backward(first[1])
    assert set(counts.values()) == {1}
    (call(first[0]) + call(second[0])).backward(first[1])
    assert set(counts.values()) == {2}


@case("two banks", whole=True)
def two_banks(net: Net, ready: Ready) -> None:
    other = Net(2)
    x, dy = draw()
    ready(lambda x: other(net(x)))(x).backward(dy)
    net.recompute = None
    between = net(x).detach()
    expect(other, (between, dy))
    expect(net, (x, gradients_of_copies(other, between, dy)["x"]))


@case("one bank in two models", whole=True)
def two_models(net: Net, ready: Ready) -> None:
    other = copy.copy(net)
    x, dy = draw()
    ready(lambda x: net(x) + other(2 * x))(x).backward(dy)
    expect(net, (x, dy), (2 * x, dy))
    one, two = ready(net), ready(other)
    first, second = one(x), two(x)
    first.backward(dy)
    second.backward(dy)
    expect(net, (x, dy), (2 * x, dy), (x, dy), (x, dy))


@case("four threads")
def threads(net: Net, ready: Ready) -> None:
    call = ready(net)
    given = [draw() for _ in range(4)]
    named = dict(net.named_parameters())
    call(given[0][0])
    found: dict[int, Sequence[Tensor]] = {}

    def run(index: int) -> None:
        x, dy = given[index]
        for _ in range(5):
            found[index] = torch.autograd.grad(call(x), list(named.values()), dy)

    workers = [threading.Thread(target=run, args=(index,)) for index in range(len(given))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, one in enumerate(given):
        wanted = gradients_of_copies(net, *one)
        close(list(found[index]), [wanted[name] for name in named])


@case("double backward raises")
def double_backward(net: Net, ready: Ready) -> None:
    x, _ = draw()
    leaves = [x, *net.parameters()]
    grads = torch.autograd.grad(ready(net)(x).pow(2).sum(), leaves, create_graph=True)
    for grad in (grads[0], grads[1], grads[-1]):
        for wanted in (x, leaves[1], leaves[-1]):
            with pytest.raises(RuntimeError, match="double backward"):
                torch.autograd.grad(grad.sum(), wanted, retain_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward(retain_graph=True)


@case("genes made by a map")
def made_genes(net: Net, ready: Ready) -> None:
    """Genes that are no leaves: made inside what is called, as another network would, and outside of it."""
    sources = {name: torch.randn_like(p, requires_grad=True) for name, p in net.named_parameters()}
    x, dy = draw()
    recompute, net.recompute = net.recompute, None

    def called(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, tensors, (x,))

    def call(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        # Around the call: what a checkpoint runs again inside it would find the network's own genes.
        return called(tensors, x) if recompute is None else checkpoint(called, tensors, x, use_reentrant=recompute)

    ready(lambda tensors, x: call({name: 2 * t for name, t in tensors.items()}, x))(sources, x).backward(dy)
    ready(call)({name: 2 * source for name, source in sources.items()}, x).backward(dy)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(2 * sources[name])
    wanted = gradients_of_copies(net, x, dy)
    close([source.grad for source in sources.values()], [2 * 2 * wanted[name] for name in sources])
    assert all(p.grad is None for p in net.parameters())


def linear(bias: bool) -> Callable[[GeneBank], nn.Module]:
    return lambda bank: ExpansionLinear(
        WIDTH, 5, bias=bias, bank=bank, name="fc", coeffs=[1.0, 0.3, -2.0], learn_coeffs=True, dtype=torch.float64
    )


def norm(bank: GeneBank) -> nn.Module:
    return ExpansionLayerNorm(WIDTH, bank=bank, name="norm", coeffs=[1.0, 0.3], learn_coeffs=True, dtype=torch.float64)


def convolution(bank: GeneBank) -> nn.Module:
    return ExpansionConv2d(
        2, 3, 3, padding=1, bank=bank, name="conv", coeffs=[1.0, 0.3], learn_coeffs=True, dtype=torch.float64
    )


LAYERS: dict[str, tuple[Callable[[GeneBank], nn.Module], tuple[int, ...]]] = {
    "linear": (linear(True), (4, WIDTH)),
    "linear without bias": (linear(False), (4, WIDTH)),
    "norm": (norm, (4, WIDTH)),
    "convolution": (convolution, (2, 2, 5, 6)),
}


class Single(nn.Module):
    """One layer, attached."""

    def __init__(self, make: Callable[[GeneBank], nn.Module]) -> None:
        super().__init__()
        bank = GeneBank()
        self.layer = make(bank)
        bank.attach(self)
        for gene in bank.parameters():
            nn.init.normal_(gene)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def check_sum_of_coefficients(kind: str, ready: Ready) -> None:
    """`sum_k c_k dc_k = <dY, Y>`, where coefficients combine weights and biases, so that Y is linear in them."""
    make, shape = LAYERS[kind]
    net = Single(make)
    y = ready(net)(torch.randn(shape, dtype=torch.float64))
    dy = torch.randn_like(y)
    y.backward(dy)
    coeffs = net.layer.coeffs
    torch.testing.assert_close((coeffs * coeffs.grad).sum(), (dy * y).sum(), rtol=1e-12, atol=1e-12)
    assert coeffs.grad.abs().min() > 0


class Levels(nn.Module):
    """Layers side by side: each has an input of its own, so that the gradients of genes are sums of exact products."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        options = {"bias": False, "dtype": torch.bfloat16, "bank": GeneBank(), "name": "fc"}
        self.layers = nn.ModuleList(ExpansionLinear(32, 24, coeffs=coeffs, **options) for coeffs in table)
        options["bank"].attach(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[level]) for level, layer in enumerate(self.layers)])


def check_sums_in_float32(depth: int, tokens: int, ready: Ready) -> None:
    """At most 1.5x the error of "float32 sum, rounded once"; sums in bfloat16 err more than twice as much."""
    table = [[1.0, level / depth] for level in range(depth)]
    net = Levels(table)
    x = torch.randn(depth, tokens, 32).bfloat16()
    dy = torch.randn(depth, tokens, 24).bfloat16()
    ready(net)(x).backward(dy)
    each = torch.einsum("lk,lmo,lmi->lkoi", torch.tensor(table).double(), dy.double(), x.double())
    for gene, exact, parts in zip(net.gene_bank.group("fc").weight, each.sum(0), each.unbind(1), strict=True):
        ruler = (exact.bfloat16().double() - exact).norm()
        assert (gene.grad.double() - exact).norm() <= 1.5 * ruler
        narrow = sum((part.bfloat16() for part in parts), torch.zeros(24, 32).bfloat16())
        assert (narrow.double() - exact).norm() > 2 * ruler
