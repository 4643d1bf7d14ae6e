# SPDX-License-Identifier: Apache-2.0
"""Comparing two models by everything that fixes their function except the values of their tensors.

Used to prove that a rebuilt model is the model it was inferred from. Class names count as the layer kind they derive
from, and settings that only matter at run time or at initialization are left out.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

_RUN_TIME = {
    "training", "grad_checkpointing", "gradient_checkpointing", "weight_init_mode", "fix_init", "name_or_path",
    "config_class", "loss_type",
}  # fmt: skip
_BASES = (nn.Linear, nn.LayerNorm)
_SCALARS = (bool, int, float, str, type(None))


def difference(model: nn.Module, other: nn.Module) -> str | None:
    """Name the first thing in which two models differ, or return None."""
    return _first_difference("tensor", _tensors(model), _tensors(other)) or _first_difference(
        "module", settings(model), settings(other)
    )


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Describe the state dict: name to shape."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}


def settings(model: nn.Module) -> dict[str, Any]:
    """Describe every module: its type and its public scalar attributes."""
    described: dict[str, Any] = {}
    for name, module in model.named_modules():
        described[name or "the model"] = _class_name(module)
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _RUN_TIME and _is_setting(value):
                described[f"{name}.{key}".lstrip(".")] = value
    return described


def _class_name(module: nn.Module) -> str:
    kind = next((base for base in _BASES if isinstance(module, base)), type(module))
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_setting(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_setting(item) for item in value)
    return isinstance(value, _SCALARS)


def _first_difference(what: str, first: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Compare two descriptions entry by entry."""
    for name in [*first, *other]:
        if not _same(first.get(name, "absent"), other.get(name, "absent")):
            return f"{what} {name!r}: {first.get(name, 'absent')!r} became {other.get(name, 'absent')!r}"
    return None


def _same(first: object, other: object) -> bool:
    if isinstance(first, float) and isinstance(other, float):
        return math.isclose(first, other, rel_tol=1e-5, abs_tol=1e-12)
    return first == other
