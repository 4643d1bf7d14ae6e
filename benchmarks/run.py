# SPDX-License-Identifier: Apache-2.0
"""The command that measures: all cases or some, their rows into a CSV file, pictures, and the tables of the documents.

How a case is checked and timed is in `timing`, what rows hold in `records`. Rows are written after every case, so that
a run can be stopped and gone on with (`--missing`), or made in slices (`--only`, `--within`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # last, so that an installed pylearngene is the one measured

from benchmarks import curves, documents, expansion, goals, low_rank, memory, plots
from benchmarks.cases import Case, WrongResultError
from benchmarks.plan import held_out
from benchmarks.records import Row, file_name, machine_facts, merged, read_csv, write_csv
from benchmarks.timing import measure
from pylearngene import _backends

STEMS: dict[str, Callable[..., list[Case]]] = {"expansion": expansion.cases, "low_rank": low_rank.cases}
RESULTS = Path(__file__).parent / "results"
KINDS = ("synthesis", "forward", "training", "host", "dx", "wgrad", "model")
IDLE = 0.1  # cores that others may keep busy before it is said


def all_cases(compiled: bool = False) -> list[Case]:
    """The cases of every primitive."""
    return [case for cases in STEMS.values() for case in cases(compiled=compiled)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 where a check failed: such a case has no rows."""
    options = _parser().parse_args(arguments)
    facts = machine_facts()
    path = options.out / f"{file_name(facts)}.csv"
    cases = all_cases(not options.no_compile)
    known = {row["case"] for row in read_csv(path)} if options.missing else set()
    chosen = [case for case in cases if any(part in case.name for part in options.only) and case.name not in known]
    if not chosen and not options.missing:
        print(f"--only: expected part of a case's name, got {options.only!r}", file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if _backends.native() is None:  # a folder of sources that comes before the installed package has none
        print(f"{_backends._reason}\nthese will be the times of the reference", file=sys.stderr)
    refused, left = _measure(chosen, cases, options, facts, path)
    if left:
        print(f"--within: {left} of {len(chosen)} cases are left; go on with --missing")
    if options.dry:
        print("--dry: no file is written")
    elif not left:
        finish(path)
        if options.only == [""]:
            beside(options.out)
    return 1 if refused else 0


def _measure(
    chosen: Sequence[Case], cases: Sequence[Case], options: argparse.Namespace, facts: Row, path: Path
) -> tuple[int, int]:
    """Measure cases and write their rows; returns how many were refused and how many were left for want of time."""
    names, refused, end = [case.name for case in cases], 0, time.perf_counter() + options.within
    keep = [] if options.only == [""] and not options.missing else read_csv(path)  # of a whole run nothing else
    for place, case in enumerate(chosen):
        if time.perf_counter() > end:
            return refused, len(chosen) - place
        try:
            rows = measure(case, options.seconds, facts)
        except WrongResultError as error:
            print(f"refused, no speed of a wrong result: {error}", file=sys.stderr)
            refused += 1
            keep = [row for row in keep if row["case"] != case.name]
        else:
            print(_line(rows), flush=True)
            keep = merged(keep, rows, names)
        if not options.dry:
            write_csv(keep, path)
    return refused, 0


def finish(path: Path) -> None:
    """Draw the pictures of a result file, write the tables of the documents that show it, and print the goals."""
    rows = read_csv(path)
    for picture in _pictures(path, rows):
        print(picture)
    if path.parent == RESULTS:  # elsewhere lie numbers that nobody is to read in the documents
        documents.main()
    print(path, goals.table(rows), goals.worst(rows), sep="\n")


def beside(out: Path) -> None:
    """Measure what a whole run adds to the cases: memory, and the plan's choices on sizes that it was not made from."""
    memory.main(["--out", str(out)])
    held_out.main(["--out", str(out)])
    if out == RESULTS:
        documents.main()


def _pictures(path: Path, rows: Sequence[Row]) -> Iterator[Path]:
    for stem in dict.fromkeys(row["stem"] for row in rows):
        yield (picture := path.with_name(f"{path.stem}{'' if stem == 'expansion' else '-' + stem}.png"))
        plots.draw(path, picture, stem)
    ours = [row for row in rows if row["stem"] == "expansion"]
    for baseline in curves.BASELINES:
        if any(row["kind"] == "forward" and "conv" not in row["case"] for row in ours):
            yield (picture := path.with_name(f"{path.stem}-{baseline}.png"))
            curves.draw_networks(ours, picture, baseline)
    if any(row["kind"] in curves.CHARTS for row in ours):
        yield (picture := path.with_name(f"{path.stem}-products.png"))
        curves.draw_products(ours, picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description="Time all cases, write CSV and PNG.")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases with a TEXT in their name; the file keeps others"
    )
    parser.add_argument("--missing", action="store_true", help="only cases that the file has no rows of")
    parser.add_argument("--within", type=float, default=1e9, metavar="SECONDS", help="begin no case after that long")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of one case (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile of some eager baselines")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return parser


def _line(rows: Sequence[Row]) -> str:
    """One case in one line: our median, then each baseline's ratio to it; for host cost its own and our excess."""
    ours, *others = rows
    ratios = "  ".join(f"{row['call']} {float(row['ratio']):5.2f}x" for row in others)
    busy = f", others keep {ours['others']} cores busy" if float(ours["others"] or 0) > IDLE else ""
    if ours["kind"] == "host":
        ratios = "  ".join(f"{row['call']} {row['median_us']} (+{row['above_us']})" for row in others)
        return f"{ours['case']:<58} {ours['median_us']:>7} us  {ratios}  ({ours['rounds']} rounds{busy})"
    return f"{ours['case']:<46} {float(ours['median_us']) / 1000:9.3f} ms  {ratios}  ({ours['rounds']} rounds{busy})"


if __name__ == "__main__":
    sys.exit(main())
