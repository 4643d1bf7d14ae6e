# SPDX-License-Identifier: Apache-2.0
"""`LowRankLinear` and its genes: gates, precision, second derivatives, memory, and what it looks like from outside.

What is the same for layers of every primitive is inherited in `test_low_rank`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_base import close
from host_samples import timm_vit
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.errors import (
    ArgumentError,
    BackendError,
    DeviceError,
    DoubleBackwardError,
    DTypeError,
    MethodError,
    ShapeError,
)
from pylearngene.nn import GeneBank, LowRankLinear
from pylearngene.training.memory import peak_bytes

DOUBLE = torch.float64


def per_sample(x: Tensor, u: Tensor, s: Tensor, v: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """Oracle: each sample by the dense weight of its own row of the gate."""
    return torch.stack([F.linear(xb, u @ torch.diag(s * row) @ v.t(), bias) for xb, row in zip(x, gate, strict=True)])


class Gated(nn.Module):
    """Layers that share directions, with a gate of their own or one from outside."""

    def __init__(
        self, depth: int = 3, width: int = 6, rank: int = 4, dtype: torch.dtype = DOUBLE, **options: Any
    ) -> None:
        super().__init__()
        bank = GeneBank()
        self.layers = nn.ModuleList(
            LowRankLinear(width, width, dtype=dtype, bank=bank, name="fc", rank=rank, **options) for _ in range(depth)
        )
        bank.attach(self)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x, gate))
        return x


def test_layers_with_gates_share_directions() -> None:
    net = Gated(gate=True)
    for layer in net.layers:
        nn.init.normal_(layer.gate)
    u, v = net.gene_bank.group("fc").tensors()
    x, gate, dy = torch.randn(3, 2, 6, dtype=DOUBLE), torch.rand(3, 4, dtype=DOUBLE), torch.randn(3, 2, 6, dtype=DOUBLE)
    everything = [u, v, *(p for layer in net.layers for p in layer.parameters())]
    for given in (None, gate, gate[0]):
        expected = x
        for layer in net.layers:
            chosen = layer.gate if given is None else given
            expected = torch.tanh(per_sample(expected, u, layer.s, v, chosen.expand(3, 4), layer.bias))
        wanted = torch.autograd.grad(expected, everything, dy, allow_unused=True)
        y = net(x, given)
        close(y, expected, 1e-12)
        net.zero_grad()
        y.backward(dy)
        for parameter, grad in zip(everything, wanted, strict=True):
            assert (parameter.grad is None) == (grad is None)
            if grad is not None:
                close(parameter.grad, grad, 1e-12)


def test_what_a_layer_holds_and_reads_like() -> None:
    layer = LowRankLinear(5, 7, bank=GeneBank(), name="fc", rank=4, gate=True, dtype=torch.bfloat16)
    assert {name: (list(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        "s": ([4], torch.float32),
        "gate": ([4], torch.float32),
        "bias": ([7], torch.bfloat16),
    }
    before = plg.nn.dense_syntheses()
    assert (list(layer.weight.shape), layer.weight.dtype) == ([7, 5], torch.bfloat16)
    assert plg.nn.dense_syntheses() == before
    assert layer.dense_weight(torch.ones(2, 4)).shape == (2, 7, 5)
    assert torch.equal(layer.weight.dense(), layer.to_dense().weight)
    assert plg.nn.dense_syntheses() == before + 3
    assert sorted(layer.bank.state_dict()) == ["genes.fc.u", "genes.fc.v"]
    assert [name for name, _ in layer.bank.named_genes()] == ["fc.u", "fc.v"]
    assert repr(layer.bank.group("fc")) == "LowRankGroup(u of 7x4, v of 5x4)"
    assert repr(layer) == "LowRankLinear(in_features=5, out_features=7, bias=True, rank=4, gate=True, name='fc')"
    assert LowRankLinear(5, 7, False, bank=layer.bank, name="fc", rank=4).bias is None


def test_strengths_keep_their_precision_in_16_bits() -> None:
    net = Gated(dtype=torch.float32, gate=True)
    nn.init.constant_(net.layers[0].s, 1 + 2.0**-12)
    net.bfloat16()
    assert net.gene_bank.group("fc").u.dtype == torch.bfloat16
    assert {layer.s.dtype for layer in net.layers} == {layer.gate.dtype for layer in net.layers} == {torch.float32}
    assert net.layers[0].s[0] == 1 + 2.0**-12
    net.double().half()
    assert {layer.s.dtype for layer in net.layers} == {layer.gate.dtype for layer in net.layers} == {torch.float32}


def test_a_fresh_layer_has_the_variance_of_a_plain_one() -> None:
    layer = LowRankLinear(96, 64, bank=GeneBank(), name="fc", rank=48)
    with torch.no_grad():
        ratio = layer.dense_weight().var() / nn.Linear(96, 64).weight.var()
    assert 0.7 < ratio < 1.4


def test_second_derivatives_of_genes_are_refused_and_others_right() -> None:
    net, x = Gated(), torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    second = torch.autograd.grad(dx.square().sum(), [x, net.layers[0].s], retain_graph=True)
    u, v = net.gene_bank.group("fc").tensors()
    y = x
    for layer in net.layers:
        y = torch.tanh(F.linear(y, u @ torch.diag(layer.s) @ v.t(), layer.bias))
    (wanted,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    everything = [x, net.layers[0].s, u, v]
    expected = torch.autograd.grad(wanted.square().sum(), everything)
    for mine, theirs in zip([*second, *torch.autograd.grad(dx.square().sum(), [u, v])], expected, strict=True):
        close(mine, theirs, 1e-11)
    (du,) = torch.autograd.grad(net(x).square().sum(), u, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="double backward: expected one differentiation"):
        torch.autograd.grad(du.square().sum(), x)


class Side(nn.Module):
    """Many layers side by side, each with its own input."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        bank = GeneBank()
        self.layers = nn.ModuleList(
            LowRankLinear(8, 8, False, dtype=torch.bfloat16, bank=bank, name="fc", rank=4) for _ in range(depth)
        )
        bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[level]) for level, layer in enumerate(self.layers)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_genes_sum_in_float32(compiled: bool) -> None:
    """Gradients of many layers are added in float32 and rounded once."""
    torch.manual_seed(0)
    net, depth = Side(48), 48
    bank, layers = net.gene_bank, net.layers
    torch._dynamo.reset()
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    x, dy = (torch.randn(depth, 4, 8, dtype=torch.bfloat16) for _ in range(2))
    run(x).backward(dy)
    v = bank.group("fc").v.detach().double()
    inner = (x.double() @ v).bfloat16().double() * layers[0].s.detach().double()
    each = torch.einsum("lmo,lmr->lor", dy.double(), inner.bfloat16().double())
    ruler = (each.sum(0).bfloat16().double() - each.sum(0)).norm()
    rounded = (each.bfloat16().double().sum(0) - each.sum(0)).norm()  # one rounding per layer is inherent
    assert (bank.group("fc").u.grad.double() - each.sum(0)).norm() <= 1.5 * (ruler + rounded)


def test_frozen_genes_and_strengths_alone() -> None:
    """FINE's second phase: only the strengths of a new depth are trained, U and V stay as they are, to the bit."""
    net, x = Gated(), torch.randn(3, 6, dtype=DOUBLE)
    genes = net.gene_bank.group("fc").tensors()
    before = [gene.detach().clone() for gene in genes]
    net.gene_bank.group("fc").u.requires_grad_(False)
    net(x).sum().backward()
    assert genes[0].grad is None
    assert genes[1].grad is not None
    genes[1].grad = None
    net.gene_bank.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.s for layer in net.layers], lr=0.1)
    net(x).sum().backward()
    optimizer.step()
    assert all(gene.grad is None and torch.equal(gene, kept) for gene, kept in zip(genes, before, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_a_pass_holds_no_weight_whatever_its_depth(gated: bool) -> None:
    """With weights of 9 MiB: what forward and backward need above gradients is below one, also with gates per sample;
    layers by their dense weights show that the bound binds."""
    width, rank, tokens = 1536, 8, 16
    gate = torch.rand(tokens, rank) if gated else None
    net = Gated(4, width, rank, torch.float32)
    x, dy = torch.randn(tokens, width), torch.ones(tokens, width)
    owed = sum(parameter.nbytes for parameter in net.parameters())

    def excess(call: Callable[[Tensor], Tensor]) -> int:
        net.zero_grad(set_to_none=True)
        return peak_bytes(lambda: call(x).backward(dy)) - owed

    def cheat(x: Tensor) -> Tensor:
        for layer in net.layers:
            x = torch.tanh(F.linear(x, layer.dense_weight(), layer.bias))
        return x

    assert excess(lambda x: net(x, gate)) < 4 * width * width / 4
    assert excess(cheat) > 4 * width * width


def test_gradients_of_x_alone_leave_nothing_behind() -> None:
    net, x = Gated(), torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    y = net(x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    (tap,) = net.gene_bank._taps.values()
    assert not tap.ledger._open
    u = net.gene_bank.group("fc").u
    wanted = torch.autograd.grad(net(x).sum(), u)[0]
    y.backward()
    assert torch.equal(u.grad, wanted)


def test_layers_refuse_gates_that_do_not_fit() -> None:
    layer, x = Gated().layers[0], torch.randn(3, 6, dtype=DOUBLE)
    for gate, message in (
        (torch.ones(2, 4), r"gate: expected \[R\] or \[B, R\] with a row per sample of x \[3, 6\], got \[2, 4\]"),
        (torch.ones(5), r"gate: expected shape \[R\] or \[B, R\] with R = 4, got \[5\]"),
    ):
        with pytest.raises(ShapeError, match=f"^{message}"):
            layer(x, gate)
    with pytest.raises(ShapeError, match=r"^gate: expected shape .* got \[3\]"):
        layer.dense_weight(torch.ones(3))


def test_layers_refuse_what_does_not_go_with_their_genes() -> None:
    """Another precision of x, and tensors of the layer whose memory is gone."""
    for dtype, other in ((DOUBLE, torch.float32), (torch.float32, DOUBLE), (torch.bfloat16, DOUBLE)):
        layer = Gated(dtype=dtype).layers[0]
        with pytest.raises(DTypeError, match=r"^x: expected \w+ \(the genes' dtype, float64 does not mix\), got "):
            layer(torch.randn(3, 6, dtype=other))
    for name in ("u", "v", "s", "gate", "bias"):
        net = Gated(gate=True)
        layer = net.layers[0]
        owner = net.gene_bank.group("fc") if name in "uv" else layer
        getattr(owner, name).untyped_storage().resize_(0)
        with pytest.raises(DeviceError, match=rf"^{name}: expected a storage"):
            layer(torch.randn(3, 6, dtype=DOUBLE))


def test_vectorized_jacobians_of_genes_are_refused() -> None:
    net = Gated()
    y = net(torch.randn(3, 6, dtype=DOUBLE)).sum(0)
    genes = net.gene_bank.group("fc").tensors()
    with pytest.raises(BackendError, match="is_grads_batched: expected one upstream gradient at a time"):
        torch.autograd.grad(y, genes, torch.eye(6, dtype=DOUBLE), is_grads_batched=True)


class Subclass(Tensor):
    """A tensor subclass without a meaning."""


def test_genes_that_are_subclasses_are_refused_by_name() -> None:
    layer = Gated().layers[0]
    group = layer.bank.group("fc")
    group.v = nn.Parameter(group.v.detach().as_subclass(Subclass))
    with pytest.raises(DTypeError, match=r"^genes: expected a plain torch\.Tensor, got the subclass Subclass"):
        layer(torch.randn(3, 6, dtype=DOUBLE))


def hosted(name: str) -> nn.Module:
    """A network as the rest of the library sees one: blocks, and a bank that knows its host."""
    net, bank = nn.Module(), GeneBank()
    make = partial(LowRankLinear, 6, 8, bank=bank, name=name, rank=2, gate=True)
    net.blocks = nn.ModuleList(nn.Sequential(OrderedDict(fc=make())) for _ in range(3))
    bank.attach(net)
    bank.host = plg.learngene.HostSpec("own", {"class": "Net"}, "blocks", 3, ((name, "linear"),))
    return net


def test_freezing_and_groups_of_an_optimizer() -> None:
    """Strengths and gates are coefficients, biases are not; a group is found by its path."""
    net = hosted("attn.fc")
    groups = {group["name"]: group["params"] for group in plg.param_groups(net, lr=1e-3)}
    assert {name: len(found) for name, found in groups.items()} == {"genes": 2, "coeffs": 6, "rest_no_decay": 3}
    plg.freeze(net, genes=None, coeffs=True)
    assert all(layer[0].bias.requires_grad and not layer[0].s.requires_grad for layer in net.blocks)
    plg.freeze(net, genes=True, coeffs=False, layers=["attn.fc"])
    assert not any(gene.requires_grad for _, gene in net.gene_bank.named_genes())
    assert all(layer[0].gate.requires_grad for layer in net.blocks)


def test_summary_counts_directions_and_names_the_regime() -> None:
    net = hosted("fc")
    told = plg.summary(net, tokens=7)
    (layer,) = told.layers
    assert (layer.shape, layer.genes, layer.regime) == ((8, 6), 2, "factored")
    assert (layer.gene_bytes, layer.dense_bytes) == (4 * 2 * (8 + 6), 3 * 4 * 8 * 6)
    assert told.outside_bytes == 3 * 4 * (2 + 2 + 8)
    assert told.notes[-1].startswith("regime factored: low_rank contracts x")
    LowRankLinear(3, 5, bank=net.gene_bank, name="beside", rank=2)
    beside = plg.summary(net)
    assert beside.outside_bytes == told.outside_bytes + 4 * 2 * (3 + 5)
    assert beside.parameters == sum(parameter.numel() for parameter in net.parameters())


def test_groups_of_primitives_do_not_mix() -> None:
    bank = GeneBank()
    LowRankLinear(5, 7, bank=bank, name="fc", rank=4)
    with pytest.raises(
        ShapeError, match=r"^fc: expected \(out, in, rank\) = \(7, 5, 4\) as in the bank, got \(7, 5, 3\)"
    ):
        LowRankLinear(5, 7, bank=bank, name="fc", rank=3)
    with pytest.raises(ArgumentError, match=r"^name: expected one for expansion, got 'fc', a group of low_rank"):
        plg.nn.ExpansionLinear(5, 7, bank=bank, name="fc", coeffs=[1.0])
    with pytest.raises(ArgumentError, match=r"^name: expected a group of expansion for 3 genes, got one of low_rank"):
        bank.grow_group("fc", 3)
    for options, message in (
        ({"rank": -1}, "rank: expected an int of at least 0"),
        ({"rank": 2, "bank": None}, "bank: expected a GeneBank, got NoneType"),
    ):
        with pytest.raises(ArgumentError, match=f"^{message}"):
            LowRankLinear(5, 7, **{"bank": bank, "name": "other", **options})
    assert list(bank.groups) == ["fc"]


def test_layers_that_no_method_made_are_not_lost_silently() -> None:
    """Their genes would not be in what comes out; where one has replaced a layer, nothing has changed."""
    for place, group in (("head", "head"), ("norm", "blocks_attn"), ("norm", "")):
        net = plg.auxiliary(timm_vit(2), plg.methods.TLEG())
        if group:
            setattr(net, place, plg.nn.LowRankLinear(4, 4, bank=net.gene_bank, name=group, rank=2))
        else:
            net.gene_bank.add_group("left", plg.nn.ExpansionGroup, 2, (4, 4), None)
        got = f"one at '{place}'" if group else "genes 'left'"
        for call in (plg.extract, plg.bake):
            with pytest.raises(
                MethodError, match=rf"^net: expected gene-backed layers in its blocks alone, .* got {got} as well$"
            ):
                call(net)
    net = plg.auxiliary(timm_vit(2), plg.methods.TLEG())
    net.blocks[1].mlp.fc2 = plg.nn.LowRankLinear(4, 4, bank=net.gene_bank, name="fc2", rank=2)
    have = list(net.blocks)
    for call in (plg.extract, plg.bake, lambda it: plg.set_depth(it, 3)):
        with pytest.raises(MethodError, match=r"net: expected the gene-backed layer 'mlp.fc2' in block 1, got LowRank"):
            call(net)
    assert list(net.blocks) == have
    assert net.gene_bank.host.depth == 2
