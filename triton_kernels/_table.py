# SPDX-License-Identifier: Apache-2.0
"""The choice of a launch: tiles, warps and stages per kernel, chip class and bucket, and the shared memory they take.

Every row is compiled offline for its chips (`offline`), none is tuned while a network runs. Nothing here imports
Triton or reads a device; how many programs a product gets is in `_programs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from pylearngene.triton_kernels import _expansion_gradient_rows, _expansion_rows
from pylearngene.triton_kernels._row import ASYNCHRONOUS, GRID_LIMIT, SHARED_BYTES, Row

from pylearngene.errors import ArgumentError, BackendError, TooLargeError

ROWS = _expansion_rows.ROWS + _expansion_gradient_rows.ROWS
#: Columns of tiles that consecutive programs share rows of: neighbours read the same genes, from L2.
GROUP = 8
#: Rows that are tried for one call when tuning, at most.
MOST_CANDIDATES = 8

#: A bucket of calls: kernel, chip, size, genes, bytes of a gene's element, gelu or silu, regular layouts.
Key = tuple[str, str, int, int, int, bool, bool]
#: Rows that were measured on this machine; they go before the table's. Changed by `install` only.
OVERRIDES: dict[Key, Row] = {}


def bucket_key(
    kernel: str, chip: str, size: int, genes: int, itemsize: int, activation: bool = False, regular: bool = False
) -> Key:
    """The bucket of a call: its size, rounded up to a power of two, from 16 tokens on and for `fused` up to 4096."""
    bucket = 1 << max(4, (size - 1).bit_length())
    return kernel, chip, min(bucket, 4096) if kernel == "fused" else bucket, genes, itemsize, activation, regular


def install(rows: Mapping[Key, Row]) -> None:
    """Let these rows, and no earlier ones, go before the table's.

    Raises:
        ArgumentError: a row does not hold for its bucket; then nothing changes.
    """
    for key, row in rows.items():
        kernel, chip, _, genes, itemsize, activation, regular = key
        if row.kernel != kernel or not row.holds(chip, genes * itemsize, activation, regular):
            raise ArgumentError(
                f"rows: expected rows that hold for their bucket, got {row.kernel} {row.name} for {key}"
            )
    OVERRIDES.clear()
    OVERRIDES.update(rows)
    row_for.cache_clear()


@lru_cache(maxsize=4096)
def row_for(
    kernel: str,
    chip: str,
    size: int,
    genes: int,
    itemsize: int,
    activation: bool = False,
    regular: bool = False,
    version: str = "",
) -> Row:
    """The row that takes a call; `itemsize` is the genes', `activation` says gelu or silu, `version` is Triton's."""
    if OVERRIDES:
        measured = OVERRIDES.get(bucket_key(kernel, chip, size, genes, itemsize, activation, regular))
        if measured is not None:
            return measured
    call = (genes * itemsize, activation, regular, version)
    for row in ROWS:
        if row.kernel == kernel and row.takes(size) and row.holds(chip, *call):
            return row
    raise BackendError(f"{kernel}: no row of the launch table takes {genes} genes of {itemsize} bytes on {chip}")


def candidates(
    kernel: str,
    chip: str,
    size: int,
    genes: int,
    itemsize: int,
    activation: bool = False,
    regular: bool = False,
    version: str = "",
) -> list[Row]:
    """The rows worth trying for a call, at most 8, all of them sound: the table's choice, then those marked so."""
    call = (genes * itemsize, activation, regular, version)
    first = row_for(kernel, chip, size, genes, itemsize, activation, regular, version)
    found = [row for row in ROWS if row.kernel == kernel and row.holds(chip, *call) and _near(row, size)]
    found = [row for row in found if row.irregular == first.irregular and row != first]
    limit = SHARED_BYTES.get(chip)
    fits = [row for row in found if limit is None or shared_bytes(row, chip, genes, itemsize) <= limit]
    return [first, *sorted(fits, key=lambda row: not row.candidate)][:MOST_CANDIDATES]


def _near(row: Row, size: int) -> bool:
    """Whether a tile of the row is neither mostly empty nor one of very many."""
    if row.kernel != "fused":
        return True
    tokens = row.tile[1]
    return tokens <= max(16, 2 * size) and min(size, 4096) <= 32 * tokens


def shared_bytes(row: Row, chip: str, genes: int, itemsize: int, x_itemsize: int = 2) -> int:
    """An upper bound of the shared memory of a row: the stages of its loads, and what its epilogue reorders."""
    ahead = row.stages if chip in ASYNCHRONOUS else row.stages - 1
    scratch = (32 if chip in ASYNCHRONOUS else 8) << 10
    if row.kernel == "fused":
        out, tokens, inner = row.tile
        weight = out * inner * x_itemsize if row.stages == 1 else 0  # on its way from one layout to another
        loads = (row.stages - 1) * genes * out * inner * itemsize + max(ahead, 1) * inner * tokens * x_itemsize
        return max(loads + weight, out * tokens * 4) + scratch
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
    row, col = strides
    long = row if col == 1 else col if row == 1 else 0
    return 16 <= long < 2**23 and long % 16 == 0 and address % 16 == 0
