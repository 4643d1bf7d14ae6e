# SPDX-License-Identifier: Apache-2.0
"""`pylearngene bench --tune`: measures launches of the Triton kernels on this GPU and writes the table of the fastest.

Candidates, checks and the choice are in `pylearngene.triton_kernels.tuning`; how calls are timed is in `timing`.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm

from pylearngene import _backends, plan
from pylearngene.cli.bench.timing import event_clock, interleaved
from pylearngene.cli.report.table import text_table
from pylearngene.errors import ArgumentError, BackendError, GeneFileError, TooLargeError, WriteError
from pylearngene.files import write_atomic

# For the rounds of one trial; what the device is kept busy with before each is not counted.
_SECONDS, _ROUNDS = 0.05, 25


@dataclass(frozen=True)
class TuneSettings:
    """What to tune.

    Attributes:
        device: a CUDA device.
        dtype: of x and the genes.
        tokens: every M.
        shapes: every [O, I].
        genes: every K.
        budget: seconds after which no further bucket is begun.
        out: file of the table; None is the user's cache folder.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    genes: tuple[int, ...]
    budget: float
    out: Path | None = None


@dataclass
class _Run:
    """What has been tuned so far."""

    path: Path
    known: dict[Any, Any]
    outcomes: list[Any] = field(default_factory=list)
    left: int = 0


def tune(settings: TuneSettings, progress: bool | None = None) -> dict[str, Any]:
    """Tune bucket by bucket and write the table: whole, or not at all.

    Buckets that the table lacks come first, those that the plan has no use for last. A bucket that was begun is
    finished. What is finished is written, too, when the budget ends, the run is interrupted
    or the device fails; entries of an earlier run stay unless they were tuned again.

    Args:
        settings: what to tune.
        progress: show a bar on stderr; None shows it on a terminal.

    Returns:
        `table`: its file, `launches` and `excluded` as plain values, `left`: buckets for which there was no time.

    Raises:
        ArgumentError: the device is no CUDA device.
        BackendError: Triton does not compute there.
        TooLargeError: a trial does not fit into the memory of the device.
        WriteError: the table cannot be written.
    """
    if settings.device.type != "cuda":
        raise ArgumentError(f"tune: expected a CUDA device, whose Triton kernels are tuned, got {settings.device}")
    if _backends.triton_for(settings.device) is None:
        raise BackendError(f"tune: Triton does not compute on {settings.device} here; `pylearngene env` says why")
    with torch.cuda.device(settings.device):
        # by its number, as tensors name it
        numbered = replace(settings, device=torch.device("cuda", torch.cuda.current_device()))
        return run(numbered, _compare, progress)


def run(settings: TuneSettings, compare: Callable[..., Mapping[str, float]], progress: bool | None) -> dict[str, Any]:
    """`tune` with any way to time launches against each other, on any device that the kernels run on."""
    tuning: Any = importlib.import_module("pylearngene.triton_kernels.tuning")
    place = tuning.place_of(settings.device)
    path = _path(settings.out, tuning, place)
    done = _Run(path, _known(path, tuning, place))
    jobs = tuning.jobs(settings.dtype, settings.tokens, settings.shapes, settings.genes)
    jobs.sort(key=lambda job: (job.bucket in done.known, _unused(job.bucket, place[0])))
    _check_place(path)
    try:
        _tune_all(settings, jobs, partial(tuning.tune, device=settings.device, compare=compare), done, progress)
    finally:
        _write(done, tuning, place)
    return _facts(done, place)


def _unused(bucket: Any, chip: str) -> bool:
    """Whether the plan never launches the fused product in a bucket unless a regime is pinned."""
    if bucket.kernel != "fused" or chip not in plan.CHIPS:
        return False
    return plan.choose(bucket.size, "triton", bucket.itemsize, bucket.genes, arch=chip) == "panel"


def _tune_all(
    settings: TuneSettings, jobs: Sequence[Any], tune_one: Callable[..., Any], done: _Run, progress: bool | None
) -> None:
    end = time.monotonic() + settings.budget
    hide = None if progress is None else not progress
    with tqdm(jobs, "tune", unit="bucket", disable=hide) as bar:
        for count, job in enumerate(bar):
            done.left = len(jobs) - count
            if time.monotonic() > end:
                return
            done.outcomes.append(tune_one(job))
            done.left -= 1


def _compare(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of kernels alone, without the host."""
    times = interleaved(calls, _SECONDS, partial(event_clock, ahead=True), most=_ROUNDS)
    return {name: timing.median_us for name, timing in times.items()}


def _path(out: Path | None, tuning: Any, place: tuple[str, str, str]) -> Path:
    if out is not None:
        return out
    folder = tuning.cache_folder()
    if folder is None:
        raise ArgumentError("out: expected a file, since this user has no home folder with a cache in it")
    return Path(folder) / str(tuning.file_name(*place))


def _check_place(path: Path) -> None:
    """Find out before the measuring whether the folder can be there; caches are their owner's alone."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"out: {path} cannot be written: {error.strerror or error}") from error


def _known(path: Path, tuning: Any, place: tuple[str, str, str]) -> dict[Any, Any]:
    """The launches of an earlier run, by bucket; none if there is no table, or one that is of no use."""
    chip, _, version = place
    if not path.exists():
        return {}
    try:
        return {launch.bucket: launch for launch in tuning.read(path, chip, version)}
    except (GeneFileError, TooLargeError) as error:
        typer.echo(f"pylearngene: {error}; the table is made anew", err=True)
        return {}


def _write(done: _Run, tuning: Any, place: tuple[str, str, str]) -> None:
    new = {outcome.bucket: outcome.launch for outcome in done.outcomes}
    if not any(launch is not None for launch in new.values()):
        return
    launches = [launch for launch in {**done.known, **new}.values() if launch is not None]
    text = json.dumps(tuning.table_of(launches, *place), indent=1)
    write_atomic(done.path, text.encode() + b"\n")


def _facts(done: _Run, place: tuple[str, str, str]) -> dict[str, Any]:
    chip, device, version = place
    return {
        "table": str(done.path) if done.path.exists() else None,
        "chip": chip,
        "device": device,
        "triton": version,
        "left": done.left,
        "launches": [
            {**vars(launch.bucket), "launch": launch.row.name, **_times(launch)}
            for launch in (outcome.launch for outcome in done.outcomes)
            if launch is not None
        ],
        "excluded": [
            {**vars(outcome.bucket), "launch": excluded.row.name, "reason": excluded.reason}
            for outcome in done.outcomes
            for excluded in outcome.excluded
        ],
    }


def _times(launch: Any) -> dict[str, float]:
    return {"microseconds": launch.microseconds, "library": launch.library}


def table_rows(facts: dict[str, Any]) -> str:
    """What was tuned as a table; below it what was excluded, and where the table is."""
    head = ["kernel", "size", "K", "bytes", "launch", "us", "library us", "gain"]
    rows = [
        [
            row["kernel"], str(row["size"]), str(row["genes"]), str(row["itemsize"]), row["launch"],
            f"{row['microseconds']:.1f}", f"{row['library']:.1f}", f"{row['library'] / row['microseconds']:.2f}",
        ]
        for row in facts["launches"]
    ]  # fmt: skip
    lines = [text_table(head, rows, right={1, 2, 3, 5, 6, 7})]
    lines += [
        f"excluded: {row['kernel']} {row['launch']}, K = {row['genes']}: {row['reason']}" for row in facts["excluded"]
    ]
    if facts["left"]:
        lines.append(f"{facts['left']} buckets are left for another run: the budget ended")
    lines.append(f"table: {facts['table']}" if facts["table"] else "no table was written")
    return "\n".join(lines)
