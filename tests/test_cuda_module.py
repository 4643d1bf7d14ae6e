# SPDX-License-Identifier: Apache-2.0
"""The optional module for CUDA: how it is found, reported, chosen and refused, and its kernel on a GPU where one is.

What the kernel computes is tested on every machine in `test_cuda_emulated`; this needs the module itself.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_samples import cases, draw, outside

import pylearngene as plg
from pylearngene import _backends
from pylearngene._ops import expansion_cuda

MODULE, WHY_NOT = _backends._load_cuda()
built = pytest.mark.skipif(MODULE is None, reason=WHY_NOT)
GPU = torch.device("cuda", 0)
GOOD: dict[str, Any] = {"device": 0, "stream": 0, "y": 8, "x": 8, "x_dtype": 0, "M": 0, "I": 5, "O": 5}
GOOD |= {"x_row_stride": 5, "y_row_stride": 5, "genes": [(8, 5, 1)], "gene_dtype": 0, "coeffs": 8}
GOOD |= {"bias": 0, "bias_genes": [], "bias_dtype": 0}


@pytest.fixture(autouse=True)
def as_it_was() -> Any:
    reasons = _backends._why_no_cuda_on
    reasons.cache_clear()
    yield
    reasons.cache_clear()
    plg.set_backend("auto")


@built
def test_module_is_whole_without_a_driver() -> None:
    assert MODULE is not None
    assert MODULE.version == plg.__version__
    assert MODULE.runtime >= 12000
    count, reason = MODULE.devices()
    assert count == 0 or reason == ""
    if not torch.cuda.is_available():
        assert count == 0
        assert "cudaError" in reason


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_kernel_without_a_gpu_says_what_cuda_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "cuda_for", lambda device: MODULE)
    monkeypatch.setattr(expansion_cuda, "_queue", lambda device: (0, 0))
    message = r"^expansion on cpu: pylearngene\._cuda: cuda\w+: .* \(cudaError\w+\)$"
    with pytest.raises(plg.errors.BackendError, match=message):
        draw(next(cases()), torch.device("cpu")).run(expansion_cuda.rows_forward)


@built
@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("device: expected at least 0, got -1", {"device": -1}),
        ("x_dtype: expected 0 to 3, got 4", {"x_dtype": 4}),
        ("gene_dtype: expected 0 to 3, got -1", {"gene_dtype": -1}),
        ("gene_dtype: expected float32, or 16 bits as x or beside float32, got 1", {"gene_dtype": 1}),
        ("gene_dtype: expected float32, or 16 bits as x or beside float32, got 3", {"x_dtype": 2, "gene_dtype": 3}),
        ("M: expected at least 0, got -1", {"M": -1}),
        ("M: expected at most 16, got 17", {"M": 17}),
        ("I: expected at least 0, got -1", {"I": -1}),
        (rf"O: expected less than 2\^57, got {2**57}", {"O": 2**57}),
        ("genes: expected 1 to 8, got 0", {"genes": []}),
        ("genes: expected 1 to 8, got 9", {"genes": [(8, 5, 1)] * 9}),
        ("genes: expected column stride 1, got 2", {"genes": [(8, 10, 2)]}),
        ("genes: expected strides of at least 0, got -5", {"genes": [(8, -5, 1)]}),
        ("genes: expected an address, got 0", {"genes": [(0, 5, 1)]}),
        ("genes: expected tuples of 3 integers, got tuple", {"genes": [(8, 5)]}),
        ("coeffs: expected an address, got 0", {"coeffs": 0}),
        ("x: expected an address, got 0", {"x": 0, "M": 2}),
        ("y: expected an address, got 0", {"y": 0, "M": 2}),
        ("x: expected strides of at least 0, got -1", {"x_row_stride": -1, "M": 2}),
        ("y: expected a row stride of at least 5, got 4", {"y_row_stride": 4, "M": 2}),
        ("bias_genes: expected an empty list beside a bias, got 1", {"bias": 8, "bias_genes": [(8, 1)]}),
        (r"bias_genes: expected 1 \(one per gene\), got 2", {"bias_genes": [(8, 1)] * 2}),
        ("bias_genes: expected tuples of 2 integers, got tuple", {"bias_genes": [(8, 1, 1)]}),
        ("bias_genes: expected strides of at least 0, got -1", {"bias_genes": [(8, -1)]}),
        ("bias_dtype: expected float32 or 16 bits, got 1", {"bias_genes": [(8, 1)], "bias_dtype": 1}),
    ],
)
def test_arguments_are_refused_by_name_before_anything_is_launched(message: str, changed: dict[str, Any]) -> None:
    assert MODULE is not None
    MODULE.expansion.rows_forward(**GOOD)
    with pytest.raises(ValueError, match=f"^{message}$"):
        MODULE.expansion.rows_forward(**{**GOOD, **changed})


def test_backend_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_load_cuda", lambda: (None, "the native module pylearngene._cuda did not load"))
    message = r"backend: 'cuda' is not available here: the native module pylearngene\._cuda did not load; to get it: "
    with pytest.raises(plg.errors.BackendError, match=message):
        plg.set_backend("cuda")
    monkeypatch.setattr(_backends, "_load_cuda", lambda: (SimpleNamespace(devices=lambda: (1, "")), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(plg.errors.BackendError, match="'cuda' is not available here: no CUDA device was found"):
        plg.set_backend("cuda")


def test_device_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (0, "CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)")
    module = SimpleNamespace(devices=lambda: found)
    monkeypatch.setattr(_backends, "_load_cuda", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert _backends._why_no_cuda_on(GPU) == "compute capability 7.5 is below 8.0"
    _backends._why_no_cuda_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _backends._why_no_cuda_on(GPU) == f"pylearngene._cuda finds no device: {found[1]}"


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "reference"])
def test_which_backends_take_the_module(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("_cuda")
    monkeypatch.setattr(_backends, "_load_cuda", lambda: (module, ""))
    monkeypatch.setattr(_backends, "_why_no_cuda_on", lambda device: "")
    monkeypatch.setattr(_backends, "_why_no_triton_on", lambda device: "")
    monkeypatch.setattr(_backends, "_load_triton", lambda: (module, ""))
    monkeypatch.setattr(_backends, "_chosen", backend)
    assert _backends.cuda_for(GPU) is (module if backend in ("auto", "cuda") else None)
    assert _backends.cuda_for(torch.device("cpu")) is None
    assert _backends.implementation(GPU) == {"auto": "cuda"}.get(backend, backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("here", [True, False])
def test_report_says_whether_the_module_is_here(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = ModuleType("_cuda") if here else None
    monkeypatch.setattr(_backends, "_load_cuda", lambda: (module, "" if here else "pylearngene._cuda did not load"))
    (report,) = (report for report in plg.backends() if (report.op, report.device) == ("expansion", "cuda"))
    end = "C++ kernels for few tokens beside them" if here else "pylearngene._cuda did not load"
    assert report.reason.endswith(end)
    assert ("nvcc" in report.command) is not here


@built
def test_module_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("pylearngene._cuda")
    monkeypatch.setattr(MODULE, "version", "0.0.1")
    reason = f"the native module pylearngene._cuda is of version 0.0.1, the package of {plg.__version__}"
    assert _backends._load("_cuda") == (None, reason)


@built
def test_import_starts_neither_the_module_nor_cuda(tmp_path: Path) -> None:
    code = "import sys, torch, pylearngene; print('pylearngene._cuda' in sys.modules, torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@built
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_on_a_gpu_agrees_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases of the emulated kernel, twice: values, memory around y, and bits that repeat."""
    plg.set_backend("cuda")
    for case in cases():
        call, again = draw(case, GPU), draw(case, GPU)
        before = outside(call.y)
        assert call.run(expansion_cuda.rows_forward) is True
        assert again.run(expansion_cuda.rows_forward) is True
        assert call.error() <= 1, case
        assert torch.equal(outside(call.y), before), case
        assert torch.equal(call.y, again.y), case


@built
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_public_function_on_a_gpu_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    run = expansion_cuda.rows_forward
    monkeypatch.setattr(expansion_cuda, "rows_forward", lambda *call: taken.append(run(*call)) or taken[-1])
    plg.set_backend("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, genes = torch.randn(4, 256, device=GPU).to(dtype), torch.randn(3, 96, 256, device=GPU).to(dtype)
        coeffs = torch.randn(3, device=GPU)
        expected = x.double() @ (coeffs.double()[:, None, None] * genes.double()).sum(0).T
        got = plg.functional.expansion_linear(x, genes, coeffs)
        torch.testing.assert_close(got.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.2)
    assert taken == [True] * 3
