# SPDX-License-Identifier: Apache-2.0
"""What surrounds a call of any primitive: autocast, functorch transforms, and rules on tensors that hold everywhere.

What a primitive makes of it is in its own file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylearngene import _checks
from pylearngene.errors import BackendError, DTypeError


def autocast(x: Tensor) -> Tensor:
    """Return x in the autocast dtype where autocast is on for its device (float64 stays, as in PyTorch)."""
    if x.dtype != torch.float64 and autocast_enabled(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for x's device (the meta device has none)."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def transformed() -> bool:
    """Whether functorch or forward-mode differentiation is at work; compiled graphs trace through the operators."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def check_pair(x: Tensor, gene: Tensor, name: str = "x") -> None:
    """Refuse float64 mixed with another dtype."""
    if x.dtype != gene.dtype and torch.float64 in (x.dtype, gene.dtype):
        raise DTypeError(
            f"{name}: expected {_checks.short(gene.dtype)} (the genes' dtype, float64 does not mix), "
            f"got {_checks.short(x.dtype)}"
        )


def check_storages(**named: Tensor | None) -> None:
    """Refuse views past their storage, where there is a storage to ask."""
    if not torch.compiler.is_compiling() and not transformed():
        for name, value in named.items():
            if value is not None:
                _checks.storage_covers(value, name)


def check_upstream(upstream: Tensor) -> None:
    """Refuse upstream gradients that are tensor subclasses, or the batch of a vectorized jacobian."""
    if type(upstream) is not Tensor:
        _checks.tensor(upstream, "dy")
    if torch._C._functorch.is_legacy_batchedtensor(upstream):
        raise BackendError(
            "is_grads_batched: expected one upstream gradient at a time, got a batch (a vectorized jacobian); "
            "the fused backward has no batching rule, torch.func.vmap over the forward has"
        )
