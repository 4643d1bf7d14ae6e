# SPDX-License-Identifier: Apache-2.0
"""Time on a device: CUDA events around graph replays on a GPU, the clock of the host on a CPU.

A pass calls one function on every input set, so that no call finds its inputs in the last cache; passes of all
functions take turns. What is called is in the file of each primitive.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Samples = dict[str, list[float]]
#: Microseconds that a pass should last at least, so that what starts it does not count, and calls in it at most.
PASS_US, MOST_CALLS = 400.0, 256
FEWEST, MOST = 5, 50  # passes of each function
#: Cycles that the GPU waits ahead of a pass while the host enqueues it: about a tenth of a millisecond.
HEAD_START = 200_000


class Clock:
    """Passes and their times on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object]) -> float:
        """Microseconds of the device for what `work` enqueues."""
        if not self.cuda:
            start = time.perf_counter_ns()
            work()
            return (time.perf_counter_ns() - start) / 1000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000

    def host_time(self, work: Callable[[], object]) -> float:
        """Microseconds of the host for `work`, the device being idle before and not waited for."""
        self.wait()
        start = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - start) / 1000

    def captured(self, work: Callable[[], object]) -> tuple[Callable[[], object], str]:
        """A replay of `work` as one CUDA graph and "graph"; where there is none, `work` itself and "calls"."""
        if not self.cuda:
            return work, "calls"
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # a graph that is freed meanwhile would break the capture
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream(self.device))  # a capture that fails leaves its own current
            torch.cuda.synchronize()  # raises if the device is lost
            return work, f"calls ({' '.join(str(error).split())[:80]})"
        finally:
            gc.enable()
        return graph.replay, "graph"


def interleaved(
    clock: Clock,
    functions: Mapping[str, Callable[[Any], None]],
    sets: Sequence[Any],
    seconds: float,
    graphs: bool = True,
) -> tuple[Samples, dict[str, str]]:
    """Microseconds per call of every function, pass by pass, and how each was timed.

    Args:
        clock: of the device.
        functions: what is timed; each takes one input set.
        sets: input sets of the same sizes.
        seconds: for all passes together; each function gets at least 5 and at most 50 of them.
        graphs: whether passes become CUDA graphs on a GPU.
    """
    passes: dict[str, tuple[Callable[[], object], int]] = {}
    modes: dict[str, str] = {}
    for name, function in functions.items():
        for inputs in sets[:2]:  # kernels are compiled, libraries load
            function(inputs)
        clock.wait()
        once = clock.time(lambda function=function: function(sets[0]))
        calls = len(sets) * max(1, -(-int(PASS_US / max(once, 0.1)) // len(sets))) if clock.cuda else len(sets)
        calls = min(calls, max(MOST_CALLS, len(sets)))

        def work(function: Callable[[Any], None] = function, calls: int = calls) -> None:
            for turn in range(calls):
                function(sets[turn % len(sets)])

        run, modes[name] = clock.captured(work) if graphs else (work, "calls")
        passes[name] = (run, calls)
    return _take_turns(clock, passes, seconds), modes


def _take_turns(clock: Clock, passes: Mapping[str, tuple[Callable[[], object], int]], seconds: float) -> Samples:
    samples: Samples = {name: [] for name in passes}
    order = list(passes.items())
    for run, _ in passes.values():  # the first replay of a graph uploads it
        run()
    clock.wait()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for turn in range(MOST):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            for place in range(len(order)):
                name, (run, calls) = order[(place + turn) % len(order)]
                samples[name].append(clock.time(run) / calls)
    finally:
        gc.enable()
    return samples


def last_cache(device: torch.device) -> int:
    """Bytes of the GPU's L2; a few KiB on a CPU, where the suite only shows that it works."""
    if device.type != "cuda":
        return 1 << 14
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)) or 64 << 20
