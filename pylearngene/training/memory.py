# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call, measured by the allocator's own events.

Holds `peak_bytes` and `resident_bytes`. It leaves out what no allocator of torch sees: buffers of native
libraries, which tests check by the growth of the resident set instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(use_kineto=False, profile_memory=True) as profiler:  # kineto would print to stderr
            kept = fn()
        peak = max(accumulate(_allocations(profiler)), default=0)
    del kept
    return max(peak, 0)


def _allocations(profiler: profile) -> list[int]:
    """Signed sizes of all CPU allocations and frees, in the order of time."""
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == MEMORY_EVENT]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.device_type() == torch.autograd.DeviceType.CPU]


def resident_bytes() -> int:
    """Read the highest resident set of this process so far, in bytes; 0 where the system does not tell."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
