# SPDX-License-Identifier: Apache-2.0
"""The command line of the GPU suite: runs stages on the GPU, or on the CPU with tiny sizes where there is none.

Each stage writes `<stage>.csv`, a picture and a text summary into one folder. The build is the script's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

import pylearngene as plg
from benchmarks.gpu import goals, pictures
from benchmarks.gpu.records import Records, facts
from benchmarks.gpu.stage import Outcome, Setting
from benchmarks.gpu.summaries import tables

#: Where each stage is; imported when it runs, so that one that fails to import leaves the others alone.
STAGES = {
    "check": "benchmarks.gpu.check",
    "speed": "benchmarks.gpu.speed",
    "train": "benchmarks.gpu.train",
    "compile": "benchmarks.gpu.compiled",
    "sanitize": "benchmarks.gpu.sanitize",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all is well, 1 if something failed, 2 for a wrong argument."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tiny = options.tiny or device.type == "cpu"
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny sizes: waking threads would take longer than the work
    options.out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in facts().items()), flush=True)
    for report in plg.backends():
        if (report.op, report.device) in (("expansion", "cpu"), ("expansion", device.type)):
            print(f"{report.op} on {report.device}: {report.backend}, {report.reason}", flush=True)
    code = 0
    for name in options.stages:
        setting = Setting(
            device, options.out.resolve(), tiny, options.budget, options.keep_failed, options.only, time.monotonic()
        )
        print(f"== {name}: {'tiny sizes, ' if tiny else ''}{options.budget:g} s at most", flush=True)
        code = max(code, run(name, setting))
    return code


def run(name: str, setting: Setting) -> int:
    """Run one stage and write its summary; returns its exit code."""
    module: ModuleType = importlib.import_module(STAGES[name])
    records = Records(setting.out / f"{name}.csv", module.COLUMNS, setting.keep_failed)
    outcome: Outcome = module.run(setting, records)
    lines = [f"{name}: {outcome.done} cases in {time.monotonic() - setting.began:.0f} s"]
    lines += [f"failed: {line}" for line in outcome.failed]
    if outcome.left_out:
        lines.append(f"left out for lack of time: {len(outcome.left_out)} cases, the first is {outcome.left_out[0]}")
    lines += [tables(name, records.rows), pictures.draw(name, setting.out)]
    print("\n".join(line for line in lines if line), flush=True)
    where = ", ".join(f"{key} {value}" for key, value in facts().items())
    text = "\n".join(line for line in (where, *lines) if line) + "\n\n" + goals.table(setting.out) + "\n"
    (setting.out / f"{name}.txt").write_text(text)
    return 1 if outcome.failed else 0


def _stage(text: str) -> str:
    if text not in STAGES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(STAGES)}, got {text!r}")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and measure on a GPU.")
    parser.add_argument("stages", nargs="+", type=_stage, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; what is there is kept")
    parser.add_argument("--budget", type=_seconds, default=450.0, help="seconds for each stage (default: 450)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything works")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their names")
    parser.add_argument("--keep-failed", action="store_true", help="do not repeat cases that failed before")
    return parser


if __name__ == "__main__":
    sys.exit(main())
