# SPDX-License-Identifier: Apache-2.0
"""What all studies share: options, the trained ancestry of a seed, rows, and the files that are written.

Which networks are compared is in the file of each method; pictures are in `pictures`, tables in `tables`.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import pictures, tables
from pylearngene.cli.models import small_vit
from pylearngene.cli.report.machine import commit, machine, versions
from pylearngene.data import Dataset, load
from pylearngene.files import write_atomic
from pylearngene.training import DistillationLoss, TrainConfig, evaluate, predict, train

PLACE = Path(__file__).parents[2] / "docs" / "claims"
COLUMNS = (
    "study", "part", "arm", "depth", "genes", "seed", "accuracy", "stored_parameters", "epochs", "steps", "cpu_seconds",
    "data", "train_images", "test_images", "width", "torch", "pylearngene", "commit", "processor", "threads",
)  # fmt: skip
ANCESTRY_START, SCRATCH_START = 1, 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Numbers of a study, fixed before it runs; rates and losses are the demo's."""

    train_images: int = 8_000
    test_images: int = 10_000
    epochs: float = 5.0
    tune_epochs: float = 0.5
    depth: int = 6
    dim: int = 64
    heads: int = 4
    batch: int = 128
    tune_batch: int = 64
    lr: float = 2e-3
    tune_lr: float = 5e-4
    seeds: tuple[int, ...] = (0, 1, 2)


TINY = Settings(train_images=256, test_images=100, epochs=1.0, depth=3, dim=16, heads=2, seeds=(0, 1))
SOFT = DistillationLoss(0.5, 2.0)


@dataclass
class Bench:
    """One seed of a study: the data, the settings, and the rows so far."""

    study: str
    settings: Settings
    data: Dataset
    seed: int
    rows: list[Row] = field(default_factory=list)

    def network(self, depth: int, role: int) -> nn.Module:
        """A fresh plain network whose start depends on seed, role and depth alone."""
        settings, data = self.settings, self.data
        start = (self.seed * 100 + depth) * 10 + role
        sizes = {"depth": depth, "dim": settings.dim, "heads": settings.heads}
        return small_vit(data.image_size, len(data.classes), **sizes, seed=start)

    def ancestry(self) -> tuple[nn.Module, Tensor]:
        """The trained ancestry network, and its logits on the training images."""
        network = self.network(self.settings.depth, ANCESTRY_START)
        self.fit(network, "ancestry", "ancestry", epochs=self.settings.epochs)
        return network, predict(network, self.data.train.images)

    def fit(
        self,
        network: nn.Module,
        part: str,
        arm: str,
        *,
        epochs: float,
        teacher: Tensor | None = None,
        genes: int | None = None,
        **options: Any,
    ) -> nn.Module:
        """Train a network, measure it and keep a row; `options` are those of `TrainConfig`."""
        settings = self.settings
        options = {"batch": settings.batch, "lr": settings.lr, **options}
        if teacher is not None:
            options["loss"] = SOFT
        config = TrainConfig(epochs=epochs, seed=self.seed, **options)
        begun = time.process_time()
        history = train(network, self.data, config, teacher=teacher, progress=False)
        self.note(network, part, arm, genes, epochs, len(history.losses), time.process_time() - begun)
        return network

    def tune(self, network: nn.Module, part: str, arm: str, genes: int | None = None, lr: float | None = None) -> None:
        """The demo's short training, at its low rate unless `lr` says otherwise."""
        settings = self.settings
        rate = settings.tune_lr if lr is None else lr
        self.fit(network, part, arm, epochs=settings.tune_epochs, genes=genes, batch=settings.tune_batch, lr=rate)

    def note(
        self,
        network: nn.Module,
        part: str,
        arm: str,
        genes: int | None = None,
        epochs: float = 0.0,
        steps: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Measure a network on the test images and keep a row."""
        row = {
            "study": self.study, "part": part, "arm": arm, "depth": depth_of(network), "genes": genes or "",
            "seed": self.seed, "accuracy": evaluate(network, self.data.test).accuracy,
            "stored_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "epochs": round(epochs, 3), "steps": steps, "cpu_seconds": round(seconds, 2),
        }  # fmt: skip
        self.rows.append(row)
        genes_word = "" if genes is None else f", {genes} genes"
        print(f"  {part}: {arm}, depth {row['depth']}{genes_word}: {row['accuracy']:.4f}", flush=True)


def depth_of(network: nn.Module) -> int:
    """The number of blocks of a transformers model."""
    return int(network.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def run(name: str, study: Callable[[Bench], None], arguments: Sequence[str] | None = None) -> int:
    """Run a study for all seeds and write its CSV, picture and page; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.claims.{name}", description=study.__doc__)
    parser.add_argument("--out", type=Path, default=PLACE, help="folder of the results (default: docs/claims)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--data", default=None, metavar="FOLDER", help="Fashion-MNIST idx files, or 'digits'")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds that shows that everything works")
    options = parser.parse_args(arguments)
    settings = TINY if options.tiny else Settings(seeds=tuple(range(options.seeds)))
    one = partial(_one_seed, name, study, settings, options.data)
    if options.jobs == 1:
        found = [one(seed) for seed in settings.seeds]
    else:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            found = list(pool.map(one, settings.seeds))
    write(name, [row for rows in found for row in rows], options.out)
    return 0


def _one_seed(name: str, study: Callable[[Bench], None], settings: Settings, data: str | None, seed: int) -> list[Row]:
    images = load(data).take(train=settings.train_images, test=settings.test_images)
    print(f"{name}, seed {seed}", flush=True)
    bench = Bench(name, settings, images, seed)
    study(bench)
    return [{**row, **facts(settings, images)} for row in bench.rows]


def facts(settings: Settings, data: Dataset) -> Row:
    """The columns that say with what and where the numbers were made."""
    found, packages = machine(), versions()
    return {
        "data": data.name, "train_images": len(data.train), "test_images": len(data.test), "width": settings.dim,
        "torch": packages["torch"], "pylearngene": packages["pylearngene"], "commit": commit() or "",
        "processor": found["processor"], "threads": torch.get_num_threads(),
    }  # fmt: skip


def write(name: str, rows: Sequence[Row], folder: Path) -> None:
    """Write the CSV, then the picture and the page, which are made from the CSV alone."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / f"{name}.csv"
    write_atomic(path, text.getvalue().encode())
    redraw(path)


def redraw(path: Path) -> None:
    """Make picture and page from a CSV file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures.draw(rows, path.with_suffix(".png"))
    write_atomic(path.with_suffix(".md"), tables.page(rows).encode())
    print(f"{path}\n{path.with_suffix('.png')}\n{path.with_suffix('.md')}")
