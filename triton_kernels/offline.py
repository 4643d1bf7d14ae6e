# SPDX-License-Identifier: Apache-2.0
"""`python -m pylearngene.triton_kernels.offline`: compiles every kernel for every launch row and chip, without a GPU.

Prints what each takes: registers, spills, shared memory, matrix instructions, widths of loads and stores. Exit code 1
where one does not compile, 2 for wrong arguments. What the figures must be is up to the tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pylearngene.triton_kernels
import triton
from pylearngene.triton_kernels._binary import figures
from pylearngene.triton_kernels._figures import record
from pylearngene.triton_kernels._row import CHIPS, SHARED_BYTES, Row
from pylearngene.triton_kernels._signatures import ITEMSIZE, Variant, signature, variants
from pylearngene.triton_kernels._table import ROWS, shared_bytes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_COLUMNS = (
    ("kernel", "kernel"), ("row", "row"), ("chip", "chip"), ("form", "form"), ("K", "genes"), ("gene", "gene"),
    ("regs", "registers"), ("stack", "stack"), ("spills", "spills"), ("shared", "shared"), ("limit", "shared_limit"),
    ("wgmma", "wgmma"), ("reg A", "wgmma_register_a"), ("wait", "wgmma_wait"), ("tcgen05", "tcgen05"), ("mma", "mma"),
    ("loads", "loads"), ("stores", "stores"),
)  # fmt: skip


#: The chip for which every number of genes is compiled.
EVERY_COUNT = "sm_90"
#: The version of Triton beside which candidates and fewer genes are compiled as well.
THOROUGH = "3.6."


@dataclass(frozen=True)
class Job:
    """One compilation."""

    row: Row
    chip: str
    variant: Variant


def jit_functions() -> dict[str, Any]:
    """Every `@triton.jit` function of the package by `module.name`, found by walking its modules."""
    found = {}
    for module in pkgutil.iter_modules(pylearngene.triton_kernels.__path__):
        loaded = importlib.import_module(f"{pylearngene.triton_kernels.__name__}.{module.name}")
        for name, value in vars(loaded).items():
            if hasattr(value, "fn") and getattr(value, "__module__", None) == loaded.__name__:
                found[f"{module.name}.{name}"] = value
    return found


def kernels() -> dict[str, Any]:
    """The functions that are launched: those of the modules whose name ends in `_kernels`."""
    return {name.split(".")[1]: fn for name, fn in jit_functions().items() if name.split(".")[0].endswith("_kernels")}


def jobs(chips: Sequence[str] = CHIPS, names: Sequence[str] = ()) -> Iterator[Job]:
    """What there is to compile, for the kernels named or for all."""
    for row in ROWS:
        if not names or row.kernel in names:
            for chip in (chip for chip in row.chips if chip in chips):
                yield from (Job(row, chip, variant) for variant in variants(row) if _compiled(chip, row, variant))


def _compiled(chip: str, row: Row, variant: Variant) -> bool:
    """Every number of genes and fp16 on one chip for rows that calls take; elsewhere the most genes, bf16 and wider."""
    thorough = triton.__version__.startswith(THOROUGH)
    if row.candidate and not thorough:
        return False
    if thorough and chip == EVERY_COUNT and not row.candidate:
        return True
    alike = [other.genes for other in variants(row) if replace(other, genes=variant.genes) == variant]
    return variant.genes == max(alike) and variant.gene != "fp16"


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one launch; returns what it is and its figures, or its `error`."""
    row, chip, variant = job.row, job.chip, job.variant
    itemsize = ITEMSIZE[variant.gene]
    facts: dict[str, Any] = {
        "kernel": row.kernel,
        "row": row.name,
        "chip": chip,
        "irregular": row.irregular,
        **asdict(variant),
        "shared_limit": SHARED_BYTES[chip],
        "shared_estimate": shared_bytes(row, chip, variant.genes, itemsize, ITEMSIZE[variant.x]),
        "triton": triton.__version__,
    }
    made = signature(row, variant)
    source = ASTSource(kernels()[row.kernel], made.types, made.constants, made.attributes)
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target, row.options)
        return facts | figures(compiled) | {"error": ""}
    except Exception as error:  # whatever the compiler raises belongs into the report
        return facts | {"error": f"{type(error).__name__}: {error}"}


def _prepare(folder: str) -> None:
    """A cache of our own: nothing that was compiled earlier answers for what is compiled now."""
    os.environ["TRITON_CACHE_DIR"] = folder


def compile_all(todo: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """Compile in `workers` processes; rows in the order of the jobs."""
    with tempfile.TemporaryDirectory() as folder:
        if workers == 1:
            _prepare(folder)
            return [compile_job(job) for job in todo]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(folder,)) as pool:
            return list(pool.map(compile_job, todo))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as lines of aligned columns; errors below."""
    cells = [[head for head, _ in _COLUMNS], *([str(row.get(key, "-")) for _, key in _COLUMNS] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(
        [*lines, *(f"{row['kernel']} {row['row']} {row['chip']}: {row['error']}" for row in rows if row["error"])]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pylearngene.triton_kernels.offline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--csv", metavar="FILE", help="put the figures into this table, in the place of this Triton's")
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated, of " + ", ".join(CHIPS))
    parser.add_argument("--kernels", default="", help="comma-separated; all if not given")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args(arguments)
    chips, names = options.chips.split(","), [name for name in options.kernels.split(",") if name]
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: expected it unset, got 1; the interpreter compiles nothing")
    for given, known in ((chips, CHIPS), (names, tuple(kernels()))):
        if unknown := set(given) - set(known):
            parser.error(f"expected names of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if options.csv and (names or set(chips) != set(CHIPS)):
        parser.error("--csv: expected all chips and kernels, got some")
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    rows = compile_all(list(jobs(chips, names)), options.workers)
    print("\n".join(map(json.dumps, rows)) if options.json else table(rows))
    if any(row["error"] for row in rows):
        return 1
    if options.csv:
        record(Path(options.csv), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
