# SPDX-License-Identifier: Apache-2.0
"""TLEG: every weight is an affine function of the block's position, so two genes serve any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pylearngene.learngene import register_method
from pylearngene.methods.expansion import FixedExpansion


@dataclass(frozen=True)
class TLEG(FixedExpansion):
    """Two genes per weight, a base B and a slope A: `W[l] = B + (l / L) A`, `l` from 0, `L` the network's own depth.

    Linear weights, biases, and the gains and biases of layer norms all expand. Start: linear weights of both genes
    truncated normal of standard deviation .02, biases 0; layer norms with gain 1 in B and 0 in A.

    Source:
        Transformer as Linear Expansion of Learngene, AAAI 2024, arXiv 2312.05614.

    Example:
        >>> TLEG().coefficients(4)
        [[1.0, 0.0], [1.0, 0.25], [1.0, 0.5], [1.0, 0.75]]
    """

    name: ClassVar[str] = "tleg"

    @staticmethod
    def row(index: int, depth: int, /) -> tuple[float, float]:
        """Return (1, l / L): divided by the depth, not by one less, so that the last block has (L - 1) / L."""
        return 1.0, index / depth


register_method(TLEG.name, TLEG.from_config)
