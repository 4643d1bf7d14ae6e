# SPDX-License-Identifier: Apache-2.0
"""TLEG on the demo's data: descendants of many depths, untouched and tuned, against every baseline of the demo.

The claim: one pair of genes, trained once at depth L, gives good starts at every depth (Xia et al., AAAI 2024,
arXiv 2312.05614). The arms are the demo's own; nothing is trained differently here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.claims.study import Bench, run
from pylearngene.cli.demo.arms import run_seed
from pylearngene.cli.demo.config import DemoConfig
from pylearngene.cli.report.labels import ARMS

DEPTHS = (2, 3, 4, 6, 8, 10)


def study(bench: Bench) -> None:
    """TLEG against the baselines of the demo, over depths."""
    settings = bench.settings
    config = DemoConfig(
        Path(),
        train_images=settings.train_images,
        test_images=settings.test_images,
        epochs=settings.epochs,
        tune_epochs=settings.tune_epochs,
        depth=settings.depth,
        depths=DEPTHS,
        dim=settings.dim,
        heads=settings.heads,
        batch=settings.batch,
        tune_batch=settings.tune_batch,
        lr=settings.lr,
        tune_lr=settings.tune_lr,
    )
    numbers = run_seed(config, bench.data, bench.seed, False).numbers
    for name in ("ancestry", "auxiliary"):
        _keep(bench, numbers[name], name, name, settings.depth, settings.epochs)
    for depth, arms in numbers["depths"].items():
        for arm, label in ARMS.items():
            _keep(bench, arms[arm], "depths", label, depth)


def _keep(bench: Bench, found: dict[str, Any], part: str, arm: str, depth: int, epochs: float = 0.0) -> None:
    bench.rows.append(
        {
            "study": bench.study,
            "part": part,
            "arm": arm,
            "depth": depth,
            "genes": 2 if arm.startswith(("auxiliary", "learngene")) else "",
            "seed": bench.seed,
            "accuracy": found["accuracy"],
            "stored_parameters": found["parameters"],
            "epochs": epochs or round(found["images"] / bench.settings.train_images, 3),
            "steps": found["steps"],
            "cpu_seconds": round(found["cpu_seconds"], 2),
        }
    )


if __name__ == "__main__":
    sys.exit(run("tleg", study))
