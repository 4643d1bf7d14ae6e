# SPDX-License-Identifier: Apache-2.0
"""What the two processes of test_ddp do: this file is the program that they are started with.

`python ddp_samples.py FOLDER` goes through all ways of wrapping in one pair of processes; what a process found goes to
FOLDER/<rank>.json. What is expected is said in the test.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_networks import RANK, WORLD, batch, difference, loss_of, mine, network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pylearngene.errors import PylearngeneError

WRAPPINGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}
CHECKPOINTS = {"no checkpoint": None, "checkpoint": False, "reentrant": True}
ACCUMULATED = {"one part": 1, "two parts": 2}
ROUNDS = 3


def gradients(net: nn.Module, run: Any, parts: int, alone: bool) -> list[Tensor]:
    """Gradients after some rounds, each but the first of several accumulated parts (it shows DDP a static graph)."""
    for number in range(ROUNDS):
        net.zero_grad()
        pieces = batch(number).tensor_split(parts if number else 1)
        for part, piece in enumerate(pieces, 1):
            with contextlib.nullcontext() if alone or part == len(pieces) else run.no_sync():
                (loss_of(run, mine(piece, alone)) / len(pieces)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def apart(one: list[Tensor], two: list[Tensor]) -> float:
    return max(difference(a, b) for a, b in zip(one, two, strict=True))


def wrapped(options: dict[str, bool], recompute: bool | None, parts: int, learn: bool) -> Any:
    one, two = network(learn), network(learn)
    two.recompute = recompute
    expected = gradients(one, one, parts, True)
    try:
        return apart(expected, gradients(two, DistributedDataParallel(two, **options), parts, False))
    except PylearngeneError as error:
        return f"{type(error).__name__}: {error}"


def matrix() -> dict[str, Any]:
    found = {}
    ways = itertools.product(WRAPPINGS, CHECKPOINTS, ACCUMULATED, (False, True))
    for wrapping, recompute, accumulated, learn in ways:
        name = f"{wrapping}, {recompute}, {accumulated}, {'learned' if learn else 'fixed'}"
        found[name] = wrapped(WRAPPINGS[wrapping], CHECKPOINTS[recompute], ACCUMULATED[accumulated], learn)
    return found


def skipping() -> dict[str, float]:
    """The second process leaves a block out: the others use its genes, its coefficients have no gradient there."""
    found = {}
    for name, learn, options in (("plain", False, {}), ("unused", True, {"find_unused_parameters": True})):
        one, two = network(learn), network(learn)
        for rank in range(WORLD):
            one.skipped = 2 if rank == 1 else None
            (loss_of(one, batch(0).tensor_split(WORLD)[rank]) / WORLD).backward()
        two.skipped = 2 if RANK == 1 else None
        model = DistributedDataParallel(two, **options)
        for _ in range(2):
            two.zero_grad()
            loss_of(model, mine(batch(0), False)).backward()
        found[name] = apart(*([p.grad for p in net.parameters()] for net in (one, two)))
    return found


def one_region() -> float:
    """A single reentrant checkpoint gives each gene one gradient, which DDP takes."""
    one, two = network(depth=1), network(depth=1)
    two.recompute = True
    expected = gradients(one, one, 1, True)
    return apart(expected, gradients(two, DistributedDataParallel(two), 1, False))


def compiled() -> dict[str, float]:
    """The wrapped network compiled, and a compiled network wrapped."""
    found = {}
    orders: dict[str, Callable[[nn.Module], Any]] = {
        "compiled outside": lambda net: torch.compile(DistributedDataParallel(net), backend="aot_eager"),
        "compiled inside": lambda net: DistributedDataParallel(torch.compile(net, backend="aot_eager")),
    }
    for name, wrap in orders.items():
        one, two = network(), network()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about itself
            found[name] = apart(gradients(one, one, 1, True), gradients(two, wrap(two), 1, False))
    return found


JOBS: dict[str, Callable[[], Any]] = {
    "matrix": matrix,
    "skipping": skipping,
    "one_region": one_region,
    "compiled": compiled,
}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    warnings.simplefilter("error")
    dist.init_process_group("gloo", timeout=timedelta(seconds=15))
    answers = {name: act() for name, act in JOBS.items() if not sys.argv[2:] or name in sys.argv[2:]}
    (target / f"{RANK}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()
