# SPDX-License-Identifier: Apache-2.0
"""Where `rows` and `panel` cross in one series of points: probes far apart, then bisection between those that differ.

Every crossing is confirmed by measuring its two sides again, and given up where they then agree. How a point is
measured is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

#: Tokens that can be measured, and those that are to begin with.
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
PROBES = (16, 64, 256, 1024, 2048)
#: `rows` needs no workspace and wins where it takes at most so many times what `panel` takes.
TIE = 1.02
#: Two measurements whose ratios differ more than so many times ask for a third.
APART = 1.1
#: Where one regime takes so many times longer in the two probes below the last, the last is left out.
CLEAR = 1.5
#: Microseconds above which a call in `panel` is not measured: fewer tokens told that it is out of the question.
SLOWEST = 300_000.0

#: Tokens -> microseconds of `rows` and of `panel`.
Measure = Callable[[int], tuple[float, float]]


def search(measure: Measure) -> list[tuple[int, float, float]]:
    """Measure what tells where the regimes cross.

    Args:
        measure: times both regimes for so many tokens.

    Returns:
        Tokens, in their order, and microseconds of `rows` and of `panel`.
    """
    taken: dict[int, list[tuple[float, float]]] = {}

    def take(tokens: int) -> None:
        times = taken.setdefault(tokens, [])
        times.append(measure(tokens))
        if len(times) == 2 and abs(math.log(_ratio(times[0]) / _ratio(times[1]))) > math.log(APART):
            times.append(measure(tokens))

    take(PROBES[0])
    for before, tokens in pairwise(PROBES):
        if middle(taken[before])[1] * tokens / before > SLOWEST or _clear(taken):
            break
        take(tokens)
    if not _wins(taken[PROBES[0]]):
        take(TOKENS[0])
    while (tokens := _next(taken)) is not None:
        take(tokens)
    return [(tokens, *middle(times)) for tokens, times in sorted(taken.items())]


def _clear(taken: dict[int, list[tuple[float, float]]]) -> bool:
    """Whether the two probes below the last say the same clearly."""
    logs = [math.log(_ratio(middle(taken[tokens]))) for tokens in PROBES[-3:-1] if tokens in taken]
    return len(logs) == 2 and (min(logs) > math.log(CLEAR) or max(logs) < -math.log(CLEAR))


def _next(taken: dict[int, list[tuple[float, float]]]) -> int | None:
    """What to measure where neighbours differ: the tokens halfway between them, then both once more."""
    for low, high in pairwise(sorted(taken)):
        if _wins(taken[low]) != _wins(taken[high]):
            between = [tokens for tokens in TOKENS if low < tokens < high]
            once = [tokens for tokens in (low, high) if len(taken[tokens]) < 2]
            if between or once:
                return between[len(between) // 2] if between else once[0]
    return None


def _wins(times: Sequence[tuple[float, float]]) -> bool:
    return _ratio(middle(times)) <= TIE


def middle(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of several measurements the one in the middle by its ratio; the first of two."""
    return sorted(times, key=_ratio)[len(times) // 2] if len(times) > 2 else times[0]


def _ratio(times: tuple[float, float]) -> float:
    return times[0] / times[1]
