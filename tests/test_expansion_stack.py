# SPDX-License-Identifier: Apache-2.0
"""The regime `stack`: weights of several layers at once, their gradients, where the plan uses it, and where never.

Oracles: the weight of one layer alone, bit for bit, and plain autograd in float64. The kernel itself is tested in
`test_native_stack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import torch
from host_samples import images, timm_vit
from torch import Tensor

import pylearngene as plg
from pylearngene import plan
from pylearngene._ops import expansion, expansion_stack
from pylearngene.functional import expansion_weight
from pylearngene.methods import LDR, SWS, TLEG, Expansion
from pylearngene.networks import auxiliary, bake, extract

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn."""
    with plg.use_backend(request.param):
        yield request.param


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """What the kernel for several layers was asked for: results, matrices, whether they are added."""
    calls: list[tuple[int, int, bool]] = []
    run = expansion_stack._run

    def spy(outs: list[Tensor], matrices: list[Tensor], coeffs: Tensor, add: bool) -> None:
        calls.append((len(outs), len(matrices), add))
        run(outs, matrices, coeffs, add)

    monkeypatch.setattr(expansion_stack, "_run", spy)
    return calls


def case(layers: int, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(count)], torch.randn(layers, count).to(
        work
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "count"), [(1, 6), (2, 4), (12, 12), (70, 5), (3, 2)])
def test_every_layer_has_the_bits_it_has_alone(backend: str, dtype: torch.dtype, layers: int, count: int) -> None:
    for shape in ((5, 33), (7,), (2, 3, 4, 5), (0, 3), (3, 0)):
        genes, coeffs = case(layers, count, shape, dtype)
        stack = expansion_weight(genes, coeffs)
        assert stack.shape == (layers, *shape)
        assert stack.dtype == dtype
        for weight, row in zip(stack, coeffs, strict=True):
            assert torch.equal(weight, expansion_weight(genes, row))


def test_both_implementations_agree(stacks: list[tuple[int, int, bool]]) -> None:
    genes, coeffs = case(5, 6, (40, 70), torch.float32)
    with plg.use_backend("reference"):
        expected = expansion_weight(genes, coeffs)
    assert stacks == []
    got = expansion_weight(genes, coeffs)
    assert stacks == [(5, 6, False)]
    assert ((got - expected).abs() <= torch.finfo(torch.float32).eps * expected.abs()).all()


@pytest.mark.parametrize("layout", ["transposed", "strided", "gaps", "expanded"])
def test_layout_of_genes_changes_nothing(layout: str) -> None:
    genes, coeffs = case(3, 4, (18, 24), torch.float32)
    moved = {
        "transposed": [g.t().contiguous().t() for g in genes],
        "strided": [g.repeat_interleave(2, 1)[:, ::2] for g in genes],
        "gaps": [torch.cat([g, g], 1)[:, :24] for g in genes],
        "expanded": [g[:1].expand_as(g) for g in genes],
    }[layout]
    assert torch.equal(expansion_weight(moved, coeffs), expansion_weight([g.contiguous() for g in moved], coeffs))


@pytest.mark.parametrize(("layers", "count"), [(1, 3), (4, 6), (70, 2)])
def test_gradients_against_plain_autograd(backend: str, layers: int, count: int) -> None:
    genes, coeffs = case(layers, count, (6, 9), torch.float64)
    tracked = [gene.requires_grad_(k != 1) for k, gene in enumerate(genes)]
    coeffs.requires_grad_()
    upstream = torch.randn(layers, 6, 9, dtype=torch.float64)
    leaves = [g for g in tracked if g.requires_grad]
    got = torch.autograd.grad(expansion_weight(tracked, coeffs), [*leaves, coeffs], upstream)
    plain = torch.einsum("lk,kij->lij", coeffs, torch.stack(tracked))
    expected = torch.autograd.grad(plain, [*leaves, coeffs], upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    genes, coeffs = case(64, 2, (5, 40), dtype)
    upstream = torch.randn(64, 5, 40).to(dtype)
    buffers = expansion.expansion_weight_wgrad(upstream, genes, coeffs, [0, 1], False)[:2]
    exact = torch.einsum("lk,lij->kij", coeffs.double(), upstream.double())
    size = torch.einsum("lk,lij->kij", coeffs.double().abs(), upstream.double().abs())
    for k, buffer in enumerate(buffers):
        assert buffer.dtype == torch.float32
        assert ((buffer.double() - exact[k]).abs() <= 66 * torch.finfo(torch.float32).eps * size[k]).all()


def test_gradients_take_one_pass_in_the_order_of_the_layers(stacks: list[tuple[int, int, bool]]) -> None:
    genes, coeffs = case(5, 3, (12, 50), torch.float32)
    upstream = torch.randn(5, 12, 50)
    together = expansion.expansion_weight_wgrad(upstream, genes, coeffs, [0, 2], False)[:2]
    assert stacks == [(2, 5, True)]
    for buffer, k in zip(together, (0, 2), strict=True):
        one_by_one = [torch.zeros(12, 50)]
        for grad, row in zip(upstream, coeffs, strict=True):
            expansion.expansion_weight_wgrad_(one_by_one, grad, genes, row, [k], False)
        assert torch.equal(buffer, one_by_one[0])


def test_the_upstream_gradient_may_have_any_strides() -> None:
    genes, coeffs = case(4, 4, (6, 8), torch.float64)
    genes = [gene.requires_grad_() for gene in genes]
    upstream = torch.randn(8, 6, 4, dtype=torch.float64).permute(2, 1, 0)
    got = torch.autograd.grad(expansion_weight(genes, coeffs), genes, upstream)
    expected = torch.autograd.grad(expansion_weight(genes, coeffs), genes, upstream.contiguous())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_the_plan_says_when() -> None:
    assert [plan.choose_stack(12, genes, True) for genes in (1, 2, 3, 12)] == ["panel", "stack", "stack", "stack"]
    assert plan.choose_stack(1, 12, True) == plan.choose_stack(12, 12, False) == "panel"
    plg.set_regime("panel")
    try:
        assert plan.choose_stack(12, 12, True) == "panel"
    finally:
        plg.set_regime("auto")


def test_every_function_of_the_plan_has_a_caller() -> None:
    folder = Path(plan.__file__).parent
    sources = [path.read_text() for path in folder.parent.rglob("*.py") if path.parent != folder]
    for name in plan.__all__:
        if isfunction(getattr(plan, name)):
            assert any(f"plan.{name}" in source or f"plan import {name}" in source for source in sources), name


def test_a_pinned_regime_gives_the_same_bits(stacks: list[tuple[int, int, bool]]) -> None:
    genes, coeffs = case(4, 8, (30, 50), torch.float32)
    together = expansion_weight(genes, coeffs)
    plg.set_regime("panel")
    try:
        alone = expansion_weight(genes, coeffs)
    finally:
        plg.set_regime("auto")
    assert torch.equal(together, alone)
    assert stacks == [(4, 8, False)]


@pytest.mark.parametrize("method", [LDR(6), LDR(4, order_offset=1), SWS((1, 1, 1, 1, 1)), TLEG()])
def test_plain_networks_have_the_weights_of_the_layers(method: Any, stacks: list[tuple[int, int, bool]]) -> None:
    net = auxiliary(timm_vit(5), method)
    with torch.no_grad():
        for gene in net.gene_bank.parameters():
            gene.normal_()
    before = plg.nn.dense_syntheses()
    plain = bake(net)
    groups = len(net.gene_bank.groups)
    assert plg.nn.dense_syntheses() == before + 5 * groups
    assert len(stacks) == 2 * groups  # weights and biases, all five layers in one call
    descended = extract(net).descend(backed=False)
    for (name, parameter), other in zip(plain.named_parameters(), descended.parameters(), strict=True):
        owner, _, part = name.rpartition(".")
        backed = net.get_submodule(owner)
        if isinstance(backed, plg.nn.ExpansionModule):
            assert torch.equal(parameter, getattr(backed, f"dense_{part}")())
        assert torch.equal(parameter, other)
    storages = [parameter.untyped_storage().data_ptr() for parameter in plain.parameters()]
    assert len(set(storages)) == len(storages)


def test_learned_coefficients_are_baked() -> None:
    net = auxiliary(timm_vit(3), Expansion([[1.0, 0.5, 0.1, 0.2]] * 3, learn=True))
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, plg.nn.ExpansionModule):
                layer.coeffs.normal_()
    torch.testing.assert_close(bake(net.eval())(images()), net(images()), rtol=1e-5, atol=1e-5)


def test_a_running_network_never_uses_the_stack(stacks: list[tuple[int, int, bool]]) -> None:
    net = auxiliary(timm_vit(6), LDR(8))
    net(images()).square().sum().backward()
    assert not [call for call in stacks if not call[2]]
    # norms have small weights of their own; what is added there belongs to one layer at a time
    assert {call[1] for call in stacks} <= {1}


def test_tensors_that_are_there_are_filled_whatever_their_strides_and_dtypes() -> None:
    genes, coeffs = case(3, 4, (6, 10), torch.float32)
    expected = expansion_weight(genes, coeffs)
    for outs in (
        [torch.full((10, 6), torch.nan).t() for _ in range(3)],
        [torch.full((6, 10), torch.nan, dtype=torch.float64) for _ in range(3)],
        [torch.full((6, 20), torch.nan)[:, ::2] for _ in range(3)],
        [torch.full((6, 10), torch.nan) for _ in range(3)],
    ):
        expansion.write_stack(outs, genes, coeffs)
        for out, wanted in zip(outs, expected, strict=True):
            assert torch.equal(out.float(), wanted)
