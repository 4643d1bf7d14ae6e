# SPDX-License-Identifier: Apache-2.0
"""SWS: consecutive blocks form stages, and all blocks of a stage have the weights of its one gene."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from pylearngene.errors import ArgumentError
from pylearngene.functional.expansion import MAX_GENES
from pylearngene.learngene import register_method
from pylearngene.methods._requests import check_number
from pylearngene.methods.expansion import FixedExpansion

#: Blocks that `stages` and a map may have: as many as the description of a host allows.
MAX_DEPTH = 10_000
OFFICIAL_STAGES = (3, 3, 4, 3, 3)
OFFICIAL_MAPS = ((0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4),)

Stages = tuple[int, ...]


@dataclass(frozen=True)
class SWS(FixedExpansion):
    """One gene per stage: `W[l] = G[s(l)]`, `s` the stage of block `l`.

    In a gene-backed network the blocks of a stage read the same gene, whose gradient is the sum over them; plain
    descendants have copies.

    At a depth that neither `stages` nor `maps` states, block `l` of `L` belongs to the stage of block
    `floor(l A / L)`, `A` the sum of `stages`: the block at the same position. So stages keep their share of the depth,
    and very shallow networks leave some out.

    Args:
        stages: numbers of blocks of the auxiliary network's stages; 1 to 64 stages, up to 10,000 blocks.
        maps: for further depths the stage of every block: each entry serves the depth that is its length. None: the
            paper's map of 12 blocks where `stages` are the paper's, else none.

    Raises:
        ArgumentError: `stages` are not ints >= 1, a map holds a stage that there is not, two serve one depth, or a
            depth is above 10,000.

    Source:
        Stage-wise weight sharing, IJCAI 2024, arXiv 2404.16897: stages of 3, 3, 4, 3, 3 blocks, and the map of 12
        blocks; the rule for other depths is ours.

    Example:
        >>> SWS(stages=(1, 2)).coefficients(3)
        [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
        >>> SWS().stage_map(12)
        (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)
    """

    name: ClassVar[str] = "sws"
    stages: Stages = OFFICIAL_STAGES
    maps: tuple[Stages, ...] | None = None

    def __post_init__(self) -> None:
        stages = _ints("stages", self.stages, 1)
        if len(stages) > MAX_GENES:
            raise ArgumentError(f"stages: expected at most {MAX_GENES} stages, got {len(stages)}")
        if sum(stages) > MAX_DEPTH:
            raise ArgumentError(f"stages: expected at most {MAX_DEPTH} blocks in all, got {sum(stages)}")
        maps: Any = self.maps
        if maps is None:
            maps = OFFICIAL_MAPS if stages == OFFICIAL_STAGES else ()
        elif not isinstance(maps, (tuple, list)):
            raise ArgumentError(f"maps: expected a sequence of stage maps or None, got {maps!r}")
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "maps", _checked_maps(maps, stages))
        super().__post_init__()

    @property
    def num_genes(self) -> int:
        """The number K of genes per weight, one per stage."""
        return len(self.stages)

    def stage_map(self, depth: int) -> Stages:
        """Return the stage of every block of a network of that depth; raises ArgumentError where it is no int >= 1."""
        assert self.maps is not None
        depth = check_number("depth", depth)
        given = [entry for entry in self.maps if len(entry) == depth]
        if given:
            return given[0]
        ends = list(accumulate(self.stages))
        return tuple(bisect_right(ends, index * ends[-1] // depth) for index in range(depth))

    def coefficients(self, depth: int) -> list[list[float]]:
        """Return the table [L, K] for `depth` blocks: 1 for the stage of each and 0 for the others."""
        return [self._one_hot(stage) for stage in self.stage_map(depth)]

    def row(self, index: int, depth: int, /) -> Sequence[float]:
        """Return 1 for the stage of block `index` and 0 for the others."""
        return self._one_hot(self.stage_map(depth)[index])

    def _one_hot(self, stage: int) -> list[float]:
        return [float(other == stage) for other in range(self.num_genes)]

    def start_gains(self, _depth: int) -> list[float]:
        """Return 1 for every gene, also for those of stages that the network at hand leaves out."""
        return [1.0] * self.num_genes


def _ints(name: str, values: Any, low: int, high: int | None = None) -> Stages:
    """Return a sequence of ints from `low` to `high` as a tuple; bools are none."""
    expected = f"one or more ints >= {low}" if high is None else f"one or more stages from {low} to {high}"
    try:
        given = () if isinstance(values, (bytes, bytearray)) else tuple(values)
        checked = tuple(operator.index(value) for value in given)
    except TypeError:
        given = checked = ()
    fits = all(low <= value and (high is None or value <= high) for value in checked)
    if not checked or not fits or any(isinstance(value, bool) for value in given):
        raise ArgumentError(f"{name}: expected {expected}, got {values!r}")
    return checked


def _checked_maps(maps: Sequence[Any], stages: Stages) -> tuple[Stages, ...]:
    checked = tuple(_ints(f"maps[{j}]", entry, 0, len(stages) - 1) for j, entry in enumerate(maps))
    depths = {sum(stages)}
    for j, depth in enumerate(map(len, checked)):
        if depth > MAX_DEPTH:
            raise ArgumentError(f"maps[{j}]: expected at most {MAX_DEPTH} blocks, got {depth}")
        if depth in depths:
            raise ArgumentError(f"maps[{j}]: expected a depth without a map, got {depth} blocks, which has one")
        depths.add(depth)
    return checked


register_method(SWS.name, SWS.from_config)
