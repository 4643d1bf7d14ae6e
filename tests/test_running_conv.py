# SPDX-License-Identifier: Apache-2.0
"""Convolutions and norms of genes on a GPU against dense PyTorch in float64; on the CPU the same in small.

What they promise besides is in their own files, which run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from running_samples import current, delay, equal, finish, stream_of
from torch import Tensor

from pylearngene.functional import expansion_conv2d, expansion_weight

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "grouped": {"groups": 4, "padding": (1, 0)},
    "dilated": {"dilation": 2, "padding": 2},
}


def gradients(call: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    y = call(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def problem(where: torch.device, groups: int, kernel: int, dtype: torch.dtype) -> list[Tensor]:
    """x, coefficients, three genes and their biases."""
    x = torch.randn(4, 16, 14, 13, device=where)
    genes = [torch.randn(32, 16 // groups, kernel, kernel, device=where) / (16 * kernel**2) ** 0.5 for _ in range(3)]
    coeffs = torch.tensor([1.0, -0.3, 0.7], device=where, dtype=torch.promote_types(dtype, torch.float32))
    return [x.to(dtype), coeffs, *(t.to(dtype) for t in (*genes, *(torch.randn(32, device=where) for _ in range(3))))]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's convolutions in float32 as such, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(where: torch.device, dtype: torch.dtype, setting: str, channels_last: bool, exact: None) -> None:
    options = SETTINGS[setting]
    for kernel in (1, 3):
        leaves = problem(where, options.get("groups", 1), kernel, dtype)
        if channels_last:
            leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)

        def ours(x: Tensor, coeffs: Tensor, *rest: Tensor) -> Tensor:
            return expansion_conv2d(x, rest[:3], coeffs, rest[3:], **options)

        def dense(x: Tensor, coeffs: Tensor, *rest: Tensor) -> Tensor:
            weight = torch.einsum("k,koihw->oihw", coeffs, torch.stack(rest[:3]))
            return F.conv2d(x, weight, torch.einsum("k,ko->o", coeffs, torch.stack(rest[3:])), **options)

        with torch.no_grad():
            dy = torch.randn_like(ours(*leaves))
        found = gradients(ours, leaves, dy)
        expected = gradients(dense, [leaf.double() for leaf in leaves], dy.double())
        for mine, theirs in zip(found, expected, strict=True):
            error = (mine.double() - theirs).abs().max()
            assert error <= TOLERANCE[dtype] * theirs.abs().max().clamp(min=1.0), error
        assert all(equal(gradients(ours, leaves, dy), found) for _ in range(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions_and_weights_on_a_stream_that_has_just_written(where: torch.device, dtype: torch.dtype) -> None:
    leaves = problem(where, 1, 3, dtype)

    def both() -> list[Tensor]:
        x, coeffs, *rest = late
        y = expansion_conv2d(x, rest[:3], coeffs, rest[3:], padding=1)
        return [y, expansion_weight(rest[:3], coeffs), expansion_weight(rest[3:], torch.stack([coeffs, 2 * coeffs]))]

    late = leaves
    expected = both()
    late = [torch.full_like(leaf, torch.nan) for leaf in leaves]
    finish(where)
    with current(stream_of(where)):
        delay(where)
        for old, new in zip(late, leaves, strict=True):
            old.copy_(new)
        found = both()
        finish(where)
    assert equal(found, expected)
