# SPDX-License-Identifier: Apache-2.0
"""`pylearngene train`: train an ancestry network, or a learngene by distillation from one.

The output folder appears only when training is done; until then a checkpoint lies beside it, in `OUT.checkpoint`,
from which `--resume` continues bit for bit. Under torchrun or `accelerate launch` the processes share every batch; the
first one writes and prints.
"""

from __future__ import annotations

import json as jsonlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from pylearngene import methods
from pylearngene.cli._app import DataOption, DownloadOption, InstallOption, JsonOption, device_of, join
from pylearngene.cli._output import check_replaceable, plain, print_json, whole_folder
from pylearngene.cli.models import load_classifier, small_vit
from pylearngene.cli.report.machine import commit, machine, versions
from pylearngene.data import DIGITS_BANNER, Dataset, load
from pylearngene.errors import ArgumentError, WriteError
from pylearngene.networks import auxiliary, extract
from pylearngene.training import DistillationLoss, History, TrainConfig, evaluate, processes
from pylearngene.training import train as run_training

METHODS = {"tleg": methods.TLEG, "ldr": methods.LDR, "sws": methods.SWS, "share-init": methods.ShareInit}
MARK = "training.json"


@dataclass(frozen=True)
class TrainJob:
    """Everything `pylearngene train` was asked to do."""

    out: Path
    method: str
    teacher: Path | None
    depth: int
    width: int
    heads: int
    config: TrainConfig
    resume: bool
    overwrite: bool
    device: str

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint, beside the output."""
        return self.out.with_name(f"{self.out.name}.checkpoint")


def command(
    out: Annotated[Path, typer.Option(help="Output folder; appears when training is done.")],
    method: Annotated[str, typer.Option(help="tleg, ldr, sws, share-init; none: a plain ancestry network.")] = "tleg",
    teacher: Annotated[Path | None, typer.Option(help="Folder of a transformers classifier to learn from.")] = None,
    depth: Annotated[int, typer.Option(help="Number of blocks.")] = 6,
    width: Annotated[int, typer.Option(help="Width of the network.")] = 64,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    epochs: Annotated[float, typer.Option(help="Passes over the images.")] = 5.0,
    batch: Annotated[int, typer.Option(help="Images per step, of all processes together.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the start, the data order and dropout.")] = 0,
    alpha: Annotated[float, typer.Option(help="Share of the teacher in the loss, 0 to 1.")] = 0.5,
    tau: Annotated[float, typer.Option(help="Temperature of the soft loss.")] = 2.0,
    kind: Annotated[str, typer.Option(help="Distillation: soft or hard.")] = "soft",
    kl_norm: Annotated[str, typer.Option(help="Divide the soft loss by batchmean or numel.")] = "batchmean",
    images: Annotated[int | None, typer.Option(help="Use this many training images; all if not given.")] = None,
    data: DataOption = None,
    download: DownloadOption = False,
    install_data: InstallOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from OUT.checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of an earlier run.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Train an ancestry network (--method none) or a learngene (--method tleg, ldr, sws, share-init)."""
    run_by = join()
    loss = DistillationLoss(alpha, tau, kind if teacher is not None else "none", kl_norm)
    config = TrainConfig(epochs, batch, lr, seed=seed, loss=loss, evaluate=True, name=method)
    job = TrainJob(out, method, teacher, depth, width, heads, config, resume, overwrite, device)
    dataset = run_by.main_first(lambda: load(data, fetch=download, install=install_data)).take(train=images)
    if dataset.name == "digits" and data != "digits" and run_by.main:
        typer.echo(DIGITS_BANNER, err=True)
    facts = plan_facts(job, dataset) if dry_run else run(job, dataset)
    if not run_by.main:
        return
    if json:
        print_json(facts)
    else:
        typer.echo("\n".join(f"{key:<12}{value}" for key, value in facts.items() if not isinstance(value, dict)))


def build(job: TrainJob, dataset: Dataset) -> nn.Module:
    """Build the network to train: a plain one, or the gene-backed one of the method."""
    classes = len(dataset.classes)
    host = small_vit(dataset.image_size, classes, depth=job.depth, dim=job.width, heads=job.heads, seed=job.config.seed)
    if job.method == "none":
        return host.to(device_of(job.device))
    if job.method not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join([*METHODS, 'none'])}, got {job.method!r}")
    return auxiliary(host, METHODS[job.method](), seed=job.config.seed).to(device_of(job.device))


def plan_facts(job: TrainJob, dataset: Dataset) -> dict[str, Any]:
    """Check a job without training and return what it would do."""
    processes.current().on_main(lambda: _check_out(job))
    network = build(job, dataset)
    if job.teacher is not None:
        load_classifier(job.teacher)
    return {
        "would write": str(job.out),
        "method": job.method,
        "data": f"{dataset.name}, {len(dataset.train):,} images, {dataset.source}",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "steps": job.config.total_steps(len(dataset.train)),
        "loss": asdict(job.config.loss),
    }


def run(job: TrainJob, dataset: Dataset) -> dict[str, Any]:
    """Train, write the output folder and return the facts of the run."""
    run_by = processes.current()
    run_by.on_main(lambda: _check_out(job))
    with run_by.within(lambda: whole_folder(job.out, MARK)) as partial:
        network = build(job, dataset)
        teacher = None if job.teacher is None else load_classifier(job.teacher).to(device_of(job.device))
        history = run_training(network, dataset, job.config, teacher=teacher, out=job.checkpoint, resume=job.resume)
        facts = _facts(job, dataset, network, history)
        if partial is not None:
            _save(network, job, partial)
            everything = {**facts, "history": history.to_json(), "processes": run_by.world}
            everything |= {"machine": machine(), "versions": versions()}
            (partial / MARK).write_text(jsonlib.dumps(plain(everything), indent=1))
    if run_by.main:
        shutil.rmtree(job.checkpoint, ignore_errors=True)
    return facts


def _check_out(job: TrainJob) -> None:
    check_replaceable(job.out, MARK)
    if job.out.exists() and not job.overwrite:
        raise WriteError(f"out: expected a new folder, {job.out} exists; --overwrite replaces it")


def _save(network: nn.Module, job: TrainJob, folder: Path) -> None:
    if job.method == "none":
        network.save_pretrained(folder)  # type: ignore[operator]
    else:
        extract(network).save_pretrained(folder)


def _facts(job: TrainJob, dataset: Dataset, network: nn.Module, history: History) -> dict[str, Any]:
    score = evaluate(network, dataset.test, sharded=True)
    return {
        "out": str(job.out),
        "method": job.method,
        "data": f"{dataset.name}, {len(dataset.train):,} images, {dataset.source}",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "steps": len(history.losses),
        "accuracy": score.accuracy,
        "test_loss": score.loss,
        "seconds": round(history.seconds, 2),
        "commit": commit(),
        "config": {**job.config.to_config(), "depth": job.depth, "width": job.width, "heads": job.heads},
    }
