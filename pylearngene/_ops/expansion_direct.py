# SPDX-License-Identifier: Apache-2.0
"""The short way to the native kernels: one call reads the tensors, has the result made and runs.

It leaves out PyTorch's dispatcher and our checks in Python, which cost more than a small product. That is safe since
nothing is remembered between calls, every tensor is read in every call: the native side takes only plain CPU tensors
that fit each other and lie within their storages, and says None of all others, whereupon the callers go the long way,
which computes them or names what is wrong. And since `unobserved` holds: nobody is to see the operators themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pylearngene import _backends, plan
from pylearngene._ops.expansion_kernels import THREADS_PAY_FROM

_CLASSES = (Tensor, nn.Parameter, nn.Buffer)
#: Genes in order, or under the keys "0", "1", ... that a ParameterList gives them.
Listed = Sequence[Tensor] | Mapping[str, Tensor | None]


def _nobody() -> frozenset[int]:
    """What the dispatcher has switched on where no mode, transform or tracer is: in inference mode, and elsewhere."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    inference = keys(key.BackendSelect)
    return frozenset((inference.raw_repr(), (inference | keys(key.ADInplaceOrView)).raw_repr()))


_NOBODY = _nobody()
_switched_on = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack
_autocast = torch._C._is_any_autocast_enabled
_profiler = torch._C._autograd._profiler_enabled


def unobserved(cast: bool = False) -> bool:
    """Whether an operator does nothing but compute: nothing compiles, traces, transforms, casts or counts calls.

    `cast` says that whatever autocast would do to its tensors is done.
    """
    return (
        not torch.compiler.is_compiling()
        and _switched_on().raw_repr() in _NOBODY
        and not (_function_modes() or _profiler())
        and (cast or not _autocast())
        and forward_ad._current_level < 0
    )


def traced(tensor: Tensor) -> bool:
    """Whether operators on a tensor are to be seen, since something traces, transforms or stands for it."""
    if type(tensor) is not Tensor or torch.compiler.is_compiling():
        return True
    return _switched_on().raw_repr() not in _NOBODY or forward_ad._current_level >= 0


@cache
def _calls_of(native: ModuleType) -> Any:
    """The native calls on tensors; None where torch has not the table by which it shows them, or another one."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    try:
        return native.expansion.Calls(THREADS_PAY_FROM, exchange, _CLASSES)
    except (TypeError, ValueError):
        return None


def _open(first: Any, cast: bool = False) -> Any:
    """The native calls where the short way is open to what may be a tensor, else None; off the CPU it costs nothing."""
    native = _backends.native() if getattr(first, "is_cpu", False) and unobserved(cast) else None
    return None if native is None else _calls_of(native)


@cache
def _most(dtype: torch.dtype, product: str, genes: int, pinned: str) -> int:
    """Up to how many tokens the short way is open, while this regime is pinned."""
    del pinned  # what plan reads as well; here it keeps the answers apart
    return plan.most_rows(_backends.LEVEL_NAME, dtype.itemsize, dtype == torch.float16, product, genes)


def casting() -> bool:
    """Whether autocast is on, for any device."""
    return _autocast()


def after_casts(x: Any) -> bool:
    """Whether the short way is open to x once it is in the dtype that autocast wants."""
    return type(x) in _CLASSES and _open(x, True) is not None


def few(x: Tensor, genes: int, dtype: torch.dtype) -> bool:
    """Whether x, cast to a dtype, has so few tokens that the short way forward may be open to it."""
    return x.dim() > 0 and x.numel() <= _most(dtype, "y", genes, plan.pinned()) * x.shape[-1]


def forward(
    x: Tensor, genes: Listed, coeffs: Tensor, bias: Tensor | None, bias_genes: Listed, cast: bool = False
) -> Tensor | None:
    """`y = x W^T + b` without a graph, or None; arguments as `expansion_linear`, of which nothing is known.

    `cast` says that x is in the dtype that autocast wants.
    """
    calls = _open(x, cast)
    if calls is None:
        return None
    most = _most(x.dtype, "y", len(genes), plan.pinned())
    y: Tensor | None = calls.forward(_backends.LEVEL, torch.get_num_threads(), most, x, genes, coeffs, bias, bias_genes)
    return y


def input_gradient(dy: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor | None:
    """`dx = dy W`, or None."""
    calls = _open(dy)
    if calls is None:
        return None
    most = _most(dy.dtype, "dx", len(genes), plan.pinned())
    dx: Tensor | None = calls.input_gradient(_backends.LEVEL, torch.get_num_threads(), most, dy, genes, coeffs)
    return dx


def gradients(
    dy: Tensor,
    x: Tensor | None,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias_genes: Sequence[Tensor],
    places: tuple[list[int], list[int]],
    sums: list[Tensor | None],
    need_dx: bool,
) -> Tensor | bool | None:
    """Add `c_k dW` and `c_k db` to the sums of genes; returns dx where it is needed, else True; or None: not done.

    Args:
        dy: `[*, O]`.
        x: `[*, I]`.
        genes: K tensors `[O, I]`.
        coeffs: `[K]` in the work dtype.
        bias_genes: K tensors `[O]`, or none.
        places: per gene, and per bias gene, where its sum is among `sums`, or -1.
        sums: contiguous, in the work dtype; None for a sum of nothing, whose place takes what is made then.
        need_dx: whether x needs a gradient.
    """
    calls = _open(dy)
    if calls is None:
        return None
    pinned = plan.pinned()
    most = _most(dy.dtype, "dw", len(genes), pinned)
    if need_dx:
        most = min(most, _most(dy.dtype, "dx", len(genes), pinned))
    level, threads = _backends.LEVEL, torch.get_num_threads()
    done: Tensor | bool | None = calls.gradients(
        level, threads, most, dy, x, genes, coeffs, places[0], bias_genes, places[1], sums, need_dx
    )
    return done


def weight(genes: Sequence[Tensor], coeffs: Tensor) -> Tensor | None:
    """`W = sum_k c_k G_k` of matrices or vectors in their dtype, without a graph, or None."""
    calls = _open(coeffs)
    if calls is None:
        return None
    w: Tensor | None = calls.weight(_backends.LEVEL, torch.get_num_threads(), genes, coeffs)
    return w
