# SPDX-License-Identifier: Apache-2.0
"""Public functions of `low_rank`: weights of a few shared directions, and the products that never build them.

Checks arguments and contracts the factors one after the other through PyTorch's own products and autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylearngene import _checks
from pylearngene.errors import DTypeError, ShapeError
from pylearngene.functional._context import autocast, check_pair, check_storages
from pylearngene.functional._low_rank_functions import factored, synthesized


def low_rank_linear(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, gate: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Apply a linear layer whose weight is a sum of R directions, each with its own strength, gated if asked for.

    `y = ((x V) * s * gate) U^T + b`, which is `x W^T + b` with `W = U diag(s * gate) V^T`.

    Neither the `[O, I]` weight nor, with a gate per sample, the B weights are ever built, in neither pass: the factors
    are contracted with x in this order (regime `factored`), and what is saved has R columns.

    Args:
        x: `[*, I]`, any strides; float32, float64, bfloat16 or float16. Differentiable.
        u: U, `[O, R]`; x's dtype, or any of float32, bfloat16, float16 where x is one of these (float64 goes only with
            float64). Any strides. Differentiable.
        s: `[R]`, any of the four dtypes; used in float32 (float64 for float64 factors). Differentiable.
        v: V, `[I, R]`, not transposed; dtype of U. Any strides. Differentiable.
        gate: None, `[R]`, or `[B, R]` with one row per sample, B = x.shape[0]; dtypes as s. Differentiable.
        bias: None or `[O]`. Differentiable.

    Returns:
        `[*, O]` in x's dtype (under autocast: the autocast dtype).

    Raises:
        DTypeError: a tensor is not floating, is a tensor subclass, U and V differ in dtype, or float64 is mixed with
            another dtype.
        ShapeError: shapes of x, u, s, v, gate or bias do not fit each other.
        DeviceError: the tensors are on different devices, or reach past their storage.

    Numerics: U and V are rounded to x's dtype; `s * gate` is float32; `x V`, and its product with them, are rounded
    once each to x's dtype; products accumulate as in `F.linear`. Gradients of s and gate are float32 sums of what is
    not rounded to 16 bits. May be differentiated any number of times.

    Backends: PyTorch (any device); functorch transforms, `torch.compile` and `torch.export` see its products.

    Source: shared bases with a spectrum per layer, Xie et al., "FINE: Factorizing Knowledge for Initialization of
    Variable-sized Diffusion Models", arXiv 2409.19289; gates per class, Xie et al., "KIND: Knowledge Integration and
    Diversion for Training Decomposable Models", ICML 2025, arXiv 2408.07337; gates per sample, Feng et al., "Knowledge
    Diversion for Efficient Morphology Control and Policy Transfer", ICML 2026, arXiv 2512.09796.

    Example:
        >>> import torch, pylearngene as plg
        >>> x, u, v = torch.ones(2, 4), torch.ones(3, 2), torch.ones(4, 2)
        >>> plg.functional.low_rank_linear(x, u, torch.tensor([1.0, 0.5]), v).tolist()
        [[6.0, 6.0, 6.0], [6.0, 6.0, 6.0]]
    """
    _checks.tensor(x, "x")
    _checks.floating(x, "x")
    _check_factors(u, s, v, gate, x)
    _checks.last_dim(x, "x", len(v), "I")
    if bias is not None:
        _checks.tensor(bias, "bias")
        _checks.floating(bias, "bias")
        _checks.shape(bias, "bias", (len(u),), "[O]")
        _checks.same_device(bias, "bias", u, "u")
    check_samples(gate, x)
    check_storages(x=x, u=u, s=s, v=v, gate=gate, bias=bias)
    x = autocast(x)
    check_pair(x, u)
    if bias is not None:
        check_pair(bias, u, "bias")
    return factored(x, u, strengths(u, s, gate), v, bias)


def low_rank_weight(u: Tensor, s: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """Synthesize the weight of one layer, or one weight per sample.

    `W = U diag(s * gate) V^T`.

    This writes the full weight: for inspection, export and benchmarks. Layers use `low_rank_linear`.

    Args:
        u: U, `[O, R]`. Differentiable.
        s: `[R]`. Differentiable.
        v: V, `[I, R]`; dtype of U. Differentiable.
        gate: None, `[R]`, or `[B, R]`. Differentiable.

    Returns:
        `[O, I]`, or `[B, O, I]` for a gate `[B, R]`, in the dtype of U.

    Raises:
        DTypeError: a tensor is not floating, is a tensor subclass, or U and V differ in dtype.
        ShapeError: shapes of u, s, v or gate do not fit each other.
        DeviceError: the tensors are on different devices, or reach past their storage.

    Numerics: a float32 product (float64 for float64 factors), rounded once, also under autocast.

    Backends: as `low_rank_linear`.

    Source: as `low_rank_linear`.

    Example:
        >>> import torch, pylearngene as plg
        >>> u, v = torch.eye(3, 2), torch.eye(4, 2)
        >>> plg.functional.low_rank_weight(u, torch.tensor([3.0, 2.0]), v).tolist()
        [[3.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    _check_factors(u, s, v, gate)
    check_storages(u=u, s=s, v=v, gate=gate)
    return synthesized(u, strengths(u, s, gate), v)


def strengths(u: Tensor, s: Tensor, gate: Tensor | None) -> Tensor:
    """`s * gate` in float32, or in float64 for float64 factors: `[R]` or `[B, R]`."""
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    s = s if s.dtype == work else s.to(work)
    return s if gate is None else s * gate.to(work)


def check_samples(gate: Tensor | None, x: Tensor) -> None:
    """Refuse a gate per sample where x has other samples, or none."""
    if gate is not None and gate.dim() == 2 and (x.dim() < 2 or gate.shape[0] != x.shape[0]):
        raise ShapeError(
            f"gate: expected [R] or [B, R] with a row per sample of x {list(x.shape)}, got {list(gate.shape)}"
        )


def check_strengths(s: Tensor, gate: Tensor | None, u: Tensor, rank: int) -> None:
    """Refuse strengths and gates that are not floating, not where U is, or not one per direction."""
    _check_vectors(s, "s", u, rank, (1,), "[R]")
    if gate is not None:
        _check_vectors(gate, "gate", u, rank, (1, 2), "[R] or [B, R]")


def _check_vectors(value: Tensor, name: str, u: Tensor, rank: int, dims: tuple[int, ...], letters: str) -> None:
    _checks.tensor(value, name)
    _checks.floating(value, name)
    _checks.same_device(value, name, u, "u")
    if value.dim() not in dims or value.shape[-1] != rank:
        raise ShapeError(f"{name}: expected shape {letters} with R = {rank}, got {list(value.shape)}")


def _check_factors(u: Tensor, s: Tensor, v: Tensor, gate: Tensor | None, x: Tensor | None = None) -> None:
    """Refuse factors that do not fit each other; of three that disagree the odd one out is named."""
    for name, value in (("u", u), ("v", v)):
        _checks.tensor(value, name)
        _checks.floating(value, name)
        if value.dim() != 2:
            raise ShapeError(f"{name}: expected shape {'[O, R]' if name == 'u' else '[I, R]'}, got {list(value.shape)}")
    third = _checks.tensor(s, "s") if x is None else x
    judge = u if u.device == v.device else third
    for name, value in (("u", u), ("v", v), ("s" if x is None else "x", third)):
        _checks.same_device(value, name, judge, "the other factors")
    if u.shape[1] != v.shape[1]:
        odd = "u" if isinstance(s, Tensor) and v.shape[1:] == s.shape else "v"
        rank, value = (v.shape[1], u) if odd == "u" else (u.shape[1], v)
        raise ShapeError(f"{odd}: expected R = {rank} columns, got {list(value.shape)}")
    if u.dtype != v.dtype:
        raise DTypeError(f"v: expected {_checks.short(u.dtype)} (that of u), got {_checks.short(v.dtype)}")
    check_strengths(s, gate, u, u.shape[1])
