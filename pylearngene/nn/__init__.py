# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers with gene-backed weights, and the bank that owns the genes."""

from pylearngene.nn._expansion_group import ExpansionGroup
from pylearngene.nn._group import GeneGroup
from pylearngene.nn._layer import ExpansionLayer, ExpansionModule
from pylearngene.nn._view import WeightView, dense_syntheses
from pylearngene.nn.bank import GeneBank
from pylearngene.nn.expansion import ExpansionLinear
from pylearngene.nn.expansion_attention import ExpansionMultiheadAttention
from pylearngene.nn.expansion_conv import ExpansionConv2d
from pylearngene.nn.expansion_norm import (
    ExpansionGroupNorm,
    ExpansionLayerNorm,
    ExpansionRMSNorm,
    ExpansionScale,
    Scale,
)
from pylearngene.nn.low_rank import LowRankGroup, LowRankLinear

__all__ = [
    "ExpansionConv2d",
    "ExpansionGroup",
    "ExpansionGroupNorm",
    "ExpansionLayer",
    "ExpansionLayerNorm",
    "ExpansionLinear",
    "ExpansionModule",
    "ExpansionMultiheadAttention",
    "ExpansionRMSNorm",
    "ExpansionScale",
    "GeneBank",
    "GeneGroup",
    "LowRankGroup",
    "LowRankLinear",
    "Scale",
    "WeightView",
    "dense_syntheses",
]
