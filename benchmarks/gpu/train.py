# SPDX-License-Identifier: Apache-2.0
"""The stage `train`: whole training steps, their time beside a dense network's, and where their memory goes.

Every network is measured alone for its memory; for its time it takes turns with a dense one. All train under autocast
to bfloat16 with the same fused AdamW. The example of memory limits runs last, where it is there.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.networks import Net, backed, materialize, nets
from benchmarks.gpu.processes import output
from benchmarks.gpu.records import REPOSITORY, Records, Row, read
from benchmarks.gpu.stage import Item, Outcome, Setting, drive
from benchmarks.gpu.timing import Clock

COLUMNS = (
    "net", "variant", "genes", "tokens", "rounds", "median_ms", "p10_ms", "p90_ms", "of_dense", "of_compiled",
    "compile_s", "cap_mib", "depth", "estimated_mib",
    "weights_mib", "gradients_mib", "optimizer_mib", "saved_mib", "saved_weights_mib", "workspace_mib", "peak_mib",
    "weight_memory_mib", "weight_memory_of_dense", "loss", "note",
)  # fmt: skip
MIB = 1 << 20
#: Variants in the order of their value: how weights come about, genes, compiled.
VARIANTS = {
    "dense": ("dense", 0, False),
    "ours K2": ("ours", 2, False),
    "ours K4": ("ours", 4, False),
    "materialized K2": ("materialized", 2, False),
    "materialized K2, compiled": ("materialized", 2, True),
    "ours K2, compiled": ("ours", 2, True),
    "dense, compiled": ("dense", 0, True),
    "materialized K4": ("materialized", 4, False),
}
TINY_VARIANTS = ("dense", "ours K2", "ours K4", "materialized K2", "ours K2, compiled")
LIMIT, EXAMPLE = 150.0, REPOSITORY / "examples" / "memory_limited.py"
#: GiB on a GPU, MiB on a CPU.
CAPS, TINY_CAPS = (8, 16, 24), (96,)
TINY_EXAMPLE = ("--forms", "ours", "--width", "128", "--deepest", "2")


@dataclass
class Training:
    """A network, its optimizer and a batch."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]
    loss: Callable[[], Tensor]

    def step(self, after_forward: Callable[[], None] = lambda: None) -> Tensor:
        """Forward, backward and update; gradients are dropped at the end."""
        loss = self.loss()
        after_forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def run(setting: Setting, records: Records) -> Outcome:
    """All variants of all networks, the usual ones first, then the example of memory limits."""
    clock = Clock(setting.device)
    items = [
        Item(f"{net.name}: {name}", partial(_variant, net, name, clock, records, setting), LIMIT)
        for net in nets(setting.tiny)
        for name in (TINY_VARIANTS if setting.tiny else VARIANTS)
    ]
    items.sort(key=lambda item: "compiled" in item.name and not item.name.startswith("vit"))
    outcome = drive(items, records, setting)
    caps = TINY_CAPS if setting.tiny else CAPS
    last = drive(
        [Item(f"memory_limited: {cap}", partial(_memory_limited, setting, cap), 300.0) for cap in caps],
        records, setting, apart=1,
    )  # fmt: skip
    return Outcome(last.failed, outcome.left_out + last.left_out, outcome.done + last.done)


def made(net: Net, variant: str, device: torch.device) -> Training:
    """A network in one variant, ready to train."""
    kind, genes, compiled = VARIANTS[variant]
    torch.manual_seed(0)
    model = net.build()
    if kind != "dense":
        model = backed(model, genes)
    if kind == "materialized":
        model = materialize(model)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = net.batch(device)
    call: Any = model
    if compiled:
        torch.compiler.reset()
        call = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return net.loss(call, *batch)

    return Training(model, optimizer, batch, loss)


def _variant(net: Net, name: str, clock: Clock, records: Records, setting: Setting, _limit: float) -> list[Row]:
    before = _allocated(clock)
    training = made(net, name, setting.device)
    start = time.monotonic()
    for _ in range(2):  # compiles, and makes the optimizer's state
        loss = training.step()
        training.forget()
    clock.wait()
    row: Row = {
        "net": net.name, "variant": name, "genes": VARIANTS[name][1], "tokens": net.tokens,
        "compile_s": f"{time.monotonic() - start:.1f}" if VARIANTS[name][2] else "",
        **memory(training, clock, before, compiled=VARIANTS[name][2]),
    }  # fmt: skip
    ruler = made(net, "dense", setting.device) if name != "dense" else training
    ours, dense = _turns(training, ruler, clock, 3 if setting.tiny else 20)
    low, middle, high = np.percentile(ours, (10, 50, 90))
    row |= {
        "median_ms": f"{middle:.3f}", "p10_ms": f"{low:.3f}", "p90_ms": f"{high:.3f}", "rounds": len(ours),
        "of_dense": f"{median(dense) / middle:.4f}", "loss": f"{float(loss):.4f}",
    }  # fmt: skip
    del training, ruler
    gc.collect()
    return [{**row, **_compared(row, net.name, records)}]


def _turns(one: Training, other: Training, clock: Clock, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of the steps of both, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for training in (one, other):
        training.step()
        training.forget()
    for _ in range(rounds):
        for training, found in zip((one, other), times, strict=True):
            found.append(clock.time(training.step) / 1000)
            training.forget()
    return times


def memory(training: Training, clock: Clock, before: int, compiled: bool) -> Row:
    """MiB by purpose; what only an allocator's counts tell stays empty on a CPU.

    `saved` is what the forward pass leaves allocated, `workspace` what the peak holds beyond weights, gradients,
    optimizer and saved. Weights that are saved for the backward pass are counted in eager networks only.
    """
    parameters = list(training.net.parameters())
    state = [t for s in training.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    sizes = {"weights": _bytes(parameters), "gradients": _bytes(parameters), "optimizer": _bytes(state)}
    row: Row = {f"{part}_mib": f"{size / MIB:.2f}" for part, size in sizes.items()}
    saved_weights = 0
    if not compiled:
        saved_weights = _saved_weights(training)
        row["saved_weights_mib"] = f"{saved_weights / MIB:.2f}"
        row["weight_memory_mib"] = f"{(sum(sizes.values()) + saved_weights) / MIB:.2f}"
    if clock.cuda:
        clock.wait()
        gc.collect()
        start = _allocated(clock)
        torch.cuda.reset_peak_memory_stats(clock.device)
        at_end: list[int] = []
        training.step(lambda: at_end.append(_allocated(clock)))
        clock.wait()
        peak = torch.cuda.max_memory_allocated(clock.device) - before
        training.forget()
        saved = at_end[0] - start
        row["saved_mib"], row["peak_mib"] = f"{saved / MIB:.2f}", f"{peak / MIB:.2f}"
        row["workspace_mib"] = f"{max(0, peak - sum(sizes.values()) - saved) / MIB:.2f}"
    return row


def _saved_weights(training: Training) -> int:
    """Bytes saved for the backward pass in tensors of the shape of a weight that are no Parameters."""
    shapes = {tuple(p.shape) for p in training.net.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.untyped_storage().data_ptr() for p in training.net.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) in shapes and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.loss()
    del loss
    return sum(found.values())


def _compared(row: Row, net: str, records: Records) -> Row:
    """Ratios to rows that are there already."""
    found = {r["variant"]: r for r in records.rows if r.get("net") == net and r["status"] == "ok"}
    compared: Row = {}
    dense, compiled = found.get("dense"), found.get("materialized K2, compiled")
    if dense and row.get("weight_memory_mib"):
        share = float(row["weight_memory_mib"]) / float(dense["weight_memory_mib"])
        compared["weight_memory_of_dense"] = f"{share:.4f}"
    if compiled:  # both are ratios to a dense network of their own minute
        compared["of_compiled"] = f"{float(row['of_dense']) / float(compiled['of_dense']):.4f}"
    return compared


def _allocated(clock: Clock) -> int:
    return torch.cuda.memory_allocated(clock.device) if clock.cuda else 0


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _memory_limited(setting: Setting, cap: int, limit: float) -> list[Row]:
    """What the example finds under one cap, a row per way to train."""
    if not EXAMPLE.exists():
        return [{"status": "absent", "note": "examples/memory_limited.py is not here"}]
    with tempfile.TemporaryDirectory() as folder:
        options = TINY_EXAMPLE if setting.tiny else ("--forms", "dense", "eager", "checkpointed", "ours")
        command = [sys.executable, str(EXAMPLE), "--caps", str(cap), "--device", setting.device.type, *options]
        ended, printed = output([*command, "--out", folder], limit, folder=Path(folder))
        with (setting.out / "train.log").open("a") as log:
            log.write(f"== memory_limited {cap}\n{printed[-50_000:]}\n")
        if ended != 0:
            return [{"status": "failed", "note": f"ended with {ended}: {printed.strip()[-300:]}"}]
        found = read(Path(folder) / "memory_limited.csv")
    return [_found(row) for row in found]


def _found(row: Mapping[str, str]) -> Row:
    deeper = "at least " if row["at_least"] == "True" else ""
    return {
        "net": "memory_limited", "variant": row["form"], "cap_mib": f"{int(row['cap']) / MIB:.0f}",
        "depth": row["depth"], "peak_mib": f"{int(row['measured']) / MIB:.2f}",
        "estimated_mib": f"{int(row['estimated']) / MIB:.2f}", "note": f"{deeper}{row['depth']} blocks",
    }  # fmt: skip
