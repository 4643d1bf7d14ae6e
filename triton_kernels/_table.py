# SPDX-License-Identifier: Apache-2.0
"""The launch table: tiles, warps and stages per kernel, chip class and bucket, and the shared memory they take.

Every row is compiled offline for its chips (`offline`), none is tuned while a network runs. Nothing here imports
Triton or reads a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pylearngene.errors import BackendError, TooLargeError

#: Bytes of shared memory that one program may take, per chip class.
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}
CHIPS = tuple(SHARED_BYTES)
#: Chips whose matrix units read x from shared memory while the next tile arrives: one buffer more, wider tiles.
ASYNCHRONOUS = ("sm_90", "sm_100")
SYNCHRONOUS = ("sm_80", "sm_89", "sm_120")
INTERPRETER = "interpreter"
#: Programs along axis 0 of a launch grid; the other axes stop at 65,535 and are not used.
GRID_LIMIT = 2**31 - 1
#: Genes that one launch of `fused` or `gene_gradients` takes, at most; what the table is compiled for.
MOST_GENES = 8
_ANY = 1 << 62


@dataclass(frozen=True)
class Row:
    """One launch of one kernel; the first row of the table that takes a call wins.

    Attributes:
        kernel: name of the kernel.
        chips: where the row is used.
        tile: the kernel's block sizes in the order of its constants.
        warps, stages: as Triton takes them.
        above, up_to: which sizes: rows of x for `fused`, weights for `gene_gradients`.
        weight_bytes: the most bytes that all genes hold per weight.
        activations: whether the row carries gelu and silu; wide tiles have no registers left for them.
        irregular: whether the row takes any strides and sizes; the others load 16 bytes at a time, with short offsets.
    """

    kernel: str
    chips: tuple[str, ...]
    tile: tuple[int, ...]
    warps: int
    stages: int
    above: int = 0
    up_to: int = _ANY
    weight_bytes: int = _ANY
    activations: bool = True
    irregular: bool = False

    @property
    def name(self) -> str:
        """The tile, warps and stages, the bucket's bytes, and whether any strides are taken, in one word."""
        limit = "" if self.weight_bytes == _ANY else f"-{self.weight_bytes}B"
        return f"{'x'.join(map(str, self.tile))}-{self.warps}w{self.stages}s{limit}{'-any' * self.irregular}"

    def takes(self, size: int, weight_bytes: int, activation: bool, regular: bool) -> bool:
        """Whether a call falls into this row's bucket."""
        fits = self.above < size <= self.up_to and weight_bytes <= self.weight_bytes
        return fits and (self.activations or not activation) and (self.irregular or regular)


# Tiles of `fused` are out x tokens x inner, of `gene_gradients` out x inner x tokens, of the others rows x columns.
ROWS = (
    Row("fused", CHIPS, (64, 16, 64), 4, 3, up_to=16, weight_bytes=8),
    Row("fused", ("sm_80", "sm_89", "sm_90", "sm_100"), (64, 16, 32), 4, 2, up_to=16, weight_bytes=32),
    Row("fused", ("sm_120",), (64, 16, 16), 4, 2, up_to=16, weight_bytes=32),
    Row("fused", ("sm_80", "sm_89", "sm_90", "sm_120"), (64, 64, 64), 4, 2, up_to=64, weight_bytes=8),
    Row("fused", ("sm_100",), (64, 64, 64), 4, 3, up_to=64, weight_bytes=8),
    Row("fused", CHIPS, (64, 64, 32), 4, 2, up_to=64, weight_bytes=32),
    Row("fused", ASYNCHRONOUS, (128, 256, 64), 8, 2, above=256, weight_bytes=8, activations=False),
    Row("fused", ASYNCHRONOUS, (128, 128, 64), 8, 2, weight_bytes=8),
    Row("fused", ASYNCHRONOUS, (128, 256, 32), 8, 2, above=256, weight_bytes=16, activations=False),
    Row("fused", ASYNCHRONOUS, (128, 128, 32), 8, 2, weight_bytes=32),
    Row("fused", ("sm_80", "sm_120"), (128, 128, 32), 8, 3, weight_bytes=8),
    Row("fused", SYNCHRONOUS, (128, 128, 32), 8, 2, weight_bytes=16),
    Row("fused", SYNCHRONOUS, (128, 128, 16), 8, 2, weight_bytes=32),
    Row("gene_gradients", CHIPS, (64, 64, 64), 4, 2, up_to=1 << 20, weight_bytes=32),
    Row("gene_gradients", ("sm_90",), (128, 128, 64), 8, 3, weight_bytes=16),
    Row("gene_gradients", ASYNCHRONOUS, (64, 128, 64), 8, 3, weight_bytes=32),
    Row("gene_gradients", ("sm_80", "sm_120"), (128, 128, 32), 8, 3, weight_bytes=16),
    Row("gene_gradients", SYNCHRONOUS, (64, 128, 32), 8, 3, weight_bytes=32),
    Row("fused", ("sm_80", "sm_89", "sm_90", "sm_120"), (64, 16, 16), 4, 2, weight_bytes=32, irregular=True),
    Row("fused", ("sm_100",), (64, 16, 16), 4, 1, weight_bytes=32, irregular=True),
    Row("gene_gradients", CHIPS, (64, 64, 32), 8, 2, weight_bytes=32, irregular=True),
    Row("synthesize", CHIPS, (32, 128), 4, 1, irregular=True),
    Row("accumulate", CHIPS, (32, 128), 4, 1, irregular=True),
    Row("fused", (INTERPRETER,), (32, 64, 32), 4, 1, irregular=True),
    Row("gene_gradients", (INTERPRETER,), (32, 64, 32), 4, 1, irregular=True),
    Row("synthesize", (INTERPRETER,), (32, 128), 4, 1, irregular=True),
    Row("accumulate", (INTERPRETER,), (32, 128), 4, 1, irregular=True),
)
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
