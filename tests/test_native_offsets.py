# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of `expansion` on memory that lies anyhow: any offset, to the byte, odd strides, distant rows.

Oracle: the same kernel on matrices that lie one after another, which `test_native` checks; the same bits are wanted.
Bytes around every matrix are marked, those of inputs as well.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_native import CODES, KERNELS, LEVELS, PAIRS, assert_same_bits, work
from torch import Tensor

import pylearngene as plg
from pylearngene import _C

MARK = 0xA5
ROWS, COLS, COUNT = 5, 61, 3


class Placed:
    """A matrix that starts `lead` bytes into its memory, with `gap` elements between its rows, perhaps transposed."""

    def __init__(self, values: Tensor, lead: int, gap: int, transposed: bool = False) -> None:
        lying = values.t().contiguous() if transposed else values.contiguous()
        (rows, cols), size = lying.shape, values.element_size()
        self.dtype, self.shape, self.transposed = values.dtype, values.shape, transposed
        self.stride = cols + gap
        self.strides = (1, self.stride) if transposed else (self.stride, 1)
        self.memory = torch.full((64 + lead + rows * self.stride * size,), MARK, dtype=torch.uint8)
        self.bytes = self.memory.as_strided((rows, cols * size), (self.stride * size, 1), lead)
        self.bytes.copy_(lying.view(torch.uint8).view(rows, cols * size))
        self.address = self.memory.data_ptr() + lead
        self.triple = (self.address, *self.strides)

    def values(self) -> Tensor:
        """The matrix, once nothing around it has been written."""
        found = self.bytes.clone(memory_format=torch.contiguous_format).view(self.dtype)
        self.bytes.fill_(MARK)
        assert (self.memory == MARK).all(), "written outside of the matrix"
        return found.t() if self.transposed else found


Place = Callable[..., Placed]


def results(
    level: int, dtype: torch.dtype, gene_dtype: torch.dtype, tokens: int, place: Place, flipped: bool
) -> list[Tensor]:
    """What every kernel computes from the same values, placed by `place`; `flipped` genes lie transposed."""
    torch.manual_seed(0)
    wide = work(gene_dtype)

    def made(*shape: int, kind: torch.dtype = wide, transposed: bool = False) -> Placed:
        return place(torch.randn(*shape, dtype=torch.float64).to(kind), transposed=transposed)

    genes = [made(ROWS, COLS, kind=gene_dtype, transposed=flipped and k != 1) for k in range(COUNT)]
    bias_genes = [made(ROWS, 1, kind=gene_dtype) for _ in range(COUNT)]
    x, dy, dw = made(tokens, COLS, kind=dtype), made(tokens, ROWS, kind=dtype), made(ROWS, COLS, kind=dtype)
    coeffs, bias, layers = made(1, COUNT), made(1, ROWS, kind=dtype), place(torch.ones(1, 2 * COUNT, dtype=wide))
    outs = [made(ROWS, COLS, kind=dtype), *(made(tokens, ROWS, kind=dtype) for _ in range(2))]
    dx, stack = made(tokens, COLS, kind=dtype), [made(ROWS, COLS, kind=dtype) for _ in range(2)]
    sums = [[made(ROWS, COLS) for _ in range(COUNT)] for _ in range(2)]
    dots = [place(torch.zeros(ROWS, COUNT, dtype=torch.float64), gap=0) for _ in range(2)]
    x_code, start = CODES[dtype], (level, 2)
    ends = ([gene.triple for gene in genes], CODES[gene_dtype], coeffs.address)
    sizes = (tokens, COLS, ROWS)

    KERNELS.synthesize(*start, outs[0].address, x_code, ROWS, COLS, outs[0].stride, *ends)
    kinds = (bias.address, [], x_code), (0, [b.triple for b in bias_genes], CODES[gene_dtype])
    for y, kind in zip(outs[1:], kinds, strict=True):
        KERNELS.rows_forward(*start, y.address, x.address, x_code, *sizes, x.stride, y.stride, *ends, *kind)
    KERNELS.rows_dx(*start, dx.address, dy.address, x_code, *sizes, dy.stride, dx.stride, *ends)
    grads = [([(s.address, s.stride) for s in some], d.address) for some, d in zip(sums, dots, strict=True)]
    KERNELS.accumulate(*start, dw.address, x_code, ROWS, COLS, dw.stride, *ends, *grads[0])
    KERNELS.rows_wgrad(*start, dy.address, x.address, x_code, *sizes, dy.stride, x.stride, *ends, *grads[1])
    if not flipped:
        places = [(out.address, out.stride) for out in stack]
        KERNELS.synthesize_stack(*start, places, x_code, ROWS, COLS, False, *ends[:2], layers.address)
    inputs = [*genes, *bias_genes, x, dy, dw, coeffs, bias, layers]
    ready = (*outs, dx, *sums[0], *sums[1], *dots, *inputs, *([] if flipped else stack))
    return [placed.values() for placed in ready]


@pytest.mark.parametrize("level", LEVELS, ids=[_C.levels()[level] for level in LEVELS])
@pytest.mark.parametrize(("dtype", "gene_dtype"), PAIRS, ids=[f"{str(x)[6:]}-{str(g)[6:]}" for x, g in PAIRS])
@pytest.mark.parametrize(("tokens", "flipped"), [(3, False), (3, True), (19, True)])
def test_any_offset_and_stride(
    level: int, dtype: torch.dtype, gene_dtype: torch.dtype, tokens: int, flipped: bool
) -> None:
    def at(lead: int, between: int) -> Place:
        return lambda values, gap=between, **options: Placed(values, lead, gap, **options)

    expected = results(level, dtype, gene_dtype, tokens, at(0, 0), False)
    for lead in (1, *(n * gene_dtype.itemsize for n in (1, 3, 5, 7))):  # in bytes
        for got, wanted in zip(
            results(level, dtype, gene_dtype, tokens, at(lead, 3), flipped), expected, strict=not flipped
        ):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("level", LEVELS, ids=[_C.levels()[level] for level in LEVELS])
@pytest.mark.parametrize("stride", [-(2**63), -1, 0, 2**62, 2**63 - 1])
def test_strides_of_axes_with_one_index_say_nothing(level: int, stride: int) -> None:
    """torch lets them be anything; kernels look ahead by them and go on by them."""
    place = Placed(torch.arange(COLS)[None].float(), 0, 0)
    coeffs, x = torch.full((1,), 2.0), torch.ones(1, COLS)
    out, y, dx = torch.zeros(1, COLS), torch.zeros(1, 1), torch.zeros(1, COLS)
    buffer, dots = torch.ones(1, COLS), torch.zeros(1, 1, dtype=torch.float64)
    ends = ([(place.address, stride, 1)], 0, coeffs.data_ptr())
    KERNELS.synthesize(level, 1, out.data_ptr(), 0, 1, COLS, stride, *ends)
    assert torch.equal(out, 2.0 * torch.arange(COLS)[None])
    KERNELS.rows_forward(level, 1, y.data_ptr(), x.data_ptr(), 0, 1, COLS, 1, stride, stride, *ends, 0, [], 0)
    assert y.item() == 2 * sum(range(COLS))
    KERNELS.rows_dx(level, 1, dx.data_ptr(), coeffs.data_ptr(), 0, 1, COLS, 1, stride, stride, *ends)
    assert torch.equal(dx, 2 * out)
    grads = ([(buffer.data_ptr(), stride)], dots.data_ptr())
    KERNELS.rows_wgrad(level, 1, coeffs.data_ptr(), x.data_ptr(), 0, 1, COLS, 1, stride, stride, *ends, *grads)
    assert torch.equal(buffer, torch.full((1, COLS), 5.0))
    KERNELS.accumulate(level, 1, x.data_ptr(), 0, 1, COLS, stride, *ends, *grads)
    assert torch.equal(buffer, torch.full((1, COLS), 7.0))
    column = Placed(torch.arange(4.0)[:, None], 0, 2)
    KERNELS.synthesize(
        level, 1, out.data_ptr(), 0, 4, 1, 3, [(column.address, column.stride, stride)], 0, coeffs.data_ptr()
    )
    assert out[0, :12:3].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_public_function_on_tensors_between_elements(tokens: int) -> None:
    """`torch.frombuffer` makes such tensors, and torch computes with them."""

    def misaligned(values: Tensor) -> Tensor:
        memory = bytearray(values.numel() * values.element_size() + 1)
        return torch.frombuffer(memory, dtype=values.dtype, offset=1).view(values.shape).copy_(values)

    x, genes, coeffs = torch.randn(tokens, COLS), [torch.randn(ROWS, COLS) for _ in range(COUNT)], torch.randn(COUNT)
    bias, dy = torch.randn(ROWS), torch.randn(tokens, ROWS)
    found = []
    for change in (lambda tensor: tensor.clone(), misaligned):
        leaves = [change(tensor).requires_grad_() for tensor in (x, *genes, coeffs, bias)]
        y = plg.functional.expansion_linear(leaves[0], leaves[1:-2], leaves[-2], leaves[-1])
        found.append((y.detach(), *torch.autograd.grad(y, leaves, change(dy))))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected)
