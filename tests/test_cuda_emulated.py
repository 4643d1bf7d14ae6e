# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for few tokens, compiled for the processor: values, bits, memory around tensors, devices and errors.

Every thread of a block is a fiber there, so that barriers and shuffles are real; what a GPU makes of the same source is
tested in `test_cuda_module` where there is one, and what it is compiled to in `test_cuda_compiled`.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_samples import BF16, F16, F32, PAIRS, Case, cases, draw, outside
from emulated_cuda import BLOCKS, DEVICE, STREAM, Emulated, build

import pylearngene as plg
from pylearngene import _backends
from pylearngene._ops import expansion_cuda

CPU = torch.device("cpu")
WITH_SANITIZERS = "PYLEARNGENE_EMULATED_SANITIZED" in os.environ
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="fibers of Linux"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build(tmp_path_factory.mktemp("emulated"), WITH_SANITIZERS))


@pytest.fixture(autouse=True)
def chosen(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the processor go to the emulated module."""
    monkeypatch.setattr(_backends, "cuda_for", lambda device: emulated.module)
    monkeypatch.setattr(_backends, "_chosen", "cuda")
    monkeypatch.setattr(expansion_cuda, "_queue", lambda device: (DEVICE, STREAM))


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.clone().view(torch.int32 if y.element_size() == 4 else torch.int16)


def result(case: Case, seed: int = 0) -> torch.Tensor:
    call = draw(case, CPU, seed)
    assert call.run(expansion_cuda.rows_forward) is True
    return bits(call.y)


@pytest.mark.parametrize(("x", "gene"), PAIRS, ids=str)
def test_every_call_agrees_with_float64_and_writes_nothing_else(x: torch.dtype, gene: torch.dtype) -> None:
    for case in cases():
        if (case.x, case.gene) == (x, gene):
            call = draw(case, CPU)
            before = outside(call.y)
            assert call.run(expansion_cuda.rows_forward) is True
            assert call.error() <= 1, case
            assert torch.equal(outside(call.y), before), case


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_bits_repeat_in_any_order_of_threads(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier that is missing lets a thread read what another one has not written yet."""
    some = [Case(x, gene, 9, 13, 2336, 3) for x, gene in PAIRS] + [Case(BF16, BF16, 16, 29, 97, 8)]
    expected = [result(case) for case in some]
    monkeypatch.setenv("PYLEARNGENE_EMULATED_ORDER", order)
    for case, first in zip(some, expected, strict=True):
        assert torch.equal(result(case), first), case


@pytest.mark.parametrize(("x", "gene"), PAIRS, ids=str)
def test_weights_have_the_bits_of_the_native_kernels(x: torch.dtype, gene: torch.dtype) -> None:
    for inner, count in ((64, 1), (64, 2), (64, 5), (64, 8), (61, 3)):
        call = draw(Case(x, gene, 16, 33, inner, count), CPU)
        columns = torch.randperm(inner, generator=torch.Generator().manual_seed(1))[:16]
        call.x.copy_(torch.eye(inner)[columns])
        assert call.run(expansion_cuda.rows_forward) is True
        weight = torch.ops.pylearngene.expansion_weight(call.genes, call.coeffs, x)
        assert torch.equal(bits(call.y), bits(weight[:, columns].T))


@pytest.mark.parametrize(("x", "gene"), PAIRS, ids=str)
def test_a_token_has_the_same_bits_whatever_comes_with_it(x: torch.dtype, gene: torch.dtype) -> None:
    """Alone or among others, with genes at whole addresses or odd ones."""
    whole = Case(x, gene, 16, 10, 1312, 4)
    many = draw(whole, CPU)
    assert many.run(expansion_cuda.rows_forward) is True
    for tokens in (1, 3, 5):
        few = replace_tokens(many, tokens)
        assert few.run(expansion_cuda.rows_forward) is True
        assert torch.equal(bits(few.y), bits(many.y[:tokens]))
    for odd in (replace(whole, offset=1), replace(whole, extra=3)):
        assert torch.equal(result(odd), bits(many.y))


def replace_tokens(call: Any, tokens: int) -> Any:
    return replace(call, y=torch.empty_like(call.y[:tokens]), x=call.x[:tokens])


def test_values_that_are_not_finite_stay_where_they_are() -> None:
    """Padding adds nothing: not to rows beside, and not where a coefficient is infinite."""
    call = draw(Case(F32, F32, 2, 5, 61, 2), CPU)
    call.genes[1][3, 60] = float("inf")
    assert call.run(expansion_cuda.rows_forward) is True
    assert call.y.isfinite().all(0).tolist() == [True, True, True, False, True]
    call = draw(Case(F32, F32, 1, 5, 61, 1), CPU)
    call.coeffs.fill_(float("inf"))
    call.x.abs_()
    call.genes[0].abs_()
    assert call.run(expansion_cuda.rows_forward) is True
    assert call.y.eq(float("inf")).all()


def test_float16_overflows_and_underflows_as_torch_rounds() -> None:
    call = draw(Case(F16, F32, 1, 6, 8, 1), CPU)
    call.coeffs.fill_(1)
    values = torch.tensor([65519.0, 65520.0, -65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25])
    call.genes[0].zero_()[:, 0] = values
    call.x.zero_()[0, 0] = 1
    assert call.run(expansion_cuda.rows_forward) is True
    assert torch.equal(call.y[0], values.half())


def test_rows_lie_further_apart_than_32_bits_reach() -> None:
    stride = 2**31 + 64
    memory = mmap.mmap(-1, 2 * (stride + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # not reserved
    gene = torch.frombuffer(memory, dtype=BF16).as_strided((2, 64), (stride, 1))
    call = draw(Case(BF16, BF16, 2, 2, 64, 1), CPU)
    gene.copy_(call.genes[0])
    call.genes = [gene]
    assert call.run(expansion_cuda.rows_forward) is True
    assert call.error() <= 1


def test_the_device_and_stream_of_the_caller(emulated: Emulated) -> None:
    before = emulated.state()["launches"]
    result(Case(BF16, BF16, 3, 40, 768, 2))
    state = emulated.state()
    assert state == {
        "launches": before + 1,
        "launched_on": DEVICE,
        "current": 0,
        "blocks": BLOCKS,
        "threads": 96,
        "stream": STREAM,
    }


def test_nothing_is_launched_where_there_is_nothing_to_do(emulated: Emulated) -> None:
    before = emulated.state()["launches"]
    for case in (Case(F32, F32, 0), Case(F32, F32, 2, 0)):
        assert draw(case, CPU).run(expansion_cuda.rows_forward) is True
    assert emulated.state()["launches"] == before


def test_calls_that_are_not_taken(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    before = emulated.state()["launches"]
    double = torch.float64
    cases = [Case(F32, F32, 17), Case(F32, F32, count=9), Case(BF16, F16), Case(double, double), Case(F32, double)]
    calls = [draw(case, CPU) for case in cases]
    calls += [draw(Case(F32, F32, 2, bias="float64"), CPU)]
    transposed = draw(Case(F32, F32, 2, 8, 8), CPU)
    calls += [replace(transposed, genes=[gene.t() for gene in transposed.genes])]
    calls += [replace(transposed, x=torch.zeros(8, 2).t())]
    assert [call.run(expansion_cuda.rows_forward) for call in calls] == [False] * len(calls)
    monkeypatch.setattr(_backends, "_chosen", "auto")
    assert draw(Case(BF16, BF16, 9), CPU).run(expansion_cuda.rows_forward) is False
    monkeypatch.setattr(_backends, "cuda_for", lambda device: None)
    assert draw(Case(BF16, BF16, 1), CPU).run(expansion_cuda.rows_forward) is False
    assert emulated.state()["launches"] == before


@pytest.mark.parametrize(
    ("calls", "name"), [(1, "cudaGetDevice"), (2, "cudaSetDevice"), (3, "rows_forward"), (4, "cudaSetDevice")]
)
def test_every_call_of_the_runtime_is_looked_at(emulated: Emulated, calls: int, name: str) -> None:
    emulated.fail(calls, 719)
    try:
        message = rf"^expansion on cpu: pylearngene\._cuda: {name}: emulated \(cudaErrorLaunchFailure\)$"
        with pytest.raises(plg.errors.BackendError, match=message):
            draw(Case(F32, F32), CPU).run(expansion_cuda.rows_forward)
        assert emulated.state()["current"] == 0
    finally:
        emulated.fail(0, 0)
    assert draw(Case(F32, F32), CPU).run(expansion_cuda.rows_forward) is True


def test_a_machine_without_a_device(emulated: Emulated) -> None:
    emulated.devices(0)
    try:
        assert emulated.module.devices() == (0, "emulated (cudaErrorNoDevice)")
        with pytest.raises(plg.errors.BackendError, match="cudaSetDevice: emulated"):
            draw(Case(F32, F32), CPU).run(expansion_cuda.rows_forward)
    finally:
        emulated.devices(2)
    assert emulated.module.devices() == (2, "")


@pytest.mark.full
@pytest.mark.skipif(WITH_SANITIZERS, reason="runs there itself")
def test_sanitizers_have_nothing_to_say() -> None:
    """This file once more, with the address and undefined behaviour sanitizers."""
    compiler = os.environ.get("CXX", "g++")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(name.strip()).is_absolute() for name in found):
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(name.strip() for name in found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYLEARNGENE_EMULATED_SANITIZED": "1",
    }
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
