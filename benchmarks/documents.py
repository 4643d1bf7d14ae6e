# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and docs/, written from result files between markers that name the table and the file.

`python -m benchmarks.documents` writes them again without measuring; the prose around them is people's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import goals
from benchmarks.memory import memory_table
from benchmarks.records import REPOSITORY, read_csv

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/speed.md", "docs/memory.md")
BLOCK = re.compile(r"(<!-- begin (\w+) of (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Rows = Sequence[Mapping[str, str]]
Lines = Iterator[str]


def refresh(results: Path, folder: Path = REPOSITORY) -> list[Path]:
    """Write all tables that show a result file; returns the documents that changed."""
    changed = []
    for name in DOCUMENTS:
        document = folder / name
        if document.exists():
            text = document.read_text(encoding="utf-8")
            new = with_tables(text, results)
            if new != text:
                document.write_text(new, encoding="utf-8")
                changed.append(document)
    return changed


def with_tables(text: str, results: Path) -> str:
    """A document with the tables of one result file written again."""

    def block(match: re.Match[str]) -> str:
        begin, table, file, _, end = match.groups()
        if file != results.name:
            return match.group()
        return f"{begin}\n{chr(10).join(TABLES[table](read_csv(results)))}\n\n{end}"

    return BLOCK.sub(block, text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> Lines:
    yield _row(*cells)
    yield "|" + "---|" * len(cells)


def where(rows: Rows) -> str:
    """Machine, versions and commits, for people."""
    row = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] or "none" for row in rows))
    spread = {row["omp"] for row in rows}
    omp = "OpenMP's default settings" if spread == {"default"} else " or ".join(sorted(spread))
    return (
        f"{row['device']}, {row['cpu_level']}, {row['threads']} threads, {omp}, torch {row['torch']}, commit {commits}."
    )


class Found:
    """Times of all calls by case."""

    def __init__(self, rows: Rows) -> None:
        self.times = {(row["case"], row["call"]): float(row["median_us"]) for row in rows}
        self.rows = {(row["case"], row["call"]): row for row in rows}

    def ratio(self, case: str, baseline: str, ours: str = "ours") -> str:
        """The baseline's time by ours, "-" where one is missing."""
        above, below = self.times.get((case, baseline)), self.times.get((case, ours))
        return "-" if above is None or below is None else goals.shown(above / below)

    def cells(self, cases: Sequence[str], calls: Sequence[tuple[str, str]]) -> list[str]:
        """Per (baseline, ours) the ratios of all cases, in one cell each."""
        return [" / ".join(self.ratio(case, *call) for case in cases) for call in calls]


def _networks(kind: str, width: int, genes: int, dtype: str, tokens: Sequence[int]) -> list[str]:
    prefix, stem = f"{12 if max(tokens) <= 256 else 1}xD{width}", "expansion"
    return [f"{stem}-{kind}-{prefix}-M{m}-K{genes}-{dtype}" for m in tokens]


FEW, MANY = (1, 4, 16, 64, 256), (1024, 4096)
MODELS = {
    "ViT-S, forward at batch 1": "expansion-model-ViT-Sforward,batch1-M197-K2",
    "ViT-S, training step at batch 32 (AdamW)": "expansion-model-ViT-Sstep,batch32-M6304-K2",
}


def readme(rows: Rows) -> Lines:
    """The summary: a line per kind of case."""
    found, calls = Found(rows), (("dense", "ours"), ("eager", "ours"))
    yield from _head("case (K = 2 genes where nothing else is said)", "plain `F.linear`", "weights made eagerly")
    for width, genes, dtype in ((384, 2, "fp32"), (384, 1, "fp32"), (384, 4, "fp32"), (384, 2, "bf16")):
        text = f"12 layers of width {width}, K = {genes}, {dtype}: {' / '.join(map(str, FEW))} tokens"
        yield _row(text, *found.cells(_networks("forward", width, genes, dtype, FEW), calls))
    for width in (192, 768):
        text = f"12 layers of width {width}, fp32: {' / '.join(map(str, FEW))} tokens"
        yield _row(text, *found.cells(_networks("forward", width, 2, "fp32", FEW), calls))
    for kind, text in (("forward", "forward"), ("dx", "gradient of x"), ("wgrad", "gradients of genes, coefficients")):
        for dtype in ("fp32", "bf16"):
            label = f"{text}, width 384, {dtype}: {' / '.join(map(str, MANY))} tokens"
            yield _row(label, *found.cells(_networks(kind, 384, 2, dtype, MANY), calls))
    for text, case in MODELS.items():
        yield _row(f"{text}, fp32", *found.cells([f"{case}-fp32"], calls))
    few = [f"low_rank-forward-12xD384R96-M{m}-K2-fp32" for m in (1, 16, 256)]
    yield _row("`low_rank`, R = 96, 12 layers of width 384, fp32: 1 / 16 / 256 tokens", *found.cells(few, calls))
    step = ["low_rank-training-12xD384R96-M512-K2-fp32"]
    yield _row("`low_rank`, R = 96, training step of 12 blocks, 512 tokens", *found.cells(step, calls))
    yield ""
    yield from _sentences(found)
    yield where(rows)


def _sentences(found: Found) -> Lines:
    """What a call costs around its product, where it was measured."""
    modes = [
        found.rows.get((f"expansion-host-linear64,{mode}-M1-K2-fp32", "function")) for mode in ("nograd", "recorded")
    ]
    if all(modes):
        costs = " and ".join(f"{float(row['above_us']):.1f}" for row in modes if row)
        yield f"A layer of 64 x 64 takes {costs} us longer for one token than `F.linear`, without and with a graph."
        yield ""


def goal_table(rows: Rows) -> Lines:
    """Goals and what was measured."""
    yield from _head(*goals.HEAD)
    yield from (_row(*goal.cells(rows)) for goal in goals.GOALS)
    yield ""
    yield from goals.worst(rows).splitlines()
    yield ""
    yield where(rows)


def networks(rows: Rows) -> Lines:
    """Forward passes of all networks: against dense through the layers and by the kernel alone, and against eager."""
    found = Found(rows)
    orders = (*("dense", "dense, kernel", "dense, again", "dense, kernel again"), *("eager", "eager, again", "stacked"))
    yield from _head("network", "M", "dtype", "regime", "ms", *orders, "GB/s of genes", "GFLOP/s")
    calls = (
        *(("dense", call) for call in ("ours", "kernel", "again", "kernel again")),
        *(("eager", "ours"), ("eager again", "again"), ("stacked", "ours")),
    )
    for row in _of(rows, "forward"):
        label = f"{row['shape']}, K = {row['genes']}"
        time = f"{float(row['median_us']) / 1000:.3g}"
        ratios = found.cells([row["case"]], calls)
        yield _row(label, row["tokens"], row["dtype"], row["regime"], time, *ratios, *_rates(found, row))
    tried = [row for row in _of(rows, "forward") if (row["case"], "compiled") in found.rows]
    shown = [f"{row['shape']}, M = {row['tokens']}: {found.ratio(row['case'], 'compiled')}" for row in tried]
    if shown:
        yield ""
        yield f"`torch.compile` of the eager way, K = 2, fp32: {'; '.join(shown)}."


def _rates(found: Found, row: Mapping[str, str]) -> tuple[str, str]:
    """By the kernel alone: bytes of genes that all layers read, and multiply-adds counted twice, per second."""
    layers, _, width = row["shape"].partition(" x D")
    weights = int(layers) * 12 * int(width) ** 2
    time = found.times[row["case"], "kernel"]
    moved = weights * int(row["genes"]) * (4 if row["dtype"] == "fp32" else 2)
    return f"{moved / time / 1e3:.0f}", f"{2 * weights * int(row['tokens']) / time / 1e3:.0f}"


def products(rows: Rows) -> Lines:
    """Products of the backward pass alone."""
    found = Found(rows)
    yield from _head("product", "M", "K", "dtype", "regime", "ms", "dense", "eager")
    for kind, text in (("dx", "dX"), ("wgrad", "gradients")):
        for row in _of(rows, kind):
            ratios = found.cells([row["case"]], (("dense", "ours"), ("eager", "ours")))
            time = f"{float(row['median_us']) / 1000:.3g}"
            yield _row(
                f"{text}, {row['shape']}", row["tokens"], row["genes"], row["dtype"], row["regime"], time, *ratios
            )


def convolutions(rows: Rows) -> Lines:
    """Stages of convolutions, forward passes and training steps."""
    found = Found(rows)
    yield from _head("stage", "what", "dtype", "ms", "dense", "eager")
    for kind, text in (("forward", "forward"), ("training", "step")):
        for row in _of(rows, kind, conv=True):
            ratios = found.cells([row["case"]], (("dense", "ours"), ("eager", "ours")))
            yield _row(row["shape"], text, row["dtype"], f"{float(row['median_us']) / 1000:.3g}", *ratios)


def steps(rows: Rows) -> Lines:
    """Training steps of blocks, and whole models with the 95 % interval of every ratio."""
    found = Found(rows)
    yield from _head("step", "dtype", "ms", "rounds", "dense", "eager", "checkpointed", "`torch.compile`")
    for kind in ("training", "model"):
        for row in _of(rows, kind):
            shown = [_interval(found, row["case"], call) for call in ("dense", "eager", "checkpointed", "compiled")]
            text = row["shape"] + (f", {row['tokens']} tokens" if kind == "training" else "")
            yield _row(text, row["dtype"], f"{float(row['median_us']) / 1000:.1f}", row["rounds"], *shown)


def _interval(found: Found, case: str, call: str) -> str:
    row = found.rows.get((case, call))
    return "-" if row is None else f"{goals.shown(float(row['ratio']))} ({row['ratio_low']} to {row['ratio_high']})"


def synthesis(rows: Rows) -> Lines:
    """The weight alone."""
    yield from _head("weight", "K", "dtype", "10^9 weights/s", "GB/s", "share of a copy", "eager")
    found = Found(rows)
    for row in _of(rows, "synthesis"):
        numbers = (f"{float(row['weights_per_s']) / 1e9:.2f}", row["gb_per_s"], row["copy_share"])
        yield _row(row["shape"], row["genes"], row["dtype"], *numbers, found.ratio(row["case"], "eager"))


def host(rows: Rows) -> Lines:
    """Calls without work: what is above the plain function and the plain module."""
    found = Found(rows)
    yield from _head("call", "us", "above the plain function", "above the plain module")
    for row in _of(rows, "host"):
        above = [found.rows[row["case"], call]["above_us"] for call in ("function", "module")]
        yield _row(row["shape"], row["median_us"], *above)


def _of(rows: Rows, kind: str, conv: bool = False) -> list[Mapping[str, str]]:
    """Our row of every case of a kind of `expansion`: of convolutions, or of all others."""
    found = [row for row in rows if (row["stem"], row["kind"], row["call"]) == ("expansion", kind, "ours")]
    return [row for row in found if ("conv" in row["case"]) == conv]


TABLES: dict[str, Callable[[Rows], Lines]] = {
    "readme": readme,
    "goals": goal_table,
    "networks": networks,
    "products": products,
    "convolutions": convolutions,
    "steps": steps,
    "synthesis": synthesis,
    "host": host,
    "memory": memory_table,
}


def main() -> int:
    """Write the tables of all result files again."""
    for results in sorted(RESULTS.glob("*.csv")):
        for document in refresh(results):
            print(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
