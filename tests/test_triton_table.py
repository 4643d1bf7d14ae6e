# SPDX-License-Identifier: Apache-2.0
"""The launch table of the Triton kernels: pure arithmetic about chips, tiles and shared memory, without Triton.

That every row compiles is tested in `test_triton_offline`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pylearngene.errors import ArgumentError, BackendError, TooLargeError

chips: Any = importlib.import_module("pylearngene.triton_kernels._row")
programs: Any = importlib.import_module("pylearngene.triton_kernels._programs")
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
    assert len(launched) >= 5
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


KERNELS = ("fused", "finish", "gene_gradients", "synthesize", "accumulate")


def calls(kernel: str) -> Iterator[tuple[int, int, int, bool, bool]]:
    """Sizes on both sides of every bucket, with each number of genes, their bytes and both kinds of layouts."""
    ends = {end for row in table.ROWS if row.kernel == kernel for end in (row.above + 1, row.up_to, row.up_to + 1)}
    sizes = {1, 10**9} | {end for end in ends if 0 < end < 10**9}
    yield from product(sorted(sizes), range(1, 9), (2, 4), (False, True), (False, True))


def test_every_call_has_a_row_that_fits_its_chip() -> None:
    used = set()
    for chip, kernel in product(chips.CHIPS, KERNELS):
        for size, genes, itemsize, activation, regular in calls(kernel):
            row = table.row_for(kernel, chip, size, genes, itemsize, activation, regular)
            assert table.shared_bytes(row, chip, genes, itemsize) <= chips.SHARED_BYTES[chip]
            assert row.irregular or regular
            assert not row.candidate
            used.add((row, chip))
    known = {(row, chip) for row in table.ROWS for chip in row.chips if chip in chips.CHIPS and not row.candidate}
    assert used == known, "rows that no call reaches"
    with pytest.raises(BackendError, match="fused: no row of the launch table takes 9 genes of 4 bytes on sm_90"):
        table.row_for("fused", "sm_90", 1, 9, 4)


def test_candidates_begin_with_the_choice_and_fit() -> None:
    tried = set()
    for chip, kernel in product(chips.CHIPS, KERNELS):
        for call in calls(kernel):
            _, genes, itemsize, activation, regular = call
            rows = table.candidates(kernel, chip, *call)
            assert rows[0] == table.row_for(kernel, chip, *call)
            assert len(set(rows)) == len(rows) <= 8
            for row in rows:
                assert row.holds(chip, genes * itemsize, activation, regular)
                assert table.shared_bytes(row, chip, genes, itemsize) <= chips.SHARED_BYTES[chip]
            tried.update((row, chip) for row in rows)
    known = {(row, chip) for row in table.ROWS for chip in row.chips if chip in chips.CHIPS}
    assert tried == known, "rows that nobody would ever measure"


def test_rows_of_another_version_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = table.row_for("fused", "sm_90", 16, 2, 2, False, True, "3.6")
    only = dataclasses.replace(first, warps=8, versions=("3.8",))
    monkeypatch.setattr(table, "ROWS", (only, *table.ROWS))
    table.row_for.cache_clear()
    assert table.row_for("fused", "sm_90", 16, 2, 2, False, True, "3.6") == first
    assert table.row_for("fused", "sm_90", 16, 2, 2, False, True, "3.8") == only
    table.row_for.cache_clear()


def test_measured_rows_go_first_and_must_hold() -> None:
    call = ("fused", "sm_90", 300, 2, 2, False, True)
    choice, other = table.candidates(*call)[:2]
    key = table.bucket_key(*call)
    try:
        table.install({key: other})
        assert table.row_for(*call) == table.row_for("fused", "sm_90", 512, 2, 2, False, True) == other
        assert table.row_for("fused", "sm_90", 513, 2, 2, False, True) == choice
        loose = table.row_for("fused", "sm_90", 300, 2, 2)
        for wrong in (dataclasses.replace(other, weight_bytes=2), table.row_for("synthesize", "sm_90", 1, 2, 2)):
            with pytest.raises(ArgumentError, match="rows: expected rows that hold for their bucket, got"):
                table.install({key: loose, ("fused", "sm_90", 16, 2, 2, False, True): wrong})
            assert table.row_for(*call) == other, "nothing changed"
    finally:
        table.install({})
    assert table.row_for(*call) == choice


@pytest.mark.parametrize(
    ("size", "bucket"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (2048, 2048), (10**6, 4096)]
)
def test_tokens_are_bucketed_by_powers_of_two(size: int, bucket: int) -> None:
    assert table.bucket_key("fused", "sm_90", size, 2, 2)[2] == bucket


def row_of(tile: tuple[int, int, int], **more: Any) -> Any:
    return chips.Row("fused", ("sm_90",), tile, 4, 1, **more)


def test_few_tiles_share_their_sums() -> None:
    narrow = row_of((64, 16, 64), programs=4)
    # 12 tiles of 12 steps on 528 places: two steps of 16 KiB cost less than one and six sums more.
    assert programs.programs_for(narrow, "sm_90", 1, 768, 768, 4, 132) == (72, 6, 2)
    # 3 tiles of 3 steps: a second launch costs more than two steps.
    assert programs.programs_for(narrow, "sm_90", 1, 192, 192, 4, 132) == (3, 1, 3)
    # More tiles than places: each has its own program.
    assert programs.programs_for(narrow, "sm_90", 16, 64 * 529, 4096, 4, 132) == (529, 1, 64)
    wide = row_of((128, 128, 64), persistent=True)
    assert programs.programs_for(wide, "sm_90", 512, 768, 3072, 4, 132) == (120, 5, 10)
    assert programs.programs_for(wide, "sm_90", 4096, 768, 768, 4, 132) == (132, 1, 12), "as many as run at once"
    assert programs.programs_for(wide, "sm_90", 4096, 768, 0, 4, 132) == (132, 1, 0)


def test_a_split_is_whole_bounded_and_for_few_tokens_always_the_same() -> None:
    rows = {row for row in table.ROWS if row.kernel == "fused"}
    for row, outs, inner, processors in product(rows, (1, 64, 770, 8192), (1, 64, 1000, 65536), (4, 60, 132, 188)):
        found = set()
        for tokens in (1, 2, 16, 17, 64, 65, 500, 4000):
            count, splits, chunk = programs.programs_for(row, "sm_90", tokens, outs, inner, 8, processors)
            steps, tiles = -(-inner // row.tile[2]), table.tile_count(outs, tokens, *row.tile[:2])
            assert (splits - 1) * chunk < steps <= splits * chunk, "no part is empty"
            if splits > 1:
                assert count == tiles * splits
                assert 4 * splits * tokens * outs <= 24 << 20
            if tokens <= 64:
                found.add((splits, chunk))
        assert len(found) == 1


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
