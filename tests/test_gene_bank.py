# SPDX-License-Identifier: Apache-2.0
"""`GeneBank`: one gradient per gene, whatever runs backward, in any order, from any thread.

Shared genes are compared with unshared copies whose gradients are summed; compiled graphs have their own file.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.utils.prune
from expansion_samples import WIDTH, Net, close, gene_grads, unshared
from torch import Tensor

import pylearngene as plg
from pylearngene.errors import ArgumentError
from pylearngene.nn import ExpansionGroup, ExpansionLinear, GeneBank


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


def test_create_graph_alone_works_and_every_second_derivative_raises() -> None:
    """Also where only some inputs are asked for, so that the engine walks no other path."""
    net = Net(learn=True)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    genes = list(net.gene_bank.parameters())
    first = torch.autograd.grad(net(x).pow(2).sum(), [x, *genes], create_graph=True)
    close(list(first[1:]), unshared(net, x.detach(), 2 * net(x).detach()))
    for grad in (first[0], first[1], first[-1]):
        for wanted in (x, genes[-1], net.blocks[1].fc.coeffs):
            with pytest.raises(plg.errors.DoubleBackwardError, match="double backward"):
                torch.autograd.grad(grad.sum(), wanted, retain_graph=True)
        with pytest.raises(plg.errors.DoubleBackwardError, match="double backward"):
            grad.sum().backward(retain_graph=True)


def test_batched_gradients_are_refused() -> None:
    net = Net(2)
    y = net(torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True))
    upstream = torch.randn(4, *y.shape, dtype=torch.float64)
    with pytest.raises(plg.errors.BackendError, match="is_grads_batched: expected one upstream gradient"):
        torch.autograd.grad(y, list(net.gene_bank.parameters()), upstream, is_grads_batched=True)


def test_genes_that_no_layer_used_get_no_gradient() -> None:
    layer = ExpansionLinear(4, 3, bank=(bank := GeneBank()), name="fc", coeffs=[1.0, 0.5])
    layer.dense_weight().sum().backward()
    assert all(gene.grad is not None for gene in bank.group("fc").weight)
    assert all(gene.grad is None for gene in bank.group("fc").bias)


def test_pruned_and_reordered_genes_keep_their_places() -> None:
    net = Net(2)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    group = net.gene_bank.group("mlp.fc")
    torch.nn.utils.prune.l1_unstructured(group.weight, "0", 0.5)
    kept = group.weight[0].detach().clone()
    assert (kept == 0).any()
    weight = net.blocks[1].fc.dense_weight()
    torch.testing.assert_close(weight, kept + 0.5 * group.weight[1])
    net(x).sum().backward()


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


@pytest.mark.parametrize("part", ["layer", "dense_weight"])
def test_genes_times_zero_that_are_no_leaves_get_zeros_too(part: str) -> None:
    layer = ExpansionLinear(4, 3, bias=False, bank=(bank := GeneBank()), name="fc", coeffs=[1.0, 0.0])
    made = {name: gene.detach().clone().requires_grad_() * 1.0 for name, gene in bank.genes.named_parameters()}
    for name, gene in made.items():
        owner, _, k = name.rpartition(".")
        del bank.genes.get_submodule(owner)._parameters[k]
        setattr(bank.genes.get_submodule(owner), k, gene)
    y = layer(torch.randn(2, 4)) if part == "layer" else layer.dense_weight()
    first, second = torch.autograd.grad(y.sum(), list(made.values()))
    assert first.any()
    assert torch.equal(second, torch.zeros(3, 4))


def test_networks_with_made_genes_get_every_gradient() -> None:
    net = Net(1)  # its layer has coefficients (1, 0)
    made = {name: gene.detach().clone().requires_grad_() * 1.0 for name, gene in net.named_parameters()}
    y = torch.func.functional_call(net, made, (torch.randn(2, WIDTH, dtype=torch.float64),))
    grads = torch.autograd.grad(y.sum(), list(made.values()))
    assert all(
        torch.equal(grad, torch.zeros_like(grad)) for name, grad in zip(made, grads, strict=True) if name.endswith(".1")
    )


@pytest.mark.parametrize("asked", [True, 3.0, "3", None, 1, 65])
def test_a_number_of_genes_is_an_int_of_what_fits(asked: object) -> None:
    bank = GeneBank()
    ExpansionLinear(4, 3, bank=bank, name="fc", coeffs=[1.0, 0.5])
    with pytest.raises(ArgumentError, match=rf"^num_genes: expected 2 to 64, got {asked!r}$"):
        bank.grow_group("fc", asked)
    assert bank.group("fc").num_genes == len(bank.group("fc").weight) == 2
    single = GeneBank()
    ExpansionLinear(4, 3, bank=single, name="fc", coeffs=[1.0])
    with pytest.raises(ArgumentError, match=r"^num_genes: expected 1 to 64, got True$"):
        single.grow_group("fc", True)
    with pytest.raises(ArgumentError, match=r"^num_genes: expected 1 to 64, got True$"):
        single.add_group("other", ExpansionGroup, True, (3, 4), None)
