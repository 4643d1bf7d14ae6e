# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller asks of a method; each names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import nn

from pylearngene.errors import ArgumentError, MethodError
from pylearngene.nn import GeneBank

WIDTH_METHODS = "LeTs, LiGO, FRONT change width (not in this version yet)"


def check_number(name: str, value: object) -> int:
    """Return `value` as an int of at least 1."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ArgumentError(f"{name}: expected an int >= 1, got {value!r}")
    return number


def check_seed(value: object) -> int:
    """Return `value` as an int that PyTorch's generators take."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 2**64
    if not -(2**63) <= number < 2**64 or isinstance(value, bool):
        raise ArgumentError(f"seed: expected an int from -2**63 to 2**64 - 1, got {value!r}")
    return number


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def refuse_axes(method: str, **sizes: object) -> None:
    """Refuse to change an axis that an expansion keeps; `sizes` holds what was asked, None where nothing was."""
    for axis, size in sizes.items():
        if size is not None:
            raise MethodError(
                f"{axis}: expected None, got {size!r}: {method} changes the depth only and keeps width and heads; "
                f"{WIDTH_METHODS}"
            )


def refuse_backed(model: object, name: str) -> None:
    """Refuse a gene-backed network where a plain model is wanted."""
    if isinstance(model, nn.Module) and any(isinstance(module, GeneBank) for module in model.children()):
        raise ArgumentError(
            f"{name}: expected a plain model, got a gene-backed {type(model).__name__}; plg.bake it first"
        )
