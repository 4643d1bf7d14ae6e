# SPDX-License-Identifier: Apache-2.0
"""Genes for layers that compute by PyTorch's own operations: read them like any tensor, the tap gets the gradients.

A primitive with kernels of its own adds to the accumulators itself; here one node per use does it, whatever comes after
it in the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pylearngene import _checks
from pylearngene.functional._context import check_upstream
from pylearngene.functional._single_backward import anchor, anchors_of, single_backward
from pylearngene.functional._tap import Tap


def tapped(tap: Tap, genes: Sequence[Tensor]) -> list[Tensor]:
    """The genes of a tap, or copies of them in another dtype, for use in any differentiable computation.

    Their gradients are summed in float32 over all uses of a backward pass. A gradient of theirs cannot be
    differentiated again; gradients of everything else can.
    """
    read = iter(_read(tap.token, tap, genes))
    return [next(read) if k in tap.wanted else gene for k, gene in enumerate(genes)]


@dataclass
class TracedReads:
    """Genes of 16 bits inside one compiled graph, in float32: what layers read of these sums its gradients there.

    Attributes:
        genes: all of a group, converted once per pass.
    """

    genes: list[Tensor]

    def read(self, dtype: torch.dtype) -> list[Tensor]:
        """The genes in a dtype of at least 16 bits; their own values again."""
        return [gene.to(dtype) for gene in self.genes]


def traced_reads(genes: Sequence[Tensor]) -> TracedReads | None:
    """The genes for a compiled graph; None where it sums their gradients in float32 or more as it is."""
    if genes[0].dtype not in _checks.HALF or not any(gene.requires_grad for gene in genes):
        return None
    return TracedReads([gene.float() for gene in genes])


class _ReadNode(Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, tap: Tap, genes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.token, ctx.tap = token, tap
        return tuple(genes[k].detach() for k in tap.wanted)

    @staticmethod
    @single_backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        anchor(ctx, ctx.token)
        # The node leads to the tap alone, so it runs only in passes that reach the tap.
        given = [(slot, grad) for slot, grad in zip(ctx.tap.slots, grads, strict=True) if grad is not None]
        sums = ctx.tap.ledger.buffers([slot for slot, _ in given], anchors_of(ctx))
        for total, (_, grad) in zip(sums, given, strict=True):
            check_upstream(grad)
            total.add_(grad)
        return None, None, None


_read: Callable[..., tuple[Tensor, ...]] = _ReadNode.apply
