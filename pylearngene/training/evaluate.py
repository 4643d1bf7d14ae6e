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
from pylearngene.training.processes import ALONE, join

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
def predict(model: nn.Module, images: Tensor, batch: int = EVAL_BATCH, sharded: bool = False) -> Tensor:
    """Compute the logits of many images in evaluation mode; the model's mode is put back afterwards.

    Args:
        model: a classifier.
        images: [N, C, H, W].
        batch: images per forward pass.
        sharded: the processes of the run share the batches among them; all must call this. A process on its own
            computes all of them.

    Returns:
        float32 [N, classes] on the CPU, in every process.

    Numerics: batches are the same whoever computes them, so a sharded result has the bits of a whole one.
    """
    processes = join() if sharded else ALONE
    starts = range(0, max(1, len(images)), batch)
    # a process without a batch computes the first one for its shape, and adds nothing
    mine = starts[processes.rank :: processes.world] or starts[:1]
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    model.eval()
    try:
        parts = [logits_of(model(images[start : start + batch].to(device))).float().cpu() for start in mine]
    finally:
        for module, mode in modes:
            module.training = mode
    if processes.world == 1:
        return torch.cat(parts)
    logits = torch.zeros(len(images), parts[0].shape[1])
    for start, part in zip(starts[processes.rank :: processes.world], parts, strict=False):
        logits[start : start + batch] = part
    return processes.add(logits)


def evaluate(model: nn.Module, split: Split, batch: int = EVAL_BATCH, sharded: bool = False) -> Score:
    """Measure accuracy and mean cross-entropy of a classifier on a split; see `predict` for the options.

    Example:
        >>> flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> evaluate(flat, Split(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))).accuracy in (0.0, 1.0)
        True
    """
    logits = predict(model, split.images, batch, sharded)
    right = int((logits.argmax(dim=-1) == split.labels).sum())
    return Score(right / len(split), float(F.cross_entropy(logits, split.labels)))
