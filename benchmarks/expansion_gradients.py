# SPDX-License-Identifier: Apache-2.0
"""The products of the backward pass alone: dx through networks, and the gradients of all genes and coefficients.

No layer computes one of them alone, so that ours is the operator. Inputs are those of `expansion_products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.expansion_inputs import LAYERS, double, synthesize
from benchmarks.expansion_products import Inputs, Products, between, regime, run, sample
from pylearngene._ops import expansion_direct, expansion_regimes


def _dx_ours(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        genes, coeffs = inputs.net.genes[name][0], inputs.coeffs[depth]
        if expansion_direct.input_gradient(inputs.dy[name], genes, coeffs) is None:
            return lambda dy: expansion_regimes.input_gradient(dy, genes, coeffs)
        return lambda dy: expansion_direct.input_gradient(dy, genes, coeffs)

    return run(inputs.over("ours", step, "dy"))


def _dx_dense(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        weight = inputs.net.dense[depth][name].weight
        return lambda dy: torch.mm(dy, weight)

    return run(inputs.over("dense", step, "dy"))


def _dx_eager(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        genes, coeffs = inputs.net.genes[name][0], inputs.net.coeffs[depth]
        return lambda dy: torch.mm(dy, synthesize(genes, coeffs))

    return run(inputs.over("eager", step, "dy"))


def _dx_reference(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    for name, (genes, _) in inputs.net.genes.items():
        dy, wide = inputs.dy[name].double(), double(genes)
        for depth, coeffs in sample(inputs):
            yield f"{name}.{depth}", dy @ synthesize(wide, coeffs)


def dx_case(part: Products, genes: int, tokens: int, dtype: torch.dtype) -> Case:
    return Case(
        "expansion", "dx", regime("dx", part.dim, tokens, genes, dtype), f"{part.depth} x D{part.dim}", tokens, genes,
        dtype, make=partial(Inputs, part.dim, part.depth, genes, tokens, dtype), ours=_dx_ours, reference=_dx_reference,
        baselines={"dense": _dx_dense, "eager": _dx_eager}, one_set=True, sampled=True, between=between(part, tokens),
    )  # fmt: skip


class GradientInputs(Inputs):
    """Inputs with accumulators of gene gradients, of ours in float32 and of torch's way in the genes' dtype.

    They are zero when made; the calls add to them, as the layers of a network do.
    """

    def __init__(self, dim: int, depth: int, genes: int, tokens: int, dtype: torch.dtype) -> None:
        super().__init__(dim, depth, genes, tokens, dtype)
        pairs = {name: weights for name, (weights, _) in self.net.genes.items()}
        self.sums = {name: [torch.zeros(gene.shape) for gene in weights] for name, weights in pairs.items()}
        self.grads = {name: [torch.zeros_like(gene) for gene in weights] for name, weights in pairs.items()}


def _given(name: str, grads: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for k, grad in enumerate(grads):
        yield f"d {name}.{k}", grad


def _together(dots: Sequence[Tensor]) -> tuple[str, Tensor]:
    """The coefficients' gradients of all weights: each is a sum that may happen to be near zero, not all are."""
    return "dc", torch.cat(list(dots))


def _wgrad_ours(inputs: GradientInputs) -> Iterator[tuple[str, Tensor]]:
    found: list[Tensor] = []
    for name, (genes, _) in inputs.net.genes.items():
        sums = inputs.sums[name]
        for coeffs in inputs.coeffs:
            dots = expansion_regimes.gene_gradients(sums, inputs.dy[name], inputs.x[name], genes, coeffs, True)
        assert dots is not None
        found.append(dots)
        yield from _given(name, sums)
    yield _together(found)


def _wgrad_eager(inputs: GradientInputs) -> Iterator[tuple[str, Tensor]]:
    """As autograd does it with the fewest operations: dW, added to every gene's gradient and multiplied by the gene."""
    found: list[Tensor] = []
    for name, (genes, _) in inputs.net.genes.items():
        grads = inputs.grads[name]
        for coeffs in inputs.net.coeffs:
            dw = torch.mm(inputs.dy[name].t(), inputs.x[name])
            for grad, coeff in zip(grads, coeffs, strict=True):
                grad.add_(dw, alpha=coeff)
            dots = torch.stack([(dw * gene).sum(dtype=torch.float32) for gene in genes])
        found.append(dots)
        yield from _given(name, grads)
    yield _together(found)


def _wgrad_dense(inputs: GradientInputs) -> Iterator[tuple[str, Tensor]]:
    """DW alone: equal to the first gene's gradient where there is one layer, whose first coefficient is 1."""
    for name in LAYERS:
        for _ in inputs.coeffs:
            dw = torch.mm(inputs.dy[name].t(), inputs.x[name])
        yield f"d {name}.0", dw


def _wgrad_reference(inputs: GradientInputs) -> Iterator[tuple[str, Tensor]]:
    found: list[Tensor] = []
    for name, (genes, _) in inputs.net.genes.items():
        dw = inputs.dy[name].double().t() @ inputs.x[name].double()
        for k in range(len(genes)):
            yield f"d {name}.{k}", sum(coeffs[k] for coeffs in inputs.net.coeffs) * dw
        found.append(torch.stack([(dw * gene.double()).sum() for gene in genes]))
    yield _together(found)


def wgrad_case(part: Products, genes: int, tokens: int, dtype: torch.dtype) -> Case:
    return Case(
        "expansion", "wgrad", regime("dw", part.dim, tokens, genes, dtype), f"{part.depth} x D{part.dim}", tokens,
        genes, dtype, make=partial(GradientInputs, part.dim, part.depth, genes, tokens, dtype), ours=_wgrad_ours,
        reference=_wgrad_reference, baselines={"dense": _wgrad_dense, "eager": _wgrad_eager},
        tolerance=1e-4 if dtype == torch.float32 else 5e-2, one_set=True,
    )  # fmt: skip
