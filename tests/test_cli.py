# SPDX-License-Identifier: Apache-2.0
"""The command line: outputs, exit codes, JSON, folders that appear whole or not at all; the demo has its own file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import pylearngene
from pylearngene import Learngene
from pylearngene.cli import app, env, inspect, models
from pylearngene.cli import train as train_command
from pylearngene.cli._output import plain, whole_folder
from pylearngene.cli.report.table import text_table
from pylearngene.errors import (
    ArgumentError,
    BusyError,
    GeneFileError,
    NonFiniteError,
    PylearngeneError,
    TooLargeError,
    WriteError,
)
from pylearngene.files import read_tensors
from pylearngene.training import loop

pytest.importorskip("transformers")
SMALL = ["--data", "digits", "--images", "64", "--width", "8", "--heads", "2", "--depth", "2", "--batch", "16"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(out: Path, *arguments: object) -> Result:
    return call("train", "--out", out, "--epochs", "1", *SMALL, *arguments)


def test_env_table() -> None:
    shown = call("env")
    assert shown.exit_code == 0
    assert f"pylearngene {pylearngene.__version__}" in shown.stdout
    for report in pylearngene.backends():
        assert report.reason in shown.stdout
        assert report.command in shown.stdout


def test_env_json() -> None:
    facts = json.loads(call("env", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] or facts["versions"]["torch"]
    assert facts["machine"]["cores"] >= 1
    assert [row["op"] for row in facts["backends"]] == [report.op for report in pylearngene.backends()]


def test_env_says_how_to_get_a_faster_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    report = pylearngene.BackendReport("expansion", "cpu", "reference", "no compiler was found", "pip install it")
    monkeypatch.setattr(env, "backends", lambda: [report])
    assert "faster expansion on cpu: pip install it" in call("env").stdout


def test_train_learngene_and_inspect(tmp_path: Path) -> None:
    out = tmp_path / "genes"
    shown = train(out, "--json")
    assert shown.exit_code == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert (facts["steps"], facts["method"], facts["config"]["lr"]) == (4, "tleg", 2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genes"]
    lg = Learngene.from_pretrained(out)
    assert facts["parameters"] == lg.num_parameters
    assert lg.descend(depth=3)(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 10)

    listed = json.loads(call("inspect", out, "--json").stdout)
    assert listed["method"]["name"] == "tleg"
    assert listed["parameters"] == lg.num_parameters
    assert {row["name"] for row in listed["tensors"] if row["group"] == "gene"} == set(lg.genes)
    assert listed["bytes"] == 4 * lg.num_parameters == sum(row["bytes"] for row in listed["tensors"])
    text = call("inspect", out).stdout
    assert f"{lg.num_parameters:,}" in text
    for name in lg.genes:
        assert name in text


def test_train_ancestry_then_distil(tmp_path: Path) -> None:
    assert train(tmp_path / "ancestry", "--method", "none").exit_code == 0
    assert models.load_classifier(tmp_path / "ancestry").config.num_hidden_layers == 2  # type: ignore[union-attr]
    shown = train(tmp_path / "genes", "--method", "share-init", "--teacher", tmp_path / "ancestry", "--kind", "hard")
    assert shown.exit_code == 0, shown.stderr
    assert "accuracy" in shown.stdout
    record = json.loads((tmp_path / "genes" / "training.json").read_text())
    assert record["config"]["loss"]["kind"] == "hard"
    assert len(record["history"]["losses"]) == 4
    assert Learngene.from_pretrained(tmp_path / "genes").method.name == "share_init"


def test_train_dry_run_writes_nothing(tmp_path: Path) -> None:
    shown = train(tmp_path / "genes", "--dry-run", "--json")
    assert json.loads(shown.stdout)["steps"] == 4
    assert list(tmp_path.iterdir()) == []


def test_interrupted_training_resumes_to_equal_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tmp_path / "straight", "--epochs", "2").exit_code == 0
    real, calls = loop.evaluate, []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    stopped = train(tmp_path / "resumed", "--epochs", "2")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("pylearngene: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.checkpoint", "straight"]
    again = train(tmp_path / "resumed", "--epochs", "2")
    assert again.exit_code == 2
    assert "holds a checkpoint; resume it, or remove the folder" in again.stderr
    assert train(tmp_path / "resumed", "--epochs", "2", "--resume").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "straight"]
    straight, resumed = (read_tensors(tmp_path / name / "gene.safetensors")[0] for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "genes"
    assert train(out).exit_code == 0
    before = (out / "gene.safetensors").read_bytes()
    refused = train(out)
    assert refused.exit_code == 5
    assert "out: expected a new folder" in refused.stderr
    assert (out / "gene.safetensors").read_bytes() == before
    assert train(out, "--overwrite", "--seed", "1").exit_code == 0
    assert (out / "gene.safetensors").read_bytes() != before


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused = train(tmp_path / "mine", "--overwrite")
    assert refused.exit_code == 5
    assert "which is something else" in refused.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "method: expected one of tleg, ldr, sws, share-init, none, got 'magic'"),
        (["--depth", "0"], "depth: expected at least 1, got 0"),
        (["--width", "9"], "width: expected a multiple of heads=2, got 9"),
        (["--epochs", "0"], "epochs: expected a finite number above 0, got 0.0"),
        (["--images", "5000"], "count: expected 1 to 1400 samples, got 5000"),
        (["--teacher", "/nowhere"], "teacher: expected a folder, got /nowhere"),
        (["--data", "/nowhere"], "data: expected a folder, got /nowhere"),
        (["--resume"], "resume: expected checkpoint.safetensors in"),
        (["--device", "abacus"], "device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "device: expected one that is here, got 'meta'"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    shown = train(tmp_path / "out", *arguments)
    assert shown.exit_code == 2
    assert shown.stderr.startswith(f"pylearngene: {message}")
    assert shown.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_are_the_parser_s() -> None:
    assert call("train").exit_code == 2
    assert call("nothing").exit_code == 2


def test_a_folder_without_classifier(tmp_path: Path) -> None:
    with pytest.raises(GeneFileError, match="holds no image classifier that can be loaded"):
        models.load_classifier(tmp_path)


def test_small_vit_sizes() -> None:
    with pytest.raises(ArgumentError, match="image_size: expected a multiple of 4, got 10"):
        models.small_vit(10, 2, depth=1)
    with pytest.raises(ArgumentError, match="classes: expected at least 1, got 0"):
        models.small_vit(8, 0, depth=1)
    state = torch.get_rng_state()
    one, two = (models.small_vit(8, 2, depth=1, dim=8, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"transformers: .*`pip install pylearngene\[hf\]` installs it"):
        models.transformers()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PylearngeneError("a"), 2),
        (NonFiniteError("a"), 3),
        (TooLargeError("a"), 4),
        (WriteError("a"), 5),
        (BusyError("a"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    monkeypatch.setattr(inspect.Learngene, "from_pretrained", raising(error))
    shown = call("inspect", "folder")
    assert shown.exit_code == code
    assert shown.stdout == ""
    assert shown.stderr == ("pylearngene: interrupted\n" if code == 130 else "pylearngene: a\n")


def test_unexpected_exceptions_are_internal_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.Learngene, "from_pretrained", raising(ZeroDivisionError("oops")))
    shown = call("inspect", "folder")
    assert shown.exit_code == 1
    assert "Traceback" in shown.stderr
    assert shown.stderr.endswith("pylearngene: internal error: oops\n")


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_inspect_of_a_damaged_folder(tmp_path: Path) -> None:
    shown = call("inspect", tmp_path)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("pylearngene: ")
    assert shown.stderr.count("\n") == 1


def test_whole_folder_replaces_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("one", "two"):
        with whole_folder(target, "mark") as folder:
            (folder / "mark").write_text(text)
            assert not target.exists() or (target / "mark").read_text() == "one"
        assert (target / "mark").read_text() == text
    with pytest.raises(ZeroDivisionError), whole_folder(target, "mark") as folder:
        (folder / "mark").write_text(str(1 // 0))
    assert (target / "mark").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_whole_folder_recovers_from_a_death_between_the_renames(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "mark").write_text("former")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out", "mark"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "mark").read_text() == "former"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        whole_folder(tmp_path / "out", "mark"),
        pytest.raises(BusyError, match=r"out: .* is being written by another process"),
        whole_folder(tmp_path / "out", "mark"),
    ):
        pass


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"), whole_folder(tmp_path / "file" / "out", "mark"):
        pass
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(WriteError, match="which is something else"), whole_folder(tmp_path / "link", "mark"):
        pass


def test_plain_values() -> None:
    assert plain({2: (1.5, float("nan"), Path("a"))}) == {"2": [1.5, None, "a"]}


def test_text_table() -> None:
    assert text_table(["a", "bb"], [["1", "2"], ["10", "3"]], right={0}) == " a  bb\n--  --\n 1  2\n10  3"


def test_as_a_process(tmp_path: Path) -> None:
    source = str(Path(pylearngene.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, "-m", "pylearngene"]
    done = subprocess.run(
        [*command, "env", "--json"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["pylearngene"] == pylearngene.__version__
    failed = subprocess.run(
        [*command, "inspect", "nowhere"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("pylearngene: ")


def test_methods_of_the_command_exist() -> None:
    assert {name: method().name for name, method in train_command.METHODS.items()} == {
        "tleg": "tleg",
        "ldr": "ldr",
        "sws": "sws",
        "share-init": "share_init",
    }
