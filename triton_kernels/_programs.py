# SPDX-License-Identifier: Apache-2.0
"""How many programs a fused product gets: one per tile, as many as run at once, or several that share a tile's sum.

Pure arithmetic from sizes and the number of multiprocessors. The rates behind it are modelled, not measured.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pylearngene.triton_kernels._row import INTERPRETER, Row
from pylearngene.triton_kernels._table import tile_count

#: Bytes of the workspace in which partial sums wait for `finish`, at most.
WORKSPACE_BYTES = 24 << 20
#: Up to this many tokens the split does not depend on how many they are, and neither does a token's result.
STEADY_TOKENS = 64
#: Bytes of genes that one program reads while a second, tiny launch runs: about 2000 clocks at 32 bytes.
LAUNCH_BYTES = 64 << 10
#: And while `finish`, which reads eight sums at a time, waits for one more.
SPLIT_BYTES = 2 << 10


class Programs(NamedTuple):
    """A launch of `fused`: programs along axis 0, into how many sums a tile is split, steps of the tile in each."""

    count: int
    splits: int
    chunk: int


@lru_cache(maxsize=4096)
def programs_for(
    row: Row, chip: str, tokens: int, outs: int, inner: int, weight_bytes: int, multiprocessors: int
) -> Programs:
    """The programs of a product `[tokens, inner] x [outs, inner]` whose genes hold `weight_bytes` per weight.

    The sum over `inner` is split where tiles are fewer than the programs that run at once and where it pays: a program
    alone reads its genes step by step, `finish` costs a launch and the partial sums' way through L2.
    """
    block_out, block_tokens, block_inner = row.tile
    tiles = tile_count(outs, tokens, block_out, block_tokens)
    steps = -(-inner // block_inner)
    at_once = multiprocessors * row.programs
    steady = tokens <= STEADY_TOKENS
    alone = -(-outs // block_out) if steady else tiles
    counted = STEADY_TOKENS if steady else tokens
    # Nothing in the interpreter, so that small tests are split.
    launch_bytes, split_bytes = LAUNCH_BYTES, SPLIT_BYTES + 8 * counted * outs // at_once
    if chip == INTERPRETER:
        launch_bytes, split_bytes = 0, 0
    step_bytes = block_out * block_inner * weight_bytes
    best, least = 1, steps * step_bytes
    for splits in range(2, min(steps, at_once // alone, WORKSPACE_BYTES // (4 * counted * outs)) + 1):
        cost = -(-steps // splits) * step_bytes + launch_bytes + splits * split_bytes
        if cost < least:
            best, least = splits, cost
    chunk = -(-steps // best)
    splits = -(-steps // chunk) if chunk else 1
    if splits > 1:
        return Programs(tiles * splits, splits, chunk)
    return Programs(min(tiles, at_once) if row.persistent else tiles, 1, steps)
