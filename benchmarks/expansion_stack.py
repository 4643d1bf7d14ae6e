# SPDX-License-Identifier: Apache-2.0
"""The cases of whole stacks of weights: all layers of a network from the same genes, as descendants and `bake` need.

One pass over the genes is compared with one pass per layer and with one product of coefficients and stacked genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import pylearngene as plg
from benchmarks.cases import Case
from pylearngene import plan
from pylearngene.methods import LDR


@dataclass
class StackInputs:
    """K genes in one tensor [K, O, I], LDR's coefficients [L, K], and two buffers to copy as many bytes as move."""

    genes: Tensor
    coeffs: Tensor
    source: Tensor
    target: Tensor


def cases(shape: tuple[int, int], layers: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Stacks of `layers` weights of one shape, from 2, 6 and 12 genes."""
    return [_case(shape, layers, genes, dtype) for genes in (2, 6, 12) for dtype in dtypes]


def _inputs(shape: tuple[int, int], layers: int, genes: int, dtype: torch.dtype) -> StackInputs:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((genes, *shape), generator=generator).to(dtype)
    source = torch.zeros((genes + layers) * shape[0] * shape[1] // 2, dtype=dtype)
    return StackInputs(values, torch.tensor(LDR(genes).coefficients(layers)), source, torch.zeros_like(source))


def _named(weights: Tensor) -> Iterator[tuple[str, Tensor]]:
    for layer, weight in enumerate(weights):
        yield f"layer {layer}", weight


def _together(inputs: StackInputs) -> Iterator[tuple[str, Tensor]]:
    yield from _named(plg.functional.expansion_weight(inputs.genes, inputs.coeffs))


def _by_layer(inputs: StackInputs) -> Iterator[tuple[str, Tensor]]:
    plg.set_regime("panel")
    try:
        weights = plg.functional.expansion_weight(inputs.genes, inputs.coeffs)
    finally:
        plg.set_regime("auto")
    yield from _named(weights)


def _product(inputs: StackInputs) -> Iterator[tuple[str, Tensor]]:
    genes = inputs.genes
    stack = inputs.coeffs.to(genes.dtype) @ genes.reshape(len(genes), -1)
    yield from _named(stack.view(-1, *genes.shape[1:]))


def _reference(inputs: StackInputs) -> Iterator[tuple[str, Tensor]]:
    yield from _named(torch.einsum("lk,koi->loi", inputs.coeffs.double(), inputs.genes.double()))


def _copy(inputs: StackInputs) -> Iterator[tuple[str, Tensor]]:
    yield "copy", inputs.target.copy_(inputs.source)


def _case(shape: tuple[int, int], layers: int, genes: int, dtype: torch.dtype) -> Case:
    weights = layers * shape[0] * shape[1]
    return Case(
        "expansion", "synthesis", plan.choose_stack(layers, genes, True), f"{layers} x {shape[0]} x {shape[1]}",
        0, genes, dtype, make=partial(_inputs, shape, layers, genes, dtype), ours=_together, reference=_reference,
        baselines={"by layer": _by_layer, "eager": _product}, roof=_copy,
        moved=(genes + layers) * shape[0] * shape[1] * dtype.itemsize, weights=weights,
    )  # fmt: skip
