# SPDX-License-Identifier: Apache-2.0
"""The stage `sanitize`: the quick smoke checks under compute-sanitizer, one tool after the other.

Where the tool is not installed, or refuses the device, a row says so and nothing fails. What it printed is in the log.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu.processes import output
from benchmarks.gpu.records import Records, Row
from benchmarks.gpu.stage import Item, Outcome, Setting, drive

COLUMNS = ("errors", "seconds", "note")
#: Tools and what only they understand, the most telling first.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "initcheck": (), "synccheck": ()}
LIMIT = 200.0
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
REFUSED = re.compile(r"[^\n]*(?:[Dd]evice not supported|Unable to find|not supported on this)[^\n]*")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer",)


def run(setting: Setting, records: Records) -> Outcome:
    """All tools."""
    tools = list(TOOLS)[:2] if setting.tiny else TOOLS
    items = [Item(tool, partial(_tool, tool, setting), LIMIT) for tool in tools]
    return drive(items, records, setting, apart=1)


def sanitizer() -> str | None:
    """The program: COMPUTE_SANITIZER in the environment, or where it usually is."""
    named = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
    return named or next((place for place in PLACES if Path(place).exists()), None)


def _tool(tool: str, setting: Setting, limit: float) -> list[Row]:
    program = sanitizer()
    if program is None:
        return [{"status": "absent", "note": "compute-sanitizer is not installed: nothing was checked"}]
    start = time.monotonic()
    checks = [sys.executable, "-m", "benchmarks.gpu.smoke", "--device", setting.device.type]
    command = [program, "--tool", tool, "--target-processes", "application-only", *TOOLS[tool], *checks]
    # Without the caching allocator every tensor is an allocation of its own, whose ends the tool knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, printed = output(command, min(limit, LIMIT), environment)
    ended = "the time limit" if code is None else str(code)
    with (setting.out / "sanitize.log").open("a") as log:
        log.write(f"== {tool}\n{printed[-200_000:]}\n")
    return [{"seconds": f"{time.monotonic() - start:.1f}", **verdict(printed, ended)}]


def verdict(printed: str, ended: str) -> Row:
    """What the output of a tool says: status, number of errors, and why it is not ok."""
    summary = SUMMARY.findall(printed)
    refused = REFUSED.search(printed)
    if refused and not (summary and ended == "0"):
        return {"status": "absent", "note": f"the device was refused: {refused.group().strip(' =')}"}
    if not summary:
        return {"status": "failed", "note": f"no summary; ended by {ended}: {printed.strip()[-200:]}"}
    errors = sum(int(count) for count in summary)
    if errors or ended != "0":
        return {"status": "failed", "errors": errors, "note": f"{errors} errors; ended by {ended}; see sanitize.log"}
    return {"status": "ok", "errors": 0}
