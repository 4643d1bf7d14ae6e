# SPDX-License-Identifier: Apache-2.0
"""What a GPU is taken to do: the classes of chips, what a product costs on each, and how many panels take turns.

Regimes, thresholds and turns on a GPU come from this model alone; where they were measured, it says so. It leaves out
who asks, and how anything is computed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from pylearngene.plan.panels import GPU_PANEL_BYTES

#: Rows of x up to which a GPU splits a product of 16 bits over its reduction: modelled, not measured.
GPU_ROWS_UP_TO = 64
#: Rows of x up to which the C++ kernels of a GPU are preferred, by bytes of an element of x: modelled, not measured.
CUDA_ROWS_UP_TO = {2: 8, 4: 16}
#: Genes up to which `fused` is compiled without spilling registers.
FUSED_GENES = 8
#: On a GPU, two panels may take turns, one filled while the other is in use; all of what follows is modelled. The most
#: panels that a weight is cut into for that, the least bytes of each, and the least microseconds of each product: the
#: host has to launch the next turn meanwhile.
MOST_TURNS, TURN_BYTES, TURN_TIME = 4, 1 << 20, 20.0
#: Microseconds that one more turn costs, and the share of what runs beside a product that slows the product down.
TURN_GAP, TURN_SHARE = 2.0, 0.5
#: Rows and columns of the tiles that a BLAS is taken to hand out to multiprocessors.
BLAS_TILE = 128


class Chip(NamedTuple):
    """What the model knows of a chip class, by the chip it is modelled on.

    Attributes:
        name: of that chip.
        half: TFLOP/s that large products of 16 bits reach.
        single: likewise of 32 bits, without TF32.
        cache: bandwidth of the L2 cache in TB/s.
        memory: of the memory.
        multiprocessors: how many.
        tokens: widest tile of `fused`; its genes are read once for so many rows of x.
        fused_up_to: rows of x up to which `fused` is used with at most 2, 4 and 8 genes.
    """

    name: str
    half: float
    single: float
    cache: float
    memory: float
    multiprocessors: int
    tokens: int
    fused_up_to: tuple[int, int, int]


# Bandwidths of A100, L40 and H200: the tables of gpu-benches (github.com/te42kyfo/gpu-benches). Rates: 0.8 of what the
# vendor's data sheet names, H200's as measured through PyTorch. L2 of B200 and RTX 5090: taken to be, per clock and
# multiprocessor, that of H200 and of L40.
CHIPS = {
    "sm_80": Chip("A100", 250, 16, 5.4, 1.73, 108, 128, (2048, 768, 512)),
    "sm_89": Chip("L40", 145, 72, 5.2, 0.81, 142, 128, (2048, 2048, 1408)),
    "sm_90": Chip("H200", 790, 54, 9.7, 3.89, 132, 256, (1536, 768, 768)),
    "sm_100": Chip("B200", 1800, 60, 11.8, 7.4, 148, 256, (256, 256, 256)),
    "sm_120": Chip("RTX 5090", 168, 84, 6.0, 1.6, 170, 128, (2048, 2048, 896)),
}
USUAL_CHIP = "sm_90"
#: Share of the matrix rate that a fused product reaches where no gene has to wait.
FUSED_SHARE = 0.9
#: Rows of x above which no chip fuses: the model leaves out what wide products lose there.
FUSED_AT_MOST = 2048
#: Rows of x up to which each chip fuses, by the number of genes.
FUSED_UP_TO = {
    name: tuple(chip.fused_up_to[0 if genes <= 2 else 1 if genes <= 4 else 2] for genes in range(FUSED_GENES + 1))
    for name, chip in CHIPS.items()
}


def costs(regime: str, tokens: int, itemsize: int, genes: int, chip: str = USUAL_CHIP) -> tuple[float, float]:
    """Microseconds per million weights: of the product alone, and what forming W takes; modelled, not measured.

    A panel's synthesis comes on top of its product, genes from memory and W into the cache. `rows` and `fused` read
    genes and x while they multiply: what they take is the longer of the two, at most `FUSED_SHARE` of the matrix rate.

    Args:
        regime: "rows", "fused" or "panel".
        tokens: rows of x.
        itemsize: bytes of an element of x, and of a gene.
        genes: how many.
        chip: class of the GPU.
    """
    of = CHIPS[chip]
    product = 2 * tokens / (of.half if itemsize == 2 else of.single / (itemsize // 4))
    if regime == "panel":
        return product, genes * itemsize / of.memory + itemsize / of.cache
    read = genes * itemsize * math.ceil(tokens / of.tokens) + itemsize * tokens / 128
    return product / FUSED_SHARE, max(read / of.cache, genes * itemsize / of.memory)


def adding(itemsize: int, genes: int, chip: str = USUAL_CHIP) -> float:
    """Microseconds per million weights to add dW to accumulators of 32 bits; modelled, not measured."""
    of = CHIPS[chip]
    return itemsize / of.cache + 8 * genes / of.memory


def chip_of(capability: tuple[int, int]) -> str:
    """The chip class of a compute capability; the oldest for whatever is older."""
    major, minor = capability
    if major <= 8:
        return "sm_89" if major == 8 and minor else "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


@lru_cache(maxsize=4096)
def turns(shape: tuple[int, int, int], weights: int, itemsize: int, aside: float, chip: str = USUAL_CHIP) -> int:
    """How many panels take turns on a GPU, one filled while another is in use; 1 where that is modelled to be slower.

    A weight is cut along its lines. More panels leave less of the other work before or after all products, but each
    product is handed out in whole tiles, and must last until the host has launched the next.

    Args:
        shape: of the products together: rows and columns of the result, and terms of each sum; the columns are cut.
        weights: elements of all panels.
        itemsize: bytes of each.
        aside: microseconds per million weights of the work beside the products.
        chip: class of the GPU.
    """
    (across, lines, inner), of, size = shape, CHIPS[chip], weights * itemsize
    if 0 in shape:
        return 1
    rate = 1e6 * (of.half if itemsize == 2 else of.single / (itemsize // 4))
    wave = 2 * BLAS_TILE**2 * inner * of.multiprocessors / rate

    def lasts(count: int) -> float:
        panels = count if count > 1 else math.ceil(size / GPU_PANEL_BYTES)
        tiles = math.ceil(across / BLAS_TILE) * math.ceil(lines / panels / BLAS_TILE)
        hidden = (1 - 1 / count) * (1 - TURN_SHARE) * aside * weights * 1e-6
        return panels * (math.ceil(tiles / of.multiprocessors) * wave + TURN_GAP) - hidden

    least = max(2, math.ceil(2 * size / GPU_PANEL_BYTES))
    most = min(max(least, MOST_TURNS), size // TURN_BYTES, int(2 * across * lines * inner / rate / TURN_TIME))
    best: int = min((1, *range(least, most + 1)), key=lasts)
    return best
