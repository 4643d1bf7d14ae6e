# SPDX-License-Identifier: Apache-2.0
"""The GPU cases of `expansion`: one point of each goal first, then the grid of shapes from the middle outwards.

A primitive adds itself to the suite by a file like this one with `cases(device, tiny)`, named in `speed`. What calls
compute is in `operands`, stacks of layers and host cost are in `stacks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

import pylearngene as plg
from benchmarks.cases import Call, Case
from benchmarks.expansion_inputs import LAYERS
from benchmarks.gpu import operands
from benchmarks.gpu.operands import Named, Operands
from benchmarks.gpu.stacks import MODES, host_case, stack_case

REGIMES = ("rows", "fused", "panel")
MOST_ROWS, MOST_FUSED = 64, 16384  # tokens up to which a regime is pinned


@dataclass(frozen=True)
class Sizes:
    """What is measured; every tuple in the order of its value.

    Attributes:
        goal: (D, layer) of the first points.
        large, middle: M of the first points of products; `middle` also against torch.compile.
        wgrad: (M, K) of the first points of gene gradients.
        stack: (D, L) of stacks.
        stack_points: (M, K) of stacks, and how many of them come first.
        widths, layers, genes, tokens: the grid; ranks of a point add up to its place.
        host: I = O of the layer whose host cost is measured, and repeats of its call.
    """

    goal: tuple[int, str] = (1024, "fc1")
    large: tuple[int, ...] = (16384, 4096)
    middle: tuple[int, ...] = (512, 2048)
    wgrad: tuple[tuple[int, int], ...] = ((25216, 4), (4096, 2))
    stack: tuple[int, int] = (768, 12)
    stack_points: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (16, 1), (16, 2), (4, 2), (64, 2), (64, 1), (1, 4))
    first_stacks: int = 4
    widths: tuple[int, ...] = (768, 4096, 1024, 384, 2048)
    layers: tuple[str, ...] = ("fc1", "proj", "qkv", "fc2")
    genes: tuple[int, ...] = (2, 4, 8)
    tokens: tuple[int, ...] = (16384, 4096, 512, 2048, 64, 1, 16, 25216)
    host: tuple[int, int] = (64, 100)


FULL = Sizes()
TINY = Sizes(
    goal=(32, "fc1"), large=(24,), middle=(12,), wgrad=((40, 4), (12, 2)), stack=(32, 2),
    stack_points=((1, 1), (4, 2)), first_stacks=1, widths=(32,), layers=("proj",), genes=(2,), tokens=(20, 1),
    host=(16, 3),
)  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> list[Case]:
    """All cases, the most valuable first, without repetitions."""
    sizes = TINY if tiny else FULL
    found: dict[str, Case] = {}
    for case in _all(sizes, device):
        found.setdefault(case.name, case)  # the first points have more baselines than the grid's
    return list(found.values())


def _all(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    dim, layer = sizes.goal
    shape = _shape(dim, layer)
    for tokens, genes, kind in product(sizes.large, (2, 4), ("forward", "dx")):
        yield _product(kind, shape, tokens, genes, device)
    yield from (_gradients(shape, tokens, genes, device) for tokens, genes in sizes.wgrad)
    yield from (_synthesis(shape, genes, device) for genes in (2, 4))
    stacks = [stack_case(*sizes.stack, genes, m, device, _pinned) for m, genes in sizes.stack_points]
    yield from stacks[: sizes.first_stacks]
    yield from (host_case(*_host(sizes, mode), device) for mode in MODES)
    for tokens, genes, kind in product(sizes.middle, (2, 4), ("forward", "dx")):
        yield _product(kind, shape, tokens, genes, device, compiled=True)
    yield from stacks[sizes.first_stacks :]
    yield from (_training(shape, tokens, genes, device) for tokens, genes in product(sizes.large, (2, 4)))
    yield from _grid(sizes, device)


def _host(sizes: Sizes, mode: str) -> tuple[int, str, int]:
    return sizes.host[0], mode, sizes.host[1]


def _grid(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Points whose ranks sum to little come first: the usual width at all M, then other widths at the usual M."""
    kinds = ("forward", "dx", "wgrad")
    axes = (sizes.widths, sizes.layers, sizes.genes, sizes.tokens, kinds)
    points = sorted(product(*(range(len(axis)) for axis in axes)), key=lambda p: 2 * p[0] + p[1] + 2 * p[2] + p[3])
    for point in points:
        dim, layer, genes, tokens, kind = (axis[place] for axis, place in zip(axes, point, strict=True))
        shape = _shape(int(dim), str(layer))
        if kind == "wgrad":
            yield _gradients(shape, int(tokens), int(genes), device)
        else:
            yield _product(str(kind), shape, int(tokens), int(genes), device)
    yield from (_synthesis(_shape(d, name), k, device) for d, name, k in product(sizes.widths, ("fc1",), sizes.genes))


def _shape(dim: int, layer: str) -> tuple[int, int]:
    out, inner = LAYERS[layer]
    return out * dim, inner * dim


def _pinned(regime: str, call: Call) -> Call:
    """The call in one regime, whatever the plan says."""

    def run(inputs: Any) -> Named:
        plg.set_regime(regime)
        try:
            yield from call(inputs)
        finally:
            plg.set_regime("auto")

    return run


def _product(
    kind: str, shape: tuple[int, int], tokens: int, genes: int, device: torch.device, compiled: bool = False
) -> Case:
    calls = {
        "forward": (operands.forward, operands.forward_dense, operands.forward_eager, operands.forward_by_hand),
        "dx": (operands.dx, operands.dx_dense, operands.dx_eager, operands.dx_by_hand),
    }
    ours, dense, eager, by_hand = calls[kind]
    limits = {"rows": MOST_ROWS, "fused": MOST_FUSED}
    regimes = [regime for regime in REGIMES if tokens <= limits.get(regime, tokens)]
    out, inner = shape
    return _case(
        kind, shape, tokens, genes, device, ours,
        {
            "dense": dense, "eager": eager, "hand panel": by_hand,
            **({"compiled": operands.compiled(kind)} if compiled else {}),
            **{f"ours, {regime}": _pinned(regime, ours) for regime in regimes},
        },
        moved=2 * (tokens * (out + inner) + genes * out * inner),
    )  # fmt: skip


def _gradients(shape: tuple[int, int], tokens: int, genes: int, device: torch.device) -> Case:
    out, inner = shape
    return _case(
        "wgrad", shape, tokens, genes, device, operands.wgrad,
        {"dense": operands.wgrad_dense, "eager": operands.wgrad_eager},
        moved=2 * tokens * (out + inner) + 10 * genes * out * inner, gradients=True,
    )  # fmt: skip


def _training(shape: tuple[int, int], tokens: int, genes: int, device: torch.device) -> Case:
    out, inner = shape
    return _case(
        "training", shape, tokens, genes, device, operands.step,
        {
            "dense": operands.step_dense, "eager": operands.step_eager, "checkpointed": operands.step_checkpointed,
            "compiled": operands.compiled("training"),
        },
        moved=4 * tokens * (out + inner) + 14 * genes * out * inner, train=True,
    )  # fmt: skip


def _synthesis(shape: tuple[int, int], genes: int, device: torch.device) -> Case:
    return _case(
        "synthesis", shape, 0, genes, device, operands.synthesis, {"eager": operands.synthesis_eager},
        moved=2 * (genes + 1) * shape[0] * shape[1],
    )  # fmt: skip


def _case(
    kind: str, shape: tuple[int, int], tokens: int, genes: int, device: torch.device,
    ours: Call, baselines: dict[str, Call], moved: int, **options: bool,
) -> Case:  # fmt: skip
    return Case(
        "expansion", kind, "auto", f"{shape[0]} x {shape[1]}", tokens, genes, torch.bfloat16,
        make=partial(Operands, shape, tokens, genes, torch.bfloat16, device, **options),
        ours=ours, reference=partial(operands.reference, kind=kind), baselines=baselines,
        moved=moved, weights=shape[0] * shape[1],
    )  # fmt: skip
