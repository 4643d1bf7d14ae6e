# SPDX-License-Identifier: Apache-2.0
"""Training: distillation losses, a loop whose checkpoints resume bit for bit, a callback, and measured memory.

The loop is for image classifiers that fit one device; several processes share its batches. It leaves out data
loading, augmentation and sharded parameters; the layers of this library work in any other loop as well.
"""

from __future__ import annotations

from pylearngene.training.callback import GeneCallback
from pylearngene.training.config import History, TrainConfig
from pylearngene.training.evaluate import Score, evaluate, logits_of, predict
from pylearngene.training.loop import train
from pylearngene.training.losses import DistillationLoss
from pylearngene.training.memory import peak_bytes, resident_bytes
from pylearngene.training.optim import learning_rate

__all__ = [
    "DistillationLoss",
    "GeneCallback",
    "History",
    "Score",
    "TrainConfig",
    "evaluate",
    "learning_rate",
    "logits_of",
    "peak_bytes",
    "predict",
    "resident_bytes",
    "train",
]
