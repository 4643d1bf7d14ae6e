# SPDX-License-Identifier: Apache-2.0
"""The table of figures that a later compilation is compared with: a CSV file, one row per compiled launch.

Which figures may change, and how, is up to the tests.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: What a row is known by.
KEYS = ("triton", "kernel", "row", "chip", "form", "genes", "gene", "x")
#: What is recorded of it.
FIGURES = (
    "registers", "spills", "shared", "wgmma", "wgmma_register_a", "wgmma_wait", "tcgen05", "mma", "loads", "stores",
    "copies",
)  # fmt: skip


def record(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into a table, in the place of all that it holds of their versions of Triton; whole or not at all."""
    versions = {str(row["triton"]) for row in rows}
    kept: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["triton"] not in versions]
    text = io.StringIO()
    writer = csv.DictWriter(text, (*KEYS, *FIGURES), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted([*kept, *rows], key=lambda row: [str(row[name]).rjust(3) for name in KEYS]))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text.getvalue(), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
