# SPDX-License-Identifier: Apache-2.0
"""Freezing by part, by gene and by layer: what it sets, what it saves, and training that goes on after a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_samples import OddNet, images
from torch import nn

import pylearngene as plg
from pylearngene.errors import ArgumentError, MethodError
from pylearngene.functional._tap import Ledger
from pylearngene.methods import TLEG, Expansion

LAYERS = ["before", "gate", "up.0", "down"]


def network(learn: bool = False, depth: int = 3) -> nn.Module:
    method = Expansion(TLEG().coefficients(depth), learn=True) if learn else TLEG()
    return plg.auxiliary(OddNet(depth), method)


def trained(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def parts(net: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """Names of genes, of coefficients, and of the rest, told apart by their keys alone."""
    names = {name for name, _ in net.named_parameters()}
    genes = {name for name in names if name.startswith("gene_bank.")}
    coeffs = {name for name in names if name.endswith(".coeffs")}
    return genes, coeffs, names - genes - coeffs


def test_each_part_is_frozen_trained_or_left() -> None:
    net = network(learn=True)
    genes, coeffs, outside = parts(net)
    assert len(genes) == 14
    assert len(coeffs) == 12
    assert "stem.weight" in outside
    assert plg.freeze(net) is net
    assert trained(net) == coeffs | outside
    plg.freeze(net, genes=None, outside=True)
    assert trained(net) == coeffs
    plg.freeze(net, genes=False, coeffs=True)
    assert trained(net) == genes
    plg.freeze(net, genes=None, coeffs=False, outside=False)
    assert trained(net) == genes | coeffs | outside


@pytest.mark.parametrize(
    ("chosen", "frozen"),
    [([0], "0"), ((-1,), "1"), (range(1), "0"), ([0, 1], "01"), ([], ""), (slice(1, None), "1"), (slice(None), "01")],
)
def test_genes_by_index(chosen: Any, frozen: str) -> None:
    net = plg.freeze(network(), genes=True)
    plg.freeze(net, genes=chosen)
    genes, _, outside = parts(net)
    assert trained(net) == {name for name in genes if name[-1] not in frozen} | outside


def test_layers_restrict_genes_and_coefficients_but_not_the_outside() -> None:
    net = plg.freeze(network(learn=True), genes=True, coeffs=True, outside=True, layers=["up", "gate"])
    genes, coeffs, _ = parts(net)
    assert trained(net) == {name for name in genes | coeffs if ".before." in name or ".down." in name}
    plg.freeze(net, genes=[1], layers=["gate"])
    assert {name for name in trained(net) if ".gate." in name} == {
        "gene_bank.genes.gate.weight.0",
        "gene_bank.genes.gate.bias.0",
    }


@pytest.mark.parametrize("chosen", [True, False, [0], slice(1)])
def test_no_layers_are_no_genes_and_no_coefficients(chosen: Any) -> None:
    net = network(learn=True)
    before = trained(net)
    plg.freeze(net, genes=chosen, coeffs=True, layers=[])
    assert trained(net) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": [2]}, "genes: expected indices below K = 2, got 2"),
        ({"genes": [-3]}, "genes: expected indices below K = 2, got -3"),
        ({"genes": 0}, "genes: expected True, False, None, a slice or a sequence of indices, got 0"),
        ({"genes": [True]}, r"genes: expected True, False, None, a slice or a sequence of indices, got \[True\]"),
        ({"genes": "01"}, "genes: expected True, False, None, a slice or a sequence of indices, got '01'"),
        ({"genes": slice("a", "b")}, r"genes: expected a slice of ints .*, got slice\('a', 'b', None\)"),
        ({"genes": slice(0, 1, 0)}, r"genes: expected a slice of ints with a step other than 0, got slice\(0, 1, 0\)"),
        ({"genes": slice("a"), "layers": []}, r"genes: expected a slice of ints .*, got slice\(None, 'a', None\)"),
        ({"layers": 3}, r"layers: expected a sequence of paths, some of \['before', .*\], got 3"),
        ({"layers": iter(["gate"])}, r"layers: expected a sequence of paths, some of \['before', .*\], got <list_it"),
        ({"coeffs": 1}, "coeffs: expected True, False or None, got 1"),
        ({"outside": "all"}, "outside: expected True, False or None, got 'all'"),
        ({"layers": ["ga"]}, r"layers: expected some of \['before', .*'up.0'\], or what they begin with, got 'ga'"),
        ({"layers": "gate"}, r"layers: expected a sequence of paths, some of \['before', .*\], got 'gate'"),
    ],
)
def test_refusals_change_nothing(options: dict[str, Any], message: str) -> None:
    net = network(learn=True)
    before = trained(net)
    with pytest.raises(ArgumentError, match=message):
        plg.freeze(net, **{"genes": True, "coeffs": True, "outside": True, **options})
    assert trained(net) == before


def test_plain_models_are_refused() -> None:
    with pytest.raises(MethodError, match=r"net: expected a gene-backed network .* got a plain OddNet"):
        plg.freeze(OddNet())


@pytest.mark.parametrize(("chosen", "count"), [(True, 0), ([0], 1), (False, 2)])
def test_frozen_genes_get_no_accumulator_and_no_gradient(
    chosen: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, made = network(), []
    original = Ledger.take

    def counted(self: Ledger) -> Any:
        sums, anchors = original(self)
        made.extend(total.shape for total in sums if total is not None)
        return sums, anchors

    monkeypatch.setattr(Ledger, "take", counted)
    plg.freeze(net, genes=chosen)
    net(images()).square().sum().backward()
    expected = [gene.shape for _, gene in net.gene_bank.named_genes() if gene.requires_grad]
    assert sorted(made) == sorted(expected)
    assert len(made) == 7 * count
    assert {name for name, gene in net.named_parameters() if gene.grad is not None} == trained(net)


def test_what_is_trained_gets_the_gradients_it_had_before() -> None:
    x, net, whole = images(), network(learn=True), network(learn=True)
    whole.load_state_dict(net.state_dict())
    whole(x).square().sum().backward()
    plg.freeze(net, genes=[1], layers=["gate", "up"])(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, whole.get_parameter(name).grad), name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_goes_on_through_phases(compiled: bool) -> None:
    """The schedule of LDR: genes train one after the other; an optimizer over all of them stays."""
    net, x = network(), images()
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    optimizer = torch.optim.AdamW(plg.param_groups(net, lr=1e-2, weight_decay=0.1))
    genes = dict(net.gene_bank.named_genes())
    for frozen in ([], [0], [1], [0, 1], []):
        plg.freeze(net, genes=frozen)
        for _ in range(2):
            before = {name: gene.detach().clone() for name, gene in genes.items()}
            run(x).square().mean().backward()
            moving = {name for name, gene in genes.items() if gene.grad is not None}
            assert moving == {name for name in genes if int(name[-1]) not in frozen}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert {name for name, gene in genes.items() if not torch.equal(gene, before[name])} == moving
    torch._dynamo.reset()


def test_an_optimizer_that_holds_gradients_leaves_frozen_genes_alone() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    net(images()).square().sum().backward()
    optimizer.step()
    plg.freeze(net)
    before = [gene.detach().clone() for _, gene in net.gene_bank.named_genes()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, net.gene_bank.named_genes(), strict=True))
