# SPDX-License-Identifier: Apache-2.0
"""Share-init: one gene per weight, used by every block as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pylearngene.learngene import register_method
from pylearngene.methods.expansion import FixedExpansion


@dataclass(frozen=True)
class ShareInit(FixedExpansion):
    """One gene per weight: `W[l] = G`. Equals TLEG with a slope of 0; descendants of any depth start from one block.

    Source:
        The weight-sharing baseline of the learngene papers, after ALBERT (ICLR 2020, arXiv 1909.11942, section 3.1).

    Example:
        >>> ShareInit().coefficients(3)
        [[1.0], [1.0], [1.0]]
    """

    name: ClassVar[str] = "share_init"

    @staticmethod
    def row(_index: int, _depth: int, /) -> tuple[float]:
        """Return the one coefficient, 1, of every block."""
        return (1.0,)


register_method(ShareInit.name, ShareInit.from_config)
