# SPDX-License-Identifier: Apache-2.0
"""What a CPU is known to do: up to how many tokens `rows` is faster than `panel`, and what products cost there.

Limits and rates are those of the generated table; it leaves out who asks, and how anything is computed.
"""

from __future__ import annotations

from functools import cache

from pylearngene.plan.cpu_rows import GENES, RATES, ROWS_UP_TO

USUAL_LEVEL = "AVX512"
#: Genes from which weights of several layers are synthesized together with the native CPU kernels: measured.
STACK_FROM = 2
#: TB/s at which genes are taken to come from the last cache, and a panel from the second, on the table's processor.
LAST_CACHE, SECOND_CACHE = 0.19, 0.4


@cache
def rows_up_to(level: str, itemsize: int, float16: bool = False, genes: int = 2, product: str = "y") -> int:
    """The most rows of x for which the native CPU kernels keep W in registers or L1; arguments as `choose`."""
    limits = ROWS_UP_TO.get(level, ROWS_UP_TO[USUAL_LEVEL])[_dtype(itemsize, float16)][product]
    return next((limit for limit, most in zip(limits, GENES, strict=True) if genes <= most), limits[-1])


def _dtype(itemsize: int, float16: bool) -> str:
    """What the table calls it; 64 bits are taken to be as 32."""
    return "fp32" if itemsize != 2 else "fp16" if float16 else "bf16"


def cpu_costs(
    regime: str, tokens: int, itemsize: int, genes: int, level: str, float16: bool = False
) -> tuple[float, float]:
    """Microseconds per million weights: of the product alone, and of genes and W; modelled, not measured.

    Genes come from the last cache; a panel of W is written and read in the second one, in `rows` it stays in registers.

    Args:
        regime: "rows" or "panel".
        tokens: rows of x.
        itemsize: bytes of an element of x, and of a gene.
        genes: how many.
        level: instruction level.
        float16: which of the two kinds of 16 bits.
    """
    rows, panel = RATES.get(level, RATES[USUAL_LEVEL])[_dtype(itemsize, float16)]
    rate = (rows if regime == "rows" else panel) / max(1, itemsize // 4)
    moved = genes * itemsize / LAST_CACHE + (2 * itemsize / SECOND_CACHE if regime == "panel" else 0)
    return 2 * tokens / rate, moved
