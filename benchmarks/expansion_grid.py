# SPDX-License-Identifier: Apache-2.0
"""Which products of networks are measured: every width, number of genes, of tokens and dtype, thinned to minutes.

What the products are is in `expansion_products` and `expansion_gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.cases import Case
from benchmarks.expansion_gradients import dx_case, wgrad_case
from benchmarks.expansion_products import Products, forward_case

FULL = (
    Products("forward", 192, 12, (2,), (1, 4, 16, 64, 256)),
    Products("forward", 192, 12, (12,), (1, 64)),
    Products("forward", 384, 12, (1, 2, 4), (1, 4, 16, 64, 256)),
    Products("forward", 384, 12, (8, 12), (1, 16, 256)),
    Products("forward", 768, 12, (2,), (1, 4, 16, 64, 256)),
    Products("forward", 768, 12, (4,), (1, 64)),
    Products("forward", 192, 1, (2,), (512, 4096)),
    Products("forward", 384, 1, (1, 2, 4), (512, 1024, 4096)),
    Products("forward", 384, 1, (8, 12), (1024,)),
    Products("forward", 768, 1, (2,), (512, 1024, 4096)),
    Products("forward", 768, 1, (4,), (1024,)),
    Products("dx", 384, 12, (2,), (1, 16, 64, 256)),
    Products("dx", 384, 1, (1, 2, 4), (1024, 4096)),
    Products("dx", 768, 1, (2, 4), (1024,)),
    Products("wgrad", 192, 1, (2,), (1024,)),
    Products("wgrad", 384, 1, (2, 4), (1024, 4096)),
    Products("wgrad", 768, 1, (2,), (1024, 4096)),
    Products("wgrad", 768, 1, (4,), (1024,)),
)
TINY = (
    Products("forward", 32, 3, (1, 2), (1, 4, 20)),
    Products("dx", 32, 3, (2,), (1, 20)),
    Products("wgrad", 32, 1, (2, 3), (20,)),
)


def cases(parts: Sequence[Products], dtypes: Sequence[torch.dtype], compiled: bool) -> list[Case]:
    """All products of all parts; M varies fastest, so that weights are made once."""
    make = {"forward": partial(forward_case, compiled=compiled), "dx": dx_case, "wgrad": wgrad_case}
    return [
        make[part.kind](part, genes, tokens, dtype)
        for part in parts
        for dtype in dtypes
        for genes in part.genes
        for tokens in part.tokens
    ]
