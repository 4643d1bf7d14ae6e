# SPDX-License-Identifier: Apache-2.0
"""Which parameters decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters in those that decay (two or more axes) and those that do not.

    Genes of biases and of norm gains have one axis, as the tensors they make, and so never decay.

    Returns:
        Two groups for a torch optimizer, an empty one left out.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
