# SPDX-License-Identifier: Apache-2.0
"""How long a panel of W is: what the caches of a CPU or of a GPU keep. Which calls have panels is not here."""

from __future__ import annotations

import math

PANEL_BYTES = 1 << 20
GPU_PANEL_BYTES = 24 << 20
#: Lines that a panel of more lines is a multiple of on a GPU, so that every window of y begins at 128 bytes.
GPU_LINES = 64


def panel_length(width: int, itemsize: int, limit: int, device: str = "cpu", turns: int = 1) -> int:
    """How many lines of `width` elements one panel holds: at least 1, at most `limit`, all panels of about one size.

    Args:
        width: elements of a line.
        itemsize: bytes of each.
        limit: lines in all.
        device: its type.
        turns: how many panels at least; from 2 on, two of them share the workspace.
    """
    size = GPU_PANEL_BYTES if device == "cuda" else PANEL_BYTES
    most = max(1, min(limit, size // min(turns, 2) // max(1, width * itemsize)))
    length = max(1, math.ceil(limit / max(turns, math.ceil(limit / most)))) if limit else 1
    if device == "cuda" and most >= GPU_LINES < length < limit:
        return min(math.ceil(length / GPU_LINES), most // GPU_LINES) * GPU_LINES
    return length
