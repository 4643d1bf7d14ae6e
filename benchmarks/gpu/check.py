# SPDX-License-Identifier: Apache-2.0
"""The stage `check`: the smoke checks in this process, then test files of the repository, each in one of its own.

Of files about more than GPUs only the tests that name one run. A file has a time limit; what it printed is in the log.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

from benchmarks.gpu import smoke
from benchmarks.gpu.processes import output
from benchmarks.gpu.records import REPOSITORY, Records, Row
from benchmarks.gpu.stage import Item, Outcome, Setting, drive

COLUMNS = ("kind", "tests", "passed", "failures", "skipped", "seconds", "note")
#: Files by their names, riskiest first, and which of their tests run on a GPU.
FILES = (
    ("test_expansion_triton*.py", ""),
    ("test_cuda_*.py", ""),
    ("test_running_*.py", ""),
    ("test_expansion*.py", "cuda or gpu"),
    ("test_tuned_launches.py", ""),
    ("test_triton_offsets.py", ""),
    ("test_estimate_memory.py", "cuda or gpu"),
    ("test_low_rank*.py", "cuda or gpu"),
)
#: What takes a few seconds on a CPU.
TINY_FILES = (("test_expansion_direct.py", "test_weights"),)
FILE_LIMIT, TOGETHER = 200.0, 4
_logging = threading.Lock()


def run(setting: Setting, records: Records) -> Outcome:
    """Smoke checks one by one, then files, four at a time on a GPU."""
    smoke.prepare(setting.device)
    first = [
        Item(f"smoke {check.name}", partial(_smoke, check), 90.0)
        for check in smoke.checks(setting.device, setting.tiny)
    ]
    files = [
        Item(f"tests/{path.name}", partial(_tests, path, selected, setting), FILE_LIMIT)
        for path, selected in _files(setting.tiny)
    ]
    outcomes = [drive(first, records, setting), drive(files, records, setting, apart=TOGETHER)]
    return Outcome(
        outcomes[-1].failed, [name for o in outcomes for name in o.left_out], sum(outcome.done for outcome in outcomes)
    )


def _files(tiny: bool) -> list[tuple[Path, str]]:
    found: dict[Path, str] = {}
    for pattern, selected in TINY_FILES if tiny else FILES:
        for path in sorted((REPOSITORY / "tests").glob(pattern)):
            found.setdefault(path, selected)
    return list(found.items())


def _smoke(check: smoke.Check, _limit: float) -> list[Row]:
    start = time.monotonic()
    check.run()
    return [{"kind": "smoke", "tests": 1, "passed": 1, "seconds": f"{time.monotonic() - start:.1f}"}]


def _tests(path: Path, selected: str, setting: Setting, limit: float) -> list[Row]:
    """One row: what pytest says of a file."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", str(path), "-q", "--tb=short", "-m", "not full and not slow",
            "-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider",
            "--junitxml", str(report), *(["-k", selected] if selected else []),
        ]  # fmt: skip
        # Foreign plugins of the machine may warn, and warnings are errors here.
        environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        ended, printed = output(command, limit, environment, Path(folder))
        counts, names = _counts(report)
    note = "; ".join(names[:5])
    if ended is None:
        note = f"did not end within {limit:.0f} s; {note}"
    elif ended not in (0, 1, 5) or (ended == 1 and not names):
        note = f"pytest ended with {ended}: {printed.strip()[-300:]}"
    with _logging, (setting.out / "check.log").open("a") as log:
        log.write(f"== {path.name}\n{printed[-20_000:]}\n")
    status = "ok" if ended in (0, 5) else "failed"
    return [{"status": status, "kind": "tests", "seconds": f"{time.monotonic() - start:.1f}", "note": note, **counts}]


def _counts(report: Path) -> tuple[Row, list[str]]:
    """Numbers of tests, and the names of those that failed."""
    if not report.exists():
        return {}, []
    suite = ET.parse(report).getroot().find("testsuite")
    if suite is None:
        return {}, []
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    names = [
        str(case.get("name"))
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"tests": tests, "passed": tests - skipped - bad, "failures": bad, "skipped": skipped}, names
