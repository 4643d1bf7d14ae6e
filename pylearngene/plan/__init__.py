# SPDX-License-Identifier: Apache-2.0
"""The plan: which regime computes a call, from shapes alone, what that is modelled to cost, and how long panels are.

Regimes are in `regimes`, their reasons in `reasons`, those of convolutions in `conv`, what is known of
processors in `cpu`, `cpu_rows` and `gpu`, panels in `panels`; nothing computes here.
"""

from pylearngene.plan.conv import CONV_CHANNELS, CONV_TAPS, choose_conv
from pylearngene.plan.cpu import STACK_FROM
from pylearngene.plan.cpu_rows import ROWS_UP_TO
from pylearngene.plan.gpu import (
    CHIPS,
    CUDA_ROWS_UP_TO,
    FUSED_AT_MOST,
    FUSED_GENES,
    MOST_TURNS,
    TURN_BYTES,
    USUAL_CHIP,
    adding,
    chip_of,
    costs,
    turns,
)
from pylearngene.plan.panels import GPU_LINES, GPU_PANEL_BYTES, PANEL_BYTES, panel_length
from pylearngene.plan.reasons import explain, measure
from pylearngene.plan.regimes import (
    FACTORED,
    REGIMES,
    choose,
    choose_stack,
    most_rows,
    pinned,
    set_regime,
)

__all__ = [
    "CHIPS",
    "CONV_CHANNELS",
    "CONV_TAPS",
    "CUDA_ROWS_UP_TO",
    "FACTORED",
    "FUSED_AT_MOST",
    "FUSED_GENES",
    "GPU_LINES",
    "GPU_PANEL_BYTES",
    "MOST_TURNS",
    "PANEL_BYTES",
    "REGIMES",
    "ROWS_UP_TO",
    "STACK_FROM",
    "TURN_BYTES",
    "USUAL_CHIP",
    "adding",
    "chip_of",
    "choose",
    "choose_conv",
    "choose_stack",
    "costs",
    "explain",
    "measure",
    "most_rows",
    "panel_length",
    "pinned",
    "set_regime",
    "turns",
]
