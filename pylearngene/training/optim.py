# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a pure function of the step.

Which parameters train and which of them decay is decided by `pylearngene.param_groups`.
"""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.0) -> float:
    """Compute the rate of a step: linear warm-up to `peak`, then half a cosine towards zero.

    rate(t) = peak * (t + 1) / w                             for t < w = round(warmup * total)
              peak * (1 + cos(pi * (t - w) / (total - w))) / 2    otherwise

    Args:
        step: 0-based, below `total`.
        total: number of steps.
        peak: highest rate.
        warmup: share of the steps that warm up.

    Example:
        >>> [round(learning_rate(t, 4, 1.0, 0.5), 3) for t in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
