# SPDX-License-Identifier: Apache-2.0
"""The launch table: tiles, warps and stages per kernel, chip class and bucket, and the shared memory they take.

Every row is compiled offline for its chips (`offline`), none is tuned while a network runs. Nothing here imports
Triton or reads a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pylearngene.triton_kernels import _expansion_gradient_rows, _expansion_rows
from pylearngene.triton_kernels._row import ASYNCHRONOUS, GRID_LIMIT, Row

from pylearngene.errors import BackendError, TooLargeError

ROWS = _expansion_rows.ROWS + _expansion_gradient_rows.ROWS
#: Columns of tiles that consecutive programs share rows of: neighbours read the same genes, from L2.
GROUP = 8


@lru_cache(maxsize=4096)
def row_for(
    kernel: str, chip: str, size: int, genes: int, itemsize: int, activation: bool = False, regular: bool = False
) -> Row:
    """The row that takes a call; `itemsize` is the genes', `activation` says gelu or silu."""
    for row in ROWS:
        if row.kernel == kernel and chip in row.chips and row.takes(size, genes * itemsize, activation, regular):
            return row
    raise BackendError(f"{kernel}: no row of the launch table takes {genes} genes of {itemsize} bytes on {chip}")


def shared_bytes(row: Row, chip: str, genes: int, itemsize: int, x_itemsize: int = 2) -> int:
    """An upper bound of the shared memory of a row: the stages of its loads, and what its epilogue reorders."""
    ahead = row.stages if chip in ASYNCHRONOUS else row.stages - 1
    scratch = (32 if chip in ASYNCHRONOUS else 8) << 10
    if row.kernel == "fused":
        out, tokens, inner = row.tile
        return (row.stages - 1) * genes * out * inner * itemsize + ahead * inner * tokens * x_itemsize + scratch
    if row.kernel == "gene_gradients":
        out, inner, tokens = row.tile
        return max(ahead * tokens * (out + inner) * x_itemsize, out * inner * 4) + scratch
    return row.tile[0] * row.tile[1] * max(itemsize, 4)


def tile_count(rows: int, cols: int, block_rows: int, block_cols: int) -> int:
    """Programs of a launch over `[rows, cols]`, all along axis 0.

    Raises:
        TooLargeError: there are more than the axis holds.
    """
    count = -(-rows // block_rows) * -(-cols // block_cols)
    if count > GRID_LIMIT:
        raise TooLargeError(f"launch: expected at most {GRID_LIMIT} tiles, got {count} for {rows} x {cols}")
    return count


def chip_of(capability: tuple[int, int]) -> str | None:
    """The chip class of a compute capability, the nearest older one for a chip without rows; None below 8.0."""
    major, minor = capability
    if major < 8:
        return None
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def is_regular(address: int, strides: Sequence[int]) -> bool:
    """Whether a matrix can be read 16 bytes at a time, with 32-bit offsets inside a tile."""
    short, long = sorted(strides)
    return short == 1 and long % 16 == 0 and long < 2**23 and address % 16 == 0
