# SPDX-License-Identifier: Apache-2.0
"""Result files that grow row by row: what is written stays, and a run that was cut off goes on where it ended.

All rows of a case are written at once and say how many they are, so that a case of which a part is missing is seen
and measured again, as is one that failed. What the columns mean is said where rows are made.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import pylearngene as plg
from pylearngene.cli.report import machine
from pylearngene.files import write_atomic

REPOSITORY = Path(__file__).resolve().parents[2]
#: Every file begins with these columns and ends with those of `facts`.
FIRST = ("case", "of", "status")
Row = dict[str, Any]


class Records:
    """One CSV file: which cases are complete, and a way to add others.

    Args:
        path: of the file; made when the first rows come.
        columns: between `case, of, status` and the facts; `note` is the last of them.
        keep_failed: whether cases that failed count as complete; otherwise they are dropped, to be done again.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep_failed: bool = False) -> None:
        self.path = path
        self.columns = (*FIRST, *columns, *facts())
        self._lock = threading.Lock()
        self.rows = self._complete(keep_failed)

    def __contains__(self, case: str) -> bool:
        with self._lock:
            return any(row["case"] == case for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append all rows of one case, and make sure that they are on the disk."""
        full = [{**dict.fromkeys(self.columns, ""), **facts(), **row, "of": str(len(rows))} for row in rows]
        with self._lock:
            begin = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                file.write(_text(full, self.columns, begin))
                file.flush()
                os.fsync(file.fileno())
            self.rows += [{name: str(value) for name, value in row.items()} for row in full]

    def _complete(self, keep_failed: bool) -> list[dict[str, str]]:
        """The rows of complete cases; the file is rewritten where it holds others."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        rows = _parsed(text, self.columns)
        count: dict[str, int] = {}
        for row in rows:
            count[row["case"]] = count.get(row["case"], 0) + 1
        failed = {row["case"] for row in rows if row["status"] == "failed" and not keep_failed}
        kept = [row for row in rows if row["of"] == str(count[row["case"]]) and row["case"] not in failed]
        whole = _text(kept, self.columns, True)
        if whole != text:
            write_atomic(self.path, whole.encode())
        return kept


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a result file; none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _parsed(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows whose line is whole; a file with other columns, of an older version, holds none."""
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if tuple(reader.fieldnames or ()) != tuple(columns):
        return []
    return [row for row in reader if None not in row and None not in row.values()]


def _text(rows: Sequence[Row], columns: Sequence[str], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:  # no line breaks inside a field, so that a line is whole or is not
        writer.writerow({name: " ".join(str(value).split()) for name, value in row.items()})
    return text.getvalue()


@lru_cache(maxsize=1)
def facts() -> dict[str, str]:
    """The columns that say where and with what a row was made."""
    versions, gpu = machine.versions(), torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else str(machine.machine()["processor"]),
        "cuda": str(torch.version.cuda or "none") if gpu else "none",
        "torch": torch.__version__,
        "triton": versions["triton"] or "none",
        "python": platform.python_version(),
        "pylearngene": plg.__version__,
        "commit": os.environ.get("PYLEARNGENE_COMMIT") or _commit(),
    }


def _commit() -> str:
    """The commit of the sources with "+" if they are changed; empty outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}{'+' if _git('status', '--porcelain', '--untracked-files=no') else ''}"
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()
