# SPDX-License-Identifier: Apache-2.0
"""Drop-in multi-head attention whose four projections are sums of shared genes.

Queries, keys, values and the output have a group of genes each; `nn.MultiheadAttention` keeps the first three in one
tensor, which is put together only where somebody reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.errors import ArgumentError, DTypeError, ShapeError
from pylearngene.functional._context import check_pair
from pylearngene.nn._expansion_group import ExpansionGroup
from pylearngene.nn._layer import ExpansionModule, size, write_dense
from pylearngene.nn._view import WeightView
from pylearngene.nn.bank import GeneBank

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class _Tensors:
    """What `out_proj` reads as: a weight and a bias that are synthesized when used."""

    weight: WeightView
    bias: WeightView | None


class ExpansionMultiheadAttention(ExpansionModule):
    """A MultiheadAttention whose projections are sums of genes shared with other layers.

    `y = concat_h(softmax(q_h k_h^T / sqrt(D) + mask) v_h) W_o^T + b_o` with `q = x W_q^T + b_q` and so on,
    each `W = sum_k c_k G_k` and `b = sum_k c_k b_k`; all four share the coefficients.

    No `[E, E]` weight is stored, in neither pass. Tokens that `key_padding_mask` leaves out get an output like any
    other, never to be read: `nn.TransformerEncoder` in eval mode packs the others and writes zeros there for its plain
    layers alone.

    Args:
        embed_dim: E.
        num_heads: H, a divisor of E; D = E / H.
        dropout: probability of dropping an attention weight while training.
        bias: whether bias genes are expanded and added.
        add_bias_kv, add_zero_attn: must be False.
        kdim, vdim: widths of key and value; None is E.
        batch_first: inputs are `[B, T, E]` instead of `[T, B, E]`.
        device, dtype: of genes that this call creates.
        bank: as `ExpansionLinear`.
        name: the groups in the bank are `name.q_proj`, `name.k_proj`, `name.v_proj` and `name.out_proj`.
        coeffs, learn_coeffs: as `ExpansionLinear`.

    Raises:
        ArgumentError: E is no multiple of H, `dropout` is no probability, `add_bias_kv` or `add_zero_attn` is set,
            `is_causal` comes without `attn_mask`, or as `ExpansionLinear`.
        ShapeError: the groups exist with other shapes or another K; an input or a mask does not fit.
        DTypeError: a mask is no tensor, or neither bool nor floating, or as `plg.functional.expansion_linear`.
        DeviceError: an input is not where the genes are, or a mask not where query is.

    Numerics: projections as `plg.functional.expansion_linear`; attention as `F.scaled_dot_product_attention`, or by
    the formula where the weights are asked for.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2; its expansion is that of TLEG.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> make = plg.nn.ExpansionMultiheadAttention
        >>> attention = make(8, 2, batch_first=True, bank=bank, name="self_attn", coeffs=[1.0, 0.5])
        >>> y, weights = attention(*[torch.ones(2, 3, 8)] * 3)
        >>> y.shape, weights.shape
        (torch.Size([2, 3, 8]), torch.Size([2, 3, 3]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        coeffs: Sequence[float] | Tensor,
        learn_coeffs: bool = False,
    ) -> None:
        super().__init__(bank, name, coeffs, learn_coeffs)
        self.embed_dim = _checks.positive_int(embed_dim, "embed_dim")
        self.num_heads = _checks.positive_int(num_heads, "num_heads")
        if embed_dim % num_heads:
            raise ArgumentError(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
        for argument, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ArgumentError(f"{argument}: expected False (keys beyond the input cannot be expanded), got True")
        if not 0.0 <= dropout <= 1.0:
            raise ArgumentError(f"dropout: expected a number from 0 to 1, got {dropout}")
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.kdim = embed_dim if kdim is None else size(kdim, "kdim")
        self.vdim = embed_dim if vdim is None else size(vdim, "vdim")
        # Read by `nn.TransformerEncoderLayer` and by other code that knows nn.MultiheadAttention.
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self.group_names = tuple(f"{name}.{projection}" for projection in PROJECTIONS)
        bias_shape = (embed_dim,) if bias else None
        widths = zip(self.group_names, (embed_dim, self.kdim, self.vdim, embed_dim), strict=True)
        # Groups that are there already come first: where one does not fit, no other is made.
        for group, width in sorted(widths, key=lambda pair: pair[0] not in bank.groups):
            shape = (embed_dim, width)
            bank.add_group(group, ExpansionGroup, len(self._values), shape, bias_shape, device=device, dtype=dtype)
        self._place_coeffs()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: arguments, shapes and results are those of `nn.MultiheadAttention`.

        Masks are bool (True is left out) or what is added to the scores; the weights come back only where asked for.
        """
        batched = self._check(query, key, value)
        for argument, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if given is not None:
                _checks.same_device(_checks.tensor(given, argument), argument, query, "query")
        if is_causal and attn_mask is None:
            raise ArgumentError("attn_mask: expected a mask where is_causal is given, got None")
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            self._from_bank(group, x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for group, x in zip(self.group_names, (query, key, value), strict=False)
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged_mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            mixed, weights = _attention(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal), None
        y: Tensor = self._from_bank(self.group_names[3], mixed.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Check the inputs and say whether they have a batch axis."""
        gene = self.first_gene
        sizes = ((query, "query", self.embed_dim, "E"), (key, "key", self.kdim, "kdim"))
        for x, argument, width, letter in (*sizes, (value, "value", self.vdim, "vdim")):
            _checks.tensor(x, argument)
            _checks.floating(x, argument)
            if x.dim() != query.dim() or x.dim() not in (2, 3):
                raise ShapeError(f"{argument}: expected 2 or 3 axes, as many as query, got {list(x.shape)}")
            _checks.last_dim(x, argument, width, letter)
            _checks.same_device(x, argument, gene, "the genes")
            check_pair(x, gene, argument)
        if key.shape[:-1] != value.shape[:-1]:
            raise ShapeError(f"value: expected as many tokens as key, {list(key.shape[:-1])}, got {list(value.shape)}")
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ShapeError(f"key: expected a batch of {query.shape[batch]}, as query, got {key.shape[batch]}")
        return query.dim() == 3

    def _view(self, groups: Sequence[str], part: str) -> WeightView | None:
        """What reads like the weights or biases of the groups, one below the other."""
        bank = self._bank[0]
        found = [bank.group(name) for name in groups]
        genes = [gene for group in found for gene in (group.weights() if part == "weight" else group.biases())]
        if not genes:
            return None

        def synthesize() -> Tensor:
            return torch.cat([self.dense(name)[part == "bias"] for name in groups])  # type: ignore[misc]

        return WeightView(synthesize, genes, (len(groups) * self.embed_dim, *genes[0].shape[1:]))

    @property
    def in_proj_weight(self) -> WeightView | None:
        """Reads like the plain layer's: the weights of query, key and value in one, where their widths agree."""
        return self._view(self.group_names[:3], "weight") if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> WeightView | None:
        """Reads like the plain layer's."""
        return self._view(self.group_names[:3], "bias")

    @property
    def q_proj_weight(self) -> WeightView | None:
        """Reads like the plain layer's: None where `in_proj_weight` is there."""
        return None if self._qkv_same_embed_dim else self._view(self.group_names[:1], "weight")

    @property
    def k_proj_weight(self) -> WeightView | None:
        """Reads like the plain layer's: None where `in_proj_weight` is there."""
        return None if self._qkv_same_embed_dim else self._view(self.group_names[1:2], "weight")

    @property
    def v_proj_weight(self) -> WeightView | None:
        """Reads like the plain layer's: None where `in_proj_weight` is there."""
        return None if self._qkv_same_embed_dim else self._view(self.group_names[2:3], "weight")

    @property
    def out_proj(self) -> Any:
        """Reads like the plain layer's: something with a weight and a bias."""
        weight = self._view(self.group_names[3:], "weight")
        assert weight is not None
        return _Tensors(weight, self._view(self.group_names[3:], "bias"))

    def dense_weight(self, projection: str) -> Tensor:
        """The full weight `sum_k c_k G_k` of "q_proj", "k_proj", "v_proj" or "out_proj"; differentiable.

        Raises:
            ArgumentError: it is none of these.
        """
        _checks.choice(projection, "projection", PROJECTIONS)
        return self.dense(f"{self.name}.{projection}")[0]

    def to_dense(self) -> nn.MultiheadAttention:
        """A plain `nn.MultiheadAttention` with the same function."""
        like, bias = self.first_gene, self.in_proj_bias is not None
        plain = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias, kdim=self.kdim, vdim=self.vdim,
            batch_first=self.batch_first, device=like.device, dtype=like.dtype,
        )  # fmt: skip
        for group, (weight, plain_bias) in zip(self.group_names, attention_tensors(plain), strict=True):
            write_dense([self], group, [weight], [plain_bias])
        return plain

    def extra_repr(self) -> str:
        """Sizes, group and coefficients, in one line."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, {self._coeff_repr()}"


def attention_tensors(plain: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of each of the four projections of a plain layer, as views into its tensors."""
    width = plain.embed_dim
    thirds = [slice(index * width, (index + 1) * width) for index in range(3)]
    weights: list[Any]
    if not plain._qkv_same_embed_dim:
        weights = [plain.q_proj_weight, plain.k_proj_weight, plain.v_proj_weight]
    else:
        weights = [plain.in_proj_weight[third] for third in thirds]
    biases = [None if plain.in_proj_bias is None else plain.in_proj_bias[third] for third in thirds]
    return [*zip(weights, biases, strict=True), (plain.out_proj.weight, plain.out_proj.bias)]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention by its formula, with its weights: q `[B, H, T, D]` -> `[B, H, T, D]` and `[B, H, T, S]`."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights


def _merged_mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """What is added to the scores `[B, H, T, S]`, in a shape that broadcasts to them."""
    (batch, heads, tokens, _), source = q.shape, k.shape[2]
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, "attn_mask", q.dtype)
        if attn_mask.dim() == 3:
            _checks.shape(attn_mask, "attn_mask", (batch * heads, tokens, source), "[B * H, T, S]")
            merged = merged.view(batch, heads, tokens, source)
        else:
            _checks.shape(attn_mask, "attn_mask", (tokens, source), "[T, S]")
    if padding is not None:
        added = _additive(padding, "key_padding_mask", q.dtype)
        added = added.unsqueeze(0) if padding.dim() == 1 else added
        _checks.shape(added, "key_padding_mask", (batch, source), "[B, S]")
        added = added.view(batch, 1, 1, source)
        merged = added if merged is None else merged + added
    return merged


def _additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask (True is left out) into what is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise DTypeError(f"{name}: expected bool or a floating dtype, got {_checks.short(mask.dtype)}")
    return mask.to(dtype)
