# SPDX-License-Identifier: Apache-2.0
"""Gene-backed networks under `torch.compile`: equal values, one accumulator per gene, no breaks, no recompiles.

Graphs are captured with aot_eager; one test runs Inductor. Eager sharing is tested with the bank.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene.nn import ExpansionLayerNorm, ExpansionLinear, GeneBank

WIDTH = 8
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Block(nn.Module):
    def __init__(self, bank: GeneBank, level: int, depth: int) -> None:
        super().__init__()
        shared = {"bank": bank, "coeffs": [1.0, level / depth]}
        self.norm = ExpansionLayerNorm(WIDTH, name="norm", **shared)
        self.fc = ExpansionLinear(WIDTH, WIDTH, name="fc", **shared)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 4, recompute: bool = False, broken: bool = False) -> None:
        super().__init__()
        bank = GeneBank()
        self.blocks = nn.ModuleList(Block(bank, level, depth) for level in range(depth))
        bank.attach(self)
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.recompute, self.broken = recompute, broken

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if self.broken and index == 2:
                torch._dynamo.graph_break()
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(call: nn.Module, net: Net, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    call(leaf).pow(2).sum().backward()
    return [leaf.grad, *(p.grad for p in net.parameters())]


def agree(net: Net, compiled: nn.Module) -> None:
    x = torch.randn(3, WIDTH)
    for _ in range(2):
        expected, got = gradients(net, net, x), gradients(compiled, net, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_fullgraph_gradients_equal_eager(recompute: bool) -> None:
    net = Net(recompute=recompute)
    agree(net, torch.compile(net, backend="aot_eager", fullgraph=True))


class Odd(nn.Module):
    """Layers that lack something: a bias, trainable weights, trainable biases, contiguous genes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        bank = GeneBank()
        shared = {"bank": bank, "bias": kind != "no bias", "learn_coeffs": kind == "learned"}
        self.layers = nn.ModuleList(
            ExpansionLinear(WIDTH, WIDTH, name="fc", coeffs=[1.0, level / 3], **shared) for level in range(3)
        )
        self.norm = ExpansionLayerNorm(WIDTH, bank=bank, bias=kind != "no bias", name="norm", coeffs=[1.0, 0.5])
        bank.attach(self)
        group = bank.group("fc")
        if kind == "frozen weights":
            group.weight.requires_grad_(False)
        if kind == "frozen biases":
            group.bias.requires_grad_(False)
        if kind == "transposed":
            for gene in group.weight:
                gene.data = gene.data.t().contiguous().t()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(self.norm(x)))
        return x


@pytest.mark.parametrize("kind", ["no bias", "frozen weights", "frozen biases", "transposed", "learned"])
def test_odd_layers_compile(kind: str) -> None:
    net = Odd(kind)
    x = torch.randn(3, WIDTH)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    expected, got = gradients(net, net, x), gradients(compiled, net, x)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_inductor_gradients_equal_eager() -> None:
    net = Net()
    agree(net, torch.compile(net, fullgraph=True))


def test_graph_breaks_and_regional_compilation_are_right() -> None:
    net = Net(broken=True)
    agree(net, torch.compile(net, backend="aot_eager"))
    torch._dynamo.reset()
    net = Net()
    for block in net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    whole = Net()
    whole.load_state_dict(net.state_dict())
    x = torch.randn(3, WIDTH)
    for a, b in zip(gradients(net, net, x), gradients(whole, whole, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_backward_graph_holds_one_accumulator_per_gene() -> None:
    """Each layer adds to the accumulators through the declared mutable operator; none returns a gradient of its own."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    depth = 5
    net = Net(depth)
    compiled = torch.compile(net, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    gradients(compiled, net, torch.randn(3, WIDTH))
    called = [str(node.args[0]) for node in graphs[1].graph.nodes if "auto_functionalized" in str(node.target)]
    assert called.count("pylearngene.expansion_linear_wgrad_.default") == depth
    assert called.count("pylearngene.expansion_weight_wgrad_.default") == 2 * depth
    plain = [str(node.target) for node in graphs[1].graph.nodes]
    assert "pylearngene.expansion_linear_wgrad.default" not in plain


def test_twelve_layers_and_five_batch_sizes_make_two_graphs() -> None:
    counter = CompileCounter()
    net = Net(12)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for tokens in (2, 3, 17, 40, 5):
        compiled(torch.randn(tokens, WIDTH))
    assert counter.frame_count <= 2


def test_functional_call_compiles_and_differentiates() -> None:
    genes = [torch.randn(5, WIDTH, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(5, requires_grad=True) for _ in range(2)]
    coeffs = torch.tensor([1.0, 0.5], requires_grad=True)
    x = torch.randn(3, WIDTH, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return plg.functional.expansion_linear(x, genes, coeffs, biases, "gelu")

    leaves = [x, coeffs, *genes, *biases]
    expected = torch.autograd.grad(call(x).pow(2).sum(), leaves)
    got = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(x).pow(2).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast_inside_a_compiled_graph() -> None:
    net = Net()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = gradients(net, net, x), gradients(compiled, net, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_export_runs() -> None:
    net = Net(2).eval()
    x = torch.randn(3, WIDTH)
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x))
    assert len(exported.state_dict) == len(list(net.parameters()))
