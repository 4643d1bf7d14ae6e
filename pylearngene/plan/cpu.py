# SPDX-License-Identifier: Apache-2.0
"""What a CPU is known to do: up to how many tokens `rows` is faster than `panel`, by instruction level.

It leaves out who asks, and how anything is computed.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

#: Genes from which weights of several layers are synthesized together with the native CPU kernels: measured.
STACK_FROM = 4


class Rows(NamedTuple):
    """Rows of x up to which `rows` is faster than `panel` on a CPU.

    Attributes:
        y: in the forward pass.
        dx: for the gradient of x.
        dw: for the gradients of the genes.
    """

    y: int
    dx: int
    dw: int


_ALWAYS = Rows(sys.maxsize, sys.maxsize, sys.maxsize)
_FEW = Rows(16, 16, 16)
#: By instruction level, for elements of 32 and more bits, bfloat16 and float16: measured, but for 16 bits at DEFAULT. A
#: processor without instructions for bfloat16 has no fast products of it either; none has fast ones of float16.
ROWS_UP_TO = {
    "DEFAULT": (_FEW, _FEW, _FEW),
    "AVX2": (Rows(16, 16, 32), _ALWAYS, _ALWAYS),
    "AVX512": (_ALWAYS, _ALWAYS, _ALWAYS),
    "AVX512_BF16": (_ALWAYS, Rows(32, 4, 128), _ALWAYS),
}
USUAL_LEVEL = "AVX512"


def rows_up_to(level: str, itemsize: int, float16: bool = False) -> Rows:
    """The most rows of x for which the native CPU kernels keep W in registers or L1."""
    wide, bfloat16, half = ROWS_UP_TO.get(level, ROWS_UP_TO[USUAL_LEVEL])
    return wide if itemsize != 2 else half if float16 else bfloat16
