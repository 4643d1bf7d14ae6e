# SPDX-License-Identifier: Apache-2.0
"""`expansion_norm` on tensors, without a graph: the native kernels, and the same through operators of PyTorch.

Layer norms, RMS norms, and RMS norms that round before the gain multiplies; the kind is the number of the native calls.

Tensors that the kernels do not read, and calls that a mode, a profiler or a tracer is to see, go through PyTorch, with
gain and bias as tensors. What is saved and returned is the same. No operator computes a norm: compiled graphs and
transforms are given the vectors and PyTorch's norm, which they can fuse and differentiate. Tensors without data have
the results of the kernels, and an operator tells who counts bytes what these hold inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pylearngene import _backends
from pylearngene._ops.expansion import LIBRARY
from pylearngene._ops.expansion_direct import Listed, casting, unobserved
from pylearngene._ops.expansion_kernels import THREADS_PAY_FROM, work_dtype
from pylearngene._ops.expansion_products import weight

LAYER, RMS, RMS_GAIN_LAST = range(3)
_CLASSES = (Tensor, nn.Parameter, nn.Buffer)
LIBRARY.define("expansion_norm_inside(Tensor x, SymInt size) -> ()")
LIBRARY.impl("expansion_norm_inside", lambda x, size: None, "CompositeExplicitAutograd")
_norm_backward = torch.ops.aten.native_layer_norm_backward.default


@cache
def _calls_of(native: ModuleType, kind: int) -> Any:
    """The native calls of a kind; None where torch has not the table by which it shows tensors, or another one."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    try:
        return native.expansion_norm.Calls(THREADS_PAY_FROM, exchange, _CLASSES, kind)
    except (TypeError, ValueError):
        return None


def _open(first: Any, kind: int) -> Any:
    """The native calls where they may be made on what may be a tensor, else None; autocast casts nothing of a norm."""
    native = _backends.native() if getattr(first, "is_cpu", False) and unobserved(True) else None
    return None if native is None else _calls_of(native, kind)


def at_once(kind: int, x: Any, genes: Listed, bias_genes: Listed, coeffs: Tensor, eps: float, keep: bool) -> Any:
    """y, or with `keep` the pair of y and the moments, by the kernels; None where they do not take the tensors.

    Nothing needs to be known of the arguments.
    """
    calls = _open(x, kind)
    if calls is None or (casting() and x.dtype != _dtype(genes)):  # the vectors then keep the genes' dtype
        return None
    return calls.forward(_backends.LEVEL, torch.get_num_threads(), x, genes, bias_genes, coeffs, eps, keep)


def _dtype(genes: Listed) -> Any:
    """That of the first gene; None where there is none, as a parametrization leaves its list."""
    return getattr(next(iter(genes.values() if isinstance(genes, Mapping) else genes), None), "dtype", None)


def forward(
    kind: int, x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y `[*, N]`, and the moments `[2 M]` in the work dtype: means, 0 in RMS norms, then 1 / deviations."""
    made = at_once(kind, x, genes, bias_genes, coeffs, eps, True)
    if made is None and not x.is_contiguous():
        made = at_once(kind, x.contiguous(), genes, bias_genes, coeffs, eps, True)
    if made is not None:
        y, moments = made
        return y, moments
    if _without_data(x):
        return x.new_empty(x.shape), coeffs.new_empty(2 * math.prod(x.shape[:-1]))
    gain, bias = vectors(x, genes, bias_genes, coeffs)
    if kind == LAYER:
        y, mean, scale = torch.native_layer_norm(x, gain.shape, gain, bias, eps)
    else:
        normed, scale = _rms(x, eps)
        y, mean = (_as_multiplied(kind, x, normed) * gain).to(x.dtype), torch.zeros_like(scale)
    return y, torch.cat((mean.flatten(), scale.flatten()))


def _without_data(x: Tensor) -> bool:
    """Whether x stands for a tensor that the kernels would take."""
    return isinstance(x, FakeTensor) and _backends.native() is not None


def _rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x by the root of its mean square, in the work dtype, and one by that root."""
    wide = x.to(work_dtype(x))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale, scale


def _as_multiplied(kind: int, x: Tensor, normed: Tensor) -> Tensor:
    """What the gain of an RMS norm multiplies, in the work dtype."""
    return normed.to(x.dtype).to(normed.dtype) if kind == RMS_GAIN_LAST else normed


def vectors(
    x: Tensor, genes: Sequence[Tensor], bias_genes: Sequence[Tensor], coeffs: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gain and bias as the kernels form them: rounded to the genes' dtype and to x's, in the work dtype."""
    return as_read(x, weight(genes, coeffs, None), weight(bias_genes, coeffs, None) if bias_genes else None)


def as_read(x: Tensor, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Expanded vectors with the values that they have in x's dtype, in the work dtype."""
    work = work_dtype(x)
    return gain.to(x.dtype).to(work), None if bias is None else bias.to(x.dtype).to(work)


def backward(
    kind: int,
    dy: Tensor,
    saved: tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor, Tensor],
    buffers: Sequence[Tensor | None],
    bias_buffers: Sequence[Tensor | None],
    need_dx: bool,
    need_dots: bool,
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return dx and dcoeffs, each None where it is not needed; None at all where the kernels do not take the tensors.

    Args:
        kind: of the norm.
        dy: `[*, N]`.
        saved: x, genes, bias genes, coefficients and moments of the forward pass.
        buffers: per gene what `c_k dg` is added to, or None.
        bias_buffers: per bias gene what `c_k db` is added to, or None.
        need_dx: whether dx is needed.
        need_dots: whether dcoeffs is.
    """
    x, genes, bias_genes, coeffs, moments = saved
    if _without_data(x):
        if need_dots or any(buffer is not None for buffer in (*buffers, *bias_buffers)):
            size = workspace(math.prod(x.shape[:-1]), x.shape[-1], coeffs.element_size())
            torch.ops.pylearngene.expansion_norm_inside.default(x, size)
        return x.new_empty(x.shape) if need_dx else None, coeffs.new_empty(len(genes)) if need_dots else None
    calls = _open(dy, kind)
    if calls is None:
        return None
    level, threads, rest = _backends.LEVEL, torch.get_num_threads(), (moments, genes, bias_genes, coeffs)
    ends = (buffers, bias_buffers, need_dx, need_dots)
    made: tuple[Tensor | None, Tensor | None] | None = calls.backward(level, threads, dy, x, *rest, *ends)
    if made is None and not (dy.is_contiguous() and x.is_contiguous()):
        made = calls.backward(level, threads, dy.contiguous(), x.contiguous(), *rest, *ends)
    return made


def workspace(tokens: int, columns: int, itemsize: int) -> int:
    """Bytes that the kernel of a backward pass holds inside, for tokens `[M, N]` and a size of the work dtype."""
    native: Any = _backends.native()
    size: int = native.expansion_norm.workspace(tokens, columns, itemsize)
    return size


def vector_gradients(
    dy: Tensor, x: Tensor, moments: Tensor, gain: Tensor, bias: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx and the gradients of gain and bias of a layer norm, through PyTorch; dx may be differentiated again."""
    mean, scale = moments.view(2, *x.shape[:-1], 1).unbind()
    mask = [need_dx, True, bias is not None]
    found: tuple[Tensor, Tensor, Tensor] = _norm_backward(dy, x, gain.shape, mean, scale, gain, bias, mask)
    return found


def rms_gradients(kind: int, dy: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return dx and the gradient of an RMS norm's gain, through PyTorch; dx may be differentiated again."""
    normed, scale = _rms(x, eps)
    dy = dy.to(normed.dtype)
    up = dy * gain
    dx = (up - normed * (up * normed).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), (dy * _as_multiplied(kind, x, normed)).reshape(-1, gain.shape[0]).sum(0)
