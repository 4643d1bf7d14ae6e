# SPDX-License-Identifier: Apache-2.0
"""What a row of the launch table is, and the chips it may name.

The rows stand in `_expansion_rows` and `_expansion_gradient_rows`, the choice among them in `_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        programs: how many run beside each other on a multiprocessor.
        persistent: whether they walk over the tiles, as many as run at once; otherwise there is one per tile.
        stay: whether genes are asked to stay in L2, which only loads that are not pipelined can ask (one stage).
        registers: the most per thread, where the assembler would else spill to fit more programs; None: as it likes.
        candidate: whether tuning may try the row while no call takes it by itself.
        versions: the minor versions of Triton that the row holds for, such as "3.6"; empty for all.
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
    programs: int = 1
    persistent: bool = False
    stay: bool = False
    registers: int | None = None
    candidate: bool = False
    versions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The tile, warps and stages, the bucket's bytes, and which kind of row it is, in one word."""
        limit = "" if self.weight_bytes == _ANY else f"-{self.weight_bytes}B"
        kinds = f"{'-stay' * self.stay}{'-walk' * self.persistent}{'-any' * self.irregular}"
        return f"{'x'.join(map(str, self.tile))}-{self.warps}w{self.stages}s{limit}{kinds}"

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    def holds(self, chip: str, weight_bytes: int, activation: bool, regular: bool, version: str = "") -> bool:
        """Whether a call can run by this row, fast or slow, with a version of Triton; "" stands for any."""
        here = chip in self.chips and (not version or not self.versions or version in self.versions)
        fits = weight_bytes <= self.weight_bytes and (self.activations or not activation)
        return here and fits and (self.irregular or regular)

    def takes(self, size: int) -> bool:
        """Whether a call that it holds for falls into this row's bucket."""
        return not self.candidate and self.above < size <= self.up_to
