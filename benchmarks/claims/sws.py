# SPDX-License-Identifier: Apache-2.0
"""SWS on the demo's data: one gene per stage of an auxiliary network, descendants of other depths, against baselines.

The claim: genes shared by the blocks of a stage are good starts for networks of other depths (IJCAI 2024,
arXiv 2404.16897). TLEG with the same auxiliary depth, epochs and loss is the comparison; scratch is the floor.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.claims.study import SCRATCH_START, Bench, run
from pylearngene.cli.demo.arms import pick_layers
from pylearngene.methods import SWS, TLEG
from pylearngene.networks import auxiliary, extract

STAGES = (2, 2, 2, 1, 1)
DEPTHS = (5, 6, 8, 10)


def study(bench: Bench) -> None:
    """SWS with five stages against TLEG, picked layers and scratch."""
    settings = bench.settings
    ancestry, teacher = bench.ancestry()
    deep = pick_layers(ancestry, bench.network(sum(STAGES), SCRATCH_START))
    methods: dict[str, Any] = {"SWS": SWS(STAGES), "TLEG": TLEG()}
    for name, method in methods.items():
        net = auxiliary(deep, method, init="fit")
        bench.fit(net, "auxiliary", name, epochs=settings.epochs, teacher=teacher, genes=method.num_genes)
        lg = extract(net)
        for depth in DEPTHS:
            descendant = lg.descend(depth=depth, backed=False)
            bench.note(descendant, "depths", f"{name}, untouched", method.num_genes)
            bench.tune(descendant, "depths", f"{name}, tuned", method.num_genes)
    for depth in DEPTHS:
        picked = pick_layers(ancestry, bench.network(depth, SCRATCH_START))
        bench.tune(picked, "depths", "ancestry layers, tuned")
        bench.tune(bench.network(depth, SCRATCH_START), "depths", "scratch, equal steps", lr=settings.lr)


if __name__ == "__main__":
    sys.exit(run("sws", study))
