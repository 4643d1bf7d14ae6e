# SPDX-License-Identifier: Apache-2.0
"""Matrices whose elements lie more than 2^31 and 2^32 elements apart, on every implementation that computes on the CPU.

Memory that is never touched costs nothing. Each case runs in a process of its own, since a wrapped offset may end it,
and says how much memory it took. Oracle: dense float64 products of small copies.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

LIMIT = 1 << 30

START = """
import mmap, resource, sys
import torch, torch.nn.functional as F
import pylearngene as plg
from pylearngene import _backends, plan
from pylearngene.functional import expansion_conv2d, expansion_linear, expansion_weight
torch.manual_seed(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
backend, regime, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
plg.set_backend(backend)
plg.set_regime(regime)
near = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps}

def pages(count, dtype):
    "Zeros that take no memory until they are touched: private, anonymous, without a reservation."
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=0x4022), dtype=dtype)

def distant(values, stride):
    "A copy whose rows (or, of a negative stride, columns) lie `stride` elements apart."
    rows, cols = values.shape
    count, strides = (rows * stride, (stride, 1)) if stride > 0 else (cols * -stride, (1, -stride))
    assert count > 2**31
    return pages(count, values.dtype).as_strided((rows, cols), strides).copy_(values)

def same(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), **near)

def done():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(used * 1024)
"""

PRODUCTS = """
x, dy = (torch.randn(3, n).div(4).to(dtype) for n in (7, 5))
genes = [torch.randn(5, 7).div(4).to(dtype) for _ in range(3)]
coeffs = torch.rand(3)
strides = (2**31 + 3, -(2**31 + 5), 2**30 + 1)
far_x, far_dy = distant(x, 2**31 + 1), distant(dy, 2**30 + 7)
far = [distant(gene, stride) for gene, stride in zip(genes, strides, strict=True)]

def gradients(x, genes, dy, product):
    leaves = [t.detach().requires_grad_() for t in (x, coeffs, *genes)]
    y = product(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

def dense(x, coeffs, *genes):
    return x.double() @ sum(c * g.double() for c, g in zip(coeffs.double(), genes)).T

expected = gradients(x, genes, dy.double(), dense)
for xs, gs, dys in ((far_x, genes, dy), (x, far, dy), (x, genes, far_dy), (far_x, far, far_dy)):
    got = gradients(xs, gs, dys, lambda x, coeffs, *genes: expansion_linear(x, genes, coeffs))
    for a, b in zip(got, expected, strict=True):
        assert a.abs().max() < 100
        same(a, b)
same(expansion_weight(far, coeffs), sum(c * g.double() for c, g in zip(coeffs.double(), genes)))
done()
"""

CONVOLUTIONS = """
image = torch.randn(2, 3, 4, 4).to(dtype)
genes = [torch.randn(4, 3, 3, 3).div(4).to(dtype) for _ in range(2)]
coeffs = torch.rand(2)
far = [distant(gene.flatten(1), stride).unflatten(1, (3, 3, 3)) for gene, stride in zip(genes, (2**31 + 3, 2**30 + 1))]
wide = distant(image.flatten(1), 2**31 + 9).unflatten(1, (3, 4, 4))
weight = sum(c * g.double() for c, g in zip(coeffs.double(), genes))
leaves = [t.detach().requires_grad_() for t in (wide, *far)]
y = expansion_conv2d(leaves[0], leaves[1:], coeffs, padding=1)
same(y.detach(), F.conv2d(image.double(), weight, padding=1))
dy = torch.randn(y.shape).div(8).to(dtype)
dx, *grads = torch.autograd.grad(y, leaves, dy)
x = image.double().requires_grad_()
weight.requires_grad_()
expected = torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), dy.double())
same(dx, expected[0])
for c, grad in zip(coeffs, grads):
    same(grad, c * expected[1])
done()
"""

# The last rows of contiguous matrices of more than 2^31 elements, as panels are handed over.
PANELS = """
from pylearngene._ops import expansion_kernels as kernels, expansion_regimes as regimes
rows, cols, above = 4, 64, 2**25

def tall(values):
    whole = pages((above + rows) * cols, values.dtype).view(above + rows, cols)
    whole[above:] = values
    return whole

genes, coeffs = [torch.randn(rows, cols).div(4).to(dtype) for _ in range(2)], torch.rand(2)
far = [tall(gene) for gene in genes]
exact = sum(c * g.double() for c, g in zip(coeffs.double(), genes))
out = distant(torch.zeros(rows, cols, dtype=dtype), 2**31 + 11)
kernels.fill(out, far, coeffs, row=above)
same(out, exact)
x, dy = torch.randn(3, cols).div(4).to(dtype), torch.randn(3, rows).div(4).to(dtype)
dw = dy.double().T @ x.double()
for native in (False, True) if backend == "cpp" else (False,):
    buffers, dots = [tall(torch.ones(rows, cols)), None], torch.zeros(rows, 2, dtype=torch.float64)
    if native:
        regimes._register_gradients(buffers, dy, x, far, coeffs, above, dots)
    else:
        kernels.accumulate(dw.to(dtype), far, coeffs, buffers, above, dots)
    same(buffers[0][above:], 1 + coeffs[0] * dw)
    assert not buffers[0][:rows].any()
    same(dots.sum(0), torch.stack([(dw * gene.double()).sum() for gene in genes]))
done()
"""
PROGRAMS = {"products": PRODUCTS, "convolutions": CONVOLUTIONS, "panels": PANELS}


def run(program: str, backend: str, regime: str, dtype: str, **environment: str) -> None:
    command = [sys.executable, "-P", "-c", START + PROGRAMS[program], backend, regime, dtype]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < LIMIT


@pytest.mark.parametrize("level", ["default", ""])
@pytest.mark.parametrize(("program", "regime"), [("products", "rows"), ("products", "panel"), ("panels", "auto")])
def test_native(program: str, regime: str, level: str) -> None:
    run(program, "cpp", regime, "bfloat16" if level else "float32", **({"ATEN_CPU_CAPABILITY": level} if level else {}))


def test_convolutions() -> None:
    run("convolutions", "cpp", "auto", "float32")


@pytest.mark.parametrize("program", ["products", "panels"])
def test_reference(program: str) -> None:
    run(program, "reference", "auto", "float32")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("program", "regime"), [("products", "fused"), ("products", "panel"), ("panels", "auto")])
def test_triton_in_its_interpreter(program: str, regime: str) -> None:
    """Its int32 offsets would wrap without a word."""
    run(program, "triton", regime, "float16", TRITON_INTERPRET="1")
