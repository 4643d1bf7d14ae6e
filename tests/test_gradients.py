# SPDX-License-Identifier: Apache-2.0
"""Gradients of shared genes in eager mode: the table of cases, whatever is checkpointed or learned.

The same cases in compiled graphs, and what a bank does besides, have files of their own.
"""

from __future__ import annotations

import pytest
from expansion_samples import Net
from gradient_samples import CASES, WHOLE


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_copies(name: str, recompute: bool | None, learn: bool) -> None:
    net = Net(3, learn=learn)
    net.recompute = recompute
    CASES[name](net, lambda fn: fn)


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_reentrant(name: str, learn: bool) -> None:
    net = Net(3, learn=learn)
    net.recompute = True
    CASES[name](net, lambda fn: fn)
