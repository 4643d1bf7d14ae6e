# SPDX-License-Identifier: Apache-2.0
"""The goals as data, and the table that compares them with what was measured; nothing is asserted.

A goal counts as reached only if every case it speaks of reaches it. Goals of speed are ratios to a baseline of the
same run: the baseline's time by ours.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.gpu.records import read

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: for people.
        stage: whose rows.
        where: columns and the values that they may have.
        column: what is compared.
        bound: the goal.
        most: whether it is an upper bound.
        sizes: bounds of the tokens, both included.
        widths: the fewest rows and columns of the weight.
    """

    text: str
    stage: str
    where: Mapping[str, tuple[str, ...]]
    column: str
    bound: float
    most: bool = False
    sizes: tuple[int, int] = (0, 1 << 40)
    widths: int = 0

    def values(self, rows: Rows) -> list[float]:
        """What was measured, one number per case."""
        return [float(row[self.column]) for row in rows if self._takes(row)]

    def _takes(self, row: Mapping[str, str]) -> bool:
        if row.get("status") != "ok" or not row.get(self.column) or row.get("cuda", "none") == "none":
            return False  # goals are a GPU's
        if any(row.get(name) not in allowed for name, allowed in self.where.items()):
            return False
        if not self.sizes[0] <= int(row.get("tokens") or 0) <= self.sizes[1]:
            return False
        return not self.widths or min(int(size) for size in row["shape"].split(" x ")) >= self.widths

    def line(self, rows: Rows) -> tuple[str, str, str, str]:
        """Text, bound, what was measured, and "reached", "missed" or "not measured"."""
        sign = "<=" if self.most else ">="
        found = self.values(rows)
        if not found:
            return self.text, f"{sign} {self.bound:g}", "-", "not measured"
        worst = max(found) if self.most else min(found)
        reached = worst <= self.bound if self.most else worst >= self.bound
        shown = (
            f"{worst:.3f}" if len(found) == 1 else f"{worst:.3f} (worst of {len(found)}, median {median(found):.3f})"
        )
        return self.text, f"{sign} {self.bound:g}", shown, "reached" if reached else "missed"


def _products(kind: str, name: str) -> list[Goal]:
    def goal(text: str, genes: int, tokens: tuple[int, int], bound: float, call: str = "dense") -> Goal:
        where = {"kind": (kind,), "genes": (str(genes),), "call": (call,)}
        return Goal(f"{name}, {text}, K = {genes}", "speed", where, "ratio", bound, sizes=tokens, widths=768)

    large, middle = (16384, 1 << 40), (512, 2048)
    return [
        goal("M >= 16384, of dense", 2, large, 0.965),
        goal("M >= 16384, of dense", 4, large, 0.94),
        goal("M >= 16384, of dense, overlapped", 2, large, 0.97),
        goal("M >= 16384, of dense, overlapped", 4, large, 0.96),
        goal("M = 4096, of dense", 2, (4096, 4096), 0.88),
        goal("M = 4096, of dense", 4, (4096, 4096), 0.80),
        goal("M = 4096, of dense, overlapped", 2, (4096, 4096), 0.92),
        goal("M = 4096, of dense, overlapped", 4, (4096, 4096), 0.88),
        goal("M = 512 to 2048, of dense", 2, middle, 0.85),
        goal("M = 512 to 2048, of dense", 4, middle, 0.70),
        goal("M = 512 to 2048, of torch.compile", 2, middle, 1.3, "compiled"),
        goal("M = 512 to 2048, of torch.compile", 4, middle, 1.3, "compiled"),
    ]


def _stack(genes: int, bound: float, remark: str = "") -> Goal:
    where = {"kind": ("stack",), "genes": (str(genes),), "call": ("dense",)}
    return Goal(f"stack, M <= 16, of dense, K = {genes}{remark}", "speed", where, "ratio", bound, sizes=(1, 16))


def _wgrad(text: str, genes: int, tokens: tuple[int, int], bound: float) -> Goal:
    where = {"kind": ("wgrad",), "genes": (str(genes),), "call": ("dense",)}
    return Goal(f"weight gradients, {text}, of dense, K = {genes}", "speed", where, "ratio", bound, sizes=tokens)


def _host(mode: str, bound: float, call: str = "dense") -> Goal:
    where = {"kind": ("host",), "shape": (f"linear 64, {mode}",), "call": (call,)}
    return Goal(f"host, us above F.linear, {mode}", "speed", where, "above_us", bound, most=True)


def _train(text: str, variant: str, column: str, bound: float, most: bool = False) -> Goal:
    where = {"net": ("vit_b",), "variant": (variant,)}
    return Goal(f"ViT-B step, {text}", "train", where, column, bound, most)


GOALS = [
    *_products("forward", "forward"),
    *_products("dx", "dx"),
    _stack(1, 1.3),
    _stack(2, 0.95),
    _stack(2, 1.15, ", one kernel for the stack"),
    _wgrad("M >= 25000", 4, (25000, 1 << 40), 0.85),
    _wgrad("M >= 25000, overlapped", 4, (25000, 1 << 40), 0.90),
    _wgrad("M = 4096", 2, (4096, 4096), 0.70),
    Goal("weight alone, of a copy", "speed", {"kind": ("synthesis",), "call": ("ours",)}, "copy_share", 0.85),
    _train("speed of dense, K = 2", "ours K2", "of_dense", 0.93),
    _train("speed of dense, K = 4", "ours K4", "of_dense", 0.93),
    _train("weight memory of dense, K = 2", "ours K2", "weight_memory_of_dense", 0.40, most=True),
    _train("weight memory of dense, K = 4", "ours K4", "weight_memory_of_dense", 0.40, most=True),
    _train("compiled, speed of torch.compile of materialization", "ours K2, compiled", "of_compiled", 1.15),
    _host("no grad", 6.0),
    _host("recorded", 12.0),
]


def table(folder: Path) -> str:
    """Every goal, what it was measured as, and whether it is reached, from the result files in a folder."""
    rows = {stage: read(folder / f"{stage}.csv") for stage in {goal.stage for goal in GOALS}}
    lines = [("goal", "bound", "measured", ""), *(goal.line(rows[goal.stage]) for goal in GOALS)]
    widths = [max(len(line[place]) for line in lines) for place in range(3)]
    return "\n".join(
        "  ".join([*(part.ljust(width) for part, width in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
