# SPDX-License-Identifier: Apache-2.0
"""Layers on the short way into the native kernels: nothing is remembered, and nobody who watches is passed by.

The short way itself is tested in `test_expansion_direct`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pylearngene as plg
from pylearngene import _backends
from pylearngene._ops import expansion_direct as direct
from pylearngene.errors import DeviceError

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__") or _backends._module is None,
    reason="the short way needs the native module and torch 2.10",
)
ROWS, COLS = 7, 9


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Per call that asks for the short way, whether it was had."""
    taken: list[bool] = []
    forward = direct.forward

    def watched(*arguments: Any) -> Tensor | None:
        y = forward(*arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(direct, "forward", watched)
    return taken


def layer_of(**options: Any) -> plg.nn.ExpansionLinear:
    torch.manual_seed(0)
    return plg.nn.ExpansionLinear(COLS, ROWS, bank=plg.nn.GeneBank(), name="fc", coeffs=[0.5, -2.0, 1.0], **options)


def changes() -> dict[str, Callable[[Any], None]]:
    def replaced(layer: Any) -> None:
        layer.bank.group("fc").weight[1] = nn.Parameter(torch.ones(ROWS, COLS))

    def strided(layer: Any) -> None:
        layer.bank.group("fc").weight[1].data = torch.randn(COLS, ROWS).t()

    def moved(layer: Any) -> None:
        layer.bank.group("fc").bias[0].data = torch.randn(2 * ROWS)[ROWS:]

    def in_place(layer: Any) -> None:
        with torch.no_grad():
            layer.bank.group("fc").weight[0].mul_(2)

    def wider(layer: Any) -> None:
        layer.bank.double()
        layer.double()

    def frozen(layer: Any) -> None:
        layer.bank.group("fc").weight[2].requires_grad_(False)

    def coefficients(layer: Any) -> None:
        layer.set_coeffs([0.0, 1.0, 0.0])

    return {f.__name__: f for f in (replaced, strided, moved, in_place, wider, frozen, coefficients)}


@pytest.mark.parametrize("change", changes().values(), ids=changes())
@pytest.mark.parametrize("train", [False, True])
def test_nothing_is_remembered(change: Any, train: bool, way: list[bool]) -> None:
    layer = layer_of()
    with torch.set_grad_enabled(train):
        for step in range(2):
            group = layer.bank.group("fc")
            x = torch.ones(2, COLS, dtype=group.weights()[0].dtype)
            y = layer(x)
            assert way[-1]
            weight, bias = layer.dense_weight(), layer.dense_bias()
            torch.testing.assert_close(y, nn.functional.linear(x, weight, bias))
            if train:
                layer.bank.zero_grad()
                y.sum().backward()
                got = [gene.grad for gene in group.tensors()]
                dense = nn.functional.linear(x, sum(c * g for c, g in zip(layer.coeffs, group.weights(), strict=True)))
                wanted = [gene for gene in group.weights() if gene.requires_grad]
                assert [g is not None for g in got] == [gene.requires_grad for gene in group.tensors()]
                for gene, grad in zip(wanted, torch.autograd.grad(dense.sum(), wanted), strict=True):
                    torch.testing.assert_close(gene.grad, grad)
            if step == 0:
                change(layer)


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


CLOSED: dict[str, Callable[[Any], Any]] = {
    "a gene is not read": lambda layer: layer.set_coeffs([0.0, 1.0, 0.5]),
    "a gene is computed": lambda layer: parametrize.register_parametrization(
        layer.bank.group("fc").weight, "1", Doubled()
    ),
    "coefficients are computed": lambda layer: parametrize.register_parametrization(layer, "coeffs", Doubled()),
    "learned coefficients are computed": lambda layer: parametrize.register_parametrization(layer, "coeffs", Doubled()),
    "hook": lambda layer: layer.bank.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CLOSED)
def test_fewest_steps_only_where_nothing_else_is_to_do(name: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, taken = layer_of(learn_coeffs="learned" in name), torch.ones(2, COLS), list[bool]()
    at_once = plg.nn.ExpansionLinear._at_once

    def watched(self: Any, x: Tensor) -> Tensor | None:
        y = at_once(self, x)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(plg.nn.ExpansionLinear, "_at_once", watched)
    with torch.set_grad_enabled(train):
        layer(x)
        CLOSED[name](layer)
        y = layer(x)
        assert taken == [True, train and name == "a gene is computed"]  # with gradients, genes are listed anyway
        dense = nn.functional.linear(x, layer.dense_weight(), layer.dense_bias())
        torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)


CASTS = {  # of x before and after, autocast
    "autocast": (torch.float32, torch.bfloat16, torch.bfloat16),
    "autocast, float16": (torch.float32, torch.float16, torch.float16),
    "autocast, cast already": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "x in 16 bits": (torch.bfloat16, torch.bfloat16, None),
    "autocast, float64": (torch.float64, torch.float64, torch.bfloat16),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("policy", ["auto", "param", torch.float16])
@pytest.mark.parametrize("name", CASTS)
def test_short_way_after_casts(
    name: str, policy: Any, learned: bool, train: bool, way: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits and gradients as on the long way, whatever x, genes and autocast are."""
    before, after, autocast = CASTS[name]
    layer = layer_of(learn_coeffs=learned)
    layer.bank.compute_dtype = policy
    if before == torch.float64:
        layer.double()
        layer.bank.double()
    dy, found = torch.randn(4, ROWS), list[list[Tensor]]()
    for long in (False, True):
        if long:
            monkeypatch.setattr(direct, "_open", lambda *_: None)
        x = torch.linspace(-1, 1, 4 * COLS).view(4, COLS).to(before).requires_grad_(train)
        with torch.set_grad_enabled(train), torch.autocast("cpu", autocast or torch.bfloat16, enabled=bool(autocast)):
            y = layer(x)
        assert y.dtype == after
        assert y.requires_grad == train
        assert long or way == [True]
        if train:
            wanted = [x, *layer.bank.parameters(), *layer.parameters()]
            found.append([y, *torch.autograd.grad(y, wanted, dy.to(after))])
        else:
            found.append([y])
    short, other = found
    assert torch.equal(short[0], other[0])
    for one, two in zip(short, other, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_closed_to_casts_that_somebody_sees(way: list[bool]) -> None:
    """Integers are refused, and functorch sees the casts."""
    layer = layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(plg.errors.DTypeError, match="x: expected"):
            layer(torch.ones(2, COLS, dtype=torch.int64))
        y = torch.func.vmap(layer)(torch.ones(3, 2, COLS))
    assert y.dtype == torch.bfloat16
    assert y.shape == (3, 2, ROWS)
    assert True not in way


def test_learned_coefficients_get_a_gradient_of_few_tokens() -> None:
    layer = layer_of(learn_coeffs=True)
    x = torch.ones(2, COLS)
    layer(x).sum().backward()
    weights, biases = layer.bank.group("fc").weights(), layer.bank.group("fc").biases()
    expected = [2 * (w.double().sum() + b.double().sum()) for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(layer.coeffs.grad, torch.stack(expected).float())


def test_freed_gene_of_a_layer_is_refused_by_name_in_the_next_call() -> None:
    layer = layer_of()
    x = torch.ones(1, COLS)
    layer(x)
    layer.bank.group("fc").weight[1].untyped_storage().resize_(0)
    with pytest.raises(DeviceError, match="genes: expected a storage of at least"):
        layer(x)


def test_genes_of_another_shape_get_gradients_of_that_shape() -> None:
    layer = layer_of()
    layer(torch.ones(2, COLS)).sum().backward()
    for gene in layer.bank.group("fc").tensors():
        gene.grad = None
        gene.data = torch.randn(300, *gene.shape[1:])
    layer(torch.ones(2, COLS)).sum().backward()
    for gene in layer.bank.group("fc").tensors():
        assert gene.grad.shape == gene.shape


def test_parametrized_coefficients_are_read() -> None:
    class Raised(nn.Module):
        def forward(self, coeffs: Tensor) -> Tensor:
            return coeffs + torch.tensor([0.0, 1.0, 0.0])

    layer, x = layer_of(), torch.ones(1, COLS)
    layer.set_coeffs([1.0, 1.0, 0.0])
    expected = layer(x)
    layer.set_coeffs([1.0, 0.0, 0.0])
    parametrize.register_parametrization(layer, "coeffs", Raised())
    torch.testing.assert_close(layer(x), expected)


def test_hooks_on_the_bank_fire(way: list[bool]) -> None:
    layer, seen = layer_of(), list[str]()
    layer(torch.ones(1, COLS))
    assert layer.bank.unhooked()
    handles = [
        layer.bank.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.bank.register_forward_hook(lambda *_: seen.append("after")),
    ]
    layer(torch.ones(1, COLS))
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    layer(torch.ones(1, COLS))
    everywhere.remove()
    assert seen[2:] == ["GeneBank", "ExpansionLinear"]
    layer.bank.forward = lambda *_: "another"  # type: ignore[method-assign]
    assert layer(torch.ones(1, COLS)) == "another"
    del layer.bank.forward
    layer.bank.__class__ = type("Own", (plg.nn.GeneBank,), {"forward": lambda *_: "a class of its own"})
    assert layer(torch.ones(1, COLS)) == "a class of its own"
    assert way == [True, True, True]
