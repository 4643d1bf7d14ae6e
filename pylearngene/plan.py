# SPDX-License-Identifier: Apache-2.0
"""Which regime computes a call: `rows` for few tokens, `panel` for many.

`choose` reads shapes only, never values, and costs a few comparisons. It leaves out how a regime is computed.
"""

from __future__ import annotations

import math

from pylearngene._checks import choice

REGIMES = ("auto", "rows", "fused", "panel")
PANEL_BYTES = 1 << 20
ROWS_UP_TO = 16

_pinned = "auto"


def set_regime(regime: str) -> None:
    """Pin one regime for every later call, or give the choice back with `"auto"`.

    Pinned to `"rows"`, a token's result does not depend on how many others come with it; in `"panel"` the BLAS decides
    the order of its sums by the batch. A regime that does not exist on a device
    (`fused` on the CPU, `rows` without the native module) falls back to `panel`, which gives the same weights.

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


def choose(tokens: int, native: bool) -> str:
    """The regime of a product with `tokens` rows of x, given whether the native CPU kernels run."""
    if not native or _pinned in ("panel", "fused"):
        return "panel"
    if _pinned == "rows":
        return "rows"
    return "rows" if tokens <= ROWS_UP_TO else "panel"


def explain(tokens: int, native: bool) -> str:
    """One line that says which regime runs and why."""
    regime = choose(tokens, native)
    if not native:
        return f"{regime}: the native CPU kernels are not in use, panels are synthesized by PyTorch"
    if _pinned != "auto":
        return f"{regime}: pinned by set_regime({_pinned!r})"
    relation = "at most" if regime == "rows" else "more than"
    return f"{regime}: {tokens} tokens are {relation} {ROWS_UP_TO}"


def panel_length(width: int, itemsize: int, limit: int) -> int:
    """How many lines of `width` elements one panel holds: at least 1, at most `limit`, all panels of about one size."""
    most = max(1, min(limit, PANEL_BYTES // max(1, width * itemsize)))
    return max(1, math.ceil(limit / math.ceil(limit / most))) if limit else 1
