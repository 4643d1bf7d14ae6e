# SPDX-License-Identifier: Apache-2.0
"""Which regime computes a call: `rows` for few tokens or on a CPU, `fused`, `panel`, or `factored` without a weight.

`choose` reads shapes only, never values, and costs a few comparisons. Thresholds are in `cpu` and `gpu`, reasons in
`reasons`; how a regime is computed is not here.
"""

from __future__ import annotations

import sys

from pylearngene._checks import choice
from pylearngene.plan.cpu import STACK_FROM, USUAL_LEVEL, rows_up_to
from pylearngene.plan.gpu import CUDA_ROWS_UP_TO, FUSED_GENES, FUSED_UP_TO, GPU_ROWS_UP_TO, USUAL_CHIP

REGIMES = ("auto", "rows", "fused", "panel")
#: Primitives whose factors are contracted with x, so that there is no weight to form and no regime to pin.
FACTORED = ("low_rank",)

_pinned = "auto"


def set_regime(regime: str) -> None:
    """Pin one regime for every later call, or give the choice back with `"auto"`.

    On the CPU, pinned to `"rows"`, a token's result does not depend on how many others come with it, but that bfloat16
    at the level AVX512_BF16 has one order of sums up to 16 tokens and another above; in `"panel"` the BLAS decides the
    order by the batch, and on a GPU every regime may. A regime that does not exist where a call runs falls back to
    `panel`, which gives the same weights: `rows` without the native module, and on a GPU with more than 64 tokens or 32
    bits (of 32 bits its C++ kernels take 16 tokens); `fused` on the CPU, and on a GPU with 32 bits; both on a GPU with
    more than 8 genes. `low_rank` has no other regime than `factored`, and keeps it.

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


def choose(
    tokens: int,
    backend: str,
    itemsize: int = 4,
    genes: int = 2,
    op: str = "expansion",
    arch: str | None = None,
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
        arch: class of the GPU, as "sm_90", or instruction level of the CPU, as "AVX512"; None is a usual one.
        product: "y", "dx" or "dw"; on a CPU they differ.
        float16: which of the two kinds of 16 bits.
    """
    if op in FACTORED:
        return "factored"
    if backend == "cpp":
        if _pinned == "auto":
            limit = rows_up_to(arch or USUAL_LEVEL, itemsize, float16, genes, product)
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
        return "fused" if tokens <= FUSED_UP_TO[arch or USUAL_CHIP][genes] else "panel"
    return _pinned if _pinned == "fused" else "panel"


def pinned() -> str:
    """What `set_regime` was called with last."""
    return _pinned


def most_rows(level: str, itemsize: int, float16: bool = False, product: str = "y", genes: int = 2) -> int:
    """The most tokens for which `choose` says `rows` of the native CPU kernels; 0 where it never does."""
    if _pinned == "auto":
        return rows_up_to(level, itemsize, float16, genes, product)
    return sys.maxsize if _pinned == "rows" else 0


def choose_stack(layers: int, genes: int, native: bool) -> str:
    """The regime of whole weights of several layers: `stack`, every gene read once, or `panel`, layer by layer.

    Args:
        layers: how many.
        genes: how many.
        native: whether the native CPU kernels run, with genes whose columns are contiguous.
    """
    together = native and _pinned == "auto" and layers > 1 and genes >= STACK_FROM
    return "stack" if together else "panel"
