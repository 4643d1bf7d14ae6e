# SPDX-License-Identifier: Apache-2.0
"""The kind `attention`: `nn.MultiheadAttention`, one layer with four projections."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pylearngene.hosts.kinds._base import LayerKind, Tensors
from pylearngene.nn import ExpansionModule, ExpansionMultiheadAttention
from pylearngene.nn.expansion_attention import PROJECTIONS, attention_tensors


class Attention(LayerKind):
    """`nn.MultiheadAttention`: its output projection belongs to it and is no layer of its own."""

    name: ClassVar[str] = "attention"
    plain: ClassVar[str] = "nn.MultiheadAttention"
    groups: ClassVar[tuple[str, ...]] = PROJECTIONS
    products: ClassVar[bool] = True

    def holds(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.MultiheadAttention)

    def refusal(self, module: nn.Module, where: str, /) -> str | None:
        """Refuse keys and values beyond the input, and a subclass with another forward."""
        assert isinstance(module, nn.MultiheadAttention)
        if type(module).forward is not nn.MultiheadAttention.forward:
            found = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"expected '{where}' to compute what nn.MultiheadAttention computes, but {found} overrides `forward`"
        if module.bias_k is not None or module.add_zero_attn:
            return f"expected attention without add_bias_kv and add_zero_attn, got '{where}' with"
        return None

    def expanded(self, plain: nn.Module, options: dict[str, Any]) -> ExpansionModule:
        """As `ExpansionMultiheadAttention`."""
        assert isinstance(plain, nn.MultiheadAttention)
        return ExpansionMultiheadAttention(
            plain.embed_dim, plain.num_heads, plain.dropout, plain.in_proj_bias is not None,
            kdim=plain.kdim, vdim=plain.vdim, batch_first=plain.batch_first, **options,
        )  # fmt: skip

    def parts(self, plain: nn.Module) -> list[Tensors]:
        """The four projections, in the order of `groups`."""
        assert isinstance(plain, nn.MultiheadAttention)
        return attention_tensors(plain)
