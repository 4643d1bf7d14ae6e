# SPDX-License-Identifier: Apache-2.0
"""LDR: published values, bases against NumPy's and closed forms, phases of training, first genes, the fit."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_samples import images, timm_vit
from test_methods import check, filler, weights
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.errors import ArgumentError, GeneFileError, MethodError
from pylearngene.learngene import Learngene
from pylearngene.methods import LDR, TLEG, Expansion, ShareInit
from pylearngene.networks import auxiliary, bake, extract, set_depth
from pylearngene.summary import summary

BASES = ("chebyshev", "taylor", "fourier", "legendre")


def table(method: LDR, depth: int) -> np.ndarray:
    return np.array(method.coefficients(depth))


def ldr(depth: int, method: LDR) -> nn.Module:
    """An LDR network in fp64 whose genes, norms included, are all different from zero."""
    net = auxiliary(timm_vit(depth).double(), method)
    with torch.no_grad():
        for index, (_, gene) in enumerate(net.gene_bank.named_genes()):
            gene.add_(filler(tuple(gene.shape), index), alpha=0.1)
    return net


def genes(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.gene_bank.named_genes())


def test_golden_weight() -> None:
    stack = filler((3, 4, 6), 1)
    coeffs = torch.tensor(LDR(3, order_offset=1).coefficients(6)[3], dtype=torch.float64)
    assert coeffs.tolist() == [0.5, -0.5, -1.0]
    check(plg.functional.expansion_weight(stack, coeffs), 2.058791, 4.740622, 0.896805, -1.218583)


@pytest.mark.parametrize("depth", [1, 2, 7, 12, 40])
@pytest.mark.parametrize("offset", [0, 1])
def test_chebyshev_is_cosine_of_n_arccos(depth: int, offset: int) -> None:
    x = np.arange(depth) / depth
    found = table(LDR(12, order_offset=offset), depth)
    np.testing.assert_allclose(found, np.cos((np.arange(12) + offset) * np.arccos(x)[:, None]), rtol=0, atol=1e-13)
    assert (np.abs(found) <= 1).all()


@pytest.mark.parametrize("offset", [0, 1])
def test_bases_against_numpy(offset: int) -> None:
    x, orders = np.arange(10) / 10, range(offset, offset + 9)
    of = {
        "chebyshev": np.polynomial.chebyshev.chebval,
        "taylor": np.polynomial.polynomial.polyval,
        "legendre": np.polynomial.legendre.legval,
    }
    for basis, value in of.items():
        wanted = np.stack([value(x, np.eye(n + 1)[n]) for n in orders], axis=1)
        np.testing.assert_allclose(table(LDR(9, basis, offset), 10), wanted, rtol=0, atol=1e-14)
    waves = [np.ones(10)]
    for m in range(1, 6):
        waves += [np.cos(2 * np.pi * m * x), np.sin(2 * np.pi * m * x)]
    wanted = np.stack(waves[offset : offset + 9], axis=1)
    np.testing.assert_allclose(table(LDR(9, "fourier", offset), 10), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("depth", [3, 4, 8, 12])
def test_fourier_genes_are_orthogonal_over_the_blocks(depth: int) -> None:
    found = table(LDR(depth, "fourier"), depth)
    gram = found.T @ found
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), rtol=0, atol=1e-14)
    assert np.linalg.matrix_rank(found) == depth
    quarters = table(LDR(12, "fourier"), 4)
    assert set(quarters.flatten()) == {0.0, 1.0, -1.0}  # no 6e-17 in the place of 0


def test_rank_and_condition_of_twelve_genes_over_twelve_blocks() -> None:
    literal, shifted = table(LDR(12, order_offset=1), 12), table(LDR(12), 12)
    assert np.linalg.matrix_rank(literal) == np.linalg.matrix_rank(shifted) == 12
    assert np.linalg.cond(literal) == pytest.approx(5.2e7, rel=0.02)
    assert np.linalg.cond(shifted) == pytest.approx(1.6e9, rel=0.02)


def test_one_gene_is_layer_sharing_and_two_are_tleg() -> None:
    assert LDR(1).coefficients(5) == ShareInit().coefficients(5)
    for basis in ("chebyshev", "taylor", "legendre"):
        assert LDR(2, basis).coefficients(12) == TLEG().coefficients(12)
    net, other = ldr(5, LDR(2)), auxiliary(timm_vit(5).double(), TLEG())
    other.load_state_dict(net.state_dict())
    mine, tleg = weights(net), weights(other)
    for path, stack in mine.items():
        assert torch.equal(stack, tleg[path])
    assert torch.equal(net.eval()(images(torch.float64)), other.eval()(images(torch.float64)))


def test_block_2l_of_12_is_block_l_of_6_and_third_differences_of_three_genes_vanish() -> None:
    for basis in BASES:
        assert LDR(5, basis).coefficients(12)[::2] == LDR(5, basis).coefficients(6)
    for stack in weights(ldr(12, LDR(3))).values():
        assert stack.diff(n=3, dim=0).abs().max() < 1e-12
        assert stack.diff(n=2, dim=0).abs().max() > 1e-4


def test_the_literal_first_block_of_one_gene_is_zero() -> None:
    assert LDR(1, order_offset=1).coefficients(3)[0] == [0.0]
    net = ldr(3, LDR(1, order_offset=1))
    assert not weights(net)["attn.qkv"][0].any()
    net(images(torch.float64)).sum().backward()
    assert all(gene.grad.abs().max() > 0 for name, gene in genes(net).items() if "attn.proj" in name)


def test_gradients_are_sums_over_the_blocks() -> None:
    net = ldr(4, LDR(3))
    plain = bake(net)
    for model in (net, plain):
        model.eval()(images(torch.float64)).square().sum().backward()
    coeffs = torch.tensor(LDR(3).coefficients(4), dtype=torch.float64)
    for path in ("attn.qkv", "norm2", "mlp.fc1"):
        dw = torch.stack([block.get_submodule(path).weight.grad for block in plain.blocks])
        for k, gene in enumerate(net.gene_bank.group(path).weight):
            wanted = torch.einsum("l,l...->...", coeffs[:, k], dw)
            torch.testing.assert_close(gene.grad, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("basis", BASES)
def test_start_keeps_gains_at_one(basis: str) -> None:
    net = auxiliary(timm_vit(6), LDR(4, basis))
    gains = [gene.unique().tolist() for gene in net.gene_bank.group("norm1").weight]
    assert gains == [[1.0], [0.0], [0.0], [0.0]]
    for depth in (6, 11):
        assert torch.equal(weights(set_depth(net, depth))["norm1"], torch.ones(depth, 32))
    shallow = auxiliary(timm_vit(2), LDR(4, basis))  # fewer blocks than genes: gains must hold at other depths too
    assert torch.equal(weights(set_depth(shallow, 9))["norm2"], torch.ones(9, 32))
    literal = auxiliary(timm_vit(6), LDR(4, order_offset=1))
    torch.testing.assert_close(weights(literal)["norm1"], torch.ones(6, 32), rtol=0, atol=0.01)
    assert max(gene.abs().max() for gene in literal.gene_bank.group("norm1").weight) < 2


def test_low_precision_reads_the_genes_themselves() -> None:
    assert auxiliary(timm_vit(2), LDR(2)).gene_bank.compute_dtype == "param"
    assert extract(auxiliary(timm_vit(2), LDR(2))).descend(depth=3).gene_bank.compute_dtype == "param"
    assert auxiliary(timm_vit(2), TLEG()).gene_bank.compute_dtype == "auto"


def test_growing_leaves_the_function_and_freezes_earlier_genes() -> None:
    net = ldr(4, LDR(1)).eval()
    before, y = {name: gene.detach().clone() for name, gene in genes(net).items()}, net(images(torch.float64))
    optimizer = torch.optim.AdamW(net.gene_bank.parameters(), lr=0.1, weight_decay=0.5)
    y.sum().backward()
    assert LDR.grow(net, 2) is net
    assert torch.equal(net(images(torch.float64)), y)
    net(images(torch.float64)).square().sum().backward()
    optimizer.step()  # made before: it holds the frozen genes, which have no gradient left
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    optimizer.step()
    for name, gene in genes(net).items():
        frozen = name.endswith(".0")
        assert gene.requires_grad is not frozen
        assert (gene.grad is None) is frozen
        if frozen:
            assert torch.equal(gene, before[name])
        else:
            assert gene.abs().max() > 0
    assert not torch.equal(net(images(torch.float64)), y)
    assert {name.rpartition(".")[2] for name in genes(net)} == {"0", "1"}


def test_growing_without_freezing_and_with_a_start() -> None:
    net = LDR.grow(ldr(3, LDR(1)), 3, freeze=False, init="method", seed=4)
    same = LDR.grow(ldr(3, LDR(1)), 3, freeze=False, init="method", seed=4)
    assert all(gene.requires_grad for gene in genes(net).values())
    for name, gene in genes(net).items():
        assert torch.equal(gene, genes(same)[name])
        part, _, index = name.rpartition(".")
        if index != "0":
            assert bool(gene.any()) is (part.endswith("weight") and "norm" not in part)
    assert genes(net)["mlp.fc1.weight.2"].std().item() == pytest.approx(0.02, rel=0.05)


def test_a_grown_network_is_extracted_saved_resized_and_copied(tmp_path: Path) -> None:
    net = LDR.grow(ldr(4, LDR(1, "legendre")), 3).eval()
    with torch.no_grad():
        for index, gene in enumerate(genes(net).values()):
            gene.copy_(filler(tuple(gene.shape), index))
    y = net(images(torch.float64))
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    assert lg.method == LDR(3, "legendre")
    assert torch.equal(lg.descend().eval()(images(torch.float64)), y)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.gene_bank.method == net.gene_bank.method
        assert torch.equal(twin(images(torch.float64)), y)
    fresh = ldr(4, LDR(3, "legendre"))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(images(torch.float64)), y)
    assert torch.equal(set_depth(set_depth(net, 7), 4)(images(torch.float64)), y)


@pytest.mark.parametrize("depth", [2, 9])
def test_the_first_genes_serve_alone_at_any_depth(depth: int) -> None:
    lg = extract(ldr(4, LDR(4)))
    fewer = lg.first_genes(2)
    assert fewer.method == LDR(2)
    assert set(fewer.genes) == {name for name in lg.genes if name[-1] in "01"}
    silent = lg.descend(depth=depth).eval()
    with torch.no_grad():
        for name, gene in genes(silent).items():
            if name[-1] in "23":
                gene.zero_()
    assert torch.equal(fewer.descend(depth=depth).eval()(images(torch.float64)), silent(images(torch.float64)))
    assert fewer.descend(depth=depth, backed=False).state_dict().keys() == timm_vit(depth).state_dict().keys()
    assert len(lg.genes) == 2 * len(fewer.genes)


def test_first_genes_keep_a_host_of_ones_own() -> None:
    model = nn.Module()
    model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
    net = extract(auxiliary(model, LDR(3))).first_genes(1).descend(depth=2)
    assert len(net.body) == 2


@pytest.mark.parametrize(("count", "tolerance"), [(1, 1e-15), (4, 1e-13), (6, 1e-11), (12, 1e-5)])
@pytest.mark.parametrize("offset", [0, 1])
def test_fit_gives_the_genes_back(count: int, tolerance: float, offset: int) -> None:
    net = ldr(12, LDR(count, order_offset=offset))
    fitted = auxiliary(bake(net), LDR(count, order_offset=offset), init="fit")
    for name, gene in genes(fitted).items():
        if offset == 0 or count > 1:
            torch.testing.assert_close(gene, genes(net)[name], rtol=0, atol=tolerance)
    assert all(layer.residual < 1e-13 for layer in summary(fitted).layers)


def test_an_ill_conditioned_fit_in_float32_is_remarked_on_and_stays_bounded() -> None:
    model = timm_vit(12)
    fitted = auxiliary(model, LDR(12), init="fit")
    assert "ill-conditioned (1.6e+09): fitted genes are large and cancel" in str(summary(fitted))
    assert "what float32 cannot hold" in str(summary(fitted))
    assert all(layer.residual < 0.7 for layer in summary(fitted).layers)
    assert "ill-conditioned" not in str(summary(auxiliary(model, LDR(6), init="fit")))
    exact = auxiliary(copy.deepcopy(model).double(), LDR(12), init="fit")
    assert "ill-conditioned" not in str(summary(exact))
    assert all(layer.residual < 1e-6 for layer in summary(exact).layers)


def test_settings_come_back_and_methods_are_values() -> None:
    method = LDR(7, "taylor", 1)
    assert method.to_config() == {"num_genes": 7, "basis": "taylor", "order_offset": 1}
    assert LDR.from_config(method.to_config()) == method
    assert len({LDR(4), LDR(), LDR(4, "chebyshev", 0)}) == 1
    assert LDR(4) != LDR(5)
    assert repr(LDR()) == "LDR(num_genes=4, basis='chebyshev', order_offset=0)"
    assert pickle.loads(pickle.dumps(method)) == method
    assert isinstance(method, Expansion)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_genes": 0}, "num_genes: expected an int >= 1, got 0"),
        ({"num_genes": 2.0}, "num_genes: expected an int >= 1, got 2.0"),
        ({"num_genes": True}, "num_genes: expected an int >= 1, got True"),
        ({"num_genes": 65}, "num_genes: expected at most 64, got 65"),
        ({"basis": "wavelet"}, "basis: expected one of 'chebyshev', 'taylor', 'fourier', 'legendre', got 'wavelet'"),
        ({"basis": ["taylor"]}, "basis: expected one of"),
        ({"order_offset": 2}, "order_offset: expected 0 or 1, got 2"),
        ({"order_offset": True}, "order_offset: expected 0 or 1, got True"),
        ({"order_offset": 1.0}, "order_offset: expected 0 or 1, got 1.0"),
        ({"order_offset": "1"}, "order_offset: expected 0 or 1, got '1'"),
        ({"order_offset": [0]}, r"order_offset: expected 0 or 1, got \[0\]"),
        ({"basis": np.array(["taylor", "x"])}, "basis: expected one of"),
        ({"order_offset": None}, "order_offset: expected 0 or 1, got None"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        LDR(**settings)
    with pytest.raises(GeneFileError, match=f"^method: {message}"):
        LDR.from_config({**LDR().to_config(), **settings})


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_other_libraries_are_stored_as_ints(number: Any, tmp_path: Path) -> None:
    method = LDR(number(2), order_offset=number(1), basis="taylor")
    assert [type(value) for value in method.to_config().values()] == [int, str, int]
    assert (method, repr(method)) == (LDR(2, "taylor", 1), "LDR(num_genes=2, basis='taylor', order_offset=1)")
    net = LDR.grow(auxiliary(timm_vit(2), method), number(3))
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    assert lg.method == LDR(3, "taylor", 1)
    assert extract(lg.descend()).first_genes(number(1)).method.to_config() == LDR(1, "taylor", 1).to_config()


def test_missing_and_unknown_settings_are_refused() -> None:
    for config in ({}, {"num_genes": 2}, {**LDR().to_config(), "learn": True}):
        with pytest.raises(GeneFileError, match="expected the settings num_genes, basis, order_offset for ldr, got"):
            LDR.from_config(config)


def test_bad_growth_is_refused_and_changes_nothing() -> None:
    net = ldr(2, LDR(2))
    keys = list(net.state_dict())
    for count, message in ((1, "expected at least the present 2, got 1"), (65, "expected at most 64, got 65")):
        with pytest.raises(ArgumentError, match=f"^num_genes: {message}"):
            LDR.grow(net, count)
    with pytest.raises(ArgumentError, match="num_genes: expected an int >= 1, got '3'"):
        LDR.grow(net, "3")  # type: ignore[arg-type]
    for freeze in ("no", 0, None):
        with pytest.raises(ArgumentError, match=f"^freeze: expected True or False, got {freeze!r}"):
            LDR.grow(net, 3, freeze=freeze)  # type: ignore[arg-type]
    for seed in ("a", 1.5, None, True, -(2**63) - 1, 2**64):
        with pytest.raises(ArgumentError, match=rf"^seed: expected an int from -2\*\*63 to 2\*\*64 - 1, got {seed!r}"):
            LDR.grow(net, 3, init="method", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="init: expected one of 'zeros', 'method', got 'fit'"):
        LDR.grow(net, 3, init="fit")
    with pytest.raises(MethodError, match=r"^net: expected a network that follows LDR, got one that follows TLEG\(\)"):
        LDR.grow(auxiliary(timm_vit(2), TLEG()), 3)
    with pytest.raises(MethodError, match="net: expected a gene-backed network"):
        LDR.grow(timm_vit(2), 3)
    assert list(net.state_dict()) == keys
    assert all(gene.requires_grad for gene in genes(net).values())
    assert LDR.grow(net, 2, freeze=False).gene_bank.method == LDR(2)


def test_bad_numbers_of_first_genes_are_refused() -> None:
    lg = extract(ldr(2, LDR(2)))
    for count, message in ((0, "expected an int >= 1, got 0"), (3, "expected at most the present 2, got 3")):
        with pytest.raises(ArgumentError, match=f"^num_genes: {message}"):
            lg.first_genes(count)
    lg.genes["foo"] = torch.ones(2)
    with pytest.raises(ArgumentError, match=r"^genes: expected keys that end in the number of a gene, got 'foo'"):
        lg.first_genes(1)
    message = "num_genes: expected the 2 genes of TLEG, got 1; LDR serves with any number of its first genes"
    with pytest.raises(MethodError, match=message):
        extract(auxiliary(timm_vit(2), TLEG())).first_genes(1)


def test_groups_of_a_bank_grow_only() -> None:
    bank = auxiliary(timm_vit(2), LDR(2)).gene_bank
    with pytest.raises(ArgumentError, match="num_genes: expected 2 to 64, got 1"):
        bank.grow_group("norm1", 1)
    with pytest.raises(ArgumentError, match="name: expected one of"):
        bank.grow_group("norm9", 3)
    assert math.prod(bank.grow_group("norm1", 4).weight[3].shape) == 32
