# SPDX-License-Identifier: Apache-2.0
"""The estimate of a training step's memory, where a step makes more than plain tensors: casts, sparse gradients, sums.

Oracle: PyTorch's profiler, as in `test_estimate_memory`, and sizes by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_estimate_memory import measured
from torch import nn

import pylearngene as plg


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_casts_of_an_autocast_region_end_with_it(optimizer: Any) -> None:
    net, x = nn.Linear(256, 256), torch.randn(8, 256)
    estimate = plg.estimate_memory(net, x, optimizer=optimizer, autocast=torch.bfloat16)
    assert abs(estimate.peak - measured(net, x, optimizer, torch.bfloat16)) < 100  # scalars


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(plg.errors.ArgumentError, match=r"^model: expected a step of dense tensors, got one with torch"):
        plg.estimate_memory(nn.Embedding(10, 4, sparse=True), torch.randint(0, 10, (3,)), optimizer="sgd")


@pytest.mark.skipif(plg.backends()[0].backend != "cpp", reason="no native module")
@pytest.mark.parametrize("kind", [plg.nn.ExpansionLayerNorm, plg.nn.ExpansionRMSNorm])
@pytest.mark.parametrize(
    ("tokens", "width", "pieces"),
    [(1024, 4096, 32), (500, 64, 31), (3, 64, 1), (512, 16384, 16), (16, 1 << 19, 1)],
)
def test_sums_of_a_norm_are_counted(kind: type[nn.Module], tokens: int, width: int, pieces: int) -> None:
    """A piece for 16 tokens, 32 at most and 2 MiB, one at least: of each the gradients of gain and bias in float32.

    Beside them a call has only x, y, the moments of its tokens and the gradients: no other tensor of x's size.
    """
    layer = kind(width, bank=plg.nn.GeneBank(), name="norm", coeffs=[1.0, 0.5])
    made = plg.estimate_memory(Whole(layer), (tokens, width), optimizer=None)
    genes = sum(gene.nbytes for gene in layer.bank.parameters())
    assert made.workspace == pieces * 2 * width * 4
    assert made.peak <= 3 * tokens * width * 4 + 2 * genes + made.workspace + 8 * tokens + 1024


class Whole(nn.Module):
    """A layer with its bank."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bank, self.layer = layer.bank, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]
