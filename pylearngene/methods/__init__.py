# SPDX-License-Identifier: Apache-2.0
"""The methods: each a frozen description of how genes make the weights of a network, one file per paper.

Importing this package registers them, so that learngenes that name them can be read. What can be done with a method
is in `pylearngene.networks`.
"""

from __future__ import annotations

from pylearngene.methods._base import ExpansionMethod
from pylearngene.methods.expansion import Expansion
from pylearngene.methods.ldr import LDR
from pylearngene.methods.share_init import ShareInit
from pylearngene.methods.sws import SWS
from pylearngene.methods.tleg import TLEG

__all__ = ["LDR", "SWS", "TLEG", "Expansion", "ExpansionMethod", "ShareInit"]
