# SPDX-License-Identifier: Apache-2.0
"""What every launch asks of its tensors: the chip, the device guard, strides, whether wide loads are possible.

Launches themselves are in `expansion` and `_expansion_gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from pylearngene.triton_kernels import _tuned
from pylearngene.triton_kernels._row import INTERPRETER
from pylearngene.triton_kernels._table import chip_of, is_regular
from torch import Tensor
from triton import knobs

#: Whether the kernels were decorated for the interpreter (TRITON_INTERPRET is read once, when this is imported).
INTERPRETED = bool(knobs.runtime.interpret)
#: The minor version of Triton, by which rows of the launch table may differ.
VERSION = ".".join(triton.__version__.split(".")[:2])
#: Programs that the interpreter is said to run at once: few, so that tests reach what larger chips do.
INTERPRETED_MULTIPROCESSORS = 4

_NOTHING = nullcontext()


@lru_cache(maxsize=64)
def chip(device: torch.device) -> str:
    """The chip class of a device, by which rows of the launch table are found; what was tuned for it is read first."""
    if INTERPRETED:
        _tuned.install(INTERPRETER, INTERPRETER, triton.__version__)
        return INTERPRETER
    found = chip_of(torch.cuda.get_device_capability(device))
    assert found is not None, "refused before"
    _tuned.install(found, torch.cuda.get_device_name(device), triton.__version__)
    return found


def described(device: torch.device) -> str:
    """Which launches a device gets, in words."""
    path = _tuned.in_use(chip(device))
    return "tiles and thresholds are modelled, not tuned" if path is None else f"launches tuned here: {path}"


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; read once."""
    if INTERPRETED:
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def strides(genes: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row strides and column strides."""
    return tuple(gene.stride(0) for gene in genes), tuple(gene.stride(1) for gene in genes)


def regular(outs: int, inner: int, *matrices: Tensor) -> bool:
    """Whether a product takes the rows that load 16 bytes at a time."""
    even = outs % 16 == 0 and inner % 16 == 0
    return even and all(is_regular(matrix.data_ptr(), matrix.stride()) for matrix in matrices)
