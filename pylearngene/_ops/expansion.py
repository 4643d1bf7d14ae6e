# SPDX-License-Identifier: Apache-2.0
"""The `expansion` operators: schemas, implementations and fake kernels.

`expansion_linear` and `expansion_weight` are functional; their `*_wgrad_` partners add to declared accumulators.
The `*_tapped` forms and `gene_tap` exist for compiled graphs (formulas in `expansion_formulas`). Shape letters as in
the package: M tokens, O out, I in, K genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pylearngene import _checks
from pylearngene._ops import expansion_regimes as _regimes
from pylearngene._ops.expansion_kernels import accumulate, column_sums, native_for, work_dtype
from pylearngene._ops.expansion_stack import add_stack, fill_stack
from pylearngene.errors import DTypeError, ShapeError

LIBRARY = torch.library.Library("pylearngene", "DEF")

_LINEAR = "Tensor x, Tensor[] genes, Tensor coeffs, Tensor? bias, Tensor[] bias_genes, str? activation"
_TAP = "Tensor token, Tensor[] buffers, Tensor[] bias_buffers, int[] wanted, int[] bias_wanted"
SCHEMAS = (
    f"expansion_linear({_LINEAR}) -> Tensor",
    f"expansion_linear_tapped({_LINEAR}, {_TAP}) -> Tensor",
    "expansion_linear_dx(Tensor dy, Tensor[] genes, Tensor coeffs) -> Tensor",
    "expansion_linear_wgrad_(Tensor(a!)[] buffers, Tensor(b!)[] bias_buffers, Tensor dy, Tensor x, Tensor[] genes, "
    "Tensor[] bias_genes, Tensor coeffs, int[] wanted, int[] bias_wanted, bool need_dots) -> Tensor",
    "expansion_linear_wgrad(Tensor dy, Tensor x, Tensor[] genes, Tensor[] bias_genes, Tensor coeffs, int[] wanted, "
    "int[] bias_wanted, bool need_dots) -> Tensor[]",
    "expansion_weight(Tensor[] genes, Tensor coeffs, ScalarType? dtype) -> Tensor",
    "expansion_weight_tapped(Tensor[] genes, Tensor coeffs, ScalarType? dtype, Tensor token, Tensor[] buffers, "
    "int[] wanted) -> Tensor",
    "expansion_weight_wgrad_(Tensor(a!)[] buffers, Tensor dw, Tensor[] genes, Tensor coeffs, int[] wanted, "
    "bool need_dots) -> Tensor",
    "expansion_weight_wgrad(Tensor dw, Tensor[] genes, Tensor coeffs, int[] wanted, bool need_dots) -> Tensor[]",
    "gene_tap(Tensor[] genes, Tensor[] buffers) -> Tensor",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


def work_coeffs(coeffs: Tensor, gene: Tensor) -> Tensor:
    """The coefficients as kernels read them: contiguous, in the work dtype."""
    return coeffs.to(work_dtype(gene)).contiguous()


def tokens(x: Tensor) -> Tensor:
    """`[*, I]` as `[M, I]`; sizes are given, since -1 is ambiguous for empty tensors."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _matrix(gene: Tensor) -> Tensor:
    """A gene of any shape as `[rows, cols]`; one row for a vector."""
    return gene if gene.dim() == 2 else gene.reshape(1, gene.numel())


def agree(genes: Sequence[Tensor], coeffs: Tensor, name: str = "genes") -> None:
    """Refuse genes that differ in shape or dtype, and coefficients of another number."""
    first = genes[0]
    for k, gene in enumerate(genes):
        if gene.shape != first.shape:
            raise ShapeError(f"{name}[{k}]: expected shape {list(first.shape)}, got {list(gene.shape)}")
        if gene.dtype != first.dtype:
            expected, got = _checks.short(first.dtype), _checks.short(gene.dtype)
            raise DTypeError(f"{name}[{k}]: expected {expected}, got {got}")
    if coeffs.shape[-1:] != (len(genes),):
        raise ShapeError(f"coeffs: expected {len(genes)} coefficients, got shape {list(coeffs.shape)}")


def plain(like: Tensor, *named: tuple[str, Tensor | Sequence[Tensor]]) -> None:
    """Refuse whatever an address must not be taken of: other devices, and views past their storage."""
    for name, value in named:
        for tensor in [value] if isinstance(value, Tensor) else value:
            _checks.same_device(tensor, name, like, "the first tensor")
            _checks.storage_covers(tensor, name)


def columns_fit(tensor: Tensor, name: str, size: int, like: Tensor) -> None:
    """Refuse tokens of another width than a weight of genes has, and float64 mixed with another dtype."""
    _checks.last_dim(tensor, name, size, "I" if name == "x" else "O")
    check_work(tensor, name, like)


def check_work(tensor: Tensor, name: str, like: Tensor) -> None:
    """Refuse float64 mixed with another dtype."""
    if tensor.dtype != like.dtype and torch.float64 in (tensor.dtype, like.dtype):
        raise DTypeError(f"{name}: expected {_checks.short(like.dtype)}, got {_checks.short(tensor.dtype)}")


def gradients_fit(dy: Tensor, x: Tensor, genes: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    """Refuse what has changed its shape or dtype since the forward pass, before an address is taken of it."""
    columns_fit(x, "x", genes[0].shape[1], genes[0])
    columns_fit(dy, "dy", genes[0].shape[0], genes[0])
    if dy.shape[:-1] != x.shape[:-1]:
        raise ShapeError(f"x: expected shape {[*dy.shape[:-1], x.shape[-1]]} (tokens of dy), got {list(x.shape)}")
    if dy.dtype != x.dtype:
        raise DTypeError(f"x: expected {_checks.short(dy.dtype)} (that of dy), got {_checks.short(x.dtype)}")
    _sums_fit(buffers, "buffers", genes)


def _sums_fit(buffers: Sequence[Tensor], name: str, genes: Sequence[Tensor]) -> None:
    """Refuse accumulators that are not in the genes' shape and work dtype."""
    for buffer in buffers:
        _checks.shape(buffer, name, genes[0].shape, "that of the genes")
        if buffer.dtype != work_dtype(genes[0]):
            expected, got = _checks.short(work_dtype(genes[0])), _checks.short(buffer.dtype)
            raise DTypeError(f"{name}: expected {expected}, got {got}")


def expansion_linear(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
    activation: str | None,
) -> Tensor:
    """`y = activation(x W^T + b)`; x `[*, I]` -> `[*, O]` in x's dtype."""
    agree(genes, coeffs)
    plain(x, ("x", x), ("genes", genes), ("coeffs", coeffs), ("bias", [bias] if bias is not None else bias_genes))
    columns_fit(x, "x", genes[0].shape[1], genes[0])
    if bias_genes:
        agree(bias_genes, coeffs, "bias")
        _checks.shape(bias_genes[0], "bias", genes[0].shape[:1], "[O]")
    elif bias is not None:
        _checks.shape(bias, "bias", genes[0].shape[:1], "[O]")
        bias = bias.to(x.dtype).contiguous()
    y = _regimes.forward(tokens(x), genes, work_coeffs(coeffs, genes[0]), bias, bias_genes, activation)
    # Not `view`: autograd would refuse to let the output be written in place (`nn.ReLU(inplace=True)`).
    out: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return out


def expansion_linear_tapped(
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
    activation: str | None,
    *tap: object,
) -> Tensor:
    """As `expansion_linear`; token and buffers only matter to the backward pass."""
    return expansion_linear(x, genes, coeffs, bias, bias_genes, activation)


def expansion_linear_dx(dy: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    """`dx = dy W`; dy `[*, O]` -> `[*, I]`."""
    agree(genes, coeffs)
    plain(dy, ("dy", dy), ("genes", genes), ("coeffs", coeffs))
    columns_fit(dy, "dy", genes[0].shape[0], genes[0])
    dx = _regimes.input_gradient(tokens(dy), genes, work_coeffs(coeffs, genes[0]))
    return dx.view(*dy.shape[:-1], dx.shape[-1])


def expansion_linear_wgrad_(
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
) -> Tensor:
    """Add `c_k dW` and `c_k db` to the accumulators of the wanted genes; returns dcoeffs `[K]` (or `[0]`).

    `buffers[j]` belongs to gene `wanted[j]`, `bias_buffers[j]` to bias gene `bias_wanted[j]`.
    """
    agree(genes, coeffs)
    plain(dy, ("dy", dy), ("x", x), ("genes", genes), ("coeffs", coeffs), ("buffers", buffers), ("bias", bias_genes))
    gradients_fit(dy, x, genes, buffers)
    work = work_coeffs(coeffs, genes[0])
    dy, x = tokens(dy), tokens(x)
    dots = None
    if wanted or need_dots:
        dots = _regimes.gene_gradients(place(buffers, wanted, len(genes)), dy, x, genes, work, need_dots)
    if bias_genes and (bias_wanted or need_dots):
        db = column_sums(dy)
        add_bias_gradients(bias_buffers, bias_wanted, db, bias_genes, coeffs, dots)
    return coeffs.new_empty(0) if dots is None else dots.to(coeffs.dtype)


def add_bias_gradients(
    buffers: Sequence[Tensor],
    wanted: Sequence[int],
    db: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    dots: Tensor | None,
) -> None:
    """Add `c_k db` to the accumulators of the wanted bias genes, and `<db, b_k>` to the dots where there are any."""
    agree(genes, coeffs, "bias")
    plain(db, ("bias_buffers", buffers))
    _checks.shape(genes[0], "bias", db.shape, "[O]")
    check_work(genes[0], "bias", db)
    _sums_fit(buffers, "bias_buffers", genes)
    if native_for(db) is not None:
        own = None if dots is None else dots.new_empty((1, len(genes)))
        placed = [None if b is None else _matrix(b) for b in place(buffers, wanted, len(genes))]
        accumulate(_matrix(db), [_matrix(gene) for gene in genes], work_coeffs(coeffs, genes[0]), placed, 0, own)
        if dots is not None and own is not None:
            dots += own[0]
        return
    for buffer, k in zip(buffers, wanted, strict=True):
        buffer.addcmul_(db, coeffs[k].to(buffer.dtype))
    if dots is not None:
        dots += torch.stack([(db.double() * gene.double()).sum() for gene in genes])


def expansion_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    wanted: Sequence[int],
    bias_wanted: Sequence[int],
    need_dots: bool,
) -> list[Tensor]:
    """The functional form: gradients of the wanted genes, of the wanted bias genes, then of the coefficients."""
    buffers = [accumulator(genes[k]) for k in wanted]
    bias_buffers = [accumulator(bias_genes[k]) for k in bias_wanted]
    dots = expansion_linear_wgrad_(
        buffers, bias_buffers, dy, x, genes, bias_genes, coeffs, wanted, bias_wanted, need_dots
    )
    return [*buffers, *bias_buffers, dots]


def expansion_weight(genes: Sequence[Tensor], coeffs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`W = sum_k c_k G_k`: coeffs `[K]` -> the genes' shape; `[L, K]` -> `[L, *]`."""
    agree(genes, coeffs)
    plain(genes[0], ("genes", genes), ("coeffs", coeffs))
    return synthesize(genes, coeffs, dtype)


def synthesize(genes: Sequence[Tensor], coeffs: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As `expansion_weight`, on checked tensors."""
    work = work_coeffs(coeffs, genes[0])
    matrices = [_matrix(gene) for gene in genes]
    layers = coeffs.numel() // len(genes)
    out = genes[0].new_empty((*coeffs.shape[:-1], *genes[0].shape), dtype=dtype or genes[0].dtype)
    fill_stack(out.view(layers, *matrices[0].shape).unbind(0), matrices, work.view(layers, len(genes)))
    return out


def write_stack(outs: Sequence[Tensor], genes: Sequence[Tensor], coeffs: Tensor) -> None:
    """`outs[l] = sum_k c[l, k] G_k` for tensors that are there: outs in the genes' shape, any strides and dtypes."""
    agree(genes, coeffs)
    plain(genes[0], ("genes", genes), ("coeffs", coeffs), ("outs", outs))
    if all(out.is_contiguous() and out.dtype == genes[0].dtype for out in outs):
        fill_stack([_matrix(out) for out in outs], [_matrix(gene) for gene in genes], work_coeffs(coeffs, genes[0]))
        return
    for out, row in zip(outs, coeffs, strict=True):
        out.copy_(synthesize(genes, row, None))


def expansion_weight_tapped(genes: Sequence[Tensor], coeffs: Tensor, dtype: torch.dtype | None, *tap: object) -> Tensor:
    """As `expansion_weight`; token and buffers only matter to the backward pass."""
    return expansion_weight(genes, coeffs, dtype)


def expansion_weight_wgrad_(
    buffers: Sequence[Tensor],
    dw: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    wanted: Sequence[int],
    need_dots: bool,
) -> Tensor:
    """Add `c_k dW` to the accumulators of the wanted genes; returns dcoeffs in coeffs' shape (or `[0]`)."""
    plain(dw, ("dw", dw), ("genes", genes), ("coeffs", coeffs), ("buffers", buffers))
    layers = coeffs.reshape(coeffs.numel() // len(genes), len(genes))
    grads = dw.reshape(len(layers), *genes[0].shape).unbind(0)
    if wanted:
        columns = work_coeffs(layers, genes[0]).unbind(1)
        matrices = [_matrix(buffer) for buffer in buffers]
        add_stack(matrices, [_matrix(grad) for grad in grads], [columns[k] for k in wanted])
    if not need_dots:
        return coeffs.new_empty(0)
    dots = [torch.stack([(grad.double() * gene.double()).sum() for gene in genes]) for grad in grads]
    return torch.stack(dots).to(coeffs.dtype).view(coeffs.shape)


def expansion_weight_wgrad(
    dw: Tensor, genes: Sequence[Tensor], coeffs: Tensor, wanted: Sequence[int], need_dots: bool
) -> list[Tensor]:
    """The functional form: gradients of the wanted genes, then of the coefficients."""
    buffers = [accumulator(genes[k]) for k in wanted]
    return [*buffers, expansion_weight_wgrad_(buffers, dw, genes, coeffs, wanted, need_dots)]


def gene_tap(genes: Sequence[Tensor], buffers: Sequence[Tensor]) -> Tensor:
    """A token that every layer of a compiled pass consumes, so that the tap's backward runs after theirs."""
    return genes[0].new_zeros((), dtype=torch.float32)


def accumulator(gene: Tensor) -> Tensor:
    """Zeros in the gene's shape and work dtype, contiguous whatever the gene's strides."""
    return torch.zeros_like(gene, dtype=work_dtype(gene), memory_format=torch.contiguous_format)


def place(buffers: Sequence[Tensor], wanted: Sequence[int], count: int) -> list[Tensor | None]:
    """The accumulators by gene, None for genes that need none."""
    placed: list[Tensor | None] = [None] * count
    for buffer, k in zip(buffers, wanted, strict=True):
        placed[k] = buffer
    return placed


def _fake_linear(x: Tensor, genes: Sequence[Tensor], *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], genes[0].shape[0]))


def _fake_dx(dy: Tensor, genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], genes[0].shape[1]))


def _fake_weight(genes: Sequence[Tensor], coeffs: Tensor, dtype: torch.dtype | None, *tap: object) -> Tensor:
    return genes[0].new_empty((*coeffs.shape[:-1], *genes[0].shape), dtype=dtype or genes[0].dtype)


def fake_wgrad_(
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
    *settings: object,
) -> Tensor:
    """Shape of what the accumulating weight gradient of any product returns."""
    return coeffs.new_empty(coeffs.shape if need_dots else (0,))


def fake_wgrad(
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    bias_genes: Sequence[Tensor],
    coeffs: Tensor,
    wanted: Sequence[int],
    bias_wanted: Sequence[int],
    need_dots: bool,
    *settings: object,
) -> list[Tensor]:
    """Shapes of what the functional weight gradient of any product returns."""
    grads = [accumulator(genes[k]) for k in wanted] + [accumulator(bias_genes[k]) for k in bias_wanted]
    return [*grads, coeffs.new_empty(coeffs.shape if need_dots else (0,))]


def _fake_weight_wgrad_(
    buffers: Sequence[Tensor],
    dw: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    wanted: Sequence[int],
    need_dots: bool,
) -> Tensor:
    return coeffs.new_empty(coeffs.shape if need_dots else (0,))


def _fake_weight_wgrad(
    dw: Tensor, genes: Sequence[Tensor], coeffs: Tensor, wanted: Sequence[int], need_dots: bool
) -> list[Tensor]:
    return [*[accumulator(genes[k]) for k in wanted], coeffs.new_empty(coeffs.shape if need_dots else (0,))]


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "expansion_linear": (expansion_linear, _fake_linear),
    "expansion_linear_tapped": (expansion_linear_tapped, _fake_linear),
    "expansion_linear_dx": (expansion_linear_dx, _fake_dx),
    "expansion_linear_wgrad_": (expansion_linear_wgrad_, fake_wgrad_),
    "expansion_linear_wgrad": (expansion_linear_wgrad, fake_wgrad),
    "expansion_weight": (expansion_weight, _fake_weight),
    "expansion_weight_tapped": (expansion_weight_tapped, _fake_weight),
    "expansion_weight_wgrad_": (expansion_weight_wgrad_, _fake_weight_wgrad_),
    "expansion_weight_wgrad": (expansion_weight_wgrad, _fake_weight_wgrad),
    "gene_tap": (gene_tap, gene_tap),
}
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")  # any device: which kernel runs is asked inside
    torch.library.register_fake(f"pylearngene::{_name}", _fake, lib=LIBRARY)
