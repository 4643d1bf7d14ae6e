# SPDX-License-Identifier: Apache-2.0
"""The public functions, one pair per primitive: the weight itself, and the layer that never builds it."""

from pylearngene.functional.expansion import expansion_conv2d, expansion_linear, expansion_weight
from pylearngene.functional.low_rank import low_rank_linear, low_rank_weight

__all__ = ["expansion_conv2d", "expansion_linear", "expansion_weight", "low_rank_linear", "low_rank_weight"]
