# SPDX-License-Identifier: Apache-2.0
"""The estimate of a training step's memory, where the step makes more than plain tensors: casts, sparse gradients.

Oracle: PyTorch's profiler, as in `test_estimate_memory`.
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
