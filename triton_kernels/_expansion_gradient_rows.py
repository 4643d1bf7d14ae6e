# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels of `expansion` that add to gradients, per chip and bucket.

Every row is compiled offline for its chips. Values only: the choice among rows is in `_table`.
"""

from __future__ import annotations

from pylearngene.triton_kernels._row import ASYNCHRONOUS, CHIPS, INTERPRETER, SYNCHRONOUS, Row

# Tiles of `gene_gradients` are out x inner x tokens, of `accumulate` rows x columns.
ROWS = (
    Row("gene_gradients", CHIPS, (64, 64, 64), 4, 2, up_to=1 << 18, weight_bytes=32, programs=2),
    Row("gene_gradients", ASYNCHRONOUS, (128, 128, 64), 8, 3, weight_bytes=32),
    Row("gene_gradients", SYNCHRONOUS, (128, 128, 32), 8, 3, weight_bytes=32),
    Row("gene_gradients", ("sm_80", "sm_90", "sm_100", "sm_120"), (64, 64, 32), 8, 2, weight_bytes=32, irregular=True),
    Row("gene_gradients", ("sm_89",), (32, 64, 32), 8, 2, weight_bytes=32, irregular=True),
    # Worth measuring: two programs beside each other, of which one adds while the other multiplies.
    Row("gene_gradients", ASYNCHRONOUS, (64, 128, 64), 4, 3, weight_bytes=32, programs=2, candidate=True),
    Row("gene_gradients", SYNCHRONOUS, (64, 128, 32), 8, 3, weight_bytes=32, programs=2, candidate=True),
    Row("accumulate", CHIPS, (32, 128), 4, 1),
    Row("accumulate", CHIPS, (4, 128), 4, 1, irregular=True),
    Row("gene_gradients", (INTERPRETER,), (32, 64, 32), 4, 1, irregular=True),
    Row("accumulate", (INTERPRETER,), (32, 128), 4, 1, irregular=True),
)
