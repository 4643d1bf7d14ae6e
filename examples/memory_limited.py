# SPDX-License-Identifier: Apache-2.0
"""The deepest vision transformer that trains within a cap of memory: dense, formed by autograd, gene-backed.

    python examples/memory_limited.py --caps 8 16 24 --out memory        (a GPU: caps of the allocator, in GiB)
    python examples/memory_limited.py --device cpu --out memory          (the CPU: caps of the resident set, in MiB)

Every trial is a process of its own that makes two training steps with AdamW. `plg.estimate_memory` says where to
begin, trials decide. Writes memory_limited.csv and memory_limited.png, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory_forms import FORMS, PIXELS, Sizes, estimate, fill, loss, network
from tqdm import tqdm

import pylearngene as plg
from pylearngene.cli.report.plots import pyplot
from pylearngene.errors import ArgumentError, PylearngeneError
from pylearngene.files.writing import write_folder
from pylearngene.training.memory import resident_bytes

STEPS = 2
CSV, PNG = "memory_limited.csv", "memory_limited.png"
# What each kind of device is asked by default; a unit is what caps are counted in.
DEFAULTS = {
    "cuda": {"caps": [8.0, 16.0, 24.0], "width": 1024, "batch": 16, "tokens": 196, "deepest": 512},
    "cpu": {"caps": [96.0, 192.0, 288.0], "width": 256, "batch": 4, "tokens": 64, "deepest": 64},
}
UNITS = {"cuda": ("GiB", 1 << 30), "cpu": ("MiB", 1 << 20)}
# form: colour (Okabe and Ito's), hatch
STYLES = {
    "dense": ("#D55E00", ""),
    "dense+blocks": ("#D55E00", "//"),
    "eager": ("#E69F00", ""),
    "checkpointed": ("#999999", ".."),
    "ours": ("#0072B2", ""),
    "ours+blocks": ("#0072B2", "//"),
}


@dataclass(frozen=True)
class Trial:
    """What one process is asked: whether a network of this depth trains within `cap` bytes."""

    form: str
    sizes: Sizes
    depth: int
    cap: int
    device: str


@dataclass(frozen=True)
class Outcome:
    """What it answered: whether it trains, and the peak in bytes (0 where it ran out of memory)."""

    trains: bool
    peak: int
    parameters: int


@dataclass
class Search:
    """The deepest network of a form within a cap.

    Attributes:
        depth: 0 where not even one block trains.
        at_least: whether the search ended at the deepest it was allowed to try.
        estimated, measured: peaks at that depth.
        guess: the depth that the estimate named.
        trials: processes run.
    """

    form: str
    cap: int
    depth: int
    at_least: bool
    parameters: int
    estimated: int
    measured: int
    guess: int
    trials: int


def train(net: torch.nn.Module, sizes: Sizes, device: torch.device) -> None:
    """Make two steps; bfloat16 autocast on a GPU, float32 on the CPU."""
    images = torch.randn(sizes.batch, sizes.tokens, PIXELS, device=device)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            error = loss(net(images))
        error.backward()
        optimizer.step()


def try_on_gpu(trial: Trial) -> Outcome:
    """Train under a cap of the caching allocator."""
    device = torch.device("cuda", torch.cuda.current_device())  # with a number: a fraction is not set without
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(trial.cap / total, device)
    net = network(trial.form, trial.sizes, trial.depth)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    try:
        train(fill(net, device), trial.sizes, device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return Outcome(False, 0, parameters)
    return Outcome(True, torch.cuda.max_memory_allocated(device), parameters)


def try_on_cpu(trial: Trial) -> Outcome:
    """Train, and read by how much the resident set grew above what the libraries take."""
    device, small = torch.device("cpu"), Sizes(64, 2, 8)
    train(fill(network(trial.form, small, 1), device), small, device)
    net = network(trial.form, trial.sizes, trial.depth)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    gc.collect()
    before = resident_bytes()
    train(fill(net, device), trial.sizes, device)
    peak = resident_bytes() - before
    return Outcome(peak <= trial.cap, peak, parameters)


def ask(trial: Trial) -> Outcome:
    """Run a trial in a process of its own."""
    # The C library then gives large blocks back when they are freed, as the caching allocator of a GPU reuses them.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--trial", json.dumps(asdict(trial))]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        raise RuntimeError(f"trial of {trial.form} at depth {trial.depth} failed:\n{done.stderr[-2000:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def guessed(peak: Callable[[int], int], cap: int, deepest: int) -> int:
    """The depth that an estimate of two shallow networks names: peaks grow by as much with every block."""
    few, more = 4, 8
    low, high = peak(few), peak(more)
    found = few + (cap - low) * (more - few) // max(1, high - low)
    return max(1, min(deepest, found))


def search(trial: Callable[[int], Outcome], guess: int, deepest: int) -> tuple[int, dict[int, Outcome]]:
    """Bisect between a depth that trains and one that does not, from a guess on; returns the depth and all outcomes."""
    outcomes: dict[int, Outcome] = {}
    low, high, depth, stride = 0, deepest + 1, guess, 1
    while high - low > 1:
        outcomes[depth] = trial(depth)
        if outcomes[depth].trains:
            low = depth
            depth = min(low + stride, high - 1) if high > deepest else (low + high) // 2
        else:
            high = depth
            depth = max(high - stride, low + 1) if low == 0 else (low + high) // 2
        stride *= 2
    return low, outcomes


def deepest_within(form: str, cap: int, args: argparse.Namespace, one_at_a_time: threading.Lock) -> Search:
    """Find the deepest network of one form within one cap."""
    peak = estimate(form, args.sizes, torch.device(args.device))
    with one_at_a_time:
        guess = guessed(peak, cap, args.deepest)
    depth, outcomes = search(lambda depth: ask(Trial(form, args.sizes, depth, cap, args.device)), guess, args.deepest)
    with one_at_a_time:
        estimated = peak(max(depth, 1))
    last = outcomes.get(depth, Outcome(False, 0, 0))
    at_least = depth == args.deepest
    return Search(form, cap, depth, at_least, last.parameters, estimated, last.peak, guess, len(outcomes))


def table(found: Sequence[Search], unit: str, scale: int) -> str:
    """One line per form and cap."""
    head = ("form", f"cap ({unit})", "blocks", "parameters", "estimated", "measured", "guess", "trials")
    rows = [head]
    for one in found:
        depth = f">= {one.depth}" if one.at_least else str(one.depth)
        peaks = (f"{one.estimated / scale:.2f}", f"{one.measured / scale:.2f}" if one.depth else "")
        numbers = (f"{one.cap / scale:g}", depth, f"{one.parameters:,}", *peaks, str(one.guess), str(one.trials))
        rows.append((one.form, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*lines, "", *(f"{form}: {meaning}" for form, meaning in FORMS.items() if form in rows_of(found))])


def rows_of(found: Sequence[Search]) -> dict[str, list[Search]]:
    """What was found, by form."""
    return {one.form: [other for other in found if other.form == one.form] for one in found}


def as_csv(found: Sequence[Search], args: argparse.Namespace) -> bytes:
    """The rows with what they were measured on."""
    cuda = args.device != "cpu"
    where = {
        **asdict(args.sizes),
        "dtype": "bfloat16 autocast" if cuda else "float32",
        "optimizer": "AdamW",
        "device": torch.cuda.get_device_name(args.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pylearngene": plg.__version__,
    }
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*asdict(found[0]), *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(one), **where} for one in found)
    return text.getvalue().encode()


def as_png(found: Sequence[Search], args: argparse.Namespace, unit: str, scale: int) -> bytes:
    """Depth per cap, a bar per form; where the search ended before memory did, the label says so."""
    plt = pyplot()
    picture, sizes = io.BytesIO(), args.sizes
    forms = [form for form in STYLES if form in rows_of(found)]
    caps = sorted({one.cap for one in found})
    look = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
    with plt.rc_context(look):
        figure, axis = plt.subplots(figsize=(10.5, 5.6), layout="constrained")
        width = 0.86 / len(forms)
        for index, form in enumerate(forms):
            colour, hatch = STYLES[form]
            rows = sorted(rows_of(found)[form], key=lambda one: one.cap)
            places = [caps.index(one.cap) + (index - (len(forms) - 1) / 2) * width for one in rows]
            bars = axis.bar(places, [one.depth for one in rows], width, color=colour, hatch=hatch, edgecolor="white")
            axis.bar_label(bars, [f"≥{one.depth}" if one.at_least else str(one.depth) for one in rows], padding=2)
            bars.set_label(f"{form}: {FORMS[form]}")
        axis.set_xticks(range(len(caps)), [f"{cap / scale:g} {unit}" for cap in caps])
        axis.set(xlabel="cap", ylabel="blocks")
        title = f"Deepest network that trains: width {sizes.width}, batch {sizes.batch} x {sizes.tokens} tokens, AdamW"
        axis.set_title(title, loc="left", fontsize=10.5)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
        figure.savefig(picture, format="png", dpi=130, facecolor="white")
        plt.close(figure)
    return picture.getvalue()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what a device is asked by default is in DEFAULTS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", type=float, nargs="+", help="GiB on a GPU (8 16 24), MiB on the CPU (96 192 288)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="which forms to try")
    parser.add_argument("--batch", type=int, help="images (16 on a GPU, 4 on the CPU)")
    parser.add_argument("--width", type=int, help="D, a multiple of 64 (1024, 256)")
    parser.add_argument("--tokens", type=int, help="patches of an image (196, 64)")
    parser.add_argument("--deepest", type=int, help="end of the search (512, 64)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one")
    parser.add_argument("--jobs", type=int, help="trials at a time (as many as fit, at most 4 on a GPU, 2 on the CPU)")
    parser.add_argument(
        "--out", type=Path, default=Path("memory_limited"), help="folder of the CSV file and the picture"
    )
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be asked, before anything is run."""
    for name in ("batch", "tokens", "deepest", "width"):
        if getattr(args, name) < 1:
            raise ArgumentError(f"--{name}: expected a number of at least 1, got {getattr(args, name)}")
    if args.width % 64:
        raise ArgumentError(f"--width: expected a multiple of 64, got {args.width}")
    if args.jobs is not None and args.jobs < 1:
        raise ArgumentError(f"--jobs: expected a number of at least 1, got {args.jobs}")
    if min(args.caps) <= 0:
        raise ArgumentError(f"--caps: expected numbers above 0, got {min(args.caps):g}")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ArgumentError("--device: expected 'cpu', since no GPU is here, got 'cuda'")
        total = torch.cuda.get_device_properties(0).total_memory
        if max(args.caps) * UNITS["cuda"][1] > total:
            raise ArgumentError(f"--caps: expected at most {total / 2**30:.1f} GiB, got {max(args.caps):g}")
    pyplot()


def jobs(args: argparse.Namespace) -> int:
    """How many trials run at a time: on a GPU their caps, and 2 GiB each beside them, have to fit."""
    if args.jobs is not None:
        return int(args.jobs)
    if args.device == "cpu":
        return min(2, os.cpu_count() or 1)
    total = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(4, int(total // ((max(args.caps) + 2) * UNITS["cuda"][1]))))


def run(args: argparse.Namespace) -> None:
    """Search for every form and cap, write both files, print the table."""
    check(args)
    args.sizes = Sizes(args.width, args.batch, args.tokens)
    unit, scale = UNITS[args.device]
    asked = [(form, int(cap * scale)) for form in args.forms for cap in sorted(args.caps)]
    lock = threading.Lock()
    with ThreadPoolExecutor(jobs(args)) as pool:
        running = [pool.submit(deepest_within, form, cap, args, lock) for form, cap in asked]
        try:
            found = [one.result() for one in tqdm(running, unit="search", disable=None, file=sys.stderr)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_folder(args.out, {CSV: as_csv(found, args), PNG: as_png(found, args, unit, scale)}, overwrite=True)
    print(table(found, unit, scale))


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = arguments(given)
    if args.trial is not None:
        asked: dict[str, Any] = json.loads(args.trial)
        trial = Trial(**{**asked, "sizes": Sizes(**asked["sizes"])})
        outcome = try_on_gpu(trial) if trial.device != "cpu" else try_on_cpu(trial)
        print(json.dumps(asdict(outcome)))
        return 0
    try:
        run(args)
    except PylearngeneError as error:
        print(f"memory_limited: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("memory_limited: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
