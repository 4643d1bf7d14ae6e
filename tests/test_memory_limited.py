# SPDX-License-Identifier: Apache-2.0
"""The example that looks for the deepest network within a cap: its search, its trials, its files and its exit codes."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylearngene as plg

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--device", "cpu", "--width", "64", "--batch", "1", "--tokens", "4", "--jobs", "1"]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("memory_limited")
    for name in ("memory_limited", "memory_forms"):
        sys.modules.pop(name, None)


@pytest.fixture
def forms(program: Any) -> Any:
    return sys.modules["memory_forms"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("guess", [1, 5, 36, 37, 38, 60, 64])
@pytest.mark.parametrize("deepest", [0, 1, 36, 37, 63, 64, 100])
def test_the_search_ends_at_the_deepest_that_trains(program: Any, deepest: int, guess: int) -> None:
    def trial(depth: int) -> Any:
        assert 1 <= depth <= 64
        asked.append(depth)
        return program.Outcome(depth <= deepest, depth, 1)

    asked: list[int] = []
    found, outcomes = program.search(trial, guess, 64)
    assert found == min(deepest, 64)
    assert len(asked) == len(set(asked)) == len(outcomes) <= 12
    if guess in (deepest, deepest + 1):  # a right guess takes two trials: that one, and its neighbour
        assert len(asked) <= 2


def test_guesses_follow_the_line_through_two_estimates(program: Any) -> None:
    assert program.guessed(lambda depth: 100 + 7 * depth, 100 + 7 * 31, 64) == 31
    assert program.guessed(lambda depth: 100 + 7 * depth, 100 + 7 * 31 - 1, 64) == 30
    assert program.guessed(lambda depth: 100 + 7 * depth, 10**6, 64) == 64
    assert program.guessed(lambda depth: 100 + 7 * depth, 0, 64) == 1


def test_all_forms_with_genes_compute_the_same(forms: Any) -> None:
    """With the genes of one in the others; the dense network has the weights that they combine to."""
    sizes, depth, cpu = forms.Sizes(64, 2, 4), 3, torch.device("cpu")
    x = torch.randn(2, 4, forms.PIXELS)
    ours = forms.fill(forms.network("ours", sizes, depth), cpu)
    wanted = ours(x)
    dense = forms.fill(forms.network("dense", sizes, depth), cpu)
    dense.load_state_dict(plg.bake(ours).state_dict())
    torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-5)
    for form in ("eager", "checkpointed"):
        net = forms.fill(forms.network(form, sizes, depth), cpu)
        net.load_state_dict(dense.state_dict(), strict=False)  # embedding, norms, head
        for name in ("qkv", "proj", "fc1", "fc2"):
            layer, group = getattr(net.blocks[0], name), ours.gene_bank.group(name)
            for mine, theirs in zip([*layer.genes, *layer.biases], [*group.weights(), *group.biases()], strict=True):
                mine.data.copy_(theirs)
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


def test_forms_hold_what_they_say(forms: Any) -> None:
    def parameters(form: str, depth: int) -> int:
        return sum(parameter.numel() for parameter in forms.network(form, forms.Sizes(64, 1, 4), depth).parameters())

    block = 12 * 64 * 64
    assert parameters("dense", 9) - parameters("dense", 3) >= 6 * block
    for form in forms.WITH_GENES:
        assert parameters(form, 9) - parameters(form, 3) <= 6 * 4 * 64  # norms at most
    peaks = {form: forms.estimate(form, forms.Sizes(64, 2, 32), torch.device("cpu"))(6) for form in forms.FORMS}
    assert peaks["dense"] >= peaks["dense+blocks"] > peaks["eager"]  # the optimizer sets the peak of both
    assert peaks["eager"] > max(peaks["ours"], peaks["checkpointed"]) > peaks["ours+blocks"]


@pytest.mark.parametrize("cap", [1 << 40, 1])
def test_a_trial_is_a_process_that_trains(program: Any, cap: int) -> None:
    outcome = program.ask(program.Trial("ours", program.Sizes(128, 4, 64), 4, cap, "cpu"))
    net = program.network("ours", program.Sizes(128, 4, 64), 4)
    assert outcome.trains == (cap > 1)
    assert outcome.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert outcome.peak > 16 * outcome.parameters


def test_a_trial_that_breaks_is_told(program: Any) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)trial of dense at depth 1 failed:\n.*is invalid for input of size"):
        program.ask(program.Trial("dense", program.Sizes(100, 1, 4), 1, 1, "cpu"))


@pytest.fixture
def pretended(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials and estimates that answer at once: a block takes 1 MiB, gene-backed ones a quarter."""

    def size(form: str, depth: int) -> int:
        return depth << (18 if form.startswith("ours") else 20)

    def ask(trial: Any) -> Any:
        peak = size(trial.form, trial.depth)
        return program.Outcome(peak <= trial.cap, peak, 1000 * trial.depth)

    monkeypatch.setattr(program, "ask", ask)
    monkeypatch.setattr(program, "estimate", lambda form, sizes, device: lambda depth: size(form, depth) + 1)


@pytest.mark.usefixtures("pretended")
def test_a_run_writes_both_files_and_prints_the_table(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    asked = [*SMALL, "--forms", "dense", "ours", "--caps", "6", "3", "--deepest", "16", "--out", str(out)]
    for _ in range(2):  # what is there is replaced
        assert program.main(asked) == 0
    assert sorted(path.name for path in out.iterdir()) == [program.CSV, program.PNG]
    assert (out / program.PNG).read_bytes().startswith(b"\x89PNG")
    rows = read(out / program.CSV)
    found = {(row["form"], int(row["cap"]) >> 20): (int(row["depth"]), row["at_least"]) for row in rows}
    assert found == {
        ("dense", 3): (3, "False"), ("dense", 6): (6, "False"), ("ours", 3): (12, "False"), ("ours", 6): (16, "True"),
    }  # fmt: skip
    assert {row["measured"] for row in rows} == {str(depth << 20) for depth in (3, 6)} | {str(12 << 18), str(16 << 18)}
    printed = capsys.readouterr()
    for part in (">= 16", "12,000", "ours: two genes, no W formed"):
        assert part in printed.out
    assert printed.err == ""


@pytest.mark.usefixtures("pretended")
def test_nothing_that_trains_is_said(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([*SMALL, "--forms", "dense", "--caps", "0.5", "--out", str(tmp_path / "out")]) == 0
    (row,) = read(tmp_path / "out" / program.CSV)
    assert (row["depth"], row["measured"]) == ("0", "0")
    assert "dense" in capsys.readouterr().out


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--caps", "-1"], 2, "--caps: expected numbers above 0, got -1"),
        (["--width", "65"], 2, "--width: expected a multiple of 64, got 65"),
        (["--deepest", "0"], 2, "--deepest: expected a number of at least 1, got 0"),
        (["--jobs", "0"], 2, "--jobs: expected a number of at least 1, got 0"),
        (["--forms", "dense", "--caps", "1"], 5, "cannot be written"),
    ],
)
def test_refusals_and_exit_codes(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], code: int, message: str
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert program.main([*SMALL, "--out", str(out), *given]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_writes_nothing(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "deepest_within", interrupted)
    assert program.main([*SMALL, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "memory_limited: interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing")
def test_a_gpu_that_is_not_there_is_refused(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--device", "cuda"]) == 2
    assert "--device: expected 'cpu', since no GPU is here, got 'cuda'" in capsys.readouterr().err


def test_a_trial_on_a_gpu_says_when_memory_is_out(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The few lines that only a GPU runs, with one that is pretended."""
    fractions: list[float] = []

    def set_fraction(share: float, device: torch.device) -> None:
        assert device.index is not None  # refused by the real one
        fractions.append(share)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Chip", (), {"total_memory": 1 << 30}))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(program, "fill", lambda net, device: net)
    trial = program.Trial("ours", program.Sizes(64, 1, 4), 2, 1 << 28, "cuda")
    for error, wanted in ((None, (True, 123)), (torch.OutOfMemoryError, (False, 0))):

        def train(net: nn.Module, sizes: Any, device: torch.device, error: Any = error) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(program, "train", train)
        outcome = program.try_on_gpu(trial)
        assert (outcome.trains, outcome.peak) == wanted
    assert fractions == [0.25, 0.25]


@pytest.mark.full
def test_the_program_on_the_cpu(program: Any, tmp_path: Path) -> None:
    """The whole in small, with real trials: more blocks with genes, within the cap, as estimated."""
    small = ["--device", "cpu", "--caps", "64", "--width", "128", "--deepest", "24", "--forms", "dense", "ours"]
    assert program.main([*small, "--out", str(tmp_path)]) == 0
    dense, ours = read(tmp_path / program.CSV)
    assert int(ours["depth"]) > int(dense["depth"]) > 0
    for row in (dense, ours):
        assert int(row["measured"]) <= 64 << 20
        assert abs(int(row["estimated"]) / int(row["measured"]) - 1) <= 0.15
