# SPDX-License-Identifier: Apache-2.0
"""The command `pylearngene bench` on a CPU: what it prints, checks before it times, and refuses; how calls are timed.

`--tune` has its own file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from pylearngene import _backends
from pylearngene.cli import app
from pylearngene.cli.bench import layers, measuring, timing
from pylearngene.cli.bench.layers import KINDS, Stack, Synthesis, Work, WrongResultError
from pylearngene.cli.bench.measuring import Settings, measure
from pylearngene.nn import ExpansionLinear

CPU = torch.device("cpu")
SMALL = ["--width", "16", "--depth", "2", "--tokens", "1,20", "--seconds", "0.001"]
HEAD = ["K", "tokens", "regime", "us", "p10", "p90", "dense", "us", "x", "dense", "x", "eager", "synthesis", "GB/s"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])


def settings(**changes: Any) -> Settings:
    given = {"device": CPU, "dtype": torch.float32, "tokens": (3,), "width": 16, "depth": 2, "genes": (2,)}
    return Settings(**{**given, "seconds": 0.001, **changes})


def test_a_table_with_a_line_per_k_and_m() -> None:
    shown = call(*SMALL, "--genes", "1,2")
    assert shown.exit_code == 0, shown.stderr
    title, head, rule, *rows, note = shown.stdout.splitlines()
    assert title.startswith("forward, float32, cpu (")
    assert head.split() == HEAD
    assert set(rule) == {"-", " "}
    assert [row.split()[:2] for row in rows] == [["1", "1"], ["1", "20"], ["2", "1"], ["2", "20"]]
    assert {row.split()[2] for row in rows} <= {"rows", "panel"}
    assert note.startswith("dense weights take 0 MiB, the last cache ")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_reasons_with_measured_costs(dtype: str) -> None:
    shown = call(*SMALL, "--explain", "--dtype", dtype)
    assert shown.exit_code == 0, shown.stderr
    reasons = [line for line in shown.stdout.splitlines() if line.startswith("K = 2, ")]
    assert [reason.split(":")[0] for reason in reasons] == ["K = 2, 1 tokens", "K = 2, 20 tokens"]
    if _backends.implementation(CPU) == "cpp":
        end = r"\(modelled\); rows [0-9.e+]+ us, panel [0-9.e+]+ us per million weights \(measured\)"
        assert all(re.search(f"{end}$", reason) for reason in reasons)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("passes", [[], ["--backward"]])
def test_json_has_these_names_and_no_others(dtype: str, passes: list[str]) -> None:
    shown = call(*SMALL, "--json", "--dtype", dtype, *passes)
    assert shown.exit_code == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert set(facts) == {
        "format", "device", "backend", "dtype", "width", "depth", "seconds", "backward", "graphs", "dense_bytes",
        "cache_bytes", "rows", "versions", "machine", "commit",
    }  # fmt: skip
    assert (facts["format"], facts["backward"], facts["dense_bytes"]) == (
        1, bool(passes), 2 * 12 * 16 * 16 * (4 if dtype == "fp32" else 2)
    )  # fmt: skip
    times = {"median_us", "p10_us", "p90_us", "rounds"}
    for row in facts["rows"]:
        assert set(row) == {
            "genes", "tokens", "regime", "explained", "error", "calls", "ratio_to_dense", "ratio_to_eager", "synthesis"
        }  # fmt: skip
        assert set(row["calls"]) == {"ours", "dense", "eager"}
        assert all(set(one) == times and one["rounds"] >= 5 for one in row["calls"].values())
        assert set(row["synthesis"]) == times | {"bytes", "gb_per_s", "copy_gb_per_s", "share_of_copy"}
        assert row["explained"].startswith(row["regime"] + ": ")
        assert 0 <= row["error"] <= 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,,2"], "tokens: expected numbers of at least 1 with commas between them, got '1,,2'"),
        (["--tokens", "0"], "tokens: expected numbers of at least 1 with commas between them, got '0'"),
        (["--genes", "-1"], "genes: expected numbers of at least 1 with commas between them, got '-1'"),
        (["--genes", "65"], "genes: expected at most 64, got 65"),
        (["--width", "0"], "width: expected at least 1, got 0"),
        (["--depth", "0"], "depth: expected at least 1, got 0"),
        (["--seconds", "0"], "seconds: expected a finite number above 0, got 0.0"),
        (["--seconds", "nan"], "seconds: expected a finite number above 0, got nan"),
        (["--dtype", "fp8"], "dtype: expected one of fp32, bf16, fp16, got 'fp8'"),
        (["--device", "abacus"], "device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], "device: expected one that is here, got 'cuda:99'"),
        (["--graphs"], "graphs: expected a forward pass on a CUDA device, got device cpu"),
        (["--graphs", "--backward"], "graphs: expected a forward pass on a CUDA device, got --backward"),
        (["--explain", "--backward"], "explain: expected a forward pass, got --backward"),
        (["--sizes", "4x4"], "sizes: expected only with --tune, got 4x4"),
        (["--budget", "3"], "budget: expected only with --tune, got 3.0"),
        (["--out", "t.json"], "out: expected only with --tune, got t.json"),
        (["--tune"], "tune: expected a CUDA device, whose Triton kernels are tuned, got cpu"),
        (["--tune", "--sizes", "4"], "sizes: expected layers as OxI with commas between them, like 768x3072, got '4'"),
        (["--tune", "--budget", "inf"], "budget: expected a finite number above 0, got inf"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str) -> None:
    shown = call(*arguments)
    assert shown.exit_code == 2
    assert shown.stderr == f"pylearngene: {message}\n"
    assert shown.stdout == ""


@pytest.mark.parametrize("value", [1e-3, torch.nan])
def test_what_computes_wrongly_is_not_timed(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    right = ExpansionLinear.forward
    monkeypatch.setattr(ExpansionLinear, "forward", lambda self, x: right(self, x) + value)
    monkeypatch.setattr(measuring, "interleaved", _only_synthesis(measuring.interleaved))
    shown = call(*SMALL)
    assert shown.exit_code == 1
    assert shown.stderr.startswith(
        "pylearngene: bench: ours, qkv of block 0: expected an error of at most 2e-05 of the"
    )
    assert shown.stdout == ""


def _only_synthesis(real: Callable[..., Any]) -> Callable[..., Any]:
    def timed(calls: dict[str, Any], *arguments: Any) -> Any:
        assert set(calls) == {"weights", "copy"}, "timed although it is wrong"
        return real(calls, *arguments)

    return timed


@pytest.mark.parametrize(("name", "scale"), [("fc1.weight.1", 1.001), ("qkv.bias.0", 1.001), ("proj.weight.0", 0.0)])
def test_wrong_gradients_are_found(name: str, scale: float) -> None:
    work = Work(Stack(16, 2, 2, torch.float32, CPU, backward=True), 5)
    assert work.check() < 1e-5
    gene = dict(work.stack.bank.named_genes())[name]

    def spoil(leaf: torch.Tensor) -> None:
        assert leaf.grad is not None
        leaf.grad.mul_(scale)

    gene.register_post_accumulate_grad_hook(spoil)
    with pytest.raises(WrongResultError, match=rf"bench: ours, {name}: expected an error of at most 0.0001 of the"):
        work.check()


def test_wrong_input_gradients_and_missing_ones_are_found() -> None:
    work = Work(Stack(16, 2, 2, torch.float32, CPU, backward=True), 5)
    handle = work.x[4].register_hook(lambda grad: grad * 1.001)
    with pytest.raises(WrongResultError, match="bench: ours, dx of width 4: expected an error"):
        work.check()
    handle.remove()
    layer = nn.Linear(64, 16)
    work.stack.dense[1]["fc2"] = layer
    with pytest.raises(WrongResultError, match="bench: dense, fc2 of block 1: expected an error"):
        work.check()
    work.stack.layers = lambda call: [{"qkv": lambda x: x}]  # type: ignore[method-assign]
    with pytest.raises(WrongResultError, match=r"bench: ours, qkv of block 0: expected shape \[5, 48\], got \[5, 16\]"):
        work.check()


def test_ratios_and_rates_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 layers: ours 80 us a pass, dense 160, eager 240; all weights 1000 us, the copy 250."""
    medians = {"ours": 80.0, "dense": 160.0, "eager": 240.0, "weights": 1000.0, "copy": 250.0}

    def timed(calls: dict[str, Any], *arguments: Any) -> dict[str, timing.Timing]:
        return {name: timing.Timing(medians[name], 40.0, 400.0, 7) for name in calls}

    monkeypatch.setattr(measuring, "interleaved", timed)
    (row,) = measure(settings())["rows"]
    assert row["calls"]["ours"] == {"median_us": 10.0, "p10_us": 5.0, "p90_us": 50.0, "rounds": 7}
    assert (row["ratio_to_dense"], row["ratio_to_eager"]) == (2.0, 3.0)
    moved = (2 + 1) * 12 * 16 * 16 * 4 * 2
    assert row["synthesis"]["bytes"] == moved // 8
    assert row["synthesis"]["gb_per_s"] == pytest.approx(moved / 1000e-6 / 1e9)
    assert row["synthesis"]["share_of_copy"] == 0.25


def test_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(measuring, "Work", full)
    shown = call(*SMALL)
    assert shown.exit_code == 4
    assert (
        shown.stderr
        == "pylearngene: tokens: 1 rows do not fit into memory: CUDA out of memory. Tried to allocate 2 GiB\n"
    )


def test_synthesis_and_the_copy_move_as_many_bytes() -> None:
    synthesis = Synthesis(Stack(16, 3, 2, torch.bfloat16, CPU, backward=False))
    assert synthesis.moved == 3 * (2 + 1) * 12 * 16 * 16 * 2
    assert 3 * 2 * sum(tensor.numel() * 2 for tensor in synthesis.pair) // 2 == synthesis.moved
    assert len(synthesis.calls) == 3 * len(KINDS)
    synthesis.run()
    synthesis.copy()


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}

    def clock(run: Sequence[Callable[[], object]]) -> list[float]:
        for one in run:
            one()
        return [{"a": 1.0, "b": 2.0, "c": 1e5}[name] for name in order[-len(run) :]]

    times = timing.interleaved(calls, 1.0, clock)
    assert order[:6] == ["a", "b", "c"] * 2
    assert order[6:15] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [times[name].median_us for name in "abc"] == [1.0, 2.0, 1e5]
    assert {time.rounds for time in times.values()} == {9}  # a second of 0.1 s rounds
    assert {time.rounds for time in timing.interleaved(calls, 1e-9, clock).values()} == {5}
    assert {time.rounds for time in timing.interleaved(calls, 1e9, clock, most=20).values()} == {20}


def test_quantiles() -> None:
    found = timing._timing([float(value) for value in range(101)])
    assert (found.median_us, found.p10_us, found.p90_us, found.rounds) == (50.0, 10.0, 90.0, 101)


def test_the_clock_of_a_gpu_asks_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events record in order, are read after one wait, and the device can be kept busy first."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "wait"
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    calls = [lambda: log.append("a"), lambda: log.append("b")]
    assert timing.event_clock(calls) == [250.0, 250.0]
    assert log == ["wait", "event", "a", "event", "event", "b", "event", "wait"]
    log.clear()
    timing.event_clock(calls[:1], ahead=True)
    assert log == ["wait", "sleep", "event", "a", "event", "wait"]
    assert timing.clock_of(torch.device("cuda")) is timing.event_clock


def test_the_clock_of_a_processor() -> None:
    (time,) = timing.processor_clock([lambda: torch.zeros(1)])
    assert 0 < time < 1e6
    assert timing.clock_of(CPU) is timing.processor_clock
    assert timing.cache_bytes(CPU) >= 1 << 16


def test_layers_work_on_the_same_values_as_dense_ones() -> None:
    """The dense stack holds the weights that the genes make, so that ours and dense are comparable."""
    stack = Stack(16, 3, 2, torch.float32, CPU, backward=False)
    assert layers.CALLS == ("ours", "dense", "eager")
    for row, dense, coeffs in zip(stack.ours, stack.dense, stack.coeffs, strict=True):
        for kind, (outer, inner) in KINDS.items():
            genes, biases = stack.genes(kind)
            assert dense[kind].weight.shape == (16 * outer, 16 * inner)
            torch.testing.assert_close(dense[kind].weight, sum(c * g for c, g in zip(coeffs, genes, strict=True)))
            torch.testing.assert_close(dense[kind].bias, sum(c * g for c, g in zip(coeffs, biases, strict=True)))
            assert row[kind].bank is stack.bank
