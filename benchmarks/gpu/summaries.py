# SPDX-License-Identifier: Apache-2.0
"""What a stage found, in a few lines for people: a line per case while it runs, and tables at its end.

Full figures are in the result files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def line(rows: Rows) -> str:
    """One case: our time and the ratio of every other call, or what there is to say about it."""
    first = rows[0]
    if first.get("median_ms"):
        return f"{first['median_ms']} ms, {first.get('of_dense', '')} of dense, peak {first.get('peak_mib', '-')} MiB"
    if not first.get("median_us"):
        return " ".join(str(first.get("note", "")).split())[:200]
    if "call" not in first:
        return f"{first['median_us']} us, {first.get('ratio', '')} of dense, compiled in {first.get('compile_s')} s"
    others = ", ".join(f"{row['call']} {row['ratio']}" for row in rows[1:] if row.get("ratio"))
    return f"{first['median_us']} us; {others}"


def tables(stage: str, rows: Rows) -> str:
    """The tables of a stage; empty for stages that only pass or fail."""
    good = [row for row in rows if row["status"] == "ok"]
    if stage == "speed":
        return "\n".join(part for part in (_ceilings(good), _ratios(good)) if part)
    return _training(good) if stage == "train" else ""


def _ceilings(rows: Rows) -> str:
    found = {row["call"]: row for row in rows if row["case"] == "roof"}
    if not found:
        return ""
    return f"ceilings: copy {found['copy']['gb_per_s']} GB/s, product {found['product']['tflops']} TFLOP/s"


def _ratios(rows: Rows) -> str:
    """Per kind, K and M: the median over shapes of dense time by ours, and the pinned regime that is fastest."""
    lines = []
    groups: dict[tuple[str, int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["kind"] in ("forward", "dx", "wgrad", "training", "stack"):
            key = (str(row["kind"]), int(row["genes"]), int(row["tokens"]))
            groups.setdefault(key, {}).setdefault(str(row["case"]), []).append(row)
    for (kind, genes, tokens), cases in sorted(groups.items()):
        ratios = [float(row["ratio"]) for case in cases.values() for row in case if row["call"] == "dense"]
        hand = [float(row["ratio"]) for case in cases.values() for row in case if row["call"] == "hand panel"]
        best = [name for name in (_fastest(case) for case in cases.values()) if name]
        fastest = max(set(best), key=best.count) if best else ""
        by_hand = f", of hand panel {median(hand):.3f}" if hand else ""
        lines.append(
            f"{kind:<8} K={genes} M={tokens:<6} of dense {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
            f"{len(ratios)} shapes){by_hand}{f', fastest regime {fastest}' if fastest else ''}"
        )
    return "\n".join(lines)


def _fastest(case: Rows) -> str:
    """The regime that was fastest when it was pinned and really ran."""
    pinned = {
        str(row["call"]).removeprefix("ours, "): float(row["median_us"])
        for row in case
        if str(row["call"]).startswith("ours, ")
        and str(row["call"]).removeprefix("ours, ") in str(row["regime"]).split()
    }
    return min(pinned, key=lambda name: pinned[name]) if pinned else ""


def _training(rows: Rows) -> str:
    columns = (
        "median_ms",
        "of_dense",
        "of_compiled",
        "weight_memory_of_dense",
        "saved_mib",
        "workspace_mib",
        "peak_mib",
    )
    lines = [("case", *columns), *((row["case"], *(row[column] or "-" for column in columns)) for row in rows)]
    widths = [max(len(str(line[place])) for line in lines) for place in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(str(part).ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
