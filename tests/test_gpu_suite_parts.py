# SPDX-License-Identifier: Apache-2.0
"""The parts of the GPU suite: goals and the cases they need, ways to a product, networks, what memory checkers say.

How stages run and go on is in `test_gpu_suite`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pylearngene as plg

sys.path.append(str(Path(__file__).parent.parent))  # last, so that an installed pylearngene is the one under test

from benchmarks.gpu import (
    compiled,
    expansion,
    goals,
    networks,
    operands,
    pictures,
    sanitize,
    smoke,
    stage,
    summaries,
    train,
)
from benchmarks.gpu.records import Records, read
from benchmarks.gpu.stage import Setting
from benchmarks.gpu.timing import Clock, interleaved
from benchmarks.gpu.witness import watching

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny sizes: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gpu_row(**columns: str) -> dict[str, str]:
    return {"status": "ok", "cuda": "13.0", "tokens": "16384", "shape": "4096 x 1024", **columns}


def test_goals_are_compared_with_the_worst_case() -> None:
    goal = goals.GOALS[0]
    where = {"kind": "forward", "genes": "2", "call": "dense"}
    rows = [gpu_row(ratio="0.99", **where), gpu_row(ratio="0.97", **where)]
    assert goal.line(rows) == (goal.text, ">= 0.965", "0.970 (worst of 2, median 0.980)", "reached")
    assert goal.line([*rows, gpu_row(ratio="0.96", **where)])[3] == "missed"
    for change in (
        {"cuda": "none"}, {"status": "failed"}, {"tokens": "4096"}, {"shape": "384 x 1536"}, {"call": "eager"},
        {"genes": "4"}, {"ratio": ""},
    ):  # fmt: skip
        assert goal.line([{**gpu_row(ratio="0.1", **where), **change}])[3] == "not measured", change
    host = next(goal for goal in goals.GOALS if goal.most and goal.stage == "speed")
    row = gpu_row(kind="host", shape="linear 64, no grad", call="dense", above_us="5.5")
    assert host.line([row]) == (host.text, "<= 6", "5.500", "reached")
    assert host.line([{**row, "above_us": "6.5"}])[3] == "missed"


def test_every_goal_of_speed_has_a_case() -> None:
    """The rows that the full sizes would give, with made-up times."""
    rows = [
        gpu_row(
            kind=case.kind, shape=case.shape, tokens=str(case.tokens), genes=str(case.genes), call=call,
            ratio="1", above_us="1", copy_share="1",
        )
        for case in expansion.cases(CPU)
        for call in case.calls()
    ]  # fmt: skip
    assert [goal.text for goal in goals.GOALS if goal.stage == "speed" and not goal.values(rows)] == []
    first = [case.name for case in expansion.cases(CPU)[:30]]
    assert len({name.split("-")[1] for name in first}) >= 6, "each kind of goal comes early"


def test_every_goal_of_training_has_a_variant() -> None:
    for goal in goals.GOALS:
        if goal.stage == "train":
            assert set(goal.where["variant"]) <= set(train.VARIANTS)
            assert set(goal.where["net"]) <= {net.name for net in networks.nets(True)}
            assert goal.column in train.COLUMNS


def test_summary_says_what_was_fastest() -> None:
    common = {"case": "a", "status": "ok", "kind": "forward", "genes": "2", "tokens": "64", "regime": ""}
    rows = [
        {**common, "call": "ours", "ratio": "1", "median_us": "10", "regime": "fused"},
        {**common, "call": "dense", "ratio": "0.9", "median_us": "9"},
        {**common, "call": "ours, rows", "ratio": "0.8", "median_us": "8", "regime": "panel"},
        {**common, "call": "ours, fused", "ratio": "1", "median_us": "10", "regime": "fused"},
        {**common, "call": "ours, panel", "ratio": "1.2", "median_us": "12", "regime": "panel"},
    ]
    more = [{**rows[0], "case": "b"}, {**rows[1], "case": "b", "ratio": "0.7"}]
    text = summaries.tables("speed", [*rows, *more])
    assert text == ("forward  K=2 M=64     of dense 0.800 (0.700 to 0.900, 2 shapes), fastest regime fused"), (
        "rows fell back to panel, so it is not counted as rows"
    )
    assert summaries.line(rows[:2]) == "10 us; dense 0.9"
    assert summaries.line([{"note": "two\nlines"}]) == "two lines"
    assert summaries.tables("check", rows) == ""


def test_names_are_unique() -> None:
    names = [case.name for case in expansion.cases(CPU)]
    assert len(set(names)) == len(names) > 500


def test_dense_gradient_falls_back_where_torch_cannot_add_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def adds(into: Tensor, dy: Tensor, x: Tensor) -> None:
        into.add_((dy.double().t() @ x.double()).float())

    for addmm, expected in ((adds, "addmm into float32"), (lambda *_: None, "mm, then added to float32")):
        operands.dense_accumulation.cache_clear()
        monkeypatch.setattr(operands, "_addmm", addmm)
        name, add = operands.dense_accumulation(CPU, torch.bfloat16)
        assert name == expected
        into, dy, x = torch.ones(3, 5), torch.randn(7, 3).bfloat16(), torch.randn(7, 5).bfloat16()
        if add is not adds:
            add(into, dy, x)
            torch.testing.assert_close(into, 1 + (dy.float().t() @ x.float()), rtol=2e-2, atol=5e-2)
    operands.dense_accumulation.cache_clear()


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's
def test_regimes_and_launches_are_seen() -> None:
    pytest.importorskip("triton")
    genes, coeffs = [torch.randn(8, 4) for _ in range(2)], torch.ones(2)
    before = plg.plan.choose
    plg.set_backend("reference")  # the native kernels' short way does not ask the plan
    try:
        with watching() as seen:
            plg.functional.expansion_linear(torch.randn(40, 4), genes, coeffs)
    finally:
        plg.set_backend("auto")
    assert plg.plan.choose is before
    assert len(seen.regimes) == 1
    assert seen.launches == []
    if torch.cuda.is_available():
        return
    with plg.use_backend("triton"), watching() as seen:
        plg.functional.expansion_linear(torch.randn(70, 4).half(), [g.half() for g in genes], coeffs)
    assert seen.regimes == ["fused"]
    assert seen.launches[0].startswith("fused ")


def test_passes_use_every_set() -> None:
    met: list[int] = []
    samples, modes = interleaved(Clock(CPU), {"a": met.append, "b": lambda _: None}, [1, 2, 3], 0.0)
    assert {len(times) for times in samples.values()} == {5}
    assert set(modes.values()) == {"calls"}
    assert met[3:] == [1, 2, 3] * (len(met[3:]) // 3), "two to warm up, one to estimate"


@pytest.mark.parametrize(
    ("printed", "ended", "status", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", "0", "ok", 0),
        ("========= ERROR SUMMARY: 3 errors\n", "0", "failed", 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "0", "ok", 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)\n", "0", "failed", 2),
        ("========= ERROR SUMMARY: 0 errors\n", "1", "failed", 0),
        ("ok triton rows\n", "the time limit", "failed", None),
        ("=== Error: Device not supported. Please refer to ...\n=== ERROR SUMMARY: 1 error\n", "255", "absent", None),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(printed: str, ended: str, status: str, errors: int | None) -> None:
    verdict = sanitize.verdict(printed, ended)
    assert verdict["status"] == status
    assert verdict.get("errors") == errors


def test_materializing_network_computes_the_same() -> None:
    task = networks.nets(True)[0]
    torch.manual_seed(0)
    net = networks.backed(task.build(), 3)
    batch = task.batch(CPU)
    expected = task.loss(net, *batch)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    genes = dict(net.gene_bank.named_parameters())
    changed = networks.materialize(net)
    assert not any(isinstance(layer, plg.nn.ExpansionLinear) for layer in changed.modules())
    loss = task.loss(changed, *batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, gene in genes.items():
        torch.testing.assert_close(gene.grad, grads[f"gene_bank.{name}"], rtol=1e-3, atol=1e-5)


def test_training_rows_and_pictures(tmp_path: Path) -> None:
    task = networks.nets(True)[0]
    where, clock = Setting(CPU, tmp_path, True, 60.0, began=time.monotonic()), Clock(CPU)
    records = Records(tmp_path / "train.csv", train.COLUMNS)
    for name in ("dense", "ours K2"):
        (row,) = train._variant(task, name, clock, records, where, 60.0)
        records.add([{"case": name, "status": "ok", **row}])
    dense, ours = read(tmp_path / "train.csv")
    assert float(dense["optimizer_mib"]) == pytest.approx(2 * float(dense["weights_mib"]), rel=0.05)
    assert float(ours["weight_memory_of_dense"]) == pytest.approx(
        float(ours["weight_memory_mib"]) / float(dense["weight_memory_mib"]), rel=0.02
    )
    assert float(dense["saved_weights_mib"]) > 0, "copies of the weights in bfloat16"
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert pictures.draw("train", tmp_path) == ""
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_points_are_few() -> None:
    slow = [shape for shape in compiled.SHAPES for way in compiled.SLOW if way[1] == "max-autotune"]
    assert 1 <= len(slow) <= 6


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_smoke_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    check = smoke.quick(CPU)[0]
    check.run()
    correct = plg.functional.expansion_linear
    monkeypatch.setattr(plg.functional, "expansion_linear", lambda x, *others: correct(x, *others) * 1.01)
    with pytest.raises(AssertionError, match="y: expected an error of at most"):
        check.run()


class StandIn:
    """What the suite uses of torch.cuda, without a GPU: events read the host's clock, a replay does nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.calls: list[str] = []
        self.fails = fails
        for name in ("Event", "CUDAGraph", "graph", "synchronize", "_sleep", "default_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=0.0, synchronize=lambda: self.calls.append("wait"))
        event.record = lambda: setattr(event, "at", time.perf_counter())
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def synchronize(self, device: Any = None) -> None:
        self.calls.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.calls.append("head start")

    def default_stream(self, device: Any) -> str:
        return "the default stream"

    def set_stream(self, stream: str) -> None:
        self.calls.append(stream)


@pytest.mark.parametrize("fails", [False, True])
def test_passes_are_graphs_on_a_gpu(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = StandIn(monkeypatch, fails)
    met: list[int] = []
    samples, modes = interleaved(Clock(torch.device("cuda")), {"a": met.append}, [1, 2, 3], 0.0)
    assert len(samples["a"]) == 5
    assert all(time > 0 for time in samples["a"])
    if fails:
        assert modes["a"] == "calls (operation not permitted when stream is capturing)"
        assert "replay" not in gpu.calls
        assert gpu.calls.count("the default stream") == 1, "that of the capture is not left current"
    else:
        assert modes["a"] == "graph"
        assert gpu.calls.count("replay") == 6, "the first uploads the graph"
        assert len(met) - 3 >= 192, "as many calls as make a pass last, all sets in turn"
    assert gpu.calls.count("head start") == 6


def test_a_gpu_that_is_lost_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def left(code: int) -> None:
        raise SystemExit(code)

    records = Records(tmp_path / "results.csv", ("note",))
    where = Setting(torch.device("cuda"), tmp_path, True, 60.0, began=time.monotonic())
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(stage.os, "_exit", left)
    with pytest.raises(SystemExit) as ended:
        stage.drive([stage.Item("bad", lambda limit: lost()), stage.Item("next", lambda limit: [{}])], records, where)
    assert ended.value.code == stage.BROKEN
    assert [row["case"] for row in records.rows] == ["bad"], "the row is written before"
