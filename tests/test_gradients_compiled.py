# SPDX-License-Identifier: Apache-2.0
"""Gradients of shared genes in compiled graphs: the table of cases, with aot_eager and Inductor, without graph breaks.

What a graph holds, and how many are made, is in `test_compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from expansion_samples import Net
from gradient_samples import CASES, RETAINING, draw, expect
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
QUICK = ("one pass", "hooks run once per pass", "retain_graph and two backwards")  # the others take long with Inductor


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Room for a graph per frozen gene; no graphs from earlier tests or from the disk."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def compiled(backend: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda fn: torch.compile(fn, backend=backend, fullgraph=True)


@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_aot_eager(name: str, recompute: bool | None) -> None:
    net = Net(3, learn=recompute is None)
    net.recompute = recompute
    CASES[name](net, compiled("aot_eager"))


@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in CASES])
def test_inductor(name: str, recompute: bool | None) -> None:
    net = Net(3, learn=recompute is not None)
    net.recompute = recompute
    # By default Inductor lets the backward overwrite what was saved for it, and refuses `retain_graph`.
    with torch._functorch.config.patch(donated_buffer=name not in RETAINING):
        CASES[name](net, compiled("inductor"))


@pytest.mark.parametrize("keywords", [{"retain_graph": True}, {"create_graph": True}], ids=str)
def test_inductor_refuses_what_its_default_cannot_do(keywords: dict[str, bool]) -> None:
    net = Net(2)
    x, dy = draw()
    y = compiled("inductor")(net)(x)
    with pytest.raises(RuntimeError, match="donated buffers which requires create_graph=False and retain_graph=False"):
        y.backward(dy, **keywords)
    assert all(p.grad is None for p in net.parameters())
    y = torch.compile(net, fullgraph=True)(x)
    y.backward(dy)
    expect(net, (x, dy))
