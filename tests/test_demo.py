# SPDX-License-Identifier: Apache-2.0
"""The demo in miniature on digits: what it writes, what it measures, and the plain functions under it."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from pylearngene import Learngene
from pylearngene.cli import app, demo
from pylearngene.cli.demo import DemoConfig, experiment, run_demo
from pylearngene.cli.demo.arms import equal_compute_epochs, pick_layers, picked_indices
from pylearngene.cli.demo.config import full_config, quick_config
from pylearngene.cli.demo.memory_panel import build_stack, training_peak
from pylearngene.cli.models import small_vit
from pylearngene.cli.report import plots, results
from pylearngene.cli.report.labels import ARMS, MEMORY_KINDS
from pylearngene.data import DIGITS_BANNER, digits
from pylearngene.errors import ArgumentError

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


def miniature(out: Path, **changes: Any) -> DemoConfig:
    options = {
        "train_images": 256,
        "test_images": 100,
        "epochs": 2.0,
        "tune_epochs": 0.5,
        "depth": 3,
        "depths": (2, 4),
        "export_depth": 2,
        "dim": 16,
        "heads": 2,
        "batch": 32,
        "tune_batch": 32,
        "memory_depths": (2, 4),
        "memory_dim": 32,
        "seeds": (0, 1),
    }
    return DemoConfig(out, **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(miniature(out), digits(), progress=False)


def test_folder(written: tuple[Path, dict[str, Any]]) -> None:
    out, _ = written
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.html",
        "results.json",
        "panels.png",
        "accuracy.png",
        "memory.png",
        "compute.png",
        "losses.png",
        "learngene",
        "descendant",
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_results(written: tuple[Path, dict[str, Any]]) -> None:
    out, found = written
    stored = json.loads((out / "results.json").read_text())
    assert stored["summary"] == json.loads(json.dumps(found["summary"]))
    assert stored["config"]["seeds"] == [0, 1]
    assert stored["timing"]["wall_seconds"] > 0
    assert stored["versions"]["torch"]
    for run in stored["runs"]:
        assert len(run["ancestry"]["losses"]) == run["ancestry"]["steps"] == 16
        for arms in run["depths"].values():
            assert set(arms) == {*ARMS, "picked_untouched"}
            for arm in ("tuned", "picked", "scratch", "scratch_distilled"):
                assert len(arms[arm]["losses"]) == arms[arm]["steps"] == 4
            assert arms["scratch_compute"]["steps"] > 4
    arms = stored["summary"]["arms"]["tuned"]["2"]
    assert arms["seeds"] == [run["depths"]["2"]["tuned"]["accuracy"] for run in stored["runs"]]
    assert arms["mean"] == pytest.approx(sum(arms["seeds"]) / 2)


def test_exports_load_again(written: tuple[Path, dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    out, found = written
    plain = transformers.ViTForImageClassification.from_pretrained(out / "descendant")
    assert plain.config.num_hidden_layers == 2
    assert not any("gene" in name for name, _ in plain.named_parameters())
    assert found["exports"]["descendant_class"] == "transformers.ViTForImageClassification"
    assert found["exports"]["descendant_accuracy"] == found["runs"][0]["depths"][2]["tuned"]["accuracy"]
    assert Learngene.from_pretrained(out / "learngene").num_parameters == found["runs"][0]["learngene_parameters"]


def test_page_is_self_contained(written: tuple[Path, dict[str, Any]]) -> None:
    page = (written[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for outside in ("http://", "https://", "<script", "<link", "$"):
        assert outside not in page
    assert escape(DIGITS_BANNER) in page
    for label in (*ARMS.values(), *MEMORY_KINDS.values()):
        assert label in page


def test_page_says_where_it_loses(written: tuple[Path, dict[str, Any]]) -> None:
    found = json.loads((written[0] / "results.json").read_text())
    for entry in results.comparisons(found):
        assert sorted(entry["won"] + entry["even"] + entry["lost"]) == [2, 4]
    tuned = {"mean": 0.5, "spread": 0.01}
    other = {"2": {"mean": 0.6, "spread": 0.01}, "4": {"mean": 0.505, "spread": 0.01}}
    found["summary"]["arms"] |= {"tuned": {"2": tuned, "4": tuned}, "picked": other}
    entry = results.comparisons(found)[0]
    assert (entry["baseline"], entry["won"], entry["even"], entry["lost"]) == ("picked", [], [4], [2])
    assert entry["mean_difference"] == pytest.approx(-0.0525)


def test_equal_seeds_give_equal_numbers(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = run_demo(miniature(tmp_path / "again", seeds=(1,)), digits(), progress=False)
    first, second = written[1]["runs"][1], again["runs"][0]
    assert first["auxiliary"]["losses"] == second["auxiliary"]["losses"]
    for depth in (2, 4):
        for arm in ARMS:
            assert first["depths"][depth][arm]["accuracy"] == second["depths"][depth][arm]["accuracy"], arm


def test_spread_of_one_seed_is_the_error_of_the_subset() -> None:
    arm = {"accuracy": 0.8, "cpu_seconds": 2.0}
    arms = dict.fromkeys([*ARMS, "picked_untouched"], arm)
    network = {"accuracy": 0.9, "cpu_seconds": 7.0}
    run = {"seed": 0, "ancestry": network, "auxiliary": network, "teacher_cpu_seconds": 1.0, "depths": {2: arms}}
    found = results.summarize({"config": {"depths": [2], "test_images": 100}, "runs": [run]})
    assert found["arms"]["tuned"]["2"]["spread"] == pytest.approx(0.04)
    assert found["compute"]["tuned"]["cpu_seconds"] == 2.0 + 7.0 + 1.0
    assert found["compute"]["tuned"]["cpu_seconds_with_ancestry"] == 17.0
    assert found["compute"]["scratch"]["cpu_seconds_with_ancestry"] == 2.0
    assert found["compute"]["picked"]["cpu_seconds_with_ancestry"] == 9.0
    assert found["compute"]["scratch_distilled"]["cpu_seconds"] == 3.0


def test_failure_leaves_the_former_folder(
    written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    out = written[0]
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(experiment, "run_seed", fail)
    with pytest.raises(KeyboardInterrupt):
        run_demo(miniature(out), digits(), progress=False)
    assert (out / "results.json").read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_export_that_differs_is_an_internal_error() -> None:
    one, other = (small_vit(8, 10, depth=1, dim=8, seed=seed) for seed in (0, 1))
    with pytest.raises(RuntimeError, match=r"descendant: the network read back differs by .*, more than 0.0001"):
        experiment._difference("descendant", one, other, torch.zeros(1, 1, 8, 8))


def test_picked_layers() -> None:
    assert picked_indices(6, 6) == list(range(6))
    assert picked_indices(6, 2) == [0, 5]
    assert picked_indices(6, 1) == [0]
    assert picked_indices(6, 10) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    ancestry = small_vit(8, 3, depth=3, dim=8, seed=1)
    same = pick_layers(ancestry, small_vit(8, 3, depth=3, dim=8, seed=2))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(ancestry(images).logits, same(images).logits)
    longer = pick_layers(ancestry, small_vit(8, 3, depth=5, dim=8, seed=2))
    lists = [next(m for m in net.modules() if isinstance(m, nn.ModuleList)) for net in (ancestry, longer)]
    for index, source in enumerate(picked_indices(3, 5)):
        for one, other in zip(lists[0][source].parameters(), lists[1][index].parameters(), strict=True):
            assert torch.equal(one, other)


def test_equal_compute_shares_the_work_of_the_auxiliary(tmp_path: Path) -> None:
    config = quick_config(tmp_path, 0)
    extra = {depth: equal_compute_epochs(config, depth) - config.tune_epochs for depth in config.depths}
    shared = sum(epochs * depth for depth, epochs in extra.items())  # in epochs times blocks
    assert shared == pytest.approx(config.epochs * config.depth * 1.3 + config.depth / 3)


def test_configurations(tmp_path: Path) -> None:
    quick, full = quick_config(tmp_path, 4), full_config(tmp_path, 4)
    assert (quick.seeds, full.seeds) == ((4,), (4, 5, 6))
    assert full.train_images >= 20_000
    assert len(quick.depths) >= 6
    assert min(quick.depths) == 2
    assert max(quick.depths) == 10
    small = quick.fit(1400, 397)
    assert (small.train_images, small.test_images) == (1400, 397)
    steps = [config.epochs * config.train_images for config in (quick, small)]
    assert steps[0] == pytest.approx(steps[1], rel=0.01)
    with pytest.raises(ArgumentError, match=r"export_depth: expected one of \[2\], got 4"):
        miniature(tmp_path, depths=(2,), export_depth=4)
    with pytest.raises(ArgumentError, match="depths, seeds, memory_depths: expected at least one each, got none"):
        miniature(tmp_path, seeds=())


def test_memory_of_ours_does_not_grow_with_depth() -> None:
    peaks = {(kind, depth): training_peak(kind, 64, depth) for kind in MEMORY_KINDS for depth in (4, 16)}
    growth = {kind: peaks[kind, 16] - peaks[kind, 4] for kind in MEMORY_KINDS}
    block_bytes = 12 * 64 * 64 * 4
    assert growth["ours"] < 12 * block_bytes * 0.25
    assert growth["eager"] > 12 * block_bytes * 0.9
    assert growth["dense"] > 12 * block_bytes * 3.9


def test_the_stacks_compute_the_same_function() -> None:
    torch.manual_seed(0)
    ours, eager = build_stack("ours", 64, 3), build_stack("eager", 64, 3)
    genes = dict(eager.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(genes["genes." + name.removeprefix("gene_bank.genes.").replace(".", "_")])
    x = torch.randn(1, 16, 64)
    torch.testing.assert_close(ours(x), eager(x))
    again = build_stack("recomputed", 64, 3)
    again.load_state_dict(eager.state_dict())
    assert torch.equal(again(x), eager(x))


def test_missing_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"matplotlib: .*`pip install pylearngene\[plots\]` installs it"):
        plots.pyplot()


def test_command(written: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[DemoConfig] = []

    def instead(config: DemoConfig, data: Any, **options: Any) -> dict[str, Any]:
        asked.append(config)
        return written[1]

    monkeypatch.setattr(demo, "run_demo", instead)
    shown = CliRunner().invoke(app, ["demo", "--data", "digits", "--seed", "7", "--out", str(tmp_path / "x")])
    assert shown.exit_code == 0
    assert "scratch, equal compute" in shown.stdout
    assert "report.html" in shown.stdout
    assert DIGITS_BANNER in shown.stderr
    as_json = CliRunner().invoke(app, ["demo", "--full", "--data", "digits", "--json"])
    assert "losses" not in json.loads(as_json.stdout)["runs"][0]["ancestry"]
    assert [config.seeds for config in asked] == [(7,), (0, 1, 2)]
    assert asked[1].full
