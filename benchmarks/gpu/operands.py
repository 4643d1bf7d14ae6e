# SPDX-License-Identifier: Apache-2.0
"""What the GPU cases of `expansion` compute with: one set of inputs, and every way to a synthesized product.

Each way is a function of one set that gives named results; which ways a case compares is in `expansion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from benchmarks.expansion_inputs import powers, synthesize

Named = Iterator[tuple[str, Tensor]]
#: Bytes of the two panels of the synthesis by hand together.
PANELS = 24 << 20


class Operands:
    """x, dy, K genes, coefficients of the sixth layer of twelve, the ready weight, and accumulators where asked for.

    Args:
        shape: [O, I].
        tokens: M; 0 leaves x and dy out.
        genes: K.
        dtype: of x, dy, genes and weight.
        device: of all.
        gradients: whether there are float32 accumulators, one per gene and one for the dense weight.
        train: whether x, genes and weight require gradients.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tokens: int,
        genes: int,
        dtype: torch.dtype,
        device: torch.device,
        gradients: bool = False,
        train: bool = False,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        out, inner = shape
        self.numbers = powers(5, 12, genes)
        self.coeffs = torch.tensor(self.numbers, device=device)
        self.x, self.dy = draw(tokens, inner).requires_grad_(train), draw(tokens, out)
        self.genes = [draw(out, inner).mul_(inner**-0.5).requires_grad_(train) for _ in range(genes)]
        self.weight = synthesize([g.detach() for g in self.genes], self.numbers).requires_grad_(train)
        count = genes + 1 if gradients else 0
        self.buffers = [torch.zeros(shape, device=device) for _ in range(count)]
        self.fresh = True  # accumulators are zeroed ahead of a call, to compare; not while it is timed

    def accumulators(self) -> list[Tensor]:
        """Those of the genes."""
        return self._zeroed(self.buffers[:-1])

    def dense_accumulator(self) -> Tensor:
        """That of the dense weight."""
        return self._zeroed(self.buffers[-1:])[0]

    def _zeroed(self, buffers: list[Tensor]) -> list[Tensor]:
        if self.fresh:
            for buffer in buffers:
                buffer.zero_()
        return buffers


def forward(s: Operands) -> Named:
    yield "y", plg.functional.expansion_linear(s.x, s.genes, s.coeffs)


def forward_dense(s: Operands) -> Named:
    yield "y", F.linear(s.x, s.weight)


def forward_eager(s: Operands) -> Named:
    yield "y", F.linear(s.x, synthesize(s.genes, s.numbers))


def forward_by_hand(s: Operands) -> Named:
    """Panels of rows of W, made by torch into one of two workspaces, then the vendor's product."""
    out, inner = s.weight.shape
    y = s.x.new_empty((len(s.x), out))
    for turn, (row, end, panel) in enumerate(_panels(s, out, inner)):
        part = panel[turn % 2][: end - row]
        _fill(part, [gene[row:end] for gene in s.genes], s.numbers)
        torch.mm(s.x, part.t(), out=y[:, row:end])
    yield "y", y


def dx(s: Operands) -> Named:
    yield "dx", torch.ops.pylearngene.expansion_linear_dx(s.dy, s.genes, s.coeffs)


def dx_dense(s: Operands) -> Named:
    yield "dx", s.dy @ s.weight


def dx_eager(s: Operands) -> Named:
    yield "dx", s.dy @ synthesize(s.genes, s.numbers)


def dx_by_hand(s: Operands) -> Named:
    """Panels of columns of W."""
    out, inner = s.weight.shape
    result = s.dy.new_empty((len(s.dy), inner))
    for turn, (col, end, panel) in enumerate(_panels(s, inner, out)):
        part = panel[turn % 2][: end - col].view(-1)[: out * (end - col)].view(out, end - col)
        _fill(part, [gene[:, col:end] for gene in s.genes], s.numbers)
        torch.mm(s.dy, part, out=result[:, col:end])
    yield "dx", result


def _panels(s: Operands, lines: int, width: int) -> Iterator[tuple[int, int, Tensor]]:
    length = max(1, min(lines, PANELS // 2 // (width * s.x.element_size())))
    panel = s.x.new_empty((2, length, width))
    for line in range(0, lines, length):
        yield line, min(lines, line + length), panel


def _fill(panel: Tensor, genes: Sequence[Tensor], numbers: Sequence[float]) -> None:
    torch.mul(genes[0], numbers[0], out=panel)
    for gene, number in zip(genes[1:], numbers[1:], strict=True):
        panel.add_(gene, alpha=number)


def wgrad(s: Operands) -> Named:
    """Every gene's gradient and the coefficients' at once."""
    buffers, wanted = s.accumulators(), list(range(len(s.genes)))
    dots = torch.ops.pylearngene.expansion_linear_wgrad_(
        buffers, [], s.dy, s.x, s.genes, [], s.coeffs, wanted, [], True
    )
    yield from ((f"d gene {k}", buffer) for k, buffer in enumerate(buffers))
    yield "d coeffs", dots


def wgrad_dense(s: Operands) -> Named:
    """The first coefficient is 1, so that the dense weight's gradient is that of the first gene."""
    into = s.dense_accumulator()
    dense_accumulation(s.x.device, s.x.dtype)[1](into, s.dy, s.x)
    yield "d gene 0", into


def wgrad_eager(s: Operands) -> Named:
    """What autograd does with a weight made by torch."""
    buffers = s.accumulators()
    dw = s.dy.t() @ s.x
    for k, buffer in enumerate(buffers):
        yield f"d gene {k}", buffer.add_(dw, alpha=s.numbers[k])
    for gene in s.genes:  # the coefficients' gradients; not compared, since dw was rounded to 16 bits
        (dw * gene).sum(dtype=torch.float32)


@lru_cache
def dense_accumulation(device: torch.device, dtype: torch.dtype) -> tuple[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """How a dense weight gradient is best added to a float32 accumulator here, and its name."""
    into, dy, x = torch.ones(16, 16, device=device), *torch.randn(2, 32, 16, device=device).to(dtype)
    expected = 1 + dy.double().t() @ x.double()
    try:
        _addmm(into, dy, x)
        if (into.double() - expected).abs().max() < 1e-3:
            return "addmm into float32", _addmm
    except (RuntimeError, AttributeError):  # not on this device, or not in this version of torch
        pass
    return "mm, then added to float32", _mm_and_add


def _addmm(into: Tensor, dy: Tensor, x: Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(into, dy.t(), x, torch.float32, out=into)


def _mm_and_add(into: Tensor, dy: Tensor, x: Tensor) -> None:
    into.add_(dy.t() @ x)


def step(s: Operands) -> Named:
    yield from _step(s, plg.functional.expansion_linear(s.x, s.genes, s.coeffs), s.genes)


def step_dense(s: Operands) -> Named:
    yield from list(_step(s, F.linear(s.x, s.weight), [s.weight]))[:2]


def step_eager(s: Operands) -> Named:
    yield from _step(s, _materialized(s.x, s.numbers, *s.genes), s.genes)


def step_checkpointed(s: Operands) -> Named:
    """The weight is not kept for the backward pass, but made again there."""
    y = checkpoint(_materialized, s.x, s.numbers, *s.genes, use_reentrant=False, preserve_rng_state=False)
    yield from _step(s, y, s.genes)


def _materialized(x: Tensor, numbers: Sequence[float], *genes: Tensor) -> Tensor:
    return F.linear(x, synthesize(genes, numbers))


def _step(s: Operands, y: Tensor, parameters: Sequence[Tensor]) -> Named:
    dx, *grads = torch.autograd.grad(y, (s.x, *parameters), s.dy)
    yield "y", y
    yield "dx", dx
    yield from ((f"d gene {k}", grad) for k, grad in enumerate(grads))


def synthesis(s: Operands) -> Named:
    yield "weight", plg.functional.expansion_weight(s.genes, s.coeffs)


def synthesis_eager(s: Operands) -> Named:
    yield "weight", synthesize(s.genes, s.numbers)


def compiled(kind: str) -> Callable[[Operands], Named]:
    """`torch.compile` in its default mode of the form with a weight; coefficients are a tensor, shapes are static."""

    def weight(genes: Sequence[Tensor], coeffs: Tensor) -> Tensor:
        return sum(c * g for c, g in zip(coeffs, genes, strict=True)).to(genes[0].dtype)  # type: ignore[union-attr]

    functions: dict[str, Callable[..., Tensor]] = {
        "forward": lambda x, genes, coeffs: F.linear(x, weight(genes, coeffs)),
        "training": lambda x, genes, coeffs: F.linear(x, weight(genes, coeffs)),
        "dx": lambda dy, genes, coeffs: dy @ weight(genes, coeffs),
    }
    function = torch.compile(functions[kind], fullgraph=True, dynamic=False)

    def call(s: Operands) -> Named:
        if kind == "training":
            yield from _step(s, function(s.x, s.genes, s.coeffs), s.genes)
        else:
            name, left = ("y", s.x) if kind == "forward" else ("dx", s.dy)
            yield name, function(left, s.genes, s.coeffs)

    return call


def reference(s: Operands, kind: str) -> Named:
    """The same in float64."""
    weight = synthesize([gene.detach().double() for gene in s.genes], s.coeffs.double().tolist())
    if kind == "synthesis":
        yield "weight", weight
    if kind in ("forward", "training"):
        yield "y", s.x.detach().double() @ weight.t()
    if kind in ("dx", "training"):
        yield "dx", s.dy.double() @ weight
    if kind in ("wgrad", "training"):
        dw = s.dy.double().t() @ s.x.detach().double()
        yield from ((f"d gene {k}", number * dw) for k, number in enumerate(s.numbers))
        if kind == "wgrad":
            yield "d coeffs", torch.stack([(dw * gene.double()).sum() for gene in s.genes])
