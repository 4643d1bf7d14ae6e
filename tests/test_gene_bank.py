# SPDX-License-Identifier: Apache-2.0
"""`GeneBank` and the layers: sharing, one gradient per gene, copies, dtypes, views, errors.

Shared genes are compared with unshared copies whose gradients are summed; compiled graphs have their own file.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene.nn import ExpansionLayerNorm, ExpansionLinear, GeneBank

WIDTH = 6


class Block(nn.Module):
    def __init__(self, bank: GeneBank, level: int, depth: int, learn: bool, dtype: torch.dtype) -> None:
        super().__init__()
        shared = {"bank": bank, "coeffs": [1.0, level / depth], "learn_coeffs": learn}
        self.norm = ExpansionLayerNorm(WIDTH, dtype=dtype, name="norm", **shared)
        self.fc = ExpansionLinear(WIDTH, WIDTH, dtype=dtype, name="mlp.fc", **shared)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Net(nn.Module):
    """L gene-backed blocks; `recompute` says how they are checkpointed."""

    def __init__(
        self, depth: int = 4, learn: bool = False, dtype: torch.dtype = torch.float64, compute: str = "auto"
    ) -> None:
        super().__init__()
        bank = GeneBank(compute)
        self.blocks = nn.ModuleList(Block(bank, level, depth, learn, dtype) for level in range(depth))
        bank.attach(self)
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.recompute: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.recompute)
        return x


def unshared(net: Net, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Oracle: every layer gets its own copies of the genes, gradients are summed over copies in float64."""
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.gene_bank.named_genes()}
    copies = []
    y = x.double()
    for block in net.blocks:
        own = {name: p.detach().double().requires_grad_() for name, p in net.gene_bank.named_genes()}
        copies.append(own)

        def expand(part: str, layer: nn.Module, own: dict[str, Tensor] = own) -> Tensor:
            return sum(layer.coeffs.detach().double()[k] * own[f"{part}.{k}"] for k in range(2))

        h = nn.functional.layer_norm(y, (WIDTH,), expand("norm.weight", block.norm), expand("norm.bias", block.norm))
        y = y + torch.tanh(nn.functional.linear(h, expand("mlp.fc.weight", block.fc), expand("mlp.fc.bias", block.fc)))
    y.backward(dy.double())
    for own in copies:
        for name, leaf in own.items():
            sums[name] += leaf.grad
    return list(sums.values())


def gene_grads(net: Net) -> list[Tensor]:
    return [p.grad for _, p in net.gene_bank.named_genes()]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("depth", [1, 2, 12, 48])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_shared_genes_equal_unshared_copies_summed(depth: int, dtype: torch.dtype, tolerance: float) -> None:
    net = Net(depth, dtype=dtype)
    x, dy = torch.randn(3, WIDTH, dtype=dtype), torch.randn(3, WIDTH, dtype=dtype)
    net(x).backward(dy)
    expected = unshared(net, x, dy)
    for a, b in zip(gene_grads(net), expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm().clamp_min(1e-30) * 3


@pytest.mark.parametrize("depth", [12, 96])
def test_bfloat16_genes_sum_in_float32(depth: int) -> None:
    """Against "float32 sum, rounded once": at most 1.5x its error, where summing in bfloat16 gives several times it."""
    bank = GeneBank()
    layers = [
        ExpansionLinear(8, 8, bias=False, dtype=torch.bfloat16, bank=bank, name="fc", coeffs=[1.0])
        for _ in range(depth)
    ]
    x = torch.randn(depth, 4, 8, dtype=torch.bfloat16)
    dy = torch.randn(depth, 4, 8, dtype=torch.bfloat16)
    torch.stack([layer(x[level]) for level, layer in enumerate(layers)]).backward(dy)
    each = torch.einsum("lmo,lmi->loi", dy.double(), x.double())
    ruler = (each.sum(0).bfloat16().double() - each.sum(0)).norm()
    # One rounding of each layer's dW to the panel's dtype is inherent on the CPU, as in torch's AMP.
    rounded = (each.bfloat16().double().sum(0) - each.sum(0)).norm()
    got = bank.group("fc").weight[0].grad.double()
    assert (got - each.sum(0)).norm() <= 1.5 * (ruler + rounded)


@pytest.mark.parametrize("recompute", [None, False, True])
def test_checkpointing(recompute: bool | None) -> None:
    net = Net()
    net.recompute = recompute
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True), torch.randn(3, WIDTH, dtype=torch.float64)
    net(x).backward(dy)
    close(gene_grads(net), unshared(net, x.detach(), dy))


def test_each_gene_gets_exactly_one_gradient_per_backward() -> None:
    net = Net(6)
    calls: list[int] = []
    for parameter in net.gene_bank.parameters():
        parameter.register_hook(lambda grad: calls.append(1))
    net(torch.randn(3, WIDTH, dtype=torch.float64)).sum().backward()
    assert len(calls) == len(list(net.gene_bank.parameters()))


def test_two_backwards_accumulation_and_any_order() -> None:
    net = Net()
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    once = unshared(net, x, dy)
    y = net(x)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    close(gene_grads(net), [2 * g for g in once])
    net.zero_grad()
    first, second = net(x), net(2 * x)
    second.backward(dy)
    first.backward(dy)
    close(gene_grads(net), [a + b for a, b in zip(once, unshared(net, 2 * x, dy), strict=True)])
    net.zero_grad()
    (net(x) + net(2 * x)).backward(dy)
    close(gene_grads(net), [a + b for a, b in zip(once, unshared(net, 2 * x, dy), strict=True)])


def test_autograd_grad_of_x_leaves_nothing_behind() -> None:
    """A buffer kept across passes would add the first pass to the second."""
    net = Net()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, WIDTH, dtype=torch.float64)
    y = net(x)
    torch.autograd.grad(y, x, dy, retain_graph=True)
    assert all(not tap.ledger._open for tap in net.gene_bank._taps.values())
    y.backward(dy)
    close(gene_grads(net), unshared(net, x.detach(), dy))


def test_autograd_grad_of_genes_and_of_one_gene() -> None:
    net = Net()
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    genes = [p for _, p in net.gene_bank.named_genes()]
    close(list(torch.autograd.grad(net(x), genes, dy)), unshared(net, x, dy))
    (one,) = torch.autograd.grad(net(x), [genes[5]], dy)
    close([one], [unshared(net, x, dy)[5]])
    assert all(p.grad is None for p in genes)


def test_frozen_genes_and_learned_coefficients() -> None:
    net = Net(learn=True)
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    expected = unshared(net, x, dy)
    net.gene_bank.group("mlp.fc").weight[0].requires_grad_(False)
    net.gene_bank.group("norm").requires_grad_(False)
    net(x).backward(dy)
    grads = dict(zip([n for n, _ in net.gene_bank.named_genes()], gene_grads(net), strict=True))
    assert {n for n, g in grads.items() if g is None} == {
        "mlp.fc.weight.0", "norm.weight.0", "norm.weight.1", "norm.bias.0", "norm.bias.1"
    }  # fmt: skip
    wanted = dict(zip(grads, expected, strict=True))
    close([g for g in grads.values() if g is not None], [wanted[n] for n, g in grads.items() if g is not None])
    coefficient = net.blocks[1].fc.coeffs
    learned = coefficient.grad.clone()
    step = torch.tensor([0.0, 1e-6], dtype=torch.float64)
    with torch.no_grad():
        coefficient += step
        up = (net(x) * dy).sum()
        coefficient -= 2 * step
        down = (net(x) * dy).sum()
    torch.testing.assert_close(learned[1], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)
    net.gene_bank.requires_grad_(False)
    net.zero_grad()
    net(x).backward(dy)
    assert all(g is None for g in gene_grads(net))
    torch.testing.assert_close(coefficient.grad, learned, rtol=1e-4, atol=1e-6)


def test_layers_skipped_at_run_time() -> None:
    net = Net(4)
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    full = net.blocks
    net(x).backward(dy)
    net.zero_grad()
    net.blocks = full[:2]
    net(x).backward(dy)
    close(gene_grads(net), unshared(net, x, dy))


def test_backward_from_several_threads() -> None:
    net = Net(3)
    xs = [torch.randn(3, WIDTH, dtype=torch.float64) for _ in range(8)]
    dy = torch.ones(3, WIDTH, dtype=torch.float64)
    results: dict[int, tuple[Tensor, ...]] = {}
    genes = [p for _, p in net.gene_bank.named_genes()]

    def run(index: int) -> None:
        for _ in range(5):
            results[index] = torch.autograd.grad(net(xs[index]), genes, dy)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(xs):
        close(list(results[index]), unshared(net, x, dy))


def test_a_failed_backward_leaves_no_sums() -> None:
    net = Net()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def fail(grad: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    y = net.blocks[0](x)
    y.register_hook(fail)
    for block in net.blocks[1:]:
        y = block(y)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    dy = torch.ones(3, WIDTH, dtype=torch.float64)
    net(x).backward(dy)
    assert all(not tap.ledger._open for tap in net.gene_bank._taps.values())
    close(gene_grads(net), unshared(net, x.detach(), dy))


def test_create_graph_alone_works_and_a_second_derivative_raises() -> None:
    net = Net()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    genes = list(net.gene_bank.parameters())
    grads = torch.autograd.grad(net(x).sum(), genes, create_graph=True)
    with pytest.raises(plg.errors.DoubleBackwardError, match="double backward"):
        grads[0].sum().backward()


def test_one_bank_in_two_models_and_genes_that_are_not_leaves() -> None:
    net = Net()
    other = copy.copy(net)
    x, dy = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    (net(x) + other(x)).backward(dy)
    close(gene_grads(net), [2 * g for g in unshared(net, x, dy)])
    source = {n: torch.randn_like(p, requires_grad=True) for n, p in net.named_parameters()}
    made = {n: 2 * s for n, s in source.items()}
    torch.func.functional_call(net, made, (x,)).backward(dy)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(made[name])
    wanted = dict(
        zip([f"gene_bank.genes.{n}" for n, _ in net.gene_bank.named_genes()], unshared(net, x, dy), strict=True)
    )
    for name, leaf in source.items():
        torch.testing.assert_close(leaf.grad, 2 * wanted[name])


def test_gradients_of_made_genes_flow_through_low_precision_copies() -> None:
    net = Net(3, dtype=torch.float32)
    x = torch.randn(5, WIDTH)
    source = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x).sum().backward()
        torch.func.functional_call(net, {n: 1.0 * s for n, s in source.items()}, (x,)).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(source[name].grad, parameter.grad, rtol=3e-2, atol=3e-2)


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
    assert other.forward.model is other
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


def test_optimizer_has_one_slot_per_gene() -> None:
    net = Net(7)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 8
    before = [p.clone() for p in net.parameters()]
    y = net(torch.ones(1, WIDTH, dtype=torch.float64))
    assert not torch.equal(before[0], torch.zeros_like(before[0]))
    y.sum().backward()


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


def test_compute_dtype_where_genes_cancel() -> None:
    """c = (1, -1): `param` reads the float32 masters and is exact; `auto` reads bfloat16 copies, as documented."""
    outputs = {}
    for policy in ("param", "auto"):
        bank = GeneBank(policy)
        layer = ExpansionLinear(64, 64, bias=False, bank=bank, name="fc", coeffs=[1.0, -1.0])
        torch.manual_seed(0)
        base, delta = torch.randn(64, 64), 1e-3 * torch.randn(64, 64)
        with torch.no_grad():
            bank.group("fc").weight[0].copy_(base + delta)
            bank.group("fc").weight[1].copy_(base)
        x = torch.randn(32, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs[policy] = layer(x)
        exact = x.double() @ ((base + delta).double() - base.double()).t()
        error = ((outputs[policy].double() - exact).norm() / exact.norm()).item()
        assert outputs[policy].dtype == torch.bfloat16
        assert error < 1e-2 if policy == "param" else error > 0.1
    layer(x).sum().backward()
    assert bank.group("fc").weight[0].grad.dtype == torch.float32


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


def test_weight_view_is_free_until_used() -> None:
    layer = ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=[1.0, 0.5])
    start = plg.nn.dense_syntheses()
    view = layer.weight
    assert (view.dtype, view.device.type, tuple(view.shape), view.ndim) == (torch.float32, "cpu", (3, 4), 2)
    assert view.size(0) == 3
    assert view.size() == torch.Size([3, 4])
    assert view.numel() == 12
    assert view.dim() == 2
    assert view.requires_grad
    assert view.is_floating_point()
    assert not view.is_cuda
    assert not view.is_meta
    assert "shape=[3, 4]" in repr(view)
    assert layer.bias.shape == (3,)
    assert plg.nn.dense_syntheses() == start
    x = torch.randn(2, 4)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(layer.weight.mean(), layer.dense_weight().mean())
    assert plg.nn.dense_syntheses() == start + 3  # a bias is no full weight
    with pytest.raises(AttributeError):
        _ = layer.weight.no_such_attribute


def test_dense_forms_equal_the_layers() -> None:
    bank = GeneBank()
    layer = ExpansionLinear(4, 3, dtype=torch.float64, bank=bank, name="fc", coeffs=[1.0, 0.5])
    norm = ExpansionLayerNorm(4, eps=1e-3, dtype=torch.float64, bank=bank, name="n", coeffs=[1.0, 0.5])
    bare = ExpansionLinear(4, 3, bias=False, dtype=torch.float64, bank=bank, name="bare", coeffs=[2.0])
    for p in bank.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 4, dtype=torch.float64)
    for gene_backed in (layer, norm, bare):
        plain = gene_backed.to_dense()
        assert type(plain) in (nn.Linear, nn.LayerNorm)
        torch.testing.assert_close(plain(x), gene_backed(x), rtol=1e-12, atol=1e-12)
    assert bare.to_dense().bias is None
    assert bare.dense_bias() is None


def test_set_coeffs() -> None:
    layer = ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=[1.0, 0.5])
    layer.set_coeffs(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(layer.dense_weight(), layer.bank.group("fc").weight[1])
    with pytest.raises(plg.errors.ShapeError, match="coeffs: expected 2 numbers, got 3"):
        layer.set_coeffs([1, 2, 3])


def test_representations_are_one_line_each() -> None:
    bank = GeneBank()
    layer = ExpansionLinear(4, 3, bank=bank, name="attn.qkv", coeffs=[1.0, 0.25])
    assert repr(layer) == "ExpansionLinear(in_features=4, out_features=3, bias=True, name='attn.qkv', coeffs=[1, 0.25])"
    assert repr(bank) == "GeneBank(1 groups, 30 parameters, compute_dtype='auto')"
    assert repr(bank.group("attn.qkv")) == "GeneGroup(2 genes of 3x4 with bias)"
    norm = ExpansionLayerNorm(4, bank=bank, name="norm", coeffs=[1.0, 0.25])
    assert repr(norm) == "ExpansionLayerNorm(4, eps=1e-05, name='norm', coeffs=[1, 0.25])"


def test_a_dropped_model_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        net = Net()
        net(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()
        gone = weakref.ref(net.gene_bank.group("norm").weight[0])
        del net
        assert gone() is None
    finally:
        gc.enable()


def test_torch_save_of_a_state_dict() -> None:
    buffer = io.BytesIO()
    torch.save(Net().state_dict(), buffer)
    assert buffer.tell() > 0


BANK = GeneBank()
FC = {"bank": BANK, "name": "fc", "coeffs": [1.0, 0.5]}
ExpansionLinear(4, 3, **FC)
REFUSED = {
    "bank": (
        lambda: ExpansionLinear(4, 3, bank=None, name="fc", coeffs=[1.0]),
        "ArgumentError",
        "bank: expected a GeneBank, got NoneType",
    ),
    "no coeffs": (
        lambda: ExpansionLinear(4, 3, bank=BANK, name="a", coeffs=[]),
        "ArgumentError",
        "coeffs: expected at least one coefficient",
    ),
    "many": (
        lambda: ExpansionLinear(4, 3, bank=BANK, name="a", coeffs=[1.0] * 65),
        "ArgumentError",
        "num_genes: expected 1 to 64, got 65",
    ),
    "nan": (
        lambda: ExpansionLinear(4, 3, bank=BANK, name="a", coeffs=[1.0, float("nan")]),
        "ArgumentError",
        r"coeffs\[1\]: expected a finite number, got nan",
    ),
    "other K": (
        lambda: ExpansionLinear(4, 3, bank=BANK, name="fc", coeffs=[1.0]),
        "ShapeError",
        r"fc: expected \(genes, weight, bias\) = \(2, \(3, 4\), \(3,\)\) as in the bank, got \(1,",
    ),
    "other shape": (lambda: ExpansionLinear(5, 3, **FC), "ShapeError", r"fc: expected .* got \(2, \(3, 5\), \(3,\)\)"),
    "other bias": (
        lambda: ExpansionLinear(4, 3, bias=False, **FC),
        "ShapeError",
        r"fc: expected .* got \(2, \(3, 4\), None\)",
    ),
    "size": (
        lambda: ExpansionLinear(-1, 3, **FC),
        "ArgumentError",
        "in_features: expected an int of at least 0, got -1",
    ),
    "name": (
        lambda: ExpansionLinear(4, 3, bank=BANK, name="", coeffs=[1.0]),
        "ArgumentError",
        "name: expected a path like 'attn.qkv', got ''",
    ),
    "taken": (
        lambda: ExpansionLinear(4, 3, bank=BANK, name="forward", coeffs=[1.0]),
        "ArgumentError",
        "name: expected a path like 'attn.qkv', got 'forward'",
    ),
    "norm axes": (
        lambda: ExpansionLayerNorm((2, 3), bank=BANK, name="n", coeffs=[1.0]),
        "ArgumentError",
        r"normalized_shape: expected one size, got \[2, 3\]",
    ),
    "norm plain": (
        lambda: ExpansionLayerNorm(3, 1e-5, False, bank=BANK, name="n", coeffs=[1.0]),
        "ArgumentError",
        "elementwise_affine: expected True",
    ),
    "policy": (
        lambda: GeneBank("fast"),
        "ArgumentError",
        "compute_dtype: expected 'auto', 'param' or a floating dtype, got 'fast'",
    ),
    "group": (lambda: BANK.group("fd"), "ArgumentError", r"name: expected one of \['fc'\], got 'fd'"),
    "x width": (
        lambda: ExpansionLinear(4, 3, **FC)(torch.zeros(2, 5)),
        "ShapeError",
        r"x: expected shape \[\*, I\] with I = 4, got \[2, 5\]",
    ),
    "x ints": (
        lambda: ExpansionLinear(4, 3, **FC)(torch.zeros(2, 4).int()),
        "DTypeError",
        "x: expected float32, .* got int32",
    ),
    "x double": (
        lambda: ExpansionLinear(4, 3, **FC)(torch.zeros(2, 4).double()),
        "DTypeError",
        "x: expected float32 .* got float64",
    ),
    "x device": (
        lambda: ExpansionLinear(4, 3, **FC)(torch.zeros(2, 4, device="meta")),
        "DeviceError",
        "x: expected device cpu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(getattr(plg.errors, kind), match=message):
        make()


def test_a_model_has_one_bank() -> None:
    net = Net()
    net.gene_bank.attach(net)
    with pytest.raises(plg.errors.ArgumentError, match="model: expected a model without a gene bank"):
        GeneBank().attach(net)
