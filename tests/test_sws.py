# SPDX-License-Identifier: Apache-2.0
"""SWS: stage maps, one gene per stage and its gradient, and layers that read only the genes they use."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from host_samples import images, timm_vit
from test_methods import check, filler, weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import pylearngene as plg
from pylearngene.errors import ArgumentError, GeneFileError
from pylearngene.learngene import Learngene
from pylearngene.methods import LDR, SWS, TLEG, Expansion, ShareInit
from pylearngene.networks import auxiliary, bake, extract, set_depth
from pylearngene.nn import ExpansionLinear, GeneBank
from pylearngene.nn._layer import used_genes

OFFICIAL = (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)


def sws(depth: int, method: SWS) -> nn.Module:
    """An SWS network in fp64 whose genes are all different."""
    net = auxiliary(timm_vit(depth).double(), method)
    with torch.no_grad():
        for index, (_, gene) in enumerate(net.gene_bank.named_genes()):
            gene.add_(filler(tuple(gene.shape), index), alpha=0.1)
    return net


def test_stage_maps_of_the_paper() -> None:
    assert SWS().num_genes == 5
    assert SWS().stage_map(16) == (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    assert SWS().stage_map(12) == OFFICIAL
    assert SWS(stages=[3, 3, 4, 3, 3]) == SWS()
    for depth in (16, 12):
        one_hot = torch.tensor(SWS().coefficients(depth))
        assert one_hot.argmax(1).tolist() == list(SWS().stage_map(depth))
        assert (one_hot.sum(1) == 1).all()
        assert ((one_hot == 0) | (one_hot == 1)).all()


def test_stage_map_of_other_depths_is_the_block_at_the_same_position() -> None:
    method = SWS(stages=(1, 2, 1))
    assert method.stage_map(4) == (0, 1, 1, 2)
    assert method.stage_map(8) == (0, 0, 1, 1, 1, 1, 2, 2)
    assert method.stage_map(2) == (0, 1)
    assert method.stage_map(1) == (0,)
    assert SWS(maps=()).stage_map(12) == (0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4)
    for depth in (3, 6, 9):
        assert method.stage_map(2 * depth)[::2] == method.stage_map(depth)


def test_the_largest_settings_are_read_once_and_never_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    method = SWS(stages=(5_000, 4_999), maps=[(0, 1) * 5_000])
    assert method.stage_map(10_000) == (0, 1) * 5_000
    assert method.stage_map(9_999) == (0,) * 5_000 + (1,) * 4_999
    tracemalloc.start()
    try:
        assert method.stage_map(2) == (0, 0)
        assert tracemalloc.get_traced_memory()[1] < 4_000
    finally:
        tracemalloc.stop()
    asked, whole = [], SWS.stage_map
    monkeypatch.setattr(SWS, "stage_map", lambda self, depth: asked.append(depth) or whole(self, depth))
    assert method.coefficients(100) == [[1.0, 0.0]] * 51 + [[0.0, 1.0]] * 49
    assert asked == [100]
    assert list(method.row(50, 100)) == [1.0, 0.0]
    assert list(method.row(51, 100)) == [0.0, 1.0]


@pytest.mark.parametrize("depth", [0, -1, 2.5, True])
def test_a_depth_is_a_number_of_blocks(depth: Any) -> None:
    for asked in (SWS().stage_map, SWS().coefficients):
        with pytest.raises(ArgumentError, match=f"^depth: expected an int >= 1, got {depth}"):
            asked(depth)


def test_a_given_map_wins_at_its_depth_only() -> None:
    method = SWS(stages=(1, 1), maps=[[1, 0, 1]])
    assert method.stage_map(3) == (1, 0, 1)
    assert method.stage_map(4) == (0, 0, 1, 1)
    assert SWS(stages=(2, 2)).maps == ()


def test_golden_weight_of_a_stage() -> None:
    genes = [filler((4, 6), 2), filler((4, 6), 1)]
    coeffs = torch.tensor(SWS(stages=(2, 1)).coefficients(3), dtype=torch.float64)
    stack = plg.functional.expansion_weight(genes, coeffs)
    for layer, gene in zip(stack, (genes[0], genes[0], genes[1]), strict=True):
        assert torch.equal(layer, gene)
    # TLEG's published product at its first block, where the slope has coefficient 0
    y = plg.functional.expansion_linear(filler((3, 6), 5), genes, coeffs[0])
    torch.testing.assert_close(y, filler((3, 6), 5) @ genes[0].T, rtol=0, atol=1e-14)
    tleg = plg.functional.expansion_weight(genes, torch.tensor(TLEG().coefficients(12)[5], dtype=torch.float64))
    check(tleg, -1.078536, 4.510762, 1.259910, -1.091341)


def test_blocks_of_a_stage_share_storage_in_the_network_and_not_in_plain_descendants() -> None:
    net = sws(4, SWS(stages=(3, 1)))
    first, second, last = (net.blocks[index].mlp.fc1 for index in (0, 1, 3))
    group = net.gene_bank.group("mlp.fc1")
    for layer, gene in ((first, 0), (second, 0), (last, 1)):
        assert layer.bank is net.gene_bank
        assert torch.equal(layer.dense_weight(), group.weight[gene])
        with torch.no_grad():
            group.weight[gene].add_(1)
        assert torch.equal(layer.dense_weight(), group.weight[gene])
    plain = extract(net).descend(depth=4, backed=False)
    copies = [block.mlp.fc1.weight for block in plain.blocks]
    assert torch.equal(copies[0], copies[1])
    assert len({weight.data_ptr() for weight in copies}) == 4
    assert len({weight.untyped_storage().data_ptr() for weight in copies}) == 4


def test_gradient_of_a_gene_is_the_sum_over_untied_copies() -> None:
    net = sws(5, SWS(stages=(2, 3)))
    plain = bake(net)
    for model in (net, plain):
        model.eval()(images(torch.float64)).square().sum().backward()
    for path in ("attn.qkv", "norm1", "mlp.fc2"):
        copies = torch.stack([block.get_submodule(path).weight.grad for block in plain.blocks])
        found = [gene.grad for gene in net.gene_bank.group(path).weight]
        torch.testing.assert_close(found[0], copies[:2].sum(0), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found[1], copies[2:].sum(0), rtol=1e-9, atol=1e-10)


def test_the_function_is_that_of_the_table_and_of_plain_layers() -> None:
    net = sws(6, SWS(stages=(1, 3, 2)))
    y = net.eval()(images(torch.float64))
    torch.testing.assert_close(bake(net)(images(torch.float64)), y, rtol=1e-12, atol=1e-12)
    table = auxiliary(timm_vit(6).double(), Expansion(SWS(stages=(1, 3, 2)).coefficients(6), learn=True))
    missing, unexpected = table.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("coeffs") for name in missing)
    torch.testing.assert_close(table.eval()(images(torch.float64)), y, rtol=1e-13, atol=1e-13)


def test_one_stage_is_layer_sharing() -> None:
    assert SWS(stages=(7,)).coefficients(3) == ShareInit().coefficients(3)


def test_start_of_genes_that_the_network_leaves_out() -> None:
    net = auxiliary(timm_vit(2), SWS(stages=(1, 1, 1, 1)))
    assert net.gene_bank.method.stage_map(2) == (0, 2)
    assert all(torch.equal(gene, torch.ones(32)) for gene in net.gene_bank.group("norm1").weight)
    torch.testing.assert_close(weights(set_depth(net, 4))["norm2"], torch.ones(4, 32), rtol=0, atol=0)


def test_fit_is_the_mean_of_a_stage() -> None:
    model = timm_vit(4).double()
    fitted = auxiliary(model, SWS(stages=(3, 1)), init="fit")
    first, last = fitted.gene_bank.group("attn.proj").weight
    mean = torch.stack([block.attn.proj.weight for block in model.blocks[:3]]).mean(0)
    torch.testing.assert_close(first, mean, rtol=1e-13, atol=1e-15)
    assert torch.equal(last, model.blocks[3].attn.proj.weight)


def test_settings_come_back(tmp_path: Path) -> None:
    method = SWS(stages=(1, 2), maps=((0, 1),))
    assert SWS.from_config({"stages": [1, 2], "maps": [[0, 1]]}) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert hash(method) == hash(SWS((1, 2), [[0, 1]]))
    assert repr(SWS((2,))) == "SWS(stages=(2,), maps=())"
    net = sws(3, method).eval()
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    assert lg.method == method
    assert torch.equal(lg.descend().eval()(images(torch.float64)), net(images(torch.float64)))
    assert len(lg.descend(depth=2, backed=False).blocks) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ()}, r"stages: expected one or more ints >= 1, got \(\)"),
        ({"stages": (1, 0)}, r"stages: expected one or more ints >= 1, got \(1, 0\)"),
        ({"stages": (1, True)}, "stages: expected one or more ints >= 1"),
        ({"stages": (1.5,)}, "stages: expected one or more ints >= 1"),
        ({"stages": 4}, "stages: expected one or more ints >= 1, got 4"),
        ({"stages": "33"}, "stages: expected one or more ints >= 1, got '33'"),
        ({"stages": (1,) * 65}, "stages: expected at most 64 stages, got 65"),
        ({"stages": b"\x03\x03"}, r"stages: expected one or more ints >= 1, got b'\\x03\\x03'"),
        ({"stages": (10_000, 1)}, "stages: expected at most 10000 blocks in all, got 10001"),
        ({"maps": ((0,) * 10_001,)}, r"maps\[0\]: expected at most 10000 blocks, got 10001"),
        ({"maps": 5}, "maps: expected a sequence of stage maps or None, got 5"),
        ({"maps": ((0, 5),)}, r"maps\[0\]: expected one or more stages from 0 to 4, got \(0, 5\)"),
        ({"maps": ((0,), (-1, 0))}, r"maps\[1\]: expected one or more stages from 0 to 4"),
        ({"maps": ((0,), (1,))}, r"maps\[1\]: expected a depth without a map, got 1 blocks, which has one"),
        ({"maps": ((0,) * 16,)}, r"maps\[0\]: expected a depth without a map, got 16 blocks, which has one"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        SWS(**settings)
    with pytest.raises(GeneFileError, match=f"^method: {message}"):
        SWS.from_config({**SWS().to_config(), **settings})


def test_which_genes_a_layer_reads() -> None:
    assert used_genes([1.0, 0.5]) is None
    assert used_genes([0.0]) is None
    assert used_genes([0.0, 0.0]) == slice(0, 1, 1)
    assert used_genes([1.0, 0.0]) == slice(0, 1, 1)
    assert used_genes([0.0, -0.0, 3.0]) == slice(2, 3, 1)
    assert used_genes([1.0, 0.0, -1.0, 0.0, 1.0]) == slice(0, 5, 2)
    assert used_genes([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]) == slice(1, 5, 1)


def bank_and_layers(tables: list[list[float]]) -> tuple[GeneBank, list[ExpansionLinear]]:
    bank = GeneBank()
    layers = [ExpansionLinear(6, 6, bank=bank, name="fc", coeffs=row, dtype=torch.float64) for row in tables]
    return bank, layers


class Chain(nn.Module):
    """Layers of one group, one after another, on a bank of their own."""

    def __init__(self, tables: list[list[float]]) -> None:
        super().__init__()
        bank, layers = bank_and_layers(tables)
        self.layers = nn.ModuleList(layers)
        bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("regime", ["rows", "panel"])
def test_a_gene_that_is_not_read_does_not_show(regime: str) -> None:
    bank, (layer,) = bank_and_layers([[0.0, 2.0, 0.0]])
    group, x = bank.group("fc"), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for k in (0, 2):
            group.weight[k].fill_(torch.nan)
            group.bias[k].fill_(torch.nan)
    plg.set_regime(regime)
    try:
        y = layer(x)
        torch.testing.assert_close(y, x @ (2 * group.weight[1]).T + 2 * group.bias[1])
        y.sum().backward()
    finally:
        plg.set_regime("auto")
    assert x.grad.isfinite().all()
    assert torch.equal(layer.dense_weight(), 2 * group.weight[1])
    torch.testing.assert_close(group.bias[1].grad, torch.full((6,), 10.0, dtype=torch.float64))
    for k in (0, 2):  # nothing reads them: zeros, not None, so that optimizers and DDP see every gene
        assert torch.equal(group.weight[k].grad, torch.zeros(6, 6, dtype=torch.float64))
        assert torch.equal(group.bias[k].grad, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 2)])
def test_gradients_of_partly_read_genes_against_plain_autograd(frozen: tuple[int, ...]) -> None:
    tables = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.5], [1.0, 0.0, -1.0], [0.3, 0.2, 0.1]]
    bank, layers = bank_and_layers(tables)
    group = bank.group("fc")
    for k in frozen:
        group.weight[k].requires_grad_(False)
        group.bias[k].requires_grad_(False)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    out = x
    for layer in layers:
        out = torch.tanh(layer(out))
    (out * y).sum().backward()
    leaves = [gene.detach().clone().requires_grad_() for gene in group.tensors()]
    want = x
    for row in tables:
        weight = sum(c * gene for c, gene in zip(row, leaves[:3], strict=True))
        want = torch.tanh(want @ weight.T + sum(c * gene for c, gene in zip(row, leaves[3:], strict=True)))
    (want * y).sum().backward()
    for index, (gene, leaf) in enumerate(zip(group.tensors(), leaves, strict=True)):
        if index % 3 in frozen:
            assert gene.grad is None
        else:
            torch.testing.assert_close(gene.grad, leaf.grad, rtol=1e-12, atol=1e-12)


def test_a_frozen_gene_that_is_read_alone_keeps_no_activation() -> None:
    bank, (layer,) = bank_and_layers([[1.0, 0.0]])
    bank.group("fc").weight[0].requires_grad_(False)
    bank.group("fc").bias[0].requires_grad_(False)
    kept: list[Tensor] = []
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
    y.sum().backward()
    assert torch.equal(bank.group("fc").weight[1].grad, torch.zeros(6, 6, dtype=torch.float64))
    assert bank.group("fc").weight[0].grad is None


def test_new_coefficients_change_what_is_read() -> None:
    _, (layer,) = bank_and_layers([[1.0, 0.0]])
    x = torch.randn(2, 6, dtype=torch.float64)
    first = layer(x)
    layer.set_coeffs([1.0, 1.0])
    assert not torch.equal(layer(x), first)
    layer.set_coeffs([1.0, 0.0])
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("method", [SWS(stages=(1, 1)), LDR(3), TLEG()])
def test_compiled_networks_read_the_same_genes(method: Any) -> None:
    net, x = Chain(method.coefficients(3)), torch.randn(3, 6, dtype=torch.float64)
    eager = net(x)
    eager.square().sum().backward()
    grads = {name: gene.grad.clone() for name, gene in net.gene_bank.named_genes()}
    net.zero_grad()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-13, atol=1e-13)
    for name, gene in net.gene_bank.named_genes():
        torch.testing.assert_close(gene.grad, grads[name], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_layers_compiled_alone_share_one_graph() -> None:
    net, counter = Chain(SWS((1,) * 12).coefficients(12)), CompileCounter()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = net(x)
    for layer in net.layers:
        layer.compile(backend=counter)
    torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_network_does_not_read_unused_genes_without_gradients_either() -> None:
    net, x = Chain([[1.0, 0.0], [1.0, 0.0]]), torch.randn(3, 6, dtype=torch.float64)
    for gene in (net.gene_bank.group("fc").weight[1], net.gene_bank.group("fc").bias[1]):
        gene.fill_(torch.nan)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-13, atol=1e-13)
    assert net(x).isfinite().all()
