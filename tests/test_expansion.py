# SPDX-License-Identifier: Apache-2.0
"""`expansion` under the contract of all primitives, and what it alone has: activations, stacks, levels, batches.

The oracle is dense PyTorch in float64, not our own code. Refusals, bank, layers and compiled graphs have
their own files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Primitive, Sizes
from contract_base import Given
from torch import Tensor, nn

import pylearngene as plg
from pylearngene import _backends
from pylearngene.nn import ExpansionLinear, GeneBank
from pylearngene.reference import expansion as specification

HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ["reference"] + (["cpp"] if _backends.native() is not None else [])


class Expansion(Primitive):
    stem = "expansion"
    precise = ("coeffs",)

    def arguments(self, sizes: Sizes, draw: Callable[..., Tensor]) -> Given:
        scale = max(1, sizes.inner) ** -0.5
        genes = [scale * draw(sizes.out, sizes.inner) for _ in range(2)]
        biases = [draw(sizes.out) for _ in range(2)]
        return {"x": draw(sizes.tokens, sizes.inner), "genes": genes, "coeffs": draw(2), "bias": biases}

    def dense(
        self, genes: list[Tensor], coeffs: Tensor, bias: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        weight = torch.einsum("k,koi->oi", coeffs, torch.stack(genes))
        return weight, None if bias is None else torch.einsum("k,ko->o", coeffs, torch.stack(bias))

    def layer(self, bank: GeneBank, inner: int, out: int, level: int, **options: Any) -> nn.Module:
        return ExpansionLinear(inner, out, bank=bank, name="fc", coeffs=[1.0, level / 7], **options)

    def factors(self, layer: nn.Module) -> Given:
        group = layer.bank.group("fc")
        return {"genes": group.weights(), "coeffs": layer.coeffs, "bias": group.biases()}

    def operators(self, given: Given) -> Iterator[tuple[str, tuple[Any, ...]]]:
        x, genes, coeffs, biases = given["x"], given["genes"], given["coeffs"], given["bias"]
        plain = [t.detach() for t in (x, coeffs)]
        fixed, fixed_bias = [g.detach() for g in genes], [b.detach() for b in biases]
        dy, dw = x.detach().new_ones(len(x), len(biases[0])), torch.ones_like(fixed[0])
        buffers, bias_buffers = [torch.zeros_like(dw)], [torch.zeros_like(fixed_bias[0])]
        token = torch.zeros(())
        tap = (token, buffers, bias_buffers, [0], [1])
        yield "expansion_linear", (x, genes, coeffs, None, biases, None)
        yield "expansion_linear", (x[:0], genes, coeffs, biases[0], [], None)
        yield "expansion_linear", (x[None], [g.t().contiguous().t() for g in genes], coeffs, None, [], None)
        yield "expansion_weight", (genes, coeffs, None)
        yield "expansion_linear_dx", (dy, fixed, plain[1])
        yield "expansion_linear_wgrad", (dy, plain[0], fixed, fixed_bias, plain[1], [0, 1], [1], True)
        yield "expansion_weight_wgrad", (dw, fixed, plain[1], [1], True)
        yield (
            "expansion_linear_wgrad_",
            (buffers, bias_buffers, dy, plain[0], fixed, fixed_bias, plain[1], [1], [0], False),
        )
        yield "expansion_weight_wgrad_", (buffers, dw, fixed, plain[1], [0], True)
        yield "expansion_linear_tapped", (plain[0], fixed, plain[1], None, fixed_bias, None, *tap)
        yield "expansion_weight_tapped", (fixed, plain[1], None, token, [], [])


class TestContract(Contract):
    primitive = Expansion()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with plg.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["rows", "panel"])
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    plg.set_regime(request.param)
    yield request.param
    plg.set_regime("auto")


def make(
    tokens: int, out: int, inner: int, genes: int, dtype: torch.dtype, gene_dtype: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    gene_dtype = gene_dtype or dtype
    work = torch.float64 if gene_dtype == torch.float64 else torch.float32
    x = torch.randn(tokens, inner, dtype=torch.float64).to(dtype)
    stored = [
        (torch.randn(out, inner, dtype=torch.float64) / max(1, inner) ** 0.5).to(gene_dtype) for _ in range(genes)
    ]
    biases = [torch.randn(out, dtype=torch.float64).to(gene_dtype) for _ in range(genes)]
    return x, stored, torch.randn(genes, dtype=torch.float64).to(work), biases


def dense(x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor]) -> Tensor:
    """The independent oracle: an einsum and `F.linear` in float64."""
    c = coeffs.double()
    weight = torch.einsum("k,koi->oi", c, torch.stack([g.double() for g in genes]))
    bias = torch.einsum("k,ko->o", c, torch.stack([b.double() for b in biases])) if biases else None
    return F.linear(x.double(), weight, bias)


def gradients(
    fn: Callable[..., Tensor], x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor], dy: Tensor
):
    leaves = [t.detach().clone().requires_grad_() for t in (x, coeffs, *genes, *biases)]
    k = len(genes)
    y = fn(leaves[0], leaves[2 : 2 + k], leaves[1], leaves[2 + k :])
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


def ours(x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor]) -> Tensor:
    return plg.functional.expansion_linear(x, genes, coeffs, biases or None)


def test_gradcheck_of_activations_and_plain_biases(backend: str, regime: str) -> None:
    x, stored, coeffs, biases = make(3, 5, 4, 2, torch.float64)
    tensors = [t.requires_grad_() for t in (x, coeffs, *stored, *biases)]

    def call(x: Tensor, coeffs: Tensor, *rest: Tensor) -> Tensor:
        return plg.functional.expansion_linear(x, rest[:2], coeffs, rest[2:], activation="gelu")

    assert torch.autograd.gradcheck(call, tensors)
    plain = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: plg.functional.expansion_linear(x, stored, coeffs, b), plain)


def test_weights_of_several_layers_and_their_gradients(backend: str) -> None:
    genes = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    coeffs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = plg.functional.expansion_weight(genes, coeffs)
    torch.testing.assert_close(weight, torch.einsum("lk,koi->loi", coeffs, torch.stack(genes)))
    assert torch.autograd.gradcheck(lambda c, *g: plg.functional.expansion_weight(g, c), (coeffs, *genes))


@pytest.mark.parametrize("gene_dtype", [torch.float64, torch.float32, *HALVES])
def test_weight_is_bitwise_the_specification(gene_dtype: torch.dtype, backend: str) -> None:
    _, genes, coeffs, _ = make(1, 33, 65, 4, gene_dtype)
    got = plg.functional.expansion_weight(genes, coeffs)
    expected = specification.weight(genes, coeffs)
    if gene_dtype == torch.float64:  # the specification multiplies and adds; the kernel fuses
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_genes_that_are_not_finite_reach_exactly_their_columns(value: float, backend: str, regime: str) -> None:
    x, genes, coeffs, _ = make(4, 6, 5, 2, torch.float32)
    genes[1][3, 2] = value
    y = plg.functional.expansion_linear(x, genes, coeffs)
    assert (~y.isfinite()).any(0).tolist() == [False, False, False, True, False, False]


def test_stacked_genes_and_batched_x() -> None:
    x, genes, coeffs, biases = make(12, 5, 7, 3, torch.float64)
    listed = plg.functional.expansion_linear(x.view(2, 3, 2, 7), genes, coeffs, biases)
    stacked = plg.functional.expansion_linear(x, torch.stack(genes), coeffs, torch.stack(biases))
    assert torch.equal(listed.view(12, 5), stacked)
    assert plg.functional.expansion_linear(x[0], genes, coeffs).shape == (5,)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activation_with_and_without_gradients(activation: str) -> None:
    x, genes, coeffs, _ = make(3, 5, 4, 2, torch.float32)
    expected = getattr(F, activation)(plg.functional.expansion_linear(x, genes, coeffs))
    torch.testing.assert_close(plg.functional.expansion_linear(x, genes, coeffs, activation=activation), expected)
    x.requires_grad_()
    torch.testing.assert_close(plg.functional.expansion_linear(x, genes, coeffs, activation=activation), expected)


def test_autocast_casts_x_and_keeps_coefficients() -> None:
    x, genes, coeffs, _ = make(5, 8, 6, 2, torch.float32)
    coeffs = torch.tensor([1.0, 1.0 / 3.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = plg.functional.expansion_linear(x, genes, coeffs)
    weight = specification.weight(genes, coeffs, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x.bfloat16(), weight), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # torch's own, on first forward-mode use
def test_functorch_over_shared_genes_and_hessians() -> None:
    x, genes, coeffs, biases = make(3, 5, 4, 2, torch.float64)

    def transformed(fn: Callable[..., Tensor]) -> list[Tensor]:
        def loss(g: Tensor) -> Tensor:
            return fn(x, [g, genes[1]], coeffs, biases).pow(2).sum()

        over_genes = torch.func.vmap(lambda g: fn(x, [g, g], coeffs, []))(torch.stack(genes))
        return [over_genes, torch.func.hessian(loss)(genes[0])]

    for mine, theirs in zip(transformed(ours), transformed(dense), strict=True):
        torch.testing.assert_close(mine, theirs)


LEVEL_SCRIPT = """
import torch, pylearngene as plg
from pylearngene import _backends
from pylearngene.errors import ArgumentError, DeviceError, DTypeError, ShapeError
def pattern(rows, cols, seed):  # exact on every level, where random numbers and sines are not
    return ((torch.arange(rows * cols) * 7919 + seed * 311) % 1009).view(rows, cols).double() / 1009 - 0.5
parts = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    genes = [pattern(67, 45, k).to(dtype) for k in range(3)]
    weight = plg.functional.expansion_weight(genes, torch.tensor([0.3, -1.7, 0.011]))
    parts.append(weight.view(torch.uint8).long().mul(torch.arange(weight.nbytes).view(67, -1) % 251 + 1).sum().item())
    x = pattern(5, 45, 9).to(dtype)
    y = plg.functional.expansion_linear(x, genes, torch.tensor([0.3, -1.7, 0.011]))
    dense = torch.nn.functional.linear(x.double(), weight.double())
    assert (y.double() - dense).abs().max() < {2: 3e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize] * dense.abs().max()
print(_backends.LEVEL_NAME, parts)
"""


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the native module")
def test_every_cpu_level_gives_the_same_weights() -> None:
    """One machine tests all levels: ATEN_CPU_CAPABILITY caps torch and us alike."""
    seen = {}
    for cap in ("default", "avx2", "avx512", None):
        env = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
        if cap is not None:
            env["ATEN_CPU_CAPABILITY"] = cap
        command = [sys.executable, "-P", "-W", "error", "-c", LEVEL_SCRIPT]
        if sys.version_info < (3, 11):
            command.remove("-P")
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        level, parts = out.strip().split(" ", 1)
        seen[level] = parts
    assert "DEFAULT" in seen
    assert set(seen) <= {"DEFAULT", "AVX2", "AVX512", "AVX512_BF16"}
    assert len(set(seen.values())) == 1, seen


def test_bias_gradient_is_summed_in_float32() -> None:
    x, bias = torch.ones(100_001, 4), torch.zeros(3, requires_grad=True)
    plg.functional.expansion_linear(x, [torch.zeros(3, 4)] * 2, torch.ones(2).half(), bias).sum().backward()
    assert bias.grad.tolist() == [100_001.0] * 3


def test_forward_mode_keeps_tangents() -> None:
    x, genes, coeffs, _ = make(3, 5, 4, 2, torch.float64)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        y = plg.functional.expansion_linear(torch.autograd.forward_ad.make_dual(x, tangent), genes, coeffs)
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got, tangent @ specification.weight(genes, coeffs).t())


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the native module")
@pytest.mark.parametrize(
    ("dtype", "split"),
    [(torch.float32, [1, 2, 7, 30]), (torch.bfloat16, [17, 23]), (torch.bfloat16, [18, 22])],
    ids=str,
)
def test_rows_regime_does_not_depend_on_the_batch(dtype: torch.dtype, split: list[int]) -> None:
    x, genes, coeffs, _ = make(40, 65, 33, 2, dtype)
    plg.set_regime("rows")
    try:
        whole = plg.functional.expansion_linear(x, genes, coeffs)
        parts = torch.cat([plg.functional.expansion_linear(part, genes, coeffs) for part in x.split(split)])
    finally:
        plg.set_regime("auto")
    assert torch.equal(whole, parts)
