# SPDX-License-Identifier: Apache-2.0
"""`estimate_memory`: one training step of a copy in fake tensors, whose storages are written down.

The copy is made by `replica`, the writing is done by `ledger`, the sums are made by `account`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from pylearngene import _checks
from pylearngene.errors import ArgumentError
from pylearngene.memory.account import MemoryEstimate, Times, account
from pylearngene.memory.ledger import Ledger
from pylearngene.memory.replica import Optimizer, Replica, device_of, tensors_of
from pylearngene.memory.workspace import blas_workspaces

_READS_VALUES = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)


def estimate_memory(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: str | type[Optimizer] | Optimizer | Callable[..., Optimizer] | None = "adamw",
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    train: bool = True,
    device: torch.device | str | None = None,
) -> MemoryEstimate:
    """Find what one training step of any model holds, without allocating or computing.

    peak = max over time of (weights + state + gradients + saved activations + transients + workspace)

    The step (zero_grad, forward, loss, backward, optimizer) is run by a copy of the model in tensors without data,
    and every storage is followed from the operator that makes it to its end. What is checkpointed, cast or shared is
    so there as well. The model is only read: parameters, gradients, buffers, modes and random states stay as they are.

    Args:
        model: gene-backed, plain or mixed; on any device, the meta device included.
        batch: what the model is called with: a tensor, a tuple of positional or a dict of named arguments; in place of
            a tensor a shape, for a tensor of the parameters' dtype. It is thought to lie where the model does.
        optimizer: "adamw", "sgd", a class or function of the parameters, an instance with the model's parameters
            (whose settings count), or None.
        loss: of what the model returns, a scalar; by default the result's own `loss`, else the sum of its tensors.
        autocast: dtype of an autocast region around forward pass and loss.
        train: False estimates a forward pass in evaluation mode, without gradients.
        device: where the step is thought to run; by default where the model is, and the CPU for the meta device.

    Returns:
        The account of the device with the highest peak; `print` it. Others are in `elsewhere`.

    Raises:
        ArgumentError: `model` is no module, has parameters without a shape, cannot be copied or is compiled; its step
            depends on values or has sparse tensors; `optimizer` is none of these, or has other parameters; `loss` gives
            no scalar; `autocast` is no dtype for it.
        DTypeError: a parameter is a subclass of a tensor, for instance of a sharded model.
        DeviceError: `device` is none of this machine.

    Numerics:
        Exact up to what operators of PyTorch hold inside themselves and to how an allocator rounds: on CUDA to blocks
        of 512 bytes, and the workspaces of cuBLAS are added. Fragmentation and the CUDA context are left out.

    Example:
        >>> import pylearngene as plg
        >>> estimate = plg.estimate_memory(nn.Linear(1024, 1024, bias=False), (8, 1024))
        >>> estimate.weights, estimate.gradients, estimate.optimizer
        (4194304, 4194304, 8388612)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a module, got {type(model).__name__}")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise ArgumentError("model: expected one that is not compiled, got a compiled one, whose graphs are its own")
    if autocast is not None and autocast not in _checks.HALF:
        raise ArgumentError(f"autocast: expected bfloat16, float16 or None, got {autocast!r}")
    replica = Replica(device_of(device))
    with _without_data() as ledger:
        copied = replica.model(model).train(train)
        tensors = [*copied.parameters(), *copied.buffers()]
        ledger.label_since("weights", 0)
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        place = tensors[0].device if tensors else replica.default
        dtype = floating[0].dtype if floating else torch.get_default_dtype()
        arguments = replica.batch(batch, dtype, place)
        ledger.label("inputs", _tensors(arguments))
        step = _Step(ledger, copied, replica.optimizer(optimizer, copied, model) if train else None, loss)
        times = step.run(arguments, torch.autocast(place.type, autocast, autocast is not None), train)
        events = list(ledger.events)
    devices = {block.device for block, _ in events} or {place}
    found = [account(events, times, device, blas_workspaces(device)) for device in devices]
    most, *others = sorted(found, key=lambda one: one.peak, reverse=True)
    return replace(most, elsewhere=tuple(others))


@dataclass
class _Step:
    """One step of a model in fakes, as a training loop makes it."""

    ledger: Ledger
    model: nn.Module
    optimizer: Optimizer | None
    loss: Callable[[Any], Any] | None

    def run(self, arguments: tuple[Any, dict[str, Any]], region: torch.autocast, train: bool) -> Times:
        """Run it, with or without a backward pass, and label what it makes; returns when its parts began."""
        events = self.ledger.events
        forward = len(events)
        with region, torch.set_grad_enabled(train):
            result = self.model(*arguments[0], **arguments[1])
            if train:
                result = self._loss(result)
        torch.clear_autocast_cache()  # a region does it at its end, unless it is inside another one
        backward = len(events)
        self.ledger.label_since("activations", forward)
        if train and result.requires_grad:
            result.backward()
        update = len(events)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.ledger.label("gradients", gradients)
        if self.optimizer is not None:
            self.optimizer.step()
            self.ledger.label("optimizer", tensors_of(self.optimizer))
        return Times(forward, backward, update)

    def _loss(self, result: Any) -> Tensor:
        if self.loss is not None:
            scalar = self.loss(result)
            if not isinstance(scalar, Tensor) or scalar.numel() != 1:
                raise ArgumentError(f"loss: expected a function that returns a scalar, got one of {_shown(scalar)}")
            return scalar
        own = getattr(result, "loss", None)
        if isinstance(own, Tensor):
            return own
        parts = [tensor.sum() for tensor in _tensors(result) if tensor.is_floating_point()]
        if not parts:
            raise ArgumentError(
                f"loss: expected one for a model that returns no tensors, got None for {_shown(result)}"
            )
        return sum(parts[1:], start=parts[0])


@contextmanager
def _without_data() -> Iterator[Ledger]:
    """Let operators run on fakes and write down what they make; random states, modes and regions stay as they are."""
    ledger = Ledger()
    with ExitStack() as entered:
        entered.callback(random.setstate, random.getstate())
        entered.callback(np.random.set_state, np.random.get_state())
        entered.enter_context(torch.random.fork_rng(devices=[]))
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            entered.enter_context(torch.autocast(kind, enabled=False))
        entered.enter_context(torch.inference_mode(False))
        entered.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        entered.enter_context(ledger)
        try:
            yield ledger
        except _READS_VALUES as error:
            raise ArgumentError(
                f"model: expected a step that does not depend on values of tensors, got one that reads them ({error})"
            ) from error


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _shown(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
