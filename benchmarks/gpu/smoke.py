# SPDX-License-Identifier: Apache-2.0
"""Every kernel of `expansion` once against float64: all dtypes, odd shapes, both directions, splits, streams, graphs.

The riskiest come first, so that a minute tells. `python -m benchmarks.gpu.smoke` runs the few that a memory checker
can follow. On a CPU the kernels run in Triton's interpreter. Whole contracts are in tests/.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import pylearngene as plg
from benchmarks.gpu.timing import Clock
from pylearngene.errors import BackendError

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
REGIMES = ("rows", "fused", "panel", "auto")
#: (M, O, I): odd ones, one token, a long reduction, many tokens for few weights, and what fills whole tiles.
SHAPES = ((1, 31, 17), (37, 45, 67), (5, 64, 2064), (2100, 48, 64), (130, 257, 129), (256, 384, 768))
SMALL = ((1, 31, 17), (21, 45, 19))
QUICK = ((1, 32, 64), (37, 48, 80), (130, 129, 65))


@dataclass(frozen=True)
class Check:
    """One check: raises where something is wrong."""

    name: str
    run: Callable[[], None]


def checks(device: torch.device, tiny: bool = False) -> list[Check]:
    """All checks, the riskiest first."""
    shapes = SMALL if tiny else SHAPES
    found = []
    for backend in backends(device):
        for dtype in TOLERANCES if tiny else reversed(TOLERANCES):
            for regime in ("rows", "auto") if backend == "cuda" else REGIMES:
                run = partial(products, device, backend, regime, dtype, shapes)
                found.append(Check(f"products-{backend}-{regime}-{_short(dtype)}", run))
    for name, function in {
        "genes": gene_counts, "weight": weights, "epilogue": epilogues, "autocast": autocast, "repeats": repeats,
        "side stream": side_stream, "graph": graph, "no synchronization": unsynchronized, "offsets": offsets,
        "convolution": convolution,
    }.items():  # fmt: skip
        found.append(Check(name, partial(function, device, tiny)))
    return found


def backends(device: torch.device) -> list[str]:
    """What computes here, by the names of `plg.set_backend`; `cuda` only where its module is built."""
    if device.type == "cpu":
        return ["triton"]
    try:
        with plg.use_backend("cuda"):
            return ["triton", "cuda"]
    except BackendError:
        return ["triton"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def near(what: str, got: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Compare with the largest expected value, or with `scale` where that is larger."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}")
    error = float((got.double() - expected).abs().max()) / max(float(expected.abs().max()), scale, 1e-30)
    if not error <= tolerance:  # so that NaN is refused too
        raise AssertionError(f"{what}: expected an error of at most {tolerance:g} of the largest, got {error:g}")


def products(
    device: torch.device, backend: str, regime: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]
) -> None:
    """y, dx and every gradient, at all shapes, with two genes."""
    with plg.use_backend(backend):
        plg.set_regime(regime)
        try:
            for shape in shapes:
                _product(device, dtype, shape, 2)
        finally:
            plg.set_regime("auto")


def _product(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], count: int) -> None:
    tokens, out, inner = shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = draw(device, dtype, tokens, inner).requires_grad_(), draw(device, dtype, tokens, out)
    genes = [draw(device, dtype, out, inner).mul_(inner**-0.5).requires_grad_() for _ in range(count)]
    coeffs, bias = draw(device, work, count).requires_grad_(), draw(device, dtype, out).requires_grad_()
    y = plg.functional.expansion_linear(x, genes, coeffs, bias)
    dx, dcoeffs, dbias, *dgenes = torch.autograd.grad(y, (x, coeffs, bias, *genes), dy)
    wide = [gene.detach().double() for gene in genes]
    weight = sum(c * gene for c, gene in zip(coeffs.detach().double(), wide, strict=True))
    dw = dy.double().t() @ x.detach().double()
    what, tolerance = f"{shape} K={count}", TOLERANCES[dtype]
    near(f"{what} y", y.detach(), F.linear(x.detach().double(), weight, bias.detach().double()), tolerance)
    near(f"{what} dx", dx, dy.double() @ weight, tolerance)
    near(f"{what} d bias", dbias, dy.double().sum(0), tolerance)
    for c, dgene in zip(coeffs.detach().double(), dgenes, strict=True):
        near(f"{what} d gene", dgene, c * dw, tolerance)
    dots = torch.stack([(dw * gene).sum() for gene in wide])
    near(f"{what} d coeffs", dcoeffs, dots, tolerance, float(dw.norm() * wide[0].norm() / (out * inner) ** 0.5))


def gene_counts(device: torch.device, tiny: bool) -> None:
    """One gene, the most that one launch takes, and one more."""
    with plg.use_backend(backends(device)[0]):
        for count in (1, 3, 9) if tiny else (1, 3, 4, 8, 9):
            _product(device, torch.float16 if tiny else torch.bfloat16, (9, 24, 40) if tiny else (70, 96, 128), count)


def weights(device: torch.device, tiny: bool) -> None:
    """The weight alone: within a unit of the last place of the specification, where hardware fuses multiply and add."""
    for dtype, tolerance in TOLERANCES.items():
        genes = [draw(device, dtype, 33, 65) for _ in range(4)]
        coeffs = draw(device, torch.float64 if dtype == torch.float64 else torch.float32, 4)
        with plg.use_backend("reference"):
            expected = plg.functional.expansion_weight(genes, coeffs)
        got = plg.functional.expansion_weight(genes, coeffs)
        # In float64 the specification rounds each product and each sum, the kernel rounds once per gene.
        ulps = 4 if dtype == torch.float64 else 1
        near(f"weight {_short(dtype)}", got, expected.double(), tolerance if tiny else ulps * torch.finfo(dtype).eps)


def epilogues(device: torch.device, tiny: bool) -> None:
    """Bias genes and every activation, in every dtype of products."""
    with plg.use_backend(backends(device)[0]), torch.no_grad():
        for dtype in (torch.float16,) if tiny else (torch.bfloat16, torch.float16, torch.float32):
            x = draw(device, dtype, 19, 24)
            genes, biases = ([draw(device, dtype, *shape) for _ in range(2)] for shape in ((37, 24), (37,)))
            coeffs = draw(device, torch.float32, 2)
            weight, bias = (
                sum(c * g.double() for c, g in zip(coeffs.double(), s, strict=True)) for s in (genes, biases)
            )
            expected = F.linear(x.double(), weight, bias)
            for name in (None, "relu", "gelu", "silu"):
                y = plg.functional.expansion_linear(x, genes, coeffs, biases, name)
                near(f"{name}", y, expected if name is None else getattr(F, name)(expected), TOLERANCES[dtype])


def _layer(device: torch.device, width: int, dtype: torch.dtype) -> plg.nn.ExpansionLinear:
    bank = plg.nn.GeneBank()
    layer = plg.nn.ExpansionLinear(width, width, True, device, dtype, bank=bank, name="fc", coeffs=[1.0, 0.5])
    with torch.no_grad():
        for gene in bank.parameters():
            gene.copy_(draw(device, dtype, *gene.shape) * width**-0.5)
    return layer


def autocast(device: torch.device, tiny: bool) -> None:
    """float32 genes, products in bfloat16."""
    width = 24 if tiny else 256
    layer, x = _layer(device, width, torch.float32), draw(device, torch.float32, 33, width)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    if y.dtype != torch.bfloat16:
        raise AssertionError(f"autocast: expected bfloat16, got {y.dtype}")
    near("autocast", y.detach(), layer.to_dense().double()(x.double()).detach(), TOLERANCES[torch.bfloat16])


def _step(device: torch.device, width: int, dtype: torch.dtype) -> tuple[Callable[[], None], list[Tensor]]:
    """Forward and backward that add to gradients which are there already, and the parameters."""
    layer = _layer(device, width, dtype)
    x, dy = draw(device, dtype, 3 * width, width), draw(device, dtype, 3 * width, width)
    parameters: list[Tensor] = list(layer.bank.parameters())

    def step() -> None:
        layer(x).backward(dy)

    step()
    return step, parameters


def repeats(device: torch.device, tiny: bool) -> None:
    """The same bits every time."""
    for dtype in (torch.bfloat16, torch.float32):
        step, parameters = _step(device, 32 if tiny else 384, dtype)
        first: list[Tensor] = []
        for _ in range(5 if tiny else 250):
            for parameter in parameters:
                parameter.grad = None
            step()
            got = [parameter.grad for parameter in parameters]
            first = first or got
            if not all(torch.equal(a, b) for a, b in zip(got, first, strict=True)):
                raise AssertionError(f"repeats {_short(dtype)}: expected the same bits, got others")


def side_stream(device: torch.device, tiny: bool) -> None:
    """Inputs that another stream is still writing are waited for by whoever uses that stream."""
    width = 32 if tiny else 512
    layer, source = _layer(device, width, torch.bfloat16), draw(device, torch.bfloat16, 40, width)
    expected = layer(source).detach()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    x = torch.full_like(source, float("nan"))
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        if stream is not None:
            torch.cuda._sleep(20_000_000)
        x.copy_(source)
        got = layer(x).detach()
    Clock(device).wait()
    if not torch.equal(got, expected):
        raise AssertionError("side stream: expected the values of the default stream, got others")


def graph(device: torch.device, tiny: bool) -> None:
    """Forward and backward captured once, replayed twice: gradients add up."""
    clock = Clock(device)
    for dtype in (torch.bfloat16, torch.float32):
        step, parameters = _step(device, 32 if tiny else 512, dtype)
        once = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        clock.wait()
        side = torch.cuda.Stream(device) if clock.cuda else None
        with torch.cuda.stream(side) if side is not None else nullcontext():
            step()
            step()
        clock.wait()
        replay, mode = clock.captured(step)
        if clock.cuda and mode != "graph":
            raise AssertionError(f"graph {_short(dtype)}: expected a capture, got {mode}")
        for parameter in parameters:
            parameter.grad.zero_()  # type: ignore[union-attr]
        replay()
        replay()
        clock.wait()
        for parameter, value in zip(parameters, once, strict=True):
            near(f"graph {_short(dtype)}", parameter.grad, 2 * value.double(), TOLERANCES[dtype])  # type: ignore[arg-type]


def unsynchronized(device: torch.device, _tiny: bool) -> None:
    """No call reads a value on the host."""
    step, _ = _step(device, 64, torch.bfloat16)
    Clock(device).wait()
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)


def offsets(device: torch.device, tiny: bool) -> None:
    """More than 2^31 elements of y, and of x: the last rows are right."""
    wide, tokens = (64, 70) if tiny else (16384, (1 << 17) + 3)
    for regime in ("fused", "panel"):
        plg.set_regime(regime)
        try:
            with torch.no_grad():
                _last_rows(device, tokens, wide, 16, regime)
                _last_rows(device, tokens, 16, wide, regime)
        finally:
            plg.set_regime("auto")


def _last_rows(device: torch.device, tokens: int, out: int, inner: int, regime: str) -> None:
    x = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
    genes = [draw(device, torch.bfloat16, out, inner).mul_(inner**-0.5) for _ in range(2)]
    coeffs = draw(device, torch.float32, 2)
    weight = sum(c * gene.double() for c, gene in zip(coeffs.double(), genes, strict=True))
    y = plg.functional.expansion_linear(x, genes, coeffs)
    expected = x[-5:].double() @ weight.t()
    near(f"offsets {regime} {tokens} x {out} x {inner}", y[-5:], expected, TOLERANCES[torch.bfloat16])


def convolution(device: torch.device, tiny: bool) -> None:
    """A 3x3 convolution with shared genes."""
    dtype = torch.float32 if tiny else torch.bfloat16
    x, genes = draw(device, dtype, 2, 8, 9, 9), [draw(device, dtype, 12, 8, 3, 3) for _ in range(2)]
    coeffs = draw(device, torch.float32, 2)
    weight = sum(c * gene.double() for c, gene in zip(coeffs.double(), genes, strict=True))
    y = plg.functional.expansion_conv2d(x, genes, coeffs, padding=1)
    near("convolution", y, F.conv2d(x.double(), weight, padding=1), TOLERANCES[dtype])


def quick(device: torch.device) -> list[Check]:
    """The few that a memory checker can follow in a minute."""
    found = []
    for backend in backends(device):
        for dtype in (torch.float16,) if device.type == "cpu" else (torch.bfloat16, torch.float32):
            for regime in ("rows", "fused", "panel"):
                shapes = QUICK[:1] if device.type == "cpu" else QUICK
                found.append(Check(f"{backend} {regime}", partial(products, device, backend, regime, dtype, shapes)))
    return found


def prepare(device: torch.device) -> None:
    """Uninitialised memory is NaN; on a CPU kernels are interpreted. Before anything imports Triton or calls cuBLAS."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quick checks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = torch.device(parser.parse_args(arguments).device)
    prepare(device)
    for check in quick(device):
        check.run()
        print(f"ok {check.name}", flush=True)
    Clock(device).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
