# SPDX-License-Identifier: Apache-2.0
"""What a row of the launch table is, and the chips it may name.

The rows stand in `_expansion_rows` and `_expansion_gradient_rows`, the choice among them in `_table`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
