# SPDX-License-Identifier: Apache-2.0
"""The demo from data to folder: all seeds, the memory measurement, the exports and their checks, the report.

Several processes train together; the first one does all that comes after.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pylearngene.cli._output import plain, whole_folder
from pylearngene.cli.demo import memory_panel
from pylearngene.cli.demo.arms import SeedRun, run_seed
from pylearngene.cli.demo.config import DemoConfig
from pylearngene.cli.models import load_classifier, transformers
from pylearngene.cli.report.html import write_page
from pylearngene.cli.report.machine import commit, machine, versions
from pylearngene.cli.report.plots import draw_all, pyplot
from pylearngene.cli.report.results import summarize
from pylearngene.data import DIGITS_BANNER, Dataset
from pylearngene.learngene import Learngene
from pylearngene.training import evaluate, predict, processes

RESULTS, PAGE = "results.json", "report.html"
FORMAT = 1
TOLERANCE = 1e-4
CHECKED_IMAGES = 256


def run_demo(
    config: DemoConfig, data: Dataset, *, progress: bool | None = None, started: float | None = None
) -> dict[str, Any]:
    """Run the experiment and write its folder, which appears whole or not at all.

    Args:
        config: see `DemoConfig`; a smaller set gets more epochs instead.
        data: the whole set.
        progress: show bars on stderr; None shows them on a terminal.
        started: `time.perf_counter()` at the start of what the report calls wall time; None is now.

    Returns:
        The content of results.json; in processes but the first, as JSON holds it.

    Raises:
        ArgumentError: transformers or matplotlib is missing, or an option does not fit.
        WriteError: the folder cannot be written, or is not one of an earlier demo.
        BusyError: another process writes the same folder.
    """
    clock = time.perf_counter() if started is None else started
    cpu = time.process_time()
    run_by = processes.join()
    transformers()
    pyplot()
    config = config.fit(len(data.train), len(data.test))
    data = data.take(config.train_images, config.test_images)
    with run_by.within(lambda: whole_folder(config.out, RESULTS)) as folder:
        runs = [run_seed(config, data, seed, progress) for seed in config.seeds]
        trained = run_by.sum([time.process_time() - cpu])[0]

        def report() -> dict[str, Any]:
            assert folder is not None
            cpu = time.process_time()
            results = _measure(config, data, runs, folder, progress)
            draw_all(results, folder)
            spent = trained + time.process_time() - cpu
            results["timing"] = {"wall_seconds": time.perf_counter() - clock, "cpu_seconds": spent}
            write_page(results, folder)
            (folder / RESULTS).write_text(json.dumps(plain(results), allow_nan=False))
            return results

        return run_by.on_main(report)


def _measure(
    config: DemoConfig, data: Dataset, runs: list[SeedRun], folder: Path, progress: bool | None
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "kind": "pylearngene demo",
        "format_version": FORMAT,
        "commit": commit(),
        "versions": versions(),
        "machine": {**machine(), "processes": processes.current().world},
        "config": {key: value for key, value in asdict(config).items() if key != "out"},
        "data": {
            "name": data.name,
            "source": data.source,
            "classes": list(data.classes),
            "banner": DIGITS_BANNER if data.name == "digits" else None,
        },
        "runs": [{"seed": run.seed, **run.numbers} for run in runs],
        "exports": _export(config, data, runs[0], folder),
        "memory": memory_panel.measure(config.memory_dim, config.memory_depths, progress),
    }
    results["summary"] = summarize(results)
    return results


def _export(config: DemoConfig, data: Dataset, run: SeedRun, folder: Path) -> dict[str, Any]:
    """Save the learngene and a descendant, read both back, and compare what they compute."""
    assert run.learngene is not None
    assert run.exported is not None
    images = data.test.images[:CHECKED_IMAGES]
    depth = config.export_depth
    run.learngene.save_pretrained(folder / "learngene")
    again = Learngene.from_pretrained(folder / "learngene").descend(depth=depth, backed=True)
    plain_net = run.learngene.descend(depth=depth, backed=False)
    run.exported.save_pretrained(folder / "descendant")  # type: ignore[operator]
    loaded = load_classifier(folder / "descendant")
    return {
        "depth": depth,
        "learngene_difference": _difference("learngene", again, plain_net, images),
        "descendant_difference": _difference("descendant", loaded, run.exported, images),
        "descendant_class": f"{type(loaded).__module__.partition('.')[0]}.{type(loaded).__name__}",
        "descendant_accuracy": evaluate(loaded, data.test).accuracy,
        "learngene_bytes": sum(path.stat().st_size for path in (folder / "learngene").iterdir()),
    }


def _difference(name: str, one: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    """Return the largest difference of two networks' logits; more than rounding is an internal error."""
    found = float((predict(one, images) - predict(other, images)).abs().max())
    if not found <= TOLERANCE:
        raise RuntimeError(f"{name}: the network read back differs by {found}, more than {TOLERANCE}")
    return found
