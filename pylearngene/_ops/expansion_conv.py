# SPDX-License-Identifier: Apache-2.0
"""The `expansion_conv2d` operators: schemas, implementations and fake kernels.

As those of `expansion_linear`, with images for tokens; how they are computed is in `expansion_conv_panels`. Images are
`[B, C, H, W]`, genes `[O, C/groups, kh, kw]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pylearngene._ops import expansion_conv_panels as _panels
from pylearngene._ops import expansion_conv_rows as _rows
from pylearngene._ops.expansion import (
    LIBRARY,
    accumulator,
    add_bias_gradients,
    agree,
    fake_wgrad,
    fake_wgrad_,
    place,
    plain,
    synthesize,
    work_coeffs,
)
from pylearngene._ops.expansion_kernels import work_dtype
from pylearngene._ops.expansion_products import Conv2d
from pylearngene.errors import ShapeError

_CONV = "Tensor x, Tensor[] genes, Tensor coeffs, Tensor? bias, Tensor[] bias_genes"
_SETTINGS = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_TAP = "Tensor token, Tensor[] buffers, Tensor[] bias_buffers, int[] wanted, int[] bias_wanted"
_WANTED = "Tensor[] genes, Tensor[] bias_genes, Tensor coeffs, int[] wanted, int[] bias_wanted, bool need_dots"
SCHEMAS = (
    f"expansion_conv2d({_CONV}, {_SETTINGS}) -> Tensor",
    f"expansion_conv2d_tapped({_CONV}, {_SETTINGS}, {_TAP}) -> Tensor",
    f"expansion_conv2d_dx(Tensor dy, SymInt[] size, Tensor[] genes, Tensor coeffs, {_SETTINGS}) -> Tensor",
    "expansion_conv2d_wgrad_(Tensor(a!)[] buffers, Tensor(b!)[] bias_buffers, Tensor dy, Tensor x, "
    f"{_WANTED}, {_SETTINGS}) -> Tensor",
    f"expansion_conv2d_wgrad(Tensor dy, Tensor x, {_WANTED}, {_SETTINGS}) -> Tensor[]",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


def _as_they_are(tensor: Tensor) -> AbstractContextManager[object]:
    """The vendor's convolution is called with the dtypes that tensors have, also inside an autocast region."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _gradients_fit(dy: Tensor, size: Sequence[int], weight: Sequence[int], conv: Conv2d) -> None:
    """Refuse dy and x, of `size`, that have changed their shapes since the forward pass."""
    if size[1] != weight[1] * conv.groups:
        raise ShapeError(f"x: expected shape [B, C, H, W] with C = {weight[1] * conv.groups}, got {list(size)}")
    wanted = _panels.output_size(size, weight, conv)
    if tuple(dy.shape) != wanted:
        raise ShapeError(f"dy: expected shape {list(wanted)} (the result of x, {list(size)}), got {list(dy.shape)}")


def expansion_conv2d(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
    *settings: Any,
) -> Tensor:
    """`y = conv2d(x, W) + b`; x `[B, C, H, W]` -> `[B, O, H', W']` in x's dtype and memory format."""
    conv = Conv2d(*settings)
    agree(genes, coeffs)
    plain(x, ("x", x), ("genes", genes), ("coeffs", coeffs), ("bias", [bias] if bias is not None else bias_genes))
    if 0 in _panels.output_size(x.shape, genes[0].shape, conv):
        return _fake_conv(x, genes, coeffs, bias, bias_genes, *settings)
    if bias_genes:
        agree(bias_genes, coeffs, "bias")
        bias = synthesize(bias_genes, coeffs, x.dtype)
    elif bias is not None:
        bias = bias.to(x.dtype).contiguous()
    with _as_they_are(x):
        return _panels.forward(x, genes, work_coeffs(coeffs, genes[0]), bias, conv)


def expansion_conv2d_tapped(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
    *settings_and_tap: Any,
) -> Tensor:
    """As `expansion_conv2d`; token and buffers only matter to the backward pass."""
    return expansion_conv2d(x, genes, coeffs, bias, bias_genes, *settings_and_tap[:4])


def expansion_conv2d_dx(
    dy: Tensor, size: Sequence[int], genes: Sequence[Tensor], coeffs: Tensor, *settings: Any
) -> Tensor:
    """The gradient of x: dy `[B, O, H', W']` -> `size`, `[B, C, H, W]`."""
    agree(genes, coeffs)
    plain(dy, ("dy", dy), ("genes", genes), ("coeffs", coeffs))
    conv = Conv2d(*settings)
    _gradients_fit(dy, size, genes[0].shape, conv)
    if dy.numel() == 0:
        return dy.new_zeros(size)
    with _as_they_are(dy):
        return _panels.input_gradient(dy, size, genes, work_coeffs(coeffs, genes[0]), conv)


def expansion_conv2d_wgrad_(
    buffers: Sequence[Tensor],
    bias_buffers: Sequence[Tensor],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    wanted: Sequence[int],
    bias_wanted: Sequence[int],
    need_dots: bool,
    *settings: Any,
) -> Tensor:
    """Add `c_k dW` and `c_k db` to the accumulators of the wanted genes; as `expansion_linear_wgrad_`."""
    agree(genes, coeffs)
    plain(dy, ("dy", dy), ("x", x), ("genes", genes), ("coeffs", coeffs), ("buffers", buffers), ("bias", bias_genes))
    conv = Conv2d(*settings)
    _gradients_fit(dy, x.shape, genes[0].shape, conv)
    dots = torch.zeros(len(genes), dtype=torch.float64, device=x.device) if need_dots else None
    if (wanted or need_dots) and dy.numel():
        work, placed = work_coeffs(coeffs, genes[0]), place(buffers, wanted, len(genes))
        with _as_they_are(x):
            dots = _panels.gene_gradients(placed, dy, x, genes, work, need_dots, conv)
    if bias_genes and (bias_wanted or need_dots):
        db = dy.sum((0, 2, 3), dtype=work_dtype(bias_genes[0]))
        add_bias_gradients(bias_buffers, bias_wanted, db, bias_genes, coeffs, dots)
    return coeffs.new_empty(0) if dots is None else dots.to(coeffs.dtype)


def expansion_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    wanted: Sequence[int],
    bias_wanted: Sequence[int],
    *need_dots_and_settings: Any,
) -> list[Tensor]:
    """The functional form: gradients of the wanted genes, of the wanted bias genes, then of the coefficients."""
    buffers = [accumulator(genes[k]) for k in wanted]
    bias_buffers = [accumulator(bias_genes[k]) for k in bias_wanted]
    rest = (genes, bias_genes, coeffs, wanted, bias_wanted, *need_dots_and_settings)
    return [*buffers, *bias_buffers, expansion_conv2d_wgrad_(buffers, bias_buffers, dy, x, *rest)]


def _fake_conv(x: Tensor, genes: Sequence[Tensor], *rest: Any) -> Tensor:
    conv = Conv2d(*rest[3:7])
    size = _panels.output_size(x.shape, genes[0].shape, conv)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_rows.memory_format(x))


def _fake_dx(dy: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=_rows.memory_format(dy))


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "expansion_conv2d": (expansion_conv2d, _fake_conv),
    "expansion_conv2d_tapped": (expansion_conv2d_tapped, _fake_conv),
    "expansion_conv2d_dx": (expansion_conv2d_dx, _fake_dx),
    "expansion_conv2d_wgrad_": (expansion_conv2d_wgrad_, fake_wgrad_),
    "expansion_conv2d_wgrad": (expansion_conv2d_wgrad, fake_wgrad),
}
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pylearngene::{_name}", _fake, lib=LIBRARY)
