# SPDX-License-Identifier: Apache-2.0
"""Into how many parts a weight gradient is divided: which rows get one program per tile, and which share its tokens.

Pure arithmetic from sizes and how many programs run at once. The costs behind it are modelled, not measured.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pylearngene.triton_kernels._row import INTERPRETER, Row

#: Columns of a tile that are added to the accumulators at a time.
PART = 32
#: Bytes of the workspace in which partial sums wait for `accumulate`, at most.
WORKSPACE_BYTES = 24 << 20
#: A weight of more rows of tiles than this keeps a GPU busy as it is.
MOST_TILE_ROWS = 64
#: Programs that share one tile, at most: `accumulate` reads their sums one after the other.
MOST_SPLITS = 32
#: Steps of a tile that take as long as writing its partial sum and reading it again; modelled.
STEPS_PER_SPLIT = 12
#: Steps that take as long as the launch of `accumulate`; modelled.
STEPS_PER_LAUNCH = 8


def halvings(row: Row) -> int:
    """How often a tile of `gene_gradients` is halved until its parts are that narrow."""
    return (row.tile[1] // PART).bit_length() - 1


def sums_per_tile(row: Row) -> int:
    """How many partial sums per gene a tile leaves: one per warp, where each thread reads 4 columns."""
    return 1 if row.irregular else row.warps


class Splits(NamedTuple):
    """Rows `0 .. whole` of dW have one program per tile, the others `splits`, of `chunk` steps each."""

    whole: int
    splits: int
    chunk: int


@lru_cache(maxsize=4096)
def splits_for(row: Row, chip: str, tokens: int, outs: int, inner: int, at_once: int) -> Splits:
    """The division of `dy^T x` `[outs, inner]` over `tokens` tokens that leaves the least idle.

    Programs run in waves of `at_once`; a last wave of few takes as long as a full one. Splitting the
    last rows of tiles over the tokens fills it, for the price of partial sums that are written and read once more.
    """
    block_out, block_inner, block_tokens = row.tile
    tile_rows, tile_cols, steps = -(-outs // block_out), -(-inner // block_inner), -(-tokens // block_tokens)
    best, least = Splits(outs, 1, steps), _waves(tile_rows * tile_cols, at_once) * steps
    if tile_rows > MOST_TILE_ROWS:
        return best
    per_split, per_launch = (0, 0) if chip == INTERPRETER else (STEPS_PER_SPLIT, STEPS_PER_LAUNCH)
    for whole in reversed(range(tile_rows)):
        shared = tile_rows - whole
        rest = outs - whole * block_out
        most = min(MOST_SPLITS, steps, WORKSPACE_BYTES // (4 * rest * inner))
        before = _waves(whole * tile_cols, at_once) * steps
        for splits in range(2, most + 1):
            chunk = -(-steps // splits)
            waves = _waves(shared * tile_cols * splits, at_once)
            cost = before + waves * (chunk + per_split) + per_launch
            if cost < least and -(-steps // chunk) == splits:
                best, least = Splits(whole * block_out, splits, chunk), cost
    return best


def _waves(programs: int, at_once: int) -> int:
    return -(-programs // at_once)
