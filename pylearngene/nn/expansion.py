# SPDX-License-Identifier: Apache-2.0
"""The drop-in linear layer whose weight is a sum of shared genes: `ExpansionLinear`.

A layer holds its coefficients and a reference to the bank; genes, gradients and low-precision copies are the bank's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pylearngene.nn._expansion_group import ExpansionGroup
from pylearngene.nn._layer import ExpansionLayer, size
from pylearngene.nn._view import WeightView
from pylearngene.nn.bank import GeneBank


class ExpansionLinear(ExpansionLayer):
    """A Linear layer whose weight is a sum of genes shared with other layers.

    `y = x W^T + b`, `W = sum_k c_k G_k`, `b = sum_k c_k b_k`.

    The `[O, I]` weight is never stored, in neither pass; genes live in the bank, once. `parameters()` and `.to()` of
    the layer do not reach them: use those of the model, where the bank is registered.

    Args:
        in_features: I.
        out_features: O.
        bias: whether bias genes are expanded and added.
        device, dtype: of genes that this call creates.
        bank: the bank that owns the genes.
        name: the group in the bank; layers with one name share genes. Created if absent.
        coeffs: K numbers, c. Used in float32 (float64 for float64 genes) whatever the model's dtype.
        learn_coeffs: make them a Parameter.
        transposed: let `.weight` read as [I, O], like that of the `Conv1D` of transformers. Genes stay [O, I].

    Raises:
        ArgumentError: not a bank, no coefficient or more than 64, one that is NaN or infinite, or a size below 0.
        ShapeError: the group exists with other shapes or another K.

    Numerics, backends and source: as `plg.functional.expansion_linear`.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> layer = plg.nn.ExpansionLinear(4, 3, bank=bank, name="fc", coeffs=[1.0, 0.5])
        >>> x = torch.ones(2, 4)
        >>> torch.allclose(layer(x), layer.to_dense()(x))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        self.transposed = transposed
        self.in_features = size(in_features, "in_features")
        self.out_features = size(out_features, "out_features")
        shape = (out_features, in_features)
        bias_shape = (out_features,) if bias else None
        bank.add_group(name, ExpansionGroup, len(self._values), shape, bias_shape, device=device, dtype=dtype)
        self._place_coeffs()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x `[*, I]` -> `[*, O]`."""
        y: Tensor | None = self._at_once(x)
        return self._from_bank(self.name, x) if y is None else y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """As `forward` with the fewest steps; None where the short way is closed."""
        bank, coeffs = self._bank[0], self._coeffs_at_once()
        if coeffs is None:
            return None
        y: Tensor | None = bank.group(self.name).at_once(bank, self.name, coeffs, x)
        return y

    @property
    def weight(self) -> WeightView:
        """Reads like the plain layer's weight; shape, dtype and device are free, use synthesizes."""
        genes = self._bank[0].group(self.name).weights()
        if not self.transposed:  # not by super(): the compiler cannot follow a property there
            return WeightView(self.dense_weight, genes)
        return WeightView(lambda: self.dense_weight().t(), genes, (self.in_features, self.out_features))

    def to_dense(self) -> nn.Linear:
        """A plain `nn.Linear` with the same function."""
        like = self.first_gene
        plain = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=like.device, dtype=like.dtype
        )
        self._fill(plain)
        return plain

    def extra_repr(self) -> str:
        """Sizes, group and coefficients, in one line."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self._coeff_repr()}"
