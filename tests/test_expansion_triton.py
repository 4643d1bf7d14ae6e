# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `expansion` against dense PyTorch in float64: on a CUDA device, or in Triton's interpreter.

The interpreter sees neither races nor the compiler: what is compiled is tested in `test_triton_offline`. It truncates
where the hardware rounds to bfloat16, hence the tolerance there.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expansion_samples import Net, close, gene_grads, unshared
from torch import Tensor, nn
from triton_samples import DEVICE, HALVES, LAYOUTS, PRODUCTS, SHAPES, draw, genes_of, guarded, guards_hold, near, total

import pylearngene as plg
from pylearngene import _backends
from pylearngene.errors import BackendError
from pylearngene.nn import ExpansionLinear, GeneBank
from pylearngene.reference import expansion as specification

pytest.importorskip("triton")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")

# Triton's own: its interpreter turns arrays of one element into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

EMPTY = [(0, 5, 3), (3, 0, 5), (3, 5, 0)]


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with plg.use_backend("triton"):
        yield


@pytest.fixture
def regime() -> Iterator[Callable[[str], None]]:
    yield plg.set_regime
    plg.set_regime("auto")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset 1", "every second"])
def test_window_of_the_weight_is_the_specification_within_one_ulp(dtype: torch.dtype, count: int, layout: str) -> None:
    genes = [LAYOUTS[layout](gene) for gene in genes_of(count, 45, 150, dtype)]
    coeffs = draw(count, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for row, col, rows, cols in ((0, 0, 45, 150), (7, 13, 35, 130), (44, 149, 1, 1)):
        out, whole = guarded(rows, cols, dtype)
        launchers.fill(out, genes, coeffs, row, col)
        expected = specification.weight(genes, coeffs)[row : row + rows, col : col + cols]
        steps = sum(abs(c) * gene.abs() for c, gene in zip(coeffs.tolist(), genes, strict=True))
        ulps = torch.finfo(dtype).eps
        if DEVICE == "cpu":  # the interpreter rounds twice per gene, where hardware fuses
            ulps += count * torch.finfo(coeffs.dtype).eps
        assert ((out.double() - expected.double()).abs() <= ulps * steps[row : row + rows, col : col + cols]).all()
        assert guards_hold(whole)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies and adds in two roundings")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_weight_is_bitwise_the_specification(dtype: torch.dtype) -> None:
    genes, coeffs = genes_of(4, 33, 65, dtype), draw(4, dtype=torch.float32)
    assert torch.equal(plg.functional.expansion_weight(genes, coeffs), specification.weight(genes, coeffs))


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("shape", "count"), [*product(SHAPES, [2]), ((37, 31, 17), 1), ((37, 31, 17), 5)])
def test_fused_product_and_input_gradient(dtype: torch.dtype, shape: tuple[int, int, int], count: int) -> None:
    tokens, out, inner = shape
    x, dy, genes = draw(tokens, inner).to(dtype), draw(tokens, out).to(dtype), genes_of(count, out, inner, dtype)
    coeffs, bias = draw(count, dtype=torch.float32), draw(out).to(dtype)
    weight = total(genes, coeffs)
    y, whole = guarded(tokens, out, dtype)
    launchers.product(y, x, genes, coeffs, bias)
    near(y, F.linear(x.double(), weight, bias.double()), dtype)
    assert guards_hold(whole)
    dx, whole = guarded(tokens, inner, dtype)
    launchers.product(dx, dy, [gene.t() for gene in genes], coeffs)
    near(dx, dy.double() @ weight, dtype)
    assert guards_hold(whole)


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("bias", ["none", "plain", "genes"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_epilogue(dtype: torch.dtype, bias: str, activation: str | None) -> None:
    x, genes, coeffs = draw(19, 24).to(dtype), genes_of(2, 37, 24, dtype), draw(2, dtype=torch.float32)
    biases = [draw(37).to(dtype) for _ in range(2)]
    plain = biases[0] if bias == "plain" else None
    y = x.new_empty(19, 37)
    launchers.product(y, x, genes, coeffs, plain, biases if bias == "genes" else (), activation)
    added = {"none": None, "plain": biases[0].double(), "genes": total(biases, coeffs)}[bias]
    expected = F.linear(x.double(), total(genes, coeffs), added)
    near(y, expected if activation is None else getattr(F, activation)(expected), dtype)


def gradients(fn: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = fn(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype))


def ours(x: Tensor, coeffs: Tensor, *genes: Tensor) -> Tensor:
    half = len(genes) // 2
    return plg.functional.expansion_linear(x, genes[:half], coeffs, genes[half:])


def dense(x: Tensor, coeffs: Tensor, *genes: Tensor) -> Tensor:
    half = len(genes) // 2
    return F.linear(x.double(), total(list(genes[:half]), coeffs), total(list(genes[half:]), coeffs))


@pytest.mark.parametrize("name", ["fused", "panel"])
@pytest.mark.parametrize(
    ("dtype", "gene_dtype"),
    [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("shape", [*EMPTY, (37, 31, 17)])
def test_public_function_and_every_gradient(
    name: str, dtype: torch.dtype, gene_dtype: torch.dtype, shape: tuple[int, int, int], regime: Callable[[str], None]
) -> None:
    regime(name)
    tokens, out, inner = shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    genes = [*genes_of(2, out, inner, gene_dtype), *(draw(out).to(gene_dtype) for _ in range(2))]
    leaves = [draw(tokens, inner).to(dtype), draw(2, dtype=work), *genes]
    dy = draw(tokens, out).to(dtype)
    mine, theirs = gradients(ours, leaves, dy), gradients(dense, leaves, dy)
    assert mine[0].dtype == dtype
    near(mine[0], theirs[0], dtype)
    for got, expected in zip(mine[1], theirs[1], strict=True):
        near(got, expected.double(), dtype, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layouts_of_x_and_upstream_and_genes(layout: str, dtype: torch.dtype) -> None:
    change = LAYOUTS[layout]
    x, dy = change(draw(40, 32).to(dtype)), change(draw(40, 48).to(dtype))
    genes = [change(genes_of(1, 48, 32, dtype)[0]).requires_grad_(), genes_of(1, 48, 32, dtype)[0]]
    coeffs = draw(2, dtype=torch.float32)
    leaf = x.detach().requires_grad_()
    y = plg.functional.expansion_linear(leaf, genes, coeffs)
    weight = total(genes, coeffs).detach()
    near(y.detach(), F.linear(x.double(), weight), dtype)
    dx, dgene = torch.autograd.grad(y, (leaf, genes[0]), dy)
    near(dx, dy.double() @ weight, dtype)
    near(dgene, coeffs[0].double() * (dy.double().t() @ x.double()), dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_reach_exactly_their_rows(value: float) -> None:
    x, genes, coeffs = draw(4, 5).half(), genes_of(2, 6, 5, torch.float16), draw(2, dtype=torch.float32)
    x[2, 1] = value
    y = plg.functional.expansion_linear(x, genes, coeffs)
    assert (~y.isfinite()).any(1).tolist() == [False, False, True, False]
    x[2, 1] = 0.0
    genes[1][3, 2] = value
    y = plg.functional.expansion_linear(x, genes, coeffs)
    assert (~y.isfinite()).any(0).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("name", ["auto", "fused", "panel"])
def test_results_repeat_bit_for_bit(name: str, regime: Callable[[str], None]) -> None:
    regime(name)
    leaves = [draw(70, 40).half(), draw(2, dtype=torch.float32), *genes_of(2, 50, 40, torch.float16)]
    leaves += [draw(50).half() for _ in range(2)]
    dy = draw(70, 50).half()
    first, second = (gradients(ours, leaves, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True))


def test_activation_needs_no_gradient_and_equals_the_separate_one() -> None:
    x, genes, coeffs = draw(9, 16).half(), genes_of(2, 12, 16, torch.float16), draw(2, dtype=torch.float32)
    expected = F.gelu(plg.functional.expansion_linear(x, genes, coeffs))
    near(plg.functional.expansion_linear(x, genes, coeffs, activation="gelu"), expected.double(), torch.float16)
    x.requires_grad_()
    assert plg.functional.expansion_linear(x, genes, coeffs, activation="gelu").requires_grad


@pytest.mark.parametrize("learn", [False, True])
def test_network_with_a_bank(learn: bool) -> None:
    net = Net(depth=3, learn=learn, dtype=torch.float64).to(DEVICE)
    x, dy = draw(2, 5, 6), draw(2, 5, 6)
    net(x).backward(dy)
    close(gene_grads(net), unshared(net, x, dy))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        bank = GeneBank()
        options = {"bank": bank, "name": "fc", "bias": False}
        self.first = ExpansionLinear(32, 32, coeffs=[1.0, 0.25], **options)
        self.second = ExpansionLinear(32, 32, coeffs=[1.0, 0.5], **options)
        bank.attach(self)
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_layer_with_a_bank_under_autocast(regime: Callable[[str], None]) -> None:
    """float32 masters, one 16-bit copy per version, `fused` products, one float32 gradient per gene."""
    regime("fused")
    net = TwoLayers().to(DEVICE)
    x, dy = draw(18, 32, dtype=torch.float32), draw(18, 32, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = net(x)
    y.backward(dy.to(y.dtype))
    genes = [parameter.detach().double().requires_grad_() for parameter in net.gene_bank.parameters()]
    expected = x.double() @ (genes[0] + 0.25 * genes[1]).t() @ (genes[0] + 0.5 * genes[1]).t()
    expected.backward(dy.double())
    near(y.detach(), expected.detach(), torch.float16, 2)
    for parameter, gene in zip(net.gene_bank.parameters(), genes, strict=True):
        assert parameter.grad.dtype == torch.float32
        near(parameter.grad, gene.grad, torch.float16, 2)


OFFSETS = """
import torch
import pylearngene.triton_kernels.expansion as launchers
torch.utils.deterministic.fill_uninitialized_memory = False
far = torch.empty(2 * 2**30 + 64, dtype=torch.float16, device={device!r}).as_strided((3, 16), (2**30, 1))
near = torch.randn(3, 16, device={device!r}).half()
far.copy_(near)
c, out = torch.ones(1, device={device!r}), torch.empty(3, 16, dtype=torch.float16, device={device!r})
launchers.fill(out, [far], c)
assert torch.equal(out, near)
for x, gene in ((far, near), (near, far)):
    y = torch.empty(3, 3, dtype=torch.float16, device={device!r})
    launchers.product(y, x, [gene], c)
    torch.testing.assert_close(y.double(), near.double() @ near.double().t(), rtol=2e-3, atol=2e-3)
buffer = torch.zeros(3, 16, device={device!r})
dots = launchers.gene_gradients([buffer], far[:, :3], far, [far], c, True)
dw = near[:, :3].double().t() @ near.double()
torch.testing.assert_close(buffer.double(), dw, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(dots, (dw * near.double()).sum().view(1), rtol=1e-5, atol=1e-5)
"""


def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Rows 2^30 elements apart: a 32-bit offset wraps at the third. In a process of its own, since it may crash."""
    command = [sys.executable, "-c", OFFSETS.format(device=DEVICE)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_who_computes_where(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device(DEVICE)
    assert _backends.implementation(here) == "triton"
    report = {row.device: row for row in plg.backends() if row.op == "expansion"}[DEVICE]
    assert report.backend == "triton"
    with plg.use_backend("reference"):
        assert _backends.implementation(here) == "reference"
        assert {row.backend for row in plg.backends()} == {"reference"}
    assert _backends.implementation(torch.device("meta")) == "reference"
    monkeypatch.setattr(_backends, "_load_triton", lambda: (None, "the Triton kernels did not load: none"))
    with pytest.raises(BackendError, match="backend: 'triton' is not available here: the Triton kernels did not load"):
        plg.set_backend("triton")


def test_gpus_that_triton_does_not_run_on_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    _backends._why_no_triton_on.cache_clear()
    assert _backends._why_no_triton_on(torch.device("cuda", 9)) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    _backends._why_no_triton_on.cache_clear()
    assert "NVIDIA" in _backends._why_no_triton_on(torch.device("cuda", 9))
    _backends._why_no_triton_on.cache_clear()


REFUSAL = """
import pylearngene as plg
try:
    plg.set_backend("triton")
except plg.errors.BackendError as error:
    print(error)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a GPU")
def test_triton_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    result = subprocess.run([sys.executable, "-c", REFUSAL], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "backend: 'triton' is not available here: no CUDA device was found (TRITON_INTERPRET=1" in result.stdout


def test_package_does_not_import_triton(tmp_path: Path) -> None:
    code = "import sys, pylearngene, pylearngene.triton_kernels; print('triton' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "False\n"
