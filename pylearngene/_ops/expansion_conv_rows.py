# SPDX-License-Identifier: Apache-2.0
"""The convolutions of `expansion` in the regime `rows`: native kernels that form W a panel at a time and multiply it.

A panel of W, and the patches of a few tokens, stay in the caches of the thread that makes them. Images of planes are
copied once, so that the channels of a pixel lie side by side. Groups, and gradients of x through strides, are left to
`expansion_conv_panels`, as is everything that the kernels do not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pylearngene import _backends, plan
from pylearngene._ops.expansion_kernels import CODES, THREADS_PAY_FROM
from pylearngene._ops.expansion_products import Conv2d

#: Input channels whose coefficients' gradients are summed together.
DOT_CHANNELS = 32
_CLASSES = (Tensor, nn.Parameter, nn.Buffer)


def channels_last(image: Tensor) -> bool:
    """Whether `[B, C, H, W]` lies channels-last, and not contiguous as well."""
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def memory_format(image: Tensor) -> torch.memory_format:
    """The format of a result of `image`."""
    return torch.channels_last if channels_last(image) else torch.contiguous_format


def empty_like(image: Tensor, size: Sequence[int]) -> Tensor:
    """A result of `image`, not filled, in its dtype and memory format."""
    return torch.empty(size, dtype=image.dtype, device=image.device, memory_format=memory_format(image))


@cache
def _calls_of(native: ModuleType) -> Any:
    """The native calls on tensors; None where torch has not the table by which it shows them, or another one."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    try:
        return native.expansion_conv.Calls(THREADS_PAY_FROM, exchange, _CLASSES)
    except (AttributeError, TypeError, ValueError):
        return None


def takes(image: Tensor, weight: Sequence[int], conv: Conv2d, product: str) -> bool:
    """Whether a product of an image with a weight `[O, C/groups, kh, kw]` is computed here if its tensors are plain."""
    return _open(image, weight, conv, product) is not None


def _open(image: Tensor, weight: Sequence[int], conv: Conv2d, product: str) -> Any:
    """The native calls where a product is theirs, else None: "y", "dx" or "dw"."""
    if product == "dx" and tuple(conv.stride) != (1, 1):
        return None
    who, size, float16 = _backends.implementation(image.device), image.element_size(), image.dtype == torch.float16
    arch = _backends.LEVEL_NAME if image.device.type == "cpu" else None
    native = _backends.native()
    if native is None or plan.choose_conv(weight, product, who, size, conv.groups, arch, float16) != "rows":
        return None
    return _calls_of(native)


def workspace(image: Tensor, size: Sequence[int], weight: Sequence[int], product: str) -> int:
    """Bytes that a product holds beside its arguments and results.

    Args:
        image: x, or for dx dy.
        size: of the result of a convolution of it; for dW of dy.
        weight: `[O, C, kh, kw]`.
        product: "y", "dx" or "dw".
    """
    native = _backends.native()
    assert native is not None
    tokens, taps, threads = size[0] * size[2] * size[3], weight[2] * weight[3], torch.get_num_threads()
    rows = weight[1] if product == "dx" else weight[0]
    room: int = native.expansion_conv.room(
        _backends.LEVEL, threads, CODES[image.dtype], image.shape[1], rows, taps, tokens, product == "dw"
    )
    last = image.is_contiguous(memory_format=torch.channels_last)
    return room + (0 if last else image.nbytes if image.is_contiguous() else 2 * image.nbytes)


def _dense(image: Tensor) -> Tensor:
    as_it_is = image.is_contiguous() or image.is_contiguous(memory_format=torch.channels_last)
    return image if as_it_is else image.contiguous()


def forward(
    x: Tensor, size: Sequence[int], genes: Sequence[Tensor], coeffs: Tensor, bias: Tensor | None, conv: Conv2d
) -> Tensor | None:
    """`y = conv2d(x, W) + b` of `size`, or None; arguments as those of the panels."""
    calls = _open(x, genes[0].shape, conv, "y")
    if calls is None:
        return None
    y, steps = empty_like(x, size), (*conv.stride, *conv.dilation, *conv.padding)
    done = calls.product(
        _backends.LEVEL, torch.get_num_threads(), y, _dense(x), genes, coeffs, bias, steps, transposed=False
    )
    return y if done else None


def input_gradient(
    dy: Tensor, size: Sequence[int], genes: Sequence[Tensor], coeffs: Tensor, conv: Conv2d
) -> Tensor | None:
    """The gradient of x, of `size`, or None: a convolution of dy by W with channels and taps turned round."""
    calls = _open(dy, genes[0].shape, conv, "dx")
    if calls is None:
        return None
    around = [gap * (n - 1) - pad for gap, n, pad in zip(conv.dilation, genes[0].shape[2:], conv.padding, strict=True)]
    dx, steps = empty_like(dy, size), (1, 1, *conv.dilation, *around)
    done = calls.product(
        _backends.LEVEL, torch.get_num_threads(), dx, _dense(dy), genes, coeffs, None, steps, transposed=True
    )
    return dx if done else None


def gene_gradients(
    buffers: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    total: Tensor | None,
    conv: Conv2d,
) -> bool:
    """`buffers[k] += c_k dW`, and `total[k] += <dW, G_k>` in float64 unless it is None; whether it was done."""
    calls = _open(x, genes[0].shape, conv, "dw")
    if calls is None:
        return False
    rows, channels = genes[0].shape[:2]
    parts = None if total is None else total.new_empty((-(-channels // DOT_CHANNELS), rows, len(genes)))
    steps = (*conv.stride, *conv.dilation, *conv.padding)
    added: bool = calls.gradients(
        _backends.LEVEL, torch.get_num_threads(), dy.contiguous(), _dense(x), genes, coeffs, buffers, parts, steps
    )
    if added and total is not None and parts is not None:
        total += parts.sum((0, 1))
    return added
