# SPDX-License-Identifier: Apache-2.0
"""Finds the fastest launch per bucket on a device: each candidate is checked against float64 first, then timed.

Runs when asked (`pylearngene bench --tune`), never inside a step. How calls are timed is handed in, what is launched is
in `_trials`, tables are read and made in `_tuned`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from pylearngene.triton_kernels import _launch, _table
from pylearngene.triton_kernels._row import INTERPRETER, MOST_GENES, Row
from pylearngene.triton_kernels._trials import PROBLEMS, Problem, Trial, wrong
from pylearngene.triton_kernels._tuned import cache_folder, file_name
from pylearngene.triton_kernels._tuned_table import Bucket, Launch, read, table_of

from pylearngene.errors import TooLargeError

__all__ = [
    "Excluded", "Job", "Outcome", "Trial", "cache_folder", "file_name", "jobs", "place_of", "read", "table_of", "tune",
]  # fmt: skip

# A candidate that gains less is not told from noise: the library's own launch stays.
_WORTH = 0.98
_MOST_COPIES = 8

# Launches by name -> median microseconds.
Compare = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass(frozen=True)
class Job:
    """A bucket and the calls that stand for it."""

    bucket: Bucket
    dtype: torch.dtype
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Excluded:
    """A candidate that does not compile, does not launch or computes wrongly."""

    row: Row
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a bucket's candidates came to; no launch where none is right."""

    bucket: Bucket
    launch: Launch | None
    excluded: tuple[Excluded, ...]


def place_of(device: torch.device) -> tuple[str, str, str]:
    """Chip class, name and Triton version, by which tables are found."""
    chip = _launch.chip(device)
    return chip, INTERPRETER if chip == INTERPRETER else torch.cuda.get_device_name(device), triton.__version__


def jobs(
    dtype: torch.dtype, tokens: Sequence[int], shapes: Sequence[tuple[int, int]], genes: Sequence[int]
) -> list[Job]:
    """What there is to tune for layers `[O, I]` and M tokens, quickest first.

    Args:
        dtype: of x and the genes; products of 32 bits are not fused on a GPU, so float32 has synthesis and panels.
        tokens: every M.
        shapes: every [O, I].
        genes: every K.
    """
    trials: dict[Bucket, list[Trial]] = {}
    for count in genes:
        products = count <= MOST_GENES and (dtype.itemsize == 2 or _launch.INTERPRETED)
        for kernel, size, trial in _uses(tokens, shapes, products):
            sides = (trial.outs, trial.inner) if trial.tokens else (trial.inner,)  # of panels the columns alone count
            regular = all(side % 16 == 0 for side in sides)
            bucket = Bucket(kernel, size, count, dtype.itemsize, regular).rounded()
            trials.setdefault(bucket, []).append(trial)
    return [Job(bucket, dtype, tuple(some)) for bucket, some in trials.items()]


def _uses(tokens: Sequence[int], shapes: Sequence[tuple[int, int]], products: bool) -> Iterator[tuple[str, int, Trial]]:
    """(kernel, size, trial): what steps of training with these layers launch."""
    for outs, inner in shapes:
        yield "synthesize", 1, Trial("window", 0, outs, inner)
        for form in ("dots", "no dots"):
            yield "accumulate", 1, Trial(form, 0, outs, inner)
    if not products:
        return
    for outs, inner in shapes:
        for form in ("dots", "no dots"):
            for many in sorted(tokens)[-2:]:  # with few tokens there is little to gain
                yield "gene_gradients", outs * inner, Trial(form, many, outs, inner)
    for many in sorted(tokens, reverse=True):
        for outs, inner in shapes:
            for form in ("forward", "dx"):
                yield "fused", many, Trial(form, many, outs, inner)


def tune(job: Job, device: torch.device, compare: Compare, launches: int = 8) -> Outcome:
    """Check every candidate of a bucket in every trial, time those that are right, and return the fastest.

    Args:
        job: the bucket.
        device: a CUDA device, or the CPU in Triton's interpreter.
        compare: times launches against each other.
        launches: how many make up one timed call, on other memory than the one before.
    """
    chip, bucket = _launch.chip(device), job.bucket
    before = dict(_table.OVERRIDES)
    excluded = []
    try:
        _table.install({})
        rows = _table.candidates(
            bucket.kernel, chip, bucket.size, bucket.genes, bucket.itemsize, False, bucket.regular, _launch.VERSION
        )
        totals = dict.fromkeys(rows, 0.0)
        for trial in job.trials:
            problems = _problems(job, trial, device)
            for row in list(totals):
                _force(bucket, chip, row)
                if reason := _reason(problems[0], device):
                    excluded.append(Excluded(row, f"{trial}: {reason}"))
                    del totals[row]
            bursts = {row: partial(_burst, problems, partial(_force, bucket, chip, row), launches) for row in totals}
            for row, median in _medians(compare, bursts).items():
                totals[row] += median / launches
    finally:
        _table.install(before)
    return Outcome(bucket, _fastest(bucket, rows[0], totals), tuple(excluded))


def _fastest(bucket: Bucket, own: Row, totals: Mapping[Row, float]) -> Launch | None:
    if not totals:
        return None
    best = min(totals, key=lambda row: totals[row])
    library = totals.get(own, totals[best])
    if own in totals and totals[best] > _WORTH * library:
        best = own
    return Launch(bucket, best, totals[best], library)


def _medians(compare: Compare, bursts: Mapping[Row, Callable[[], object]]) -> dict[Row, float]:
    if not bursts:
        return {}
    rows = dict(enumerate(bursts))
    medians = compare({f"{place} {row.name}": bursts[row] for place, row in rows.items()})
    return {row: medians[f"{place} {row.name}"] for place, row in rows.items()}


def _force(bucket: Bucket, chip: str, row: Row) -> None:
    """Let every call of a bucket be launched by one row."""
    _table.install({bucket.key(chip): row})


def _burst(problems: Sequence[Problem], force: Callable[[], None], launches: int) -> None:
    force()
    for index in range(launches):
        problems[index % len(problems)].launch()


def _problems(job: Job, trial: Trial, device: torch.device) -> list[Problem]:
    """Sets of equal inputs, which together do not stay in the cache of a GPU."""
    make = partial(PROBLEMS[job.bucket.kernel], trial, job.bucket.genes, job.dtype, device)
    try:
        first: Problem = make()
        return [first, *(make() for _ in range(_copies(first, device) - 1))]
    except torch.OutOfMemoryError as error:
        raise TooLargeError(f"tune: {trial} with {job.bucket.genes} genes does not fit into memory: {error}") from error


def _copies(problem: Problem, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return int(max(2, min(_MOST_COPIES, -(-2 * cache // problem.held_bytes()))))


def _reason(problem: Problem, device: torch.device) -> str:
    """Why the launch in force is not to be used; empty if it is right."""
    try:
        return wrong(problem)
    except Exception as error:  # whatever compiler and driver raise is a reason, as long as the device lives
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
