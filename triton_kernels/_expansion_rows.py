# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels of `expansion` that form W, per chip and bucket.

Every row is compiled offline for its chips. Values only: the choice among rows is in `_table`.
"""

from __future__ import annotations

from pylearngene.triton_kernels._row import ASYNCHRONOUS, CHIPS, INTERPRETER, SYNCHRONOUS, Row

# Tiles of `fused` are out x tokens x inner, of `synthesize` rows x columns.
ROWS = (
    Row("fused", CHIPS, (64, 16, 64), 4, 3, up_to=16, weight_bytes=8),
    Row("fused", ("sm_80", "sm_89", "sm_90", "sm_100"), (64, 16, 32), 4, 2, up_to=16, weight_bytes=32),
    Row("fused", ("sm_120",), (64, 16, 16), 4, 2, up_to=16, weight_bytes=32),
    Row("fused", ("sm_80", "sm_89", "sm_90", "sm_120"), (64, 64, 64), 4, 2, up_to=64, weight_bytes=8),
    Row("fused", ("sm_100",), (64, 64, 64), 4, 3, up_to=64, weight_bytes=8),
    Row("fused", CHIPS, (64, 64, 32), 4, 2, up_to=64, weight_bytes=32),
    Row("fused", ASYNCHRONOUS, (128, 256, 64), 8, 2, above=256, weight_bytes=8, activations=False),
    Row("fused", ASYNCHRONOUS, (128, 128, 64), 8, 2, weight_bytes=8),
    Row("fused", ASYNCHRONOUS, (128, 256, 32), 8, 2, above=256, weight_bytes=16, activations=False),
    Row("fused", ASYNCHRONOUS, (128, 128, 32), 8, 2, weight_bytes=32),
    Row("fused", ("sm_80", "sm_120"), (128, 128, 32), 8, 3, weight_bytes=8),
    Row("fused", SYNCHRONOUS, (128, 128, 32), 8, 2, weight_bytes=16),
    Row("fused", SYNCHRONOUS, (128, 128, 16), 8, 2, weight_bytes=32),
    Row("fused", ("sm_80", "sm_89", "sm_90", "sm_120"), (64, 16, 16), 4, 2, weight_bytes=32, irregular=True),
    Row("fused", ("sm_100",), (64, 16, 16), 4, 1, weight_bytes=32, irregular=True),
    Row("synthesize", CHIPS, (32, 128), 4, 1, irregular=True),
    Row("fused", (INTERPRETER,), (32, 64, 32), 4, 1, irregular=True),
    Row("synthesize", (INTERPRETER,), (32, 128), 4, 1, irregular=True),
)
