# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: captured forward and backward passes, replayed with new values in old memory, give the eager bits.

On the CPU the same tests run with a plain call in the place of a graph. Streams without graphs are in
`test_running_streams`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from running_samples import HALVES, KINDS, Work, equal, finish, really, recorded, work
from torch import Tensor, nn

from pylearngene.nn import ExpansionLinear, GeneBank

REPLAYS = 10
ALL = (torch.float32, *HALVES)


def checked(where: torch.device, kind: str, dtype: torch.dtype) -> Work:
    case = work(where, kind, dtype)
    if where.type == "cuda" and not really(case, kind):
        pytest.skip(f"this device does not compute {kind} so")
    return case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_captured_forward(where: torch.device, kind: str, dtype: torch.dtype) -> None:
    case = checked(where, kind, dtype)
    with torch.no_grad():
        (y,), replay = recorded(where, lambda: [case.forward()])
        for _ in range(REPLAYS):
            fresh = work(where, kind, dtype)
            expected = fresh.forward()
            case.fill(fresh)
            replay()
            finish(where)
            assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_captured_step(where: torch.device, kind: str, dtype: torch.dtype) -> None:
    """The result, and every gradient."""
    case = checked(where, kind, dtype)
    found, replay = recorded(where, case.step)
    for _ in range(REPLAYS):
        fresh = work(where, kind, dtype)
        expected = fresh.step()
        case.fill(fresh)
        replay()
        finish(where)
        assert equal(found, expected)


class Net(nn.Module):
    """Layers that share genes, one of them with learned coefficients."""

    def __init__(self, where: torch.device, dtype: torch.dtype, width: int, depth: int = 3) -> None:
        super().__init__()
        bank = GeneBank()
        self.layers = nn.ModuleList(
            ExpansionLinear(
                width, width, bank=bank, name="fc", coeffs=[1.0, k / depth], device=where, dtype=dtype,
                learn_coeffs=k == depth,
            )
            for k in range(1, depth + 1)
        )  # fmt: skip
        bank.attach(self)
        for gene in bank.parameters():
            nn.init.normal_(gene, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("tokens", [4, 200])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_captured_steps_accumulate_in_the_gradients_of_shared_genes(
    where: torch.device, tokens: int, dtype: torch.dtype
) -> None:
    """Also after eager steps on another stream, whose taps are still there."""
    width = 256 if where.type == "cuda" else 16
    net = Net(where, dtype, width)
    x, dy = (torch.randn(tokens, width, device=where).to(dtype) for _ in range(2))
    inputs = [[torch.randn_like(x), torch.randn_like(dy)] for _ in range(REPLAYS)]

    def step() -> list[Tensor]:
        net(x).backward(dy)
        return []

    def steps(once: Callable[[], object]) -> list[Tensor]:
        """Gradients after every input has been added to them."""
        for parameter in net.parameters():
            parameter.grad.zero_()
        for new_x, new_dy in inputs:
            x.copy_(new_x)
            dy.copy_(new_dy)
            once()
        finish(where)
        return [parameter.grad.clone() for parameter in net.parameters()]

    step()
    expected = steps(step)
    _, replay = recorded(where, step)
    assert equal(steps(replay), expected)
    assert equal(steps(step), expected), "eager steps after a capture"
    assert equal(steps(replay), expected)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_captured_training_step(where: torch.device, dtype: torch.dtype) -> None:
    """Gradients that a graph makes anew, and an optimizer's step inside it: the parameters are those of eager steps."""
    width = 256 if where.type == "cuda" else 16
    x = torch.randn(64, width, device=where).to(dtype)
    trained = []
    for captured in (False, True):
        torch.manual_seed(0)
        net = Net(where, dtype, width)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        start = [parameter.detach().clone() for parameter in net.parameters()]

        def step(net: Net = net, optimizer: torch.optim.SGD = optimizer) -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
            optimizer.step()
            return []

        once: Callable[[], object] = step
        if captured:
            _, once = recorded(where, step)
            with torch.no_grad():
                for parameter, value in zip(net.parameters(), start, strict=True):
                    parameter.copy_(value)
        for _ in range(REPLAYS):
            once()
        finish(where)
        trained.append([parameter.detach().clone() for parameter in net.parameters()])
    assert equal(trained[1], trained[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rows", "turns"])
def test_a_graph_does_not_capture_what_another_stream_does(gpu: torch.device, kind: str) -> None:
    """A side stream belongs to one stream: eager work between capture and replay, on others, is not part of it."""
    case, other = checked(gpu, kind, torch.bfloat16), checked(gpu, kind, torch.bfloat16)
    expected, others = case.step(), other.step()
    found, replay = recorded(gpu, case.step)
    stream = torch.cuda.Stream(gpu)
    for _ in range(5):
        replay()
        with torch.cuda.stream(stream):
            assert equal(other.step(), others)
        replay()
        finish(gpu)
        assert equal(found, expected)


@pytest.mark.gpu
@pytest.mark.full
# torch's own, while it traces and compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_graphs_of_the_compiler(gpu: torch.device, dtype: torch.dtype) -> None:
    """`reduce-overhead` captures operators with their streams inside; replays give what eager calls give."""
    torch._dynamo.reset()
    net = Net(gpu, dtype, 256)
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(200, 256, device=gpu).to(dtype)
        results = []
        for call in (net, compiled):
            net.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            y = call(x)
            y.sum().backward()
            results.append([y.detach().clone(), *(parameter.grad.clone() for parameter in net.parameters())])
        for mine, theirs in zip(*results, strict=True):
            scale = theirs.abs().max().clamp(min=1.0)
            assert (mine.double() - theirs.double()).abs().max() <= 4 * torch.finfo(dtype).eps * 8 * scale
    torch._dynamo.reset()
