# SPDX-License-Identifier: Apache-2.0
"""Every number of the demo's experiment that a reader could ask about, fixed before the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pylearngene.errors import ArgumentError

# Work of a block in units of "one image forward and backward": forward alone is a third of it, and a gene-backed
# block is charged more than it was measured to cost, so that the baseline of equal compute gets the benefit.
FORWARD_WORK = 1 / 3
GENE_BACKED_WORK = 1.3


@dataclass(frozen=True)
class DemoConfig:
    """Options of `run_demo`; rates, loss and start were chosen in trials scored on held-out training images."""

    out: Path
    train_images: int = 8_000
    test_images: int = 3_000
    epochs: float = 5.0
    tune_epochs: float = 0.5
    depth: int = 6
    depths: tuple[int, ...] = (2, 3, 4, 6, 8, 10)
    export_depth: int = 4
    dim: int = 64
    heads: int = 4
    batch: int = 128
    tune_batch: int = 64
    lr: float = 2e-3
    tune_lr: float = 5e-4
    scratch_lr: float = 2e-3
    aux_init: str = "fit"
    alpha: float = 0.5
    tau: float = 2.0
    seeds: tuple[int, ...] = (0,)
    memory_depths: tuple[int, ...] = (6, 12, 24, 48, 96)
    memory_dim: int = 192
    full: bool = False

    def __post_init__(self) -> None:
        if not self.depths or not self.seeds or not self.memory_depths:
            raise ArgumentError("depths, seeds, memory_depths: expected at least one each, got none")
        if self.export_depth not in self.depths:
            raise ArgumentError(f"export_depth: expected one of {list(self.depths)}, got {self.export_depth}")

    def fit(self, train: int, test: int) -> DemoConfig:
        """Return the configuration for a set with this many images: counts cut, epochs raised to keep the steps."""
        images = min(self.train_images, train)
        more = self.train_images / images
        return replace(
            self,
            train_images=images,
            test_images=min(self.test_images, test),
            epochs=round(self.epochs * more, 2),
            tune_epochs=round(self.tune_epochs * more, 2),
        )


def quick_config(out: Path, seed: int) -> DemoConfig:
    """Return the configuration of the plain `demo` command: under four minutes on two cores."""
    return DemoConfig(out, seeds=(seed,))


def full_config(out: Path, seed: int) -> DemoConfig:
    """Return the configuration of `demo --full`: three seeds, 20,000 images, the whole test split."""
    return DemoConfig(out, train_images=20_000, test_images=10_000, seeds=(seed, seed + 1, seed + 2), full=True)
