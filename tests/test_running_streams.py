# SPDX-License-Identifier: Apache-2.0
"""Running on a GPU: the same bits every time, on any stream, in several threads, on any device, never waiting.

Every test also runs on the CPU, without streams, to show that it says what it means. What the order of two streams
within one product must be is in `test_running_turns`, graphs are in `test_running_graphs`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from running_samples import HALVES, KINDS, Work, current, delay, equal, finish, really, stream_of, work
from torch import Tensor, nn

from pylearngene.nn import ExpansionLinear, GeneBank

REPEATS = 250
ALL = (torch.float32, *HALVES)
pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # torch's, where it is set


def checked(where: torch.device, kind: str, dtype: torch.dtype, genes: int = 4) -> Work:
    """A product that is computed as meant, or skip."""
    case = work(where, kind, dtype, genes)
    if where.type == "cuda" and not really(case, kind):
        pytest.skip(f"this device does not compute {kind} so")
    return case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_results_repeat_to_the_bit(where: torch.device, kind: str, dtype: torch.dtype) -> None:
    """While another stream makes the GPU now more, now less busy."""
    case = checked(where, kind, dtype)
    first, other = case.step(), stream_of(where)
    noise = torch.ones(2048 if where.type == "cuda" else 2, 2048, device=where)
    assert not any(tensor.isnan().any() for tensor in first)
    for turn in range(REPEATS):
        with current(other):
            for _ in range(turn % 4):
                torch.mm(noise, noise.t())
        assert equal(case.step(), first), turn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_a_stream_computes_what_it_has_just_been_given(where: torch.device, kind: str, dtype: torch.dtype) -> None:
    """Values arrive late on the same stream: whatever ran on another one would have read NaN."""
    case = checked(where, kind, dtype)
    expected, late = case.step(), case.empty()
    finish(where)
    with current(stream_of(where)):
        delay(where)
        late.fill(case)
        found = late.step()
        late.fill(late.empty())  # what comes after must not overtake what reads
        finish(where)
    assert equal(found, expected)


def test_streams_do_not_disturb_each_other(where: torch.device) -> None:
    """Several streams at once from one thread, each with work of its own that takes turns with its side stream."""
    cases = [checked(where, "turns", torch.bfloat16) for _ in range(3)]
    expected = [case.step() for case in cases]
    finish(where)
    streams, found = [stream_of(where) for _ in cases], []
    for _ in range(5):
        found = []
        for stream, case in zip(streams, cases, strict=True):
            with current(stream):
                found.append(case.step())
        finish(where)
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["rows", "turns"])
def test_threads_on_streams_of_their_own(where: torch.device, kind: str) -> None:
    case = checked(where, kind, torch.bfloat16)
    expected, wrong = case.step(), list[int]()
    finish(where)

    def run(number: int) -> None:
        mine = case.copy()
        finish(where)
        with current(stream_of(where)):
            for turn in range(25):
                if not equal(mine.step(), expected):
                    wrong.append(100 * number + turn)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "the threads hang"
    assert not wrong


class Net(nn.Module):
    """Layers that share two genes; each may have a stream of its own."""

    def __init__(self, where: torch.device, width: int, dtype: torch.dtype, depth: int = 3) -> None:
        super().__init__()
        bank = GeneBank()
        self.layers = nn.ModuleList(
            ExpansionLinear(width, width, bank=bank, name="fc", coeffs=[1.0, k / depth], device=where, dtype=dtype)
            for k in range(1, depth + 1)
        )
        bank.attach(self)
        for gene in bank.parameters():
            nn.init.normal_(gene, std=width**-0.5)

    def forward(self, x: Tensor, streams: list[torch.cuda.Stream | None] | None = None) -> Tensor:
        for layer, stream in zip(self.layers, streams or [None] * len(self.layers), strict=True):
            if stream is None:
                x = torch.tanh(layer(x))
                continue
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                y = torch.tanh(layer(x))
            torch.cuda.current_stream(x.device).wait_stream(stream)
            y.record_stream(torch.cuda.current_stream(x.device))
            x = y
        return x


def grads(net: Net) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_genes_shared_by_steps_on_several_streams(where: torch.device, dtype: torch.dtype) -> None:
    """Gradients accumulate from step to step, each on another stream than the last, with work queued before it."""
    net = Net(where, 512 if where.type == "cuda" else 16, dtype)
    inputs = [torch.randn(64, net.layers[0].in_features, device=where).to(dtype) for _ in range(4)]
    for x in inputs:
        net(x).sum().backward()
    expected = grads(net)
    net.zero_grad()
    finish(where)
    for x in inputs:
        before, stream = None if where.type == "cpu" else torch.cuda.current_stream(where), stream_of(where)
        with current(stream):
            delay(where)
            net(x).sum().backward()
        if stream is not None and before is not None:
            before.wait_stream(stream)
    finish(where)
    assert equal(grads(net), expected)


@pytest.mark.gpu
# torch's own: the gradient of a leaf meets streams of several layers
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_layers_on_streams_of_their_own_share_genes(gpu: torch.device) -> None:
    net = Net(gpu, 512, torch.bfloat16)
    x = torch.randn(64, 512, device=gpu).bfloat16()
    net(x).sum().backward()
    expected = grads(net)
    streams: list[torch.cuda.Stream | None] = [torch.cuda.Stream(gpu) for _ in net.layers]
    for _ in range(20):
        net.zero_grad()
        net(x, streams).sum().backward()
        finish(gpu)
        assert equal(grads(net), expected)


@contextmanager
def nothing_waits(where: torch.device) -> Iterator[None]:
    """An error where the host waits for the GPU."""
    if where.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_the_host_never_waits_for_the_gpu(where: torch.device, kind: str, dtype: torch.dtype) -> None:
    case, net = checked(where, kind, dtype), Net(where, 64, dtype)
    x = torch.randn(5, 64, device=where).to(dtype)

    def step() -> None:
        case.step()
        net(x).sum().backward()
        with torch.no_grad():
            net(x)
            case.forward()

    step()  # kernels are compiled and loaded
    with nothing_waits(where):
        step()


@pytest.mark.gpu
def test_waiting_would_be_seen(gpu: torch.device) -> None:
    one = torch.ones((), device=gpu)
    with nothing_waits(gpu), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


@pytest.fixture
def two_gpus(gpu: torch.device) -> tuple[torch.device, torch.device]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return gpu, torch.device("cuda", 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_tensors_of_another_device_than_the_current_one(
    two_gpus: tuple[torch.device, torch.device], kind: str, dtype: torch.dtype
) -> None:
    here, there = two_gpus
    case = checked(here, kind, dtype)
    with torch.cuda.device(here):
        expected = case.step()
        moved = Work(
            *(
                [tensor.detach().to(there).requires_grad_() for tensor in value] if isinstance(value, list)
                else value.detach().to(there).requires_grad_(value.requires_grad)
                for value in (case.x, case.genes, case.coeffs, case.biases, case.dy)
            )
        )  # fmt: skip
        found = moved.step()
        assert torch.cuda.current_device() == here.index
    assert all(tensor.device == there for tensor in found)
    assert equal([tensor.to(here) for tensor in found], expected)


def test_one_step_after_another_gives_memory_back(where: torch.device) -> None:
    """Nothing is kept from step to step: no event, stream or workspace holds memory."""
    if where.type == "cpu":
        pytest.skip("PyTorch's allocator on the CPU does not tell what it holds")
    case = checked(where, "turns", torch.bfloat16)
    held = []
    for _ in range(4):
        case.step()
        finish(where)
        held.append(torch.cuda.memory_allocated(where))
    assert held[1:] == held[1:2] * 3
