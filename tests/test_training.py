# SPDX-License-Identifier: Apache-2.0
"""Losses against hand-computed values, the schedule, resume bit for bit, and measured memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pylearngene.data import Dataset, Split
from pylearngene.errors import ArgumentError, GeneFileError, NonFiniteError, ShapeError
from pylearngene.files import read_tensors, save_tensors
from pylearngene.methods import TLEG
from pylearngene.networks import auxiliary
from pylearngene.training import (
    DistillationLoss,
    TrainConfig,
    evaluate,
    learning_rate,
    logits_of,
    peak_bytes,
    predict,
    resident_bytes,
    train,
)
from pylearngene.training import loop as loop_module

Z = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
T = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
Y = torch.tensor([0, 1])


class Net(nn.Module):
    """Two equal blocks with dropout, so that the random state matters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = x + self.drop(torch.tanh(block(x)))
        return self.head(x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def toy(samples: int = 70) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(samples, 1, 4, 4, generator=generator)
    labels = (images.mean(dim=(1, 2, 3)) * 6).round().long().clamp(-1, 1) + 1
    return Dataset("toy", Split(images, labels), Split(images[:20], labels[:20]), ("a", "b", "c"), "made here")


def cross_entropy(row: list[float], label: int) -> float:
    return math.log(sum(math.exp(value) for value in row)) - row[label]


def divergence(teacher: list[float], student: list[float], tau: float) -> float:
    def soft(row: list[float]) -> list[float]:
        total = sum(math.exp(value / tau) for value in row)
        return [math.exp(value / tau) / total for value in row]

    return sum(p * math.log(p / q) for p, q in zip(soft(teacher), soft(student), strict=True))


def hard_and_soft() -> tuple[float, float]:
    rows = [([2.0, 0.0], [0.0, 0.0], 0), ([0.0, 0.0], [1.0, 0.0], 1)]
    ce = sum(cross_entropy(z, y) for z, _, y in rows) / 2
    return ce, sum(divergence(t, z, 2.0) for z, t, _ in rows)


@pytest.mark.parametrize(("kl_norm", "norm"), [("batchmean", 2), ("numel", 4)])
def test_soft_loss_by_hand(kl_norm: str, norm: int) -> None:
    ce, kl = hard_and_soft()
    got = float(DistillationLoss(0.25, 2.0, "soft", kl_norm)(Z, Y, T))
    assert got == pytest.approx(0.75 * ce + 0.25 * 2.0**2 * kl / norm, rel=1e-6)


def test_pure_soft_loss_ignores_labels() -> None:
    loss = DistillationLoss(1.0, 2.0)
    assert float(loss(Z, Y, T)) == float(loss(Z, 1 - Y, T)) == pytest.approx(4.0 * hard_and_soft()[1] / 2, rel=1e-6)


def test_hard_loss_by_hand() -> None:
    ce = hard_and_soft()[0]
    hard = (cross_entropy([2.0, 0.0], 0) + cross_entropy([0.0, 0.0], 0)) / 2
    assert float(DistillationLoss(0.3, kind="hard")(Z, Y, T)) == pytest.approx(0.7 * ce + 0.3 * hard, rel=1e-6)


def test_no_teacher_is_cross_entropy() -> None:
    ce = pytest.approx(hard_and_soft()[0], rel=1e-6)
    assert float(DistillationLoss(kind="none")(Z, Y)) == ce
    assert float(DistillationLoss(alpha=0.0)(Z, Y)) == ce
    assert float(DistillationLoss(alpha=0.0)(Z, Y, T)) == ce


def test_low_precision_logits_give_a_float32_loss() -> None:
    assert DistillationLoss()(Z.bfloat16(), Y, T.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha: expected 0 to 1, got 1.5"),
        ({"alpha": math.nan}, "alpha: expected 0 to 1, got nan"),
        ({"tau": 0.0}, "tau: expected a finite number above 0, got 0.0"),
        ({"kind": "warm"}, "kind: expected one of soft, hard, none, got 'warm'"),
        ({"kl_norm": "sum"}, "kl_norm: expected one of batchmean, numel, got 'sum'"),
    ],
)
def test_loss_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        DistillationLoss(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((Z[0], Y, T), ShapeError, r"logits: expected \[B, C\], got \[2\]"),
        ((Z, Y[:1], T), ShapeError, r"labels: expected \[2\], got \[1\]"),
        ((Z, Y, T[:1]), ShapeError, r"teacher_logits: expected \[2, 2\], got \[1, 2\]"),
        ((Z, Y, None), ArgumentError, "teacher_logits: expected a tensor for kind='soft', got None"),
    ],
)
def test_loss_arguments(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        DistillationLoss()(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0.0}, "epochs: expected a finite number above 0, got 0.0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"lr": math.inf}, "lr: expected a finite number above 0, got inf"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0, got -1.0"),
        ({"warmup": 2.0}, "warmup: expected 0 to 1, got 2.0"),
        ({"clip": 0.0}, "clip: expected a number above 0, or None, got 0.0"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*31 - 1, got -1"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected at least 0, got -1"),
    ],
)
def test_config_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(**options)


def test_steps() -> None:
    config = TrainConfig(epochs=1.5, batch=16)
    assert (config.steps_per_epoch(70), config.total_steps(70)) == (4, 6)
    assert TrainConfig(epochs=0.01, batch=100).total_steps(70) == 1


def test_schedule() -> None:
    rates = [learning_rate(step, 10, 2.0, 0.2) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.0 < rates[-1] < 0.1
    assert learning_rate(3, 4, 1.0, 1.0) == 1.0


def test_training_learns_and_reports() -> None:
    data, model = toy(), net()
    before = evaluate(model, data.test)
    state = torch.get_rng_state()
    history = train(model, data, TrainConfig(epochs=20, batch=16, lr=1e-2, evaluate=True), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(model, data.test).loss < before.loss
    assert len(history.losses) == len(history.accuracies) == 80
    assert history.images == 80 * 16
    assert len(history.tests) == 20
    assert history.tests[-1] == {"step": 80, **vars(evaluate(model, data.test))}
    assert history.cpu_seconds > 0 < history.peak_bytes


def test_equal_configurations_give_equal_bits_and_seeds_matter() -> None:
    def losses(seed: int) -> list[float]:
        return train(net(), toy(), TrainConfig(epochs=1, batch=16, seed=seed), progress=False).losses

    assert losses(1) == losses(1) != losses(2)


def test_each_epoch_has_its_own_order_without_repeats() -> None:
    model, seen = net(), []
    model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    train(model, toy(64), TrainConfig(epochs=2, batch=16), progress=False)
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert not torch.equal(first, second)
    everything = toy(64).train.images.flatten(1).sum(dim=1).sort().values
    for epoch in (first, second):
        assert torch.equal(epoch.sum(dim=1).sort().values, everything)


def test_teacher_network_and_its_logits_are_the_same() -> None:
    teacher, config = net(3), TrainConfig(epochs=1, batch=16, loss=DistillationLoss(0.5, 2.0))
    logits = predict(teacher, toy().train.images)
    by_network = train(net(), toy(), config, teacher=teacher, progress=False).losses
    assert by_network == train(net(), toy(), config, teacher=logits, progress=False).losses
    assert by_network != train(net(), toy(), config, teacher=logits.flip(0), progress=False).losses
    assert teacher.training


def identity(model: nn.Module) -> nn.Module:
    return model


def tleg(model: nn.Module) -> nn.Module:
    return auxiliary(model, TLEG())


@pytest.mark.parametrize("make", [identity, tleg])
@pytest.mark.parametrize("stop_at", [4, 6], ids=["after an epoch", "inside an epoch"])
def test_resume_bit_for_bit(tmp_path: Path, make: Callable[[nn.Module], nn.Module], stop_at: int) -> None:
    config = TrainConfig(epochs=2, batch=16, lr=1e-2, seed=3)
    straight, stopped, resumed = (make(net()) for _ in range(3))
    whole = train(straight, toy(), config, progress=False)
    train(stopped, toy(), config, out=tmp_path, stop_at=stop_at, progress=False)
    torch.manual_seed(99)
    history = train(resumed, toy(), config, out=tmp_path, resume=True, progress=False)
    assert history.losses == whole.losses
    assert history.images == whole.images
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_checkpoints_are_written_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(loop_module, "save_checkpoint", lambda *arguments: steps.append(len(arguments[3].losses)))
    train(net(), toy(), TrainConfig(epochs=2.5, batch=16), out=tmp_path, progress=False)
    train(net(), toy(), TrainConfig(epochs=2, batch=16, checkpoint_every=3), out=tmp_path, progress=False)
    assert steps == [4, 8, 10, 3, 6, 8]


def checkpoint(folder: Path, **changes: Any) -> Path:
    train(net(), toy(), TrainConfig(epochs=1, batch=16, **changes), out=folder, stop_at=2, progress=False)
    return folder / "checkpoint.safetensors"


def resume(folder: Path, model: nn.Module | None = None, **changes: Any) -> None:
    config = TrainConfig(epochs=1, batch=16, **changes)
    train(net() if model is None else model, toy(), config, out=folder, resume=True, progress=False)


def test_checkpoint_can_be_read_by_people(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    facts = json.loads((tmp_path / "checkpoint.json").read_text())
    assert facts["run"]["samples"] == 70
    assert len(facts["history"]["losses"]) == 2


def test_resume_of_other_options(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(ArgumentError, match=r"resume: expected lr=0.001 as in the checkpoint, got 0.5"):
        resume(tmp_path, lr=0.5)


def test_resume_without_checkpoint_or_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"resume: expected checkpoint.safetensors in .*, got none"):
        resume(tmp_path)
    with pytest.raises(ArgumentError, match="resume: expected a folder `out` with a checkpoint, got None"):
        train(net(), toy(), TrainConfig(), resume=True)


def test_a_checkpoint_is_not_overwritten_by_a_new_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"out: .* holds a checkpoint; resume it, or remove the folder"):
        train(net(), toy(), TrainConfig(), out=tmp_path)
    assert path.read_bytes() == before


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors, metadata = read_tensors(path)
    facts = json.loads(metadata["checkpoint"])
    change(tensors, facts)
    path.write_bytes(save_tensors(tensors, {"checkpoint": json.dumps(facts)}))


def poison(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    tensors["model.stem.weight"][0, 0] = math.nan


def newer(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    facts["format_version"] = 2


def without_momentum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    del tensors["optimizer.exp_avg.head.bias"]


def without_weight(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    del tensors["model.head.bias"]


def without_history(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    del facts["history"]


def without_rng(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    del tensors["rng.cpu"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (poison, NonFiniteError, "model.stem.weight"),
        (newer, GeneFileError, "expected format_version 1, got 2"),
        (without_momentum, GeneFileError, "expected step, exp_avg, exp_avg_sq of head.bias, got step, exp_avg_sq"),
        (without_weight, GeneFileError, "expected the tensors of this model, got others"),
        (without_history, GeneFileError, "expected run, history and rng.cpu, got others"),
        (without_rng, GeneFileError, "expected run, history and rng.cpu, got others"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, change: Any, kind: type[Exception], message: str) -> None:
    rewrite(checkpoint(tmp_path), change)
    with pytest.raises(kind, match=message):
        resume(tmp_path)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(GeneFileError, match="truncated"):
        resume(tmp_path)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(GeneFileError, match="expected the tensors of this model, got others"):
        resume(tmp_path, model=auxiliary(net(), TLEG()))


def test_missing_and_wrong_teachers() -> None:
    config = TrainConfig(loss=DistillationLoss())
    with pytest.raises(ArgumentError, match="teacher: expected a network or logits for kind='soft', got None"):
        train(net(), toy(), config)
    with pytest.raises(ShapeError, match=r"teacher: expected logits \[70, C\], got \[3, 3\]"):
        train(net(), toy(), config, teacher=torch.zeros(3, 3))
    with pytest.raises(NonFiniteError, match="teacher: expected finite logits, got NaN or Inf"):
        train(net(), toy(), config, teacher=torch.full((70, 3), math.nan))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = net()
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="loss: expected a finite number, got nan at step 0 of broken"):
        train(model, toy(), TrainConfig(name="broken"), progress=False)


def test_outputs_without_logits() -> None:
    with pytest.raises(ShapeError, match=r"model: expected an output of logits \[B, C\], got \[2\]"):
        logits_of(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"model: expected an output of logits \[B, C\], got dict"):
        logits_of({})


def test_predict_keeps_modes() -> None:
    model = net()
    model.blocks.eval()
    assert predict(model, toy().train.images, batch=32).shape == (70, 3)
    assert model.training
    assert not model.blocks.training


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(epochs=1, batch=16, name="bar")
    train(net(), toy(), config, progress=True)
    shown = capfd.readouterr().err
    for part in ("bar", "loss", "accuracy", "images/s", "peak", "MiB"):
        assert part in shown
    train(net(), toy(), config)
    assert capfd.readouterr().err == ""


def test_peak_bytes_is_exact() -> None:
    def two_then_one() -> Tensor:
        first = torch.empty(1 << 18)
        second = torch.empty(1 << 18)
        del first
        third = torch.empty(1 << 17)
        return second + 0 if third.numel() == 0 else second

    assert peak_bytes(two_then_one) == 2 << 20
    assert peak_bytes(lambda: None) == 0
    kept = [torch.empty(1 << 18)]
    assert peak_bytes(kept.clear) == 0


def test_peak_bytes_is_silent_and_survives_errors(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"):
        peak_bytes(fail)
    peak_bytes(lambda: torch.zeros(4))
    assert capfd.readouterr().err == ""


def test_resident_bytes_grows_with_what_is_touched() -> None:
    before = resident_bytes()
    block = torch.ones(max(before, 1 << 26) // 2)
    assert resident_bytes() >= before > 0
    assert block[-1] == 1


def test_history_is_json() -> None:
    history = train(net(), toy(), replace(TrainConfig(), epochs=0.5, batch=16), progress=False)
    assert json.loads(json.dumps(history.to_json()))["losses"] == history.losses
