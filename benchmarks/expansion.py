# SPDX-License-Identifier: Apache-2.0
"""The cases of `expansion`: the weight alone and training steps of blocks here, all others from files of their own.

Products of networks are in `expansion_grid`, whole models in `models`, convolutions in `expansion_conv`, whole
stacks of weights in `expansion_stack`, calls too small for any kernel in `host_cost`. Coefficients are powers of
(l + 1) / L, much like TLEG's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import pylearngene as plg
from benchmarks import expansion_conv, expansion_grid, expansion_inputs, expansion_stack, host_cost, models
from benchmarks.cases import Case
from benchmarks.expansion_inputs import (
    Network,
    checkpointed,
    materialized,
    powers,
    step,
    step_reference,
    synthesize,
)
from benchmarks.expansion_products import Products, regime

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        weight: [O, I] of synthesis alone.
        genes: every K of synthesis alone.
        products: the products of networks.
        blocks: (D, depth, dtypes) of the training steps.
        convolutions: (C, H = W) of the stages of three convolutions.
        images: samples of a training step, and of the convolutions.
        length: tokens of a sample.
        depth: weights that are synthesized at once.
        together: [O, I] of these.
        small: every I = O of the layers whose host cost is measured.
        repeats: of such a layer's call.
        vit: of the whole models.
    """

    weight: tuple[int, int] = (3072, 768)
    genes: tuple[int, ...] = (1, 2, 4, 8, 12)
    products: tuple[Products, ...] = expansion_grid.FULL
    blocks: tuple[tuple[int, int, tuple[torch.dtype, ...]], ...] = (
        (192, 1, DTYPES),
        (384, 1, DTYPES),
        (192, 12, (torch.float32,)),
    )
    convolutions: tuple[tuple[int, int], ...] = ((64, 56), (256, 14), (512, 7))
    images: int = 8
    length: int = 64
    depth: int = 12
    together: tuple[int, int] = (768, 768)
    small: tuple[int, ...] = (16, 64)
    repeats: int = 25
    vit: models.Sizes = models.FULL


FULL = Sizes()
TINY = Sizes(
    (24, 16), (1, 2, 4), expansion_grid.TINY, ((32, 1, DTYPES), (32, 3, DTYPES)), ((12, 5),), 2, 12, 3, (24, 16),
    (16,), 2, models.TINY,
)  # fmt: skip


def cases(sizes: Sizes = FULL, compiled: bool = False) -> list[Case]:
    """All cases of this primitive; `compiled` adds `torch.compile` of the eager baseline to a few, which takes long."""
    return [
        *(_weight_case(sizes.weight, genes, dtype) for genes in sizes.genes for dtype in DTYPES),
        *expansion_grid.cases(sizes.products, DTYPES, compiled),
        *(_block_case(sizes, dim, depth, dtype, compiled) for dim, depth, dtypes in sizes.blocks for dtype in dtypes),
        *models.cases(sizes.vit),
        *expansion_stack.cases(sizes.together, sizes.depth, DTYPES),
        *expansion_conv.cases(sizes.convolutions, 3, sizes.images, DTYPES),
        *host_cost.cases(sizes.small, sizes.repeats),
    ]


@dataclass
class WeightInputs:
    """Genes, coefficients as a tensor and as numbers, and two buffers whose copy moves as many bytes as synthesis."""

    genes: list[Tensor]
    coeffs: Tensor
    numbers: tuple[float, ...]
    source: Tensor
    target: Tensor


def _weight_inputs(shape: tuple[int, int], genes: int, dtype: torch.dtype) -> WeightInputs:
    generator = torch.Generator().manual_seed(0)
    numbers = powers(7, 12, genes)
    source = torch.zeros((genes + 1) * shape[0] * shape[1] // 2, dtype=dtype)
    return WeightInputs(
        [torch.randn(shape, generator=generator).to(dtype) for _ in range(genes)],
        torch.tensor(numbers),
        numbers,
        source,
        torch.zeros_like(source),
    )


def _weight_case(shape: tuple[int, int], genes: int, dtype: torch.dtype) -> Case:
    def ours(inputs: WeightInputs) -> Iterator[tuple[str, Tensor]]:
        yield "weight", plg.functional.expansion_weight(inputs.genes, inputs.coeffs)

    def eager(inputs: WeightInputs) -> Iterator[tuple[str, Tensor]]:
        yield "weight", synthesize(inputs.genes, inputs.numbers)

    def reference(inputs: WeightInputs) -> Iterator[tuple[str, Tensor]]:
        yield "weight", synthesize([gene.double() for gene in inputs.genes], inputs.coeffs.double().tolist())

    def copy(inputs: WeightInputs) -> Iterator[tuple[str, Tensor]]:
        yield "copy", inputs.target.copy_(inputs.source)

    weights = shape[0] * shape[1]
    return Case(
        "expansion", "synthesis", "synthesis", f"{shape[0]} x {shape[1]}", 0, genes, dtype,
        make=partial(_weight_inputs, shape, genes, dtype), ours=ours, reference=reference,
        baselines={"eager": eager}, roof=copy, moved=(genes + 1) * weights * dtype.itemsize, weights=weights,
    )  # fmt: skip


def _block_case(sizes: Sizes, dim: int, depth: int, dtype: torch.dtype, compiled: bool) -> Case:
    tokens = sizes.images * sizes.length
    also = compiled and depth == 1 and dtype == torch.float32 and dim == max(block[0] for block in sizes.blocks)
    return Case(
        "expansion", "training", regime("y", dim, tokens, 2, dtype), f"{depth} x D{dim}", tokens, 2,
        dtype, make=partial(Network, dim, depth, 2, (sizes.images, sizes.length), dtype, train=True),
        ours=partial(step, apply="ours"), reference=step_reference,
        baselines={
            "dense": partial(step, apply="dense"),
            "eager": partial(step, apply=materialized),
            "checkpointed": partial(step, apply=checkpointed),
        }
        | ({"compiled": partial(step, apply=expansion_inputs.compiled())} if also else {}),
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,  # errors of up to 12 blocks add up
    )  # fmt: skip
