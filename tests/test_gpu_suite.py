# SPDX-License-Identifier: Apache-2.0
"""The GPU suite without a GPU: stages run, what was cut off goes on, failures are rows, goals are compared.

The same code runs on a GPU with other sizes; nothing here says how fast anything is.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pylearngene as plg

sys.path.append(str(Path(__file__).parent.parent))  # last, so that an installed pylearngene is the one under test

from benchmarks.cases import Case
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import (
    expansion,
    goals,
    speed,
    stage,
)
from benchmarks.gpu.processes import output
from benchmarks.gpu.records import Records, facts, read
from benchmarks.gpu.stage import Item, Setting, drive

REPOSITORY = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SCRIPT = REPOSITORY / "benchmarks" / "gpu_suite.sh"
COLUMNS = ("value", "note")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny sizes: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few_cases(device: torch.device = CPU, tiny: bool = True) -> list[Case]:
    """One case of each kind, without what compiles."""
    found = {case.kind: case for case in expansion.cases(device, tiny) if "compiled" not in case.baselines}
    return [found[kind] for kind in ("forward", "dx", "wgrad", "synthesis", "stack", "host")]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PRIMITIVES", (few_cases,))


def setting(folder: Path, budget: float = 60.0) -> Setting:
    return Setting(CPU, folder, True, budget, began=time.monotonic())


def run(folder: Path, *options: str) -> int:
    return suite.main(["speed", "--out", str(folder), "--device", "cpu", *options])


def test_rows_and_summary(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    rows = read(tmp_path / "speed.csv")
    assert tuple(rows[0]) == ("case", "of", "status", *speed.COLUMNS, *facts())
    assert {row["case"] for row in rows} == {"roof", *(case.name for case in few_cases())}
    for row in rows:
        low, middle, high = (float(row[column]) for column in ("p10_us", "median_us", "p90_us"))
        assert 0 < low <= middle <= high
        assert row["status"] == "ok"
        assert row["torch"] == torch.__version__
        assert int(row["of"]) == sum(other["case"] == row["case"] for other in rows)
        if row["case"] != "roof":
            ours = next(r for r in rows if (r["case"], r["call"]) == (row["case"], "ours"))
            assert float(row["ratio"]) == pytest.approx(middle / float(ours["median_us"]), rel=0.01)
            assert float(row["above_us"]) == pytest.approx(float(ours["median_us"]) - middle, abs=0.02)
    forward = {row["call"]: row for row in rows if row["kind"] == "forward"}
    assert set(forward) >= {"ours", "dense", "eager", "hand panel", "ours, rows", "ours, panel"}
    assert (forward["ours, panel"]["regime"], forward["dense"]["regime"]) == ("panel", "")
    printed = capsys.readouterr().out
    text = (tmp_path / "speed.txt").read_text()
    assert "speed: 7 cases in" in printed
    assert "speed: 7 cases in" in text
    assert "not measured" in text
    assert "missed" not in text, "a CPU says nothing about the goals"


def test_second_run_adds_nothing_and_a_cut_row_is_done_again(few: None, tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    path = tmp_path / "speed.csv"
    whole = path.read_text()
    assert run(tmp_path) == 0
    assert path.read_text() == whole
    path.write_text(whole[:-40])  # in the middle of the last row, as a process that is killed leaves it
    last = read(path)[-1]["case"]
    assert run(tmp_path, "--budget", "0") == 0
    kept = read(path)
    assert last not in {row["case"] for row in kept}, "all rows of the cut case are gone"
    assert len(kept) == len(whole.splitlines()) - 1 - int(kept_of(whole, last))
    assert run(tmp_path) == 0
    again = read(path)
    assert [(row["case"], row["call"]) for row in again] == [
        (row["case"], row["call"]) for row in csv.DictReader(whole.splitlines())
    ]


def kept_of(text: str, case: str) -> str:
    return next(row["of"] for row in csv.DictReader(text.splitlines()) if row["case"] == case)


def test_no_budget_leaves_all_out_and_says_so(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--budget", "0") == 0
    assert not (tmp_path / "speed.csv").exists()
    assert "left out for lack of time: 7 cases, the first is roof" in capsys.readouterr().out


def test_wrong_result_is_a_failure_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = few_cases()

    def wrong(inputs: Any) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, value * 1.5) for name, value in first.ours(inputs))

    monkeypatch.setattr(speed, "PRIMITIVES", (lambda device, tiny: [replace(first, ours=wrong), *others],))
    assert run(tmp_path) == 1
    rows = read(tmp_path / "speed.csv")
    (bad,) = (row for row in rows if row["status"] == "failed")
    assert bad["case"] == first.name
    assert "expected an error of at most" in bad["note"]
    assert {row["case"] for row in rows} == {"roof", first.name, *(case.name for case in others)}
    assert f"failed: {first.name}" in capsys.readouterr().out
    assert run(tmp_path, "--keep-failed") == 1
    assert read(tmp_path / "speed.csv") == rows
    monkeypatch.setattr(speed, "PRIMITIVES", (few_cases,))
    assert run(tmp_path) == 0, "what failed is done again"


def value_item(name: str, value: Any) -> Item:
    return Item(name, lambda limit: [{"value": value}])


def test_records_drop_what_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    records = Records(path, COLUMNS)
    records.add([{"case": "a", "status": "ok", "value": 1}, {"case": "a", "status": "ok", "note": "two\nlines, comma"}])
    records.add([{"case": "b", "status": "ok", "value": 2}])
    assert "a" in records
    assert "c" not in records
    lines = path.read_text().splitlines(keepends=True)
    for text, expected in (
        ("".join(lines), {"a", "b"}),
        ("".join(lines)[:-1], {"a"}),
        ("".join([lines[0], lines[1], lines[3]]), {"b"}),
        ("".join(lines[1:]), set()),
        ("other,columns\n1,2\n", set()),
        ("", set()),
    ):
        path.write_text(text)
        assert {row["case"] for row in Records(path, COLUMNS).rows} == expected
    path.write_text("".join(lines))
    assert read(path)[1]["note"] == "two lines, comma"


@pytest.mark.parametrize("apart", [0, 2])
def test_failing_item_is_a_row(apart: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(limit: float) -> Any:
        raise ValueError("no, not this")

    records = Records(tmp_path / "results.csv", COLUMNS)
    items = [value_item("first", 1), Item("bad", fails), value_item("last", 2)]
    outcome = drive(items, records, setting(tmp_path), apart)
    assert outcome.failed == ["bad: ValueError: no, not this"]
    assert (outcome.done, outcome.left_out) == (2, [])
    assert "no, not this" in capsys.readouterr().err
    assert len(Records(tmp_path / "results.csv", COLUMNS, keep_failed=True).rows) == 3
    assert len(Records(tmp_path / "results.csv", COLUMNS).rows) == 2


HANGS = """
import sys, time
from pathlib import Path
import torch
from benchmarks.gpu.records import Records
from benchmarks.gpu.stage import Item, Setting, drive
records = Records(Path(sys.argv[1]), ("note",))
setting = Setting(torch.device("cpu"), Path("."), True, float(sys.argv[2]), began=time.monotonic())
drive([Item("hangs", lambda limit: time.sleep(60), 0.2)], records, setting)
"""


@pytest.mark.parametrize(("budget", "rows"), [("50", 1), ("-16", 0)], ids=["hung", "late"])
def test_item_that_hangs_ends_the_process(budget: str, rows: int, tmp_path: Path) -> None:
    code = HANGS.replace("-16", "0")
    if budget == "-16":  # begins within the budget, and its end is past it
        code = code.replace("float(sys.argv[2])", "0.05").replace(
            "drive([", "import benchmarks.gpu.stage as s; s.GRACE = 0.05; drive(["
        )
    path = f"{Path(plg.__file__).parents[1]}:{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.csv"), budget],
        env={**os.environ, "PYTHONPATH": path}, check=False, capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == stage.BROKEN, done.stderr
    found = read(tmp_path / "r.csv")
    assert len(found) == rows
    assert all(row["note"] == "did not end within 0.2 s" for row in found)


def test_processes_end_with_their_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    ended, _ = output([sys.executable, "-c", child], 1.0)
    assert ended is None
    assert time.monotonic() - start < 30
    assert output([sys.executable, "-c", "import os; print(os.environ['A']); exit(3)"], 60, {"A": "x"}) == (3, "x\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speeed"], "unknown stage 'speeed', expected one of: check speed train compile sanitize"),
        (["--fast", "speed"], "unknown option '--fast'"),
        ([], "expected a stage"),
        (["speed", "--out"], "--out: expected a value"),
        (["--budget", "soon", "speed"], "--budget: expected whole seconds, got 'soon'"),
    ],
)
def test_script_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, *arguments], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


STUB = """#!/bin/bash
if [[ $1 == -c ]]; then echo "$0"; exit; fi
echo "${{*:2}}" >> "{calls}"
[[ $2 == benchmarks.gpu.goals ]] && echo "the goals"
[[ $3 == train ]] && exit 139
[[ $3 == speed && $* != *keep-failed* ]] && exit 75
exit 0
"""


def test_script_goes_on_behind_what_breaks(tmp_path: Path) -> None:
    """A stage whose GPU is lost is started again, one that crashes is reported, and the goals come last."""
    stub, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    stub.write_text(STUB.format(calls=calls))
    stub.chmod(0o755)
    done = subprocess.run(
        [SCRIPT, "--no-build", "--out", str(out), "--budget", "77", "speed", "train", "check"],
        env={**os.environ, "PYTHON": str(stub), "GPU_SUITE_BUILD": str(tmp_path / "build")},
        check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"stage train ended with 139, see {out}/train.log", "the goals"]
    started = [line.split(" --out")[0] for line in calls.read_text().splitlines()]
    assert started == [
        "benchmarks.gpu speed", "benchmarks.gpu speed", "benchmarks.gpu train", "benchmarks.gpu check",
        f"benchmarks.gpu.goals {out}",
    ]  # fmt: skip
    assert calls.read_text().splitlines()[1].endswith("--keep-failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fast"], "expected one of check, speed"), (["speed", "--budget", "x"], "expected a number of seconds, got 'x'")],
)
def test_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        suite.main([*arguments, "--out", str(tmp_path)])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


FAKE = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.full
def test_all_stages_run_on_the_cpu(tmp_path: Path) -> None:
    """Built as on a machine with a GPU, all stages, then once more: nothing is left to do."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE.format(python=sys.executable))
    tool.chmod(0o755)
    environment = {
        **os.environ, "PYTHON": sys.executable, "GPU_SUITE_BUILD": str(tmp_path / "build"), "CUDA_VISIBLE_DEVICES": "",
        "CMAKE_ARGS": "-DPYLEARNGENE_CUDA=OFF", "COMPUTE_SANITIZER": str(tool),
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    out = tmp_path / "out"
    command = [str(SCRIPT), "--out", str(out), "check", "speed", "train", "compile", "sanitize"]

    def suite_run() -> tuple[subprocess.CompletedProcess[str], float]:
        start = time.monotonic()
        done = subprocess.run(
            command, env=environment, check=False, capture_output=True, text=True, timeout=1500, cwd=tmp_path
        )
        return done, time.monotonic() - start

    done, _ = suite_run()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-len(goals.GOALS) - 1].startswith("goal ")
    for name in suite.STAGES:
        rows = read(out / f"{name}.csv")
        assert rows, name
        assert {row["status"] for row in rows} == {"ok"}
        assert (out / f"{name}.txt").exists()
        assert len([path for path in out.iterdir() if path.stem == name]) <= 4
    before = {path: path.read_bytes() for path in out.glob("*.csv")}
    done, seconds = suite_run()
    assert done.returncode == 0
    assert {path: path.read_bytes() for path in out.glob("*.csv")} == before
    assert seconds < 120, "the build is not repeated either"
