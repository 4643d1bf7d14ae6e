# SPDX-License-Identifier: Apache-2.0
"""`ExpansionRMSNorm`, `ExpansionGroupNorm` and `ExpansionScale` against PyTorch's layers with the dense vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.nn import ExpansionGroupNorm, ExpansionModule, ExpansionRMSNorm, ExpansionScale, GeneBank, Scale

COEFFS = [1.0, -0.5, 0.25]


def llama(x: Tensor, gain: Tensor) -> Tensor:
    work = x.float()
    return gain * (work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype)


MAKE: dict[str, Callable[..., ExpansionModule]] = {
    "rms": lambda **options: ExpansionRMSNorm(6, 1e-3, **options),
    "rms, default eps": lambda **options: ExpansionRMSNorm([6], **options),
    "rms, gain last": lambda **options: ExpansionRMSNorm(6, 1e-3, gain_last=True, **options),
    "group": lambda **options: ExpansionGroupNorm(2, 6, 1e-3, **options),
    "scale": lambda **options: ExpansionScale(6, **options),
}
PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "rms": lambda x, gain, _: F.rms_norm(x, (6,), gain, 1e-3),
    "rms, default eps": lambda x, gain, _: F.rms_norm(x, (6,), gain),
    "rms, gain last": lambda x, gain, _: llama(x, gain),
    "group": lambda x, gain, bias: F.group_norm(x, 2, gain, bias, 1e-3),
    "scale": lambda x, gain, _: x * gain,
}
CASES = list(MAKE)


def equal(case: str, found: Tensor, expected: Tensor) -> None:
    """Bit for bit, but where the squares of an RMS norm are summed in another order: to a rounding or two."""
    tolerance = 2 * torch.finfo(found.dtype).eps if case.startswith("rms") else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def layer_of(case: str, dtype: torch.dtype = torch.float64, learn: bool = False) -> ExpansionModule:
    """A layer with genes of random values."""
    layer = MAKE[case](bank=GeneBank(), name="block.norm", coeffs=COEFFS, dtype=dtype, learn_coeffs=learn)
    for gene in layer.bank.parameters():
        nn.init.normal_(gene)
    return layer


def inputs(case: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((2, 6, 3, 5) if case == "group" else (2, 3, 6), dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_dense_vectors(case: str) -> None:
    layer, x = layer_of(case, learn=True), inputs(case).requires_grad_()
    group = layer.bank.group("block.norm")
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    genes = [gene.detach().clone().requires_grad_() for gene in group.tensors()]
    coeffs, twin = layer.coeffs.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    gain = sum(coeffs[k] * genes[k] for k in range(3))
    bias = sum(coeffs[k] * genes[k + 3] for k in range(3)) if len(genes) == 6 else None
    expected = PLAIN[case](twin, gain, bias)
    expected.backward(dy)
    found = [y, x.grad, layer.coeffs.grad, *(gene.grad for gene in group.tensors())]
    tolerance = 1e-6 if "last" in case else 1e-10  # that one works in float32, whatever x's dtype
    for one, other in zip(found, [expected, twin.grad, coeffs.grad, *(gene.grad for gene in genes)], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("genes", [torch.float32, None])
# Under autocast PyTorch says of its own RMS norm with a float32 gain that it is not fused.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_low_precision_keeps_the_dtype_of_x(case: str, dtype: torch.dtype, genes: torch.dtype | None) -> None:
    layer, x = layer_of(case, genes or dtype), inputs(case, dtype)
    bias = layer.dense_bias()
    expected = PLAIN[case](x, layer.dense_weight().to(dtype), None if bias is None else bias.to(dtype))
    found = layer(x)
    assert found.dtype == dtype
    equal(case, found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        equal(case, layer(x), PLAIN[case](x, layer.dense_weight(), bias))


@pytest.mark.parametrize("grad", [True, False])
def test_gain_last_normalizes_float64_in_float32(grad: bool) -> None:
    layer, x = layer_of("rms, gain last"), inputs("rms")
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x), llama(x, layer.dense_weight()))
    layer = ExpansionRMSNorm(6, bank=GeneBank(), name="n", coeffs=[1.0], dtype=torch.float64, gain_last=True)
    tiny = 1e-4 * x  # where what is added to the mean square decides
    work = tiny.float()
    step = torch.finfo(torch.float32).eps
    assert torch.equal(layer(tiny), (work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + step)).double())


@pytest.mark.parametrize("case", CASES)
def test_dense_forms_equal_the_layers(case: str) -> None:
    layer, x = layer_of(case), inputs(case)
    plain = layer.to_dense()
    assert type(plain) in (nn.RMSNorm, nn.GroupNorm, Scale)
    tolerance = 1e-6 if "last" in case else 1e-12
    torch.testing.assert_close(plain(x), layer(x), rtol=tolerance, atol=tolerance)
    assert layer.weight.shape == (6,)
    assert (layer.bias is None) == (case != "group")
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.bank is not layer.bank


@pytest.mark.parametrize("case", CASES)
def test_meta_device_and_fresh_genes(case: str) -> None:
    layer = MAKE[case](bank=GeneBank(), name="n", coeffs=COEFFS, device="meta")
    assert layer(inputs(case, torch.float32).to("meta")).shape == inputs(case).shape
    fresh = MAKE[case](bank=GeneBank(), name="n", coeffs=COEFFS)
    torch.testing.assert_close(fresh.dense_weight(), torch.ones(6))
    before = plg.nn.dense_syntheses()
    fresh(inputs(case, torch.float32)).sum().backward()
    assert plg.nn.dense_syntheses() == before


def test_representations_are_one_line_each() -> None:
    shown = {case: repr(MAKE[case](bank=GeneBank(), name="n", coeffs=[1.0, 0.5])) for case in CASES}
    assert shown["rms"] == "ExpansionRMSNorm(6, eps=0.001, name='n', coeffs=[1, 0.5])"
    assert shown["group"] == "ExpansionGroupNorm(2, 6, eps=0.001, name='n', coeffs=[1, 0.5])"
    assert shown["scale"] == "ExpansionScale(6, name='n', coeffs=[1, 0.5])"


def made(kind: type[ExpansionModule], *args: Any, **options: Any) -> ExpansionModule:
    return kind(*args, **{"bank": GeneBank(), "name": "n", "coeffs": [1.0], **options})


def of_other_size() -> None:
    bank = GeneBank()
    made(ExpansionScale, 6, bank=bank)
    made(ExpansionScale, 5, bank=bank)


def of_other_number() -> None:
    bank = GeneBank()
    made(ExpansionRMSNorm, 6, bank=bank)
    made(ExpansionRMSNorm, 6, bank=bank, coeffs=[1.0, 1.0])


def without_bias() -> None:
    bank = GeneBank()
    made(ExpansionRMSNorm, 6, bank=bank)
    made(ExpansionGroupNorm, 2, 6, bank=bank)


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "axes": (
        lambda: made(ExpansionRMSNorm, (2, 3)),
        "ArgumentError",
        r"normalized_shape: expected one size, got \[2, 3\]",
    ),
    "plain": (
        lambda: made(ExpansionRMSNorm, 6, None, False),
        "ArgumentError",
        "elementwise_affine: expected True .* got False",
    ),
    "size": (lambda: made(ExpansionRMSNorm, -1), "ArgumentError", "normalized_shape: expected an int of at least 0"),
    "bank": (lambda: made(ExpansionRMSNorm, 6, bank=None), "ArgumentError", "bank: expected a GeneBank, got NoneType"),
    "nan": (
        lambda: made(ExpansionScale, 6, coeffs=[float("nan")]),
        "ArgumentError",
        r"coeffs\[0\]: expected a finite number, got nan",
    ),
    "features": (
        lambda: made(ExpansionScale, 1.5),
        "ArgumentError",
        "features: expected an int of at least 0, got 1.5",
    ),
    "groups": (
        lambda: made(ExpansionGroupNorm, 4, 6),
        "ArgumentError",
        "num_channels: expected a multiple of num_groups = 4, got 6",
    ),
    "no groups": (
        lambda: made(ExpansionGroupNorm, 0, 6),
        "ArgumentError",
        "num_groups: expected an int of at least 1, got 0",
    ),
    "affine": (
        lambda: made(ExpansionGroupNorm, 2, 6, 1e-5, False),
        "ArgumentError",
        "affine: expected True .* got False",
    ),
    "other size": (of_other_size, "ShapeError", r"n: expected .* got \(1, \(5,\), None\)"),
    "other number": (of_other_number, "ShapeError", r"n: expected .* got \(2, \(6,\), None\)"),
    "bias": (without_bias, "ShapeError", r"n: expected .* got \(1, \(6,\), \(6,\)\)"),
    "x": (
        lambda: layer_of("rms")(torch.zeros(2, 5).double()),
        "ShapeError",
        r"x: expected shape \[\*, N\] with N = 6, got \[2, 5\]",
    ),
    "scale of x": (
        lambda: layer_of("scale")(torch.zeros(5).double()),
        "ShapeError",
        r"x: expected shape \[\*, N\] with N = 6, got \[5\]",
    ),
    "channels": (
        lambda: layer_of("group")(torch.zeros(2, 5, 6).double()),
        "ShapeError",
        r"x: expected shape \[B, C, \*\] with C = 6, got \[2, 5, 6\]",
    ),
    "no channels": (
        lambda: layer_of("group")(torch.zeros(6).double()),
        "ShapeError",
        r"x: expected shape \[B, C, \*\] with C = 6, got \[6\]",
    ),
    "ints": (lambda: layer_of("rms")(torch.zeros(2, 6).int()), "DTypeError", "x: expected float32, .* got int32"),
    "mixed": (lambda: layer_of("scale")(torch.zeros(2, 6)), "DTypeError", "x: expected float64"),
    "mixed group": (
        lambda: layer_of("group", torch.float32)(torch.zeros(2, 6).double()),
        "DTypeError",
        "x: expected float32",
    ),
    "device": (
        lambda: layer_of("group")(torch.zeros(2, 6, device="meta")),
        "DeviceError",
        "x: expected device cpu",
    ),
    "device of rms": (lambda: layer_of("rms")(torch.zeros(6, device="meta")), "DeviceError", "x: expected device cpu"),
    "list": (lambda: layer_of("scale")([1.0] * 6), "DTypeError", "x: expected a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(getattr(plg.errors, kind), match=message):
        make()
