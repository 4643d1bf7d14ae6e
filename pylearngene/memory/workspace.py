# SPDX-License-Identifier: Apache-2.0
"""What operators and libraries hold inside themselves: panels of the `expansion` operators, workspaces of the BLAS.

Panels are sized by the functions by which the operators size them; a test compares them with the allocator's events.
What kernels keep in registers and shared memory is no memory of the device.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylearngene import _backends, plan
from pylearngene._ops import expansion_conv_rows as _rows
from pylearngene._ops.expansion_conv_panels import output_size, panels
from pylearngene._ops.expansion_kernels import SPECIFICATION_ELEMENTS
from pylearngene._ops.expansion_products import Conv2d

#: Bytes of one cuBLAS workspace by compute capability, where CUBLAS_WORKSPACE_CONFIG says nothing else.
HOPPER_BLAS, OLDER_BLAS = 32 << 20, (2 * 4096 + 8 * 16) << 10
#: Threads that call the BLAS in a training step, each with a workspace of its own: the caller's and the engine's.
BLAS_THREADS = 2


def workspace_of(func: Any, args: Sequence[Any]) -> tuple[torch.device, int]:
    """Where an operator of this library computes, and the bytes it holds at most beside its arguments and results."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    image = given.get("x", given.get("dy"))
    if "size" in given and "genes" not in given:  # an operator that does nothing but tell
        return given["x"].device, given["size"]
    if image is None:  # weights and taps: all they make is seen
        return given["genes"][0].device, 0
    size = _convolution if "stride" in given else _gradient if "wanted" in given and "dy" in given else _product
    return image.device, size(image, given) if image.numel() else 0


def blas_workspaces(device: torch.device) -> int:
    """Bytes that the BLAS keeps for itself in the device's allocator from its first product on; 0 off CUDA."""
    if device.type != "cuda":
        return 0
    sizes = re.findall(r":([0-9]+):([0-9]+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if sizes:
        return BLAS_THREADS * sum(int(size) * int(count) for size, count in sizes) << 10
    major, _ = torch.cuda.get_device_capability(device)
    return BLAS_THREADS * (HOPPER_BLAS if major >= 9 else OLDER_BLAS)


def _in_panels(x: Tensor, genes: Sequence[Tensor], product: str) -> bool:
    tokens, who, arch = math.prod(x.shape[:-1]), _backends.implementation(x.device), _backends.arch(x.device)
    half = x.dtype == torch.float16
    regime = plan.choose(tokens, who, x.element_size(), len(genes), arch=arch, product=product, float16=half)
    return regime == "panel"


def _product(x: Tensor, given: Mapping[str, Any]) -> int:
    """A panel of W for the product with x, `[*, I]` or, for dx, `[*, O]`; nothing where W is formed in registers."""
    rows, cols = (int(size) for size in given["genes"][0].shape)
    inner, outer = (cols, rows) if "x" in given else (rows, cols)
    if not _in_panels(x, given["genes"], "y" if "x" in given else "dx"):
        return 0
    if x.device.type == "cuda":  # one panel, or two that take turns
        return min(plan.GPU_PANEL_BYTES, rows * cols * x.element_size())
    length: int = plan.panel_length(inner, x.element_size(), outer)
    slow = _backends.implementation(x.device) == "reference"  # three temporaries in float64, a part of a panel each
    return length * inner * x.element_size() + (24 * min(length * inner, SPECIFICATION_ELEMENTS) if slow else 0)


def _gradient(x: Tensor, given: Mapping[str, Any]) -> int:
    """A panel of dW and the products with genes of its rows; on a GPU dW of 16 bits lies in registers."""
    rows, cols = given["genes"][0].shape
    dots = 8 * len(given["genes"])
    length: int = plan.panel_length(max(cols * x.element_size(), dots), 1, rows, x.device.type)
    fused = x.element_size() == 2 and _backends.triton_for(x.device) is not None
    panel = 0 if fused or not _in_panels(x, given["genes"], "dw") else cols * x.element_size()
    return length * (panel + (dots if given["need_dots"] else 0))


def _convolution(image: Tensor, given: Mapping[str, Any]) -> int:
    """A panel of the weight, or of its gradient, with a copy of it in the layout that the vendor likes.

    Where native kernels convolve: what their threads work in, pixels whose channels lie side by side, planes of dy.
    """
    shape, element, device = given["genes"][0].shape, image.element_size(), image.device.type
    by_output = "x" in given
    conv = Conv2d(*(given[name] for name in Conv2d._fields))
    product = "dx" if not by_output else "dw" if "wanted" in given and "dy" in given else "y"
    if _rows.takes(image, shape, conv, product):
        size = given["dy"].shape if product == "dw" else output_size(image.shape, shape, conv)
        copied = given["dy"].nbytes if product == "dw" and not given["dy"].is_contiguous() else 0
        return copied + _rows.workspace(image, given.get("size", size), shape, product)
    cut = panels(shape, given["groups"], element, by_output=by_output, device=device)
    sizes: list[int] = [(panel.rows.stop - panel.rows.start) * (panel.inner.stop - panel.inner.start) for panel in cut]
    kernel: int = math.prod(shape[2:])
    return 2 * max(sizes) * kernel * element
