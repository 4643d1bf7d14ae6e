# SPDX-License-Identifier: Apache-2.0
"""Settings of a convolution as callers write them, and the checks of its image.

Shared by `expansion_conv2d`, `ExpansionConv2d` and the bank; what is computed is decided in `_expansion_calls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from pylearngene import _checks
from pylearngene._ops.expansion_products import Conv2d
from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.functional import _expansion_calls as _calls
from pylearngene.functional._context import check_storages

Pair = int | Sequence[int]
Sides = tuple[int, int, int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
#: Most that a kernel, stride, padding or dilation may be: sizes that come of it then stay within 64 bits.
MOST = 1 << 20


def pair(value: Pair, name: str, low: int) -> tuple[int, int]:
    """One int for height and width, or one each, none below `low` or above a million."""
    both = (value, value) if isinstance(value, int) else value
    fits = isinstance(both, Sequence) and len(both) == 2
    if not fits or any(isinstance(n, bool) or not isinstance(n, int) or n < low for n in both):
        raise ArgumentError(f"{name}: expected an int of at least {low}, or two of them, got {value!r}")
    if max(both) > MOST:
        raise ArgumentError(f"{name}: expected an int of at most {MOST}, or two of them, got {value!r}")
    return both[0], both[1]


def settings(
    kernel: Sequence[int], stride: Pair, padding: Pair | str, dilation: Pair, groups: int, mode: PaddingMode = "zeros"
) -> tuple[Conv2d, Sides | None]:
    """The convolution, and the sides (left, right, top, bottom) to be padded before it, or None.

    The kernel is (kh, kw); the rest is as `nn.Conv2d` takes it.
    """
    steps, gaps = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    _checks.positive_int(groups, "groups")
    _checks.choice(mode, "padding_mode", get_args(PaddingMode))
    if isinstance(padding, str):
        _checks.choice(padding, "padding", ("valid", "same"))
        if padding == "same" and steps != (1, 1):
            raise ArgumentError(f"padding: expected numbers or 'valid' with stride {steps}, got 'same'")
        total = [gap * (n - 1) if padding == "same" else 0 for gap, n in zip(gaps, kernel, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        after = (total[0] - before[0], total[1] - before[1])
    else:
        before = after = pair(padding, "padding", 0)
    if mode != "zeros":
        sides = (before[1], after[1], before[0], after[0])
        return Conv2d(steps, (0, 0), gaps, groups), sides if any(sides) else None
    odd = (0, after[1] - before[1], 0, after[0] - before[0])
    return Conv2d(steps, before, gaps, groups), odd if any(odd) else None


def padded(x: Tensor, sides: Sides | None, mode: PaddingMode = "zeros") -> Tensor:
    """Pad the last two axes of x."""
    if sides is None:
        return x
    check_storages(x=x)
    return F.pad(x, sides, mode="constant" if mode == "zeros" else mode)


def check_groups(groups: int, in_channels: int, out_channels: int) -> None:
    """Refuse a number of groups that does not divide the channels."""
    if in_channels % groups or out_channels % groups:
        raise ArgumentError(f"groups: expected a divisor of {in_channels} and {out_channels} channels, got {groups}")


def check_image(
    x: Tensor, weight: Sequence[int], conv: Conv2d, sides: Sides | None = None, mode: PaddingMode = "zeros"
) -> None:
    """Refuse an image without C channels, or smaller than the kernel or than what padding reads; before `padded`."""
    channels = weight[1] * conv.groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ShapeError(f"x: expected shape [B, C, H, W] or [C, H, W] with C = {channels}, got {list(x.shape)}")
    left, right, top, bottom = sides or (0, 0, 0, 0)
    for axis, letter, before, after in ((0, "H", top, bottom), (1, "W", left, right)):
        reach = conv.dilation[axis] * (weight[2 + axis] - 1) + 1 - 2 * conv.padding[axis] - before - after
        read = max(before, after) + (mode == "reflect") if mode in ("reflect", "circular") else 0
        for least, whose in ((max(reach, 1), "kernel"), (read, f"{mode} padding")):
            if x.shape[axis - 2] < least:
                raise ShapeError(f"x: expected {letter} of at least {least} for this {whose}, got {list(x.shape)}")


def convolve(
    conv: Conv2d,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
    tap: _calls.AnyTap = None,
) -> Tensor:
    """`y = conv2d(x, W) + b` on checked arguments; x is `[B, C, H, W]` or `[C, H, W]`, in its compute dtype."""
    if x.dim() == 4:
        return _calls.product(conv, x, genes, coeffs, bias, bias_genes, tap)
    return _calls.product(conv, x.unsqueeze(0), genes, coeffs, bias, bias_genes, tap).squeeze(0)
