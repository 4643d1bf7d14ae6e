# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers whose vectors are sums of shared genes: layer norms, RMS norms, group norms, and scales of channels.

Layer and RMS norms combine them inside the normalization; the others expand them whole: they are no full weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene._ops import expansion_norm as _kernels
from pylearngene.errors import ArgumentError
from pylearngene.functional import _expansion_norm as _norms
from pylearngene.functional.expansion import check_coeffs
from pylearngene.nn._expansion_group import ExpansionGroup
from pylearngene.nn._layer import ExpansionVectors, check_channels, normalized_size, size
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


class ExpansionNormGroup(ExpansionGroup):
    """The genes of a norm or scale; those of a layer or RMS norm are combined inside the normalization.

    Args:
        num_genes, weight_shape, bias_shape, device, dtype: as `ExpansionGroup`.

    Raises:
        ArgumentError: K is not in 1..64.
    """

    def compute(self, bank: GeneBank, name: str, *inputs: Any, **options: Any) -> Any:
        """As `ExpansionGroup.compute` where tensors are asked for; with x and `how`, a kind and an eps, the norm of x.

        Raises:
            DTypeError: x is not a plain floating tensor, or float64 is mixed with another dtype.
            ShapeError: x does not have N columns, or coeffs is not `[K]`.
            DeviceError: x or the coefficients are not where the genes are.
        """
        if "how" in options:
            return self._normalize(bank, name, *inputs, **options)
        return super().compute(bank, name, *inputs, **options)

    def _normalize(
        self, bank: GeneBank, name: str, coeffs: Tensor, x: Tensor, used: slice | None, how: _norms.How
    ) -> Tensor:
        weights, biases = self.weights(), self.biases()
        check_channels(x, weights[0], weights[0].shape[0], -1)
        for gene in weights + biases:
            _checks.tensor(gene, "genes")
        check_coeffs(coeffs, weights)
        tap = bank.tap(name, self)
        if used is not None and self._may_choose(tap):
            weights, biases, coeffs, tap = weights[used], biases[used], coeffs[used], tap and tap.part(used)
        return _norms.norm(how, x, weights, biases, coeffs, tap)

    def normalized(self, bank: GeneBank, name: str, coeffs: Tensor, x: Any, how: _norms.How) -> Tensor | None:
        """The norm of x with all genes where the short way is open, else None; nothing has been checked."""
        weights, biases = self._modules["weight"]._parameters, self._modules.get("bias")  # type: ignore[union-attr]
        listed = (weights, () if biases is None else biases._parameters)
        grad = torch.is_grad_enabled()
        made = _kernels.at_once(how[0], x, *listed, coeffs, how[1], grad)
        if made is None or not grad:
            return made  # type: ignore[no-any-return]
        genes, bias_genes = self.weights(), self.biases()
        tap = bank.eager_tap(name, self, genes + bias_genes)
        return _norms.recorded(made, how, x, genes, bias_genes, coeffs, tap)


class _LastAxisNorm(ExpansionVectors, ABC):
    """A norm over the last axis: gain and bias are combined inside it where they can be."""

    normalized_shape: tuple[int]
    eps: float | None

    def _join(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Make or find the genes in the bank, and place the coefficients beside them."""
        self.elementwise_affine = True
        count, sizes = len(self._values), self.normalized_shape
        self.bank.add_group(
            self.name, ExpansionNormGroup, count, sizes, sizes if bias else None, device=device, dtype=dtype
        )
        self._place_coeffs()

    @abstractmethod
    def _how(self, x: Any) -> _norms.How:
        """The kind of the norm, and what is added for this x, of which nothing needs to be known."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: x `[*, N]` -> `[*, N]`."""
        how = self._how(x)
        y = self._at_once(x, how)
        if y is None:
            y = self._from_bank(self.name, x, how=how)
        return y

    def _at_once(self, x: Tensor, how: _norms.How) -> Tensor | None:
        """As `forward` with the fewest steps; None where the short way is closed."""
        bank, coeffs = self._bank[0], self._coeffs_at_once()
        if coeffs is None:
            return None
        group: ExpansionNormGroup = bank.group(self.name)
        return group.normalized(bank, self.name, coeffs, x, how)

    def extra_repr(self) -> str:
        """Sizes, group and coefficients, in one line."""
        return f"{self.normalized_shape[0]}, eps={self.eps}, {self._coeff_repr()}"


class ExpansionLayerNorm(_LastAxisNorm):
    """A LayerNorm whose gain and bias are sums of genes shared with other layers.

    `y = (x - mean) / sqrt(var + eps) * g + b`, `g = sum_k c_k g_k`, `b = sum_k c_k b_k`.

    Args:
        normalized_shape: N, or a list with that one size.
        eps: added to the variance.
        elementwise_affine: must be True; a norm without gain has nothing to expand.
        bias: whether bias genes are expanded and added.
        device, dtype: of genes that this call creates.
        bank, name, coeffs, learn_coeffs: as `ExpansionLinear`.

    Raises:
        ArgumentError: more than one normalized axis, no affine part, or as `ExpansionLinear`.
        ShapeError: the group exists with other shapes or another K, or x is not [*, N].
        DTypeError: x is not floating, or float64 is mixed with another dtype.
        DeviceError: x is not where the genes are.

    Numerics: gain and bias are float32 chains rounded once to the genes' dtype, and to x's. Moments are of float32 (of
    float64 for float64), as in `F.layer_norm`; y is rounded once. Gradients of gain and bias are summed in float32, in
    an order that does not depend on the number of threads.

    Backends: C++ (CPU): gain and bias are formed in cache, inside the normalization, and x, the moments of its tokens,
    genes and coefficients are all that is saved. Elsewhere, in compiled graphs and under functorch transforms they are
    two vectors, and `F.layer_norm` follows.

    Source: Xia et al., "Transformer as Linear Expansion of Learngene", AAAI 2024: norms are expanded like weights.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> norm = plg.nn.ExpansionLayerNorm(4, bank=bank, name="norm", coeffs=[1.0, 0.5])
        >>> norm(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        self.normalized_shape = (normalized_size(normalized_shape, elementwise_affine),)
        self.eps: float = eps
        self._join(bias, device, dtype)

    def _how(self, x: Any) -> _norms.How:  # noqa: ARG002
        return _kernels.LAYER, self.eps

    def to_dense(self) -> nn.LayerNorm:
        """A plain `nn.LayerNorm` with the same function."""
        like = self.weight
        plain = nn.LayerNorm(
            self.normalized_shape, self.eps, bias=self.bias is not None, device=like.device, dtype=like.dtype
        )
        self._fill(plain)
        return plain


class ExpansionRMSNorm(_LastAxisNorm):
    """An RMSNorm whose gain is a sum of genes shared with other layers.

    `y = x / sqrt(mean(x^2) + eps) * g`, `g = sum_k c_k g_k`.

    Args:
        normalized_shape: N, or a list with that one size.
        eps: added to the mean square; None is the smallest step of float32, or float64, as `nn.RMSNorm` has it.
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

    Numerics: as `ExpansionLayerNorm`, without means and bias. With `gain_last`, float64 is normalized in float32.

    Backends: as `ExpansionLayerNorm`; where the gain is a vector, `F.rms_norm` follows.

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
        self.normalized_shape = (normalized_size(normalized_shape, elementwise_affine),)
        self.eps = eps
        self.gain_last = gain_last
        self._join(False, device, dtype)

    def _how(self, x: Any) -> _norms.How:
        kind = _kernels.RMS_GAIN_LAST if self.gain_last else _kernels.RMS
        if self.eps is not None:
            return kind, self.eps
        wide = getattr(x, "dtype", None) == torch.float64 and not self.gain_last
        return kind, torch.finfo(torch.float64 if wide else torch.float32).eps

    def to_dense(self) -> nn.RMSNorm:
        """A plain `nn.RMSNorm` with the same function; `gain_last` is lost, which shows in 16 bits only."""
        like = self.first_gene
        plain = nn.RMSNorm(self.normalized_shape, self.eps, device=like.device, dtype=like.dtype)
        self._fill(plain)
        return plain


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
        bank.add_group(name, ExpansionNormGroup, len(self._values), sizes, sizes, device=device, dtype=dtype)
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
        bank.add_group(name, ExpansionNormGroup, len(self._values), (features,), None, device=device, dtype=dtype)
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
