# SPDX-License-Identifier: Apache-2.0
"""LDR on the demo's data: accuracy against the number of genes, the basis, and the order of training.

The claims: more genes of a polynomial basis in depth give better networks, Chebyshev's is the best basis, genes that
are trained one phase after another serve as "first k" at any depth (NeurIPS 2024, "Linearly Decomposing and Recomposing
Vision Transformers for Diverse-Scale Models").
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from benchmarks.claims.study import Bench, run
from pylearngene.methods import LDR
from pylearngene.networks import auxiliary, extract

GENES = (1, 2, 3, 4, 6)
COMPARED_GENES = 4
BASES = ("chebyshev", "taylor", "fourier", "legendre")
PHASES = (1, 2, 4)
DEPTHS = (3, 6, 10)


def study(bench: Bench) -> None:
    """LDR: number of genes, basis, phases, first genes at other depths."""
    ancestry, teacher = bench.ancestry()
    for count in GENES:
        if count <= bench.settings.depth:
            _together(bench, ancestry, teacher, LDR(count), "number of genes", "trained together")
    for basis in BASES[1:]:
        _together(bench, ancestry, teacher, LDR(COMPARED_GENES, basis=basis), "basis", basis)
    literal = LDR(COMPARED_GENES, order_offset=1)
    _together(bench, ancestry, teacher, literal, "basis", "chebyshev from T_1 on")
    _phases(bench, ancestry, teacher)


def _together(bench: Bench, ancestry: nn.Module, teacher: Tensor, method: LDR, part: str, arm: str) -> None:
    net = auxiliary(ancestry, method, seed=bench.seed)
    bench.fit(net, part, arm, epochs=bench.settings.epochs, teacher=teacher, genes=method.num_genes)


def _phases(bench: Bench, ancestry: nn.Module, teacher: Tensor) -> None:
    """Train 1, then 2, then 4 genes, the earlier ones frozen; all 4 together for as many epochs; then first k genes."""
    epochs = bench.settings.epochs
    net = auxiliary(ancestry, LDR(PHASES[0]), seed=bench.seed)
    for count in PHASES:
        if count != PHASES[0]:
            LDR.grow(net, count)
        bench.fit(net, "phases", "one phase after another", epochs=epochs, teacher=teacher, genes=count)
    for times, count in enumerate(PHASES, start=1):
        together = auxiliary(ancestry, LDR(count), seed=bench.seed)
        bench.fit(together, "phases", "together, as many epochs", epochs=times * epochs, teacher=teacher, genes=count)
    grown = extract(net)
    for count in PHASES:
        first = grown.first_genes(count)
        for depth in DEPTHS:
            descendant = first.descend(depth=depth, backed=False)
            bench.note(descendant, "first genes", "untouched", count)
            bench.tune(descendant, "first genes", "tuned", count)


if __name__ == "__main__":
    sys.exit(run("ldr", study))
