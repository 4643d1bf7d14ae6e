# SPDX-License-Identifier: Apache-2.0
"""`ExpansionLinear` and `ExpansionLayerNorm`: views, dense forms, representations, errors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from expansion_samples import WIDTH, Net
from torch import nn

import pylearngene as plg
from pylearngene.nn import ExpansionLayerNorm, ExpansionLinear, GeneBank


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


def test_meta_device_computes_shapes() -> None:
    bank = GeneBank()
    shared = {"bank": bank, "coeffs": [1.0, 0.5], "device": "meta"}
    layer, norm = ExpansionLinear(4, 3, name="fc", **shared), ExpansionLayerNorm(3, name="norm", **shared)
    y = norm(layer(torch.zeros(2, 4, device="meta")))
    assert y.is_meta
    assert y.shape == (2, 3)
    y.sum().backward()
    assert bank.group("fc").weight[0].grad.shape == (3, 4)


def test_set_coeffs() -> None:
    layer = ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=[1.0, 0.5])
    layer.set_coeffs(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(layer.dense_weight(), layer.bank.group("fc").weight[1])
    with pytest.raises(plg.errors.ShapeError, match="coeffs: expected 2 numbers, got 3"):
        layer.set_coeffs([1, 2, 3])
    with pytest.raises(plg.errors.ArgumentError, match=r"coeffs\[0\]: expected a finite number, got nan"):
        layer.set_coeffs([float("nan"), 1.0])


def test_weight_view_computes_and_refuses_writes() -> None:
    layer = ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=[1.0, 0.5])
    dense = layer.dense_weight()
    x = torch.randn(2, 4)
    torch.testing.assert_close(2 * layer.weight - layer.weight, dense)
    torch.testing.assert_close(layer.weight @ x.t(), dense @ x.t())
    torch.testing.assert_close(-layer.weight[0], -dense[0])
    assert len(layer.weight) == 3
    for write in (
        lambda: layer.weight.data.mul_(2.0),
        lambda: torch.nn.init.ones_(layer.weight),
        lambda: layer.weight.copy_(dense),
    ):
        with pytest.raises(plg.errors.ArgumentError, match="weight: expected a change of the genes"):
            write()
    layer.bank.group("fc").weight[0].requires_grad_(False)
    assert layer.weight.requires_grad


def test_representations_are_one_line_each() -> None:
    bank = GeneBank()
    layer = ExpansionLinear(4, 3, bank=bank, name="attn.qkv", coeffs=[1.0, 0.25])
    assert repr(layer) == "ExpansionLinear(in_features=4, out_features=3, bias=True, name='attn.qkv', coeffs=[1, 0.25])"
    assert repr(bank) == "GeneBank(1 groups, 30 parameters, compute_dtype='auto')"
    assert repr(bank.group("attn.qkv")) == "ExpansionGroup(2 genes of 3x4 with bias)"
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


BANK = GeneBank()


def norm() -> ExpansionLayerNorm:
    return ExpansionLayerNorm(3, bank=GeneBank(), name="n", coeffs=[1.0])


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
        "compute_dtype: expected 'auto', 'param', float32, bfloat16 or float16, got 'fast'",
    ),
    "group": (lambda: BANK.group("fd"), "ArgumentError", r"name: expected one of \['fc'\], got 'fd'"),
    "x width": (
        lambda: ExpansionLinear(4, 3, **FC)(torch.zeros(2, 5)),
        "ShapeError",
        r"x: expected shape \[\*, I\] with I = 4, got \[2, 5\]",
    ),
    "coeffs": (
        lambda: BANK("fc", torch.ones(1)),
        "ShapeError",
        r"coeffs: expected shape \[K\] with K = 2 genes, got \[1\]",
    ),
    "no group": (lambda: BANK("nope", torch.ones(2)), "ArgumentError", r"name: expected one of \['fc'\], got 'nope'"),
    "part": (
        lambda: BANK("fc", torch.ones(2), part="x"),
        "ArgumentError",
        "part: expected one of 'weight', 'bias', 'both', got 'x'",
    ),
    "norm width": (
        lambda: norm()(torch.zeros(2, 4)),
        "ShapeError",
        r"x: expected shape \[\*, N\] with N = 3, got \[2, 4\]",
    ),
    "norm ints": (
        lambda: norm()(torch.zeros(2, 3).int()),
        "DTypeError",
        "x: expected float32, .* got int32",
    ),
    "norm double": (
        lambda: norm()(torch.zeros(2, 3).double()),
        "DTypeError",
        "x: expected float32 .* got float64",
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


def test_containers_are_refused_as_roots() -> None:
    with pytest.raises(plg.errors.ArgumentError, match=r"model: expected a module of your own .*, got Sequential"):
        GeneBank().attach(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_has_one_bank() -> None:
    net = Net()
    net.gene_bank.attach(net)
    with pytest.raises(plg.errors.ArgumentError, match="model: expected a model without a gene bank"):
        GeneBank().attach(net)


@pytest.mark.parametrize(
    ("coeffs", "got"),
    [
        ("12", "got text: '12'"),
        (["1", "2"], r"got text: \['1', '2'\]"),
        (None, "got NoneType"),
        (1.0, "got float"),
        ([[1.0], [2.0]], "got list"),
        ([1.0, 10**400], "got list"),
        (torch.ones(2, 2), r"got a tensor of shape \[2, 2\], float32 on cpu"),
        (torch.tensor(1.0), r"got a tensor of shape \[\], float32 on cpu"),
        (torch.ones(2, dtype=torch.complex64), r"got a tensor of shape \[2\], complex64 on cpu"),
        (torch.ones(2, device="meta"), r"got a tensor of shape \[2\], float32 on meta"),
    ],
)
def test_coefficients_are_numbers(coeffs: object, got: str) -> None:
    layer, message = ExpansionLinear(4, 3, **FC), f"^coeffs: expected a sequence of numbers, one per gene, {got}"
    with pytest.raises(plg.errors.ArgumentError, match=message):
        layer.set_coeffs(coeffs)
    with pytest.raises(plg.errors.ArgumentError, match=message):
        ExpansionLinear(4, 3, bank=GeneBank(), name="fc", coeffs=coeffs)
    assert layer.coeffs.tolist() == [1.0, 0.5]
