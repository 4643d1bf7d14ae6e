# SPDX-License-Identifier: Apache-2.0
"""Which regime computes a product of a convolution: `rows`, or `panel` through the vendor's own convolution.

Thresholds are few: where the native kernels of a CPU can, they were faster at every instruction level and dtype.
"""

from __future__ import annotations

from pylearngene.plan.regimes import pinned

#: Positions of the kernel up to which the native kernels form a weight.
CONV_TAPS = 64
#: Channels of the result below which most of a vector would be empty: of y, dx, or for dW of x.
CONV_CHANNELS = 16


def choose_conv(channels: int, taps: int, backend: str, groups: int = 1) -> str:
    """The regime of a product.

    Args:
        channels: of y, dx, or for gradients of genes of x.
        taps: positions of the kernel.
        backend: who computes, as `choose` takes it.
        groups: of the convolution.
    """
    if backend != "cpp" or groups != 1 or taps > CONV_TAPS or pinned() == "panel":
        return "panel"
    return "rows" if channels >= CONV_CHANNELS or pinned() == "rows" else "panel"
