# SPDX-License-Identifier: Apache-2.0
"""What `expansion_linear`, `expansion_weight` and the settings refuse, and in which words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pylearngene as plg
from pylearngene.errors import ArgumentError, DeviceError, DTypeError, ShapeError

X, G, C = torch.zeros(2, 4), [torch.zeros(3, 4)] * 2, torch.ones(2)


class Subclass(torch.Tensor):
    pass


REFUSED: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "x no tensor": (([1.0], G, C), {}, DTypeError, r"x: expected a torch.Tensor, got list"),
    "x subclass": ((X.as_subclass(Subclass), G, C), {}, DTypeError, r"x: expected a plain .* Subclass"),
    "x ints": ((X.int(), G, C), {}, DTypeError, r"x: expected float32, .*, got int32"),
    "x width": ((torch.zeros(2, 5), G, C), {}, ShapeError, r"x: expected shape \[\*, I\] with I = 4, got \[2, 5\]"),
    "x scalar": ((torch.zeros(()), G, C), {}, ShapeError, r"x: expected shape \[\*, I\] with I = 4, got \[\]"),
    "x device": ((X.to("meta"), G, C), {}, DeviceError, r"x: expected device cpu \(that of genes\), got meta"),
    "x double": ((X.double(), G, C), {}, DTypeError, r"x: expected float32 .*, got float64"),
    "no genes": ((X, [], C), {}, ArgumentError, r"genes: expected 1 to 64 genes, got 0"),
    "many genes": ((X, [G[0]] * 65, torch.ones(65)), {}, ArgumentError, r"genes: expected 1 to 64 genes, got 65"),
    "gene no tensor": ((X, [G[0], None], C), {}, DTypeError, r"genes\[1\]: expected a torch.Tensor, got NoneType"),
    "gene shape": (
        (X, [G[0], torch.zeros(4, 3)], C),
        {},
        ShapeError,
        r"genes\[1\]: expected shape .* \[3, 4\], got \[4, 3\]",
    ),
    "gene dtype": ((X, [G[0], G[1].half()], C), {}, DTypeError, r"genes\[1\]: expected float32 .*, got float16"),
    "gene device": ((X, [G[0], G[1].to("meta")], C), {}, DeviceError, r"genes\[1\]: expected device cpu"),
    "gene axes": ((X, [torch.zeros(4)] * 2, C), {}, ShapeError, r"genes: expected K tensors \[O, I\], got shape \[4\]"),
    "gene scalar": ((X, torch.zeros(()), C), {}, ShapeError, r"genes: expected a sequence of tensors or one stacked"),
    "coeffs count": (
        (X, G, torch.ones(3)),
        {},
        ShapeError,
        r"coeffs: expected shape \[K\] with K = 2 genes, got \[3\]",
    ),
    "coeffs stacked": ((X, G, torch.ones(1, 2)), {}, ShapeError, r"coeffs: expected shape \[K\] with K = 2"),
    "coeffs ints": ((X, G, C.long()), {}, DTypeError, r"coeffs: expected float32, .*, got int64"),
    "coeffs list": ((X, G, [1.0, 1.0]), {}, DTypeError, r"coeffs: expected a torch.Tensor, got list"),
    "coeffs device": ((X, G, C.to("meta")), {}, DeviceError, r"coeffs: expected device cpu"),
    "bias double": (
        (X, G, C, torch.zeros(3).double()),
        {},
        DTypeError,
        r"bias: expected float32 .*float64 does not mix.*, got float64",
    ),
    "genes none": ((X, None, C), {}, DTypeError, r"genes: expected tensors, or one stacked tensor, got NoneType"),
    "sparse": ((X.to_sparse(), G, C), {}, DTypeError, r"x: expected a strided tensor, got layout sparse_coo"),
    "bias shape": ((X, G, C, torch.zeros(4)), {}, ShapeError, r"bias: expected shape \[O\] = \[3\], got \[4\]"),
    "bias genes": ((X, G, C, torch.zeros(3, 3)), {}, ShapeError, r"bias: expected \[O\] or K = 2 bias genes, got 3"),
    "bias gene shape": (
        (X, G, C, torch.zeros(2, 4)),
        {},
        ShapeError,
        r"bias\[0\]: expected shape \[O\] = \[3\], got \[4\]",
    ),
    "bias ints": ((X, G, C, torch.zeros(3).int()), {}, DTypeError, r"bias: expected float32, .*, got int32"),
    "activation": (
        (X, G, C),
        {"activation": "tanh"},
        ArgumentError,
        r"activation: expected one of None, 'relu', .*, got 'tanh'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str) -> None:
    arguments, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        plg.functional.expansion_linear(*arguments, **options)


def test_freed_storage_is_refused() -> None:
    def gone(*shape: int) -> Tensor:
        tensor = torch.zeros(*shape)
        tensor.untyped_storage().resize_(0)
        return tensor

    call = plg.functional.expansion_linear
    with pytest.raises(DeviceError, match=r"genes: expected a storage of at least 48 bytes, got 0"):
        call(X, [G[0], gone(3, 4)], C)
    with pytest.raises(DeviceError, match=r"x: expected a storage of at least 32 bytes, got 0"):
        call(gone(2, 4), G, C)
    with pytest.raises(DeviceError, match=r"coeffs: expected a storage of at least 8 bytes, got 0"):
        call(X, G, gone(2))
    with pytest.raises(DeviceError, match=r"bias: expected a storage of at least 12 bytes, got 0"):
        call(X, G, C, gone(3))


def test_operators_refuse_genes_that_differ() -> None:
    """Below the public door too: addresses of unlike genes must never be read."""
    run = torch.ops.pylearngene.expansion_linear
    with pytest.raises(ShapeError, match=r"genes\[1\]: expected shape \[3, 4\], got \[2, 2\]"):
        run(X, [G[0], torch.zeros(2, 2)], C, None, [], None)
    with pytest.raises(DTypeError, match=r"genes\[1\]: expected float32, got bfloat16"):
        run(X, [G[0], G[1].bfloat16()], C, None, [], None)
    with pytest.raises(ShapeError, match=r"coeffs: expected 2 coefficients, got shape \[1\]"):
        run(X, G, torch.ones(1), None, [], None)


def test_weight_refuses_bad_input() -> None:
    weight = plg.functional.expansion_weight
    with pytest.raises(ArgumentError, match="genes: expected 1 to 64 genes, got 0"):
        weight([], C)
    with pytest.raises(ShapeError, match=r"genes\[1\]: expected shape .*, got \[2\]"):
        weight([torch.zeros(3), torch.zeros(2)], C)
    with pytest.raises(DTypeError, match=r"coeffs: expected float32, .* got int64"):
        weight(G, C.long())
    with pytest.raises(DeviceError, match="coeffs: expected device cpu"):
        weight(G, C.to("meta"))
    genes = [torch.ones(2, 2, dtype=torch.float64, requires_grad=True)]
    coeffs = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(weight(genes, coeffs).pow(2).sum(), coeffs, create_graph=True)
    with pytest.raises(plg.errors.DoubleBackwardError, match="double backward"):
        torch.autograd.grad(grad, genes)
    with pytest.raises(plg.errors.ShapeError, match=r"coeffs: expected shape \[K\] or \[L, K\] with K = 2 genes"):
        plg.functional.expansion_weight(G, torch.ones(2, 3))


def test_settings_refuse_unknown_names() -> None:
    with pytest.raises(plg.errors.ArgumentError, match=r"regime: expected one of 'auto', .*, got 'fast'"):
        plg.set_regime("fast")
    with pytest.raises(plg.errors.ArgumentError, match=r"backend: expected one of 'auto', .*, got 'fast'"):
        plg.set_backend("fast")
