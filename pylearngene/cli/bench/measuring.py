# SPDX-License-Identifier: Apache-2.0
"""One run of `pylearngene bench`: every line checked, then timed, and the figures as plain values.

What is timed is in `layers`, how in `timing`, how it is shown in the command.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from pylearngene import _backends, plan
from pylearngene.cli.bench.layers import CALLS, KINDS, Stack, Synthesis, Work
from pylearngene.cli.bench.timing import Timing, cache_bytes, captured, clock_of, interleaved
from pylearngene.errors import ArgumentError, TooLargeError
from pylearngene.functional.expansion import MAX_GENES

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        device: where.
        dtype: of the products.
        tokens: every M.
        width: D.
        depth: blocks of four layers that share genes.
        genes: every K.
        seconds: for the rounds of one line.
        backward: forward and backward pass, with float32 parameters.
        graphs: replay CUDA graphs.
        explain: measure the regimes of a CPU apart, too.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: tuple[int, ...]
    width: int
    depth: int
    genes: tuple[int, ...]
    seconds: float
    backward: bool = False
    graphs: bool = False
    explain: bool = False

    @staticmethod
    def shapes_of(width: int) -> tuple[tuple[int, int], ...]:
        """[O, I] of the four layers of a block."""
        return tuple((outer * width, inner * width) for outer, inner in KINDS.values())


def measure(settings: Settings, progress: bool | None = None) -> dict[str, Any]:
    """Check and time every K and M.

    Args:
        settings: what to measure.
        progress: show a bar on stderr; None shows it on a terminal.

    Returns:
        The settings, and under `rows` a dictionary per line; times are per layer.

    Raises:
        ArgumentError: graphs were asked for on a CPU, or graphs or reasons with a backward pass.
        TooLargeError: a line does not fit into the memory of the device.
        WrongResultError: something computes wrongly; nothing of it is timed.
    """
    _check(settings)
    kind = settings.device.type
    hide = None if progress is None else not progress
    with (
        torch.cuda.device(settings.device) if kind == "cuda" else nullcontext(),
        tqdm(desc="bench", total=len(settings.genes) * len(settings.tokens), unit="line", disable=hide) as bar,
    ):
        rows, dense_bytes = _lines(settings, bar)
    return {
        "device": torch.cuda.get_device_name(settings.device) if kind == "cuda" else kind,
        "backend": _backends.implementation(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        **{name: getattr(settings, name) for name in ("width", "depth", "seconds", "backward", "graphs")},
        "dense_bytes": dense_bytes,
        "cache_bytes": cache_bytes(settings.device),
        "rows": rows,
    }


def _lines(settings: Settings, bar: tqdm[None]) -> tuple[list[dict[str, Any]], int]:
    """Every line, and the bytes of the dense weights beside it."""
    rows, dense_bytes = [], 0
    for genes in settings.genes:
        stack = Stack(settings.width, settings.depth, genes, settings.dtype, settings.device, settings.backward)
        dense_bytes = stack.dense_bytes
        synthesis = _synthesis(settings, Synthesis(stack))
        for tokens in settings.tokens:
            try:
                line = _line(settings, Work(stack, tokens), tokens, genes)
            except torch.OutOfMemoryError as error:
                raise TooLargeError(f"tokens: {tokens} rows do not fit into memory: {error}") from error
            rows.append({**line, "synthesis": synthesis})
            bar.update()
    return rows, dense_bytes


def _check(settings: Settings) -> None:
    if settings.graphs and (settings.device.type != "cuda" or settings.backward):
        got = "--backward" if settings.backward else f"device {settings.device}"
        raise ArgumentError(f"graphs: expected a forward pass on a CUDA device, got {got}")
    if settings.explain and settings.backward:
        raise ArgumentError("explain: expected a forward pass, got --backward")
    if max(settings.genes) > MAX_GENES:
        raise ArgumentError(f"genes: expected at most {MAX_GENES}, got {max(settings.genes)}")


def _line(settings: Settings, work: Work, tokens: int, genes: int) -> dict[str, Any]:
    """One K and M: the regime, the error, times of all calls, and what they are to each other."""
    error = work.check()
    calls: dict[str, Callable[[], object]] = {name: partial(work.run, name) for name in CALLS}
    if settings.graphs:
        calls = {name: captured(call) for name, call in calls.items()}
    times = interleaved(calls, settings.seconds, clock_of(settings.device))
    layers = settings.depth * len(KINDS)
    explained = _explained(settings, calls["ours"], tokens, genes)
    ours = times["ours"].median_us
    return {
        "genes": genes,
        "tokens": tokens,
        "regime": explained.partition(":")[0],
        "explained": explained,
        "error": error,
        "calls": {name: asdict(_per(time, layers)) for name, time in times.items()},
        "ratio_to_dense": times["dense"].median_us / ours,
        "ratio_to_eager": times["eager"].median_us / ours,
    }


def _explained(settings: Settings, ours: Callable[[], object], tokens: int, genes: int) -> str:
    """The plan's reason; its regimes' costs beside it where they are wanted and can be told apart."""
    who, arch, dtype = _backends.implementation(settings.device), _backends.arch(settings.device), settings.dtype
    measured = None
    if settings.explain and who == "cpp":
        weights = settings.depth * sum(outer * inner for outer, inner in settings.shapes_of(settings.width))
        measured = plan.measure(ours, weights)
    half = dtype == torch.float16
    return plan.explain(tokens, who, dtype.itemsize, genes, arch=arch, float16=half, measured=measured)


def _synthesis(settings: Settings, synthesis: Synthesis) -> dict[str, Any]:
    times = interleaved({"weights": synthesis.run, "copy": synthesis.copy}, settings.seconds, clock_of(settings.device))
    layers = settings.depth * len(KINDS)
    rates = {name: synthesis.moved / time.median_us / 1000 for name, time in times.items()}
    return {
        **asdict(_per(times["weights"], layers)),
        "bytes": synthesis.moved // layers,
        "gb_per_s": rates["weights"],
        "copy_gb_per_s": rates["copy"],
        "share_of_copy": rates["weights"] / rates["copy"],
    }


def _per(time: Timing, layers: int) -> Timing:
    """The time of one layer out of a pass through all."""
    return Timing(time.median_us / layers, time.p10_us / layers, time.p90_us / layers, time.rounds)
