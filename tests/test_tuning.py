# SPDX-License-Identifier: Apache-2.0
"""`pylearngene bench --tune` in Triton's interpreter, with a clock of the tests: what is excluded, chosen and written.

What a table must hold, and that it changes launches, is tested in `test_tuned_launches`.
"""

from __future__ import annotations

import importlib
import json
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pylearngene import plan
from pylearngene.cli.bench import tuning as command
from pylearngene.cli.bench.tuning import TuneSettings, run, table_rows
from pylearngene.errors import ArgumentError, BackendError, TooLargeError, WriteError

pytest.importorskip("triton")
launch: Any = importlib.import_module("pylearngene.triton_kernels._launch")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")
gradients: Any = importlib.import_module("pylearngene.triton_kernels._expansion_gradients")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")
trials: Any = importlib.import_module("pylearngene.triton_kernels._trials")
tuned_table: Any = importlib.import_module("pylearngene.triton_kernels._tuned_table")
tuning: Any = importlib.import_module("pylearngene.triton_kernels.tuning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's launches are tuned here"),
]
CPU = torch.device("cpu")
BUCKET = tuned_table.Bucket("fused", 16, 2, 4, True)
TRIALS = (trials.Trial("forward", 16, 32, 32), trials.Trial("dx", 16, 32, 32))
JOB = tuning.Job(BUCKET, torch.float32, TRIALS)


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("PYLEARNGENE_LAUNCHES", raising=False)
    monkeypatch.setenv("PYLEARNGENE_CACHE", str(tmp_path / "cache"))
    table.install({})
    yield
    table.install({})


def settings(**changes: Any) -> TuneSettings:
    given: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "tokens": (16,), "shapes": ((32, 32),)}
    return TuneSettings(**{**given, "genes": (2,), "budget": 100.0, **changes})


def preferring(*tile: int) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]:
    """A clock by which a launch of a tile takes 4 us, any other 8; eight make up a call."""
    wanted = " " + "x".join(map(str, tile)) + "-"
    return lambda calls: {name: 8 * (4.0 if wanted in name else 8.0) for name in calls}


def rows() -> list[Any]:
    found: list[Any] = table.candidates("fused", "interpreter", 16, 2, 4, False, True, launch.VERSION)
    return found


def test_the_fastest_candidate_wins() -> None:
    own, *others = rows()
    (narrow,) = [row for row in others if row.tile == (32, 16, 32)]
    outcome = tuning.tune(JOB, CPU, preferring(*narrow.tile))
    assert outcome.excluded == ()
    assert outcome.launch == tuned_table.Launch(BUCKET, narrow, 2 * 4.0, 2 * 8.0)
    assert tuning.tune(JOB, CPU, preferring(1)).launch.row == own, "no gain, no change"
    assert table.OVERRIDES == {}, "nothing stays in force"


def test_a_gain_in_the_noise_is_none() -> None:
    def times(calls: Mapping[str, Any], share: float) -> dict[str, float]:
        return {name: share if place else 1.0 for place, name in enumerate(calls)}

    assert tuning.tune(JOB, CPU, partial(times, share=0.985)).launch.row == rows()[0]
    assert tuning.tune(JOB, CPU, partial(times, share=0.975)).launch.row != rows()[0]


def test_what_was_tuned_before_does_not_pass_for_the_library_s_own() -> None:
    own, *_, other = rows()
    table.install({BUCKET.key("interpreter"): other})
    outcome = tuning.tune(JOB, CPU, preferring(1))
    assert outcome.launch.row == own
    assert dict(table.OVERRIDES) == {BUCKET.key("interpreter"): other}, "what was in force is again"


def spoiling(tile: tuple[int, ...], spoil: Callable[[Tensor], object]) -> Callable[..., None]:
    """The launcher of products, wrong by one row of the table."""
    real = launchers.product

    def product(y: Tensor, *arguments: Any) -> None:
        real(y, *arguments)
        if [row.tile for row in table.OVERRIDES.values()] == [tile]:
            spoil(y)

    return product


def fail(y: Tensor) -> None:
    raise RuntimeError("PTXAS: out\nof registers")


WRONG: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "an element": (lambda y: y[-1:, -1:].add_(1.0), "y is wrong by 1, "),
    "not written": (lambda y: y[3].fill_(torch.nan), "y is wrong by nan, "),
    "does not compile": (fail, "RuntimeError: PTXAS: out of registers"),
    "a race": (lambda y: y[0].add_(1e-6 * torch.rand(())), "y differs between two launches"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_candidates_are_excluded_and_reported(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    spoil, reason = WRONG[case]
    monkeypatch.setattr(trials.expansion, "product", spoiling((32, 16, 32), spoil))
    outcome = tuning.tune(JOB, CPU, preferring(32, 16, 32))
    (excluded,) = outcome.excluded
    assert excluded.row.tile == (32, 16, 32)
    assert excluded.reason.startswith(f"forward of 16 tokens, 32 x 32: {reason}")
    assert outcome.launch.row == rows()[0]


def test_without_a_right_candidate_there_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.expansion, "product", lambda y, *rest: y.zero_())
    timed: list[object] = []
    outcome = tuning.tune(JOB, CPU, lambda calls: timed.append(calls) or {})
    assert outcome.launch is None
    assert [excluded.row for excluded in outcome.excluded] == rows()
    assert timed == [], "what is wrong is not timed"


KERNELS = {
    "gene_gradients": ("gene_gradients", "dots", 16),
    "accumulate": ("accumulate", "dots", 0),
    "synthesize": ("fill", "window", 0),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_checked(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    name, form, tokens = KERNELS[kernel]
    trial = trials.Trial(form, tokens, 32, 32)
    size = 32 * 32 if kernel == "gene_gradients" else 1
    job = tuning.Job(tuned_table.Bucket(kernel, size, 2, 4, True).rounded(), torch.float32, (trial,))
    assert tuning.tune(job, CPU, preferring(1)).excluded == ()

    real = getattr(launchers, name)

    def spoiled(*arguments: Any) -> Any:
        result = real(*arguments)
        target = arguments[0] if name == "fill" else arguments[3 if name == "accumulate" else 0][1]
        target[-1, -1] += 0.25
        return result

    monkeypatch.setattr(trials.expansion, name, spoiled)
    (excluded,) = tuning.tune(job, CPU, preferring(1)).excluded
    assert f"{'weight' if name == 'fill' else 'buffer 1'} is wrong by 0.25" in excluded.reason
    if name == "fill":
        return
    monkeypatch.setattr(trials.expansion, name, lambda *arguments: real(*arguments) + torch.tensor([0.0, 9.0]))
    (excluded,) = tuning.tune(job, CPU, preferring(1)).excluded
    assert "dot 1 is wrong by 9, " in excluded.reason
    monkeypatch.setattr(trials.expansion, name, lambda *arguments: (real(*arguments), None)[1])
    (excluded,) = tuning.tune(job, CPU, preferring(1)).excluded
    assert "dot 0 is missing" in excluded.reason


def test_accumulators_hold_something_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that writes instead of adding is found."""
    real = launchers.accumulate

    def writing(panel: Tensor, genes: Any, coeffs: Tensor, buffers: list[Tensor], *rest: Any) -> Any:
        for buffer in buffers:
            buffer.zero_()
        return real(panel, genes, coeffs, buffers, *rest)

    monkeypatch.setattr(trials.expansion, "accumulate", writing)
    trial = trials.Trial("no dots", 0, 32, 32)
    job = tuning.Job(tuned_table.Bucket("accumulate", 16, 2, 4, True), torch.float32, (trial,))
    (excluded,) = tuning.tune(job, CPU, preferring(1)).excluded
    assert "buffer 0 is wrong by 0.5, " in excluded.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_tuned_is_what_is_launched(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In every bucket each launch asks the table for that very bucket, or candidates would be timed in vain."""
    asked: list[Any] = []
    row_for, candidates = table.row_for, table.candidates

    def noted(*call: Any, **options: Any) -> Any:
        asked.append(row_for(*call, **options))
        return asked[-1]

    def marked(*call: Any) -> list[Any]:
        return [replace(row, versions=("marked",)) for row in candidates(*call)]

    def compare(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            asked.clear()
            call()
            (forced,) = table.OVERRIDES.values()
            assert {row for row in asked if row.kernel == forced.kernel} == {forced}
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(launchers, "row_for", noted)
    monkeypatch.setattr(gradients, "row_for", noted)
    monkeypatch.setattr(table, "candidates", marked)
    jobs = tuning.jobs(dtype, (16, 70), ((16, 32), (9, 16)), (2,))
    assert {job.bucket.kernel for job in jobs} == set(tuned_table.KERNELS)
    for job in jobs:
        assert tuning.tune(job, CPU, compare, launches=1).excluded == ()


def test_the_jobs_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(dtype: torch.dtype, genes: int) -> list[tuple[Any, ...]]:
        jobs = tuning.jobs(dtype, (16, 1000), ((768, 768), (770, 768), (768, 770)), (genes,))
        return [(job.bucket.kernel, job.bucket.size, job.bucket.regular, len(job.trials)) for job in jobs]

    panels = [("synthesize", 16, True, 2), ("accumulate", 16, True, 4)]
    panels += [("synthesize", 16, False, 1), ("accumulate", 16, False, 2)]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert found(torch.float32, 2) == panels
    assert found(torch.bfloat16, 9) == panels
    assert found(torch.bfloat16, 8) == [
        *panels,
        ("gene_gradients", 1 << 20, True, 4), ("gene_gradients", 1 << 20, False, 8),
        ("fused", 1024, True, 2), ("fused", 1024, False, 4), ("fused", 16, True, 2), ("fused", 16, False, 4),
    ]  # fmt: skip


def test_a_device_that_died_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(device: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trials.expansion, "product", lambda y, *rest: fail(y))
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    problem = trials.Product(TRIALS[0], 2, torch.float32, CPU)
    assert tuning._reason(problem, CPU) == "RuntimeError: PTXAS: out of registers"
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        tuning._reason(problem, torch.device("cuda"))


def test_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(trials.PROBLEMS, "fused", full)
    message = "tune: forward of 16 tokens, 32 x 32 with 2 genes does not fit into memory: CUDA out of memory"
    with pytest.raises(TooLargeError, match=message):
        tuning.tune(JOB, CPU, preferring(1))
    assert table.OVERRIDES == {}


def test_buckets_that_the_plan_has_no_use_for_come_last() -> None:
    unused = {size: command._unused(replace(BUCKET, size=size, itemsize=2), "sm_90") for size in (16, 64, 4096)}
    assert not unused[16]
    assert not unused[64]
    assert not command._unused(replace(BUCKET, kernel="accumulate", size=4096), "sm_90")
    assert not command._unused(BUCKET, "interpreter")
    assert unused[4096] == (plan.choose(4096, "triton", 2, 2, arch="sm_90") == "panel")


def test_a_gpu_is_tuned_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors name it by number, and by what tensors name launches are looked up."""
    seen: list[torch.device] = []
    monkeypatch.setattr(command._backends, "triton_for", lambda device: launchers)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(command, "run", lambda wanted, *rest: seen.append(wanted.device) or {})
    command.tune(settings(device=torch.device("cuda")))
    assert seen == [torch.device("cuda", 3)]


def test_a_run_writes_a_table_that_is_read_again(tmp_path: Path) -> None:
    facts = run(settings(), preferring(32, 16, 32), progress=False)
    path = tmp_path / "cache" / f"launches-interpreter-interpreter-triton{launch.triton.__version__}.json"
    assert facts["table"] == str(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    read = {one.bucket: one for one in tuned_table.read(path, "interpreter", launch.triton.__version__)}
    assert [bucket.kernel for bucket in read] == ["synthesize", "accumulate", "gene_gradients", "fused"]
    assert read[BUCKET].row.tile == (32, 16, 32)
    assert (read[BUCKET].microseconds, read[BUCKET].library) == (8.0, 16.0)
    assert (facts["left"], facts["excluded"]) == (0, [])
    text = table_rows(facts)
    assert text.splitlines()[0].split() == ["kernel", "size", "K", "bytes", "launch", "us", "library", "us", "gain"]
    assert "2.00" in text
    assert text.endswith(f"table: {path}")


def test_the_report_names_what_was_excluded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials.expansion, "product", spoiling((32, 16, 32), WRONG["an element"][0]))
    facts = run(settings(out=tmp_path / "own.json"), preferring(1), progress=False)
    (excluded,) = facts["excluded"]
    assert (excluded["kernel"], excluded["size"], excluded["genes"]) == ("fused", 16, 2)
    assert "excluded: fused 32x16x32-4w1s" in table_rows(facts)
    assert (tmp_path / "own.json").is_file()


def test_a_budget_leaves_buckets_for_the_next_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clock that moves a second per look: three seconds are enough for two of the four buckets."""
    seconds = iter(range(1000))
    monkeypatch.setattr(command.time, "monotonic", lambda: float(next(seconds)))
    out = tmp_path / "t.json"
    first = run(settings(budget=2.0, out=out), preferring(1), progress=False)
    assert [row["kernel"] for row in first["launches"]] == ["synthesize", "accumulate"]
    assert first["left"] == 2
    assert "2 buckets are left for another run: the budget ended" in table_rows(first)
    assert len(json.loads(out.read_text())["launches"]) == 2
    second = run(settings(budget=2.0, out=out), preferring(1), progress=False)
    assert [row["kernel"] for row in second["launches"]] == ["gene_gradients", "fused"]
    assert [row["kernel"] for row in json.loads(out.read_text())["launches"]] == [
        "synthesize", "accumulate", "gene_gradients", "fused"
    ]  # fmt: skip


def test_tuned_again_replaces_the_entry(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    tiles = []
    for tile in ((32, 16, 32), (1,)):
        run(settings(out=out), preferring(*tile), progress=False)
        tiles.append([row["tile"] for row in json.loads(out.read_text())["launches"] if row["kernel"] == "fused"])
    assert tiles == [[[32, 16, 32]], [[32, 64, 32]]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA error: unspecified launch failure")])
def test_what_is_finished_outlives_an_interruption(tmp_path: Path, error: BaseException) -> None:
    count = 0

    def compare(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == 3:  # in the midst of the second bucket
            raise error
        return dict.fromkeys(calls, 1.0)

    with pytest.raises(type(error)):
        run(settings(out=tmp_path / "t.json"), compare, progress=False)
    assert [row["kernel"] for row in json.loads((tmp_path / "t.json").read_text())["launches"]] == ["synthesize"]
    assert table.OVERRIDES == {}


def test_a_table_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    run(settings(out=out), preferring(1), progress=False)
    before = out.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError, match="cannot be written: No space left on device"):
        run(settings(out=out), preferring(32, 16, 32), progress=False)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_folder_that_cannot_be_is_said_before_the_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"out: .* cannot be written"):
        run(settings(out=tmp_path / "file" / "t.json"), lambda calls: pytest.fail("measured"), progress=False)


def test_a_broken_table_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    out.write_text("{}")
    run(settings(out=out), preferring(1), progress=False)
    assert capsys.readouterr().err.startswith(f"pylearngene: file '{out}': expected the names chip, device, format, ")
    assert len(json.loads(out.read_text())["launches"]) == 4


def test_nothing_finished_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter((0.0, 9.0))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(ends))
    facts = run(settings(budget=1.0, out=tmp_path / "t.json"), preferring(1), progress=False)
    assert (facts["table"], facts["left"], facts["launches"]) == (None, 4, [])
    assert table_rows(facts).endswith("no table was written")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="tune: expected a CUDA device, whose Triton kernels are tuned, got cpu"):
        command.tune(settings())
    monkeypatch.setattr(command._backends, "triton_for", lambda device: None)
    with pytest.raises(BackendError, match="tune: Triton does not compute on cuda here"):
        command.tune(settings(device=torch.device("cuda")))
    monkeypatch.setattr(tuning, "cache_folder", lambda: None)
    with pytest.raises(ArgumentError, match="out: expected a file, since this user has no home folder"):
        run(settings(), preferring(1), progress=False)
