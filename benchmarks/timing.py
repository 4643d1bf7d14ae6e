# SPDX-License-Identifier: Apache-2.0
"""Check a case, let its calls take turns, and return a row for each of them.

Ours and its baselines take turns in one process, so that a slow minute hits all of them. Where a case asks for it each
call works on another copy of the inputs than the calls before it, so that all of them come from memory; networks work
on one set, whose genes a pass shares and whose dense weights evict what the pass before has left in the caches.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import SHORT, Case
from benchmarks.records import COLUMNS, Others, Row

MIB = 1 << 20
MEMORY, COPIES = 1 << 30, 64  # of the inputs: bytes of all copies together, and how many there are at most
FEWEST, MOST = 7, 100  # rounds
AGAIN = "again"  # ends the name of a call that goes ahead of itself: it finds in the caches what it leaves there


def measure(case: Case, seconds: float, facts: Row | None = None) -> list[Row]:
    """Check a case, time all of its calls, and return a row for each of them.

    Args:
        case: what to measure.
        seconds: time for the rounds; at least 7 and at most 100 rounds are made.
        facts: further columns, the same in all rows.

    Raises:
        WrongResultError: a call computes something wrong; nothing is timed then.
    """
    if "compiled" in case.baselines:
        torch.compiler.reset()  # graphs of other cases count against the limit of recompilations
    inputs = None
    if case.check_on is None:
        inputs = case.make()
        case.check(inputs)
    else:
        case.check(case.check_on())
    copies = _copies(case, case.make() if inputs is None else inputs)
    others = Others()
    samples = _interleave(case, copies, seconds)
    cores = others.cores()
    return _rows(case, samples, {"others": "" if cores is None else f"{cores:.2f}", **(facts or {})})


def _copies(case: Case, first: Any) -> list[Any]:
    """Sets of inputs for all calls, spaced so that a set has left the last cache before any call sees it again."""
    if case.one_set:
        return [first]
    size = _held_bytes(first)
    calls = len(case.calls())
    spacing = max(1, min(-(-2 * _last_cache() // size), MEMORY // (calls * size), COPIES // calls))
    return [first, *(case.make() for _ in range(calls * spacing - 1))]


def _interleave(case: Case, copies: Sequence[Any], seconds: float) -> dict[str, list[float]]:
    """Microseconds of every call, round by round; the first of a round changes from round to round."""
    calls = list(case.calls().items())
    spacing = len(copies) // len(calls)
    for _, call in calls if not case.one_set or case.check_on else ():  # elsewhere the check has run them all
        for inputs in copies[:2]:  # libraries load, threads start; the memory of every copy was touched when made
            case.run(call, inputs)
    samples: dict[str, list[float]] = {name: [] for name, _ in calls}
    with _no_collection():
        end = time.perf_counter() + seconds
        for turn in range(MOST):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            for place in range(len(calls)):
                index = (place + turn) % len(calls)
                name, call = calls[index]
                inputs = copies[(turn + index * spacing) % len(copies)]
                repeated = name.endswith(AGAIN)
                ahead = name if repeated else case.between
                if ahead and (repeated or ahead != name):
                    case.run(case.baselines[ahead], inputs)
                start = time.perf_counter_ns()
                case.run(call, inputs)
                samples[name].append((time.perf_counter_ns() - start) / 1000 / case.repeats)
    return samples


def _rows(case: Case, samples: dict[str, list[float]], facts: Row) -> list[Row]:
    medians = {name: float(np.median(times)) for name, times in samples.items()}
    rows = []
    for name, times in samples.items():
        low, high = np.percentile(times, (10, 90))
        least, most = _interval(times, samples["ours"])
        row: Row = {
            "case": case.name, "stem": case.stem, "kind": case.kind, "regime": case.regime, "shape": case.shape,
            "tokens": case.tokens, "genes": case.genes, "dtype": SHORT[case.dtype],
            "call": name, "rounds": len(times),
            "median_us": f"{medians[name]:.1f}", "p10_us": f"{low:.1f}", "p90_us": f"{high:.1f}",
            "ratio": f"{medians[name] / medians['ours']:.3f}",
            "ratio_low": f"{least:.3f}", "ratio_high": f"{most:.3f}",
            "above_us": f"{medians['ours'] - medians[name]:.1f}",
        }  # fmt: skip
        if case.moved:
            row["bytes"] = case.moved
            row["gb_per_s"] = f"{case.moved / medians[name] / 1000:.2f}"
            row["copy_share"] = f"{medians['copy'] / medians[name]:.3f}"
            row["weights_per_s"] = "" if name == "copy" else f"{case.weights / medians[name] * 1e6:.4g}"
        rows.append({**dict.fromkeys(COLUMNS, ""), **row, **facts})
    return rows


def _interval(times: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the ratio to ours, from the logarithms of every round's ratio (Student's t)."""
    logs = np.log(np.array(times) / np.array(ours))
    mean, count = float(logs.mean()), len(logs)
    if count < 2:
        return math.nan, math.nan
    reach = _student(count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    return math.exp(mean - reach), math.exp(mean + reach)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t by its expansion around the normal one; from 4 degrees on to 0.5 %.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    """
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _held_bytes(inputs: Any) -> int:
    """Bytes of all tensors held by a set of inputs, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack = [vars(inputs)]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, torch.nn.Module):
            stack += [*value.parameters(), *value.buffers()]
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
    return max(1, sum(storages.values()))


def _last_cache() -> int:
    """Bytes of the processor's last cache; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 * MIB)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
