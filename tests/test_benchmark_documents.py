# SPDX-License-Identifier: Apache-2.0
"""Goals, tables and memory of the benchmarks: the documents show what the result files hold, goals are judged by hand.

No time is asserted, and no full size is run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # last, so that an installed pylearngene is the one under test

from benchmarks import documents, goals, memory, models, records, run, vit
from pylearngene.training.memory import peak_bytes

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny sizes: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(case: str, call: str, time: float, **others: str) -> dict[str, str]:
    """A row of a result file, as it is read."""
    stem, kind = case.split("-")[:2]
    return {"case": case, "stem": stem, "kind": kind, "call": call, "median_us": str(time), **others}


def rows_of(case: str, **times: float) -> list[dict[str, str]]:
    return [row(case, call, time, ratio_low="0.97") for call, time in times.items()]


def test_tables_show_the_result_files() -> None:
    """Every marked table is what `benchmarks.documents` makes of the file that it names."""
    shown = []
    for name in documents.DOCUMENTS:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for _, table, file, body, _ in documents.BLOCK.findall(text):
            assert len({line.count("|") for line in body.splitlines() if line.startswith("|")}) == 1, table
            assert (documents.RESULTS / file).exists(), file
            assert documents.with_tables(text, documents.RESULTS / file) == text, (
                f"{name}: python -m benchmarks.documents"
            )
            shown.append(table)
    assert sorted(shown) == sorted(documents.TABLES)


def test_goals_speak_of_cases_that_exist() -> None:
    names = {case.name for case in run.all_cases()}
    for goal in goals.GOALS:
        assert set(goal.cases) <= names, goal.text
        assert goal.bound > 0


def test_goals_are_judged_by_every_case() -> None:
    one, two = "expansion-forward-12xD384-M1-K2-fp32", "expansion-forward-12xD384-M4-K2-fp32"
    goal = goals.Goal("few", (one, two), 4, "dense")
    rows = rows_of(one, ours=1.0, kernel=0.5, dense=5.0)
    assert goal.verdict(rows) == "not measured"
    rows += rows_of(two, ours=2.0, kernel=1.0, dense=8.0)
    assert (goal.values(rows), goal.verdict(rows)) == ([5.0, 4.0], "met")
    assert goals.Goal("few", (one, two), 4.1, "dense").verdict(rows) == "missed"
    kernel = goals.Goal("few", (one, two), 8, "dense", "kernel")
    assert kernel.cells(rows) == ("few, kernel", "of dense", ">= 8", "10.00 / 8.00", "met")
    assert goals.Goal("few", (one,), 1, "dense", column="ratio_low").values(rows) == [0.97]
    both = goals.Goal("few", (one, two), 6, "dense")
    assert both.verdict(rows) == "missed"
    assert both.cells(rows)[3:] == ("5.00 / 4.00", "missed")
    rows += [row(one, "again", 0.8)]
    assert both.cells(rows)[3:] == ("5.00 / 4.00", "missed")  # of one case alone it is not said
    rows += [row(two, "again", 1.25)]
    assert both.cells(rows)[3:] == ("5.00 / 4.00 (again: 6.25 / 6.40)", "missed (again: met)")
    assert goals.Goal("few", (one, two), 6.3, "dense").cells(rows)[4] == "missed"
    assert goal.cells(rows)[3:] == ("5.00 / 4.00 (again: 6.25 / 6.40)", "met")
    assert kernel.again(rows) == []
    rows += [row(case, "kernel again", 0.4) for case in (one, two)]
    assert kernel.again(rows) == [12.5, 20.0]
    assert "few" not in goals.table([])
    assert goals.table(rows).count("not measured") == len(goals.GOALS) - 2


def test_eager_goals_show_both_orders_of_both_calls() -> None:
    """A repeated pass of ours is compared with a repeated pass of eager materialization, never with one after dense."""
    case = "expansion-forward-12xD384-M1-K2-fp32"
    goal = goals.Goal("few", (case,), 3, "eager")
    rows = rows_of(case, ours=2.0, eager=4.0, stacked=5.0, again=1.0)
    assert goal.cells(rows)[3:] == ("2.00 (stacked: 2.50)", "missed")
    rows += [row(case, "eager again", 3.5)]
    assert goal.cells(rows)[3:] == ("2.00 (stacked: 2.50; again: 3.50)", "missed (again: met)")
    judged = goals.Goal("step", (case,), 3, "eager", column="ratio_low")
    assert judged.again(rows) == []


def test_networks_without_repeated_passes_are_shown() -> None:
    """Of files that were made before there was a call, or from 16 tokens on: a dash."""
    facts = {"shape": "12 x D384", "genes": "2", "dtype": "fp32", "regime": "rows", "tokens": "1"}
    case = "expansion-forward-12xD384-M1-K2-fp32"
    times = {"ours": 2000.0, "kernel": 1000.0, "dense": 8000.0, "eager": 6000.0}
    old = [row(case, call, time, **facts) for call, time in times.items()]
    again = {"again": 1600.0, "kernel again": 800.0, "eager again": 4000.0}
    new = [*old, *(row(case, call, time, **facts) for call, time in again.items())]
    label = "| 12 x D384, K = 2 | 1 | fp32 | rows | 2 "
    assert list(documents.networks(old))[2].startswith(f"{label}| 4.00 | 8.00 | - | - | 3.00 | - | - |")
    assert list(documents.networks(new))[2].startswith(f"{label}| 4.00 | 8.00 | 5.00 | 10.00 | 3.00 | 2.50 | - |")


def test_slower_than_eager_is_said() -> None:
    fast, slow = rows_of("expansion-forward-a", ours=1.0, eager=3.0), rows_of("expansion-dx-b", ours=2.0, eager=1.0)
    others = rows_of("expansion-host-c", ours=2.0, eager=1.0)
    assert goals.worst([]) == "eager materialization: not measured"
    grid = "against eager materialization, the grid of networks"
    one = f"{grid}, 1 comparisons (1 forward passes): at least 3.00 (expansion-forward-a); never slower"
    assert goals.worst([*fast, *others]) == one
    assert goals.worst([*fast, *slow]).endswith("\nslower than it in 1: expansion-dx-b 0.50")
    more = rows_of("expansion-forward-conv", ours=4.0, eager=1.0) + rows_of(
        "expansion-synthesis-d", ours=5.0, eager=4.0
    )
    more += rows_of("low_rank-training-e", ours=1.0, eager=2.0, checkpointed=0.9)
    more += rows_of("expansion-wgrad-f", ours=1.0, eager=0.9981)
    head, named, _, beside, apart = goals.worst([*fast, *slow, *more]).splitlines()
    assert head == f"{grid}, 3 comparisons (1 dX, 1 forward passes, 1 weight gradients): at least 0.50 (expansion-dx-b)"
    assert named == "slower than it in 2: expansion-dx-b 0.50, expansion-wgrad-f 0.998"
    kinds = "1 convolutions: forward passes, 2 low_rank: training steps, 1 weights alone"
    least = "at least 0.25 (expansion-forward-conv)"
    assert beside == f"against eager materialization, beside it, 4 comparisons ({kinds}): {least}"
    assert apart.endswith("in 3: expansion-forward-conv 0.25, expansion-synthesis-d 0.80, low_rank-training-e 0.90")


def test_only_tables_of_the_file_are_written(tmp_path: Path) -> None:
    results = tmp_path / "here.csv"
    case = "expansion-synthesis-8x8-K2-fp32"
    numbers = {"weights_per_s": "2.5e9", "gb_per_s": "30", "copy_share": "0.9", "shape": "8 x 8", "genes": "2"}
    facts = {"dtype": "fp32", "device": "a", "cpu_level": "b", "threads": "2", "omp": "default", "torch": "2"}
    both = [row(case, call, time, **numbers, **facts, commit="c") for call, time in (("ours", 2.0), ("eager", 3.0))]
    columns = list(both[0])
    records.write_csv(both, results, columns)
    begin, end = "<!-- begin synthesis of {} -->\n", "<!-- end -->\n"
    text = f"# T\n\n{begin.format('here.csv')}old{end}{begin.format('there.csv')}old{end}"
    (tmp_path / "README.md").write_text(text)
    assert documents.refresh(results, tmp_path) == [tmp_path / "README.md"]
    new = (tmp_path / "README.md").read_text()
    assert "| 8 x 8 | 2 | fp32 | 2.50 | 30 | 0.9 | 1.50 |" in new
    assert new.count("old") == 1
    assert documents.refresh(results, tmp_path) == []
    assert "a, b, 2 threads, OpenMP's default settings, torch 2, commit c." in documents.where(both)


def test_forms_of_a_network_are_equal_and_apart() -> None:
    shape = models.TINY.shape
    nets = vit.forms(vit.gene_backed(shape))
    x = torch.randn(2, 3, shape.side, shape.side)
    expected = nets["dense"].double()(x.double())
    for form in ("ours", "eager"):
        torch.testing.assert_close(nets[form](x).double(), expected, rtol=1e-4, atol=1e-5)
    addresses = [{p.data_ptr() for p in net.parameters()} for net in nets.values()]
    assert not set.intersection(*addresses)
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert sizes[0] == sizes[2] < sizes[1]


TINY = vit.Shape(width=64, depth=6, heads=2, side=16, patch=4, classes=5)


@pytest.mark.parametrize("what", ["forward", "step"])
@pytest.mark.parametrize("form", memory.FORMS)
def test_measured_peak_is_the_estimated_one(what: str, form: str) -> None:
    facts = {"omp": "default"}
    asked: list[memory.Request] = []

    def ask(request: memory.Request) -> int:
        asked.append(request)
        return memory.answer(request) if not request.resident else len(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "ask", ask)
        found = memory.measured(what, form, 4, TINY, facts)
    assert abs(found["estimated"] / found["measured"] - 1) <= 0.01
    assert found["resident"] == 2
    assert [request.resident for request in asked] == [False, True]
    assert found["malloc"] == "MALLOC_MMAP_THRESHOLD_=65536"
    assert set(memory.COLUMNS) - set(found) == {"device", "cpu_level", "threads", "torch", "pylearngene", "commit"}


def test_a_step_holds_the_dense_one_less_what_is_not_there() -> None:
    """Of ViT-S in small: dense's measured peak less weights, gradients and optimizer state, plus one panel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "ask", lambda request: 0 if request.resident else memory.answer(request))
        dense, ours = (memory.measured("step", form, 32, TINY, {}) for form in memory.FORMS)
    assert dense["moment"] == ours["moment"] == "backward"
    slack = 1 << 16  # coefficients and numbers of steps
    assert ours["measured"] <= memory.allowed(dense, ours) + slack
    assert ours["measured"] < 0.9 * dense["measured"]


def test_a_forward_pass_holds_panels_and_activations() -> None:
    """Above weights and inputs, by the allocator's events: what the estimate says, and no weight of a layer."""
    net, x = vit.gene_backed(TINY).eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        net(x)
        peak = peak_bytes(lambda: net(x))
    estimate = memory.plg.estimate_memory(net, (1, 3, 16, 16), train=False)
    found = {f"{part}_at_peak": size for part, size in estimate.at_peak.items()}
    assert peak <= 1.1 * memory.passing({**dict.fromkeys((f"{part}_at_peak" for part in memory.PARTS), 0), **found})


def test_memory_table_judges_both_goals() -> None:
    zeros = {f"{part}_at_peak": "0" for part in (*memory.PARTS, "transients")}
    facts = {"device": "a", "cpu_level": "b", "threads": "2", "torch": "2", "commit": "c", "malloc": "M=1"}
    sizes = {"estimated": "10485760", "workspace": "1048576", "resident": "1153434"}

    def made(what: str, form: str, measured: int, **parts: str) -> dict[str, str]:
        return {**zeros, **facts, **sizes, "what": what, "form": form, "batch": "1", "measured": str(measured), **parts}

    rows = [
        made("forward", "ours", 1, transients_at_peak="1048576"),
        made("step", "dense", 10 << 20, weights_at_peak=str(8 << 20)),
        made("step", "ours", (4 << 20) + 1, weights_at_peak=str(1 << 20)),
    ]
    lines = list(memory.memory_table(rows))
    assert lines[2].endswith("| growth <= 1.10: met |")
    assert lines[3].endswith("| - |")
    assert lines[4].endswith("| peak <= 4.00: missed |")  # 10 - 7 + 1
