# SPDX-License-Identifier: Apache-2.0
"""`GeneCallback`: gene folders in the checkpoints of the Hugging Face Trainer, and the genes' norms in its log.

transformers is not imported: the Trainer asks of a callback no more than its methods. Freezing and groups of
parameters are in `pylearngene.trainable`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pylearngene.errors import ArgumentError
from pylearngene.hosts.backing import bank_of
from pylearngene.networks import extract
from pylearngene.pretrained import saves_genes

VALUES = ("norm", "grad_norm", "coeffs")


class GeneCallback:
    """A callback for `transformers.Trainer(callbacks=[...])` that saves and watches the genes of a network.

    Every checkpoint folder, and at the end of training the output folder, becomes a gene folder too, from which
    `Learngene.from_pretrained` reads. A gene-backed model of transformers writes its checkpoints so by itself; then
    this callback adds the output folder. Checkpoints of a hyperparameter search lie elsewhere and are left alone.

    Args:
        save: write gene folders.
        log: what to add to the Trainer's log of training steps: "norm" is `gene_norm`, the L2 norm over all genes;
            "grad_norm" is `gene_grad_norm`, that of their gradients at the last step, after clipping; "coeffs" is
            `coeff.<block>.<layer>.<k>`, every learned coefficient. They go to the log history and to what is printed;
            reporters such as TensorBoard have had the record before and do not show them.

    Raises:
        ArgumentError: `log` names anything else.
        MethodError: training begins and the model is no gene-backed network.

    Example:
        >>> callback = GeneCallback(log=["norm", "grad_norm"])
        >>> trainer = transformers.Trainer(net, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, save: bool = True, log: Sequence[str] = ("norm", "grad_norm")) -> None:
        unknown = [log] if isinstance(log, str) else [name for name in log if name not in VALUES]
        if unknown:
            raise ArgumentError(f"log: expected some of {', '.join(VALUES)} in a sequence, got {unknown[0]!r}")
        self.save = save
        self.log = tuple(log)
        self._grad_norm: Tensor | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Events of the Trainer that do not matter here, of this and of later versions."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        """Refuse a plain model before the first step."""
        bank_of(_unwrapped(model), "model")

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        """Remember the norm of the genes' gradients; it is read only if it is logged."""
        if "grad_norm" in self.log:
            genes = bank_of(_unwrapped(model), "model").named_genes()
            self._grad_norm = _norm(gene.grad for _, gene in genes if gene.grad is not None)

    def on_log(self, _args: Any, state: Any, _control: Any, model: nn.Module, logs: Any = None, **_: Any) -> None:
        """Add the values asked for to the record of a training step."""
        if logs is None or "loss" not in logs:
            return
        values = self._values(_unwrapped(model))
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        """Make the checkpoint just written a gene folder."""
        net, folder = _unwrapped(model), Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not saves_genes(net) and folder.is_dir():
            self._write(net, folder, state)

    def on_train_end(self, args: Any, state: Any, _control: Any, model: nn.Module, **_: Any) -> None:
        """Make the output folder a gene folder, of the best model where the Trainer has loaded it."""
        self._write(_unwrapped(model), Path(args.output_dir), state)

    def _write(self, net: nn.Module, folder: Path, state: Any) -> None:
        if self.save and state.is_world_process_zero:
            extract(net).save_pretrained(os.path.realpath(folder), overwrite=True)

    def _values(self, net: nn.Module) -> dict[str, float]:
        bank, values = bank_of(net, "model"), {}
        if "norm" in self.log:
            values["gene_norm"] = float(_norm(gene.detach() for _, gene in bank.named_genes()))
        if "grad_norm" in self.log and self._grad_norm is not None:
            values["gene_grad_norm"] = float(self._grad_norm)
        if "coeffs" in self.log:
            inside = f"{bank.host.blocks}."
            for name, parameter in net.named_parameters():
                if name.startswith(inside) and name.endswith(".coeffs"):
                    layer = name.removeprefix(inside).removesuffix(".coeffs")
                    values |= {f"coeff.{layer}.{k}": value for k, value in enumerate(parameter.tolist())}
        return values


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all tensors, without reading it from the device."""
    squares = [tensor.float().square().sum() for tensor in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _nothing(*_args: Any, **_options: Any) -> None:
    """Answer an event that does not matter here."""
