# SPDX-License-Identifier: Apache-2.0
"""The cases of `low_rank`: the weight alone, stacks of layers without gradients and with gates per sample, training.

The layers are those of transformer blocks, with a rank of a quarter of the width; the two genes of a case are U and V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from benchmarks.cases import Call, Case
from benchmarks.expansion_inputs import LAYERS, blocks
from pylearngene import _backends, plan

DTYPES = (torch.float32, torch.bfloat16)
Row = dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        weight: [O, I] and R of synthesis alone.
        depth: layers that share genes in a stack.
        width: D of the stacks.
        tokens: every M of the stacks.
        images: samples of a training step, and of the stack with gates.
        length: tokens of a sample.
    """

    weight: tuple[int, int, int] = (3072, 768, 192)
    depth: int = 12
    width: int = 384
    tokens: tuple[int, ...] = (1, 16, 256)
    images: int = 8
    length: int = 64


FULL = Sizes()
TINY = Sizes((24, 16, 4), 3, 32, (1, 4), 2, 5)


def cases(sizes: Sizes = FULL, compiled: bool = False) -> list[Case]:
    """All cases of this primitive; `compiled` adds `torch.compile` of the eager baseline, which takes minutes."""
    tokens = sizes.images * sizes.length
    return [
        *(_weight_case(sizes.weight, dtype) for dtype in DTYPES),
        *(_stack_case(sizes, (m,), False, dtype, compiled) for dtype in DTYPES for m in sizes.tokens),
        *(_stack_case(sizes, (sizes.images, sizes.length), True, dtype, False) for dtype in DTYPES),
        *(_block_case(sizes, tokens, dtype) for dtype in DTYPES),
    ]


class Factors:
    """U, s and V of one weight, and two buffers whose copy moves as many bytes as synthesis has to."""

    def __init__(self, out: int, inner: int, rank: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.u = torch.randn(out, rank, generator=generator).to(dtype)
        self.v = torch.randn(inner, rank, generator=generator).to(dtype)
        self.s = torch.rand(rank, generator=generator)
        self.genes = [self.u, self.v]
        self.source = torch.zeros((out * inner + (out + inner) * rank) // 2, dtype=dtype)
        self.target = torch.zeros_like(self.source)


class Network:
    """Four layers of L blocks that share directions, the same layers dense, a gate per sample, and x.

    Args:
        width: D; the rank is a quarter of it.
        depth: L.
        leading: axes of x ahead of D.
        gated: whether every sample has a gate.
        dtype: of everything; in training bfloat16 means float32 parameters under autocast.
        train: whether parameters and x get gradients.
    """

    def __init__(
        self, width: int, depth: int, leading: tuple[int, ...], gated: bool, dtype: torch.dtype, train: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        stored = torch.float32 if train else dtype
        self.autocast = train and dtype != torch.float32
        self.bank = plg.nn.GeneBank()
        self.ours = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: plg.nn.LowRankLinear(inner * width, outer * width, bank=self.bank, name=name, rank=width // 4)
                    for name, (outer, inner) in LAYERS.items()
                }
            )
            for _ in range(depth)
        )
        for gene in self.bank.parameters():
            nn.init.normal_(gene, 0.0, len(gene) ** -0.5, generator=generator)
        for parameter in self.ours.parameters():
            nn.init.uniform_(parameter, 0.5, 1.0, generator=generator)
        for module in (self.bank, self.ours):
            module.to(stored).requires_grad_(train)
        self.dense = [
            {name: layer.to_dense().requires_grad_(train) for name, layer in row.items()} for row in self.ours
        ]
        self.gate = torch.rand(leading[0], width // 4, generator=generator) if gated else None
        self.x = torch.randn(*leading, width, generator=generator).to(stored).requires_grad_(train)
        self.wide = torch.randn(*leading, 4 * width, generator=generator).to(stored)
        self.dy = torch.randn(*leading, width, generator=generator)

    def rows(self, apply: str, double: bool = False) -> list[Row]:
        """Per depth and name what maps x to y: "ours", "dense", or the weight made and used at once."""
        if apply == "dense":
            return [dict(row) for row in self.dense]
        if apply == "ours":
            return [{name: partial(layer, gate=self.gate) for name, layer in row.items()} for row in self.ours]
        make = {"eager": materialized, "checkpointed": checkpointed}[apply]
        found = []
        for row in self.ours:
            found.append(
                {name: partial(make, factors=self.factors(name, layer, double)) for name, layer in row.items()}
            )
        return found

    def factors(self, name: str, layer: nn.Module, double: bool) -> list[Tensor | None]:
        """U, s, V, gate and bias of a layer."""
        u, v = self.bank.group(name).tensors()
        tensors = [u, layer.s, v, self.gate, layer.bias]
        return [None if t is None else self.widened(t) for t in tensors] if double else tensors

    def widened(self, tensor: Tensor) -> Tensor:
        """The float64 copy of a tensor, the same at every call, so that layers share those of their genes."""
        known = self.__dict__.setdefault("_wide_of", {})
        if id(tensor) not in known:
            known[id(tensor)] = tensor.detach().double().requires_grad_(tensor.requires_grad)
        copy: Tensor = known[id(tensor)]
        return copy

    def parameters(self) -> list[nn.Parameter]:
        """What a training step of ours differentiates by, x aside: genes, then strengths and biases."""
        return [*self.bank.parameters(), *self.ours.parameters()]


def materialized(x: Tensor, factors: list[Tensor | None]) -> Tensor:
    """The eager way: the full weight, one per sample with a gate, then one product."""
    u, s, v, gate, bias = factors
    scale = s if gate is None else s * gate
    weight = ((u.to(scale.dtype) * scale.unsqueeze(-2)) @ v.to(scale.dtype).t()).to(x.dtype)
    if gate is None:
        return F.linear(x, weight, bias.to(x.dtype))
    return x @ weight.transpose(-1, -2) + bias.to(x.dtype)


def checkpointed(x: Tensor, factors: list[Tensor | None]) -> Tensor:
    """`materialized`, made again in the backward pass."""
    return checkpoint(materialized, x, factors, use_reentrant=False)


def forward(net: Network, apply: str, double: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every layer once, on inputs of its own so that errors do not add up."""
    for depth, row in enumerate(net.rows(apply, double)):
        for name, layer in row.items():
            x = net.wide if name == "fc2" else net.x
            yield f"{name}.{depth}", layer(x.double() if double else x)


def step(net: Network, apply: str) -> Iterator[tuple[str, Tensor]]:
    """Forward and backward of L blocks; dense weights have gradients of their own, which are not given."""
    dense = [p for row in net.dense for layer in row.values() for p in layer.parameters()]
    for tensor in (net.x, *net.parameters(), *dense):
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16) if net.autocast else nullcontext():
        y = blocks(net.x, net.rows(apply))
    y.backward(net.dy)
    yield "y", y
    yield "dx", net.x.grad
    if apply != "dense":
        for name, gene in net.bank.named_genes():
            yield f"d {name}", gene.grad


def step_reference(net: Network) -> Iterator[tuple[str, Tensor]]:
    """`step` in float64, by weights that are built."""
    x = net.x.detach().double().requires_grad_()
    y = blocks(x, net.rows("eager", double=True))
    y.backward(net.dy.double())
    yield "y", y
    yield "dx", x.grad
    for name, gene in net.bank.named_genes():
        yield f"d {name}", net.widened(gene).grad


def _weight_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    def ours(inputs: Factors) -> Iterator[tuple[str, Tensor]]:
        yield "weight", plg.functional.low_rank_weight(inputs.u, inputs.s, inputs.v)

    def eager(inputs: Factors) -> Iterator[tuple[str, Tensor]]:
        yield "weight", (inputs.u * inputs.s.to(dtype)) @ inputs.v.t()

    def reference(inputs: Factors) -> Iterator[tuple[str, Tensor]]:
        yield "weight", inputs.u.double() @ torch.diag(inputs.s.double()) @ inputs.v.double().t()

    def copy(inputs: Factors) -> Iterator[tuple[str, Tensor]]:
        yield "copy", inputs.target.copy_(inputs.source)

    out, inner, rank = shape
    moved = (out * inner + (out + inner) * rank) // 2 * 2 * dtype.itemsize
    return Case(
        "low_rank", "synthesis", "synthesis", f"{out} x {inner} R{rank}", 0, 2, dtype,
        make=partial(Factors, out, inner, rank, dtype), ours=ours, reference=reference, baselines={"eager": eager},
        roof=copy, moved=moved, weights=out * inner,
    )  # fmt: skip


def _stack_case(sizes: Sizes, leading: tuple[int, ...], gated: bool, dtype: torch.dtype, compiled: bool) -> Case:
    eager: Call = partial(forward, apply="eager")
    baselines = {"eager": eager} if gated else {"dense": partial(forward, apply="dense"), "eager": eager}
    if compiled:
        built = torch.compile(materialized)
        baselines["compiled"] = partial(_forward_with, make=built)
    tokens = leading[0] * (leading[1] if gated else 1)
    return Case(
        "low_rank", "forward", _regime(tokens), _shape(sizes) + (", gated" if gated else ""), tokens, 2, dtype,
        make=partial(Network, sizes.width, sizes.depth, leading, gated, dtype, train=False),
        ours=partial(forward, apply="ours"), reference=partial(forward, apply="eager", double=True),
        baselines=baselines,
    )  # fmt: skip


def _forward_with(net: Network, make: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
    for depth, row in enumerate(net.ours):
        for name, layer in row.items():
            yield f"{name}.{depth}", make(net.wide if name == "fc2" else net.x, net.factors(name, layer, False))


def _block_case(sizes: Sizes, tokens: int, dtype: torch.dtype) -> Case:
    return Case(
        "low_rank", "training", _regime(tokens), _shape(sizes), tokens, 2, dtype,
        make=partial(Network, sizes.width, sizes.depth, (sizes.images, sizes.length), False, dtype, train=True),
        ours=partial(step, apply="ours"), reference=step_reference,
        baselines={name: partial(step, apply=name) for name in ("dense", "eager", "checkpointed")},
        tolerance=1e-4 if dtype == torch.float32 else 1e-1,  # errors of up to 12 blocks add up
    )  # fmt: skip


def _shape(sizes: Sizes) -> str:
    return f"{sizes.depth} x D{sizes.width} R{sizes.width // 4}"


def _regime(tokens: int) -> str:
    return plan.choose(tokens, _backends.implementation(torch.device("cpu")), op="low_rank")
