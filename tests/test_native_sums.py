# SPDX-License-Identifier: Apache-2.0
"""Sums that the kernels write before anything is added to them: from memory full of NaN the bits that zeros lead to.

Oracles are products in float64, and the same call on sums of zeros. How layers of a network share sums is in
`test_gradients` and `test_running_taps`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_native import CODES, KERNELS, LEVELS, assert_same_bits, work
from torch import Tensor, nn

import pylearngene as plg
from pylearngene import _C, _backends
from pylearngene._ops.expansion_kernels import column_sums

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: About the blocks of tokens of every kernel, and those that are summed together.
TOKENS = [1, 4, 16, 17, 255, 257, 513, 1025, 2050]
MOST = 1 << 20


def calls(classes: tuple[type, ...] = (Tensor, nn.Parameter)) -> Any:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        pytest.skip("this torch shows its tensors in another way")
    return KERNELS.Calls(1 << 17, exchange, classes)


class Given:
    """A product, and sums of its genes among those of others: gene 1 and bias gene 0 need none."""

    places, bias_places = [3, -1, 0], [-1, 2, 1]

    def __init__(self, tokens: int, rows: int, cols: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.dy, self.x = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
        self.genes = [torch.randn(rows, cols).to(dtype) for _ in range(3)]
        self.biases = [torch.randn(rows).to(dtype) for _ in range(3)]
        self.coeffs = torch.tensor([0.5, -2.0, 1.0], dtype=work(dtype))

    def zeros(self) -> list[Tensor]:
        shapes = self.genes[0].shape, self.biases[0].shape, self.biases[0].shape, self.genes[0].shape
        return [torch.zeros(shape, dtype=work(self.dtype)) for shape in shapes]

    def run(self, level: int, sums: Any, need_dx: bool = False, **changed: Any) -> Any:
        given = {**vars(self), "places": self.places, "bias_places": self.bias_places, **changed}
        dy, x, genes, biases = (given[name] for name in ("dy", "x", "genes", "biases"))
        coeffs, places, bias_places = (given[name] for name in ("coeffs", "places", "bias_places"))
        return calls().gradients(level, 2, MOST, dy, x, genes, coeffs, places, biases, bias_places, sums, need_dx)

    def exact(self) -> list[Tensor]:
        dw, db = self.dy.double().t() @ self.x.double(), self.dy.double().sum(0)
        return [dw, db, -2 * db, dw / 2]

    def size(self) -> float:
        """The largest sum of absolute values."""
        return 2 * float((self.dy.double().abs().t() @ self.x.double().abs().clamp(min=1)).max())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_sums_that_are_not_there_are_those_that_zeros_become(level: int, dtype: torch.dtype, tokens: int) -> None:
    for rows, cols in ((7, 9), (130, 70), (33, 400)):
        given = Given(tokens, rows, cols, dtype)
        made, zeros = [None] * 4, given.zeros()
        assert given.run(level, made) is True
        assert given.run(level, zeros) is True
        eps = torch.finfo(work(dtype)).eps
        for got, same, exact in zip(made, zeros, given.exact(), strict=True):
            assert_same_bits(got, same)
            assert got.is_contiguous()
            assert (got - exact).abs().max() <= eps * (tokens + 4) * given.size()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_there_is_added_to(dtype: torch.dtype) -> None:
    given = Given(5, 7, 9, dtype)
    once: list[Any] = [None] * 4
    given.run(0, once)
    twice: list[Any] = [once[0].clone(), None, None, once[3].clone()]
    kept = list(twice)
    dx = given.run(0, twice, True)
    assert_same_bits(dx, calls().input_gradient(0, 2, MOST, given.dy, given.genes, given.coeffs))
    for place in (0, 3):
        assert twice[place] is kept[place]
        torch.testing.assert_close(twice[place], 2 * once[place])
    for place in (1, 2):
        assert_same_bits(twice[place], once[place])


def test_genes_in_16_bits_have_sums_in_32() -> None:
    given = Given(5, 7, 9, torch.bfloat16)
    sums: list[Any] = [None] * 4
    assert given.run(0, sums, x=given.x.float(), dy=given.dy.float()) is True
    assert [made.dtype for made in sums] == [torch.float32] * 4


ODD: list[dict[str, Any]] = [
    {"places": [0, 1]}, {"places": (3, -1, 0)}, {"places": [4, -1, 0]}, {"places": ["3", -1, 4]},
    {"bias_places": []}, {"bias_places": [-1, 2**63, 4]}, {"biases": [torch.ones(8)] * 3},
    {"genes": [torch.ones(7, 9).to_sparse()] * 3}, {"x": None}, {"x": torch.ones(6, 9)}, {"dy": torch.ones(5, 8)},
]  # fmt: skip


@pytest.mark.parametrize("odd", range(len(ODD)))
def test_a_call_that_is_refused_leaves_no_sums(odd: int) -> None:
    sums: list[Any] = [None] * 4
    assert Given(5, 7, 9, torch.float32).run(0, sums, True, **ODD[odd]) is None
    assert sums == [None] * 4
    assert Given(5, 7, 9, torch.float32).run(0, tuple(sums), True) is None


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("wrong", [torch.ones(9, 7), torch.ones(7, 9).double(), torch.ones(9, 7).t(), 5])
def test_odd_sums_are_refused(place: int, wrong: Any) -> None:
    sums: list[Any] = [None] * 4
    sums[place] = wrong
    assert Given(5, 7, 9, torch.float32).run(0, sums, True) is None
    assert [item is None for item in sums] == [k != place for k in range(4)]


def test_without_memory_for_one_sum_there_is_none() -> None:
    asked: list[tuple[int, ...]] = []

    class Full(Tensor):
        def new_empty(self, *sizes: int) -> Tensor:
            asked.append(sizes)
            if len(asked) == 3:
                raise MemoryError
            return torch.empty(*sizes)

    given = Given(5, 7, 9, torch.float32)
    sums: list[Any] = [None] * 4
    arguments = (given.coeffs, given.places, given.biases, given.bias_places, sums, False)
    with pytest.raises(MemoryError):
        calls((Full, Tensor)).gradients(0, 1, MOST, given.dy, given.x, given.genes, *arguments)
    assert asked == [(7, 9), (7, 9), (7,)]
    assert sums == [None] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_column_sums(level: int, dtype: torch.dtype) -> None:
    eps = torch.finfo(work(dtype)).eps
    for tokens in (0, 1, 3, 256, 257, 1000):
        for rows in (1, 7, 16, 33, 130, 300):
            dy = torch.randn(tokens, rows + 3).to(dtype)[:, :rows]
            for threads in (1, 2):
                sums = torch.full((rows + 2,), 3.0, dtype=work(dtype))
                inside = sums[1:-1].data_ptr()
                KERNELS.column_sums(level, threads, inside, dy.data_ptr(), CODES[dtype], tokens, rows, rows + 3)
                bound = eps * (tokens + 1) * dy.double().abs().sum(0).max() if tokens else 0
                assert (sums[1:-1] - dy.double().sum(0)).abs().max() <= bound
                assert (sums[0], sums[-1]) == (3, 3), "written outside of the sums"


def test_refusals_of_column_sums() -> None:
    good = {"level": 0, "threads": 1, "sums": 8, "dy": 8, "dy_dtype": 0, "M": 0, "O": 0, "dy_row_stride": 0}
    KERNELS.column_sums(**good)
    for name, value, message in (
        ("level", -1, f"expected 0 to {len(_C.levels()) - 1}, got -1"),
        ("threads", 0, "expected at least 1, got 0"),
        ("dy_dtype", 4, "expected 0 to 3, got 4"),
        ("M", -1, "expected at least 0, got -1"),
        ("O", 2**57, r"expected less than 2\^57, got 144115188075855872"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}$"):
            KERNELS.column_sums(**{**good, name: value})
    for name in ("sums", "dy"):
        with pytest.raises(ValueError, match=f"^{name}: expected an address, got 0$"):
            KERNELS.column_sums(**{**good, "M": 1, "O": 1, name: 0})
    with pytest.raises(ValueError, match=r"^dy: expected strides of at least 0, got -1$"):
        KERNELS.column_sums(**{**good, "M": 2, "O": 1, "dy_row_stride": -1})


TWELVE = torch.arange(12.0)


@pytest.mark.parametrize("dy", [TWELVE.view(2, 6)[:, ::2], TWELVE.view(3, 4).t(), TWELVE[:3].expand(4, 3)])
def test_column_sums_of_any_strides(dy: Tensor) -> None:
    assert column_sums(dy).tolist() == [sum(column) for column in dy.t().tolist()]
    assert column_sums(dy[:0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("long_first", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_layers_on_the_long_way_add_to_what_others_wrote(long_first: bool, rounds: int) -> None:
    if _backends.native() is None:
        pytest.skip("there is one way alone")
    bank = plg.nn.GeneBank()
    layers = [
        plg.nn.ExpansionLinear(9, 9, bank=bank, name="fc", coeffs=[1.0, 0.5], learn_coeffs=learn)
        for learn in (long_first, not long_first, long_first)
    ]
    x = torch.randn(4, 9)

    def through(functions: Any) -> Tensor:
        y = x
        for function in functions:
            y = torch.tanh(function(y))
        return y.square().sum()

    genes = list(bank.parameters())
    for _ in range(rounds):
        found = torch.autograd.grad(through(layers), genes)
    group = bank.group("fc")
    plain = [
        lambda y, c=layer.coeffs: nn.functional.linear(
            y,
            c[0] * group.weights()[0] + c[1] * group.weights()[1],
            c[0] * group.biases()[0] + c[1] * group.biases()[1],
        )
        for layer in layers
    ]
    for got, want in zip(found, torch.autograd.grad(through(plain), genes), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tracers_see_the_sum_of_a_plain_bias() -> None:
    genes = [torch.randn(3, 4) for _ in range(2)]

    def gradient(bias: Tensor, dy: Tensor) -> Tensor:
        y = plg.functional.expansion_linear(torch.ones(2, 4), genes, torch.ones(2), bias)
        return torch.autograd.grad(y, bias, dy)[0]

    bias, dy = torch.randn(3, requires_grad=True), torch.randn(2, 3)
    traced = torch.fx.experimental.proxy_tensor.make_fx(gradient)(bias, dy)
    other = torch.randn(2, 3)
    torch.testing.assert_close(traced(bias, other), other.sum(0))
    torch.testing.assert_close(gradient(bias, other), other.sum(0))


@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
def test_compiled_graphs_have_gradients_of_a_plain_bias(batch: tuple[int, ...]) -> None:
    genes, bias, dy = [torch.randn(3, 4) for _ in range(2)], torch.randn(3, requires_grad=True), torch.randn(*batch, 3)

    def product(bias: Tensor) -> Tensor:
        return plg.functional.expansion_linear(torch.ones(*batch, 4), genes, torch.ones(2), bias)

    y = torch.compile(product, backend="aot_eager", fullgraph=True)(bias)
    torch.testing.assert_close(torch.autograd.grad(y, bias, dy)[0], dy.reshape(-1, 3).sum(0))


def test_coefficients_of_weights_without_columns_get_zeros() -> None:
    coeffs = torch.ones(2, requires_grad=True)
    genes = [torch.ones(24, 0, dtype=torch.bfloat16) for _ in range(2)]
    plg.functional.expansion_linear(torch.ones(40, 0, dtype=torch.bfloat16), genes, coeffs).sum().backward()
    assert coeffs.grad is not None
    assert coeffs.grad.tolist() == [0, 0]
