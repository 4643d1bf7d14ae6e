# SPDX-License-Identifier: Apache-2.0
"""The training loop: data in memory, one device per process, resumable at every step.

Two runs of equal configuration give equal bits, and so do a whole run and one stopped and resumed. It leaves
out augmentation, which is why a teacher's logits are computed once, before the first step. What several processes
say to each other is in `processes`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from pylearngene.data import Dataset
from pylearngene.errors import ArgumentError, NonFiniteError, ShapeError
from pylearngene.trainable import param_groups
from pylearngene.training.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
    seed_process,
)
from pylearngene.training.config import History, TrainConfig
from pylearngene.training.evaluate import device_of, evaluate, logits_of, predict
from pylearngene.training.memory import resident_bytes
from pylearngene.training.optim import learning_rate
from pylearngene.training.processes import Processes, join


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    teacher: nn.Module | Tensor | None = None,
    out: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    stop_at: int | None = None,
) -> History:
    """Train a classifier in place.

    Started in several processes (torchrun, accelerate launch, or a `torch.distributed` group of the caller's), each
    computes its part of every batch and all end with the same network. All call this with equal arguments.

    Args:
        model: its output is logits [B, C] or has a field `logits`.
        data: images and labels; moved to the model's device batch by batch.
        config: see `TrainConfig`.
        teacher: a network in the same terms, or its logits on the training split [N, C]; needed by a
            distillation loss. A network is run once over the split, in evaluation mode.
        out: folder for checkpoints, written by the first process and read by all; None writes none.
        resume: continue from the checkpoint in `out`, in as many processes as there are now.
        progress: show a bar on stderr; None shows it on a terminal only.
        stop_at: stop after this many steps in all, with a checkpoint; the schedule stays that of the whole run.

    Returns:
        The `History` of all steps, those before a resume included.

    Raises:
        ArgumentError: a teacher is missing, `resume` without a checkpoint or with other options, or a run
            without `resume` into a folder that has one; in several processes, a trainable parameter has no gradient.
        NonFiniteError: the loss is NaN or Inf, with the step; in every process.
        ProcessError: another process failed, or did not answer within PYLEARNGENE_PROCESS_TIMEOUT seconds (600).
        ShapeError: the teacher's logits do not fit the data.

    Numerics: AdamW in the parameters' dtype; deterministic on the CPU. The caller's random state is untouched. Several
    processes see the batches of one process and differ from it by rounding, but for dropout, and for batch
    normalization, whose statistics are of a process's part.
    """
    processes = join()
    with processes.one_fate():
        processes.on_main(lambda: _check_folder(out, resume))
        devices = [device_of(model)] if device_of(model).type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            seed_process(config.seed, processes.rank)
            run = _Run(model, data, config, _teacher_logits(teacher, data, config), out, processes)
            if resume and out is not None:
                run.history = load_checkpoint(out, model, run.optimizer, run.identity, processes)
            run.go(progress, stop_at)
    return run.history


def _check_folder(out: Path | None, resume: bool) -> None:
    if out is not None and not resume and has_checkpoint(out):
        raise ArgumentError(f"out: {out} holds a checkpoint; resume it, or remove the folder to start again")
    if resume and out is None:
        raise ArgumentError("resume: expected a folder `out` with a checkpoint, got None")


def _teacher_logits(teacher: nn.Module | Tensor | None, data: Dataset, config: TrainConfig) -> Tensor | None:
    if not config.loss.needs_teacher:
        return None
    if teacher is None:
        raise ArgumentError(f"teacher: expected a network or logits for kind={config.loss.kind!r}, got None")
    logits = teacher if isinstance(teacher, Tensor) else predict(teacher, data.train.images, sharded=True)
    if logits.ndim != 2 or logits.shape[0] != len(data.train):
        raise ShapeError(f"teacher: expected logits [{len(data.train)}, C], got {list(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("teacher: expected finite logits, got NaN or Inf")
    return logits


@dataclass
class _Run:
    """State of one call of `train`."""

    model: nn.Module
    data: Dataset
    config: TrainConfig
    teacher: Tensor | None
    out: Path | None
    processes: Processes

    def __post_init__(self) -> None:
        samples = len(self.data.train)
        self.history = History(self.config.name)
        self.device = device_of(self.model)
        self.total = self.config.total_steps(samples)
        self.per_epoch = self.config.steps_per_epoch(samples)
        groups = param_groups(self.model, self.config.lr, weight_decay=self.config.weight_decay)
        self.forward = self.processes.wrap(self.model)
        self.optimizer = AdamW(groups, lr=self.config.lr)
        self.identity: dict[str, Any] = {**self.config.to_config(), "data": self.data.name, "samples": samples}
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def go(self, progress: bool | None, stop_at: int | None) -> None:
        """Run the steps that are left."""
        self.model.train()
        begun = len(self.history.losses)
        end = self.total if stop_at is None else min(self.total, stop_at)
        hide = None if progress is None else not progress
        hide = hide if self.processes.main else True
        before = (self.history.seconds, self.history.cpu_seconds)
        clock, cpu = time.perf_counter(), time.process_time()
        with tqdm(desc=self.config.name, total=self.total, initial=begun, unit="step", disable=hide) as bar:
            for step in range(begun, end):
                self._step(step)
                self.history.seconds = before[0] + time.perf_counter() - clock
                self.history.cpu_seconds = before[1] + self.processes.sum([time.process_time() - cpu])[0]
                self._show(bar, step + 1 - begun, time.perf_counter() - clock)
                self._after(step + 1, end)
        self.history.peak_bytes = _peak(self.device)

    def _step(self, step: int) -> None:
        images, labels, teacher, weight = self._batch(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total, self.config.lr, self.config.warmup)
        logits = logits_of(self.forward(images))
        loss = self.config.loss(logits, labels, teacher)
        right = (logits.detach().argmax(dim=-1) == labels).float().mean()
        value, accuracy = self.processes.mean([float(loss.detach()), float(right)], weight)
        if not math.isfinite(value):
            raise NonFiniteError(f"loss: expected a finite number, got {value} at step {step} of {self.config.name}")
        self.optimizer.zero_grad(set_to_none=True)
        self.processes.scaled(loss, weight).backward()
        self.processes.check_gradients(self.model)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.history.losses.append(value)
        self.history.accuracies.append(accuracy)
        self.history.images += min(self.config.batch, len(self.data.train))

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """This process's images, labels and teacher's logits of a step, and their weight in the batch.

        The order depends on seed and epoch alone.
        """
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.config.seed << 20) + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.data.train), generator=generator)
        whole = self.order[position * self.config.batch : (position + 1) * self.config.batch]
        index, weight = self.processes.share(whole)
        teacher = None if self.teacher is None else self.teacher[index].to(self.device)
        split = self.data.train
        return split.images[index].to(self.device), split.labels[index].to(self.device), teacher, weight

    def _after(self, done: int, end: int) -> None:
        """Measure and write what is due after `done` steps."""
        last, whole = done == end, done % self.per_epoch == 0
        if self.config.evaluate and (done == self.total or whole):
            score = evaluate(self.model, self.data.test, sharded=True)
            self.history.tests.append({"step": done, "accuracy": score.accuracy, "loss": score.loss})
        every = self.config.checkpoint_every
        if self.out is not None and (last or (done % every == 0 if every else whole)):
            self._save(self.out, random_states(self.processes))

    def _save(self, out: Path, states: dict[str, Tensor]) -> None:
        self.processes.on_main(
            lambda: save_checkpoint(out, self.model, self.optimizer, self.history, self.identity, states)
        )

    def _show(self, bar: tqdm[None], steps: int, seconds: float) -> None:
        rate = steps * self.config.batch / max(seconds, 1e-9)
        loss, right = self.history.losses[-1], self.history.accuracies[-1]
        text = f"loss {loss:.3f}, accuracy {right:.2f}, {rate:,.0f} images/s"
        if not bar.disable:
            bar.set_postfix_str(f"{text}, peak {_peak(self.device) / 2**20:,.0f} MiB", refresh=False)
        bar.update()


def _peak(device: torch.device) -> int:
    """Peak memory in bytes: the allocator's on a GPU, the process's resident set on the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else resident_bytes()
