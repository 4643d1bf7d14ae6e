# SPDX-License-Identifier: Apache-2.0
"""The benchmarks at tiny sizes: every check passes, wrong results are refused, files are as promised.

No time is asserted. What the full sizes measure is written by `benchmarks/run.py`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pylearngene as plg

sys.path.append(str(Path(__file__).parent.parent))  # last, so that an installed pylearngene is the one under test

from benchmarks import expansion, low_rank, plots, records, run, timing
from benchmarks.cases import Case, WrongResultError

OTHERS = {case.name: case for case in low_rank.cases(low_rank.TINY)}
CASES = {case.name: case for case in expansion.cases(expansion.TINY)}
SYNTHESIS, FORWARD, TRAINING, HOST, DX, WGRAD, MODEL = (
    next(c for c in CASES.values() if c.kind == k) for k in run.KINDS
)
STACK = next(c for c in OTHERS.values() if c.kind == "forward")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny sizes: waking threads would take longer than the work, far longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spoiled(case: Case, call: str, change: Any) -> Case:
    """The case with the results of one call changed."""
    original = case.calls()[call]

    def wrong(inputs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, value in original(inputs):
            yield from change(name, value)

    return replace(case, ours=wrong) if call == "ours" else replace(case, baselines={**case.baselines, call: wrong})


@pytest.mark.parametrize("case", [*CASES.values(), *OTHERS.values()], ids=[*CASES, *OTHERS])
def test_check_passes(case: Case) -> None:
    case.check((case.check_on or case.make)())


@pytest.mark.parametrize("case", [SYNTHESIS, FORWARD, TRAINING, DX, WGRAD, MODEL], ids=lambda case: case.kind)
@pytest.mark.parametrize("call", ["ours", "eager"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, value: [(name, value * 1.001)], "expected an error of at most"),
        (lambda name, value: [(name, value * float("nan"))], "got nan"),
        (lambda name, value: [(name, value[..., :1])], "expected shape"),
        (
            lambda name, value: [(f"other {name}", value)],
            "got \\[('other |\\])",
        ),  # where only some are compared, others are not read
        (lambda name, value: [], "got \\[\\]"),
    ],
    ids=["off", "nan", "shape", "name", "nothing"],
)
def test_wrong_result_is_refused_before_timing(
    case: Case, call: str, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Case, "run", lambda *_: pytest.fail("a wrong result was timed"))
    with pytest.raises(WrongResultError, match=message):
        timing.measure(spoiled(case, call, change), 0.0)


def test_ours_has_to_give_every_result() -> None:
    def all_but_last(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        return [] if name == "d fc2.bias.1" else [(name, value)]

    assert "d fc2.bias.1" in dict(TRAINING.reference(TRAINING.make()))
    with pytest.raises(WrongResultError, match=r"ours: expected .*d fc2\.bias\.1"):
        spoiled(TRAINING, "ours", all_but_last).check(TRAINING.make())


def test_ours_builds_no_weight() -> None:
    inputs = [FORWARD.make(), TRAINING.make()]
    before = plg.nn.dense_syntheses()
    FORWARD.run(FORWARD.ours, inputs[0])
    TRAINING.run(TRAINING.ours, inputs[1])
    assert plg.nn.dense_syntheses() == before


def test_every_call_meets_other_copies() -> None:
    met: dict[str, list[int]] = {"ours": [], "dense": [], "eager": []}

    def recording(name: str) -> Any:
        def call(inputs: Any) -> Iterator[tuple[str, Tensor]]:
            met[name].append(id(inputs))
            yield from ()

        return call

    case = replace(STACK, ours=recording("ours"), baselines={name: recording(name) for name in ("dense", "eager")})
    copies = timing._copies(case, case.make())
    timing._interleave(case, copies, 0.0)
    rounds = [calls[2:] for calls in met.values()]  # after the warm-up
    assert all(len(calls) == timing.FEWEST for calls in rounds)
    assert all(len(set(turn)) == 3 for turn in zip(*rounds, strict=True))
    assert all(len(set(calls)) == timing.FEWEST for calls in rounds)


def test_a_dense_pass_goes_ahead_of_every_call() -> None:
    ran: list[str] = []

    def recording(name: str) -> Any:
        def call(inputs: Any) -> Iterator[tuple[str, Tensor]]:
            ran.append(name)
            yield from ()

        return call

    names = ("kernel", "dense", "eager", "again", "kernel again")
    assert set(names) | {"eager again"} <= set(FORWARD.baselines)
    case = replace(FORWARD, ours=recording("ours"), baselines={name: recording(name) for name in names})
    assert case.between == "dense"
    samples = timing._interleave(case, [case.make()], 0.0)
    assert {len(times) for times in samples.values()} == {timing.FEWEST}
    assert len(ran) == 11 * timing.FEWEST
    repeated = {"again", "kernel again"}
    assert all("dense" in pair or repeated & set(pair) for pair in pairwise(ran))
    for name in repeated:
        assert sum(pair == (name, name) for pair in pairwise(ran)) == timing.FEWEST
    assert {c.between for c in CASES.values() if c.kind == "forward" and c.tokens == 20} == {""}


def test_copies_are_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = TRAINING.make()
    genes = 12 * 32 * 32 * 2 + 9 * 32 * 2
    dense = 12 * 32 * 32 + 9 * 32
    small = 2 * 2 * 12 * 32 + 4 * 2  # x, dy, coefficients
    assert timing._held_bytes(first) == 4 * (genes + dense + small)
    monkeypatch.setattr(timing, "_last_cache", lambda: 4 * timing._held_bytes(first))
    assert len(timing._copies(TRAINING, first)) == 4 * 8
    assert len(timing._copies(FORWARD, FORWARD.make())) == 1  # a network: dense weights evict what a pass has left


def test_rows_and_columns(tmp_path: Path) -> None:
    facts = records.machine_facts()
    rows = [*timing.measure(SYNTHESIS, 0.0, facts), *timing.measure(FORWARD, 0.0, facts)]
    records.write_csv(rows, tmp_path / "results" / "machine.csv")
    with (tmp_path / "results" / "machine.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        read = list(reader)
    assert tuple(reader.fieldnames or ()) == records.COLUMNS
    assert [row["call"] for row in read] == [
        *("ours", "eager", "copy"),
        *("ours", "kernel", "dense", "eager", "again", "kernel again", "eager again"),
    ]
    for row in read:
        low, middle, high = (float(row[column]) for column in ("p10_us", "median_us", "p90_us"))
        assert 0 < low <= middle <= high
        assert int(row["rounds"]) == timing.FEWEST
        assert (row["torch"], row["pylearngene"]) == (torch.__version__, plg.__version__)
        assert row["device"]
        assert (row["cpu_level"], row["threads"]) == (plg._backends.LEVEL_NAME, "1")
        ours = next(float(r["median_us"]) for r in read if (r["case"], r["call"]) == (row["case"], "ours"))
        assert float(row["ratio"]) == pytest.approx(middle / ours, rel=0.05)
        assert float(row["ratio_low"]) <= float(row["ratio_high"])
        assert row["omp"]
    weight, _, copy = read[:3]
    assert int(weight["bytes"]) == 2 * 24 * 16 * 4  # K = 1: one gene read, one weight written
    assert float(weight["gb_per_s"]) == pytest.approx(2 * 24 * 16 * 4 / float(weight["median_us"]) / 1000, rel=0.5)
    assert float(weight["copy_share"]) == pytest.approx(float(copy["ratio"]), abs=0.002)
    assert float(copy["copy_share"]) == 1
    assert read[3]["bytes"] == ""


def test_interval_of_a_ratio() -> None:
    """Of the geometric mean of every round's ratio, by SciPy's distribution."""
    stats = pytest.importorskip("scipy.stats")
    ours, other = [1.0, 1.1, 0.9, 1.05, 1.2, 0.95, 1.0], [2.0, 2.3, 1.7, 2.2, 2.1, 1.9, 2.4]
    logs = np.log(np.array(other) / np.array(ours))
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=logs.mean(), scale=stats.sem(logs))
    assert timing._interval(other, ours) == pytest.approx((np.exp(low), np.exp(high)), rel=1e-3)
    assert timing._interval(ours, ours) == (1.0, 1.0)
    for freedom in (6, 10, 99):
        assert timing._student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-4)


def test_kernel_and_layers_do_the_same() -> None:
    case = next(c for c in CASES.values() if c.name == "expansion-forward-3xD32-M1-K2-fp32")
    inputs = case.make()
    kernel, layers = dict(case.baselines["kernel"](inputs)), dict(case.ours(inputs))
    assert list(kernel) == list(layers)
    assert all(torch.equal(kernel[name], layers[name]) for name in layers)


def test_others_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds of processors in two seconds, one of them ours: one core is kept busy by others."""
    readings = iter([(10.0, 4.0, 0.0), (13.0, 5.0, 2.0)])
    monkeypatch.setattr(records.Others, "_read", lambda *_: next(readings))
    assert records.Others().cores() == 1.0
    monkeypatch.setattr(records.Others, "_read", lambda *_: None)
    assert records.Others().cores() is None


def test_merging_keeps_the_order_of_cases() -> None:
    def row(case: str, commit: str) -> records.Row:
        return {"case": case, "commit": commit}

    old = [row("a", "1"), row("a", "1"), row("gone", "1"), row("c", "1")]
    new = [row("b", "2"), row("a", "2")]
    assert records.merged(old, new, ["a", "b", "c"]) == [row("a", "2"), row("b", "2"), row("c", "1")]


def test_copy_moves_the_bytes_of_synthesis() -> None:
    for case in (*CASES.values(), *OTHERS.values()):
        if case.kind == "synthesis":
            inputs = case.make()
            assert case.roof is not None
            ((_, target),) = case.roof(inputs)
            assert 2 * target.nbytes == case.moved
            assert sum(gene.nbytes for gene in inputs.genes) + case.weights * case.dtype.itemsize == case.moved


def test_host_cost_is_given_per_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    one = timing._rows(HOST, {"ours": [10.0, 11.0, 12.0], "function": [3.0, 4.0, 5.0], "module": [5.0, 6.0, 7.0]}, {})
    assert [row["above_us"] for row in one] == ["0.0", "7.0", "5.0"]
    clock = iter(range(0, 10**9, 8000))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(clock))
    case = replace(HOST, repeats=4)
    samples = timing._interleave(case, timing._copies(case, case.make()), 0.0)
    assert {time for times in samples.values() for time in times} == {8.0 / 4}
    assert set(samples) == {"ours", "function", "module"}


def test_host_cost_modes_differ_in_gradients() -> None:
    for mode in ("no grad", "recorded", "backward"):
        case = next(c for c in CASES.values() if c.kind == "host" and c.shape.endswith(mode))
        inputs = case.make()
        ((_, y), *grads) = case.ours(inputs)
        assert y.requires_grad == (mode != "no grad")
        names = ["dx", *(f"d {name}" for name, _ in inputs.bank.named_genes())]
        assert [name for name, _ in grads] == (names if mode == "backward" else [])


@pytest.mark.parametrize("kinds", [run.KINDS, ("synthesis",), ("training",)], ids="+".join)
def test_plot(kinds: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    rows = [row for case in (SYNTHESIS, FORWARD, TRAINING, HOST) if case.kind in kinds for row in made_up(case)]
    records.write_csv(rows, tmp_path / "machine.csv")
    plots.draw(tmp_path / "machine.csv", tmp_path / "machine.png")
    assert (tmp_path / "machine.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "machine.png").stat().st_size > 10_000


@pytest.mark.parametrize(("groups", "rotation"), [(1, 0), (5, 90)])
def test_labels_of_bars_keep_apart(groups: int, rotation: int) -> None:
    """Of equal bars side by side, whose labels are as high: without room beside each other they are turned."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(5, 5))
    calls = ("ours", "dense", "eager", "checkpointed", "compiled")
    rows = [{"call": call, "time": "35.6"} for call in calls]
    plots._bars(axis, [rows] * groups, "time", lambda row: row["time"])
    figure.draw_without_rendering()
    plots._apart(axis)
    figure.draw_without_rendering()
    assert {label.get_rotation() for label in axis.texts} == {rotation}
    boxes = [label.get_window_extent() for label in axis.texts]
    assert len(boxes) == 5 * groups
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    assert max(box.y1 for box in boxes) <= axis.get_window_extent().y1
    plt.close(figure)


def made_up(case: Case) -> list[records.Row]:
    return timing._rows(
        case, {name: [10.0 + k, 11.0, 12.0] for k, name in enumerate(case.calls())}, records.machine_facts()
    )


def test_command_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    asked: list[Path] = []
    monkeypatch.setattr(run, "beside", asked.append)
    monkeypatch.setattr(run, "all_cases", lambda _: [SYNTHESIS, FORWARD, DX, MODEL])
    assert run.main(["--seconds", "0", "--out", str(tmp_path)]) == 0
    stem = records.file_name(records.machine_facts())
    names = {f"{stem}{rest}" for rest in (".csv", ".png", "-dense.png", "-eager.png", "-products.png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert asked == [tmp_path]
    assert SYNTHESIS.name in capsys.readouterr().out
    monkeypatch.setattr(run, "all_cases", lambda _: [SYNTHESIS, *OTHERS.values()])
    assert run.main(["--seconds", "0", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == names | {f"{stem}-low_rank.png"}
    assert {row["stem"] for row in records.read_csv(tmp_path / f"{stem}.csv")} == {"expansion", "low_rank"}


def test_command_goes_on_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def kept() -> list[str]:
        rows = records.read_csv(tmp_path / f"{records.file_name(records.machine_facts())}.csv")
        return list(dict.fromkeys(row["case"] for row in rows))

    three = [SYNTHESIS, FORWARD, DX]
    monkeypatch.setattr(run, "all_cases", lambda _: three)
    monkeypatch.setattr(run, "finish", lambda _: None)
    monkeypatch.setattr(run, "beside", lambda _: None)
    shared = ["--seconds", "0", "--out", str(tmp_path)]
    assert run.main([*shared, "--only", DX.name]) == 0
    assert run.main([*shared, "--missing", "--within", "-1"]) == 0
    assert "2 of 2 cases are left" in capsys.readouterr().out
    assert kept() == [DX.name]
    assert run.main([*shared, "--missing"]) == 0
    assert kept() == [case.name for case in three]
    assert run.main([*shared, "--missing"]) == 0
    assert "rounds" not in capsys.readouterr().out.split("rounds")[-1]
    assert run.main([*shared, "--only", SYNTHESIS.name, "--dry"]) == 0
    assert "no file is written" in capsys.readouterr().out


def test_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong result has no rows, not even those of a run before; the other cases have."""
    monkeypatch.setattr(run, "finish", lambda _: None)
    path = tmp_path / f"{records.file_name(records.machine_facts())}.csv"
    for case, code, cases in ((FORWARD, 0, {SYNTHESIS.name, FORWARD.name}), (None, 1, {SYNTHESIS.name})):
        wrong = case or spoiled(FORWARD, "ours", lambda name, value: [(name, value + 1)])
        monkeypatch.setattr(run, "all_cases", lambda _, last=wrong: [SYNTHESIS, last])
        assert run.main(["--seconds", "0", "--out", str(tmp_path), "--only", "expansion"]) == code
        assert {row["case"] for row in records.read_csv(path)} == cases
    assert "refused" in capsys.readouterr().err
    assert run.main(["--only", "no such case"]) == 2


def test_names_are_unique_and_full_sizes_are_declared() -> None:
    names = [case.name for case in run.all_cases()]
    assert len(set(names)) == len(names)
    for name in (
        "expansion-synthesis-3072x768-K4-bf16",
        "expansion-forward-12xD192-M1-K2-fp32",
        "expansion-forward-12xD384-M256-K2-bf16",
        "expansion-forward-1xD768-M4096-K2-bf16",
        "expansion-dx-1xD384-M4096-K4-fp32",
        "expansion-wgrad-1xD768-M1024-K2-bf16",
        "expansion-model-ViT-Sstep,batch32-M6304-K2-fp32",
        "expansion-training-1xD384-M512-K2-fp32",
        "low_rank-forward-12xD384R96,gated-M512-K2-fp32",
        "low_rank-training-12xD384R96-M512-K2-bf16",
        "expansion-host-linear16,nograd-M1-K2-fp32",
        "expansion-host-functional64,backward-M1-K2-fp32",
    ):
        assert name in names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # Inductor's
def test_compiled_baseline() -> None:
    cases = [case for case in expansion.cases(expansion.TINY, compiled=True) if "compiled" in case.baselines]
    for case in [next(c for c in cases if c.kind == kind) for kind in ("forward", "training")]:
        assert "compiled" in [row["call"] for row in timing.measure(case, 0.0)]
