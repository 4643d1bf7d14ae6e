# SPDX-License-Identifier: Apache-2.0
"""Forward passes of networks: L layers x (qkv, proj, fc1, fc2) one after another; and what all products take.

Genes are shared by all layers of a pass, every dense layer has a weight of its own, and all calls work on one set of
inputs, so that genes stay in the caches and dense weights stream as they do in a network. "ours" is the layer, "kernel"
the native call, or where it does not take so many tokens the operator below the layers. Which sizes is in
`expansion_grid`, the products of the backward pass are in `expansion_gradients`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import expansion_inputs
from benchmarks.cases import Call, Case
from benchmarks.expansion_inputs import LAYERS, Network, double, materialized
from benchmarks.timing import AGAIN
from pylearngene import _backends
from pylearngene._ops import expansion_direct, expansion_regimes

Steps = Sequence[tuple[str, Callable[[Tensor], Tensor], Tensor]]


@dataclass(frozen=True)
class Products:
    """A part of the grid: every K with every M.

    Attributes:
        kind: "forward", "dx" or "wgrad".
        dim: D.
        depth: L.
        genes: every K.
        tokens: every M.
    """

    kind: str
    dim: int
    depth: int
    genes: tuple[int, ...]
    tokens: tuple[int, ...]


# D, L, K, M of the forward passes that are also compared with coefficients times stacked genes, and with torch.compile
STACKED = (
    *((384, 12, genes, tokens) for genes in (2, 4) for tokens in (1, 4, 16)),
    *((384, 12, 2, tokens) for tokens in (64, 256)),
    (768, 12, 2, 1),
    (32, 3, 2, 4),
)
FEW = 16
COMPILED = ((384, 12, 2, 1), (384, 12, 2, 256), (32, 3, 2, 4))


@lru_cache(maxsize=1)
def _network(dim: int, depth: int, genes: int, dtype: torch.dtype) -> Network:
    return Network(dim, depth, genes, (1,), dtype, train=False)


class Inputs:
    """A network and what its products take: x for every width of a layer, dy likewise, accumulators of gradients.

    Args:
        dim, depth, genes, dtype: as `Network`.
        tokens: M.
    """

    def __init__(self, dim: int, depth: int, genes: int, tokens: int, dtype: torch.dtype) -> None:
        self.net = copy.copy(_network(dim, depth, genes, dtype))
        generator = torch.Generator().manual_seed(1)
        wide = {size: torch.randn(tokens, size * dim, generator=generator).to(dtype) for size in (1, 3, 4)}
        self.x = {name: wide[inner] for name, (_, inner) in LAYERS.items()}
        self.dy = {name: wide[outer] for name, (outer, _) in LAYERS.items()}
        self.coeffs = [torch.tensor(numbers) for numbers in self.net.coeffs]
        self.steps: dict[object, Steps] = {}
        self.stacks: dict[str, tuple[Tensor, Tensor]] = {}

    def stack(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight genes `[K, O * I]` and bias genes `[K, O]` of a layer, in one tensor each."""
        if name not in self.stacks:
            genes, biases = self.net.genes[name]
            self.stacks[name] = torch.stack(genes).flatten(1), torch.stack(biases)
        return self.stacks[name]

    def over(self, key: object, step: Callable[[str, int], Callable[[Tensor], Tensor]], inputs: str = "x") -> Steps:
        """What a call does layer by layer, made once: names, functions and their inputs."""
        if key not in self.steps:
            given: dict[str, Tensor] = getattr(self, inputs)
            self.steps[key] = [
                (f"{name}.{depth}", step(name, depth), given[name])
                for depth in range(len(self.net.coeffs))
                for name in LAYERS
            ]
        return self.steps[key]


def regime(product: str, dim: int, tokens: int, genes: int, dtype: torch.dtype) -> str:
    """Which regime a product with qkv's weight takes here: of "y", "dx" or "dw"."""
    x, gene = torch.empty(tokens, dim, dtype=dtype), torch.empty(3 * dim, dim, dtype=dtype)
    return expansion_regimes.regime_of(x, [gene] * genes, product)


def run(steps: Steps) -> Iterator[tuple[str, Tensor]]:
    for name, function, x in steps:
        yield name, function(x)


def _layers(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    return run(inputs.over("layers", lambda name, depth: inputs.net.ours[depth][name]))


def _dense(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        layer = inputs.net.dense[depth][name]
        weight, bias = layer.weight, layer.bias
        return lambda x: F.linear(x, weight, bias)

    return run(inputs.over("dense", step))


def _kernel(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The native call on tensors, or the operator where it refuses."""
    native = _backends.native()
    calls = None if native is None else expansion_direct._calls_of(native)
    threads = torch.get_num_threads()

    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        genes, biases = inputs.net.genes[name]
        coeffs, x = inputs.coeffs[depth], inputs.x[name]
        few = len(x) if expansion_regimes.regime_of(x, genes) == "rows" else 0
        given = (genes, coeffs, None, biases)
        if calls is None or calls.forward(_backends.LEVEL, threads, few, x, *given) is None:
            return lambda x: expansion_regimes.forward(x, *given)
        return lambda x: calls.forward(_backends.LEVEL, threads, few, x, *given)

    return run(inputs.over("kernel", step))


def _made(inputs: Inputs, apply: Callable[..., Tensor]) -> Iterator[tuple[str, Tensor]]:
    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        genes, biases = inputs.net.genes[name]
        coeffs = inputs.net.coeffs[depth]
        return lambda x: apply(x, genes, biases, coeffs)

    return run(inputs.over(apply, step))


def _stacked(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The other way to make a weight eagerly: coefficients times genes that lie in one tensor."""

    def step(name: str, depth: int) -> Callable[[Tensor], Tensor]:
        genes, biases = inputs.stack(name)
        coeffs, shape = inputs.coeffs[depth].to(genes.dtype), inputs.net.genes[name][0][0].shape
        return lambda x: F.linear(x, (coeffs @ genes).view(shape), coeffs @ biases)

    return run(inputs.over("stacked", step))


def sample(inputs: Inputs) -> Iterator[tuple[int, tuple[float, ...]]]:
    """The first, the middle and the last layer: index and coefficients."""
    for depth in sorted({0, len(inputs.net.coeffs) // 2, len(inputs.net.coeffs) - 1}):
        yield depth, inputs.net.coeffs[depth]


def _forward_reference(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    for name, (genes, biases) in inputs.net.genes.items():
        x, wide, bias = inputs.x[name].double(), double(genes), double(biases)
        for depth, coeffs in sample(inputs):
            yield f"{name}.{depth}", materialized(x, wide, bias, coeffs)


def between(part: Products, tokens: int) -> str:
    """Networks on a few tokens, where the first layer's genes would be found in the caches or not: never, then."""
    return "dense" if part.depth > 1 and tokens <= FEW else ""


def forward_case(part: Products, genes: int, tokens: int, dtype: torch.dtype, compiled: bool) -> Case:
    eager = partial(_made, apply=materialized)
    repeated: dict[str, Call] = {AGAIN: _layers, f"kernel {AGAIN}": _kernel, f"eager {AGAIN}": eager}
    more = repeated if between(part, tokens) else {}
    if (part.dim, part.depth, genes, tokens) in STACKED:
        more["stacked"] = _stacked
    if compiled and dtype == torch.float32 and (part.dim, part.depth, genes, tokens) in COMPILED:
        more["compiled"] = partial(_made, apply=expansion_inputs.compiled())
    return Case(
        "expansion", "forward", regime("y", part.dim, tokens, genes, dtype), f"{part.depth} x D{part.dim}", tokens,
        genes, dtype, make=partial(Inputs, part.dim, part.depth, genes, tokens, dtype), ours=_layers,
        reference=_forward_reference,
        baselines={"kernel": _kernel, "dense": _dense, "eager": eager, **more},
        one_set=True, sampled=True, between=between(part, tokens),
    )  # fmt: skip
