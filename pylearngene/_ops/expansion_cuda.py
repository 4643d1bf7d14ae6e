# SPDX-License-Identifier: Apache-2.0
"""The products of `expansion` for a few tokens by the C++ module for CUDA; none is taken yet.

What is not taken is computed in another way by `expansion_regimes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def rows_forward(
    y: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
) -> bool:
    """`y = x W^T + b`, or False where it is not taken."""
    return False
