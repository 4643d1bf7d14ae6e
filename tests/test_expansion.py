# SPDX-License-Identifier: Apache-2.0
"""`expansion_linear` and `expansion_weight`: values, every gradient, layouts, dtypes, levels, operators.

The oracle is dense PyTorch in float64, not our own code. Refusals, bank, layers and compiled graphs have
their own files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pylearngene as plg
from pylearngene import _backends
from pylearngene.reference import expansion as specification

HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ["reference"] + (["cpp"] if _backends.native() is not None else [])


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


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 5), (3, 5, 0), (1, 1, 1), (2, 7, 13), (37, 31, 17), (5, 600, 513)])
@pytest.mark.parametrize("genes", [1, 2, 5])
def test_values_and_gradients_float64(shape: tuple[int, int, int], genes: int, backend: str, regime: str) -> None:
    x, stored, coeffs, biases = make(*shape, genes, torch.float64)
    dy = torch.randn(shape[0], shape[1], dtype=torch.float64)
    y, got = gradients(ours, x, stored, coeffs, biases, dy)
    expected, wanted = gradients(dense, x, stored, coeffs, biases, dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gene_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens", [4, 70])
def test_error_is_at_most_twice_the_composition(
    dtype: torch.dtype, gene_dtype: torch.dtype, tokens: int, backend: str
) -> None:
    """Ruler: the same-dtype PyTorch composition against float64; 2x forward, 3x gradients, plus 2 ulp."""
    x, stored, coeffs, biases = make(tokens, 96, 160, 2, dtype, gene_dtype)

    def composition(x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor]) -> Tensor:
        weight = specification.weight(genes, coeffs, x.dtype)
        return F.linear(x, weight, specification.weight(biases, coeffs, x.dtype))

    dy = torch.randn(tokens, 96, dtype=torch.float64).to(dtype)
    mine, ruler, truth = (gradients(fn, x, stored, coeffs, biases, dy) for fn in (ours, composition, dense))
    assert mine[0].dtype == dtype
    for index, (a, b, c) in enumerate(
        zip((mine[0], *mine[1]), (ruler[0], *ruler[1]), (truth[0], *truth[1]), strict=True)
    ):
        assert a.dtype == b.dtype
        reference = c.double()
        ulp = torch.finfo(a.dtype).eps * reference.abs().max()
        factor = 2 if index == 0 else 3
        assert (a.double() - reference).abs().max() <= factor * (b.double() - reference).abs().max() + 2 * ulp


def test_gradcheck(backend: str, regime: str) -> None:
    x, stored, coeffs, biases = make(3, 5, 4, 2, torch.float64)
    tensors = [t.requires_grad_() for t in (x, coeffs, *stored, *biases)]

    def call(x: Tensor, coeffs: Tensor, *rest: Tensor) -> Tensor:
        return plg.functional.expansion_linear(x, rest[:2], coeffs, rest[2:], activation="gelu")

    assert torch.autograd.gradcheck(call, tensors)
    plain = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: plg.functional.expansion_linear(x, stored, coeffs, b), plain)


@pytest.mark.parametrize("stacked", [False, True])
def test_weight_and_its_gradients(stacked: bool, backend: str) -> None:
    genes = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    coeffs = torch.randn(*((5, 3) if stacked else (3,)), dtype=torch.float64, requires_grad=True)
    weight = plg.functional.expansion_weight(genes, coeffs)
    torch.testing.assert_close(weight, torch.einsum("...k,koi->...oi", coeffs, torch.stack(genes)))
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


def test_coefficients_dot_their_gradient() -> None:
    """`sum_k c_k dc_k == <dY, Y - b>`, since Y - b is linear in the coefficients."""
    x, genes, coeffs, _ = make(9, 12, 8, 3, torch.float64)
    coeffs.requires_grad_()
    y = plg.functional.expansion_linear(x, genes, coeffs)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, coeffs, dy)
    torch.testing.assert_close((coeffs * grad).sum(), (dy * y).sum(), rtol=1e-12, atol=1e-12)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "row of ones": lambda t: t[:1].expand_as(t),
    "column of ones": lambda t: t[:, :1].expand_as(t),
    "scalar": lambda t: t[:1, :1].expand_as(t),
    "cut of a cat": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "offset 1": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view_as(t),
    "every second": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [6, 40])
def test_layouts_of_x_and_upstream_and_genes(layout: str, tokens: int, backend: str) -> None:
    x, genes, coeffs, biases = make(tokens, 11, 9, 2, torch.float64)
    change = LAYOUTS[layout]
    dy = torch.randn(tokens, 11, dtype=torch.float64)
    got = gradients(ours, change(x), [change(g) for g in genes], coeffs, biases, change(dy))
    wanted = gradients(dense, change(x), [change(g) for g in genes], coeffs, biases, change(dy))
    for mine, theirs in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    leaf = change(x).detach().requires_grad_()  # as it is: `clone` above may have changed its layout
    y = plg.functional.expansion_linear(leaf, [change(g) for g in genes], coeffs)
    torch.testing.assert_close(y, dense(leaf, [change(g) for g in genes], coeffs, []), rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(y, leaf, change(dy))
    weight = torch.einsum("k,koi->oi", coeffs, torch.stack([change(g) for g in genes]))
    torch.testing.assert_close(dx, change(dy) @ weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, 2.0**-10])
def test_gradients_follow_the_upstream_scale_exactly(scale: float) -> None:
    x, genes, coeffs, biases = make(5, 7, 6, 2, torch.float64)
    dy = torch.randn(5, 7, dtype=torch.float64)
    one, scaled = (gradients(ours, x, genes, coeffs, biases, dy * s)[1] for s in (1.0, scale))
    for a, b in zip(one, scaled, strict=True):
        torch.testing.assert_close(a * scale, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_exactly_their_rows(value: float, backend: str, regime: str) -> None:
    x, genes, coeffs, _ = make(4, 6, 5, 2, torch.float32)
    x[2, 1] = value
    y = plg.functional.expansion_linear(x, genes, coeffs)
    assert (~y.isfinite()).any(1).tolist() == [False, False, True, False]
    x[2, 1] = 0.0
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


def test_double_backward_raises_and_create_graph_alone_works() -> None:
    x, genes, coeffs, _ = make(3, 5, 4, 2, torch.float64)
    x.requires_grad_()
    genes[0].requires_grad_()
    y = plg.functional.expansion_linear(x, genes, coeffs)
    dx, _ = torch.autograd.grad(y.sum(), (x, genes[0]), create_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(y) @ specification.weight(genes, coeffs))
    with pytest.raises(plg.errors.DoubleBackwardError, match="double backward: expected one differentiation"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # torch's own, on first forward-mode use
def test_functorch_transforms_equal_the_dense_layer() -> None:
    x, genes, coeffs, biases = make(3, 5, 4, 2, torch.float64)

    def transformed(fn: Callable[..., Tensor]) -> list[Tensor]:
        def loss(g: Tensor) -> Tensor:
            return fn(x, [g, genes[1]], coeffs, biases).pow(2).sum()

        over_x = torch.func.vmap(lambda row: fn(row[None], genes, coeffs, biases)[0])(x)
        over_coeffs = torch.func.vmap(lambda c: fn(x, genes, c, biases))(torch.eye(2, dtype=torch.float64))
        over_genes = torch.func.vmap(lambda g: fn(x, [g, g], coeffs, []))(torch.stack(genes))
        return [over_x, over_coeffs, over_genes, torch.func.grad(loss)(genes[0]), torch.func.hessian(loss)(genes[0])]

    for mine, theirs in zip(transformed(ours), transformed(dense), strict=True):
        torch.testing.assert_close(mine, theirs)


def operator_samples() -> Iterator[tuple[str, tuple]]:
    x, genes, coeffs, biases = make(3, 5, 4, 2, torch.float64)
    dy = torch.randn(3, 5, dtype=torch.float64)
    for tensor in (x, coeffs, *genes, *biases):
        tensor.requires_grad_()
    yield "expansion_linear", (x, genes, coeffs, None, biases, None)
    yield "expansion_linear", (x[:0], genes, coeffs, torch.randn(5, dtype=torch.float64), [], None)
    yield "expansion_linear", (x[None, :, :], [g.t().contiguous().t() for g in genes], coeffs, None, [], None)
    yield "expansion_weight", (genes, coeffs, None)
    plain = [t.detach() for t in (x, coeffs)]
    fixed, fixed_bias = [g.detach() for g in genes], [b.detach() for b in biases]
    yield "expansion_linear_dx", (dy, fixed, plain[1])
    yield "expansion_linear_wgrad", (dy, plain[0], fixed, fixed_bias, plain[1], [0, 1], [1], True)
    yield "expansion_weight_wgrad", (torch.randn(5, 4, dtype=torch.float64), fixed, plain[1], [1], True)
    buffers = [torch.zeros(5, 4, dtype=torch.float64)]
    bias_buffers = [torch.zeros(5, dtype=torch.float64)]
    yield "expansion_linear_wgrad_", (buffers, bias_buffers, dy, plain[0], fixed, fixed_bias, plain[1], [1], [0], False)
    yield "expansion_weight_wgrad_", (buffers, torch.randn(5, 4, dtype=torch.float64), fixed, plain[1], [0], True)
    token = torch.zeros(())
    tap = (token, buffers, bias_buffers, [0], [1])
    yield "expansion_linear_tapped", (plain[0], fixed, plain[1], None, fixed_bias, None, *tap)
    yield "expansion_weight_tapped", (fixed, plain[1], None, token, [], [])
    yield "gene_tap", (genes, [torch.zeros(5, 4, dtype=torch.float64) for _ in genes])


@pytest.mark.parametrize("index", range(12))
@pytest.mark.filterwarnings("ignore")
def test_opcheck(index: int) -> None:
    name, arguments = list(operator_samples())[index]
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(getattr(torch.ops.pylearngene, name).default, arguments, test_utils=checks)


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
def test_rows_regime_does_not_depend_on_the_batch() -> None:
    x, genes, coeffs, _ = make(40, 65, 33, 2, torch.float32)
    plg.set_regime("rows")
    try:
        whole = plg.functional.expansion_linear(x, genes, coeffs)
        parts = torch.cat([plg.functional.expansion_linear(part, genes, coeffs) for part in x.split([1, 2, 7, 30])])
    finally:
        plg.set_regime("auto")
    assert torch.equal(whole, parts)
