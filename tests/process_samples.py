# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_processes run: this file is the program that they are started with.

`python process_samples.py JOB FOLDER` does a job; what a process found goes to FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pylearngene import cli
from pylearngene.cli import demo
from pylearngene.cli.demo import DemoConfig
from pylearngene.data import Dataset, Split
from pylearngene.errors import PylearngeneError
from pylearngene.methods import TLEG
from pylearngene.networks import auxiliary
from pylearngene.training import DistillationLoss, TrainConfig, train
from pylearngene.training import loop as loop_module

RANK = int(os.environ.get("RANK", "0"))
CONFIG = TrainConfig(epochs=2, batch=15, lr=1e-2, seed=3, evaluate=True)


class Net(nn.Module):
    """Two equal blocks, and dropout where it is asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.recompute = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            x = x + self.drop(torch.tanh(y))
        return self.head(x)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return auxiliary(Net(dropout), TLEG())


def toy(samples: int = 70) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(samples, 1, 4, 4, generator=generator)
    labels = (images.mean(dim=(1, 2, 3)) * 6).round().long().clamp(-1, 1) + 1
    return Dataset("toy", Split(images, labels), Split(images[:20], labels[:20]), ("a", "b", "c"), "made here")


def found(model: nn.Module, history: Any) -> dict[str, Any]:
    return {
        "losses": history.losses,
        "accuracies": history.accuracies,
        "tests": history.tests,
        "images": history.images,
        "state": {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()},
    }


def distilled(folder: Path) -> dict[str, Any]:
    """A batch that does not divide, distillation, clipping, evaluation and checkpoints."""
    model, teacher = network(), Net()
    config = replace(CONFIG, loss=DistillationLoss(0.5, 2.0))
    return found(model, train(model, toy(), config, teacher=teacher, out=folder / "state", progress=False))


def one_by_one(folder: Path) -> dict[str, Any]:
    """Batches of one sample: a process gets nothing."""
    model = network()
    return found(model, train(model, toy(6), replace(CONFIG, batch=1), progress=False))


def with_own_group(folder: Path) -> dict[str, Any]:
    if "RANK" not in os.environ:
        return distilled(folder)
    dist.init_process_group("gloo")
    result = distilled(folder)
    dist.destroy_process_group()
    return result


def everything(folder: Path) -> dict[str, Any]:
    result = {"own_group": with_own_group(folder / "own"), "one_by_one": one_by_one(folder)}
    return {**result, "distilled": distilled(folder)}


def stopped(folder: Path) -> dict[str, Any]:
    model = network(dropout=0.3 * ("DROPOUT" in os.environ))
    return found(model, train(model, toy(), CONFIG, out=folder / "state", stop_at=3, progress=False))


def resumed(folder: Path) -> dict[str, Any]:
    model = network(seed=9, dropout=0.3 * ("DROPOUT" in os.environ))
    return found(model, train(model, toy(), CONFIG, out=folder / "state", resume=True, progress=False))


def whole(folder: Path) -> dict[str, Any]:
    model = network(dropout=0.3 * ("DROPOUT" in os.environ))
    return found(model, train(model, toy(), CONFIG, progress=False))


WRAPPINGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


def gradients(folder: Path) -> dict[str, Any]:
    """Gradients after two passes, in every way of wrapping, with and without checkpointed activations."""
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    images = toy().train.images[:24].double()
    mine = images.tensor_split(2)[RANK] if several else images
    result = {}
    for name, options in WRAPPINGS.items():
        for recompute in (False, True):
            result[f"{name}, recomputed" if recompute else name] = wrapped(mine, recompute, options, several)
    if several:
        dist.destroy_process_group()
    return result


def wrapped(mine: Tensor, recompute: bool, options: dict[str, bool], several: bool) -> dict[str, list[float]]:
    net = network().double()
    net.recompute = recompute
    model = DistributedDataParallel(net, **options) if several else net
    for _ in range(2):
        net.zero_grad()
        model(mine).square().sum(dim=1).mean().backward()
    return {key: parameter.grad.flatten().tolist() for key, parameter in net.named_parameters()}


def at_step(step: int, act: Callable[[], None]) -> nn.Module:
    """A network that does something in process 1 before a step."""
    model, calls = network(), []

    def hook(*_: Any) -> None:
        calls.append(None)
        if RANK == 1 and len(calls) == step:
            act()

    model.register_forward_pre_hook(hook)
    return model


def raise_and_go_on(folder: Path) -> dict[str, Any]:
    """Process 1 fails, but its program does not end."""

    def fail() -> None:
        raise ZeroDivisionError("oops")

    return caught(at_step(3, fail), folder)


def fall_asleep(folder: Path) -> dict[str, Any]:
    return caught(at_step(3, lambda: time.sleep(6)), folder)


def leave_a_parameter_out(folder: Path) -> dict[str, Any]:
    model = network()
    model.idle = nn.Parameter(torch.ones(2))
    return caught(model, folder)


def go_wild(folder: Path) -> dict[str, Any]:
    """Process 1 alone has a loss that is not finite; both can go on with other options."""
    model = at_step(3, lambda: model.head.weight.data.fill_(torch.nan))
    first = caught(model, folder)
    again = network()
    return {**first, "after": train(again, toy(), CONFIG, progress=False).losses}


def caught(model: nn.Module, folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    try:
        train(model, toy(), CONFIG, out=folder / "state", progress=False)
    except Exception as error:
        code = error.exit_code if isinstance(error, PylearngeneError) else None
        result = {"error": type(error).__name__, "text": str(error), "code": code}
        result["seconds"] = time.monotonic() - start
        if RANK == 1:
            time.sleep(3)
        return result
    return {"error": None}


def command(act: Callable[[], None], step: int) -> Callable[[Path], None]:
    """`pylearngene train`, in which process 1 does something before a step."""

    def run(folder: Path) -> None:
        real, steps = loop_module.learning_rate, []

        def rate(*arguments: Any) -> float:
            steps.append(None)
            if RANK == 1 and len(steps) == step:
                act()
            return real(*arguments)

        loop_module.learning_rate = rate
        sys.argv = ["pylearngene", "train", "--out", str(folder / "out"), *SMALL]
        cli.main()

    return run


SMALL = ["--data", "digits", "--images", "64", "--width", "8", "--heads", "2", "--depth", "2", "--batch", "15"]


def divide() -> None:
    raise ZeroDivisionError("oops")


def tiny_demo(folder: Path) -> None:
    """`pylearngene demo`, of a size that takes seconds."""

    def tiny(out: Path, seed: int) -> DemoConfig:
        sizes = {"train_images": 256, "test_images": 100, "dim": 16, "heads": 2, "batch": 31, "tune_batch": 32}
        depths = {"depth": 3, "depths": (2, 4), "export_depth": 2, "memory_depths": (2, 4), "memory_dim": 32}
        return DemoConfig(out, epochs=1.0, tune_epochs=0.25, seeds=(seed,), **sizes, **depths)  # type: ignore[arg-type]

    demo.quick_config = tiny
    sys.argv = ["pylearngene", "demo", "--data", "digits", "--out", str(folder / "out"), "--json"]
    cli.main()


JOBS: dict[str, Callable[[Path], Any]] = {
    "everything": everything,
    "stopped": stopped,
    "resumed": resumed,
    "whole": whole,
    "whole-and-stopped": lambda folder: (whole(folder), stopped(folder))[0],
    "gradients": gradients,
    "raise": raise_and_go_on,
    "asleep": fall_asleep,
    "idle": leave_a_parameter_out,
    "wild": go_wild,
    "train-raises": command(divide, 3),
    "train-killed": command(lambda: os.kill(os.getpid(), signal.SIGKILL), 3),
    "demo": tiny_demo,
}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    answer = JOBS[sys.argv[1]](target)
    (target / f"{RANK}.json").write_text(json.dumps(answer))
