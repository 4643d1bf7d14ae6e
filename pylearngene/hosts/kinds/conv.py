# SPDX-License-Identifier: Apache-2.0
"""The kind `conv2d`: PyTorch's own convolution of images, with any kernel, stride, padding, dilation and groups.

Transposed, one-dimensional and three-dimensional convolutions are not here, nor subclasses that compute otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pylearngene.hosts.kinds._base import LayerKind
from pylearngene.nn import ExpansionConv2d, ExpansionLayer


class Conv2d(LayerKind):
    """`nn.Conv2d`."""

    name: ClassVar[str] = "conv2d"
    plain: ClassVar[str] = "nn.Conv2d"
    products: ClassVar[bool] = True
    regime: ClassVar[str | None] = "panel"

    def holds(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Conv2d)

    def refusal(self, module: nn.Module, where: str, /) -> str | None:
        """Refuse a subclass with another forward (standardized weights, padding of its own)."""
        kind = type(module)
        assert issubclass(kind, nn.Conv2d)
        if kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward:
            return None
        return (
            f"expected '{where}' to compute what nn.Conv2d computes, but its class "
            f"{kind.__module__}.{kind.__qualname__} overrides `forward`"
        )

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionLayer:
        """As `ExpansionConv2d`."""
        assert isinstance(plain, nn.Conv2d)
        sizes = (plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding)
        bias = plain.bias is not None
        return ExpansionConv2d(*sizes, plain.dilation, plain.groups, bias, plain.padding_mode, **options)
