# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers whose vectors are sums of shared genes: RMS norms, group norms, and scales of channels.

`ExpansionLayerNorm` is in `expansion.py`. Vectors are expanded whole: they are no full weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.errors import ArgumentError
from pylearngene.nn._expansion_group import ExpansionGroup
from pylearngene.nn._layer import ExpansionVectors, normalized_size, size
from pylearngene.nn.bank import GeneBank


class Scale(nn.Module):
    """Multiply every channel by a number of its own: `y = x * weight`, as LayerScale does.

    Args:
        features: N.
        device, dtype: of the weight.

    Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, section 2.

    Example:
        >>> import torch
        >>> Scale(3)(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x `[*, N]` -> `[*, N]`."""
        return x * self.weight


class ExpansionRMSNorm(ExpansionVectors):
    """An RMSNorm whose gain is a sum of genes shared with other layers.

    `y = x / sqrt(mean(x^2) + eps) * g`, `g = sum_k c_k g_k`.

    Args:
        normalized_shape: N, or a list with that one size.
        eps: added to the mean square; None is the smallest step of x's dtype, as in `nn.RMSNorm`.
        elementwise_affine: must be True; a norm without gain has nothing to expand.
        device, dtype: of genes that this call creates.
        bank, name, coeffs, learn_coeffs: as `ExpansionLinear`.
        gain_last: normalize in float32, whatever x's dtype, and round to it before the gain multiplies, as Llama does;
            `nn.RMSNorm` rounds once, after the gain.

    Raises:
        ArgumentError: more than one normalized axis, no affine part, or as `ExpansionLinear`.
        ShapeError: the group exists with other shapes or another K, or x is not [*, N].
        DTypeError: x is not floating, or float64 is mixed with another dtype.
        DeviceError: x is not where the genes are.

    Numerics: the gain is a float32 chain rounded once to the genes' dtype, then `F.rms_norm`.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, eq. 4; its expansion is ours.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> norm = plg.nn.ExpansionRMSNorm(4, bank=bank, name="norm", coeffs=[1.0, 0.5])
        >>> norm(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
        gain_last: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        sizes = self.normalized_shape = (normalized_size(normalized_shape, elementwise_affine),)
        self.eps = eps
        self.elementwise_affine = True
        self.gain_last = gain_last
        bank.add_group(name, ExpansionGroup, len(self._values), sizes, None, device=device, dtype=dtype)
        self._place_coeffs()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: x `[*, N]` -> `[*, N]`."""
        gain, _ = self._expanded(x, self.normalized_shape[0], -1)
        return rms_norm_gain_last(x, gain, self.eps) if self.gain_last else F.rms_norm(x, gain.shape, gain, self.eps)

    def to_dense(self) -> nn.RMSNorm:
        """A plain `nn.RMSNorm` with the same function; `gain_last` is lost, which shows in 16 bits only."""
        like = self.first_gene
        plain = nn.RMSNorm(self.normalized_shape, self.eps, device=like.device, dtype=like.dtype)
        self._fill(plain)
        return plain

    def extra_repr(self) -> str:
        """Sizes, group and coefficients, in one line."""
        return f"{self.normalized_shape[0]}, eps={self.eps}, {self._coeff_repr()}"


class ExpansionGroupNorm(ExpansionVectors):
    """A GroupNorm whose gain and bias are sums of genes shared with other layers.

    `y = (x - mean) / sqrt(var + eps) * g + b` with mean and variance per sample and group of channels,
    `g = sum_k c_k g_k`, `b = sum_k c_k b_k`.

    Args:
        num_groups: groups of channels.
        num_channels: C, a multiple of `num_groups`.
        eps: added to the variance.
        affine: must be True; a norm without gain has nothing to expand.
        device, dtype: of genes that this call creates.
        bank, name, coeffs, learn_coeffs: as `ExpansionLinear`.

    Raises:
        ArgumentError: channels that do not divide into groups, no affine part, or as `ExpansionLinear`.
        ShapeError: the group exists with other shapes or another K, or x is not [B, C, *].
        DTypeError: x is not floating, or float64 is mixed with another dtype.
        DeviceError: x is not where the genes are.

    Numerics: gain and bias are float32 chains rounded once to the genes' dtype, then `F.group_norm`.

    Source: Wu and He, "Group Normalization", ECCV 2018, eq. 1 and 7; its expansion is ours.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> norm = plg.nn.ExpansionGroupNorm(2, 4, bank=bank, name="norm", coeffs=[1.0, 0.5])
        >>> norm(torch.ones(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        self.num_groups = _checks.positive_int(num_groups, "num_groups")
        self.num_channels = size(num_channels, "num_channels")
        if num_channels % num_groups:
            raise ArgumentError(f"num_channels: expected a multiple of num_groups = {num_groups}, got {num_channels}")
        if not affine:
            raise ArgumentError("affine: expected True (there is nothing to expand otherwise), got False")
        self.eps = eps
        self.affine = True
        sizes = (num_channels,)
        bank.add_group(name, ExpansionGroup, len(self._values), sizes, sizes, device=device, dtype=dtype)
        self._place_coeffs()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: x `[B, C, *]` -> `[B, C, *]`."""
        gain, bias = self._expanded(x, self.num_channels, 1)
        return F.group_norm(x, self.num_groups, gain, bias, self.eps)

    def to_dense(self) -> nn.GroupNorm:
        """A plain `nn.GroupNorm` with the same function."""
        like = self.first_gene
        plain = nn.GroupNorm(self.num_groups, self.num_channels, self.eps, device=like.device, dtype=like.dtype)
        self._fill(plain)
        return plain

    def extra_repr(self) -> str:
        """Sizes, group and coefficients, in one line."""
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, {self._coeff_repr()}"


class ExpansionScale(ExpansionVectors):
    """A scale per channel (LayerScale) that is a sum of genes shared with other layers.

    `y = x * s`, `s = sum_k c_k s_k`.

    Args:
        features: N.
        device, dtype: of genes that this call creates.
        bank, name, coeffs, learn_coeffs: as `ExpansionLinear`.

    Raises:
        ArgumentError: as `ExpansionLinear`.
        ShapeError: the group exists with another size or another K, or x is not [*, N].
        DTypeError: x is not floating, or float64 is mixed with another dtype.
        DeviceError: x is not where the genes are.

    Numerics: the scale is a float32 chain rounded once to the genes' dtype, then one product.

    Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, section 2; its expansion is ours.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> scale = plg.nn.ExpansionScale(4, bank=bank, name="ls1", coeffs=[1.0, 0.5])
        >>> scale(torch.ones(2, 4)).tolist()[0]
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        self.features = size(features, "features")
        bank.add_group(name, ExpansionGroup, len(self._values), (features,), None, device=device, dtype=dtype)
        self._place_coeffs()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x `[*, N]` -> `[*, N]`."""
        return x * self._expanded(x, self.features, -1)[0]

    def to_dense(self) -> Scale:
        """A plain `Scale` with the same function."""
        like = self.first_gene
        plain = Scale(self.features, like.device, like.dtype)
        self._fill(plain)
        return plain

    def extra_repr(self) -> str:
        """Size, group and coefficients, in one line."""
        return f"{self.features}, {self._coeff_repr()}"


def rms_norm_gain_last(x: Tensor, gain: Tensor, eps: float | None) -> Tensor:
    """RMS norm as in Llama: in float32, rounded to x's dtype, then multiplied by the gain."""
    work = x.to(torch.float32)
    least = torch.finfo(x.dtype).eps if eps is None else eps
    normed = work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + least)
    return gain * normed.to(x.dtype)
