# SPDX-License-Identifier: Apache-2.0
"""The Triton launchers of `expansion` on memory at any offset and with odd strides: on a GPU, or in the interpreter.

Oracle: the same launch on contiguous tensors, which `test_expansion_triton` checks; the same bits are wanted. NaN
surrounds inputs and marks surround results, so that neither a read nor a write outside can pass.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

triton: Any = pytest.importorskip("triton")
tl: Any = importlib.import_module("triton.language")
tiles: Any = importlib.import_module("pylearngene.triton_kernels._tiles")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARK = 77.0
TOKENS, OUT, INNER, COUNT = 19, 37, 41, 2


class Memory:
    """Makes tensors that start at an offset, with gaps between rows, and knows whether what is around them changed."""

    def __init__(self, offset: int, gap: int) -> None:
        self.offset, self.gap = offset, gap
        self.results: list[tuple[Tensor, Tensor]] = []

    def put(self, values: Tensor, gap: int | None = None, around: float = float("nan")) -> Tensor:
        gap = self.gap if gap is None else gap
        rows, stride = values.numel() // values.shape[-1], values.shape[-1] + gap
        whole = torch.full((self.offset + rows * stride + 64,), around, dtype=values.dtype, device=DEVICE)
        strides = (stride, 1) if values.dim() == 2 else (1,)
        inside = whole.as_strided(values.shape, strides, self.offset)
        if around == MARK:
            self.results.append((whole, inside))
        return inside.copy_(values)

    def result(self, rows: int, cols: int, dtype: torch.dtype, value: float = float("nan")) -> Tensor:
        return self.put(torch.full((rows, cols), value, dtype=dtype, device=DEVICE), 0, MARK)

    def untouched(self) -> bool:
        for whole, inside in self.results:
            outside = torch.ones_like(whole, dtype=torch.bool)
            outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(False)
            if not bool((whole[outside] == MARK).all()):
                return False
        return True


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).div(4).to(DEVICE, dtype)


def run(dtype: torch.dtype, memory: Memory) -> list[Tensor]:
    """Every launcher on the same values."""
    torch.manual_seed(0)
    genes = [memory.put(draw(OUT, INNER, dtype=dtype)) for _ in range(COUNT)]
    genes[1] = memory.put(draw(INNER, OUT, dtype=dtype)).t()
    coeffs, bias = (memory.put(draw(n, dtype=kind)) for n, kind in ((COUNT, torch.float32), (OUT, dtype)))
    x, dy = memory.put(draw(TOKENS, INNER, dtype=dtype)), memory.put(draw(TOKENS, OUT, dtype=dtype))
    panel = memory.put(draw(11, INNER, dtype=torch.float32))
    w, y, dx = (memory.result(*size, dtype) for size in ((OUT, INNER), (TOKENS, OUT), (TOKENS, INNER)))
    sums = [memory.result(OUT, INNER, torch.float32, 1.0) for _ in range(2 * COUNT)]
    launchers.fill(w, genes, coeffs)
    launchers.product(y, x, genes, coeffs, bias, (), "relu")
    launchers.product(dx, dy, [gene.t() for gene in genes], coeffs)
    dots = [
        launchers.gene_gradients(sums[:COUNT], dy, x, genes, coeffs, True),
        launchers.accumulate(panel, genes, coeffs, sums[COUNT:], 5, True),
    ]
    assert memory.untouched(), "written outside of a result"
    return [w, y, dx, *sums, *dots]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]
)
@pytest.mark.parametrize("offset", [1, 3, 5, 7])
def test_any_offset_and_odd_strides(dtype: torch.dtype, offset: int) -> None:
    for got, expected in zip(run(dtype, Memory(offset, 3)), run(dtype, Memory(0, 0)), strict=True):
        assert bool(got.isfinite().all())
        assert torch.equal(got, expected)


def test_marks_show_one_element_too_many() -> None:
    memory = Memory(3, 0)
    inside = memory.result(4, 4, torch.float32)
    inside.as_strided((16,), (1,), 3).zero_()
    assert memory.untouched()
    inside.as_strided((1,), (1,), 19).zero_()
    assert not memory.untouched()


@triton.jit  # type: ignore[untyped-decorator]
def _places(found, rows, cols, number, BLOCK: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many rows of tiles there are, where tile `number` starts, and the last row that it reads."""
    row_tile, col_tile = tiles.tile_at(number, rows, cols, BLOCK, BLOCK, GROUP)
    tl.store(found, tiles.tiles_of(rows, BLOCK).to(tl.int64))
    tl.store(found + 1, row_tile.to(tl.int64) * BLOCK)
    tl.store(found + 2, col_tile.to(tl.int64) * BLOCK)
    start = row_tile.to(tl.int64) * BLOCK
    tl.store(found + 3, start + tl.max(tiles.wrapped(start, rows, BLOCK), 0))


@pytest.mark.parametrize("size", [2**31 - 1, 2**31 - 63, 2**31 - 64, 2**31 - 65, 2**31 - 200])
def test_tiles_of_sizes_just_below_two_to_the_31(size: int) -> None:
    """Rounded up to a tile, such a size does not fit 32 bits. Oracle: Python's integers."""
    block, found = 64, torch.zeros(4, dtype=torch.int64, device=DEVICE)
    rows = -(-size // block)
    for number in (0, 1, rows - 1, rows, 2 * rows - 1):  # two columns of tiles, walked together
        row, col = number // 2 * block, number % 2 * block
        _places[(1,)](found, size, 100, number, block, 8)
        assert found.tolist() == [rows, row, col, min(row + block, size) - 1]
