# SPDX-License-Identifier: Apache-2.0
"""What a training run is asked to do, and what it says it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pylearngene.errors import ArgumentError
from pylearngene.training.losses import DistillationLoss


@dataclass(frozen=True)
class TrainConfig:
    """Options of `train`: AdamW with linear warm-up and a cosine down to zero.

    Args:
        epochs: passes over the data; fractions are allowed.
        batch: samples per step, over all processes together; the incomplete last batch of an epoch is left out.
        lr: highest learning rate.
        weight_decay: of tensors with two or more axes; gains, biases and their genes have none.
        warmup: share of all steps with a rising rate, 0 to 1.
        clip: largest norm of the gradient; None does not clip.
        seed: of the data order and of dropout, which draws differently in each process.
        loss: see `DistillationLoss`.
        checkpoint_every: steps between checkpoints; 0 writes one at the end of each epoch.
        evaluate: whether the test split is measured after each epoch and at the end.
        name: shown by the progress bar.

    Raises:
        ArgumentError: an option is outside its range.
    """

    epochs: float = 5.0
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float | None = 1.0
    seed: int = 0
    loss: DistillationLoss = field(default_factory=lambda: DistillationLoss(kind="none"))
    checkpoint_every: int = 0
    evaluate: bool = False
    name: str = "train"

    def __post_init__(self) -> None:
        _expect("epochs", self.epochs, 0.0 < self.epochs < float("inf"), "a finite number above 0")
        _expect("batch", self.batch, self.batch >= 1, "at least 1")
        _expect("lr", self.lr, 0.0 < self.lr < float("inf"), "a finite number above 0")
        _expect("weight_decay", self.weight_decay, 0.0 <= self.weight_decay < float("inf"), "at least 0")
        _expect("warmup", self.warmup, 0.0 <= self.warmup <= 1.0, "0 to 1")
        _expect("clip", self.clip, self.clip is None or self.clip > 0.0, "a number above 0, or None")
        _expect("seed", self.seed, 0 <= self.seed < 2**31, "0 to 2**31 - 1")
        _expect("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 0, "at least 0")

    def steps_per_epoch(self, samples: int) -> int:
        """Return the number of full batches in `samples`; a set smaller than a batch is one batch."""
        return max(1, samples // self.batch)

    def total_steps(self, samples: int) -> int:
        """Return the number of steps of the whole run, at least 1."""
        return max(1, round(self.epochs * self.steps_per_epoch(samples)))

    def to_config(self) -> dict[str, Any]:
        """Return what decides the numbers as plain JSON values (the name and evaluation do not)."""
        values = asdict(self)
        for key in ("name", "evaluate", "checkpoint_every"):
            del values[key]
        return values


@dataclass
class History:
    """What happened in a run; `losses` and `accuracies` are those of the training batches, per step.

    With several processes these are of whole batches, `cpu_seconds` is the sum over the processes, and `seconds` and
    `peak_bytes` are of the process that reads them.
    """

    name: str = "train"
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    tests: list[dict[str, float]] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return asdict(self)


def _expect(name: str, value: object, fine: bool, expected: str) -> None:
    if not fine:
        raise ArgumentError(f"{name}: expected {expected}, got {value}")
