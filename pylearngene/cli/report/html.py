# SPDX-License-Identifier: Apache-2.0
"""The report page: one html file with everything inside, written from the results alone."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pylearngene.cli.report.labels import ARMS, MEMORY_KINDS
from pylearngene.cli.report.results import comparisons, result_rows
from pylearngene.cli.report.style import PAGE


def write_page(results: dict[str, Any], folder: Path) -> None:
    """Write report.html into the folder, with the plots that are there embedded."""
    parts = {
        "banner": _banner(results),
        "lead": _lead(results),
        "table": _table(results),
        "verdict": _verdict(results),
        "method": _method(results),
        "memory": _memory(results),
        "facts": _facts(results),
        "panels": _image(
            folder / "panels.png", "Accuracy against depth; peak bytes against depth; accuracy against compute"
        ),
        "losses": _image(folder / "losses.png", "Training loss of every run"),
        "losses_table": _losses_table(results),
    }
    (folder / "report.html").write_text(Template(PAGE).substitute(parts), encoding="utf-8")


def _image(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _banner(results: dict[str, Any]) -> str:
    text = results["data"]["banner"]
    return f'<p class="banner">{escape(text)}</p>' if text else ""


def _lead(results: dict[str, Any]) -> str:
    config, run = results["config"], results["runs"][0]
    compute = results["summary"]["compute"]
    all_sizes = sum(run["depths"][depth]["tuned"]["parameters"] for depth in config["depths"])
    return (
        f"<p>One learngene of <b>{run['learngene_parameters']:,} parameters</b> grew networks of depths "
        f"{_join(config['depths'])}, which hold {all_sizes:,} parameters when stored one by one. Mean test accuracy "
        f"over the depths: <b>{100 * compute['untouched']['accuracy']:.1f} %</b> untouched, "
        f"<b>{100 * compute['tuned']['accuracy']:.1f} %</b> after {config['tune_epochs']:g} epochs of training, "
        f"against {100 * compute['scratch']['accuracy']:.1f} % for networks trained from scratch for as many steps. "
        f"The ancestry network (depth {config['depth']}) has "
        f"{100 * results['summary']['networks']['ancestry']:.1f} %, the auxiliary network "
        f"{100 * results['summary']['networks']['auxiliary']:.1f} %.</p>"
    )


def _table(results: dict[str, Any]) -> str:
    header, rows = result_rows(results)
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = []
    for row in rows:
        values = [float(cell.split(" ")[0]) for cell in row[1:]]
        cells = [
            f'<td class="best">{cell}</td>' if value == max(values) else f"<td>{cell}</td>"
            for cell, value in zip(row[1:], values, strict=True)
        ]
        body.append(f"<tr><th>{row[0]}</th>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _verdict(results: dict[str, Any]) -> str:
    """Say in words, per baseline, where the tuned descendants win, tie and lose."""
    lines = []
    for entry in comparisons(results):
        points = 100 * entry["mean_difference"]
        sides = [f"{word} at depth {_join(entry[key])}" for key, word in WORDS.items() if entry[key]]
        kind = "loss" if entry["lost"] else "win" if entry["won"] else "even"
        direction = "ahead" if points >= 0 else "behind"
        lines.append(
            f'<li class="{kind}"><b>{escape(ARMS[entry["baseline"]])}</b>: the tuned descendant is {"; ".join(sides)}. '
            f"On average it is {abs(points):.1f} points {direction}.</li>"
        )
    return f"<ul>{''.join(lines)}</ul>{_picked_note(results)}"


UNTRAINED = ("untouched", "picked_untouched")
WORDS = {"lost": "<em>behind</em>", "even": "even (within the spread)", "won": "ahead"}


def _picked_note(results: dict[str, Any]) -> str:
    arms, depths = results["summary"]["arms"], results["config"]["depths"]
    ours, picked = ([100 * arms[arm][str(depth)]["mean"] for depth in depths] for arm in UNTRAINED)
    pairs = ", ".join(
        f"{depth}: {mine:.1f} / {theirs:.1f}" for depth, mine, theirs in zip(depths, ours, picked, strict=True)
    )
    compute = results["summary"]["compute"]
    ours_seconds, seconds = (compute[arm]["cpu_seconds"] for arm in ("tuned", "picked"))
    return (
        "<p>Picked ancestry layers are the cheapest good start where the ancestry is at hand: they skip the auxiliary "
        f"network's training, which they are not compensated for ({seconds:.0f} CPU seconds for all depths, against "
        f"{ours_seconds:.0f} for the learngene), but the whole ancestry has to be kept; at its own depth they are that "
        "very network trained on. Before any tuning, learngene against picked layers, by depth: "
        f"{pairs} (percent).</p>"
    )


def _method(results: dict[str, Any]) -> str:
    config, data = results["config"], results["data"]
    first = [results["runs"][0]["depths"][depth] for depth in config["depths"]]
    seeds = _join(config["seeds"])
    items = [
        f"Data: {escape(data['name'])} ({escape(data['source'])}), {config['train_images']:,} training and "
        f"{config['test_images']:,} test images, always the same ones, no augmentation.",
        f"Ancestry: a vision transformer (transformers' <code>ViTForImageClassification</code>, 4 x 4 patches, width "
        f"{config['dim']}, {config['heads']} heads, depth {config['depth']}), {config['epochs']:g} epochs of "
        f"cross-entropy, AdamW, batch {config['batch']}, rate {config['lr']:g} with warm-up and cosine.",
        f"Auxiliary network: the same shape, its blocks expanded from two genes per tensor by TLEG "
        f"(<code>W[l] = G0 + (l / L) G1</code>), genes started by "
        f"{'a least-squares fit to the ancestry' if config['aux_init'] == 'fit' else 'the method of the paper'}, "
        f"{config['epochs']:g} epochs of distillation from the ancestry "
        f"(alpha {config['alpha']:g}, temperature {config['tau']:g}).",
        f"Descendants: networks of depth {_join(config['depths'])} grown from the genes, measured as they are, then "
        f"trained for {config['tune_epochs']:g} epochs with cross-entropy (batch {config['tune_batch']}, rate "
        f"{config['tune_lr']:g}).",
        "Ancestry layers: the same training from evenly picked blocks of the ancestry.",
        f"Scratch, equal steps: a fresh network, the same images in the same order (rate {config['scratch_lr']:g}). "
        "Scratch, distilled: the same with the loss of the auxiliary network.",
        "Scratch, equal compute: a fresh network that also gets its equal share of the work spent on the auxiliary "
        "network and the teacher's pass, "
        f"{_join([arms['scratch_compute']['steps'] for arms in first])} steps "
        f"instead of {first[0]['scratch']['steps']}. A gene-backed block is "
        "charged 1.3 times a plain one. The cost of the ancestry is not shared out; the third panel shows it.",
        f"Seeds, fixed beforehand: {seeds}. The spread (± and bands) is "
        + (
            "the standard deviation over the seeds."
            if len(config["seeds"]) > 1
            else "the standard error of the test subset; one seed says nothing about other seeds, "
            "<code>pylearngene demo --full</code> runs three."
        ),
        "The rates of the short runs and the auxiliary network's start and loss were chosen in trial runs scored on "
        "training images held out from them.",
    ]
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _memory(results: dict[str, Any]) -> str:
    depths = sorted({point["depth"] for point in results["memory"]})
    sizes = {(point["kind"], point["depth"]): point["peak_bytes"] / 2**20 for point in results["memory"]}
    head = "".join(f"<th>depth {depth}</th>" for depth in depths)
    rows = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{sizes[kind, depth]:,.1f}</td>' for depth in depths)}</tr>"
        for kind, label in MEMORY_KINDS.items()
    )
    return (
        f"<p>Stacks of transformer blocks of width {results['config']['memory_dim']}, one sample of 16 tokens, "
        "activations checkpointed alike in all four; allocator events over building the stack, its AdamW and two "
        "steps, in MiB. The third row makes each weight again inside the checkpoint: also flat, at the price of whole "
        "weights made twice per step.</p>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _facts(results: dict[str, Any]) -> str:
    exports, timing = results["exports"], results["timing"]
    facts = {
        "learngene folder": f"learngene/, {exports['learngene_bytes']:,} bytes; read back and grown, logits differ by "
        f"at most {exports['learngene_difference']:.1e}",
        "exported descendant": f"descendant/, depth {exports['depth']}, loaded as {exports['descendant_class']} "
        f"with logits within {exports['descendant_difference']:.1e} and {100 * exports['descendant_accuracy']:.1f} %",
        "time until this page": f"{timing['wall_seconds']:.0f} s wall, {timing['cpu_seconds']:.0f} s CPU",
        "machine": ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        "versions": ", ".join(f"{key} {value}" for key, value in results["versions"].items() if value),
        "commit": results["commit"] or "not in a git checkout",
    }
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
    return f'<table class="facts">{rows}</table>'


def _losses_table(results: dict[str, Any]) -> str:
    """Last training loss, test loss, steps and CPU seconds of every run, as text."""
    rows = []
    for run in results["runs"]:
        records = {"ancestry": run["ancestry"], "auxiliary": run["auxiliary"]}
        for depth, arms in run["depths"].items():
            records |= {f"{ARMS[arm]}, depth {depth}": arms[arm] for arm in ARMS if arm != "untouched"}
        for name, record in records.items():
            losses = record["losses"]
            tail = losses[-min(10, len(losses)) :]
            cells = [
                str(run["seed"]),
                name,
                f"{record['steps']:,}",
                f"{losses[0]:.3f}",
                f"{sum(tail) / len(tail):.3f}",
                f"{record['test_loss']:.3f}",
                f"{100 * record['accuracy']:.1f}",
                f"{record['cpu_seconds']:.1f}",
            ]
            rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(
        f"<th>{title}</th>"
        for title in ("seed", "run", "steps", "first loss", "last losses", "test CE", "accuracy %", "CPU s")
    )
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _join(values: list[Any] | tuple[Any, ...]) -> str:
    """Join as in English: 2, 3 and 4."""
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
