# SPDX-License-Identifier: Apache-2.0
"""How much memory one training step of any model takes, found without allocating or computing.

Peaks that were really reached are measured by `pylearngene.training.memory`.
"""

from pylearngene.memory.account import MemoryEstimate
from pylearngene.memory.estimate import estimate_memory

__all__ = ["MemoryEstimate", "estimate_memory"]
