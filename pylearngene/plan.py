# SPDX-License-Identifier: Apache-2.0
"""Which regime computes a call: `rows` for few tokens or on a CPU, `fused`, `panel`, or `factored` without a weight.

`choose` reads shapes only, never values, and costs a few comparisons; `explain` adds what a model of the chip says of
the costs. It leaves out how a regime is computed.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import NamedTuple

from pylearngene._checks import choice

REGIMES = ("auto", "rows", "fused", "panel")
#: Primitives whose factors are contracted with x, so that there is no weight to form and no regime to pin.
FACTORED = ("low_rank",)
PANEL_BYTES = 1 << 20
GPU_PANEL_BYTES = 24 << 20
#: Rows of x up to which a GPU splits a product of 16 bits over its reduction: modelled, not measured.
GPU_ROWS_UP_TO = 64
#: Rows of x up to which the C++ kernels of a GPU are preferred, by bytes of an element of x: modelled, not measured.
CUDA_ROWS_UP_TO = {2: 8, 4: 16}
#: Genes up to which `fused` is compiled without spilling registers.
FUSED_GENES = 8
#: Genes from which weights of several layers are synthesized together with the native CPU kernels: measured.
STACK_FROM = 4
#: On a GPU, two panels may take turns, one filled while the other is in use; all of what follows is modelled. The most
#: panels that a weight is cut into for that, the least bytes of each, and the least microseconds of each product: the
#: host has to launch the next turn meanwhile.
MOST_TURNS, TURN_BYTES, TURN_TIME = 4, 1 << 20, 20.0
#: Microseconds that one more turn costs, and the share of what runs beside a product that slows the product down.
TURN_GAP, TURN_SHARE = 2.0, 0.5
#: Rows and columns of the tiles that a BLAS is taken to hand out to multiprocessors.
BLAS_TILE = 128
#: Lines that a panel of more lines is a multiple of on a GPU, so that every window of y begins at 128 bytes.
GPU_LINES = 64


class Rows(NamedTuple):
    """Rows of x up to which `rows` is faster than `panel` on a CPU.

    Attributes:
        y: in the forward pass.
        dx: for the gradient of x.
        dw: for the gradients of the genes.
    """

    y: int
    dx: int
    dw: int


_ALWAYS = Rows(sys.maxsize, sys.maxsize, sys.maxsize)
_FEW = Rows(16, 16, 16)
#: By instruction level, for elements of 32 and more bits, bfloat16 and float16: measured, but for 16 bits at DEFAULT. A
#: processor without instructions for bfloat16 has no fast products of it either; none has fast ones of float16.
ROWS_UP_TO = {
    "DEFAULT": (_FEW, _FEW, _FEW),
    "AVX2": (Rows(16, 16, 32), _ALWAYS, _ALWAYS),
    "AVX512": (_ALWAYS, _ALWAYS, _ALWAYS),
    "AVX512_BF16": (_ALWAYS, Rows(32, 4, 128), _ALWAYS),
}
USUAL_LEVEL = "AVX512"


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
_FUSED_UP_TO = {
    name: tuple(chip.fused_up_to[0 if genes <= 2 else 1 if genes <= 4 else 2] for genes in range(FUSED_GENES + 1))
    for name, chip in CHIPS.items()
}

_pinned = "auto"


def set_regime(regime: str) -> None:
    """Pin one regime for every later call, or give the choice back with `"auto"`.

    On the CPU, pinned to `"rows"`, a token's result does not depend on how many others come with it; in `"panel"` the
    BLAS decides the order of its sums by the batch, and on a GPU every regime may. A regime that does not exist where a
    call runs falls back to `panel`, which gives the same weights: `rows` without the native module, and on a GPU with
    more than 64 tokens or 32 bits (of 32 bits its C++ kernels take 16 tokens); `fused` on the CPU, and on a GPU with 32
    bits; both on a GPU with more than 8 genes. `low_rank` has no other regime than `factored`, and keeps it.

    Args:
        regime: `"auto"`, `"rows"`, `"fused"` or `"panel"`.

    Raises:
        ArgumentError: `regime` is none of these.

    Example:
        >>> import pylearngene as plg
        >>> plg.set_regime("panel")
        >>> plg.set_regime("auto")
    """
    global _pinned
    choice(regime, "regime", REGIMES)
    _pinned = regime


def _rows_up_to(level: str, itemsize: int, float16: bool = False) -> Rows:
    """The most rows of x for which the native CPU kernels keep W in registers or L1; arguments as `choose`."""
    wide, bfloat16, half = ROWS_UP_TO.get(level, ROWS_UP_TO[USUAL_LEVEL])
    return wide if itemsize != 2 else half if float16 else bfloat16


def choose(
    tokens: int,
    backend: str,
    itemsize: int = 4,
    genes: int = 2,
    op: str = "expansion",
    chip: str = USUAL_CHIP,
    product: str = "y",
    float16: bool = False,
) -> str:
    """The regime of a product.

    Args:
        tokens: rows of x.
        backend: who computes: "cpp", "triton", "cuda" (Triton, and C++ beside it) or "reference".
        itemsize: bytes of an element of x.
        genes: how many.
        op: stem of the primitive.
        chip: class of the GPU, or instruction level of the CPU.
        product: "y", "dx" or "dw"; on a CPU they differ.
        float16: which of the two kinds of 16 bits.
    """
    if op in FACTORED:
        return "factored"
    if backend == "cpp":
        if _pinned == "auto":
            limit: int = getattr(_rows_up_to(chip, itemsize, float16), product)
            return "rows" if tokens <= limit else "panel"
        return "rows" if _pinned == "rows" else "panel"
    if backend == "reference" or genes > FUSED_GENES or _pinned == "panel":
        return "panel"
    if itemsize != 2:
        few = backend == "cuda" and itemsize == 4 and tokens <= CUDA_ROWS_UP_TO[4]
        return "rows" if few and _pinned != "fused" else "panel"
    if tokens <= GPU_ROWS_UP_TO and _pinned != "fused":
        return "rows"
    if _pinned == "auto":
        return "fused" if tokens <= _FUSED_UP_TO[chip][genes] else "panel"
    return _pinned if _pinned == "fused" else "panel"


def pinned() -> str:
    """What `set_regime` was called with last."""
    return _pinned


def most_rows(level: str, itemsize: int, float16: bool = False, product: str = "y") -> int:
    """The most tokens for which `choose` says `rows` of the native CPU kernels; 0 where it never does."""
    if _pinned == "auto":
        limit: int = getattr(_rows_up_to(level, itemsize, float16), product)
        return limit
    return sys.maxsize if _pinned == "rows" else 0


def explain(
    tokens: int, backend: str, itemsize: int = 4, genes: int = 2, op: str = "expansion", chip: str = USUAL_CHIP
) -> str:
    """One line that says which regime runs and why, on a GPU with the modelled costs; arguments as `choose`."""
    regime = choose(tokens, backend, itemsize, genes, op, chip)
    if regime == "factored":
        return f"{regime}: {op} contracts x with one factor after the other, whatever the number of tokens"
    if backend == "reference":
        return f"{regime}: no kernels are in use, panels are synthesized by PyTorch"
    if backend == "cpp":
        if _pinned != "auto":
            return f"{regime}: pinned by set_regime({_pinned!r})"
        limit = _rows_up_to(chip, itemsize).y
        if limit == sys.maxsize:
            return f"{regime}: at this instruction level faster than panels for any number of tokens of these bits"
        return f"{regime}: {tokens} tokens are {_against(tokens, limit)}"
    product, synthesis = costs(regime, tokens, itemsize, genes, chip)
    modelled = (
        f"{product:.3g} us of products and {synthesis:.3g} us of gene traffic per million weights on {CHIPS[chip].name}"
    )
    return f"{regime}: {_why(regime, tokens, backend, itemsize, genes, chip)}; {modelled} (modelled, not yet measured)"


def _why(regime: str, tokens: int, backend: str, itemsize: int, genes: int, chip: str) -> str:
    """What decides on a GPU."""
    if _pinned != "auto":
        return f"pinned by set_regime({_pinned!r})"
    if genes > FUSED_GENES:
        return f"{genes} genes are more than {FUSED_GENES}"
    if itemsize == 2:
        limit = GPU_ROWS_UP_TO if regime == "rows" else _FUSED_UP_TO[chip][genes]
        return f"{tokens} tokens are {_against(tokens, limit)} for {genes} genes"
    if backend == "cuda" and itemsize == 4:
        return f"{tokens} tokens of 32 bits are {_against(tokens, CUDA_ROWS_UP_TO[4])}"
    return f"{8 * itemsize} bits wide; only products of 16 bits are fused on a GPU"


def _against(tokens: int, limit: int) -> str:
    return f"{'at most' if tokens <= limit else 'more than'} {limit}"


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


def choose_stack(layers: int, genes: int, native: bool) -> str:
    """The regime of whole weights of several layers: `stack`, every gene read once, or `panel`, layer by layer.

    Args:
        layers: how many.
        genes: how many.
        native: whether the native CPU kernels run, with genes whose columns are contiguous.
    """
    together = native and _pinned == "auto" and layers > 1 and genes >= STACK_FROM
    return "stack" if together else "panel"


def panel_length(width: int, itemsize: int, limit: int, device: str = "cpu", turns: int = 1) -> int:
    """How many lines of `width` elements one panel holds: at least 1, at most `limit`, all panels of about one size.

    Args:
        width: elements of a line.
        itemsize: bytes of each.
        limit: lines in all.
        device: its type.
        turns: how many panels at least; from 2 on, two of them share the workspace.
    """
    size = GPU_PANEL_BYTES if device == "cuda" else PANEL_BYTES
    most = max(1, min(limit, size // min(turns, 2) // max(1, width * itemsize)))
    length = max(1, math.ceil(limit / max(turns, math.ceil(limit / most)))) if limit else 1
    if device == "cuda" and most >= GPU_LINES < length < limit:
        return min(math.ceil(length / GPU_LINES), most // GPU_LINES) * GPU_LINES
    return length


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
