# SPDX-License-Identifier: Apache-2.0
"""The stage `speed`: every case checked against float64, then timed with its baselines in turns, one row per call.

First come the two ceilings that shares refer to: a copy, and a large product of the vendor's library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import SHORT, Case
from benchmarks.gpu import expansion
from benchmarks.gpu.operands import dense_accumulation
from benchmarks.gpu.records import Records, Row
from benchmarks.gpu.stage import Item, Outcome, Setting, drive
from benchmarks.gpu.timing import Clock, Samples, interleaved, last_cache
from benchmarks.gpu.witness import Seen, watching

#: The cases of every primitive: `cases(device, tiny)`.
PRIMITIVES: tuple[Callable[[torch.device, bool], list[Case]], ...] = (expansion.cases,)
COLUMNS = (
    "stem", "kind", "shape", "tokens", "genes", "dtype", "call", "regime", "launch", "timed", "rounds",
    "median_us", "p10_us", "p90_us", "ratio", "above_us", "tflops", "bytes", "gb_per_s", "copy_share",
    "weights_per_s", "roof_share", "note",
)  # fmt: skip
MOST_SETS, MOST_BYTES = 16, 24 << 30  # input sets of a case, and their bytes together
COPY_BYTES, PRODUCT = 2 << 30, 8192


def run(setting: Setting, records: Records) -> Outcome:
    """All cases of all primitives, as far as the budget goes."""
    clock = Clock(setting.device)
    items = [Item("roof", partial(_roof, setting, clock))]
    for primitive in PRIMITIVES:
        for case in primitive(setting.device, setting.tiny):
            items.append(Item(case.name, partial(measure, case, clock, records, setting), 120.0))
    return drive(items, records, setting)


def measure(case: Case, clock: Clock, records: Records, setting: Setting, _limit: float = 0.0) -> list[Row]:
    """The rows of one case: ours first, then every baseline.

    Raises:
        WrongResultError: a call computes something wrong; nothing is timed then.
    """
    if "compiled" in case.baselines:
        torch.compiler.reset()  # graphs of other cases count against the limit of recompilations
    inputs, before = _made(case, clock)
    seen = _checked(case, inputs)
    calls = {name: partial(case.run, call) for name, call in case.calls().items()}
    seconds = 0.05 if setting.tiny else 0.1 * len(calls)
    if case.kind == "host":
        samples, timed = _host_samples(clock, calls, inputs, case.repeats, seconds), dict.fromkeys(calls, "host")
    else:
        sets = [inputs] if case.kind == "stack" else _sets(case, inputs, before, clock)
        for one in sets:
            one.fresh = False
        samples, timed = interleaved(clock, calls, sets, seconds)
    return _rows(case, samples, timed, seen, _ceilings(records), clock.device)


def _made(case: Case, clock: Clock) -> tuple[Any, int]:
    """One input set, and its bytes (0 on a CPU)."""
    before = torch.cuda.memory_allocated(clock.device) if clock.cuda else 0
    inputs = case.make()
    after = torch.cuda.memory_allocated(clock.device) if clock.cuda else 0
    return inputs, after - before


def _sets(case: Case, first: Any, size: int, clock: Clock) -> list[Any]:
    """So many input sets that each has left the last cache before its next turn."""
    size = max(size, case.moved, 1)
    wanted = max(2, -(-2 * last_cache(clock.device) // size))
    count = min(wanted, MOST_SETS, max(1, MOST_BYTES // size))
    return [first, *(case.make() for _ in range(count - 1))]


def _checked(case: Case, inputs: Any) -> dict[str, Seen]:
    """Check every call, and see what each takes."""
    case.check(inputs)
    seen = {}
    for name, call in case.calls().items():
        with watching() as seen[name]:
            case.run(call, inputs)
    return seen


def _host_samples(
    clock: Clock, calls: dict[str, Callable[[Any], None]], inputs: Any, repeats: int, seconds: float
) -> Samples:
    samples: Samples = {name: [] for name in calls}
    for _ in range(max(5, min(50, int(seconds / 0.01)))):
        for name, call in calls.items():
            samples[name].append(clock.host_time(partial(call, inputs)) / repeats)
    return samples


def _ceilings(records: Records) -> tuple[float, float]:
    """Bytes and operations per microsecond, as measured; 0 where they are not."""
    found = {row["call"]: row for row in records.rows if row["case"] == "roof" and row["status"] == "ok"}
    if not found:
        return 0.0, 0.0
    return 1e3 * float(found["copy"]["gb_per_s"]), 1e6 * float(found["product"]["tflops"])


def _roof(setting: Setting, clock: Clock, _limit: float) -> list[Row]:
    """The ceilings: a copy counting bytes read and written, and a square product of bfloat16."""
    device, dtype = setting.device, torch.bfloat16
    count = (1 << 16 if setting.tiny else COPY_BYTES) // 2
    size = 64 if setting.tiny else PRODUCT
    source, target = torch.randn(count // 4, device=device).repeat(2), torch.empty(count // 2, device=device)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    functions = {
        "copy": lambda _: target.copy_(source),
        "product": lambda _: torch.mm(a, b, out=out),
    }
    samples, timed = interleaved(clock, functions, [None], 0.05 if setting.tiny else 1.0)
    rows: list[Row] = []
    for name, moved, operations in (("copy", 2 * target.nbytes, 0), ("product", 0, 2 * size**3)):
        row: Row = {
            "call": name,
            "kind": "roof",
            "timed": timed[name],
            "shape": f"{size} x {size}" if operations else "",
        }
        rows.append({**row, **_times(samples[name]), **_rates(samples[name], moved, operations), "bytes": moved or ""})
    return rows


def _rows(
    case: Case,
    samples: Samples,
    timed: dict[str, str],
    seen: dict[str, Seen],
    ceilings: tuple[float, float],
    device: torch.device,
) -> list[Row]:
    ours = float(np.median(samples["ours"]))
    operations = {"synthesis": 0, "host": 0, "training": 6}.get(case.kind, 2) * case.tokens * case.weights
    rows = []
    for name, times in samples.items():
        median = float(np.median(times))
        row: Row = {
            "stem": case.stem, "kind": case.kind, "shape": case.shape, "tokens": case.tokens, "genes": case.genes,
            "dtype": SHORT[case.dtype], "call": name, "timed": timed[name],
            "regime": " ".join(seen[name].regimes), "launch": "; ".join(seen[name].launches),
            "ratio": f"{median / ours:.4f}", "above_us": f"{ours - median:.2f}",
            **_times(times), **_rates(times, case.moved if case.kind == "synthesis" else 0, operations),
        }  # fmt: skip
        if case.kind == "synthesis":
            row["weights_per_s"] = f"{case.weights / median * 1e6:.4g}"
            row["copy_share"] = f"{case.moved / median / ceilings[0]:.4f}" if ceilings[0] else ""
        if case.moved and ceilings[0]:
            row["bytes"] = case.moved
            row["roof_share"] = f"{max(case.moved / ceilings[0], operations / ceilings[1]) / median:.4f}"
        if case.kind == "wgrad" and name == "dense":
            row["note"] = dense_accumulation(device, case.dtype)[0]
        rows.append(row)
    return rows


def _times(times: Sequence[float]) -> Row:
    low, median, high = np.percentile(times, (10, 50, 90))
    return {"median_us": f"{median:.3f}", "p10_us": f"{low:.3f}", "p90_us": f"{high:.3f}", "rounds": len(times)}


def _rates(times: Sequence[float], moved: int, operations: int) -> Row:
    median = float(np.median(times))
    row: Row = {}
    if moved:
        row["gb_per_s"] = f"{moved / median / 1e3:.4g}"
    if operations:
        row["tflops"] = f"{operations / median / 1e6:.4g}"
    return row


def without_compiler(case: Case) -> Case:
    """The case without `torch.compile`, for tests that have no time for it."""
    return replace(case, baselines={name: call for name, call in case.baselines.items() if name != "compiled"})
