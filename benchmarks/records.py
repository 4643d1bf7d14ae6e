# SPDX-License-Identifier: Apache-2.0
"""The rows of result files: their columns, the facts of the machine in each of them, reading, writing and merging.

What is measured is in `timing`, what the command does with rows in `run`. A file belongs to one machine; its rows may
be of several commits, since single cases are measured again and merged.
"""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pylearngene import _backends
from pylearngene.cli.report import machine
from pylearngene.files import write_atomic

REPOSITORY = Path(__file__).resolve().parents[1]
COLUMNS = (
    "case", "stem", "kind", "regime", "shape", "tokens", "genes", "dtype",
    "call", "rounds", "median_us", "p10_us", "p90_us", "ratio", "ratio_low", "ratio_high", "above_us",
    "bytes", "gb_per_s", "copy_share", "weights_per_s",
    "device", "cpu_level", "threads", "omp", "others", "torch", "pylearngene", "commit",
)  # fmt: skip
Row = dict[str, Any]
# What a commit is about here: changes of results and of documents do not make its numbers those of other code.
SOURCES = ("benchmarks/*.py", "pylearngene", "csrc", "cmake", "CMakeLists.txt")


def machine_facts() -> Row:
    """The columns that say where and with what the numbers were made."""
    found, versions = machine.machine(), machine.versions()
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "KMP_"))]
    return {
        "device": found["processor"],
        "cpu_level": _backends.LEVEL_NAME,
        "threads": torch.get_num_threads(),
        "omp": " ".join(settings) or "default",
        "torch": versions["torch"],
        "pylearngene": versions["pylearngene"],
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this checkout, with "+" where code differs from it; empty outside of one."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}{'+' if changed else ''}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def file_name(facts: Row) -> str:
    """The stem of the result files: processor, instruction level and threads."""
    words = f"{facts['device']} {facts['cpu_level']} {facts['threads']}t"
    return re.sub(r"[^a-z0-9_]+", "-", words.lower()).strip("-")


def read_csv(path: Path) -> list[Row]:
    """All rows of a file, as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(rows: Sequence[Row], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write all rows; the file appears whole or not at all. Columns of older files that are no more are left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def merged(old: Sequence[Row], new: Sequence[Row], order: Iterable[str]) -> list[Row]:
    """Rows per case, the new ones in place of the old, in a given order of cases; other cases are left out."""
    by_case: dict[str, list[Row]] = {}
    for rows in (old, new):
        fresh = {row["case"] for row in rows}
        by_case.update({case: [] for case in fresh})
        for row in rows:
            by_case[row["case"]].append(row)
    return [row for case in order for row in by_case.get(case, [])]


class Others:
    """How many cores others kept busy, on the average since it was made: what makes times worth less.

    Read where Linux tells it, else None; what a hypervisor takes counts too.
    """

    def __init__(self) -> None:
        self.start = self._read()

    def cores(self) -> float | None:
        """Seconds of processors that were busy for others, by seconds that passed."""
        now = self._read()
        if self.start is None or now is None:
            return None
        busy, own, wall = (new - old for new, old in zip(now, self.start, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, soft, stolen = ticks[:8]
        own = os.times()
        busy = (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return busy, own.user + own.system + own.children_user + own.children_system, time.perf_counter()
