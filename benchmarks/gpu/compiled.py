# SPDX-License-Identifier: Apache-2.0
"""The stage `compile`: torch.compile of gene-backed layers and networks beside that of weights made by torch.

Each row is measured in a process of its own, so that a compilation that hangs costs one row. Weights and genes are
Parameters, one input set is used again and again, and calls are timed as Python makes them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
from torch import Tensor, nn

import pylearngene as plg
from benchmarks.expansion_inputs import LAYERS, powers
from benchmarks.gpu.networks import MaterializedLinear, backed, materialize, nets, vit
from benchmarks.gpu.processes import output
from benchmarks.gpu.records import Records, Row
from benchmarks.gpu.stage import Item, Outcome, Setting, drive
from benchmarks.gpu.timing import Clock, interleaved

COLUMNS = (
    "form", "mode", "shape", "tokens", "genes", "rounds", "median_us", "p10_us", "p90_us", "dense_us", "ratio",
    "compile_s", "error", "note",
)  # fmt: skip
#: (D, layer, M); at most six, since max-autotune takes its time for each.
SHAPES = (
    (768, "fc1", 4096), (768, "fc1", 512), (1024, "fc1", 2048), (4096, "proj", 512), (768, "fc2", 25216),
    (768, "qkv", 64),
)  # fmt: skip
TINY_SHAPES = ((32, "proj", 12),)
#: Forms and modes; the slow ones, after all shapes have had the others.
QUICK = (("ours", "default"), ("materialized", "default"), ("ours", "reduce-overhead"), ("dense", "default"))
SLOW = (("materialized", "max-autotune"),)
LIMIT, ERROR = 100.0, 2e-2
SEED = 0


@dataclass(frozen=True)
class Point:
    """What one process measures: a layer of some shape, or where D is 0 a training step of a small ViT."""

    form: str
    mode: str
    dim: int = 0
    layer: str = ""
    tokens: int = 0
    genes: int = 2

    @property
    def name(self) -> str:
        """Of its case."""
        what = f"{self.layer} D{self.dim} M{self.tokens} K{self.genes}" if self.dim else "ViT step"
        return f"{self.form}, {self.mode}: {what}"


def run(setting: Setting, records: Records) -> Outcome:
    """All points, one process after the other."""
    shapes, ways = (TINY_SHAPES, QUICK[:1]) if setting.tiny else (SHAPES, QUICK)
    steps = [Point(form, "default") for form in ("ours", "materialized")]
    points = [Point(*way, *shape) for shape in shapes for way in ways]
    points = [*points[: len(ways)], *steps, *points[len(ways) :]]
    points += [Point(*way, *shape) for way in SLOW for shape in shapes]
    items = [Item(point.name, partial(_apart, point, setting), LIMIT) for point in points]
    return drive(items, records, setting, apart=1)


def _apart(point: Point, setting: Setting, limit: float) -> list[Row]:
    """Measure a point in another process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.compiled",
        "--device",
        setting.device.type,
        json.dumps(asdict(point)),
    ]
    ended, printed = output(command, limit)
    with (setting.out / "compile.log").open("a") as log:
        log.write(f"== {point.name}\n{printed[-20_000:]}\n")
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if ended == 0 and lines:
        row: Row = json.loads(lines[-1])
        return [row]
    reason = f"did not end within {limit:.0f} s" if ended is None else f"ended with {ended}: {printed.strip()[-300:]}"
    return [{"status": "failed", "form": point.form, "mode": point.mode, "note": reason}]


class Single(nn.Module):
    """One gene-backed layer with its bank."""

    def __init__(self, out: int, inner: int, genes: int) -> None:
        super().__init__()
        bank = plg.nn.GeneBank()
        self.layer = plg.nn.ExpansionLinear(inner, out, False, bank=bank, name="fc", coeffs=powers(5, 12, genes))
        for gene in bank.parameters():
            nn.init.normal_(gene, 0.0, inner**-0.5)
        bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def measure(point: Point, device: torch.device) -> Row:
    """The row of a point."""
    torch.manual_seed(SEED)
    return _layer(point, device) if point.dim else _step(point, device)


def _options(mode: str, device: torch.device) -> dict[str, Any]:
    """Inductor's modes on a GPU; on a CPU only the graph is traced, which is what can break."""
    return {"mode": mode} if device.type == "cuda" else {"backend": "aot_eager"}


def _layer(point: Point, device: torch.device) -> Row:
    factors = LAYERS[point.layer]
    out, inner = factors[0] * point.dim, factors[1] * point.dim
    ours = Single(out, inner, point.genes).to(device, torch.bfloat16)
    dense = ours.layer.to_dense()
    group = ours.layer.bank.group("fc")
    made: dict[str, nn.Module] = {
        "ours": ours, "dense": dense,
        "materialized": MaterializedLinear(group.weights(), (), ours.layer.coeffs.tolist()),
    }  # fmt: skip
    x = torch.randn(point.tokens, inner, device=device, dtype=torch.bfloat16)
    function = torch.compile(made[point.form], fullgraph=True, **_options(point.mode, device))
    with torch.no_grad():
        start = time.monotonic()
        y = function(x).double()
        function(x)
        seconds = time.monotonic() - start
        expected = x.double() @ dense.weight.double().t()
        error = float((y - expected).abs().max() / expected.abs().max())
        if not error <= ERROR:
            raise AssertionError(f"{point.name}: expected an error of at most {ERROR:g} of the largest, got {error:g}")
        calls = {"this": lambda _: function(x), "dense": lambda _: dense(x)}
        samples, _ = interleaved(Clock(device), calls, [None], 1.0 if device.type == "cuda" else 0.05, graphs=False)
    row = {"shape": f"{out} x {inner}", "tokens": point.tokens, "genes": point.genes, "error": f"{error:.2e}"}
    return {**row, **_timed(point, samples["this"], samples["dense"], seconds)}


def _step(point: Point, device: torch.device) -> Row:
    """Forward and backward of four blocks of a ViT-B as one graph each, beside the plain dense network."""
    tiny = device.type == "cpu"
    task = nets(True)[0] if tiny else vit("blocks", 768, 4, 12, 224, 32)
    plain = task.build()
    net = backed(plain, point.genes)
    net = (materialize(net) if point.form == "materialized" else net).to(device)
    plain.to(device)
    batch = task.batch(device)
    function = torch.compile(net, fullgraph=True, **_options(point.mode, device))

    def step(call: Any) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = task.loss(call, *batch)
        loss.backward()
        for parameter in (*net.parameters(), *plain.parameters()):
            parameter.grad = None

    start = time.monotonic()
    step(function)
    seconds = time.monotonic() - start
    calls = {"this": lambda _: step(function), "dense": lambda _: step(plain)}
    samples, _ = interleaved(Clock(device), calls, [None], 0.05 if tiny else 2.0, graphs=False)
    row = {"shape": "4 blocks", "tokens": task.tokens, "genes": point.genes}
    return {**row, **_timed(point, samples["this"], samples["dense"], seconds)}


def _timed(point: Point, times: Sequence[float], dense: Sequence[float], seconds: float) -> Row:
    low, middle, high = np.percentile(times, (10, 50, 90))
    ruler = float(np.median(dense))
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {
        "note": f"{skipped} graphs were not captured" if skipped else "",
        "form": point.form, "mode": point.mode, "rounds": len(times), "median_us": f"{middle:.3f}",
        "p10_us": f"{low:.3f}", "p90_us": f"{high:.3f}", "dense_us": f"{ruler:.3f}", "ratio": f"{ruler / middle:.4f}",
        "compile_s": f"{seconds:.1f}",
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one point and print its row as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compiled")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("point", help="a point as JSON")
    options = parser.parse_args(arguments)
    row = measure(Point(**json.loads(options.point)), torch.device(options.device))
    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
