# SPDX-License-Identifier: Apache-2.0
"""Checks of caller's arguments: each takes the argument's name and says what was expected and what came.

They are run once, at the public door; below it only invariants hold. Values of tensors are never read here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylearngene.errors import ArgumentError, DeviceError, DTypeError, ShapeError

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
_TRACING_TYPES = ("FakeTensor", "FunctionalTensor")


def tensor(value: object, name: str) -> Tensor:
    """Return `value` if it is a plain tensor; subclasses such as DTensor are refused by name."""
    if not isinstance(value, Tensor):
        raise DTypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    kind = type(value)
    if kind not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and kind.__name__ not in _TRACING_TYPES:
        raise DTypeError(f"{name}: expected a plain torch.Tensor, got the subclass {kind.__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise DTypeError(f"{name}: expected a strided tensor, got layout {short(value.layout)}")
    return value


def floating(value: Tensor, name: str) -> None:
    """Refuse every dtype but float32, float64, bfloat16 and float16."""
    if value.dtype not in FLOATING:
        raise DTypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {short(value.dtype)}")


def last_dim(value: Tensor, name: str, size: int, letter: str) -> None:
    """Refuse a tensor whose last axis is not `size`."""
    if value.dim() < 1 or value.shape[-1] != size:
        raise ShapeError(f"{name}: expected shape [*, {letter}] with {letter} = {size}, got {list(value.shape)}")


def shape(value: Tensor, name: str, expected: Sequence[int], letters: str) -> None:
    """Refuse a tensor whose shape is not `expected`."""
    if tuple(value.shape) != tuple(expected):
        raise ShapeError(f"{name}: expected shape {letters} = {list(expected)}, got {list(value.shape)}")


def same_device(value: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Refuse tensors on different devices."""
    if value.device != other.device:
        raise DeviceError(f"{name}: expected device {other.device} (that of {other_name}), got {value.device}")


def choice(value: object, name: str, allowed: Sequence[object]) -> None:
    """Refuse a value outside a short list."""
    if value not in allowed:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def positive_int(value: object, name: str) -> int:
    """Return `value` if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{name}: expected an int of at least 1, got {value!r}")
    if value < 1:
        raise ArgumentError(f"{name}: expected an int of at least 1, got {value}")
    return value


def storage_covers(value: Tensor, name: str) -> None:
    """Refuse a view that reaches past its storage (freed or resized storage), before its address is taken."""
    count, have = value.numel(), value.untyped_storage().nbytes()
    if count == 0 or (value.is_contiguous() and have >= (value.storage_offset() + count) * value.element_size()):
        return
    last = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    if have < (last + 1) * value.element_size():
        raise DeviceError(
            f"{name}: expected a storage of at least {(last + 1) * value.element_size()} bytes, got {have} "
            "(a freed or resized storage, for instance of a sharded parameter)"
        )


def short(dtype: torch.dtype | torch.layout) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")
