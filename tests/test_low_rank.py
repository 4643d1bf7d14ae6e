# SPDX-License-Identifier: Apache-2.0
"""`low_rank`: under the contract of all primitives, against the singular value decomposition, and with its gates.

What is the same for every primitive is inherited; here is what strengths and gates mean, per sample or not. Layers have
a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Primitive, Sizes
from contract_base import Given, close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import pylearngene as plg
from pylearngene.errors import ShapeError
from pylearngene.nn import GeneBank, LowRankLinear
from pylearngene.reference import low_rank as specification

DOUBLE = torch.float64


class LowRank(Primitive):
    stem = "low_rank"
    precise = ("s", "gate")
    backends = ("reference",)
    forms_weight = False

    def arguments(self, sizes: Sizes, draw: Callable[..., Tensor]) -> Given:
        rank = 3 + min(sizes.out, sizes.inner) // 8
        return {
            "x": draw(sizes.tokens, sizes.inner),
            "u": draw(sizes.out, rank),
            "s": draw(rank),
            "v": max(1, sizes.inner) ** -0.5 * draw(sizes.inner, rank),
            "gate": draw(rank),
            "bias": draw(sizes.out),
        }

    def dense(
        self, u: Tensor, s: Tensor, v: Tensor, gate: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return torch.einsum("or,r,ir->oi", u, s if gate is None else s * gate, v), bias

    def layer(self, bank: GeneBank, inner: int, out: int, level: int, **options: Any) -> nn.Module:
        return LowRankLinear(inner, out, bank=bank, name="fc", rank=3, **options)

    def factors(self, layer: nn.Module) -> Given:
        group = layer.bank.group("fc")
        return {"u": group.u, "s": layer.s, "v": group.v, "bias": layer.bias}


class TestContract(Contract):
    primitive = LowRank()


def factors(out: int = 7, inner: int = 5, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(out, rank, dtype=DOUBLE),
        torch.randn(rank, dtype=DOUBLE),
        torch.randn(inner, rank, dtype=DOUBLE),
    )


def per_sample(x: Tensor, u: Tensor, s: Tensor, v: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """Oracle: each sample by the dense weight of its own row of the gate."""
    return torch.stack([F.linear(xb, u @ torch.diag(s * row) @ v.t(), bias) for xb, row in zip(x, gate, strict=True)])


@pytest.mark.parametrize(("out", "inner"), [(9, 6), (6, 9), (7, 7)])
def test_singular_values_make_the_weight_and_truncation_costs_their_tail(out: int, inner: int) -> None:
    """Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936: the squared
    error of the leading R terms is the sum of the squares of the singular values left out."""
    dense = torch.randn(out, inner, dtype=DOUBLE)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    x = torch.randn(4, inner, dtype=DOUBLE)
    close(plg.functional.low_rank_weight(u, s, vt.t()), dense, 1e-12)
    close(plg.functional.low_rank_linear(x, u, s, vt.t()), F.linear(x, dense), 1e-12)
    for rank in range(len(s) + 1):
        part = plg.functional.low_rank_weight(u[:, :rank], s[:rank], vt[:rank].t())
        torch.testing.assert_close((dense - part).square().sum(), s[rank:].square().sum(), rtol=1e-12, atol=1e-12)


def test_strengths_are_the_singular_values_of_orthonormal_directions() -> None:
    """What makes FINE's and KIND's components singular ones: Xie et al., arXiv 2409.19289 and arXiv 2408.07337."""
    u, s, v = factors(9, 8, 4)
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    found = torch.linalg.svdvals(plg.functional.low_rank_weight(u, s, v))
    torch.testing.assert_close(found[:4], s.abs().sort(descending=True).values, rtol=1e-12, atol=1e-12)
    assert found[4:].abs().max() < 1e-12


def test_strengths_linear_in_the_layer_are_a_linear_expansion() -> None:
    """FINE with a spectrum linear in l is a network of TLEG: `W[l] = B + l/L A` of two genes of rank R."""
    u, base, v = factors()
    slope = torch.randn_like(base)
    genes = [u @ torch.diag(base) @ v.t(), u @ torch.diag(slope) @ v.t()]
    for level in range(4):
        mine = plg.functional.low_rank_weight(u, base + level / 4 * slope, v)
        close(mine, plg.functional.expansion_weight(genes, torch.tensor([1.0, level / 4], dtype=DOUBLE)), 1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5), (1, 3, 5), (0, 5), (4, 0, 5), (0, 3, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gates_per_sample(shape: tuple[int, ...], with_bias: bool) -> None:
    """DivMorph, Feng et al., arXiv 2512.09796: every sample has its own weight; values and gradients by the dense."""
    u, s, v = factors()
    x, gate = torch.randn(shape, dtype=DOUBLE), torch.randn(shape[0], 4, dtype=DOUBLE)
    bias = torch.randn(7, dtype=DOUBLE) if with_bias else None
    given = [t.requires_grad_() for t in (x, u, s, v, gate, bias) if t is not None]
    y = plg.functional.low_rank_linear(x, u, s, v, gate, bias)
    expected = (
        per_sample(x, u, s, v, gate, bias) if len(x) else y.new_empty(*shape[:-1], 7) + 0 * sum(map(Tensor.sum, given))
    )
    close(y, expected, 1e-12)
    dy = torch.randn_like(y)
    for mine, theirs in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True):
        close(mine, theirs, 1e-12)
    weights = plg.functional.low_rank_weight(u, s, v, gate)
    assert weights.shape == (shape[0], 7, 5)
    close(weights, specification.weight(u, s, v, gate), 1e-13)
    close(y, specification.linear(x, u, s, v, gate, bias), 1e-12)


def test_gates_pass_gradcheck_twice() -> None:
    """Bare functions are plain autograd: second derivatives are right too."""
    u, s, v = factors(3, 2, 2)
    x, gate, bias = (torch.randn(shape, dtype=DOUBLE) for shape in ((2, 3, 2), (2, 2), (3,)))
    given = [t.requires_grad_() for t in (x, u, s, v, gate, bias)]
    assert torch.autograd.gradcheck(plg.functional.low_rank_linear, given)
    assert torch.autograd.gradgradcheck(plg.functional.low_rank_linear, given)
    assert torch.autograd.gradgradcheck(plg.functional.low_rank_weight, given[1:5])


@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives_in_16_bits(gated: bool) -> None:
    """There the first derivative is a function of its own."""
    given = [t.to(torch.bfloat16) for t in factors(3, 4, 2)]
    given = [torch.randn(2, 4, dtype=torch.bfloat16), *given, *([torch.rand(2, 2)] if gated else [])]
    found = []
    for dtype in (torch.bfloat16, DOUBLE):
        inputs = [t.to(dtype if t.dtype == torch.bfloat16 else t.dtype).detach().requires_grad_() for t in given]
        y = plg.functional.low_rank_linear(*inputs)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs))
    for mine, theirs in zip(*found, strict=True):
        assert (mine.double() - theirs.double()).abs().max() <= 0.06 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_autocast_and_transforms_in_16_bits(dtype: torch.dtype, gated: bool) -> None:
    """x is rounded inside, strengths are not; under functorch the same products run."""
    u, s, v = (t.float() for t in factors())
    x, gate = torch.randn(3, 5), torch.rand(3, 4) if gated else None
    with torch.autocast("cpu", dtype=dtype):
        y = plg.functional.low_rank_linear(x, u, s, v, gate)
        under = torch.func.vmap(lambda row: plg.functional.low_rank_linear(row, u, s, v))(x)
        weight = plg.functional.low_rank_weight(u, s, v, gate)
    assert (y.dtype, under.dtype, weight.dtype) == (dtype, dtype, torch.float32)
    close(weight, specification.weight(u, s, v, gate), 1e-6)
    close(y, specification.linear(x.to(dtype), u, s, v, gate), 3e-2)
    close(under, specification.linear(x.to(dtype), u, s, v), 3e-2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_open_gates_are_none_and_closed_ones_drop_directions(value: float) -> None:
    """KIND, Xie et al., arXiv 2408.07337: with tailors off the learngene's directions alone are left."""
    (u, s, v), x = factors(), torch.randn(3, 5, dtype=DOUBLE)
    gate = torch.tensor([1.0, 1.0, value, value], dtype=DOUBLE)
    kept = 4 if value else 2
    expected = plg.functional.low_rank_linear(x, u[:, :kept], s[:kept], v[:, :kept])
    for given in (gate, gate.expand(3, 4)):
        close(plg.functional.low_rank_linear(x, u, s, v, given), expected, 1e-13)


def test_order_of_directions_does_not_matter() -> None:
    (u, s, v), order = factors(), [2, 0, 3, 1]
    close(
        plg.functional.low_rank_weight(u[:, order], s[order], v[:, order]),
        plg.functional.low_rank_weight(u, s, v),
        1e-13,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_per_sample_keep_their_precision_in_16_bits(dtype: torch.dtype) -> None:
    """A gate is used in float32: 1 + 2^-12 is 1 in either dtype, and differs here from 1 by what it should."""
    one = torch.ones(1, 1, dtype=dtype)
    gate = torch.tensor([[1 + 2.0**-12]], requires_grad=True)
    s = torch.tensor([2.0**12])
    y = plg.functional.low_rank_linear(one, one, s * gate[0], one, bias=torch.tensor([-(2.0**12)], dtype=dtype))
    assert plg.functional.low_rank_linear(one, one, s, one, gate).dtype == dtype
    weight = plg.functional.low_rank_weight(one.float(), s, one.float(), gate)
    assert weight.item() == 2.0**12 + 1
    assert y.dtype == dtype


def refused() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    """Calls that do not fit, against x [3, 5], u [7, 4], s [4], v [5, 4]."""
    u, _, v = factors()
    return {
        "rows": ({"gate": torch.ones(2, 4)}, ShapeError, r"gate: expected \[R\] or \[B, R\] with a row per sample"),
        "no sample": (
            {"x": torch.ones(5, dtype=DOUBLE), "gate": torch.ones(1, 4)},
            ShapeError,
            "gate: expected .* with a row per sample",
        ),
        "columns": ({"gate": torch.ones(3, 5)}, ShapeError, r"gate: expected shape \[R\] or \[B, R\] with R = 4"),
        "axes": ({"gate": torch.ones(3, 1, 4)}, ShapeError, "gate: expected shape"),
        "strengths per sample": ({"s": torch.ones(3, 4)}, ShapeError, r"s: expected shape \[R\] with R = 4"),
        "transposed": ({"v": v.t().contiguous()}, ShapeError, r"v: expected R = 4 columns, got \[4, 5\]"),
        "wide": ({"u": torch.randn(7, 5, dtype=DOUBLE)}, ShapeError, "u: expected R = 4 columns"),
        "one axis": ({"u": u[0]}, ShapeError, r"u: expected shape \[O, R\], got \[4\]"),
        "dtypes": ({"v": v.float()}, plg.errors.DTypeError, r"v: expected float64 \(that of u\), got float32"),
        "mixed bias": (
            {"bias": torch.ones(7)},
            plg.errors.DTypeError,
            "bias: expected float64 .*float64 does not mix",
        ),
    }


@pytest.mark.parametrize("name", refused())
def test_refusals(name: str) -> None:
    change, error, message = refused()[name]
    u, s, v = factors()
    given = {"x": torch.randn(3, 5, dtype=DOUBLE), "u": u, "s": s, "v": v, **change}
    with pytest.raises(error, match=f"^{message}"):
        plg.functional.low_rank_linear(**given)


@pytest.mark.parametrize("gated", [False, True])
def test_backward_inside_an_autocast_region_is_that_outside(gated: bool) -> None:
    """To the bit: the float32 sums of strengths are no matter of the region."""
    given = dict(zip("usv", factors(), strict=True))
    inputs = {name: tensor.to(torch.bfloat16).requires_grad_() for name, tensor in given.items() if name != "s"}
    inputs |= {"s": given["s"].float().requires_grad_(), "x": torch.randn(3, 6, 5).bfloat16().requires_grad_()}
    if gated:
        inputs["gate"] = torch.rand(3, 4, requires_grad=True)
    dy = torch.randn(3, 6, len(given["u"])).bfloat16()
    found = []
    for inside in (False, True):
        y = plg.functional.low_rank_linear(**inputs)
        with torch.autocast("cpu", dtype=torch.float16, enabled=inside):
            found.append(torch.autograd.grad(y, list(inputs.values()), dy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# torch's own, while it traces
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_compiled_gates_per_sample(dtype: torch.dtype) -> None:
    """One graph for every batch, whose gradients are those of eager calls."""
    torch._dynamo.reset()
    u, s, v = (t.to(dtype) for t in factors())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plg.functional.low_rank_linear, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 2):
        given = [torch.randn(batch, 6, 5, dtype=dtype), u, s, v, torch.rand(batch, 4)]
        found = []
        for call in (compiled, plg.functional.low_rank_linear):
            inputs = [t.detach().requires_grad_() for t in given]
            y = call(*inputs)
            found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for mine, theirs in zip(*found, strict=True):
            close(mine, theirs, 1e-12 if dtype == DOUBLE else 2e-2)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# torch's own, while it traces
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_exported_gates_per_sample_take_any_batch(dtype: torch.dtype) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return plg.functional.low_rank_linear(x, u, s, v, gate)

    u, s, v = (t.to(dtype) for t in factors())
    batch = {0: torch.export.Dim("batch")}
    given = torch.randn(3, 6, 5, dtype=dtype), torch.rand(3, 4)
    exported = torch.export.export(Layer(), given, dynamic_shapes={"x": batch, "gate": batch}).module()
    for count in (3, 7, 2):
        x, gate = torch.randn(count, 6, 5, dtype=dtype), torch.rand(count, 4)
        close(exported(x, gate), Layer()(x, gate), 1e-12 if dtype == DOUBLE else 2e-2)


def test_regime_and_backend_are_named() -> None:
    from pylearngene import plan

    assert plan.choose(7, "cpp", op="low_rank") == plan.choose(7, "triton", 2, op="low_rank") == "factored"
    assert plan.explain(7, "cpp", op="low_rank").startswith("factored: low_rank contracts x")
    reports = [report for report in plg.backends() if report.op == "low_rank"]
    assert [(report.device, report.backend) for report in reports] == [("cpu", "reference"), ("cuda", "reference")]
    assert all("products of PyTorch" in report.reason for report in reports)
