# SPDX-License-Identifier: Apache-2.0
"""How a stage runs: its items in the order of their value, within a time budget, each result written as it comes.

An item that fails is a row that says so, and the others still run. What the items are is in the file of each stage.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.records import Records, Row
from benchmarks.gpu.summaries import line

#: Exit code of a process whose GPU can no longer be used; started again, the stage goes on behind what broke it.
BROKEN = 75
#: Seconds past the budget after which the item that still runs is given up.
GRACE = 15.0


@dataclass(frozen=True)
class Item:
    """One piece of a stage: a case that gives one row or more.

    Attributes:
        name: of its case.
        run: gives the rows, without the columns that are the same for all; takes the most seconds it may need.
        limit: seconds after which it counts as hung.
    """

    name: str
    run: Callable[[float], list[Row]]
    limit: float = 90.0


@dataclass(frozen=True)
class Setting:
    """Where and how a stage runs.

    Attributes:
        device: "cuda" or "cpu".
        out: folder of the results.
        tiny: sizes that take seconds on a CPU, to see that everything works.
        budget: seconds for the stage.
        keep_failed: leave cases that failed before as they are.
        only: text that the names of cases have to hold.
        began: when the stage began.
    """

    device: torch.device
    out: Path
    tiny: bool
    budget: float
    keep_failed: bool = False
    only: str = ""
    began: float = 0.0

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.began + self.budget - time.monotonic()


@dataclass(frozen=True)
class Outcome:
    """What a stage did: lines about what failed, what was left out for lack of time, and how many cases are there."""

    failed: list[str]
    left_out: list[str]
    done: int


def drive(items: Sequence[Item], records: Records, setting: Setting, apart: int = 0) -> Outcome:
    """Run what is not in the records yet.

    Args:
        items: the most valuable first.
        records: what is there.
        setting: of the stage.
        apart: 0 for items that run in this process; else so many at a time, each of which starts a process and ends
            it when its time is over.
    """
    left_out: list[str] = []
    chosen = [item for item in items if setting.only in item.name]

    def one(item: Item) -> None:
        if item.name in records:
            return
        if setting.left <= 0:
            left_out.append(item.name)
            return
        _run(item, records, setting, watched=apart == 0)

    if apart:
        with ThreadPoolExecutor(apart) as pool:
            list(pool.map(one, chosen))
    else:
        for item in chosen:
            one(item)
    names = {item.name for item in chosen}
    failed = [f"{row['case']}: {row['note']}" for row in records.rows if row["status"] == "failed"]
    done = len({row["case"] for row in records.rows if row["status"] == "ok"} & names)
    return Outcome(failed, left_out, done)


def _run(item: Item, records: Records, setting: Setting, watched: bool) -> None:
    start = time.monotonic()
    limit = min(item.limit, max(setting.left, 1.0))
    with _watchdog(item, records, setting) if watched else nullcontext():
        try:
            rows = item.run(limit)
        except Exception as error:  # whatever it is, the other items are still worth their time
            traceback.print_exc(file=sys.stderr)
            rows = [_failure(item.name, f"{type(error).__name__}: {error}")]
    records.add([{"case": item.name, "status": "ok", **row} for row in rows])
    state = next((str(row["status"]) for row in rows if row.get("status", "ok") != "ok"), "ok")
    print(f"{state:<6} {time.monotonic() - start:6.1f} s  {item.name}  {line(rows)}".rstrip(), flush=True)
    if setting.device.type == "cuda" and state == "failed" and watched:
        _leave_if_broken()


def _failure(name: str, note: str) -> Row:
    return {"case": name, "status": "failed", "note": note[:600]}


def _leave_if_broken() -> None:
    """After a wrong access every later call of CUDA fails in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.stdout.flush()
        os._exit(BROKEN)


@contextmanager
def _watchdog(item: Item, records: Records, setting: Setting) -> Iterator[None]:
    """Ends the process if the item hangs, since nothing else ends a kernel that waits for ever."""
    late = setting.left + GRACE < item.limit

    def hung() -> None:
        if not late:  # else it is left out: its own time was not over
            records.add([_failure(item.name, f"did not end within {item.limit:g} s")])
        print(f"{'left' if late else 'hung'}   {item.name}", flush=True)
        os._exit(BROKEN)

    timer = threading.Timer(min(item.limit, setting.left + GRACE), hung)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
