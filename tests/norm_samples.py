# SPDX-License-Identifier: Apache-2.0
"""Layers of norms with random genes, their oracle, and ways to call them, for the tests of norms in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylearngene as plg
from pylearngene.nn import ExpansionLayerNorm, ExpansionRMSNorm, GeneBank

SIZE, COEFFS = 6, [1.0, -0.5, 0.25]
Norm = ExpansionLayerNorm | ExpansionRMSNorm
KINDS: dict[str, Callable[..., Norm]] = {
    "layer": ExpansionLayerNorm,
    "layer without bias": lambda *args, **options: ExpansionLayerNorm(*args, bias=False, **options),
    "rms": ExpansionRMSNorm,
    "gain last": lambda *args, **options: ExpansionRMSNorm(*args, gain_last=True, **options),
}
per_kind = pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms"])  # what works in float64
native = pytest.mark.skipif(plg.backends()[0].backend != "cpp", reason="no native module")


def layer_of(
    dtype: torch.dtype = torch.float64, coeffs: Any = COEFFS, kind: str = "layer", size: int = SIZE, **options: Any
) -> Any:
    """A layer with genes of random values."""
    options = {"bank": GeneBank(), "name": "norm", "dtype": dtype, **options}
    layer = KINDS[kind](size, 1e-3, coeffs=coeffs, **options)
    for gene in layer.bank.parameters():
        nn.init.normal_(gene)
    return layer


def dense(x: Tensor, coeffs: Tensor, genes: list[Tensor], kind: str = "layer") -> Tensor:
    """The oracle; genes are gains and then biases."""
    count = len(coeffs)
    vectors = [sum(c * g for c, g in zip(coeffs, part, strict=True)) for part in (genes[:count], genes[count:]) if part]
    norm = F.layer_norm if kind.startswith("layer") else F.rms_norm
    return norm(x, (x.shape[-1],), *vectors, eps=1e-3)  # type: ignore[arg-type]


def twins(layer: Norm) -> tuple[Tensor, list[Tensor]]:
    """Copies in float64 of what the layer reads, which take gradients."""
    group = layer.bank.group("norm")
    coeffs = layer.coeffs.detach().double().requires_grad_()
    return coeffs, [gene.detach().double().requires_grad_() for gene in group.tensors()]


class Watched(TorchDispatchMode):
    """A mode that sees every operator, so that none may be left out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def evenly(x: Tensor) -> Tensor:
    return x


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Any]]] = {
    "plain": (evenly, nullcontext),
    "uneven rows": (lambda x: x[:, :3], nullcontext),
    "apart": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), nullcontext),
    "watched": (evenly, Watched),
    "apart and watched": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), Watched),
    "empty": (lambda x: x[:0], nullcontext),
    "reference": (evenly, lambda: plg.use_backend("reference")),
}
