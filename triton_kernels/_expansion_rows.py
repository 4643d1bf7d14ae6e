# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels of `expansion` that form W, per chip and bucket.

Every row is compiled offline for its chips. Values only: the choice among rows is in `_table`.
"""

from __future__ import annotations

from pylearngene.triton_kernels._row import ASYNCHRONOUS, CHIPS, INTERPRETER, SYNCHRONOUS, Row

# Tiles of `fused` are out x tokens x inner, of `synthesize` rows x columns, of `finish` out x tokens.
# Few tokens: genes come straight into registers, marked to stay in L2; other programs work while they are on the way.
# Both tiles of tokens have one size of the others, so that a split does not depend on the tokens.
_FEW = (
    Row("fused", CHIPS, (64, 16, 64), 4, 1, up_to=16, weight_bytes=8, programs=3, stay=True, registers=255),
    Row("fused", CHIPS, (64, 16, 32), 4, 1, up_to=16, weight_bytes=32, programs=3, stay=True, registers=255),
    Row("fused", CHIPS, (64, 64, 64), 4, 1, up_to=64, weight_bytes=8, programs=3, stay=True, registers=255),
    Row("fused", CHIPS, (64, 64, 32), 4, 1, up_to=64, weight_bytes=32, programs=3, stay=True, registers=255),
)
_MANY = (
    Row("fused", ASYNCHRONOUS, (128, 256, 64), 8, 2, above=256, weight_bytes=8, activations=False, persistent=True),
    Row("fused", ASYNCHRONOUS, (128, 128, 64), 8, 2, weight_bytes=8, persistent=True),
    Row("fused", ASYNCHRONOUS, (128, 256, 32), 8, 2, above=256, weight_bytes=16, activations=False, persistent=True),
    Row("fused", ASYNCHRONOUS, (128, 128, 32), 8, 2, weight_bytes=32, persistent=True),
    Row("fused", ("sm_80", "sm_120"), (128, 128, 32), 8, 3, weight_bytes=8, persistent=True, registers=255),
    Row("fused", SYNCHRONOUS, (128, 128, 32), 8, 2, weight_bytes=16, persistent=True, registers=255),
    Row("fused", SYNCHRONOUS, (128, 128, 16), 8, 2, weight_bytes=32, persistent=True, registers=255),
)
_ANY = (
    Row("fused", CHIPS, (64, 16, 16), 8, 1, weight_bytes=32, programs=2, registers=255, irregular=True),
    Row("synthesize", ("sm_80",), (16, 128), 4, 1, weight_bytes=64),
    Row("synthesize", ("sm_89", "sm_90", "sm_100", "sm_120"), (32, 128), 4, 1, weight_bytes=64),
    Row("synthesize", CHIPS, (4, 128), 4, 1, registers=255, irregular=True),
    Row("finish", CHIPS, (128, 4), 4, 1, irregular=True),
)
# Worth measuring, taken by no call of itself: pipelined loads for few tokens, one program per tile, narrower tiles.
_CANDIDATES = (
    Row("fused", CHIPS, (64, 16, 64), 4, 3, weight_bytes=8, registers=255, candidate=True),
    Row("fused", CHIPS, (64, 64, 64), 4, 2, weight_bytes=8, registers=255, candidate=True),
    Row("fused", ASYNCHRONOUS, (128, 256, 64), 8, 2, weight_bytes=8, activations=False, candidate=True),
    Row("fused", ASYNCHRONOUS, (128, 128, 64), 8, 2, weight_bytes=8, candidate=True),
    Row("fused", ASYNCHRONOUS, (128, 128, 64), 8, 3, weight_bytes=8, persistent=True, candidate=True),
)
_INTERPRETED = (
    Row("fused", (INTERPRETER,), (32, 64, 32), 4, 1, up_to=64, programs=2, stay=True),
    Row("fused", (INTERPRETER,), (32, 64, 32), 4, 1, up_to=64, programs=2, stay=True, irregular=True),
    Row("fused", (INTERPRETER,), (32, 64, 32), 4, 1, persistent=True),
    Row("fused", (INTERPRETER,), (32, 64, 32), 4, 1, persistent=True, irregular=True),
    Row("fused", (INTERPRETER,), (32, 16, 32), 4, 1, candidate=True),
    Row("fused", (INTERPRETER,), (32, 16, 32), 4, 1, irregular=True, candidate=True),
    Row("synthesize", (INTERPRETER,), (32, 128), 4, 1, irregular=True),
    Row("finish", (INTERPRETER,), (32, 4), 4, 1, irregular=True),
)
ROWS = _FEW + _MANY + _ANY + _CANDIDATES + _INTERPRETED
