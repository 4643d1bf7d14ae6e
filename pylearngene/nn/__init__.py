# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers with gene-backed weights, and the bank that owns the genes."""

from pylearngene.nn._layer import ExpansionLayer
from pylearngene.nn._view import WeightView, dense_syntheses
from pylearngene.nn.bank import GeneBank, GeneGroup
from pylearngene.nn.expansion import ExpansionLayerNorm, ExpansionLinear

__all__ = [
    "ExpansionLayer",
    "ExpansionLayerNorm",
    "ExpansionLinear",
    "GeneBank",
    "GeneGroup",
    "WeightView",
    "dense_syntheses",
]
