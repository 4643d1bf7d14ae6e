# SPDX-License-Identifier: Apache-2.0
"""`expansion` under the contract of all primitives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from contract import Contract, Primitive, Sizes
from contract_base import Given
from torch import Tensor, nn

from pylearngene.nn import ExpansionLinear, GeneBank


class Expansion(Primitive):
    stem = "expansion"
    precise = ("coeffs",)

    def arguments(self, sizes: Sizes, draw: Callable[..., Tensor]) -> Given:
        scale = max(1, sizes.inner) ** -0.5
        genes = [scale * draw(sizes.out, sizes.inner) for _ in range(2)]
        biases = [draw(sizes.out) for _ in range(2)]
        return {"x": draw(sizes.tokens, sizes.inner), "genes": genes, "coeffs": draw(2), "bias": biases}

    def dense(
        self, genes: list[Tensor], coeffs: Tensor, bias: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        weight = torch.einsum("k,koi->oi", coeffs, torch.stack(genes))
        return weight, None if bias is None else torch.einsum("k,ko->o", coeffs, torch.stack(bias))

    def layer(self, bank: GeneBank, inner: int, out: int, level: int, **options: Any) -> nn.Module:
        return ExpansionLinear(inner, out, bank=bank, name="fc", coeffs=[1.0, level / 7], **options)

    def factors(self, layer: nn.Module) -> Given:
        group = layer.bank.group("fc")
        return {"genes": group.weights(), "coeffs": layer.coeffs, "bias": group.biases()}

    def operators(self, given: Given) -> Iterator[tuple[str, tuple[Any, ...]]]:
        x, genes, coeffs, biases = given["x"], given["genes"], given["coeffs"], given["bias"]
        plain = [t.detach() for t in (x, coeffs)]
        fixed, fixed_bias = [g.detach() for g in genes], [b.detach() for b in biases]
        dy, dw = x.detach().new_ones(len(x), len(biases[0])), torch.ones_like(fixed[0])
        buffers, bias_buffers = [torch.zeros_like(dw)], [torch.zeros_like(fixed_bias[0])]
        token = torch.zeros(())
        tap = (token, buffers, bias_buffers, [0], [1])
        yield "expansion_linear", (x, genes, coeffs, None, biases, None)
        yield "expansion_linear", (x[:0], genes, coeffs, biases[0], [], None)
        yield "expansion_linear", (x[None], [g.t().contiguous().t() for g in genes], coeffs, None, [], None)
        yield "expansion_weight", (genes, coeffs, None)
        yield "expansion_linear_dx", (dy, fixed, plain[1])
        yield "expansion_linear_wgrad", (dy, plain[0], fixed, fixed_bias, plain[1], [0, 1], [1], True)
        yield "expansion_weight_wgrad", (dw, fixed, plain[1], [1], True)
        yield (
            "expansion_linear_wgrad_",
            (buffers, bias_buffers, dy, plain[0], fixed, fixed_bias, plain[1], [1], [0], False),
        )
        yield "expansion_weight_wgrad_", (buffers, dw, fixed, plain[1], [0], True)
        yield "expansion_linear_tapped", (plain[0], fixed, plain[1], None, fixed_bias, None, *tap)
        yield "expansion_weight_tapped", (fixed, plain[1], None, token, [], [])


class TestContract(Contract):
    primitive = Expansion()
