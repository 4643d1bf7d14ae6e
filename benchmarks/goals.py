# SPDX-License-Identifier: Apache-2.0
"""The goals of the CPU as data, and the table that compares them with what was measured; nothing is asserted.

A goal is a ratio of one run, the baseline's time by ours, and counts as reached only if every case it speaks of
reaches it. Where nothing else is said, ours is the layer. Eager materialization is that with the fewest operations of
torch; in brackets stands the other form, coefficients times stacked genes, and what both calls take right after a pass
of their own, which decides no goal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Rows = Sequence[Mapping[str, str]]
# The same call right after a pass of its own; a dense pass streams its weights from memory in either order.
AGAIN = {"ours": "again", "kernel": "kernel again", "eager": "eager again", "dense": "dense"}


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: for people.
        cases: the cases it speaks of, by name.
        bound: the least ratio.
        baseline: whose time is divided.
        ours: by whose.
        column: of the baseline's row to take instead of the ratio of medians.
        most: whether the bound is an upper one.
    """

    text: str
    cases: tuple[str, ...]
    bound: float
    baseline: str
    ours: str = "ours"
    column: str = ""
    most: bool = False

    def values(self, rows: Rows, baseline: str = "", ours: str = "") -> list[float]:
        """What was measured, one number per case that has rows; of other calls where they are named."""
        calls = {(row["case"], row["call"]): row for row in rows if row["case"] in self.cases}
        found = []
        for case in self.cases:
            row, own = calls.get((case, baseline or self.baseline)), calls.get((case, ours or self.ours))
            if row is not None and own is not None:
                value = row[self.column] if self.column else float(row["median_us"]) / float(own["median_us"])
                found.append(float(value))
        return found

    def verdict(self, rows: Rows) -> str:
        """Whether every case reaches it: "met", "missed" or "not measured"."""
        return self._judged(self.values(rows))

    def again(self, rows: Rows) -> list[float]:
        """What was measured where every pass came after one of its own; empty where a case has no such rows."""
        if self.column or self.baseline not in AGAIN:
            return []
        found = self.values(rows, AGAIN[self.baseline], AGAIN[self.ours])
        return found if len(found) == len(self.cases) else []

    def _judged(self, found: Sequence[float]) -> str:
        if len(found) < len(self.cases):
            return "not measured"
        return "met" if (max(found) <= self.bound if self.most else min(found) >= self.bound) else "missed"

    def cells(self, rows: Rows) -> tuple[str, ...]:
        """What is compared, the bound, the measured numbers and the verdict."""
        whose = {"ours": "", "kernel": ", kernel"}[self.ours]
        measured = _joined(self.values(rows)) or "-"
        stacked = self.values(rows, "stacked") if self.baseline == "eager" and not self.column else []
        again = self.again(rows)
        beside = [("stacked", stacked), ("again", again)]
        shown = "; ".join(f"{name}: {_joined(values)}" for name, values in beside if values)
        measured += f" ({shown})" if shown else ""
        verdict = self.verdict(rows)
        verdict += " (again: met)" if verdict == "missed" and self._judged(again) == "met" else ""
        of = {"copy": "of a copy", "function": "us above `F.linear`"}.get(self.baseline, f"of {self.baseline}")
        sign = "<=" if self.most else ">="
        return f"{self.text}{whose}", of, f"{sign} {self.bound:g}", measured, verdict


def shown(ratio: float) -> str:
    """A ratio with two digits, or with a third where it is below 1 and two do not show it."""
    return f"{ratio:.3f}" if ratio < 1 and f"{ratio:.2f}" == "1.00" else f"{ratio:.2f}"


def _joined(values: Sequence[float]) -> str:
    return " / ".join(map(shown, values))


def _names(
    kind: str, shape: str, tokens: Sequence[int], genes: Sequence[int], dtypes: Sequence[str]
) -> tuple[str, ...]:
    return tuple(f"expansion-{kind}-{shape}-M{m}-K{k}-{dtype}" for dtype in dtypes for k in genes for m in tokens)


def _network(width: int, tokens: Sequence[int], genes: int, dtype: str, kind: str = "forward") -> tuple[str, ...]:
    shape = f"{12 if max(tokens) <= 256 else 1}xD{width}"
    return _names(kind, shape, tokens, (genes,), (dtype,))


def _few() -> list[Goal]:
    """Networks of 12 layers, up to 16 tokens."""
    one, two, four = (_network(384, (1, 4), genes, "fp32") for genes in (1, 2, 4))
    goals = [
        Goal("D=384 fp32 K=2, M=1 / 4", two, 6, "dense", "kernel"),
        Goal("D=384 fp32 K=2, M=1 / 4", two, 4, "dense"),
        Goal("D=384 fp32 K=2, M=1 / 4", two, 10, "eager"),
        Goal("D=384 fp32 K=1, M=1 / 4", one, 9, "dense", "kernel"),
        Goal("D=384 fp32 K=4, M=1 / 4", four, 1.8, "dense", "kernel"),
        Goal("D=384 fp32 K=4, M=1 / 4", four, 5, "eager"),
        Goal("D=384 fp32 K=2, M=16", _network(384, (16,), 2, "fp32"), 2, "dense"),
        Goal("D=384 fp32 K=2, M=16", _network(384, (16,), 2, "fp32"), 4, "eager"),
    ]
    for tokens, dense, eager in ((1, 3.2, 6), (4, 2.2, 5), (16, 1.0, 3)):
        case, text = _network(384, (tokens,), 2, "bf16"), f"D=384 bf16 K=2, M={tokens}"
        goals += [Goal(text, case, dense, "dense", "kernel"), Goal(text, case, eager, "eager")]
    wide = _network(768, (1,), 2, "fp32")
    return [
        *goals,
        Goal("D=768 fp32 K=2, M=1", wide, 1.6, "dense", "kernel"),
        Goal("D=768 fp32 K=2, M=1", wide, 3, "eager"),
    ]


def _many() -> list[Goal]:
    """From 64 tokens on, and the products of a backward pass."""
    goals = []
    for dtype, bounds in (("fp32", (0.80, 0.88, 0.92)), ("bf16", (0.80, 0.85, 0.85))):
        for tokens, bound in zip((64, 256, 512), bounds, strict=True):
            case = _network(384, (tokens,), 2, dtype) + _network(768, (tokens,), 2, dtype)
            text = f"{dtype} K=2, M={tokens}, D=384 / 768"
            goals += [Goal(text, case, bound, "dense"), Goal(text, case, 1.0, "eager")]
    for kind, text in (("forward", "forward"), ("dx", "dX")):
        for dtype in ("fp32", "bf16"):
            case = _names(kind, "1xD384", (1024, 4096), (1, 2, 4), (dtype,))
            case += _names(kind, "1xD768", (1024,), (2, 4), (dtype,))
            what = f"{text} {dtype}, M=1024 / 4096 with K=1, 2, 4; D=768 M=1024 with K=2, 4"
            goals += [Goal(what, case, 0.98, "dense"), Goal(what, case, 1.0, "eager")]
    for dtype in ("fp32", "bf16"):
        case = tuple(name for width in (384, 768) for name in _network(width, (1024, 4096), 2, dtype, "wgrad"))
        text = f"weight gradient {dtype} K=2, D=384 M=1024 / 4096, D=768 M=1024 / 4096"
        goals += [Goal(text, case, 0.90, "dense"), Goal(text, case, 1.2, "eager")]
    return goals


def _whole() -> list[Goal]:
    """The weight alone, calls without work, and whole models; of a step the interval's lower end is judged."""
    step = ("expansion-model-ViT-Sstep,batch32-M6304-K2-fp32",)
    forward = ("expansion-model-ViT-Sforward,batch1-M197-K2-fp32",)
    alone = tuple(f"expansion-synthesis-3072x768-K2-{dtype}" for dtype in ("fp32", "bf16"))
    text = "ViT-S training step, batch 32, fp32, 95 % interval from"
    calls = [(f"expansion-host-linear64,{mode}-M1-K2-fp32",) for mode in ("nograd", "recorded")]
    return [
        Goal("layer of 64 x 64, one token, without grad", calls[0], 6, "function", column="above_us", most=True),
        Goal("layer of 64 x 64, one token, with grad", calls[1], 12, "function", column="above_us", most=True),
        Goal("weight alone, K=2, fp32 / bf16, share", alone, 0.8, "copy"),
        Goal(text, step, 0.98, "dense", column="ratio_low"),
        Goal(text, step, 1.05, "eager", column="ratio_low"),
        Goal("ViT-S forward, batch 1, fp32", forward, 1.5, "dense"),
        Goal("ViT-S forward, batch 1, fp32", forward, 4, "eager"),
    ]


GOALS = [*_few(), *_many(), *_whole()]
HEAD = ("goal", "speed", "bound", "measured", "")


def table(rows: Rows) -> str:
    """Every goal, its bound, what was measured, and whether it is reached."""
    lines = [HEAD, *(goal.cells(rows) for goal in GOALS)]
    widths = [max(len(line[place]) for line in lines) for place in range(4)]
    return "\n".join(
        "  ".join([*(part.ljust(width) for part, width in zip(line[:4], widths, strict=True)), line[4]]).rstrip()
        for line in lines
    )


# Kinds of cases whose weights are compared with eager materialization, for people.
KINDS = {
    "synthesis": "weights alone",
    "forward": "forward passes",
    "dx": "dX",
    "wgrad": "weight gradients",
    "training": "training steps",
    "model": "whole models",
}
GRID, BESIDE = "the grid of networks", "beside it"
Comparison = tuple[float, str, str]


def against_eager(rows: Rows) -> dict[str, list[Comparison]]:
    """Per comparison the time of eager materialization by ours, the case and what it is, ascending.

    The grid are products, training steps and whole models of linear layers; weights alone, convolutions and other
    primitives are beside it.
    """
    times = {(row["case"], row["call"]): float(row["median_us"]) for row in rows}
    found: dict[str, list[Comparison]] = {GRID: [], BESIDE: []}
    for row in rows:
        if row["call"] in ("eager", "stacked", "checkpointed") and row["kind"] in KINDS:
            apart = "convolutions" if "conv" in row["case"] else "" if row["stem"] == "expansion" else row["stem"]
            of = GRID if not apart and row["kind"] != "synthesis" else BESIDE
            what = f"{apart}: {KINDS[row['kind']]}" if apart else KINDS[row["kind"]]
            found[of].append((float(row["median_us"]) / times[row["case"], "ours"], row["case"], what))
    return {of: sorted(comparisons) for of, comparisons in found.items()}


def worst(rows: Rows) -> str:
    """Return the least ratio to eager materialization in the grid and beside it, what was compared, what is slower."""
    parts = [_least(of, found) for of, found in against_eager(rows).items() if found]
    return "\n\n".join(parts) if parts else "eager materialization: not measured"


def _least(of: str, found: Sequence[Comparison]) -> str:
    counts = Counter(what for _, _, what in found)
    kinds = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    slower = [f"{case} {shown(ratio)}" for ratio, case, _ in found if ratio < 1]
    least = f"{shown(found[0][0])} ({found[0][1]})"
    head = f"against eager materialization, {of}, {len(found)} comparisons ({kinds}): at least {least}"
    return head + (f"\nslower than it in {len(slower)}: {', '.join(slower)}" if slower else "; never slower")
