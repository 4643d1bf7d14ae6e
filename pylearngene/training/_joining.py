# SPDX-License-Identifier: Apache-2.0
"""Forming the group of processes that a launcher started, from the variables it sets.

torchrun and accelerate set the same ones; neither package is needed here. What the processes then tell each other is
in `processes`.
"""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its default arguments hold the group that is there when it is first imported, which then could not be closed.
import torch.distributed.nn.functional
from torch.distributed.rendezvous import rendezvous

from pylearngene.errors import ArgumentError, ProcessError

TIMEOUT = "PYLEARNGENE_PROCESS_TIMEOUT"
DEFAULT_SECONDS = 600.0
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int:
    """Return how many processes a launcher says there are; 1 where there is no launcher."""
    return number("WORLD_SIZE", 1) if all(name in os.environ for name in LAUNCHED) else 1


def number(name: str, default: int) -> int:
    """Return a launcher's variable as a whole number.

    Raises:
        ArgumentError: it is none.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ArgumentError(f"{name}: expected a whole number in the environment, got {text!r}")
    return int(text)


def timeout() -> timedelta:
    """Return how long a process waits for the others: ten minutes, or PYLEARNGENE_PROCESS_TIMEOUT in seconds.

    Raises:
        ArgumentError: the variable is not a number above 0.
    """
    text = os.environ.get(TIMEOUT, str(DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < 1e6:
        raise ArgumentError(f"{TIMEOUT}: expected seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)


def form_group() -> Any:
    """Meet the other processes and make the group; returns the store they share.

    Raises:
        ArgumentError: a variable is not what a launcher sets.
        ProcessError: this torch has no distributed package, or the others did not come in time.
    """
    if not dist.is_available():
        raise ProcessError("processes: expected a torch with torch.distributed, this one was built without it")
    rank, world, wait = number("RANK", 0), launched(), timeout()
    try:
        store, rank, world = next(rendezvous("env://", rank, world, timeout=wait))
        store.set_timeout(wait)
        dist.init_process_group(_backend(world), store=store, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError) as error:
        reason = f"{wait.total_seconds():g} s ({' '.join(str(error).split())[:200]})"
        raise ProcessError(f"processes: {world} of them could not meet within {reason}") from error
    return store


def _backend(world: int) -> str:
    """gloo; and nccl for CUDA tensors where every process of this machine has a GPU of its own."""
    if torch.cuda.device_count() < number("LOCAL_WORLD_SIZE", world):
        return "gloo"
    torch.cuda.set_device(number("LOCAL_RANK", 0))
    return "cpu:gloo,cuda:nccl"
