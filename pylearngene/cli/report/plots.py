# SPDX-License-Identifier: Apache-2.0
"""The plots of the demo's report: three panels, together and one by one, and every loss curve.

Colours are Okabe and Ito's, told apart by colour-blind readers; markers and dashes repeat what colour says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pylearngene.cli.report.labels import ARMS, MEMORY_KINDS
from pylearngene.errors import ArgumentError

# arm: colour, marker, dashes
STYLES = {
    "tuned": ("#0072B2", "o", "-"),
    "untouched": ("#56B4E9", "s", "--"),
    "picked": ("#D55E00", "^", "-"),
    "scratch": ("#999999", "v", "-"),
    "scratch_distilled": ("#CC79A7", "D", "-"),
    "scratch_compute": ("#009E73", "P", "-"),
}
MEMORY_STYLES = {
    "dense": ("#D55E00", "^", "-"),
    "eager": ("#E69F00", "D", "-"),
    "recomputed": ("#999999", "v", "--"),
    "ours": ("#0072B2", "o", "-"),
}
INK, PALE = "#222222", "#DDDDDD"
SMOOTHING = 15
DPI = 140


def pyplot() -> ModuleType:
    """Import matplotlib without a display.

    Raises:
        ArgumentError: it is not installed; the message holds the command that installs it.
    """
    try:
        import matplotlib
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ArgumentError(
            "matplotlib: expected to be installed for the report; `pip install pylearngene[plots]` installs it"
        ) from error
    matplotlib.use("agg")
    return cast(ModuleType, plt)


PANELS: dict[str, Callable[[Any, dict[str, Any]], None]] = {}


def draw_all(results: dict[str, Any], folder: Path) -> None:
    """Write panels.png, one PNG per panel, and losses.png into the folder."""
    plt = pyplot()
    with plt.rc_context(_look()):
        figure, axes = plt.subplots(1, 3, figsize=(14.5, 5.6), layout="constrained")
        for axis, draw in zip(axes, PANELS.values(), strict=True):
            draw(axis, results)
        _save(plt, figure, results, folder / "panels.png")
        for name, draw in PANELS.items():
            figure, axis = plt.subplots(figsize=(7.2, 5.4), layout="constrained")
            draw(axis, results)
            _save(plt, figure, results, folder / f"{name}.png")
        _save(plt, _losses(plt, results), results, folder / "losses.png")


def _look() -> dict[str, Any]:
    return {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": PALE,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
    }


def _save(plt: ModuleType, figure: Any, results: dict[str, Any], path: Path) -> None:
    if results["data"]["banner"]:
        figure.suptitle("STAND-IN DATA (scikit-learn digits): not a result", color="#B00020", weight="bold")
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _accuracy(axis: Any, results: dict[str, Any]) -> None:
    depths = results["config"]["depths"]
    for arm, (colour, marker, dashes) in STYLES.items():
        points = [results["summary"]["arms"][arm][str(depth)] for depth in depths]
        middle = [100 * point["mean"] for point in points]
        low = [100 * (point["mean"] - point["spread"]) for point in points]
        high = [100 * (point["mean"] + point["spread"]) for point in points]
        axis.fill_between(depths, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(depths, middle, dashes, color=colour, marker=marker, label=ARMS[arm])
    ancestry = 100 * results["summary"]["networks"]["ancestry"]
    axis.axhline(ancestry, color=INK, linewidth=1, linestyle=":", label=f"ancestry, depth {results['config']['depth']}")
    axis.set(title="Accuracy against depth", xlabel="depth of the network (blocks)", ylabel="test accuracy (%)")
    axis.set_xticks(depths)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _memory(axis: Any, results: dict[str, Any]) -> None:
    for kind, (colour, marker, dashes) in MEMORY_STYLES.items():
        points = [point for point in results["memory"] if point["kind"] == kind]
        depths = [point["depth"] for point in points]
        sizes = [point["peak_bytes"] / 2**20 for point in points]
        axis.plot(
            depths, sizes, dashes, color=colour, marker=marker, label=f"{MEMORY_KINDS[kind]}: {sizes[-1]:,.1f} MiB"
        )
    width = results["config"]["memory_dim"]
    axis.set(title="Peak bytes of a training step", xlabel=f"depth of the stack (blocks of width {width})")
    axis.set(ylabel="peak, AdamW included (MiB)", ylim=(0, None))
    axis.set_xticks(sorted({point["depth"] for point in results["memory"]}))
    deepest = max(point["depth"] for point in results["memory"])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), title=f"at depth {deepest}", alignment="left")


def _compute(axis: Any, results: dict[str, Any]) -> None:
    for arm, (colour, marker, _) in STYLES.items():
        point = results["summary"]["compute"][arm]
        accuracy = 100 * point["accuracy"]
        whole, own = point["cpu_seconds_with_ancestry"], point["cpu_seconds"]
        axis.plot([own, whole], [accuracy] * 2, color=colour, linewidth=1.2, alpha=0.6)
        axis.errorbar(own, accuracy, 100 * point["spread"], fmt=marker, color=colour, label=ARMS[arm], markersize=8)
        if whole > own:
            axis.plot(whole, accuracy, marker, color=colour, markerfacecolor="white", markersize=8)
    axis.set(title="Accuracy against total compute", xlabel="CPU seconds for all depths together", xlim=(0, None))
    axis.set(ylabel="test accuracy, mean over depths (%)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, title="hollow: ancestry counted too")


PANELS.update(accuracy=_accuracy, memory=_memory, compute=_compute)


def _losses(plt: ModuleType, results: dict[str, Any]) -> Any:
    """Draw every loss curve: the two long runs, then one panel per arm with a line per depth."""
    arms = [arm for arm in ARMS if arm != "untouched"]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    colours = plt.get_cmap("viridis")
    depths = results["config"]["depths"]
    first, *rest = axes.flat
    for run in results["runs"]:
        for name, colour in (("ancestry", INK), ("auxiliary", "#0072B2")):
            label = None if run is not results["runs"][0] else name
            first.plot(*_smooth(run[name]["losses"]), color=colour, linewidth=1, alpha=0.8, label=label)
    first.set(title="ancestry (CE), auxiliary (distillation)", ylabel="training loss", xlabel="step")
    first.legend()
    for axis, arm in zip(rest, arms, strict=True):
        for run in results["runs"]:
            for rank, depth in enumerate(depths):
                label = f"depth {depth}" if run is results["runs"][0] else None
                colour = colours(0.9 * rank / max(1, len(depths) - 1))
                losses = run["depths"][depth][arm]["losses"]
                axis.plot(*_smooth(losses), color=colour, linewidth=1, alpha=0.85, label=label)
        loss = "distillation" if arm == "scratch_distilled" else "CE"
        axis.set(title=f"{ARMS[arm]} ({loss})", xlabel="step")
    rest[0].legend(ncols=2)
    return figure


def _smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    """Means over windows of up to 15 steps; short curves stay as they are."""
    window = min(SMOOTHING, max(1, len(losses) // 10))
    starts = range(0, len(losses) - window + 1, max(1, window // 3))
    return [start + window for start in starts], [sum(losses[start : start + window]) / window for start in starts]
