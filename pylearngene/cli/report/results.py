# SPDX-License-Identifier: Apache-2.0
"""Numbers of the demo put together: means and spreads over seeds, total compute, the table, what was lost."""

from __future__ import annotations

import copy
from math import sqrt
from statistics import mean, stdev
from typing import Any

from pylearngene.cli.report.labels import ARMS, COMPARED

NEEDS_ANCESTRY = ("untouched", "tuned", "picked", "scratch_distilled")


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Compute per arm and depth the mean accuracy and its spread, and per arm the total compute for all depths.

    With one seed the spread is the standard error of the test subset, with several the standard deviation.
    """
    depths, runs = results["config"]["depths"], results["runs"]
    arms: dict[str, Any] = {}
    for arm in [*ARMS, "picked_untouched"]:
        values = {depth: [run["depths"][depth][arm]["accuracy"] for run in runs] for depth in depths}
        arms[arm] = {
            str(depth): {"mean": mean(found), "spread": _spread(found, results), "seeds": found}
            for depth, found in values.items()
        }
    return {
        "arms": arms,
        "compute": {arm: _compute(arm, results) for arm in ARMS},
        "networks": {name: mean(run[name]["accuracy"] for run in runs) for name in ("ancestry", "auxiliary")},
    }


def _spread(values: list[float], results: dict[str, Any]) -> float:
    if len(values) > 1:
        return stdev(values)
    return sqrt(values[0] * (1 - values[0]) / results["config"]["test_images"])


def _compute(arm: str, results: dict[str, Any]) -> dict[str, float]:
    """CPU seconds measured for all depths together, without and with the ancestry; means over seeds."""
    totals, with_ancestry, accuracies = [], [], []
    for run in results["runs"]:
        own = sum(run["depths"][depth][arm]["cpu_seconds"] for depth in results["config"]["depths"])
        if arm in ("untouched", "tuned"):
            own += run["auxiliary"]["cpu_seconds"]
        if arm in ("untouched", "tuned", "scratch_distilled"):
            own += run["teacher_cpu_seconds"]
        totals.append(own)
        with_ancestry.append(own + (run["ancestry"]["cpu_seconds"] if arm in NEEDS_ANCESTRY else 0.0))
        accuracies.append(mean(run["depths"][depth][arm]["accuracy"] for depth in results["config"]["depths"]))
    spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {
        "cpu_seconds": mean(totals),
        "cpu_seconds_with_ancestry": mean(with_ancestry),
        "accuracy": mean(accuracies),
        "spread": spread,
    }


def result_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table: accuracy in percent, one row per depth, the mean last."""
    arms, depths = results["summary"]["arms"], results["config"]["depths"]
    rows = []
    for depth in depths:
        cells = [arms[arm][str(depth)] for arm in ARMS]
        rows.append([str(depth), *(f"{100 * cell['mean']:.1f} ± {100 * cell['spread']:.1f}" for cell in cells)])
    means = [results["summary"]["compute"][arm]["accuracy"] for arm in ARMS]
    rows.append(["mean", *(f"{100 * value:.1f}" for value in means)])
    return ["depth", *ARMS.values()], rows


def comparisons(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the tuned descendants with every baseline and with the untouched ones, depth by depth.

    A depth counts as won or lost when the difference is more than the root of the two squared spreads.
    """
    arms = results["summary"]["arms"]
    found = []
    for baseline in COMPARED:
        entry: dict[str, Any] = {"baseline": baseline, "won": [], "even": [], "lost": []}
        differences = []
        for depth in results["config"]["depths"]:
            ours, theirs = arms["tuned"][str(depth)], arms[baseline][str(depth)]
            difference = ours["mean"] - theirs["mean"]
            noise = sqrt(ours["spread"] ** 2 + theirs["spread"] ** 2)
            verdict = "even" if abs(difference) <= noise else "won" if difference > 0 else "lost"
            entry[verdict].append(depth)
            differences.append(difference)
        entry["mean_difference"] = mean(differences)
        found.append(entry)
    return found


def without_losses(results: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without the per-step losses, which are long; results.json has them."""
    short = copy.deepcopy(results)
    for run in short["runs"]:
        records = [run["ancestry"], run["auxiliary"]]
        records += [arm for arms in run["depths"].values() for arm in arms.values()]
        for record in records:
            record.pop("losses", None)
    return short
