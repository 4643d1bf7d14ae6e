# SPDX-License-Identifier: Apache-2.0
"""One seed of the experiment: ancestry, auxiliary network, descendants, and every baseline at every depth.

Nothing is chosen by looking at a result: seeds, steps and rates follow from the configuration alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pylearngene.cli.demo.config import FORWARD_WORK, GENE_BACKED_WORK, DemoConfig
from pylearngene.cli.models import small_vit
from pylearngene.data import Dataset
from pylearngene.hosts import find_blocks
from pylearngene.learngene import Learngene
from pylearngene.methods import TLEG
from pylearngene.networks import auxiliary, extract
from pylearngene.training import DistillationLoss, History, TrainConfig, evaluate, predict, processes, train

ANCESTRY, SCRATCH = 1, 2
SEED_STRIDE = 100


@dataclass
class SeedRun:
    """What one seed produced: numbers as plain values, and the networks the report needs."""

    seed: int
    numbers: dict[str, Any] = field(default_factory=dict)
    learngene: Learngene | None = None
    exported: nn.Module | None = None


@dataclass(frozen=True)
class _Stage:
    """What the arms of one seed share."""

    config: DemoConfig
    data: Dataset
    seed: int
    progress: bool | None

    def network(self, depth: int, role: int) -> nn.Module:
        """Build a fresh network; its start depends on seed, role and depth alone."""
        seed = (self.seed * SEED_STRIDE + depth) * 10 + role
        config, data = self.config, self.data
        return small_vit(data.image_size, len(data.classes), depth=depth, dim=config.dim, heads=config.heads, seed=seed)

    def options(self, name: str, **changes: Any) -> TrainConfig:
        """Return the short training of an arm, with changes."""
        config = self.config
        values = {"epochs": config.tune_epochs, "batch": config.tune_batch, "lr": config.tune_lr, "seed": self.seed}
        return TrainConfig(**{**values, **changes}, name=name)

    def run(self, network: nn.Module, options: TrainConfig, teacher: Tensor | None = None) -> dict[str, Any]:
        """Train a network and measure it on the test split."""
        history = train(network, self.data, options, teacher=teacher, progress=self.progress)
        return {**_numbers(network, self.data), **_record(history)}


def run_seed(config: DemoConfig, data: Dataset, seed: int, progress: bool | None) -> SeedRun:
    """Run the whole experiment for one seed.

    Args:
        config: see `DemoConfig`.
        data: already cut to the counts of the configuration.
        seed: decides every start and the order of the data.
        progress: show bars; None shows them on a terminal.
    """
    stage, result = _Stage(config, data, seed, progress), SeedRun(seed)
    long = {"epochs": config.epochs, "batch": config.batch, "lr": config.lr}
    soft = DistillationLoss(config.alpha, config.tau)

    ancestry = stage.network(config.depth, ANCESTRY)
    result.numbers["ancestry"] = stage.run(ancestry, stage.options("ancestry", **long))
    cpu = time.process_time()
    teacher = predict(ancestry, data.train.images, sharded=True)
    result.numbers["teacher_cpu_seconds"] = processes.current().sum([time.process_time() - cpu])[0]

    aux = auxiliary(ancestry, TLEG(), init=config.aux_init, seed=seed)
    result.numbers["auxiliary"] = stage.run(aux, stage.options("auxiliary", **long, loss=soft), teacher)
    learngene = result.learngene = extract(aux)
    result.numbers["learngene_parameters"] = learngene.num_parameters

    result.numbers["depths"] = {}
    for depth in config.depths:
        arms, tuned = _arms(stage, depth, ancestry, learngene, teacher)
        result.numbers["depths"][depth] = arms
        if depth == config.export_depth:
            result.exported = tuned
    return result


def _arms(
    stage: _Stage, depth: int, ancestry: nn.Module, learngene: Learngene, teacher: Tensor
) -> tuple[dict[str, Any], nn.Module]:
    """Run every arm at one depth; returns their numbers and the tuned descendant."""
    config = stage.config
    soft = DistillationLoss(config.alpha, config.tau)
    tuned = learngene.descend(depth=depth, backed=False)
    picked = pick_layers(ancestry, stage.network(depth, SCRATCH))
    arms: dict[str, Any] = {
        "untouched": {**_numbers(tuned, stage.data), "steps": 0, "images": 0, "cpu_seconds": 0.0, "losses": []},
        "picked_untouched": _numbers(picked, stage.data),
    }
    arms["tuned"] = stage.run(tuned, stage.options(f"tuned, depth {depth}"))
    arms["picked"] = stage.run(picked, stage.options(f"picked, depth {depth}"))
    scratch: dict[str, Any] = {"lr": config.scratch_lr}
    recipes: dict[str, tuple[dict[str, Any], Tensor | None]] = {
        "scratch": ({}, None),
        "scratch_distilled": ({"loss": soft}, teacher),
        "scratch_compute": ({"epochs": equal_compute_epochs(config, depth)}, None),
    }
    for arm, (changes, logits) in recipes.items():
        options = stage.options(f"{arm}, depth {depth}", **{**scratch, **changes})
        arms[arm] = stage.run(stage.network(depth, SCRATCH), options, logits)
    return arms, tuned


def equal_compute_epochs(config: DemoConfig, depth: int) -> float:
    """Compute how long a scratch network of this depth trains when it gets its share of the auxiliary's work.

    epochs = tune_epochs + (epochs * D * 1.3 + D / 3) / (n * depth)

    D is the auxiliary's depth, n the number of depths: the auxiliary's training and the pass of the teacher over
    the images, shared equally, on top of the steps that every arm gets.
    """
    work = config.epochs * config.depth * GENE_BACKED_WORK + config.depth * FORWARD_WORK
    return config.tune_epochs + work / (len(config.depths) * depth)


def picked_indices(available: int, wanted: int) -> list[int]:
    """Return evenly spaced layer numbers from the first to the last, repeated where more are wanted than there are.

    Example:
        >>> picked_indices(6, 4)
        [0, 2, 3, 5]
    """
    if wanted == 1:
        return [0]
    return [round(index * (available - 1) / (wanted - 1)) for index in range(wanted)]


@torch.no_grad()
def pick_layers(ancestry: nn.Module, network: nn.Module) -> nn.Module:
    """Fill `network`, of another depth, with evenly picked blocks of the ancestry and all that is outside them."""
    path = find_blocks(ancestry).path
    source, target = ancestry.get_submodule(path), network.get_submodule(path)
    assert isinstance(source, nn.ModuleList)
    assert isinstance(target, nn.ModuleList)
    for block, index in zip(target, picked_indices(len(source), len(target)), strict=True):
        block.load_state_dict(source[index].state_dict())
    outside = {key: value for key, value in ancestry.state_dict().items() if not key.startswith(f"{path}.")}
    network.load_state_dict(outside, strict=False)
    return network


def _numbers(network: nn.Module, data: Dataset) -> dict[str, Any]:
    score = evaluate(network, data.test, sharded=True)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"accuracy": score.accuracy, "test_loss": score.loss, "parameters": parameters}


def _record(history: History) -> dict[str, Any]:
    return {
        "steps": len(history.losses),
        "images": history.images,
        "seconds": history.seconds,
        "cpu_seconds": history.cpu_seconds,
        "losses": [round(loss, 7) for loss in history.losses],
    }
