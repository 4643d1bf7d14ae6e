# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of `expansion_norm` on every level this machine has, and what they do not take.

Oracle: `F.layer_norm` and `F.rms_norm` in float64 with the dense vectors. The layers around them are in
`test_expansion_layer_norm.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylearngene import _C
from pylearngene.reference.expansion import weight

LEVELS = [_C.levels().index(name) for name in _C.supported_levels()]
LOW = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(torch.float64, torch.float64), *itertools.product(LOW, LOW)]  # (dtype of x, dtype of genes)
# M, N: one number, one column, one token, tails of every level, several pieces, more columns than are formed at a time.
SHAPES = [(1, 1), (5, 1), (1, 7), (3, 16), (4, 61), (197, 48), (33, 515), (40, 2050), (19, 4500)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
EPS = 1e-5
LAYER, RMS, GAIN_LAST = range(3)

per_level = pytest.mark.parametrize("level", LEVELS, ids=[_C.levels()[level] for level in LEVELS])
per_kind = pytest.mark.parametrize("kind", [LAYER, RMS, GAIN_LAST], ids=["layer", "rms", "gain last"])
per_pair = pytest.mark.parametrize(("dtype", "gene_dtype"), PAIRS, ids=[f"{str(x)[6:]}-{str(g)[6:]}" for x, g in PAIRS])


def calls(threads_pay_from: int = 1 << 17, kind: int = LAYER) -> Any:
    return _C.expansion_norm.Calls(threads_pay_from, Tensor.__dlpack_c_exchange_api__, (Tensor, nn.Parameter), kind)


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Norm:
    """Vectors of a norm, with what they are given to the kernels by and with, and their exact sums."""

    gains: list[Tensor]
    biases: list[Tensor]
    coeffs: Tensor
    kind: int = LAYER

    @classmethod
    def random(cls, count: int, size: int, dtype: torch.dtype, bias: bool = True, kind: int = LAYER) -> Norm:
        made = [torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(2 * count)]
        bias = bias and kind == LAYER
        return cls(made[:count], made[count:] if bias else [], torch.randn(count, dtype=work(dtype)), kind)

    def forward(self, level: int, x: Tensor, threads: int = 1, eps: float = EPS) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = calls(1, self.kind).forward(
            level, threads, x, self.gains, self.biases, self.coeffs, eps, True
        )
        return made

    def expanded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gain and bias as the definition says, rounded to x's dtype."""
        bias = weight(self.biases, self.coeffs).to(x.dtype) if self.biases else None
        return weight(self.gains, self.coeffs).to(x.dtype), bias


def dense(x: Tensor, gain: Tensor, bias: Tensor | None, kind: int = LAYER) -> Tensor:
    """The oracle."""
    x, gain = x.double(), gain.double()
    if kind != LAYER:
        return F.rms_norm(x, gain.shape, gain, EPS)
    return F.layer_norm(x, gain.shape, gain, None if bias is None else bias.double(), EPS)


@per_level
@per_pair
@per_kind
def test_values(level: int, dtype: torch.dtype, gene_dtype: torch.dtype, kind: int) -> None:
    if kind == GAIN_LAST and dtype == torch.float64:
        pytest.skip("is normalized in float32, which the kernels leave to others")
    for shape, bias in itertools.product(SHAPES, (True, False) if kind == LAYER else (False,)):
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        check_values(level, x, Norm.random(3, shape[1], gene_dtype, bias, kind))


def check_values(level: int, x: Tensor, norm: Norm) -> None:
    dtype = x.dtype
    y, moments = norm.forward(level, x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    expected = dense(x, *norm.expanded(x), norm.kind)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    mean, scale = moments.double().view(2, -1)
    wide = x.double()
    tolerance = TOLERANCE[moments.dtype]
    if norm.kind != LAYER:
        assert not mean.any()
        torch.testing.assert_close(scale, (wide.square().mean(1) + EPS).rsqrt(), rtol=tolerance, atol=0.0)
        return
    torch.testing.assert_close(mean, wide.mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scale, (wide.var(1, False) + EPS).rsqrt(), rtol=tolerance, atol=0.0)


@per_level
@per_kind
@pytest.mark.parametrize(("dtype", "gene_dtype"), PAIRS[1:], ids=str)
def test_vectors_have_the_bits_of_the_definition(
    level: int, dtype: torch.dtype, gene_dtype: torch.dtype, kind: int
) -> None:
    """A sum of genes gives the same norm as one gene with the sum's values."""
    norm, x = Norm.random(5, 77, gene_dtype, kind=kind), torch.randn(4, 77, dtype=torch.float64).to(dtype)
    gain, bias = norm.expanded(x)
    one = Norm([gain], [] if bias is None else [bias], torch.ones(1, dtype=work(dtype)), kind)
    assert torch.equal(norm.forward(level, x)[0], one.forward(level, x)[0])


@per_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gain_last_multiplies_what_was_rounded(level: int, dtype: torch.dtype) -> None:
    """Once the norm is rounded, the gain is one product and one rounding: bit for bit, with a gain or without."""
    x, one = torch.randn(40, 333).to(dtype), torch.ones(1)
    gain = torch.randn(333).to(dtype)
    for kind, equal in ((GAIN_LAST, True), (RMS, False)):
        normed, moments = Norm([torch.ones(333).to(dtype)], [], one, kind).forward(level, x)
        y, _ = Norm([gain], [], one, kind).forward(level, x)
        assert torch.equal(y, normed * gain) == equal
        dy = torch.zeros_like(x)
        dy[3] = 1  # so that the sums over tokens have one term, which is not rounded
        grad = backward(Norm([gain], [], one, kind), level, x, dy, moments)[2]
        assert torch.equal(grad, normed[3].float()) == equal


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@per_level
@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (1e4, 1), (-3e5, 2), (1e-4, 1e-6), (1e16, 1e13), (3, 1e3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_less_exact_than_the_norm_of_pytorch(level: int, offset: float, spread: float, dtype: torch.dtype) -> None:
    x = (offset + spread * torch.randn(64, 768, dtype=torch.float64)).to(dtype)
    norm = Norm([torch.ones(768, dtype=dtype)], [torch.zeros(768, dtype=dtype)], torch.ones(1, dtype=dtype))
    eps = 1e-5 * spread**2
    exact = F.layer_norm(x.double(), (768,), eps=eps)
    plain = F.layer_norm(x, (768,), torch.ones(768, dtype=dtype), torch.zeros(768, dtype=dtype), eps)
    found, _ = norm.forward(level, x, eps=eps)
    limit = torch.finfo(dtype).eps * float(exact.abs().max()) * 4
    if dtype == torch.float64:  # here the oracle is the norm of PyTorch itself
        limit *= max(1.0, abs(offset / spread))
    assert worst(found, exact) <= max(1.01 * worst(plain, exact), limit)


@per_level
def test_tokens_without_variance_or_with_infinities(level: int) -> None:
    norm, x = Norm.random(2, 40, torch.float32), torch.randn(9, 40)
    gain, bias = norm.expanded(x)
    assert bias is not None
    clean, _ = norm.forward(level, x)
    constant, wide = 1000 * torch.randn(99, 1).expand(99, 771), Norm.random(2, 771, torch.float32)
    assert torch.equal(wide.forward(level, constant)[0], weight(wide.biases, wide.coeffs).expand(99, 771))
    x[0], x[1], x[2] = 0, 1234.567, -3e38
    x[3, 7], x[4, 0], x[5, 39] = float("inf"), float("-inf"), float("nan")
    y, moments = norm.forward(level, x)
    assert torch.equal(y[:3], bias.expand(3, 40))
    dy = torch.randn(9, 40)
    dx = backward(norm, level, x, dy, moments)[0]
    even = (dy * gain - (dy * gain).mean(1, keepdim=True)) * EPS**-0.5  # these tokens are 0 once they are centered
    torch.testing.assert_close(dx[:3], even[:3], rtol=1e-4, atol=1e-3)
    assert dx[3:6].isnan().all()
    assert dx[6:].isfinite().all()
    assert y[3:6].isnan().all()
    assert torch.equal(y[6:], clean[6:])
    gain = norm.gains[0]
    gain[3] = float("inf")
    y, _ = norm.forward(level, torch.randn(3, 40))
    assert not y[:, 3].isfinite().any()
    assert y[:, 4:].isfinite().all()


def test_layouts() -> None:
    """Rows with gaps, repeated rows and tokens of several axes are read in place; what is not even is not taken."""
    norm, level = Norm.random(2, 6, torch.float32), LEVELS[-1]
    wide = torch.randn(5, 4, 9)
    taken = {
        "gaps": wide[..., 2:8],
        "rows apart": wide[:, 1, :6],
        "every other": wide.view(20, 9)[::3, :6],
        "repeated": wide[0, 0, :6].expand(3, 6),
        "one token": wide[0, 0, 3:],
        "one of an axis": wide[:, :1, 3:],
        "offset": wide.flatten()[1:61].view(10, 6),
    }
    for name, x in taken.items():
        made = calls().forward(level, 1, x, norm.gains, norm.biases, norm.coeffs, EPS, False)
        assert made is not None, name
        torch.testing.assert_close(made.double(), dense(x, *norm.expanded(x)), rtol=2e-5, atol=2e-5)
    for name, x in {
        "columns": wide[:, 0, ::2][:, :5],
        "uneven": wide[:, :3, :6],
        "turned": wide[0].t()[:6].t().t(),
    }.items():
        size = x.shape[-1]
        short = Norm.random(2, size, torch.float32)
        assert calls().forward(level, 1, x, short.gains, short.biases, short.coeffs, EPS, False) is None, name


@per_level
@pytest.mark.parametrize("gene_dtype", [torch.float64, *LOW])
def test_genes_of_any_stride(level: int, gene_dtype: torch.dtype) -> None:
    norm, x = Norm.random(3, 700, gene_dtype), torch.randn(5, 700, dtype=work(gene_dtype))
    y, moments = norm.forward(level, x)
    table = torch.empty(700, 3, dtype=gene_dtype)
    for k, gene in enumerate(norm.gains):
        table[:, k] = gene
    norm.gains = list(table.unbind(1))
    assert torch.equal(norm.forward(level, x)[0], y)
    dy = torch.randn_like(x)
    steps = [backward(norm, level, x, dy, moments) for _ in range(2)]
    norm.gains = [gene.contiguous() for gene in norm.gains]
    steps.append(backward(norm, level, x, dy, moments))
    for other in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], other, strict=True))


def backward(norm: Norm, level: int, x: Tensor, dy: Tensor, moments: Tensor, threads: int = 1) -> list[Tensor]:
    """dx, dcoeffs, and what was added to accumulators of ones."""
    size = x.shape[-1]
    memory = [torch.full((size + 9,), 77.0, dtype=work(norm.gains[0].dtype)) for _ in norm.gains + norm.biases]
    buffers = [it[5 : 5 + size].fill_(1) for it in memory]
    count = len(norm.gains)
    sums = (buffers[:count], buffers[count:])
    vectors = (norm.gains, norm.biases, norm.coeffs)
    dx, dots = calls(1, norm.kind).backward(level, threads, dy, x, moments, *vectors, *sums, True, True)
    assert all((it[:5] == 77).all() and (it[5 + size :] == 77).all() for it in memory), "written outside"
    return [dx, dots, *(buffer - 1 for buffer in buffers)]


@per_level
@per_pair
@per_kind
def test_gradients(level: int, dtype: torch.dtype, gene_dtype: torch.dtype, kind: int) -> None:
    if kind == GAIN_LAST and dtype == torch.float64:
        pytest.skip("is normalized in float32, which the kernels leave to others")
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        check_gradients(level, x, Norm.random(3, shape[1], gene_dtype, kind=kind))


def check_gradients(level: int, x: Tensor, norm: Norm) -> None:
    dtype, gene_dtype = x.dtype, norm.gains[0].dtype
    dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    moments = norm.forward(level, x)[1]
    found = backward(norm, level, x, dy, moments)
    leaves = [t.double().requires_grad_() for t in (x, norm.coeffs, *norm.gains, *norm.biases)]
    twin, c, *genes = leaves
    gain = sum(c[k] * genes[k] for k in range(3))
    bias = sum(c[k] * genes[3 + k] for k in range(3)) if norm.biases else None
    # dx is that of the vectors as they are read; the other gradients do not depend on how they were rounded.
    assert isinstance(gain, Tensor)
    with torch.no_grad():
        read, _ = norm.expanded(x)
        rounding = read.double() - gain
    assert bias is None or isinstance(bias, Tensor)
    dense(twin, gain + rounding, bias, norm.kind).backward(dy.double())
    for k, (one, leaf) in enumerate(zip(found, leaves, strict=True)):
        assert one.dtype == (dtype if k == 0 else work(gene_dtype))
        exact = leaf.grad
        assert exact is not None
        # Where the gain comes last, its gradient is of tokens that were rounded.
        allowed = TOLERANCE[dtype if norm.kind == GAIN_LAST else one.dtype]
        torch.testing.assert_close(one.double(), exact, rtol=allowed, atol=allowed * max(1.0, float(exact.abs().max())))


@per_level
@per_kind
@pytest.mark.parametrize("shape", [(1, 48), (37, 384), (700, 96), (21, 5000)], ids=str)
def test_threads_do_not_show(level: int, shape: tuple[int, int], kind: int) -> None:
    norm, x, dy = Norm.random(3, shape[1], torch.float32, kind=kind), torch.randn(shape), torch.randn(shape)
    y, moments = norm.forward(level, x)
    grads = backward(norm, level, x, dy, moments)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, norm.forward(level, x, threads), (y, moments)))
        assert all(map(torch.equal, backward(norm, level, x, dy, moments, threads), grads))


@per_level
def test_only_what_is_needed(level: int) -> None:
    norm, x, dy = Norm.random(2, 50, torch.float32), torch.randn(40, 50), torch.randn(40, 50)
    moments = norm.forward(level, x)[1]
    dx, dots, *sums = backward(norm, level, x, dy, moments)
    arguments = (level, 1, dy, x, moments, norm.gains, norm.biases, norm.coeffs)
    nothing, both = [None, None], [torch.zeros(50), torch.zeros(50)]
    assert calls().backward(*arguments, nothing, nothing, False, False) == (None, None)
    alone, none = calls().backward(*arguments, nothing, nothing, True, False)
    assert torch.equal(alone, dx)
    assert none is None
    none, alone = calls().backward(*arguments, nothing, nothing, False, True)
    assert torch.equal(alone, dots)
    assert none is None
    assert calls().backward(*arguments, [None, both[0]], [both[1], None], False, False) == (None, None)
    torch.testing.assert_close(both, [sums[1], sums[2]])
    # The identity of coefficients: sum_k c_k dc_k = <dy, y>, for y is linear in them.
    y = norm.forward(level, x)[0]
    torch.testing.assert_close((norm.coeffs * dots).sum(), (dy * y).sum(), rtol=1e-4, atol=1e-4)


def bad_vectors() -> dict[str, dict[str, Any]]:
    """What differs from a good call, by what is wrong with it."""
    vector, freed = torch.randn(6), torch.randn(6)
    freed.untyped_storage().resize_(0)
    lists: dict[str, Any] = {
        "none at all": [],
        "one too few": [vector],
        "too many": [vector] * 65,
        "of another size": [vector, torch.randn(5)],
        "a matrix": [vector, torch.randn(6, 1)],
        "of two dtypes": [vector, torch.randn(6).bfloat16()],
        "float64": [vector.double(), vector.double()],
        "numbers": [vector, 1.0],
        "meta": [vector, vector.to("meta")],
        "freed": [vector, freed],
        "of other sign": [vector, torch.randn(6, dtype=torch.complex64).conj().imag],
        "no list": vector,
    }
    given = {f"{part} {name}": {part: value} for name, value in lists.items() for part in ("gains", "biases")}
    del given["biases none at all"], given["biases no list"]
    given["biases of another dtype"] = {"biases": [vector.bfloat16(), vector.bfloat16()]}
    for name, value in {
        "of another number": torch.ones(3),
        "float64": torch.ones(2).double(),
        "16 bits": torch.ones(2).half(),
        "a matrix": torch.ones(2, 1),
        "apart": torch.ones(4)[::2],
        "a list": [1.0, 1.0],
    }.items():
        given[f"coeffs {name}"] = {"coeffs": value}
    for name, value in {
        "of another size": torch.randn(4, 5),
        "a number": torch.tensor(1.0),
        "empty": torch.randn(0, 6),
        "ints": torch.ones(4, 6, dtype=torch.int32),
        "complex": torch.ones(4, 6, dtype=torch.complex64),
        "float64": torch.randn(4, 6).double(),
        "meta": torch.empty(4, 6, device="meta"),
        "None": None,
    }.items():
        given[f"x {name}"] = {"x": value}
    return given


def bad_gradients() -> dict[str, dict[str, Any]]:
    given = {
        "dy of another size": {"dy": torch.randn(4, 5)},
        "dy of other tokens": {"dy": torch.randn(5, 6)},
        "dy of other axes": {"dy": torch.randn(2, 2, 6)},
        "dy of another dtype": {"dy": torch.randn(4, 6).half()},
        "dy of apart columns": {"dy": torch.randn(6, 4).t()},
        "moments of other tokens": {"moments": torch.randn(10)},
        "moments of 16 bits": {"moments": torch.randn(8).half()},
        "moments apart": {"moments": torch.randn(16)[::2]},
        "moments a matrix": {"moments": torch.randn(2, 4)},
    }
    for part in ("buffers", "bias_buffers"):
        for name, value in {
            "of another size": [torch.zeros(5), None],
            "of 16 bits": [torch.zeros(6).half(), None],
            "apart": [None, torch.zeros(12)[::2]],
            "too few": [None],
            "numbers": [None, 1],
        }.items():
            given[f"{part} {name}"] = {part: value}
    return given


def good(backward: bool) -> dict[str, Any]:
    norm, x = Norm.random(2, 6, torch.float32), torch.randn(4, 6)
    given: dict[str, Any] = {"level": 0, "threads": 1, "x": x, "gains": norm.gains, "biases": norm.biases}
    given["coeffs"] = norm.coeffs
    if not backward:
        return {**given, "eps": EPS, "keep": False}
    given |= {"dy": torch.randn(4, 6), "moments": norm.forward(0, x)[1], "need_dx": True, "need_dots": True}
    return {**given, "buffers": [None, None], "bias_buffers": [None, None]}


@pytest.mark.parametrize("case", [*bad_vectors(), *bad_gradients()])
def test_what_is_not_taken(case: str) -> None:
    """Nothing is done, and the caller goes another way."""
    for back in (False, True):
        changed = (bad_vectors() | bad_gradients())[case] if back else bad_vectors().get(case)
        if changed is None:
            continue
        run, given = (calls().backward if back else calls().forward), good(back)
        assert run(**given) is not None
        assert run(**{**given, **changed}) is None


def test_kinds_that_are_not_taken() -> None:
    """Biases of an RMS norm, and float64 where it is to be normalized in float32."""
    for kind in (RMS, GAIN_LAST):
        given = good(True)
        assert calls(kind=kind).backward(**given) is None
        given |= {"biases": [], "bias_buffers": []}
        assert calls(kind=kind).backward(**given) is not None
        wide = {"gains": [gene.double() for gene in given["gains"]], "coeffs": given["coeffs"].double(), "biases": []}
        made = calls(kind=kind).forward(level=0, threads=1, x=given["x"].double(), **wide, eps=EPS, keep=False)
        assert (made is None) == (kind == GAIN_LAST)
    for kind in (-1, 3):
        with pytest.raises(ValueError, match=f"^kind: expected 0 to 2, got {kind}$"):
            calls(kind=kind)


@pytest.mark.parametrize("back", [False, True])
def test_refusals(back: bool) -> None:
    run: Callable[..., Any] = calls().backward if back else calls().forward
    last = len(_C.levels())
    for message, changed in {
        f"level: expected 0 to {last - 1}, got {last}": {"level": last},
        f"level: expected 0 to {last - 1}, got -1": {"level": -1},
        "threads: expected at least 1, got 0": {"threads": 0},
        "threads: expected at most 4096, got 4097": {"threads": 4097},
    }.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            run(**{**good(back), **changed})
    with pytest.raises(TypeError, match="incompatible"):
        _C.expansion_norm.Calls(1, object(), (Tensor,))
