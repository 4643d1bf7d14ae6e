# SPDX-License-Identifier: Apache-2.0
"""What ViT-S holds in a training step and in a forward pass, dense and gene-backed: measured beside the estimate.

Every measurement is a process of its own. The peak is that of the allocator's events plus what is held before; the
growth of the resident set at batch 1 is the least of three processes, as whatever else happens in one only adds to it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # last, so that an installed pylearngene is the one measured

import pylearngene as plg
from benchmarks import vit
from benchmarks.records import Row, file_name, machine_facts, write_csv
from pylearngene import plan
from pylearngene.training.memory import peak_bytes, resident_bytes

MIB = 1 << 20
FORMS = ("dense", "ours")
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace")
COLUMNS = (
    "what", "form", "batch", "moment", "estimated", "measured", "resident",
    *PARTS, *(f"{part}_at_peak" for part in (*PARTS, "transients")), "malloc",
    "device", "cpu_level", "threads", "omp", "torch", "pylearngene", "commit",
)  # fmt: skip
# Blocks of 64 KiB and more go back to the system when they are freed, so that the resident set shows what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
PROCESSES = 3
Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Request:
    """What one process measures.

    Attributes:
        what: "step" or "forward".
        form: "dense" or "ours".
        batch: images.
        shape: of the network.
        resident: the growth of the resident set instead of the allocator's peak.
    """

    what: str
    form: str
    batch: int
    shape: vit.Shape
    resident: bool = False


def network(form: str, shape: vit.Shape) -> nn.Module:
    """One form of the network."""
    return vit.forms(vit.gene_backed(shape), (form,))[form]


def images(request: Request) -> Tensor:
    """A batch."""
    return torch.randn(request.batch, 3, request.shape.side, request.shape.side)


def answer(request: Request) -> int:
    """Bytes: the peak of all that is held, or the growth of the resident set above parameters and inputs."""
    return (_growth if request.resident else _peak)(request)


def _passes(what: str, net: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A forward pass without gradients, or a step."""
    if what == "forward":
        with torch.no_grad():
            net.eval()(x)
        return
    optimizer.zero_grad()
    net(x).sum().backward()
    optimizer.step()


def _peak(request: Request) -> int:
    net, x = network(request.form, request.shape), images(request)
    optimizer = torch.optim.AdamW(net.parameters())
    _passes(request.what, net, x, optimizer)
    optimizer.zero_grad()
    state = sum(t.nbytes for each in optimizer.state.values() for t in each.values() if isinstance(t, Tensor))
    held = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])
    return held + state + x.nbytes + peak_bytes(lambda: _passes(request.what, net, x, optimizer))


def _growth(request: Request) -> int:
    """Of a second process without the profiler: one block first, for what libraries and threads keep."""
    shape, x = request.shape, images(request)
    first = network(request.form, vit.Shape(shape.width, 2, shape.heads, shape.side, shape.patch, shape.classes))
    for _ in range(2):
        _passes(request.what, first, x, torch.optim.AdamW(first.parameters()))
    del first
    net = network(request.form, shape)
    optimizer = torch.optim.AdamW(net.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is counted anew
    before = resident_bytes()
    for _ in range(2 if request.what == "step" else 1):
        _passes(request.what, net, x, optimizer)
    return resident_bytes() - before


def ask(request: Request) -> int:
    """Run a request in a process of its own."""
    command = [sys.executable, "-P", __file__, "--request", json.dumps(asdict(request))]
    environment = {**os.environ, **MALLOC}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{request} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def measured(what: str, form: str, batch: int, shape: vit.Shape, facts: Row) -> Row:
    """The row of one form: estimate, allocator's peak, growth of the resident set."""
    net, size = network(form, shape), (batch, 3, shape.side, shape.side)
    found = plg.estimate_memory(net, size, train=what == "step")
    peak = ask(Request(what, form, batch, shape))
    processes = PROCESSES if batch == 1 else 1
    growth = min(ask(Request(what, form, batch, shape, resident=True)) for _ in range(processes))
    return {
        "what": what, "form": form, "batch": batch, "moment": found.moment,
        "estimated": found.peak, "measured": peak, "resident": growth,
        **{part: getattr(found, part) for part in PARTS},
        **{f"{part}_at_peak": found.at_peak.get(part, 0) for part in (*PARTS, "transients")},
        "malloc": " ".join(f"{name}={value}" for name, value in MALLOC.items()), **facts,
    }  # fmt: skip


def allowed(dense: Mapping[str, Any], ours: Mapping[str, Any]) -> int:
    """The goal of a step: dense's measured peak, less what is not there at it, plus a panel of the plan's size."""
    kept = ("weights_at_peak", "gradients_at_peak", "optimizer_at_peak")
    saved = sum(int(dense[part]) - int(ours[part]) for part in kept)
    return int(dense["measured"]) - saved + max(int(ours["workspace"]), plan.PANEL_BYTES)


def memory_table(rows: Rows) -> Iterator[str]:
    """What steps and forward passes hold, in MiB, and whether the two goals are met."""
    yield "| ViT-S | form | estimated | allocator's events | growth of the resident set | goal |"
    yield "|" + "---|" * 6
    for row in rows:
        goal = "-"
        if row["form"] == "ours" and row["what"] == "step":
            dense = next(r for r in rows if (r["what"], r["batch"], r["form"]) == ("step", row["batch"], "dense"))
            goal = _verdict(int(row["measured"]), allowed(dense, row), "peak")
        elif row["form"] == "ours":
            goal = _verdict(int(row["resident"]), round(1.1 * passing(row)), "growth")
        numbers = [f"{int(row[name]) / MIB:.2f}" for name in ("estimated", "measured", "resident")]
        what = "training step" if row["what"] == "step" else "forward"
        yield f"| {what}, batch {row['batch']} | {row['form']} | {' | '.join(numbers)} | {goal} |"
    yield ""
    row = rows[0]
    yield (
        f"{row['device']}, {row['cpu_level']}, {row['threads']} threads, torch {row['torch']}, {row['malloc']} for the "
        f"resident set, commit {', '.join(dict.fromkeys(row['commit'] or 'none' for row in rows))}."
    )


def passing(row: Mapping[str, Any]) -> int:
    """Panels and activations of a forward pass by the estimate: all that is held but weights and inputs."""
    return sum(int(row[f"{part}_at_peak"]) for part in ("activations", "workspace", "transients"))


def _verdict(found: int, bound: int, what: str) -> str:
    return f"{what} <= {bound / MIB:.2f}: {'met' if found <= bound else 'missed'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all rows and write the CSV file, or answer one request; `documents` writes the table."""
    parser = argparse.ArgumentParser(prog="python benchmarks/memory.py", description="Measure what steps hold.")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="of training steps (default: 1 32)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    options = parser.parse_args(arguments)
    if options.request:
        asked = json.loads(options.request)
        print(answer(Request(**{**asked, "shape": vit.Shape(**asked["shape"])})))
        return 0
    facts, rows, shape = machine_facts(), [], vit.Shape()
    for what, batch in (("forward", 1), *(("step", batch) for batch in options.batches)):
        for form in FORMS:
            rows.append(measured(what, form, batch, shape, facts))
            print({name: rows[-1][name] for name in COLUMNS[:7]}, flush=True)
    path = options.out / f"{file_name(facts)}-memory.csv"
    write_csv(rows, path, COLUMNS)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
