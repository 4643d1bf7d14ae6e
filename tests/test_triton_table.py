# SPDX-License-Identifier: Apache-2.0
"""The launch table of the Triton kernels: pure arithmetic about chips, tiles and shared memory, without Triton.

That every row compiles is tested in `test_triton_offline`.
"""

from __future__ import annotations

import ast
import importlib
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pylearngene.errors import BackendError, TooLargeError

chips: Any = importlib.import_module("pylearngene.triton_kernels._row")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")


def test_tiles_are_counted_along_one_axis() -> None:
    for count in (65_535, 65_536, 2**31 - 1):  # what ends the other axes, and this one
        assert table.tile_count(count * 128, 1, 128, 64) == table.tile_count(1, count * 64, 128, 64) == count
    assert table.tile_count(129, 65, 128, 64) == 4
    assert table.tile_count(2**31 - 1, 1, 1, 1) == 2**31 - 1
    with pytest.raises(TooLargeError, match="launch: expected at most 2147483647 tiles, got 2147483648"):
        table.tile_count(2**31, 1, 1, 1)


def test_launches_use_axis_0_alone() -> None:
    """The other axes of a grid end at 65,535 programs; some drivers skip such a launch without a word."""
    folder = Path(table.__file__).parent
    launched = [
        node.func.slice
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "_kernels" in ast.unparse(node.func)
    ]
    assert len(launched) == 4
    for grid in launched:
        assert ast.unparse(grid) == "grid" or (isinstance(grid, ast.Tuple) and len(grid.elts) == 1)
    source = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    assert re.findall(r"grid = \((.*),\)\n", source) == re.findall(r"grid = (?:\((.*),\))?", source)
    assert set(re.findall(r"program_id\((.*?)\)", source)) == {"0"}


@pytest.mark.parametrize(
    ("capability", "chip"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_120"), ((13, 0), "sm_120")],
)  # fmt: skip
def test_chip_of_a_capability(capability: tuple[int, int], chip: str | None) -> None:
    assert table.chip_of(capability) == chip


def test_every_call_has_a_row_that_fits_its_chip() -> None:
    used = set()
    sizes = {"fused": (1, 16, 17, 64, 65, 256, 257, 10**9), "gene_gradients": (1, 1 << 20, 1 << 24)}
    for chip, kernel in product(chips.CHIPS, ("fused", "gene_gradients", "synthesize", "accumulate")):
        for size, genes, itemsize in product(sizes.get(kernel, (1,)), range(1, 9), (2, 4)):
            for activation, regular in product((False, True), (False, True)):
                row = table.row_for(kernel, chip, size, genes, itemsize, activation, regular)
                assert table.shared_bytes(row, chip, genes, itemsize) <= chips.SHARED_BYTES[chip]
                assert row.irregular or regular
                used.add((row, chip))
    known = {(row, chip) for row in table.ROWS for chip in row.chips if chip != chips.INTERPRETER}
    assert used == known, "rows that no call reaches"
    with pytest.raises(BackendError, match="fused: no row of the launch table takes 9 genes of 4 bytes on sm_90"):
        table.row_for("fused", "sm_90", 1, 9, 4)


@pytest.mark.parametrize(
    ("address", "strides", "regular"),
    [(0, (64, 1), True), (16, (1, 64), True), (2, (64, 1), False), (0, (24, 1), False), (0, (64, 2), False),
     (0, (2**24, 1), False), (0, (0, 1), False), (0, (1, 1), False)],
)  # fmt: skip
def test_what_can_be_read_16_bytes_at_a_time(address: int, strides: tuple[int, int], regular: bool) -> None:
    assert table.is_regular(address, strides) == regular


def test_rows_of_a_chip_have_names_of_their_own() -> None:
    names = [(row.kernel, row.name, chip) for row in table.ROWS for chip in row.chips]
    assert len(set(names)) == len(names)
