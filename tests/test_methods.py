# SPDX-License-Identifier: Apache-2.0
"""Methods: published values and invariants of TLEG, share-init, expansions by table and rule, start and fit."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from host_samples import OddNet, images, timm_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylearngene as plg
from pylearngene.errors import ArgumentError, GeneFileError, HostError, MethodError, ShapeError
from pylearngene.hosts.backing import expansion_layers
from pylearngene.learngene import Learngene
from pylearngene.methods import TLEG, Expansion, ShareInit, _genes
from pylearngene.networks import auxiliary, extract
from pylearngene.summary import summary


def filler(shape: tuple[int, ...], phase: float) -> Tensor:
    """sin(phase + .7 n), row-major, fp64."""
    return torch.sin(phase + 0.7 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def check(value: Tensor, total: float, norm: float, first: float, last: float) -> None:
    """Compare with published sum, Frobenius norm, first and last element, given to 6 decimals."""
    flat = value.detach().reshape(-1)
    found = [flat.sum().item(), flat.norm().item(), flat[0].item(), flat[-1].item()]
    assert found == pytest.approx([total, norm, first, last], abs=6e-7)


@pytest.fixture
def golden() -> tuple[list[Tensor], Tensor, Tensor]:
    """Genes B and A, the coefficients of block 5 of 12, and x."""
    genes = [filler((4, 6), 2).requires_grad_(), filler((4, 6), 1).requires_grad_()]
    coeffs = torch.tensor(TLEG().coefficients(12)[5], dtype=torch.float64, requires_grad=True)
    return genes, coeffs, filler((3, 6), 5)


def test_golden_weight_and_output_of_tleg(golden: tuple[list[Tensor], Tensor, Tensor]) -> None:
    genes, coeffs, x = golden
    check(plg.functional.expansion_weight(genes, coeffs), -1.078536, 4.510762, 1.259910, -1.091341)
    check(plg.functional.expansion_linear(x, genes, coeffs), 0.023242, 10.030670, -4.389776, 3.157895)


def test_golden_gradients_of_tleg(golden: tuple[list[Tensor], Tensor, Tensor]) -> None:
    genes, coeffs, x = golden
    plg.functional.expansion_linear(x, genes, coeffs).backward(filler((3, 4), 6))
    base, slope = genes
    check(base.grad, 5.560471, 4.300152, -0.210892, -0.199924)
    check(slope.grad, 2.316863, 1.791730, -0.087872, -0.083302)
    assert coeffs.grad[1].item() == pytest.approx(-2.291637, abs=6e-7)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """The weights of every layer path over the blocks, [L, ...]."""
    found: dict[str, list[Tensor]] = {}
    for _, path, layer in expansion_layers(net, net.gene_bank.host):
        found.setdefault(path, []).append(layer.dense_weight().detach())
    return {path: torch.stack(rows) for path, rows in found.items()}


def tleg(depth: int, seed: int = 1) -> nn.Module:
    """A TLEG network in fp64 whose genes, norms included, are all different from zero."""
    net = auxiliary(timm_vit(depth).double(), TLEG(), seed=seed)
    with torch.no_grad():
        for index, (_, gene) in enumerate(net.gene_bank.named_genes()):
            gene.add_(filler(tuple(gene.shape), index), alpha=0.1)
    return net


def test_first_block_is_the_base_and_the_last_stops_short_of_base_plus_slope() -> None:
    net = tleg(12)
    for path, stack in weights(net).items():
        base, slope = net.gene_bank.group(path).weight
        assert torch.equal(stack[0], base)
        torch.testing.assert_close(stack[11], base + 11 / 12 * slope, rtol=0, atol=1e-15)
    assert TLEG().coefficients(12)[-1] == [1.0, 11 / 12]


def test_second_difference_over_the_blocks_is_zero() -> None:
    for stack in weights(tleg(12)).values():
        assert stack.diff(n=2, dim=0).abs().max() < 1e-12
        assert stack.diff(dim=0).abs().max() > 1e-3


def test_block_2l_of_12_is_block_l_of_6() -> None:
    twelve, six = weights(tleg(12)), weights(tleg(6))
    for path in six:
        assert torch.equal(twelve[path][::2], six[path])
    wrong = Expansion(lambda index, depth: [1.0, index / (depth - 1)])
    assert wrong.coefficients(12)[::2] != wrong.coefficients(6)
    assert TLEG().coefficients(12)[::2] == TLEG().coefficients(6)


def test_base_plus_slope_applied_to_x_equals_the_layer(golden: tuple[list[Tensor], Tensor, Tensor]) -> None:
    genes, coeffs, x = golden
    y = plg.functional.expansion_linear(x, genes, coeffs)
    torch.testing.assert_close(y, x @ genes[0].T + 5 / 12 * (x @ genes[1].T), rtol=1e-12, atol=1e-12)


def test_tleg_without_slope_is_share_init() -> None:
    net, shared = tleg(3).eval(), auxiliary(timm_vit(3).double(), ShareInit()).eval()
    with torch.no_grad():
        for name, gene in net.gene_bank.named_genes():
            stem, _, index = name.rpartition(".")
            if index == "1":
                gene.zero_()
            else:
                dict(shared.gene_bank.named_genes())[f"{stem}.0"].copy_(gene)
    outside = {name: value for name, value in net.state_dict().items() if "gene_bank" not in name}
    shared.load_state_dict(outside, strict=False)
    assert torch.equal(net(images(torch.float64)), shared(images(torch.float64)))


def test_methods_are_instances_of_expansion_and_frozen() -> None:
    assert isinstance(TLEG(), Expansion)
    assert isinstance(ShareInit(), Expansion)
    assert (TLEG(), ShareInit()) == (TLEG(), ShareInit())
    assert TLEG() != ShareInit()
    assert (repr(TLEG()), TLEG().num_genes, ShareInit().num_genes) == ("TLEG()", 2, 1)
    with pytest.raises(FrozenInstanceError):
        TLEG().learn = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        TLEG(coeffs=[[1.0]])  # type: ignore[call-arg]


def test_start_of_tleg() -> None:
    model = timm_vit(4, embed_dim=64)
    net = auxiliary(model, TLEG(), seed=3)
    group = net.gene_bank.group("mlp.fc1")
    for gene in group.weight:
        assert gene.std().item() == pytest.approx(0.02, rel=0.05)
        assert gene.abs().max() <= 2
    assert not torch.equal(*group.weight)
    assert all(not gene.any() for gene in group.bias)
    norm = net.gene_bank.group("norm1")
    assert [torch.equal(gene, torch.full((64,), value)) for gene, value in zip(norm.weight, (1.0, 0.0), strict=True)]
    assert torch.equal(norm.weight[0], torch.ones(64))
    assert not norm.weight[1].any()
    assert all(not gene.any() for gene in norm.bias)


def test_start_is_fixed_by_its_seed_and_leaves_the_generator_alone() -> None:
    model = timm_vit()
    state = torch.get_rng_state()
    first, same, other = (
        auxiliary(model, TLEG(), seed=seed).gene_bank.group("attn.qkv").weight[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "coeffs", [torch.eye(3), [[1.0], [1.0], [1.0]], lambda index, depth: [0.25, 0.25, 0.5], [[2.0, 0.0]] * 3]
)
def test_start_of_any_expansion_has_gain_one_in_every_block(coeffs: Any) -> None:
    net = auxiliary(timm_vit(3), Expansion(coeffs))
    torch.testing.assert_close(weights(net)["norm1"], torch.ones(3, 32))


def test_fit_recovers_genes_and_reports_a_residual_of_zero() -> None:
    net = tleg(6)
    plain = plg.networks.bake(net)
    fitted = auxiliary(plain, TLEG(), init="fit")
    for (name, gene), (other, found) in zip(net.gene_bank.named_genes(), fitted.gene_bank.named_genes(), strict=True):
        assert name == other
        torch.testing.assert_close(found, gene, rtol=1e-12, atol=1e-12)
    assert all(layer.residual < 1e-12 for layer in summary(fitted).layers)


def test_fit_is_the_least_squares_solution_and_its_residual_is_reported() -> None:
    model = timm_vit(5).double()
    fitted = auxiliary(model, TLEG(), init="fit")
    table = torch.tensor(TLEG().coefficients(5), dtype=torch.float64)
    for path, kind in fitted.gene_bank.host.layers:
        layers = [block.get_submodule(path) for block in model.blocks]
        target = torch.stack([part.weight.flatten() for part in layers])
        solution = torch.linalg.lstsq(table, target).solution
        torch.testing.assert_close(torch.stack([g.flatten() for g in fitted.gene_bank.group(path).weight]), solution)
        both = torch.cat([target, torch.stack([part.bias for part in layers])], dim=1)
        wanted = (table @ torch.linalg.lstsq(table, both).solution - both).norm() / both.norm()
        found = next(layer for layer in summary(fitted).layers if layer.name == path)
        assert found.residual == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
        assert found.residual > 0.1 or kind == "layer_norm"


class Copies(TorchDispatchMode):
    """The most elements that one operation copied out of a tensor that is not contiguous."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and not args[0].is_contiguous():
            self.most = max(self.most, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(96, 70), (96, 3, 5), (210,), (40, 900)])
def test_a_fit_reads_a_view_the_other_way_round_a_stretch_at_a_time(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_genes, "STRETCH", 700)
    matrix = torch.tensor(TLEG().coefficients(4), dtype=torch.float64)
    wanted = [filler(shape, 2), filler(shape, 1)]
    plain = [sum(c * gene for c, gene in zip(row.tolist(), wanted, strict=True)) for row in matrix]
    targets = [target.permute(*reversed(range(target.dim()))).contiguous() for target in plain]
    targets = [target.permute(*reversed(range(target.dim()))) for target in targets]
    genes = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in wanted]
    with Copies() as copies:
        _genes._solve(matrix, genes, targets)
    assert copies.most <= max(700, math.prod(shape[1:]))
    for gene, value in zip(genes, wanted, strict=True):
        torch.testing.assert_close(gene, value, rtol=1e-12, atol=1e-12)


def test_fit_without_enough_blocks_takes_the_smallest_genes() -> None:
    model = OddNet(1).double()
    fitted = auxiliary(model, TLEG(), init="fit", blocks="body.steps")
    base, slope = fitted.gene_bank.group("gate").weight
    assert torch.equal(base, model.body["steps"][0].gate.weight)
    assert not slope.any()


@pytest.mark.parametrize("seed", ["a", 1.5, None, True, -(2**63) - 1, 2**64])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^seed: expected an int from -2\*\*63 to 2\*\*64 - 1, got {seed!r}"):
        auxiliary(timm_vit(2), TLEG(), seed=seed)


def test_fit_needs_values() -> None:
    with torch.device("meta"):
        model = timm_vit()
    with pytest.raises(ArgumentError, match="model: expected a model with values for init='fit', got one on the meta"):
        auxiliary(model, TLEG(), init="fit")


@pytest.mark.parametrize(
    ("coeffs", "message"),
    [
        ([], "coeffs: expected at least one row and one gene, got"),
        ([[]], "coeffs: expected at least one row and one gene, got"),
        ([[1.0], [1.0, 2.0]], "coeffs: expected 1 numbers in every row, got 2 in row 1"),
        ([[1.0, math.nan]], r"coeffs: expected finite numbers, got \(1.0, nan\) in row 0"),
        ([[math.inf]], "coeffs: expected finite numbers"),
        ("table", r"coeffs: expected a table \[L, K\] of numbers or a rule"),
        (5, r"coeffs: expected a table \[L, K\] of numbers or a rule"),
        (torch.ones(3), r"coeffs: expected a table \[L, K\] of numbers or a rule"),
    ],
)
def test_bad_tables_are_refused(coeffs: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Expansion(coeffs)


def test_a_bad_rule_is_refused_when_it_is_used() -> None:
    with pytest.raises(ArgumentError, match="expected 1 numbers in every row, got 2 in row 1"):
        Expansion(lambda index, depth: [1.0] * (index + 1)).coefficients(2)


def test_learn_is_a_bool() -> None:
    with pytest.raises(ArgumentError, match="learn: expected True or False, got 1"):
        Expansion([[1.0]], learn=1)  # type: ignore[arg-type]


def test_a_table_serves_its_own_depth() -> None:
    with pytest.raises(
        MethodError, match=r"depth: expected 3, the number of rows of the method's table, got 4.*method=Exp"
    ):
        auxiliary(timm_vit(4), Expansion(torch.eye(3)))


def test_settings_come_back() -> None:
    for method in (TLEG(), ShareInit(), Expansion([[1.0, 0.5]]), Expansion([[1.0], [2.0]], learn=True)):
        assert type(method).from_config(method.to_config()) == method


def test_a_rule_is_stored_as_the_table_of_its_depth() -> None:
    method = Expansion(lambda index, depth: [1.0, index / depth])
    with pytest.raises(
        MethodError, match=r"coeffs: expected a table, or a rule bound to a network's depth by plg.extract"
    ):
        method.to_config()
    assert method.bound(2).to_config() == {"coeffs": [[1.0, 0.0], [1.0, 0.5]], "learn": False}
    assert method.bound(2) == method


def test_damaged_settings_are_refused() -> None:
    for method in (TLEG, ShareInit):
        with pytest.raises(GeneFileError, match=f"expected no settings for {method.name}, got .'x'."):
            method.from_config({"x": 1})
    with pytest.raises(GeneFileError, match=r"expected the settings coeffs and learn, got .'coeffs'."):
        Expansion.from_config({"coeffs": [[1.0]]})
    with pytest.raises(GeneFileError, match="method: coeffs: expected at least one row"):
        Expansion.from_config({"coeffs": [], "learn": False})


def learned(tmp_path: Any) -> tuple[nn.Module, Learngene]:
    """A network with learned coefficients that differ from layer to layer, and its learngene read from disk."""
    net = auxiliary(timm_vit(3), Expansion(lambda index, depth: [1.0, index / depth], learn=True))
    for index, _, layer in expansion_layers(net, net.gene_bank.host):
        with torch.no_grad():
            layer.coeffs.add_(filler((2,), index + len(layer.name)).float(), alpha=0.1)
    extract(net).save_pretrained(tmp_path / "gene")
    return net, Learngene.from_pretrained(tmp_path / "gene")


def test_learned_coefficients_are_parameters_and_come_back(tmp_path: Any) -> None:
    net, lg = learned(tmp_path)
    net(images()).square().sum().backward()
    assert all(layer.coeffs.grad is not None for _, _, layer in expansion_layers(net, net.gene_bank.host))
    assert lg.coeffs["attn.qkv"].shape == (3, 2)
    assert torch.equal(lg.descend().eval()(images()), net.eval()(images()))


def test_learned_coefficients_serve_their_own_depth(tmp_path: Any) -> None:
    net, lg = learned(tmp_path)
    message = "depth: expected 3, for which the coefficients were learned, got 4; .*method=Expansion"
    with pytest.raises(MethodError, match=message):
        lg.descend(depth=4)
    with pytest.raises(MethodError, match=message):
        plg.networks.set_depth(net, 4)
    fixed = Learngene.from_pretrained(tmp_path / "gene", method=Expansion(lambda index, depth: [1.0, index / depth]))
    assert len(fixed.descend(depth=4).blocks) == 4


def test_wrong_tables_of_learned_coefficients_are_refused(tmp_path: Any) -> None:
    _, lg = learned(tmp_path)
    lg.coeffs["attn.qkv"] = torch.ones(2, 2)
    with pytest.raises(
        ShapeError, match=r"coeffs\['attn.qkv'\]: expected shape \(3, 2\) \(depth, genes\), got \(2, 2\)"
    ):
        lg.descend()
    del lg.coeffs["attn.qkv"]
    with pytest.raises(ArgumentError, match="coeffs: expected one table for each of"):
        lg.descend()


def test_genes_that_do_not_fit_method_and_host_are_refused() -> None:
    lg = extract(auxiliary(timm_vit(), TLEG()))
    gene = lg.genes.pop("norm1.bias.1")
    lg.genes["norm1.bias.2"] = gene
    with pytest.raises(ArgumentError, match=r"missing \['norm1.bias.1'\] and unexpected \['norm1.bias.2'\]"):
        lg.descend()
    del lg.genes["norm1.bias.2"]
    lg.genes["norm1.bias.1"] = torch.ones(5)
    with pytest.raises(ShapeError, match=r"genes\['norm1.bias.1'\]: expected shape \(32,\), got \(5,\)"):
        lg.descend()
    lg.genes.clear()
    with pytest.raises(ArgumentError, match="genes: expected the keys of method and host, got missing"):
        lg.descend()


def test_tensors_that_do_not_fit_the_host_are_refused() -> None:
    lg = extract(auxiliary(timm_vit(), TLEG()))
    lg.tensors["extra"] = lg.tensors.pop("head.bias")
    with pytest.raises(HostError, match=r"none that fit for \{'head.bias': \(10,\)\} and unexpected \['extra'\]"):
        lg.descend()
