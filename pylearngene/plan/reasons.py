# SPDX-License-Identifier: Apache-2.0
"""Why a call takes its regime, in words: the threshold that decided, costs by the model, costs as measured here.

It changes nothing and decides nothing; `choose` is in `regimes`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

from pylearngene.errors import ArgumentError
from pylearngene.plan.cpu import USUAL_LEVEL, cpu_costs, rows_up_to
from pylearngene.plan.cpu_rows import MEASURED_ON
from pylearngene.plan.gpu import CHIPS, CUDA_ROWS_UP_TO, FUSED_GENES, FUSED_UP_TO, GPU_ROWS_UP_TO, USUAL_CHIP, costs
from pylearngene.plan.regimes import choose, pinned, set_regime

MEASURED = ("rows", "panel")


def explain(
    tokens: int,
    backend: str,
    itemsize: int = 4,
    genes: int = 2,
    op: str = "expansion",
    arch: str | None = None,
    float16: bool = False,
    measured: Mapping[str, float] | None = None,
) -> str:
    """One line that says which regime runs and why, with the modelled costs, and measured ones where there are some.

    Args:
        tokens: rows of x of a forward pass.
        backend: as `choose`, like all that follow but the last.
        itemsize: likewise.
        genes: likewise.
        op: likewise.
        arch: likewise.
        float16: likewise.
        measured: microseconds per million weights by regime, to be shown beside the model's.
    """
    regime = choose(tokens, backend, itemsize, genes, op, arch, float16=float16)
    if regime == "factored":
        return f"{regime}: {op} contracts x with one factor after the other, whatever the number of tokens"
    if backend == "reference":
        return f"{regime}: no kernels are in use, panels are synthesized by PyTorch"
    if backend == "cpp":
        level = arch or USUAL_LEVEL
        why, on = _why_on_cpu(tokens, itemsize, genes, level, float16), MEASURED_ON
        product, synthesis = cpu_costs(regime, tokens, itemsize, genes, level, float16)
    else:
        chip = arch or USUAL_CHIP
        why, on = _why(regime, tokens, backend, itemsize, genes, chip), CHIPS[chip].name
        product, synthesis = costs(regime, tokens, itemsize, genes, chip)
    modelled = f"{product:.3g} us of products and {synthesis:.3g} us of gene traffic per million weights on {on}"
    if not measured:
        return f"{regime}: {why}; {modelled} {'(modelled)' if backend == 'cpp' else '(modelled, not yet measured)'}"
    here = ", ".join(f"{name} {time:.3g} us" for name, time in measured.items())
    return f"{regime}: {why}; {modelled} (modelled); {here} per million weights (measured)"


def _why_on_cpu(tokens: int, itemsize: int, genes: int, level: str, float16: bool) -> str:
    """What decides on a CPU."""
    if pinned() != "auto":
        return f"pinned by set_regime({pinned()!r})"
    limit = rows_up_to(level, itemsize, float16, genes)
    if limit == sys.maxsize:
        return "at this instruction level faster than panels for any number of tokens of these bits"
    return f"{tokens} tokens are {_against(tokens, limit)} for {genes} genes"


def _why(regime: str, tokens: int, backend: str, itemsize: int, genes: int, chip: str) -> str:
    """What decides on a GPU."""
    if pinned() != "auto":
        return f"pinned by set_regime({pinned()!r})"
    if genes > FUSED_GENES:
        return f"{genes} genes are more than {FUSED_GENES}"
    if itemsize == 2:
        limit = GPU_ROWS_UP_TO if regime == "rows" else FUSED_UP_TO[chip][genes]
        return f"{tokens} tokens are {_against(tokens, limit)} for {genes} genes"
    if backend == "cuda" and itemsize == 4:
        return f"{tokens} tokens of 32 bits are {_against(tokens, CUDA_ROWS_UP_TO[4])}"
    return f"{8 * itemsize} bits wide; only products of 16 bits are fused on a GPU"


def _against(tokens: int, limit: int) -> str:
    return f"{'at most' if tokens <= limit else 'more than'} {limit}"


def measure(call: Callable[[], object], weights: int, rounds: int = 9) -> dict[str, float]:
    """Microseconds per million weights of a call on a CPU in `rows` and in `panel`, which take turns; medians.

    Args:
        call: computes with gene-backed layers; what is pinned is changed meanwhile.
        weights: of all these layers together.
        rounds: how often each regime is timed, after once untimed.

    Raises:
        ArgumentError: `weights` or `rounds` is below 1.
    """
    for name, value in (("weights", weights), ("rounds", rounds)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    before = pinned()
    times: dict[str, list[float]] = {regime: [] for regime in MEASURED}
    try:
        for turn in range(rounds + 1):
            for regime in MEASURED:
                set_regime(regime)
                start = time.perf_counter()
                call()
                if turn:
                    times[regime].append(time.perf_counter() - start)
    finally:
        set_regime(before)
    return {regime: median(taken) * 1e12 / weights for regime, taken in times.items()}
