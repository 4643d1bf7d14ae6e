# SPDX-License-Identifier: Apache-2.0
"""Running a classifier without training it: logits of a whole split, accuracy and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylearngene.data import Split
from pylearngene.errors import ShapeError

EVAL_BATCH = 500


@dataclass(frozen=True)
class Score:
    """Share of right answers and mean cross-entropy on a split."""

    accuracy: float
    loss: float


def logits_of(output: Any) -> Tensor:
    """Return the logits [B, C] of a model's output: the tensor itself, or its `logits` field.

    Raises:
        ShapeError: the output holds no tensor of two axes.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(f"model: expected an output of logits [B, C], got {got}")
    return logits


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = EVAL_BATCH) -> Tensor:
    """Compute the logits of many images in evaluation mode; the model's mode is put back afterwards.

    Args:
        model: a classifier.
        images: [N, C, H, W].
        batch: images per forward pass.

    Returns:
        float32 [N, classes] on the CPU.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    model.eval()
    try:
        parts = [logits_of(model(part.to(device))).float().cpu() for part in torch.split(images, batch)]
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(parts)


def evaluate(model: nn.Module, split: Split, batch: int = EVAL_BATCH) -> Score:
    """Measure accuracy and mean cross-entropy of a classifier on a split.

    Example:
        >>> flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> evaluate(flat, Split(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))).accuracy in (0.0, 1.0)
        True
    """
    logits = predict(model, split.images, batch)
    right = int((logits.argmax(dim=-1) == split.labels).sum())
    return Score(right / len(split), float(F.cross_entropy(logits, split.labels)))
