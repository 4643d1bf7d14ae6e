# SPDX-License-Identifier: Apache-2.0
"""Check, then time every case; write a CSV row per call and draw them.

Ours and its baselines take turns in one process, so that a slow minute hits all of them. Each call works on another
copy of the inputs than the calls before it; together the copies are larger than the last cache, so that weights come
from memory and genes are cold at the start of a pass, as they are between two passes of a whole network.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import expansion, low_rank, plots
from benchmarks.cases import SHORT, Case, WrongResultError
from pylearngene import _backends
from pylearngene.cli.report import machine
from pylearngene.files import write_atomic

STEMS: dict[str, Callable[..., list[Case]]] = {"expansion": expansion.cases, "low_rank": low_rank.cases}
RESULTS = Path(__file__).parent / "results"
KINDS = ("synthesis", "forward", "training", "host")
COLUMNS = (
    "case", "stem", "kind", "regime", "shape", "tokens", "genes", "dtype",
    "call", "rounds", "median_us", "p10_us", "p90_us", "ratio", "above_us",
    "bytes", "gb_per_s", "copy_share", "weights_per_s",
    "device", "cpu_level", "threads", "torch", "pylearngene", "commit",
)  # fmt: skip
MIB = 1 << 20
MEMORY, COPIES = 1 << 30, 64  # of the inputs: bytes of all copies together, and how many there are at most
FEWEST, MOST = 5, 100  # rounds
Row = dict[str, Any]


def all_cases(compiled: bool = False) -> list[Case]:
    """The cases of every primitive."""
    return [case for cases in STEMS.values() for case in cases(compiled=compiled)]


def measure(case: Case, seconds: float, facts: Row | None = None) -> list[Row]:
    """Check a case, time all of its calls, and return a row for each of them.

    Args:
        case: what to measure.
        seconds: time for the rounds; at least 5 and at most 100 rounds are made.
        facts: further columns, the same in all rows.

    Raises:
        WrongResultError: a call computes something wrong; nothing is timed then.
    """
    if "compiled" in case.baselines:
        torch.compiler.reset()  # graphs of other cases count against the limit of recompilations
    inputs = case.make()
    case.check(inputs)
    samples = _interleave(case, _copies(case, inputs), seconds)
    return _rows(case, samples, facts or {})


def _copies(case: Case, first: Any) -> list[Any]:
    """Sets of inputs for all calls, spaced so that a set has left the last cache before any call sees it again."""
    size = _held_bytes(first)
    calls = len(case.calls())
    spacing = max(1, min(-(-2 * _last_cache() // size), MEMORY // (calls * size), COPIES // calls))
    return [first, *(case.make() for _ in range(calls * spacing - 1))]


def _interleave(case: Case, copies: Sequence[Any], seconds: float) -> dict[str, list[float]]:
    """Microseconds of every call, round by round; the first of a round changes from round to round."""
    calls = list(case.calls().items())
    spacing = len(copies) // len(calls)
    for _, call in calls:
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
                start = time.perf_counter_ns()
                case.run(call, inputs)
                samples[name].append((time.perf_counter_ns() - start) / 1000 / case.repeats)
    return samples


def _rows(case: Case, samples: dict[str, list[float]], facts: Row) -> list[Row]:
    medians = {name: float(np.median(times)) for name, times in samples.items()}
    rows = []
    for name, times in samples.items():
        low, high = np.percentile(times, (10, 90))
        row: Row = {
            "case": case.name, "stem": case.stem, "kind": case.kind, "regime": case.regime, "shape": case.shape,
            "tokens": case.tokens, "genes": case.genes, "dtype": SHORT[case.dtype],
            "call": name, "rounds": len(times),
            "median_us": f"{medians[name]:.1f}", "p10_us": f"{low:.1f}", "p90_us": f"{high:.1f}",
            "ratio": f"{medians[name] / medians['ours']:.3f}", "above_us": f"{medians['ours'] - medians[name]:.1f}",
        }  # fmt: skip
        if case.moved:
            row["bytes"] = case.moved
            row["gb_per_s"] = f"{case.moved / medians[name] / 1000:.2f}"
            row["copy_share"] = f"{medians['copy'] / medians[name]:.3f}"
            row["weights_per_s"] = "" if name == "copy" else f"{case.weights / medians[name] * 1e6:.4g}"
        rows.append({**dict.fromkeys(COLUMNS, ""), **row, **facts})
    return rows


def machine_facts() -> Row:
    """The columns that say where and with what the numbers were made."""
    found, versions = machine.machine(), machine.versions()
    return {
        "device": found["processor"],
        "cpu_level": _backends.LEVEL_NAME,
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "pylearngene": versions["pylearngene"],
        "commit": machine.commit() or "",
    }


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write all rows; the file appears whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def file_name(facts: Row) -> str:
    """The stem of the result files: processor, instruction level and threads."""
    words = f"{facts['device']} {facts['cpu_level']} {facts['threads']}t"
    return re.sub(r"[^a-z0-9_]+", "-", words.lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 where a check failed (then nothing is written)."""
    options = _parser().parse_args(arguments)
    chosen = [case for case in all_cases(options.compile) if options.only in case.name]
    if not chosen:
        print(f"--only: expected part of a case's name, got {options.only!r}", file=sys.stderr)
        return 2
    facts, rows = machine_facts(), []
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if _backends.native() is None:  # a folder of sources that comes before the installed package has none
        print(f"{_backends._reason}\nthese will be the times of the reference", file=sys.stderr)
    for case in chosen:
        try:
            measured = measure(case, options.seconds, facts)
        except WrongResultError as error:
            print(f"refused, no speed of a wrong result: {error}", file=sys.stderr)
            return 1
        print(_line(measured), flush=True)
        rows += measured
    if options.only:
        print("--only: no file is written")
        return 0
    path = options.out / f"{file_name(facts)}.csv"
    write_csv(rows, path)
    print(path)
    for stem in dict.fromkeys(row["stem"] for row in rows):
        picture = path.with_name(f"{path.stem}{'' if stem == 'expansion' else '-' + stem}.png")
        plots.draw(path, picture, stem)
        print(picture)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Time all cases, write CSV and PNG.")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name; prints, no files")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of one case (default: 3)")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of the eager baseline (minutes more)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return parser


def _line(rows: Sequence[Row]) -> str:
    """One case in one line: our median, then each baseline's ratio to it; for host cost its own and our excess."""
    ours, *others = rows
    ratios = "  ".join(f"{row['call']} {float(row['ratio']):5.2f}x" for row in others)
    if ours["kind"] == "host":
        ratios = "  ".join(f"{row['call']} {row['median_us']} (+{row['above_us']})" for row in others)
        return f"{ours['case']:<58} {ours['median_us']:>7} us  {ratios}  ({ours['rounds']} rounds)"
    return f"{ours['case']:<46} {float(ours['median_us']) / 1000:9.3f} ms  {ratios}  ({ours['rounds']} rounds)"


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


if __name__ == "__main__":
    sys.exit(main())
