# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: one safetensors file that holds everything, and a JSON file beside it to read.

The safetensors file is the truth and is replaced atomically; the JSON file is a copy of its metadata for people.
Nothing is pickled. The order of the data needs no storing: it follows from the seed and the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pylearngene.errors import ArgumentError, GeneFileError
from pylearngene.files import check_finite, parse_json, read_tensors, save_tensors, write_atomic
from pylearngene.training.config import History
from pylearngene.training.processes import ALONE, Processes

TENSORS = "checkpoint.safetensors"
READABLE = "checkpoint.json"
FORMAT = 1
STATES = ("step", "exp_avg", "exp_avg_sq")


def has_checkpoint(folder: Path) -> bool:
    """Tell whether the folder holds a checkpoint."""
    return (folder / TENSORS).is_file()


def random_states(processes: Processes) -> dict[str, Tensor]:
    """Return the states of the random generators of all processes, which all call this."""
    states = {"rng.cpu": processes.gather(torch.get_rng_state())}
    if torch.cuda.is_available():
        states["rng.cuda"] = processes.gather(torch.cuda.get_rng_state())
    return {_of_rank(name, rank): state for name, found in states.items() for rank, state in enumerate(found)}


def seed_process(seed: int, rank: int, step: int = 0) -> None:
    """Seed the random generators of a process; the first one, before the first step, gets the run's own seed."""
    # torch's generator on the CPU reads 32 bits of a seed
    mixed = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    torch.manual_seed(mixed if rank or step else seed)


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: AdamW,
    history: History,
    run: dict[str, Any],
    states: dict[str, Tensor],
) -> None:
    """Write the state of a run after a whole step.

    Args:
        folder: made if missing.
        model: its state dict is stored.
        optimizer: AdamW over the model's parameters.
        history: what happened so far.
        run: the run's identity (config, samples); must be equal again at resume.
        states: of the random generators, see `random_states`.

    Raises:
        WriteError: the folder cannot be written; the checkpoint that was there is unchanged.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors.update(states)
    facts = {"format_version": FORMAT, "run": run, "history": history.to_json()}
    data = save_tensors(tensors, {"checkpoint": json.dumps(facts)})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / TENSORS, data)
    write_atomic(folder / READABLE, json.dumps(facts, indent=1).encode())


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: AdamW, run: dict[str, Any], processes: Processes = ALONE
) -> History:
    """Put a stored state back into model, optimizer and random generators.

    A process that the stored run did not have gets generators that follow from seed, step and its number.

    Returns:
        The history up to the checkpoint; its number of losses is the number of steps done.

    Raises:
        ArgumentError: the folder has no checkpoint, or it belongs to a run with other options.
        GeneFileError: the checkpoint is damaged, of another format, or of another model.
        NonFiniteError: a stored tensor holds NaN or Inf.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise ArgumentError(f"resume: expected {TENSORS} in {folder}, got none")
    tensors, metadata = read_tensors(path)
    facts = parse_json(metadata.get("checkpoint", "").encode(), str(path))
    if facts.get("format_version") != FORMAT:
        raise GeneFileError(f"{path}: expected format_version {FORMAT}, got {facts.get('format_version')}")
    if not isinstance(facts.get("run"), dict) or "history" not in facts or "rng.cpu" not in tensors:
        raise GeneFileError(f"{path}: expected run, history and rng.cpu, got others")
    _same_run(facts["run"], run)
    check_finite(tensors, "checkpoint")
    _restore(path, tensors, model, optimizer)
    history = History(**facts["history"])
    seed_process(run["seed"], processes.rank, len(history.losses))
    _restore_generators(tensors, processes.rank)
    return history


def _same_run(stored: dict[str, Any], run: dict[str, Any]) -> None:
    for key in sorted(set(stored) | set(run)):
        if stored.get(key) != run.get(key):
            raise ArgumentError(f"resume: expected {key}={stored.get(key)} as in the checkpoint, got {run.get(key)}")


def _restore(path: Path, tensors: dict[str, Tensor], model: nn.Module, optimizer: AdamW) -> None:
    weights = _with_prefix(tensors, "model.")
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise GeneFileError(f"{path}: expected the tensors of this model, got others ({error})") from error
    for name, parameter in model.named_parameters():
        found = {key: tensors[f"optimizer.{key}.{name}"] for key in STATES if f"optimizer.{key}.{name}" in tensors}
        if parameter.requires_grad and len(found) not in (0, len(STATES)):
            raise GeneFileError(f"{path}: expected {', '.join(STATES)} of {name}, got {', '.join(found)}")
        if found:
            state = {key: value.to(parameter.device) for key, value in found.items() if key != "step"}
            optimizer.state[parameter] = {"step": found["step"], **state}


def _restore_generators(tensors: dict[str, Tensor], rank: int) -> None:
    cpu, cuda = (tensors.get(_of_rank(name, rank)) for name in ("rng.cpu", "rng.cuda"))
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
