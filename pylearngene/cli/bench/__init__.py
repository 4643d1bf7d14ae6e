# SPDX-License-Identifier: Apache-2.0
"""`pylearngene bench`: gene-backed linear layers against dense ones and eager materialization, on this machine.

The command is here; what is timed is in `layers`, how in `timing` and `measuring`, and `--tune` in `tuning`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pylearngene.cli._app import JsonOption, device_of
from pylearngene.cli._output import print_json
from pylearngene.cli.bench.measuring import FORMAT, Settings, measure
from pylearngene.cli.bench.tuning import TuneSettings, table_rows, tune
from pylearngene.cli.report.machine import commit, machine, versions
from pylearngene.cli.report.table import text_table
from pylearngene.errors import ArgumentError

#: Rows of x if none are given: for timing, and every bucket of the fused product for tuning.
TIMED, TUNED = "1,16,256,1024", "16,32,64,128,256,512,1024,2048,4096"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def command(
    tokens: Annotated[str | None, typer.Option(help="Rows of x; 1,16,256,1024 if not given.", metavar="M,M")] = None,
    width: Annotated[int, typer.Option(help="D of the layers D x 3D, D x D, D x 4D and 4D x D.")] = 384,
    depth: Annotated[int, typer.Option(help="Blocks of four layers that share genes.")] = 12,
    genes: Annotated[str, typer.Option(help="Genes of a layer, comma-separated.", metavar="K,K")] = "2",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32 on a CPU, bf16 on CUDA.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU where one is.")] = None,
    seconds: Annotated[float, typer.Option(help="For the rounds of one line.")] = 5.0,
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward: dx, gene gradients.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="On CUDA, replay graphs: without the host.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each regime; on a CPU, measure both.")] = False,
    tune_launches: Annotated[bool, typer.Option("--tune", help="Tune Triton launches for this GPU instead.")] = False,
    sizes: Annotated[str | None, typer.Option(help="With --tune: layers as OxI, comma-separated.")] = None,
    budget: Annotated[float | None, typer.Option(help="With --tune: seconds, 120 if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --tune: file of the table, not the cache folder.")] = None,
    json: JsonOption = False,
) -> None:
    """Check and time gene-backed layers against dense ones; with --tune, find the fastest launches of this GPU."""
    _refuse_without_tune(tune_launches, sizes=sizes, budget=budget, out=out)
    where = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, counts = DTYPES[_dtype(dtype, where)], _numbers("genes", genes)
    rows = _numbers("tokens", (TUNED if tune_launches else TIMED) if tokens is None else tokens)
    if tune_launches:
        shapes = Settings.shapes_of(_positive("width", width)) if sizes is None else _sizes(sizes)
        seconds = _seconds("budget", 120.0 if budget is None else budget)
        facts = tune(TuneSettings(where, kind, rows, shapes, counts, seconds, out))
    else:
        wide, deep = _positive("width", width), _positive("depth", depth)
        seconds = _seconds("seconds", seconds)
        facts = measure(Settings(where, kind, rows, wide, deep, counts, seconds, backward, graphs, explain))
    if json:
        print_json({"format": FORMAT, **facts, "versions": versions(), "machine": machine(), "commit": commit()})
    else:
        typer.echo(table_rows(facts) if tune_launches else shown(facts, explain))


def _refuse_without_tune(tuning: bool, **options: object) -> None:
    for name, value in options.items():
        if value is not None and not tuning:
            raise ArgumentError(f"{name}: expected only with --tune, got {value}")


def shown(facts: dict[str, Any], explain: bool = False) -> str:
    """The measured lines as a table, with what is timed above it, and below it why each took its regime."""
    head = ["K", "tokens", "regime", "us", "p10", "p90", "dense us", "x dense", "x eager", "synthesis GB/s"]
    lines = [
        [
            str(row["genes"]), str(row["tokens"]), row["regime"],
            *(f"{row['calls']['ours'][key]:.1f}" for key in ("median_us", "p10_us", "p90_us")),
            f"{row['calls']['dense']['median_us']:.1f}", f"{row['ratio_to_dense']:.2f}",
            f"{row['ratio_to_eager']:.2f}", f"{row['synthesis']['gb_per_s']:.1f}",
        ]
        for row in facts["rows"]
    ]  # fmt: skip
    passes = "forward and backward" if facts["backward"] else "forward"
    text = [
        f"{passes}, {facts['dtype']}, {facts['device']} ({facts['backend']}), {facts['depth']} x 4 layers of "
        f"width {facts['width']}; times per layer, ratios above 1: ours is faster",
        text_table(head, lines, right={0, 1, *range(3, len(head))}),
    ]
    if explain:
        text += [f"K = {row['genes']}, {row['tokens']} tokens: {row['explained']}" for row in facts["rows"]]
    if facts["dense_bytes"] < 2 * facts["cache_bytes"]:
        text.append(
            f"dense weights take {facts['dense_bytes'] >> 20} MiB, the last cache {facts['cache_bytes'] >> 20} MiB: "
            "they may stay there, unlike a large network's; --width and --depth make more of them"
        )
    return "\n".join(text)


def _dtype(name: str | None, device: torch.device) -> str:
    name = ("bf16" if device.type == "cuda" else "fp32") if name is None else name
    if name not in DTYPES:
        raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return name


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ArgumentError(f"{name}: expected at least 1, got {value}")
    return value


def _seconds(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ArgumentError(f"{name}: expected a finite number above 0, got {value}")
    return value


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """`1,16` -> (1, 16)."""
    if re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text, re.ASCII) is None:
        raise ArgumentError(f"{name}: expected numbers of at least 1 with commas between them, got {text!r}")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`768x3072,768x768` -> ((768, 3072), (768, 768))."""
    if re.fullmatch(r"[1-9][0-9]{0,8}x[1-9][0-9]{0,8}(,[1-9][0-9]{0,8}x[1-9][0-9]{0,8})*", text, re.ASCII) is None:
        raise ArgumentError(f"sizes: expected layers as OxI with commas between them, like 768x3072, got {text!r}")
    pairs = (word.split("x") for word in text.split(","))
    return tuple(dict.fromkeys((int(outs), int(inner)) for outs, inner in pairs))
