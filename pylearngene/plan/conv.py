# SPDX-License-Identifier: Apache-2.0
"""Which regime computes a product of a convolution: `rows`, or `panel` through the vendor's own convolution.

Rules are few: native kernels make patches and form W while they multiply, and are taken where the vendor would be
called for more than one panel, or has no fast convolution of a dtype at the instruction level. They follow measurements
of three sizes at AVX512_BF16; `make plan` does not measure convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pylearngene.plan import panels
from pylearngene.plan.regimes import pinned

#: Positions of the kernel up to which the native kernels form a weight.
CONV_TAPS = 64
#: Channels of the result below which most of a vector would be empty: of y, dx, or for dW of x.
CONV_CHANNELS = 16


def choose_conv(
    weight: Sequence[int],
    product: str,
    backend: str,
    itemsize: int = 4,
    groups: int = 1,
    arch: str | None = None,
    float16: bool = False,
) -> str:
    """The regime of a product with stride 1, or of y or dW with any.

    Args:
        weight: its shape `[O, C/groups, kh, kw]`.
        product: "y", "dx" or "dw".
        backend: who computes, as `choose` takes it.
        itemsize: bytes of an element of the image.
        groups: of the convolution.
        arch: instruction level.
        float16: which of the two kinds of 16 bits.
    """
    if backend != "cpp" or groups != 1 or weight[2] * weight[3] > CONV_TAPS or pinned() == "panel":
        return "panel"
    if pinned() == "rows":
        return "rows"
    if (weight[0] if product == "y" else weight[1]) < CONV_CHANNELS:
        return "panel"
    fast = itemsize == 4 or (itemsize == 2 and not float16 and arch == "AVX512_BF16")
    return "panel" if fast and math.prod(weight) * itemsize <= panels.PANEL_BYTES else "rows"
