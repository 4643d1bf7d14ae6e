# SPDX-License-Identifier: Apache-2.0
"""`GeneBank`: genes that nobody reads, are pruned or made by others, second derivatives, and numbers of genes.

Whatever runs backward over shared genes, eager or compiled, is in `test_gradients` and `test_gradients_compiled`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from expansion_samples import WIDTH, Net, close, unshared

import pylearngene as plg
from pylearngene.errors import ArgumentError, ShardingError
from pylearngene.nn import ExpansionGroup, ExpansionLinear, GeneBank, LowRankLinear
from pylearngene.nn._wrapping import Sharded


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


@pytest.mark.parametrize("name", ["attn", "attn.fc.weight", "mlp..fc", "mlp.forward", "mlp.", "", 3, None, ["mlp"]])
def test_a_name_that_cannot_be_leaves_every_group_where_it_is(name: object) -> None:
    """That of a branch, or of a part of a group, would take the place of other genes."""
    bank = GeneBank()
    ExpansionLinear(4, 3, bank=bank, name="attn.fc", coeffs=[1.0])
    have = [path for path, _ in bank.named_modules()]
    with pytest.raises(ArgumentError, match=r"^name: expected a path like 'attn.qkv', got "):
        LowRankLinear(4, 3, bank=bank, name=name, rank=2)  # type: ignore[arg-type]
    assert [path for path, _ in bank.named_modules()] == have
    assert list(bank.groups) == ["attn.fc"]


@pytest.mark.parametrize("kind", [torch.nn.Linear, "low_rank", None])
def test_a_class_that_is_no_group_is_refused(kind: object) -> None:
    bank = GeneBank()
    with pytest.raises(ArgumentError, match=r"^kind: expected a class of gene groups, got "):
        bank.add_group("fc", kind, 3, 4)  # type: ignore[type-var]
    assert not bank.groups


def test_sharded_genes_stay_as_many_as_they_are() -> None:
    bank = GeneBank()
    layer = ExpansionLinear(4, 3, bank=bank, name="fc", coeffs=[1.0])
    bank.__class__ = type("GeneBank", (Sharded, GeneBank), {})
    for change in (
        lambda: bank.grow_group("fc", 2),
        lambda: LowRankLinear(4, 3, bank=bank, name="other", rank=2),
    ):
        with pytest.raises(ShardingError, match=r"^net: expected a network that is not sharded, got one whose genes"):
            change()
    assert list(bank.groups) == ["fc"]
    assert len(layer.bank.group("fc").weight) == 1
