# SPDX-License-Identifier: Apache-2.0
"""How calls are timed against each other: in turns, in one process, by a clock of the device.

What is called stands elsewhere; nothing here knows of genes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FEWEST, MOST = 5, 100  # rounds
# Cycles for which the device is kept busy, so that the launches of a burst are waiting when it begins.
_AHEAD = 2_000_000

# Runs calls in order and returns how many microseconds each took.
Clock = Callable[[Sequence[Callable[[], object]]], list[float]]


@dataclass(frozen=True)
class Timing:
    """Median and quantiles of a call, in microseconds.

    Attributes:
        median_us: of all rounds.
        p10_us: a tenth of the rounds is faster.
        p90_us: a tenth is slower.
        rounds: how many.
    """

    median_us: float
    p10_us: float
    p90_us: float
    rounds: int


def processor_clock(calls: Sequence[Callable[[], object]]) -> list[float]:
    """By the process's own clock, each call on its own."""
    times = []
    for call in calls:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return times


def event_clock(calls: Sequence[Callable[[], object]], ahead: bool = False) -> list[float]:
    """By events on the current CUDA stream, without waiting between calls, as in a running network.

    Args:
        calls: what to run.
        ahead: keep the device busy before each call, so that it is the kernels alone that are timed, not the host.
    """
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    torch.cuda.synchronize()
    for call, (start, end) in zip(calls, pairs, strict=True):
        if ahead:
            torch.cuda._sleep(_AHEAD)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in pairs]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return event_clock if device.type == "cuda" else processor_clock


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Clock, most: int = MOST
) -> dict[str, Timing]:
    """Time calls in turns, so that a slow minute hits all of them; the first of a round changes from round to round.

    Args:
        calls: by name; each is run twice before.
        seconds: time for the rounds, of which there are at least 5.
        clock: runs and times.
        most: rounds that are made at most.
    """
    names = list(calls)
    with _no_collection():
        clock([calls[name] for name in names])
        one = sum(clock([calls[name] for name in names])) / 1e6
        rounds = max(FEWEST, min(most, int(seconds / max(one, 1e-9))))
        order = [names[(place + turn) % len(names)] for turn in range(rounds) for place in range(len(names))]
        times = clock([calls[name] for name in order])
    return {name: _timing([time for at, time in zip(order, times, strict=True) if at == name]) for name in names}


def _timing(times: Sequence[float]) -> Timing:
    low, median, high = (float(value) for value in np.percentile(times, (10, 50, 90)))
    return Timing(median, low, high, len(times))


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, which replays its launches without the host; its results stay the graph's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)
