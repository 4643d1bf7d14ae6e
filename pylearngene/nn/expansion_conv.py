# SPDX-License-Identifier: Apache-2.0
"""`ExpansionConv2d`: a drop-in for `nn.Conv2d` whose weight is a sum of shared genes.

Coefficients and dense views are those of every expansion layer; genes and gradients are the bank's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.functional._expansion_conv import PaddingMode, Pair, check_groups, check_image, padded, pair, settings
from pylearngene.nn._expansion_group import ExpansionGroup
from pylearngene.nn._layer import ExpansionLayer
from pylearngene.nn.bank import GeneBank


class ExpansionConv2d(ExpansionLayer):
    """A convolution whose weight is a sum of genes shared with other layers.

    `y = conv2d(x, W) + b`, `W = sum_k c_k G_k`, `b = sum_k c_k b_k`.

    The `[O, C/groups, kh, kw]` weight is never stored, in neither pass; genes live in the bank, once.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: an int or (height, width).
        stride, padding, dilation, groups, padding_mode: as `nn.Conv2d`.
        bias: whether bias genes are expanded and added.
        device, dtype: of genes that this call creates.
        bank, name, coeffs, learn_coeffs: as `ExpansionLinear`.

    Raises:
        ArgumentError: a size, stride, padding or dilation that is not one, groups that do not divide the channels,
            an unknown padding mode, or as `ExpansionLinear`.
        ShapeError: the group exists with other shapes or another K.

    Numerics, backends and source: as `plg.functional.expansion_conv2d`.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> layer = plg.nn.ExpansionConv2d(3, 8, 3, padding=1, bank=bank, name="conv", coeffs=[1.0, 0.5])
        >>> x = torch.ones(2, 3, 6, 5)
        >>> layer(x).shape, torch.allclose(layer(x), layer.to_dense()(x), atol=1e-6)
        (torch.Size([2, 8, 6, 5]), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        self.in_channels = _checks.positive_int(in_channels, "in_channels")
        self.out_channels = _checks.positive_int(out_channels, "out_channels")
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self._conv, self._sides = settings(self.kernel_size, stride, padding, dilation, groups, padding_mode)
        check_groups(groups, in_channels, out_channels)
        self.stride, self.dilation, self.groups = self._conv.stride, self._conv.dilation, groups
        self.padding = padding if isinstance(padding, str) else pair(padding, "padding", 0)
        self.padding_mode = padding_mode
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        bias_shape = (out_channels,) if bias else None
        bank.add_group(name, ExpansionGroup, len(self._values), shape, bias_shape, device=device, dtype=dtype)
        self._place_coeffs()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x `[B, C, H, W]` -> `[B, O, H', W']`, or both without B."""
        if self._sides is not None:
            _checks.floating(_checks.tensor(x, "x"), "x")
            weight = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
            check_image(x, weight, self._conv, self._sides, self.padding_mode)
            x = padded(x, self._sides, self.padding_mode)
        y: Tensor = self._from_bank(self.name, x, conv=self._conv)
        return y

    def to_dense(self) -> nn.Conv2d:
        """A plain `nn.Conv2d` with the same function."""
        like = self.weight
        plain = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, like.device, like.dtype,
        )  # fmt: skip
        self._fill(plain)
        return plain

    def extra_repr(self) -> str:
        """Sizes, settings that differ from the default, group and coefficients, in one line."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        others = [f"{key}={getattr(self, key)!r}" for key, value in usual.items() if getattr(self, key) != value]
        return ", ".join([sizes, *others, f"bias={self.bias is not None}", self._coeff_repr()])
