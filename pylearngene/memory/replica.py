# SPDX-License-Identifier: Apache-2.0
"""A copy of a model, of its batch and of its optimizer in fake tensors: shapes, dtypes and devices, no data.

The model itself is only read. What a step makes of the copies is in `estimate`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pylearngene import _checks
from pylearngene.errors import ArgumentError, DeviceError

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Replica:
    """Fakes for tensors, one for each tensor and one storage for each storage; to be used inside a fake mode.

    Args:
        device: where all fakes lie; None leaves each where its tensor is, those of the meta device on the CPU.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._storages: dict[tuple[int, torch.dtype], Tensor] = {}
        self.memo: dict[int, Any] = {}
        self._kept: list[Any] = []

    def fake(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor, always the same; a Parameter for a Parameter."""
        if id(tensor) not in self.memo:
            self._kept.append(tensor)  # as long as its address is a key
            self.memo[id(tensor)] = self._made(tensor)
        found: Tensor = self.memo[id(tensor)]
        return found

    def _made(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.dtype)
        base = self._storages.get(key)
        if base is None:
            self._kept.append(storage)
            count = storage.nbytes() // tensor.element_size()
            base = self._storages[key] = torch.empty(count, dtype=tensor.dtype, device=self.place(tensor))
        made = base.detach().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    @property
    def default(self) -> torch.device:
        """Where fakes of the meta device lie."""
        return torch.device("cpu") if self._device is None else self._device

    def place(self, tensor: Tensor) -> torch.device:
        """Where the fake of a tensor lies."""
        return self.default if tensor.is_meta or self._device is not None else tensor.device

    def model(self, model: nn.Module) -> nn.Module:
        """A copy of a model with fakes for all its tensors.

        Raises:
            ArgumentError: it has parameters without a shape, of another class than torch's, or cannot be copied.
        """
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            if is_lazy(tensor):
                raise ArgumentError(f"model: expected parameters with shapes, got {name}, which has none yet")
            _checks.tensor(tensor, name)
            self.fake(tensor)
        try:
            with _FakeCopies(self):
                return copy.deepcopy(model, self.memo)
        except (TypeError, RuntimeError, SystemError) as error:  # SystemError: of a random generator
            raise ArgumentError(
                f"model: expected one that can be copied, got {type(model).__name__} ({error})"
            ) from error

    def batch(self, batch: Any, dtype: torch.dtype, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of the model's call, shapes turned into fakes of `dtype`."""

        def made(value: Any) -> Any:
            if isinstance(value, torch.Size) or _is_shape(value):
                return torch.empty(tuple(value), dtype=dtype, device=device)
            return tree_map_only(Tensor, lambda tensor: self._moved(tensor, device), value)

        if isinstance(batch, Mapping):
            return (), {str(name): made(value) for name, value in batch.items()}
        if isinstance(batch, tuple) and not _is_shape(batch):
            return tuple(made(value) for value in batch), {}
        return (made(batch),), {}

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return fake.requires_grad_(tensor.requires_grad)

    def optimizer(self, given: Any, model: nn.Module, original: nn.Module) -> Optimizer | None:
        """A fresh optimizer of the copied model's parameters, as the one that was given or is named.

        Raises:
            ArgumentError: it is no optimizer, or one of other parameters than the model's.
        """
        if given is None:
            return None
        if isinstance(given, Optimizer):
            made = self._like(given, {id(parameter) for parameter in original.parameters()})
        else:
            if isinstance(given, str):
                _checks.choice(given, "optimizer", tuple(OPTIMIZERS))
                given = OPTIMIZERS[given]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not callable(given):
                raise ArgumentError(f"optimizer: expected a name, a class or an instance, got {given!r}")
            if not trained:
                return None
            made = given(trained)
            if not isinstance(made, Optimizer):
                raise ArgumentError(f"optimizer: expected one of torch.optim, got {type(made).__name__}")
        for group in made.param_groups:
            _as_on_device(group)
        return made

    def _like(self, given: Optimizer, own: set[int]) -> Optimizer:
        """A fresh optimizer with the settings of one that exists."""
        groups = []
        for group in given.param_groups:
            if any(id(parameter) not in own for parameter in group["params"]):
                raise ArgumentError("optimizer: expected one of the model's parameters, got one that has others")
            groups.append({**group, "params": [self.memo[id(parameter)] for parameter in group["params"]]})
        made = type(given).__new__(type(given))
        made.__setstate__({"defaults": dict(given.defaults), "state": defaultdict(dict), "param_groups": groups})
        return made


class _FakeCopies(TorchFunctionMode):
    """While a model is copied: tensors that are no parameters and no buffers become fakes too."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self._replica.fake(args[0])
        return func(*args, **(kwargs or {}))


def _as_on_device(group: dict[str, Any]) -> None:
    """Let a group take the form that torch gives it on its device, which it does not ask of fakes."""
    on_gpu = any(parameter.device.type == "cuda" for parameter in group["params"])
    if group.get("foreach", False) is None and not group.get("fused"):
        group["foreach"] = on_gpu and not group.get("differentiable", False)


def _is_shape(value: Any) -> bool:
    whole = isinstance(value, (tuple, list)) and len(value) > 0
    return whole and all(isinstance(size, int) and not isinstance(size, bool) for size in value)


def tensors_of(optimizer: Optimizer | None) -> Iterator[Tensor]:
    """All tensors of an optimizer's state."""
    for state in optimizer.state.values() if optimizer is not None else ():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def device_of(device: torch.device | str | None) -> torch.device | None:
    """The device that was asked for, as torch names it; None where none was.

    Raises:
        DeviceError: it is no device, or none of this machine.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device: expected a device like 'cpu' or 'cuda', got {device!r}") from error
    if found.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if found.type != "cpu":
        raise DeviceError(f"device: expected the CPU or a CUDA device of this machine, got {found}")
    return found
