# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of `expansion_conv` on every level this machine has, what they do not take, and when they run.

Oracle: `F.conv2d` in float64 and its gradients, with the dense weight. The operators around them are in
`test_expansion_conv`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from pylearngene import _C, plan
from pylearngene._ops import expansion_conv_rows as _rows
from pylearngene._ops.expansion_products import Conv2d
from pylearngene.reference.expansion import weight as specification

LEVELS = [_C.levels().index(name) for name in _C.supported_levels()]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
# Images, then O, kernel, strides, padding, dilation: tails of channels, columns and tokens, several chunks and panels.
CASES: dict[str, tuple[tuple[int, ...], int, tuple[int, int], tuple[int, ...]]] = {
    "odd": ((2, 5, 9, 10), 7, (3, 3), (1, 1, 1, 1, 1, 1)),
    "whole": ((2, 64, 14, 14), 64, (3, 3), (1, 1, 1, 1, 1, 1)),
    "tails": ((3, 33, 7, 7), 70, (3, 3), (1, 1, 1, 1, 1, 1)),
    "steps": ((2, 18, 9, 10), 40, (3, 5), (2, 3, 1, 2, 2, 1)),
    "chunks": ((2, 300, 7, 7), 290, (3, 3), (1, 1, 1, 1, 1, 1)),
    "64 taps": ((1, 6, 12, 11), 20, (8, 8), (1, 1, 1, 1, 3, 3)),
    "1 tap": ((2, 40, 6, 6), 48, (1, 1), (1, 1, 1, 1, 0, 0)),
    "more padding than kernel": ((1, 16, 4, 4), 16, (2, 2), (1, 1, 2, 2, 3, 3)),
}

per_level = pytest.mark.parametrize("level", LEVELS, ids=[_C.levels()[level] for level in LEVELS])
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype)[6:] for dtype in DTYPES])
per_case = pytest.mark.parametrize("case", CASES)


def calls() -> Any:
    return _C.expansion_conv.Calls(1, Tensor.__dlpack_c_exchange_api__, (Tensor, nn.Parameter))


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.abs().max().item()
    torch.testing.assert_close(got.double(), wanted, rtol=0.0, atol=tolerance * scale)


class Problem:
    """One convolution: tensors for the kernels, and what comes of them in float64."""

    def __init__(self, case: str, dtype: torch.dtype, gene_dtype: torch.dtype, last: bool) -> None:
        size, rows, kernel, self.steps = CASES[case]
        self.format = torch.channels_last if last else torch.contiguous_format
        self.x = torch.randn(size, dtype=torch.float64).to(dtype).contiguous(memory_format=self.format)
        scale = (size[1] * kernel[0] * kernel[1]) ** -0.5
        made = [torch.randn(rows, size[1], *kernel, dtype=torch.float64) * scale for _ in range(3)]
        self.genes = [gene.to(gene_dtype) for gene in made]
        self.coeffs = torch.randn(3, dtype=torch.float64).to(self.work)
        self.bias = torch.randn(rows, dtype=torch.float64).to(dtype)
        x = self.x.double().requires_grad_()
        w = specification(self.genes, self.coeffs, dtype).double().requires_grad_()
        self.y = F.conv2d(x, w, self.bias.double(), self.steps[:2], self.steps[4:], self.steps[2:4])
        self.dy = torch.randn(self.y.shape, dtype=torch.float64).to(dtype)
        self.dx, self.dw = torch.autograd.grad(self.y, (x, w), self.dy.double())

    @property
    def work(self) -> torch.dtype:
        return torch.float64 if self.genes[0].dtype == torch.float64 else torch.float32

    def empty(self, like: Tensor) -> Tensor:
        """A result that no kernel has written yet."""
        return torch.full(like.shape, float("nan"), dtype=self.x.dtype).contiguous(memory_format=self.format)


@per_level
@per_dtype
@per_case
@pytest.mark.parametrize("last", [False, True])
def test_products(level: int, dtype: torch.dtype, case: str, last: bool) -> None:
    for gene_dtype in {torch.float32 if dtype != torch.float64 else dtype, dtype}:
        p = Problem(case, dtype, gene_dtype, last)
        y = p.empty(p.y)
        assert calls().product(level, 2, y, p.x, p.genes, p.coeffs, p.bias, p.steps, False)
        close(y, p.y.detach(), TOLERANCE[dtype])
        if p.steps[:2] != (1, 1):
            continue
        kernel = p.genes[0].shape[2:]
        around = [p.steps[2 + j] * (kernel[j] - 1) - p.steps[4 + j] for j in (0, 1)]
        dx, dy = p.empty(p.dx), p.dy.contiguous(memory_format=p.format)
        assert calls().product(level, 2, dx, dy, p.genes, p.coeffs, None, (1, 1, *p.steps[2:4], *around), True)
        close(dx, p.dx, TOLERANCE[dtype])


@per_level
@per_dtype
@per_case
def test_gradients(level: int, dtype: torch.dtype, case: str) -> None:
    """dW is never rounded to 16 bits, so that one tolerance of the work dtype holds for all."""
    for gene_dtype in {torch.float32 if dtype != torch.float64 else dtype, dtype}:
        p = Problem(case, dtype, gene_dtype, last=case == "tails")
        rows, channels = p.genes[0].shape[:2]
        buffers = [torch.ones(p.genes[0].shape, dtype=p.work), None, torch.zeros(p.genes[0].shape, dtype=p.work)]
        dots = torch.full((-(-channels // 32), rows, 3), float("nan"), dtype=torch.float64)
        assert calls().gradients(level, 2, p.dy, p.x, p.genes, p.coeffs, buffers, dots, p.steps)
        tolerance = TOLERANCE[p.work]
        close(buffers[0] - 1, p.coeffs[0].double() * p.dw, tolerance)
        close(buffers[2], p.coeffs[2].double() * p.dw, tolerance)
        wanted = torch.stack([(p.dw * gene.double()).sum() for gene in p.genes])
        atol = tolerance * (p.dw.norm() * p.genes[0].double().norm()).item()
        torch.testing.assert_close(dots.sum((0, 1)), wanted, rtol=0.0, atol=atol)


@per_level
def test_threads_do_not_change_gradients(level: int) -> None:
    p = Problem("chunks", torch.float32, torch.float32, last=False)
    results = []
    for threads in (1, 2, 3, 7):
        buffers = [torch.zeros_like(p.genes[0]), None, None]
        assert calls().gradients(level, threads, p.dy, p.x, p.genes, p.coeffs, buffers, None, p.steps)
        results.append(buffers[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_does_not_fit_is_not_done() -> None:
    p = Problem("tails", torch.float32, torch.float32, last=False)
    y = p.empty(p.y)

    def product(**changed: Any) -> bool:
        given = {"y": y, "x": p.x, "genes": p.genes, "coeffs": p.coeffs, "bias": p.bias, "steps": p.steps}
        done: bool = calls().product(LEVELS[0], 1, **{**given, **changed}, transposed=False)
        return done

    assert product()
    turned = [gene.contiguous(memory_format=torch.channels_last) for gene in p.genes]
    for changed in (
        {"x": p.x[:, 1:]},
        {"x": p.x[..., ::2]},
        {"x": p.x.double()},
        {"y": y[:, :-1]},
        {"y": y[:, :, :-1].contiguous()},
        {"y": y.double()},
        {"genes": turned},
        {"genes": [p.genes[0], p.genes[1][:, :-1], p.genes[2]]},
        {"coeffs": p.coeffs[:2]},
        {"bias": p.bias[1:]},
        {"steps": p.steps[:5]},
        {"steps": (1, 1, 1, 1, 1 << 31, 1)},
        {"steps": (1, 1, 1, 1, 1, 2)},
        {"steps": (1, 0, 1, 1, 1, 1)},
        {"steps": (1, 1, -1, 1, -1, 1)},
        {"steps": (1, 1, 1, 0, 1, 0)},
    ):
        assert not product(**changed), changed
    dy = p.dy[..., 1:].contiguous()
    assert not calls().gradients(LEVELS[0], 1, dy, p.x, p.genes, p.coeffs, [None] * 3, None, p.steps)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_thread_works_in_two_mebibytes_at_most(gradients: bool) -> None:
    rooms = [
        _C.expansion_conv.room(level, 1, code, channels, n, taps, 25000, gradients)
        for level in LEVELS
        for code in range(4)
        for channels in (3, 300, 4096)
        for n in (16, 64, 300, 4096)
        for taps in (1, 9, 49, 64)
    ]
    assert max(rooms) <= 2 << 20


def test_without_the_table_by_which_tensors_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x, genes, coeffs = torch.randn(2, 16, 5, 5), [torch.randn(16, 16, 3, 3) for _ in range(2)], torch.ones(2)
    conv = Conv2d((1, 1), (0, 0), (1, 1), 1)
    try:
        plg.set_regime("panel")
        wanted = plg.functional.expansion_conv2d(x, genes, coeffs)
        plg.set_regime("rows")
        assert _rows.takes(x, genes[0].shape, conv, "y")
        monkeypatch.setattr(_rows, "_calls_of", lambda native: None)
        assert not _rows.takes(x, genes[0].shape, conv, "y")
        assert torch.equal(plg.functional.expansion_conv2d(x, genes, coeffs), wanted)
    finally:
        plg.set_regime("auto")


def test_the_plan_asks_for_them_where_they_pay() -> None:
    wide, narrow = (256, 256, 3, 3), (64, 64, 3, 3)
    assert plan.choose_conv(wide, "y", "cpp", arch="AVX512") == "rows"
    assert plan.choose_conv(narrow, "y", "cpp", arch="AVX512") == "panel"
    assert plan.choose_conv(narrow, "y", "cpp", 2, arch="AVX512") == "rows"
    assert plan.choose_conv(narrow, "y", "cpp", 2, arch="AVX512_BF16") == "panel"
    assert plan.choose_conv(narrow, "y", "cpp", 2, arch="AVX512_BF16", float16=True) == "rows"
    assert plan.choose_conv((512, 8, 16, 16), "y", "cpp") == plan.choose_conv(wide, "y", "cpp", groups=2) == "panel"
    assert plan.choose_conv((1 << 16, 8, 3, 3), "dx", "cpp") == plan.choose_conv(wide, "y", "reference") == "panel"
    try:
        for regime in ("rows", "panel"):
            plg.set_regime(regime)
            assert plan.choose_conv(wide, "y", "cpp") == plan.choose_conv(narrow, "dw", "cpp") == regime
    finally:
        plg.set_regime("auto")
