# SPDX-License-Identifier: Apache-2.0
"""Genes stay shared, exact and single through copies, dtypes, devices, state dicts and low-precision copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from expansion_samples import WIDTH, Net, close, gene_grads, unshared
from torch import nn
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.nn import ExpansionLinear, GeneBank


def roundtrips() -> dict[str, Callable[[Net], Net]]:
    def through_state_dict(net: Net) -> Net:
        with torch.device("meta"):
            other = Net()
        other.load_state_dict(net.state_dict(), assign=True)
        return other

    def through_to_empty(net: Net) -> Net:
        with torch.device("meta"):
            other = Net()
        other = other.to_empty(device="cpu")
        other.load_state_dict(net.state_dict())
        return other

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "assign from meta": through_state_dict,
        "to_empty": through_to_empty,
        "dtype and back": lambda net: copy.deepcopy(net).float().double(),
    }


@pytest.mark.parametrize("way", roundtrips())
def test_sharing_survives(way: str) -> None:
    net = Net()
    net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()  # taps exist while copying
    other = roundtrips()[way](net)
    assert len(list(other.parameters())) == len(list(net.parameters())) == 8
    assert all(block.fc.bank is other.gene_bank is not net.gene_bank for block in other.blocks)
    assert type(other) is type(net)
    assert isinstance(other, Net)
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    tolerance = 1e-5 if way == "dtype and back" else 0
    torch.testing.assert_close(other(x), net(x), rtol=tolerance, atol=tolerance)
    other.zero_grad()
    other(x).backward(dy)
    close(gene_grads(other), unshared(other, x, dy))


def test_fixed_coefficients_are_exact_in_every_dtype() -> None:
    net = Net(3, dtype=torch.float32)
    assert net.blocks[1].fc.coeffs.dtype == torch.float32
    net = net.bfloat16()
    assert net.blocks[1].fc.coeffs.dtype == torch.float32
    net = net.double()
    assert net.blocks[1].fc.coeffs.tolist() == [1.0, 1 / 3]
    assert not any("coeffs" in key for key in net.state_dict())


def test_state_dict_has_each_gene_once() -> None:
    keys = list(Net(5).state_dict())
    assert keys == [
        f"gene_bank.genes.{g}.{p}.{k}" for g in ("norm", "mlp.fc") for p in ("weight", "bias") for k in (0, 1)
    ]
    assert len(list(Net(5).blocks[0].parameters())) == 0


def test_optimizer_has_one_slot_per_gene_and_moves_it() -> None:
    net = Net(7)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 8
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


CHANGES: dict[str, Callable[[list[torch.Tensor]], None]] = {
    "in place": lambda genes: [gene.mul_(0.5) for gene in genes],
    "by data": lambda genes: [gene.data.mul_(0.5) for gene in genes],
    "vector": lambda genes: torch.nn.utils.vector_to_parameters(
        0.5 * torch.nn.utils.parameters_to_vector(genes), genes
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("train", [False, True])
def test_low_precision_copies_follow_every_kind_of_change(change: str, train: bool) -> None:
    """Versions do not tell of all of them, so that a copy kept by version would go stale."""
    net = Net(3, dtype=torch.float32)
    x = torch.randn(4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(train):
        before = net(x)
        with torch.no_grad():
            CHANGES[change](list(net.gene_bank.parameters()))
        fresh = Net(3, dtype=torch.float32)  # made anew: a copy of the network would copy what it kept
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(net(x), fresh(x))
        assert not torch.equal(net(x), before)


@pytest.mark.parametrize("fused", [False, True])
def test_training_under_autocast_learns_with_every_optimizer(fused: bool) -> None:
    net = Net(3, dtype=torch.float32)
    for name, gene in net.gene_bank.named_genes():
        gene.requires_grad_(name.startswith("mlp.fc.weight"))  # what is not copied must not do the learning
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=fused)
    x, target = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (net(x).float() - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_inference_mode_first_then_training() -> None:
    net = Net(2, dtype=torch.float32)
    x = torch.randn(4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            net(x)
        net(x).sum().backward()
    assert all(grad is not None for grad in gene_grads(net))


@pytest.mark.parametrize("learn", [False, True])
def test_genes_and_coefficients_changed_in_inference_mode_can_be_trained(learn: bool) -> None:
    layer = ExpansionLinear(4, 3, bank=(bank := GeneBank()), name="fc", coeffs=[1.0, 0.0], learn_coeffs=learn)
    with torch.inference_mode():
        group = bank.grow_group("fc", 3)
        layer.set_coeffs([1.0, 0.0, 0.5])
    layer(torch.randn(2, 4)).sum().backward()
    assert group.weight[2].grad.any()
    assert not any(tensor.is_inference() for tensor in [*layer.parameters(), *layer.buffers()])
    with torch.inference_mode():
        layer.set_coeffs([2.0, 0.0, 0.5])
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.coeffs.requires_grad == learn


@pytest.mark.parametrize("change", ["set_depth", "grow"])
def test_networks_changed_in_inference_mode_can_be_trained(change: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    net = plg.auxiliary(Plain(), plg.methods.LDR(2))
    with torch.inference_mode():
        plg.set_depth(net, 6) if change == "set_depth" else plg.methods.LDR.grow(net, 3, init="method")
    net(torch.randn(2, 4)).sum().backward()
    assert all(gene.grad is not None for gene in net.gene_bank.parameters() if gene.requires_grad)


def test_learned_coefficients_stay_in_float32_and_reset() -> None:
    layer = ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=[1.0, 1 / 3], learn_coeffs=True)
    layer = layer.bfloat16()
    assert layer.coeffs.dtype == torch.float32
    assert layer.coeffs.tolist() == [1.0, torch.tensor(1 / 3).item()]
    torch.nn.init.zeros_(layer.coeffs)
    layer.reset_parameters()
    assert layer.coeffs.tolist() == [1.0, torch.tensor(1 / 3).item()]


def test_coefficients_put_in_from_outside_are_used_whole() -> None:
    """Which genes are left out is known of the layer's own coefficients alone."""
    layer = ExpansionLinear(4, 3, dtype=torch.float64, bank=(bank := GeneBank()), name="fc", coeffs=[1.0, 0.0])
    x, given = torch.randn(2, 4, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)

    def wanted(coeffs: torch.Tensor) -> torch.Tensor:
        genes, biases = torch.stack(bank.group("fc").weights()), torch.stack(bank.group("fc").biases())
        return x @ torch.einsum("k,koi->oi", coeffs, genes).t() + coeffs @ biases

    torch.testing.assert_close(torch.func.functional_call(layer, {"coeffs": given}, (x,)), wanted(given))
    leaves = [torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.func.functional_call(layer, {"coeffs": leaves[0]}, (x,)).sum().backward()
    wanted(leaves[1]).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    layer.coeffs.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.coeffs.grad, leaves[1].grad)


WRITES: dict[str, Callable[[ExpansionLinear, torch.Tensor], object]] = {
    "in place": lambda layer, given: layer.coeffs.copy_(given),
    "one entry": lambda layer, given: layer.coeffs.__setitem__(1, given[1]),
    "assigned": lambda layer, given: setattr(layer, "coeffs", given.clone()),
    "listed": lambda layer, given: setattr(layer, "coeffs", given.tolist()),
    "the buffer replaced": lambda layer, given: layer._buffers.__setitem__("coeffs", given.clone()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("way", ["as it is", "deepcopy", "pickle", "to", "compiled"])
def test_coefficients_that_were_written_hold(write: str, way: str) -> None:
    layer = ExpansionLinear(4, 3, dtype=torch.float64, bank=GeneBank(), name="fc", coeffs=[1.0, 0.0])
    x, given = torch.randn(2, 4, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    first, second = layer.bank.group("fc").weights()
    layer(x)
    WRITES[write](layer, given)
    other = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda it: pickle.loads(pickle.dumps(it)),
        "to": lambda it: it.double(),
    }
    layer = other.get(way, lambda it: it)(layer)
    run = torch.compile(layer, backend="eager") if way == "compiled" else layer
    torch.testing.assert_close(run(x), x @ (first + 0.5 * second).t() + layer.dense_bias())
    torch.testing.assert_close(layer.dense_weight(), first + 0.5 * second)
    assert "coeffs=[1, 0.5]" in repr(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("first", ["written", "compiled"])
def test_compiled_networks_take_coefficients_from_outside(first: str) -> None:
    torch._dynamo.reset()
    net, x = Net(2), torch.randn(3, WIDTH, dtype=torch.float64)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    if first == "compiled":
        torch.testing.assert_close(compiled(x), net(x))
    else:
        with torch.no_grad():
            net.blocks[0].fc.coeffs.copy_(torch.tensor([1.0, 0.5]))
        torch.testing.assert_close(compiled(x), net(x))
    given = {"blocks.0.fc.coeffs": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    wanted = torch.func.functional_call(net, given, (x,))
    assert not torch.allclose(wanted, net(x))
    prefixed = {f"_orig_mod.{name}": value for name, value in given.items()}
    torch.testing.assert_close(torch.func.functional_call(compiled, prefixed, (x,)), wanted)
    net.blocks[0].fc.set_coeffs([1.0, -2.0])
    torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "to", "set_coeffs", "reset_parameters", "same"])
def test_genes_stay_unread_where_nothing_was_written(way: str) -> None:
    net = Net(2)
    fc = net.blocks[0].fc
    assert fc.coeffs.tolist() == [1.0, 0.0]
    other = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "to": lambda net: net.float().double(),
        "set_coeffs": lambda net: net.blocks[0].fc.set_coeffs([2.0, 0.0]) or net,
        "reset_parameters": lambda net: net.blocks[0].fc.reset_parameters() or net,
        "same": lambda net: setattr(net.blocks[0].fc, "coeffs", net.blocks[0].fc.coeffs) or net,
    }[way](net)
    with torch.no_grad():
        other.gene_bank.group("mlp.fc").weight[1].fill_(torch.nan)
    assert other.blocks[0].fc.dense_weight().isfinite().all()


def test_ddp_leaves_fixed_coefficients_alone() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = Net(2)
        wrapped = nn.parallel.DistributedDataParallel(net)
        with torch.no_grad():
            net.gene_bank.group("mlp.fc").weight[1].fill_(torch.nan)
        wrapped(torch.randn(2, WIDTH, dtype=torch.float64))
        assert net.blocks[0].fc.dense_weight().isfinite().all()
        net._ddp_params_and_buffers_to_ignore = ["another"]
        assert nn.parallel.DistributedDataParallel(net).parameters_to_ignore == {"another"}
    finally:
        torch.distributed.destroy_process_group()


def test_coefficients_that_are_trained_are_not_assigned() -> None:
    layer = ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=[1.0, 0.0])
    with pytest.raises(ArgumentError, match="coeffs: expected values, as for set_coeffs"):
        layer.coeffs = nn.Parameter(torch.ones(2))
    with pytest.raises(ShapeError, match="coeffs: expected 2 numbers, got 3"):
        layer.coeffs = torch.ones(3)
    assert layer.coeffs.tolist() == [1.0, 0.0]


def test_old_genes_are_let_go_when_new_ones_are_loaded() -> None:
    net = Net(2)
    net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()
    old = weakref.ref(net.gene_bank.group("norm").weight[0])
    net.load_state_dict({name: p.detach().clone() for name, p in net.state_dict().items()}, assign=True)
    gc.collect()
    assert old() is None


def test_swapping_parameters_after_a_step() -> None:
    net = Net(2)
    net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()
    net.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()


def test_shallow_copies_run_their_own_forward_and_detach_restores_the_class() -> None:
    net = Net(4)
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    short = copy.copy(net)
    short._modules = {**net._modules, "blocks": net.blocks[:1]}
    torch.testing.assert_close(short(x), net.blocks[0](x), rtol=0, atol=0)
    assert type(net).__name__ == "Net"
    assert Net.forward(net, x).equal(net(x))
    bank = net.gene_bank
    bank.detach(net)
    assert type(net) is Net
    with pytest.raises(ArgumentError, match="model: expected the model this bank is attached to, got another"):
        bank.detach(net)


def test_training_twice_in_place_is_seen() -> None:
    """Low-precision copies follow the genes' versions."""
    layer = ExpansionLinear(4, 3, bank=(bank := GeneBank()), name="fc", coeffs=[1.0, 0.5])
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        again = layer(x)
        with torch.no_grad():
            bank.group("fc").weight[0].add_(1.0)
        after = layer(x)
    assert torch.equal(before, again)
    assert not torch.equal(before, after)


class Alone(nn.Module):
    """A model of one layer, whose tensors are kept for the backward pass or made again."""

    kept = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if self.kept else checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("policy", "attached", "exact"), [("param", True, True), ("auto", True, False), ("auto", False, True)]
)
def test_compute_dtype_where_genes_cancel(policy: str, attached: bool, exact: bool) -> None:
    """c = (1, -1): the float32 masters give the exact product, the copies in bfloat16 of a model's pass do not."""
    bank = GeneBank(policy)
    layer = ExpansionLinear(64, 64, bias=False, bank=bank, name="fc", coeffs=[1.0, -1.0])
    model = Alone(layer)
    if attached:
        bank.attach(model)
    base, delta = torch.randn(64, 64), 1e-3 * torch.randn(64, 64)
    with torch.no_grad():
        bank.group("fc").weight[0].copy_(base + delta)
        bank.group("fc").weight[1].copy_(base)
    x = torch.randn(32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    wanted = x.double() @ ((base + delta).double() - base.double()).t()
    error = ((y.double() - wanted).norm() / wanted.norm()).item()
    assert y.dtype == torch.bfloat16
    assert error < 1e-2 if exact else error > 0.1
    y.sum().backward()
    assert bank.group("fc").weight[0].grad.dtype == torch.float32


@pytest.mark.parametrize("attached", [False, True])
def test_checkpoints_read_again_what_was_read(attached: bool) -> None:
    """Copies in a pass, none without one: the forward pass that a backward pass runs again makes the same choice."""
    found = []
    for kept in (True, False):
        torch.manual_seed(0)
        bank = GeneBank()
        model = Alone(ExpansionLinear(8, 8, bank=bank, name="fc", coeffs=[1.0, -1.0]))
        model.kept = kept
        if attached:
            bank.attach(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(torch.randn(4, 8))
        y.sum().backward()
        found.append([gene.grad for gene in bank.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["auto", "param", torch.float16])
def test_autocast_gradients_reach_float32_masters(policy: str | torch.dtype) -> None:
    net = Net(3, dtype=torch.float32, compute=policy)
    x = torch.randn(5, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x).sum().backward()
    expected = unshared(net, x, torch.ones(5, WIDTH))
    for grad, truth in zip(gene_grads(net), expected, strict=True):
        assert grad.dtype == torch.float32
        assert (grad.double() - truth).norm() <= 0.05 * truth.norm() + 0.02
