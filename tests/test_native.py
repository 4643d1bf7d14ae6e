# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of `expansion`, called with addresses as the operators do, on every level this machine has.

Oracles: float64 torch for products, exact fractions for the fused multiply-add, torch's conversions for rounding.
Gradients through autograd and the layers are tested with the operators.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from pylearngene import _C

KERNELS = _C.expansion
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LEVELS = [_C.levels().index(name) for name in _C.supported_levels()]
LOW = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(torch.float64, torch.float64), *itertools.product(LOW, LOW)]  # (dtype of x, dtype of genes)
SHAPES = [(1, 1, 1), (1, 5, 7), (3, 4, 16), (4, 8, 513), (5, 13, 61), (33, 6, 40), (70, 9, 1030)]  # M, O, I
SENTINEL = 77.0

per_level = pytest.mark.parametrize("level", LEVELS, ids=[_C.levels()[level] for level in LEVELS])
per_pair = pytest.mark.parametrize(("dtype", "gene_dtype"), PAIRS, ids=[f"{str(x)[6:]}-{str(g)[6:]}" for x, g in PAIRS])


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Guarded:
    """A matrix inside a larger allocation filled with a sentinel, at an offset and with gaps between its rows."""

    rows: int
    cols: int
    dtype: torch.dtype
    offset: int = 3
    gap: int = 5
    fill: float = float("nan")

    def __post_init__(self) -> None:
        stride = self.cols + self.gap
        self.memory = torch.full((self.offset + self.rows * stride + 64,), SENTINEL, dtype=self.dtype)
        self.view = self.memory.as_strided((self.rows, self.cols), (stride, 1), self.offset)
        self.view.fill_(self.fill)

    def result(self) -> torch.Tensor:
        outside = torch.ones_like(self.memory, dtype=torch.bool)
        outside.as_strided(self.view.shape, self.view.stride(), self.offset).fill_(False)
        assert (self.memory[outside] == SENTINEL).all(), "written outside of the output"
        return self.view.clone()


@dataclass
class Genes:
    """K genes with their coefficients, and the two ways to see them: as arguments and as exact values."""

    matrices: list[torch.Tensor]
    coeffs: torch.Tensor

    @classmethod
    def random(cls, count: int, rows: int, cols: int, dtype: torch.dtype) -> Genes:
        matrices = [torch.randn(rows, cols, dtype=torch.float64).to(dtype) for _ in range(count)]
        return cls(matrices, torch.randn(count, dtype=torch.float64).to(work(dtype)))

    @property
    def args(self) -> tuple[list[tuple[int, int, int]], int, int]:
        triples = [(g.data_ptr(), g.stride(0), g.stride(1)) for g in self.matrices]
        return triples, CODES[self.matrices[0].dtype], self.coeffs.data_ptr()

    def exact(self) -> torch.Tensor:
        return sum((c.double() * g.double() for c, g in zip(self.coeffs, self.matrices, strict=True)), start=0)


def synthesize(level: int, genes: Genes, dtype: torch.dtype, threads: int = 1, offset: int = 3) -> torch.Tensor:
    rows, cols = genes.matrices[0].shape
    out = Guarded(rows, cols, dtype, offset)
    KERNELS.synthesize(level, threads, out.view.data_ptr(), CODES[dtype], rows, cols, out.view.stride(0), *genes.args)
    return out.result()


def rows_forward(
    level: int, x: torch.Tensor, genes: Genes, bias: torch.Tensor | Genes | None = None, threads: int = 1
) -> torch.Tensor:
    (tokens, cols), rows = x.shape, genes.matrices[0].shape[0]
    out = Guarded(tokens, rows, x.dtype)
    plain, bias_genes, bias_dtype = 0, [], x.dtype
    if isinstance(bias, torch.Tensor):
        plain, bias_dtype = bias.data_ptr(), bias.dtype
    elif bias is not None:
        bias_genes = [(b.data_ptr(), b.stride(0), 0) for b in bias.matrices]
        bias_dtype = bias.matrices[0].dtype
    y = out.view
    sizes = (tokens, cols, rows, x.stride(0), y.stride(0))
    ends = (plain, bias_genes, CODES[bias_dtype])
    KERNELS.rows_forward(level, threads, y.data_ptr(), x.data_ptr(), CODES[x.dtype], *sizes, *genes.args, *ends)
    return out.result()


def rows_dx(level: int, dy: torch.Tensor, genes: Genes, threads: int = 1) -> torch.Tensor:
    tokens, (rows, cols) = dy.shape[0], genes.matrices[0].shape
    out = Guarded(tokens, cols, dy.dtype)
    sizes = (tokens, cols, rows, dy.stride(0), out.view.stride(0))
    KERNELS.rows_dx(level, threads, out.view.data_ptr(), dy.data_ptr(), CODES[dy.dtype], *sizes, *genes.args)
    return out.result()


def gene_grads(
    level: int, genes: Genes, dw: torch.Tensor | tuple[torch.Tensor, torch.Tensor], skip: int = -1, threads: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`accumulate` for a panel dW, `rows_wgrad` for a pair (dy, x); buffers start at 1, gene `skip` has none."""
    count, (rows, cols) = len(genes.matrices), genes.matrices[0].shape
    buffers = [Guarded(rows, cols, work(genes.matrices[0].dtype), fill=1.0) for _ in range(count)]
    dots = Guarded(rows, count, torch.float64, gap=0)
    pairs = [(0 if k == skip else b.view.data_ptr(), b.view.stride(0)) for k, b in enumerate(buffers)]
    ends = (*genes.args, pairs, dots.view.data_ptr())
    if isinstance(dw, tuple):
        dy, x = dw
        sizes = (dy.shape[0], cols, rows, dy.stride(0), x.stride(0))
        KERNELS.rows_wgrad(level, threads, dy.data_ptr(), x.data_ptr(), CODES[x.dtype], *sizes, *ends)
    else:
        KERNELS.accumulate(level, threads, dw.data_ptr(), CODES[dw.dtype], rows, cols, dw.stride(0), *ends)
    return [buffer.result() for buffer in buffers], dots.result()


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(bits(a), bits(b))


def assert_close(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, terms: int) -> None:
    """|got - exact| within one rounding of the result and `terms` roundings of a sum whose terms add up to `size`."""
    error = torch.finfo(work(got.dtype)).eps * (terms + 4) * size + torch.finfo(got.dtype).eps * exact.abs()
    assert got.isfinite().all()
    assert ((got.double() - exact).abs() <= error + torch.finfo(got.dtype).tiny).all()


def product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a b, and the sum of its terms' sizes."""
    return a.double() @ b.double(), a.double().abs() @ b.double().abs()


def test_levels() -> None:
    assert _C.levels()[0] == "DEFAULT"
    assert set(_C.supported_levels()) <= set(_C.levels())
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability not in ("AVX2", "AVX512") or capability in _C.supported_levels()


@per_level
@per_pair
@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_synthesize(level: int, dtype: torch.dtype, gene_dtype: torch.dtype, count: int) -> None:
    for rows, cols in [(1, 1), (2, 3), (5, 61), (9, 513), (3, 4099)]:
        genes = Genes.random(count, rows, cols, gene_dtype)
        size = sum(c.double().abs() * g.double().abs() for c, g in zip(genes.coeffs, genes.matrices, strict=True))
        assert_close(synthesize(level, genes, dtype), genes.exact(), size, count)


@per_pair
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_level_gives_the_same_bits(dtype: torch.dtype, gene_dtype: torch.dtype, count: int) -> None:
    """Random bit patterns: denormals, infinities and NaN with all their payloads are among them, or all there is."""
    shape, size = (37, 1003), torch.finfo(gene_dtype).bits // 8
    ints = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *shape, size), dtype=np.uint8))
    plain = Genes.random(count, *shape, gene_dtype)
    tiny = Genes([g * torch.finfo(gene_dtype).tiny for g in plain.matrices], plain.coeffs)
    wild = Genes([ints[k].view(gene_dtype)[..., 0] for k in range(count)], plain.coeffs)
    huge = Genes(plain.matrices, plain.coeffs * (torch.finfo(dtype).max / 3))
    exponent = bits(torch.tensor(torch.inf, dtype=gene_dtype))
    no_number = Genes([(bits(g) | exponent).view(gene_dtype) for g in wild.matrices], plain.coeffs)
    for genes in (plain, tiny, wild, huge, no_number):
        first = synthesize(LEVELS[0], genes, dtype)
        assert bits(first[first.isnan()]).unique().numel() <= 1  # every NaN is stored as the same one
        for level in LEVELS[1:]:
            assert_same_bits(synthesize(level, genes, dtype), first)


def nearest(value: Fraction, digits: int, lowest: int) -> float:
    """The number of `digits` binary digits nearest to a fraction, ties to even, a multiple of 2**lowest."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, lowest)
    return float(round(value / unit) * unit)  # round() of a fraction goes to even


@per_level
@pytest.mark.parametrize(("dtype", "digits", "lowest"), [(torch.float32, 24, -149), (torch.float64, 53, -1074)])
def test_fma_rounds_once(level: int, dtype: torch.dtype, digits: int, lowest: int) -> None:
    """Sums a hair beside the midpoint of two neighbours, where two roundings give another answer than one."""
    eps, rng = 2.0 ** (1 - digits), np.random.default_rng(1)
    odd = [1 + eps * n for n in (0, 1, 2, 3, 5, 1 << 10, 1 << 20)] + [1 - eps / 2, 1 - eps]
    wrong_if_rounded_twice = 0
    for first, scale in itertools.product(odd, (1.0, 2.0 ** (lowest + digits))):
        b = np.array([sign * s * eps / 2 * scale for s in odd for sign in (1, -1)] * 4)
        c = np.array([1 + eps * rng.integers(0, 8) for _ in b]) * scale
        genes = Genes([torch.tensor(c[None], dtype=dtype), torch.tensor(b[None], dtype=dtype)], torch.ones(2))
        genes.coeffs = torch.tensor([1.0, first], dtype=dtype)
        got = synthesize(level, genes, dtype)[0]
        g0, g1 = (g[0].tolist() for g in genes.matrices)
        a = genes.coeffs.tolist()[1]
        exact = [nearest(Fraction(x) + Fraction(a) * Fraction(y), digits, lowest) for x, y in zip(g0, g1, strict=True)]
        assert got.tolist() == exact
        twice = genes.matrices[0][0] + genes.coeffs[1] * genes.matrices[1][0]
        wrong_if_rounded_twice += int((twice.double() != torch.tensor(exact, dtype=torch.float64)).sum())
    assert wrong_if_rounded_twice > 20  # the inputs do tell a fused from an unfused sum


@per_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_midpoint(level: int, dtype: torch.dtype) -> None:
    """Every 16-bit number, the midpoint to the next, and the floats just beside both."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    points = torch.cat(
        [finite, (finite[1:] + finite[:-1]) / 2, every[~every.isfinite()], torch.tensor([3.4e38, 65520])]
    )
    points = torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(-torch.inf))])
    got = synthesize(level, Genes([points[None]], torch.ones(1)), dtype)[0]
    nan = points.isnan()
    assert torch.equal(got.isnan(), nan)
    assert_same_bits(got[~nan], points[~nan].to(dtype))


@per_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reading_of_every_number(level: int, dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)[None]
    got = synthesize(level, Genes([every], torch.ones(1)), torch.float32)
    nan = every.isnan()
    assert torch.equal(got.isnan(), nan)
    assert_same_bits(got[~nan], every[~nan].float())


@per_level
@per_pair
@pytest.mark.parametrize("bias", ["none", "plain", "genes"])
def test_rows_forward(level: int, dtype: torch.dtype, gene_dtype: torch.dtype, bias: str) -> None:
    for tokens, rows, cols in SHAPES:
        genes = Genes.random(3, rows, cols, gene_dtype)
        x = torch.randn(tokens, cols + 2).to(dtype)[:, 1:-1]
        exact, size = product(x, synthesize(level, genes, dtype).T)
        argument: torch.Tensor | Genes | None = None
        if bias == "plain":
            argument = torch.randn(rows).to(gene_dtype)
            exact = exact + argument.double()
        elif bias == "genes":
            argument = Genes([torch.randn(rows, 2).to(gene_dtype)[:, 0] for _ in range(3)], genes.coeffs)
            exact = exact + argument.exact()
        assert_close(rows_forward(level, x, genes, argument), exact, size + 10, cols)


@per_level
@per_pair
def test_rows_dx(level: int, dtype: torch.dtype, gene_dtype: torch.dtype) -> None:
    for tokens, rows, cols in SHAPES:
        genes = Genes.random(2, rows, cols, gene_dtype)
        dy = torch.randn(tokens, rows + 2).to(dtype)[:, 1:-1]
        assert_close(rows_dx(level, dy, genes), *product(dy, synthesize(level, genes, dtype)), rows)


@per_level
@per_pair
@pytest.mark.parametrize("kernel", ["accumulate", "rows_wgrad"])
def test_gene_gradients(level: int, dtype: torch.dtype, gene_dtype: torch.dtype, kernel: str) -> None:
    for tokens, rows, cols in SHAPES:
        genes = Genes.random(3, rows, cols, gene_dtype)
        dy, x = torch.randn(tokens, rows + 1).to(dtype)[:, 1:], torch.randn(tokens, cols + 3).to(dtype)[:, 3:]
        (exact, size), dw = product(dy.T, x), (dy, x)
        if kernel == "accumulate":
            dw = exact.to(dtype)
            exact, size = dw.double(), dw.double().abs()
        buffers, dots = gene_grads(level, genes, dw, skip=1)
        assert (buffers[1] == 1).all()
        for k in (0, 2):
            c = genes.coeffs[k].double()
            assert_close(buffers[k], 1 + c * exact, 1 + c.abs() * size, tokens)
        for k, gene in enumerate(genes.matrices):
            eps = torch.finfo(torch.float64).eps * cols
            if kernel == "rows_wgrad":  # dW itself is rounded to the work dtype
                eps += torch.finfo(work(dtype)).eps * (tokens + 4)
            error = (dots[:, k] - (exact * gene.double()).sum(1)).abs()
            assert (error <= eps * (size * gene.double().abs()).sum(1)).all()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "both_strided": lambda g: g.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "gaps": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "one_row_for_all": lambda g: g[:1].expand_as(g),
    "one_value": lambda g: g[:1, :1].expand_as(g),
}


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
def test_layout_of_genes_changes_nothing(level: int, dtype: torch.dtype, layout: str) -> None:
    for rows, cols, tokens in [(1, 7, 2), (6, 1, 1), (18, 133, 3), (7, 1100, 9)]:
        plain = Genes.random(4, rows, cols, dtype).matrices
        names = list(LAYOUTS) if layout == "mixed" else [layout] * 4
        moved = [LAYOUTS[name](g) for name, g in zip(names, plain, strict=False)]
        coeffs = torch.randn(4, dtype=torch.float64).to(work(dtype))
        a, b = Genes(moved, coeffs), Genes([g.contiguous() for g in moved], coeffs)
        x, dy = torch.randn(tokens, cols).to(dtype), torch.randn(tokens, rows).to(dtype)
        assert_same_bits(synthesize(level, a, dtype), synthesize(level, b, dtype))
        assert_same_bits(rows_forward(level, x, a), rows_forward(level, x, b))
        assert_same_bits(rows_dx(level, dy, a), rows_dx(level, dy, b))
        for got, expected in zip(gene_grads(level, a, (dy, x)), gene_grads(level, b, (dy, x)), strict=True):
            assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("offset", range(1, 8))
def test_any_offset(level: int, dtype: torch.dtype, offset: int) -> None:
    genes = Genes.random(2, 3, 50, dtype)
    moved = [torch.cat([g.new_zeros(offset), g.flatten()])[offset:].view(3, 50) for g in genes.matrices]
    expected, got = synthesize(level, genes, dtype), synthesize(level, Genes(moved, genes.coeffs), dtype, offset=offset)
    assert_same_bits(got, expected)


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_thread_count_changes_nothing(level: int, dtype: torch.dtype) -> None:
    for tokens, rows, cols in [(3, 50, 70), (9, 21, 5000)]:
        genes = Genes.random(3, rows, cols, dtype)
        x, dy, dw = (torch.randn(*shape).to(dtype) for shape in ((tokens, cols), (tokens, rows), (rows, cols)))
        for kernel in (synthesize, rows_forward, rows_dx):
            first = {synthesize: (genes, dtype), rows_forward: (x, genes), rows_dx: (dy, genes)}[kernel]
            assert_same_bits(kernel(level, *first, threads=2), kernel(level, *first))
        for given in ((dy, x), dw):
            (buffers, dots), (buffers_1, dots_1) = (gene_grads(level, genes, given, threads=n) for n in (2, 1))
            for a, b in zip([*buffers, dots], [*buffers_1, dots_1], strict=True):
                assert_same_bits(a, b)


@per_level
def test_empty_sizes(level: int) -> None:
    genes = Genes([torch.empty(0, 5)] * 2, torch.ones(2))
    assert synthesize(level, genes, torch.float32).shape == (0, 5)
    assert rows_forward(level, torch.randn(3, 5), genes).shape == (3, 0)
    assert (rows_dx(level, torch.empty(3, 0), genes) == 0).all()  # an empty sum
    genes = Genes([torch.empty(4, 0)] * 2, torch.ones(2))
    assert synthesize(level, genes, torch.float32).shape == (4, 0)
    bias = torch.randn(4)
    assert torch.equal(rows_forward(level, torch.empty(3, 0), genes, bias), bias.expand(3, 4))
    assert rows_dx(level, torch.randn(3, 4), genes, threads=2).shape == (3, 0)
    assert (gene_grads(level, genes, (torch.randn(3, 4), torch.empty(3, 0)))[1] == 0).all()
    genes = Genes.random(2, 4, 5, torch.float32)
    assert rows_forward(level, torch.empty(0, 5), genes).shape == (0, 4)
    buffers, dots = gene_grads(level, genes, (torch.empty(0, 4), torch.empty(0, 5)))
    assert (dots == 0).all()
    assert all((b == 1).all() for b in buffers)


@per_level
def test_infinite_coefficient_does_not_reach_past_the_last_column(level: int) -> None:
    genes = Genes([torch.ones(4, 19)], torch.tensor([torch.inf]))
    for tokens in (2, 9):
        assert (rows_forward(level, torch.ones(tokens, 19), genes) == torch.inf).all()


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_infinite_gradient_does_not_reach_past_the_last_column(level: int, dtype: torch.dtype) -> None:
    genes = Genes([torch.ones(3, 19, dtype=dtype)], torch.ones(1, dtype=work(dtype)))
    for tokens in (1, 9, 17):
        dy = torch.ones(tokens, 3, dtype=dtype)
        dy[0, 1] = torch.inf
        (buffer,), dots = gene_grads(level, genes, (dy, torch.ones(tokens, 19, dtype=dtype)))
        assert (buffer[1] == torch.inf).all()
        assert dots[:, 0].tolist() == [19 * tokens, torch.inf, 19 * tokens]


@per_level
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("layout", ["gaps", "transposed"])
def test_a_stack_of_half_a_mebibyte_is_enough(level: int, dtype: torch.dtype, layout: str) -> None:
    """As threads have on some systems; a smaller one ends the process."""
    tokens, rows, cols = 200, 9, 600
    genes = Genes.random(8, rows, cols, dtype)
    genes.matrices = [LAYOUTS[layout](gene) for gene in genes.matrices]
    bias = Genes([torch.randn(rows, 1).to(dtype) for _ in range(8)], genes.coeffs)
    x, dy, done = torch.randn(tokens, cols).to(dtype), torch.randn(tokens, rows).to(dtype), []
    before = threading.stack_size(512 << 10)
    try:
        for call in (
            lambda: synthesize(level, genes, dtype),
            lambda: rows_forward(level, x, genes, bias),
            lambda: rows_dx(level, dy, genes),
            lambda: gene_grads(level, genes, (dy, x)),
            lambda: gene_grads(level, genes, genes.matrices[0]),
        ):
            thread = threading.Thread(target=lambda call=call: done.append(call()))
            thread.start()
            thread.join()
    finally:
        threading.stack_size(before)
    assert len(done) == 5


@per_level
def test_more_than_two_to_the_31_elements(level: int) -> None:
    """Two rows, 2**31 + 8 elements apart: memory that is never touched costs nothing."""
    stride = 2**31 + 8
    memory = torch.from_numpy(np.empty(stride + 16, dtype=np.int16)).view(torch.bfloat16)
    rows, genes = memory.as_strided((2, 16), (stride, 1)), Genes.random(2, 2, 16, torch.bfloat16)
    KERNELS.synthesize(level, 1, rows.data_ptr(), 2, 2, 16, stride, *genes.args)
    assert_same_bits(rows.clone(), synthesize(level, genes, torch.bfloat16))
    assert_same_bits(synthesize(level, Genes([rows], torch.ones(1)), torch.bfloat16), rows.clone())
