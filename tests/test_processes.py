# SPDX-License-Identifier: Apache-2.0
"""Two processes against one: equal results to 1e-6, outputs written once, and no waiting for a process that failed.

What the processes run is in process_samples; they are started by torchrun, by accelerate, or here by hand where each
one's exit code is looked at.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_samples
import pytest
import torch

import pylearngene
from pylearngene import Learngene
from pylearngene.errors import ArgumentError, NonFiniteError, ProcessError
from pylearngene.files import read_tensors
from pylearngene.training import _joining, processes
from pylearngene.training.checkpoint import seed_process
from pylearngene.training.processes import ALONE, Processes, join

PROGRAM = Path(process_samples.__file__)
EXAMPLE = PROGRAM.parents[1] / "examples" / "own_loop.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SOLO = [sys.executable]
INSTALLED = Path(pylearngene.__file__).parents[1]  # where programs start: -m looks there first
LIMIT = 120  # of a loaded machine; a run that hangs is killed by it
TOLERANCE = 1e-6
KEY_BIAS = re.compile(r"(k_proj|key)\.bias")


def environment(**changes: str) -> dict[str, str]:
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYLEARNGENE_PROCESS_TIMEOUT": "15"}
    return {**os.environ, **fixed, "PYTHONPATH": str(INSTALLED), **changes}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(*command: object, **changes: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    options: dict[str, Any] = {"cwd": INSTALLED, "env": environment(**changes), "text": True}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher then ends what it started
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def by_hand(*command: object, **changes: str) -> list[tuple[int, str, str]]:
    """Start two processes as a launcher would; returns exit code, stdout and stderr of each."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, *(str(word) for word in command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=INSTALLED,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank), **changes),
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def job(name: str, folder: Path, **changes: str) -> list[Any]:
    """Let two processes do a job; returns what each found."""
    folder.mkdir(exist_ok=True)
    done = run(*TORCHRUN, PROGRAM, name, folder, **changes)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def alone(name: str, folder: Path) -> Any:
    """Do a job in this process."""
    folder.mkdir(exist_ok=True)
    return process_samples.JOBS[name](folder)


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["images"] == two["images"]
    assert two["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert two["accuracies"] == pytest.approx(one["accuracies"], rel=TOLERANCE)
    for score, other in zip(one["tests"], two["tests"], strict=True):
        assert (score["step"], score["accuracy"]) == (other["step"], other["accuracy"])
        assert other["loss"] == pytest.approx(score["loss"], rel=TOLERANCE)
    for name, values in one["state"].items():
        assert two["state"][name] == pytest.approx(values, abs=TOLERANCE), name


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Batches of 15 and of 1 sample, a teacher, clipping, evaluation, checkpoints; a group of the caller's as well."""
    one = alone("everything", tmp_path / "one")
    first, second = job("everything", tmp_path / "two")
    assert first == second
    for case in one:
        same(one[case], first[case])
    assert one["distilled"]["images"] == 2 * 4 * 15
    names = [sorted(path.name for path in (tmp_path / way / "state").iterdir()) for way in ("one", "two")]
    assert names[0] == names[1] == ["checkpoint.json", "checkpoint.safetensors"]


def test_a_loop_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain DistributedDataParallel around a gene-backed network, gradients accumulated under no_sync."""
    monkeypatch.delenv("RANK", raising=False)
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = run(*TORCHRUN, EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert [float(word) for word in done.stdout.split()] == pytest.approx(module.main(), rel=1e-12)


@pytest.mark.full
def test_every_way_of_wrapping(tmp_path: Path) -> None:
    one = alone("gradients", tmp_path)
    for found in job("gradients", tmp_path):
        assert found.keys() == one.keys()
        for way, expected in one.items():
            for name, values in expected.items():
                assert found[way][name] == pytest.approx(values, abs=1e-12), (way, name)


@pytest.mark.full
def test_resume_in_another_number_of_processes(tmp_path: Path) -> None:
    whole = alone("whole", tmp_path / "whole")
    alone("stopped", tmp_path / "more")
    first, second = job("resumed", tmp_path / "more")
    assert first == second
    same(whole, first)
    job("stopped", tmp_path / "fewer")
    same(whole, alone("resumed", tmp_path / "fewer"))


@pytest.mark.full
def test_resume_of_two_processes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws differently in each process; the checkpoint holds the generators of both."""
    monkeypatch.setenv("DROPOUT", "1")
    whole = job("whole-and-stopped", tmp_path)
    assert whole[0]["losses"] != alone("whole", tmp_path)["losses"]
    assert job("resumed", tmp_path) == whole
    assert "rng.cpu.1" in read_tensors(tmp_path / "state" / "checkpoint.safetensors")[0]


SMALL = process_samples.SMALL
COMMAND = ["-m", "pylearngene", "train", *SMALL, "--epochs", "2", "--json"]


def equal_outputs(one: Path, two: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    learngenes = [Learngene.from_pretrained(folder) for folder in (one, two)]
    tensors, others = (lg.genes for lg in learngenes)
    for name, tensor in tensors.items():
        # The loss does not depend on the biases of keys: their gradients are rounding alone, which AdamW scales up.
        if not KEY_BIAS.search(name):
            torch.testing.assert_close(others[name], tensor, rtol=0, atol=TOLERANCE)
    images = torch.randn(8, 1, 8, 8)
    logits = [lg.descend(depth=3)(images).logits for lg in learngenes]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What a process on its own writes and prints."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = run(*SOLO, *COMMAND, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def check_command(trained: tuple[Path, dict[str, Any]], done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)  # printed once
    assert facts["accuracy"] == trained[1]["accuracy"]
    assert facts["test_loss"] == pytest.approx(trained[1]["test_loss"], rel=TOLERANCE)
    equal_outputs(trained[0], out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.full
def test_train_under_torchrun(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    done = run(*TORCHRUN, *COMMAND, "--out", tmp_path / "two")
    check_command(trained, done, tmp_path / "two")
    again = by_hand(*COMMAND, "--out", tmp_path / "two")
    assert [code for code, _, _ in again] == [5, 5]
    said = "".join(text for _, _, text in again)
    assert said.count("pylearngene: out: expected a new folder") == said.count("\n") == 1
    equal_outputs(trained[0], tmp_path / "two")


@pytest.mark.full
def test_train_under_accelerate(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch = [*SOLO, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    done = run(*launch, "--multi_gpu", *options, *COMMAND, "--out", tmp_path / "two")
    check_command(trained, done, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2


@pytest.mark.full
def test_accelerate_on_the_cpu(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """With --cpu accelerate starts a single process, whatever number it is given."""
    pytest.importorskip("accelerate")
    launch = [*SOLO, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1"]
    done = run(*launch, "--mixed_precision", "no", "--dynamo_backend", "no", *COMMAND, "--out", tmp_path / "two")
    check_command(trained, done, tmp_path / "two")


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--depth", "0"], 2, "pylearngene: depth: expected at least 1, got 0"),
        (["--resume"], 2, "pylearngene: resume: expected checkpoint.safetensors in"),
        (["--lr", "1e30"], 3, "pylearngene: loss: expected a finite number, got nan at step"),
    ],
)
def test_errors_of_all_are_said_once(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    ended = by_hand(*COMMAND, "--out", tmp_path / "out", *options)
    assert [found for found, _, _ in ended] == [code, code]
    said = "".join(text for _, _, text in ended)
    assert said.startswith(message)
    assert said.count("\n") == 1
    assert [out for _, out, _ in ended] == ["", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_one_process_raises_in_the_command(tmp_path: Path) -> None:
    main, other = by_hand(PROGRAM, "train-raises", tmp_path)
    assert (main[0], other[0]) == (1, 1)
    assert main[2].endswith("pylearngene: processes: 1 of 2 failed: oops\n")
    assert other[2].endswith("pylearngene: internal error: oops\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_one_process_is_killed_in_the_command(tmp_path: Path) -> None:
    done = run(*TORCHRUN, PROGRAM, "train-killed", tmp_path)
    assert done.returncode == 1
    assert re.search("pylearngene: (processes: another one ended, or did not answer|interrupted)", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_one_process_raises_and_its_program_goes_on(tmp_path: Path) -> None:
    main, other = job("raise", tmp_path, PYLEARNGENE_PROCESS_TIMEOUT="60")
    assert (other["error"], other["text"]) == ("ZeroDivisionError", "oops")
    assert (main["error"], main["text"], main["code"]) == ("ProcessError", "processes: 1 of 2 failed: oops", 1)
    assert main["seconds"] < other["seconds"] + 2.5  # noticed at once, before the other's end


@pytest.mark.full
def test_one_process_hangs(tmp_path: Path) -> None:
    main, other = job("asleep", tmp_path, PYLEARNGENE_PROCESS_TIMEOUT="2")
    for found in (main, other):
        assert found["error"] == "ProcessError"
        assert found["text"] == "processes: another one ended, or did not answer in time"


@pytest.mark.full
def test_a_loss_that_is_not_finite_raises_everywhere_and_breaks_nothing(tmp_path: Path) -> None:
    main, other = job("wild", tmp_path)
    for found in (main, other):
        assert found["error"] == NonFiniteError.__name__
        assert found["text"] == "loss: expected a finite number, got nan at step 2 of train"
        assert len(found["after"]) == 8


@pytest.mark.full
def test_a_parameter_without_gradient(tmp_path: Path) -> None:
    for found in job("idle", tmp_path):
        assert found["error"] == ArgumentError.__name__
        assert found["text"] == (
            "model: expected every trainable parameter to take part in the loss when 2 processes train, got no "
            "gradient of idle; freeze it with requires_grad_(False)"
        )


@pytest.mark.full
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    shown, results = [], []
    for launcher in (SOLO, TORCHRUN):
        folder = tmp_path / str(len(launcher))
        folder.mkdir()
        done = run(*launcher, PROGRAM, "demo", folder)
        assert done.returncode == 0, done.stderr
        shown.append(json.loads(done.stdout))
        results.append(json.loads((folder / "out" / "results.json").read_text()))
        assert [path.name for path in folder.iterdir()] == ["out"]
    one, two = results
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert sorted(shown[0]) == sorted(shown[1])
    compare(one["runs"], two["runs"], "runs")
    compare(one["exports"], two["exports"], "exports")
    names = [sorted(path.name for path in (tmp_path / n / "out").iterdir()) for n in ("1", str(len(TORCHRUN)))]
    assert names[0] == names[1]


def compare(one: Any, two: Any, path: str) -> None:
    """Compare results: accuracies and counts exactly, losses to 1e-6, no times."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            compare(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two)
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            compare(first, second, f"{path}.{number}")
    elif path.endswith("difference"):
        assert max(one, two) <= 1e-5, path
    elif "loss" in path:
        assert two == pytest.approx(one, rel=TOLERANCE, abs=1e-7), path
    elif not path.endswith("seconds"):
        assert one == two, path


def test_a_process_on_its_own_sets_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # what accelerate sets for one process
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert join() is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE
    assert not torch.distributed.is_initialized()
    model, loss = torch.nn.Linear(2, 2), torch.ones(())
    assert ALONE.wrap(model) is model
    assert ALONE.scaled(loss, 1.0) is loss


@pytest.mark.parametrize("count", [1, 2, 15, 128])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_make_up_the_batch(count: int, world: int) -> None:
    whole = torch.randperm(200)[:count]
    shares = [Processes(rank, world).share(whole) for rank in range(world)]
    assert torch.equal(torch.cat([part for part, weight in shares if weight]), whole)
    assert sum(weight for _, weight in shares) == pytest.approx(1.0)
    assert all(len(part) for part, _ in shares)
    # the mean over the batch is the weighted mean over the parts
    values = torch.randn(200, dtype=torch.float64)
    mean = sum(Processes(0, world).scaled(values[part].mean(), weight) for part, weight in shares) / world
    torch.testing.assert_close(torch.as_tensor(mean), values[whole].mean())


def test_every_process_and_step_has_its_own_seed() -> None:
    torch.manual_seed(7)
    expected, seen = torch.rand(4), set()
    for rank, step in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 10**6), (4095, 10**6)):
        seed_process(7, rank, step)
        drawn = torch.rand(4)
        assert torch.equal(drawn, expected) == (rank == step == 0)
        seen.add(tuple(drawn.tolist()))
    assert len(seen) == 6


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def launched(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**LAUNCHED, "MASTER_PORT": free_port(), **changes}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number in the environment, got 'two'"),
        ({"RANK": "-1"}, "RANK: expected a whole number in the environment, got '-1'"),
        ({_joining.TIMEOUT: "soon"}, "PYLEARNGENE_PROCESS_TIMEOUT: expected seconds above 0, got 'soon'"),
        ({_joining.TIMEOUT: "0"}, "PYLEARNGENE_PROCESS_TIMEOUT: expected seconds above 0, got '0'"),
    ],
)
def test_environment_of_no_launcher(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str) -> None:
    launched(monkeypatch, **changes)
    with pytest.raises(ArgumentError) as error:
        join()
    assert str(error.value) == message


def test_the_others_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="0", PYLEARNGENE_PROCESS_TIMEOUT="1")
    with pytest.raises(ProcessError, match=r"processes: 2 of them could not meet within 1 s \("):
        join()
    assert not torch.distributed.is_initialized()


def test_a_group_closed_by_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_joined", Processes(1, 2, store=object()))
    with pytest.raises(ProcessError, match="processes: their group was closed by a failure; start all of them again"):
        join()


def test_a_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ProcessError, match=r"expected a torch with torch.distributed, this one was built without it"):
        join()


def test_devices_of_several_processes() -> None:
    cpu, two = torch.device("cpu"), Processes(1, 2, local_rank=1)
    assert two.device(cpu) == cpu
    assert ALONE.device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(ArgumentError, match="device: expected cpu, or cuda with a GPU per process, got cuda:1 and"):
        two.device(torch.device("cuda:1"))
