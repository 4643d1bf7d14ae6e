# SPDX-License-Identifier: Apache-2.0
"""What `pylearngene bench` times: linear layers of a deep network that share genes, the same layers dense, and eager.

Every layer is checked against float64 before anything is timed. How calls are timed is in `timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylearngene import functional
from pylearngene.errors import ProcessError
from pylearngene.nn import ExpansionLinear, GeneBank

#: Layers of a transformer block: (O, I) in units of the width.
KINDS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
CALLS = ("ours", "dense", "eager")
# Of the largest element: float32 sums of a few thousand terms; 16 bits a few roundings. Gradients sum over all layers.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_GRADIENT = 5


class WrongResultError(ProcessError):
    """A call does not compute what float64 does, so its speed means nothing."""


class Stack:
    """`depth` blocks of four layers whose weights come from K genes each, once gene-backed and once dense.

    Args:
        width: D.
        depth: L.
        genes: K.
        dtype: of x and of the products; with `backward` 16 bits mean float32 parameters under autocast.
        device: where.
        backward: whether parameters get gradients.
    """

    def __init__(
        self, width: int, depth: int, genes: int, dtype: torch.dtype, device: torch.device, backward: bool
    ) -> None:
        self.width, self.dtype, self.device, self.backward = width, dtype, device, backward
        self.stored = torch.float32 if backward else dtype
        self.generator = torch.Generator().manual_seed(0)
        self.bank = GeneBank()
        self.coeffs = [tuple(((layer + 1) / depth) ** k for k in range(genes)) for layer in range(depth)]
        self.ours: list[dict[str, Any]] = [
            {
                kind: ExpansionLinear(inner * width, outer * width, bank=self.bank, name=kind, coeffs=coeffs)
                for kind, (outer, inner) in KINDS.items()
            }
            for coeffs in self.coeffs
        ]
        for gene in self.bank.parameters():
            nn.init.normal_(gene, 0.0, gene.shape[-1] ** -0.5 if gene.dim() == 2 else 0.1, generator=self.generator)
        self.bank.to(device, self.stored).requires_grad_(backward)
        for row in self.ours:
            for layer in row.values():
                layer.to(device)
        self.dense: list[dict[str, Any]] = [
            {kind: layer.to_dense().requires_grad_(backward) for kind, layer in row.items()} for row in self.ours
        ]

    @property
    def dense_bytes(self) -> int:
        """What the dense weights take in the dtype of the products."""
        elements: int = sum(layer.weight.numel() for row in self.dense for layer in row.values())
        return elements * self.dtype.itemsize

    def genes(self, kind: str) -> tuple[list[Tensor], list[Tensor]]:
        """Weight genes and bias genes of a layer."""
        group = self.bank.group(kind)
        return group.weights(), group.biases()

    def layers(self, call: str) -> list[dict[str, Callable[[Tensor], Tensor]]]:
        """Per block and kind what maps x to y."""
        if call != "eager":
            return {"ours": self.ours, "dense": self.dense}[call]
        genes = {kind: self.genes(kind) for kind in KINDS}
        return [{kind: partial(_materialized, *pair, coeffs) for kind, pair in genes.items()} for coeffs in self.coeffs]

    def parameters(self, call: str) -> list[Tensor]:
        """What gets gradients, x aside."""
        if call == "dense":
            return [parameter for row in self.dense for layer in row.values() for parameter in layer.parameters()]
        return list(self.bank.parameters())


class Work:
    """A stack with inputs for M tokens: what is timed.

    Every layer works on inputs of its own, so that errors do not add up.
    """

    def __init__(self, stack: Stack, tokens: int) -> None:
        def draw(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(tokens, columns, generator=stack.generator).to(stack.device, dtype)

        self.stack = stack
        self.x = {
            inner: draw(inner * stack.width, stack.stored).requires_grad_(stack.backward)
            for inner in sorted({inner for _, inner in KINDS.values()})
        }
        rows = {kind: draw(outer * stack.width, torch.float32) for kind, (outer, _) in KINDS.items()}
        self.dy = {kind: dy.to(stack.dtype) for kind, dy in rows.items()} if stack.backward else {}

    def input_of(self, kind: str) -> Tensor:
        """What a layer is applied to."""
        return self.x[KINDS[kind][1]]

    def run(self, call: str) -> None:
        """One pass through all layers; without `backward` each result is dropped when the next is there."""
        if not self.stack.backward:
            with torch.no_grad():
                for _ in self._outputs(call):
                    pass
            return
        parameters = self.stack.parameters(call)
        for tensor in (*self.x.values(), *parameters):
            tensor.grad = None
        if call == "ours":  # an optimizer has changed the genes since the last step: copies of them are stale
            torch.autograd.graph.increment_version(parameters)
        outputs = [y for _, _, y in self._outputs(call)]
        torch.autograd.backward(outputs, [self.dy[kind] for _ in self.stack.coeffs for kind in KINDS])

    def _outputs(self, call: str) -> Iterator[tuple[int, str, Tensor]]:
        with self._autocast():
            for depth, row in enumerate(self.stack.layers(call)):
                for kind, layer in row.items():
                    yield depth, kind, layer(self.input_of(kind))

    def _autocast(self) -> AbstractContextManager[Any]:
        stack = self.stack
        return nullcontext() if stack.stored == stack.dtype else torch.autocast(stack.device.type, stack.dtype)

    def check(self) -> float:
        """Compare every call with float64.

        Returns:
            The largest error of ours, as a share of the largest element.

        Raises:
            WrongResultError: a result has an error above the tolerance, or is NaN.
        """
        errors = {call: max(self._check_outputs(call), self._check_gradients(call)) for call in CALLS}
        return errors["ours"]

    def _check_outputs(self, call: str) -> float:
        largest = 0.0
        with torch.no_grad():
            for depth, kind, y in self._outputs(call):
                genes, biases = self.stack.genes(kind)
                coeffs = self.stack.coeffs[depth]
                expected = F.linear(self.input_of(kind).double(), _combined(genes, coeffs), _combined(biases, coeffs))
                largest = max(largest, self._compare(f"{call}, {kind} of block {depth}", y, expected, 1))
        return largest

    def _check_gradients(self, call: str) -> float:
        if not self.stack.backward:
            return 0.0
        self.run(call)
        got = {f"dx of width {inner}": x.grad for inner, x in self.x.items()}
        if call != "dense":
            got |= {name: gene.grad for name, gene in self.stack.bank.named_genes()}
        expected = dict(self._expected_gradients())
        return max(self._compare(f"{call}, {name}", value, expected[name], _GRADIENT) for name, value in got.items())

    def _expected_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """`dx = sum_l dy W_l` and `dG_k = (sum_l c_lk) dy^T x`, since the layers of a kind share x and dy."""
        coeffs = torch.tensor(self.stack.coeffs, dtype=torch.float64).sum(0).tolist()
        dx = {inner: torch.zeros_like(x, dtype=torch.float64) for inner, x in self.x.items()}
        for kind, (_, inner) in KINDS.items():
            genes, _ = self.stack.genes(kind)
            dy = self.dy[kind].double()
            dx[inner] += dy @ _combined(genes, coeffs)
            dw = dy.t() @ self.input_of(kind).detach().to(self.stack.dtype).double()
            for k, coeff in enumerate(coeffs):
                yield f"{kind}.weight.{k}", coeff * dw
                yield f"{kind}.bias.{k}", coeff * dy.sum(0)
        for inner, value in dx.items():
            yield f"dx of width {inner}", value

    def _compare(self, what: str, got: Tensor | None, expected: Tensor, factor: float) -> float:
        limit = factor * TOLERANCES[self.stack.dtype]
        if got is None or got.shape != expected.shape:
            shape = "none" if got is None else list(got.shape)
            raise WrongResultError(f"bench: {what}: expected shape {list(expected.shape)}, got {shape}")
        error = float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
        if not error <= limit:  # so that NaN is refused too
            expected_error = f"expected an error of at most {limit:g} of the largest element"
            raise WrongResultError(f"bench: {what}: {expected_error}, got {error:g}")
        return error


class Synthesis:
    """The weights of all layers on their own, and a copy of as many bytes."""

    def __init__(self, stack: Stack) -> None:
        genes = {kind: [gene.detach().to(stack.dtype) for gene in stack.genes(kind)[0]] for kind in KINDS}
        coeffs = [torch.tensor(row, device=stack.device) for row in stack.coeffs]
        self.calls = [(genes[kind], c) for c in coeffs for kind in KINDS]
        weights = sum(gene[0].numel() for gene in genes.values())
        elements = (len(coeffs[0]) + 1) * weights
        #: Bytes that one pass over all layers reads and writes.
        self.moved = len(coeffs) * elements * stack.dtype.itemsize
        source = torch.zeros(elements // 2, dtype=stack.dtype, device=stack.device)
        self.pair = source, torch.zeros_like(source)

    def run(self) -> None:
        """Every weight once, each dropped when the next is there."""
        for genes, coeffs in self.calls:
            functional.expansion_weight(genes, coeffs)

    def copy(self) -> None:
        """A copy that moves about as many bytes."""
        source, target = self.pair
        for _ in range(len(self.calls) // len(KINDS)):
            target.copy_(source)


def _combined(genes: Sequence[Tensor], coeffs: Sequence[float]) -> Tensor:
    """`sum_k c_k G_k` in float64."""
    total = torch.zeros_like(genes[0], dtype=torch.float64)
    for gene, coeff in zip(genes, coeffs, strict=True):
        total.add_(gene.detach().double(), alpha=coeff)
    return total


def _materialized(genes: Sequence[Tensor], biases: Sequence[Tensor], coeffs: Sequence[float], x: Tensor) -> Tensor:
    """The eager baseline: make the weight by the fewest torch operations, then `F.linear`."""
    return F.linear(x, _eager_sum(genes, coeffs), _eager_sum(biases, coeffs))


def _eager_sum(genes: Sequence[Tensor], coeffs: Sequence[float]) -> Tensor:
    total = genes[0] * coeffs[0]
    for gene, coeff in zip(genes[1:], coeffs[1:], strict=True):
        total.add_(gene, alpha=coeff)
    return total
