# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call, measured by the allocator's own events.

Holds `peak_bytes` and `resident_bytes`. `peak_bytes` leaves out what torch's allocator does not see (buffers
of native libraries); for those the growth of the resident set is the check.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

MEMORY_EVENT = "[memory]"


def peak_bytes(fn: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Measure the most bytes held at once during `fn()`, above what was held before it.

    peak = max over time of (bytes allocated - bytes freed) since the start of the call

    Args:
        fn: called once, without arguments; what it returns is kept alive until the measurement ends.
        device: "cpu" reads the profiler's allocator events, a CUDA device its `max_memory_allocated`.

    Returns:
        Bytes as an int, at least 0. Tensors that existed before the call do not count.

    Numerics: exact on the CPU (every allocation of torch's allocator is an event); on a GPU sizes are
    rounded up to the caching allocator's blocks of 512 bytes.

    Example:
        >>> peak_bytes(lambda: torch.ones(1024, dtype=torch.float32))
        4096
    """
    device = torch.device(device)
    gc.collect()  # garbage freed during the call would count against it
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        session = ExitStack()
        with _quiet_stderr():
            profiler = session.enter_context(profile(profile_memory=True))
        try:
            kept = fn()
        finally:
            with _quiet_stderr():
                session.close()
        peak = max(accumulate(_allocations(profiler)), default=0)
    del kept
    return max(peak, 0)


def _allocations(profiler: profile) -> list[int]:
    """Signed sizes of all CPU allocations and frees, in the order of time."""
    results: Any = profiler.kineto_results  # its type stub lacks the methods used here
    cpu = torch._C._autograd.DeviceType.CPU
    events = [event for event in results.events() if event.name() == MEMORY_EVENT and event.device_type() == cpu]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events]


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what native code writes to stderr: the profiler of torch 2.13 logs each start and stop."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def resident_bytes() -> int:
    """Read the highest resident set of this process so far, in bytes; 0 where the system does not tell."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
