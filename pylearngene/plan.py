# SPDX-License-Identifier: Apache-2.0
"""Which regime computes a call: `rows` for few tokens, `fused` on a GPU, `panel` for many, `factored` without a weight.

`choose` reads shapes only, never values, and costs a few comparisons. It leaves out how a regime is computed.
"""

from __future__ import annotations

import math
import sys

from pylearngene._checks import choice

REGIMES = ("auto", "rows", "fused", "panel")
#: Primitives whose factors are contracted with x, so that there is no weight to form and no regime to pin.
FACTORED = ("low_rank",)
PANEL_BYTES = 1 << 20
GPU_PANEL_BYTES = 24 << 20
#: Rows of x up to which `rows` is faster than `panel` with the native CPU kernels: measured.
ROWS_UP_TO = 16
#: Rows of x up to which `fused` is used with Triton: modelled from bandwidths and rates, not measured.
FUSED_UP_TO = 2048
#: Genes up to which `fused` is compiled without spilling registers.
FUSED_GENES = 8
#: Genes from which weights of several layers are synthesized together with the native CPU kernels: measured.
STACK_FROM = 4

_pinned = "auto"


def set_regime(regime: str) -> None:
    """Pin one regime for every later call, or give the choice back with `"auto"`.

    Pinned to `"rows"`, a token's result does not depend on how many others come with it; in `"panel"` the BLAS decides
    the order of its sums by the batch. A regime that does not exist where a call runs (`fused` on the CPU, on a GPU
    with 32 bits or more, or with more than 8 genes; `rows` without the native module) falls back to `panel`, which
    gives the same weights. `low_rank` has no other regime than `factored`, and keeps it.

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


def choose(tokens: int, backend: str, itemsize: int = 4, genes: int = 2, op: str = "expansion") -> str:
    """The regime of a product.

    Args:
        tokens: rows of x.
        backend: who computes: "cpp", "triton" or "reference".
        itemsize: bytes of an element of x.
        genes: how many.
        op: stem of the primitive.
    """
    if op in FACTORED:
        return "factored"
    if backend == "cpp":
        possible, fits = "rows", tokens <= ROWS_UP_TO
    elif backend == "triton" and itemsize == 2 and genes <= FUSED_GENES:
        possible, fits = "fused", tokens <= FUSED_UP_TO
    else:
        return "panel"
    if _pinned == "auto":
        return possible if fits else "panel"
    return possible if _pinned == possible else "panel"


def most_rows() -> int:
    """The most tokens for which `choose` says `rows` of the native CPU kernels; 0 where it never does."""
    if _pinned == "auto":
        return ROWS_UP_TO
    return sys.maxsize if _pinned == "rows" else 0


def explain(tokens: int, backend: str, itemsize: int = 4, genes: int = 2, op: str = "expansion") -> str:
    """One line that says which regime runs and why; arguments as `choose`."""
    regime = choose(tokens, backend, itemsize, genes, op)
    if regime == "factored":
        return f"{regime}: {op} contracts x with one factor after the other, whatever the number of tokens"
    if backend == "reference":
        return f"{regime}: no kernels are in use, panels are synthesized by PyTorch"
    if _pinned != "auto":
        return f"{regime}: pinned by set_regime({_pinned!r})"
    if backend == "triton" and itemsize != 2:
        return f"{regime}: {8 * itemsize} bits wide; only products of 16 bits are fused on a GPU"
    if backend == "triton" and genes > FUSED_GENES:
        return f"{regime}: {genes} genes are more than {FUSED_GENES}"
    limit, kind = (ROWS_UP_TO, "") if backend == "cpp" else (FUSED_UP_TO, " (modelled, not yet measured)")
    return f"{regime}: {tokens} tokens are {'at most' if tokens <= limit else 'more than'} {limit}{kind}"


def choose_stack(layers: int, genes: int, native: bool) -> str:
    """The regime of whole weights of several layers: `stack`, every gene read once, or `panel`, layer by layer.

    Args:
        layers: how many.
        genes: how many.
        native: whether the native CPU kernels run, with genes whose columns are contiguous.
    """
    together = native and _pinned == "auto" and layers > 1 and genes >= STACK_FROM
    return "stack" if together else "panel"


def panel_length(width: int, itemsize: int, limit: int, device: str = "cpu") -> int:
    """How many lines of `width` elements one panel holds: at least 1, at most `limit`, all panels of about one size."""
    size = GPU_PANEL_BYTES if device == "cuda" else PANEL_BYTES
    most = max(1, min(limit, size // max(1, width * itemsize)))
    return max(1, math.ceil(limit / math.ceil(limit / most))) if limit else 1
