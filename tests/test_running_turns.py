# SPDX-License-Identifier: Apache-2.0
"""Panels that take turns on two streams: whatever order a GPU would run them in, results are those of one stream.

The streams here are queues on the host. Work is put off, and run afterwards in orders that a GPU is free to choose:
first to last within a stream, a wait after what it waits for, all else at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pylearngene as plg
from pylearngene._ops import expansion_regimes as regimes
from pylearngene._ops import expansion_turns
from pylearngene._ops.expansion_turns import IN_ORDER, Overlapped, turns

ORDERS = 40
DTYPES = (torch.float32, torch.bfloat16)


class Token:
    """One moment of one stream."""

    passed = False


class Stream:
    """A queue of work, of moments to pass and of moments to wait for."""

    def __init__(self) -> None:
        self.queue: list[Any] = []

    def wait_event(self, event: Event) -> None:
        if event.token is not None:  # waiting for an event that was never recorded is waiting for nothing
            self.queue.append(event.token)

    def ready(self) -> bool:
        return bool(self.queue) and (not isinstance(self.queue[0], Token) or self.queue[0].passed)

    def step(self) -> None:
        first = self.queue.pop(0)
        if not isinstance(first, Token):
            first()


class Event:
    """A wait is for the last record before it."""

    def __init__(self) -> None:
        self.token: Token | None = None

    def record(self, stream: Stream) -> None:
        token = self.token = Token()
        stream.queue.append(lambda: setattr(token, "passed", True))


class Machine:
    """Two streams; what the regimes do to memory is put off to the current one."""

    def __init__(self) -> None:
        self.caller, self.side = Stream(), Stream()
        self.current = self.caller
        self.made: list[Tensor] = []

    @contextmanager
    def switch(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def put_off(self, work: Callable[..., Any]) -> Callable[..., None]:
        return lambda *a, **k: self.current.queue.append(lambda: work(*a, **k))

    def emptying(self) -> Callable[..., Tensor]:
        """`new_empty`, marked by work of the current stream, as PyTorch does for deterministic algorithms."""

        def new_empty(like: Tensor, *size: Any, **options: Any) -> Tensor:
            made = torch.empty(*size, dtype=options.get("dtype", like.dtype))
            self.current.queue.append(lambda: made.fill_(torch.nan))
            if self.current is self.caller:
                self.made.append(made)
            return made

        return new_empty

    def run(self, choose: Callable[[list[Stream]], Stream]) -> None:
        while self.caller.queue or self.side.queue:
            ready = [stream for stream in (self.caller, self.side) if stream.ready()]
            assert ready, "both streams wait for each other"
            choose(ready).step()


def orders() -> Iterator[Callable[[list[Stream]], Stream]]:
    yield lambda ready: ready[0]
    yield lambda ready: ready[-1]
    for seed in range(ORDERS):
        yield random.Random(seed).choice


def run(
    call: Callable[[list[Tensor]], Tensor | None],
    genes: list[Tensor],
    kind: type[Overlapped],
    count: int,
    choose: Callable[[list[Stream]], Stream],
) -> Tensor | None:
    """A call with `count` panels in turn, genes written by the caller's stream just before, its memory reused after."""
    machine = Machine()
    late = [torch.full_like(gene, torch.nan) for gene in genes]
    for old, new in zip(late, genes, strict=True):
        machine.caller.queue.append(lambda old=old, new=new: old.copy_(new))
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((regimes, "fill"), (regimes, "accumulate"), (regimes, "_add"), (torch, "mm")):
            patch.setattr(owner, name, machine.put_off(getattr(owner, name)))
        patch.setattr(torch, "addmm", machine.put_off(torch.addmm))
        patch.setattr(torch.Tensor, "new_empty", machine.emptying())
        patch.setattr(regimes, "_count", lambda *_: count)
        patch.setattr(regimes, "_gradient_count", lambda *_: count)
        patch.setattr(
            expansion_turns, "turns",
            lambda like, panels, fills_aside: kind(machine.caller, machine.side, fills_aside, Event, machine.switch),
        )  # fmt: skip
        result = call(late)
    for made in machine.made:
        if made is not result and not (result is not None and made.data_ptr() == result.data_ptr()):
            machine.caller.queue.append(lambda made=made: made.fill_(torch.nan))
    machine.run(choose)
    return result


class Case:
    """One weight of three panels and a short one, and the three calls that go through panels."""

    def __init__(self, dtype: torch.dtype, out: int = 39, inner: int = 70) -> None:
        self.genes = [torch.randn(out, inner) for _ in range(3)]
        self.coeffs, self.bias = torch.randn(3), torch.randn(out).to(dtype)
        self.x, self.dy = torch.randn(50, inner).to(dtype), torch.randn(50, out).to(dtype)
        self.start = torch.randn(out, inner)
        self.buffers: list[Tensor] = []

    def forward(self, genes: list[Tensor]) -> Tensor:
        return regimes.forward(self.x, genes, self.coeffs, self.bias)

    def input_gradient(self, genes: list[Tensor]) -> Tensor:
        return regimes.input_gradient(self.dy, genes, self.coeffs)

    def gene_gradients(self, genes: list[Tensor]) -> Tensor | None:
        self.buffers = [self.start.clone() for _ in genes]
        return regimes.gene_gradients(
            [self.buffers[0], None, self.buffers[2]], self.dy, self.x, genes, self.coeffs, True
        )

    def all(self, call: Callable[[Callable[[list[Tensor]], Tensor | None]], Tensor | None]) -> list[Tensor]:
        """What a way of calling gives for the three."""
        found = [call(self.forward), call(self.input_gradient), call(self.gene_gradients)]
        return [*found, *self.buffers]


@pytest.fixture(autouse=True)
def panels() -> Iterator[None]:
    plg.set_regime("panel")
    yield
    plg.set_regime("auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_order_of_two_streams_gives_the_bits_of_one(dtype: torch.dtype, count: int) -> None:
    case = Case(dtype)
    with pytest.MonkeyPatch.context() as patch:  # the same panels, one after the other
        patch.setattr(regimes, "_count", lambda *_: count)
        patch.setattr(regimes, "_gradient_count", lambda *_: count)
        patch.setattr(expansion_turns, "turns", lambda *_, **__: IN_ORDER)
        expected = case.all(lambda call: call(case.genes))
    assert not any(tensor.isnan().any() for tensor in expected)
    for choose in orders():
        got = case.all(lambda call, choose=choose: run(call, case.genes, Overlapped, count, choose))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def without(part: str) -> type[Overlapped]:
    """The order with one of its events left out."""

    class Lost(Overlapped):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            events = getattr(self, part)
            for event in events if isinstance(events, list) else [events]:
                event.record = lambda stream: None

    return Lost


@pytest.mark.parametrize("part", ["_fork", "_join", "_filled", "_free"])
def test_without_one_of_its_events_some_order_is_wrong(part: str) -> None:
    """So that the test above is known to see each of them."""
    case = Case(torch.float32)
    expected = case.all(lambda call: run(call, case.genes, Overlapped, 4, lambda ready: ready[0]))
    wrong = 0
    for choose in orders():
        got = case.all(lambda call, choose=choose: run(call, case.genes, without(part), 4, choose))
        wrong += not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert wrong


def test_the_next_panel_is_filled_while_one_is_in_use() -> None:
    """Fill 0, then fill 1 and use 0 at once: the side stream alone gets as far as its second panel."""
    machine, log = Machine(), list[str]()
    order = Overlapped(machine.caller, machine.side, True, Event, machine.switch)
    with order:
        for slot, start, _ in order.panels(40, 10):
            with order.filling(slot):
                machine.put_off(log.append)(f"fill {start}")
            with order.using(slot):
                machine.put_off(log.append)(f"use {start}")
    while machine.caller.ready() and not log:
        machine.caller.step()  # the fork
    while machine.side.ready():
        machine.side.step()
    assert log == ["fill 0", "fill 10"]
    machine.run(lambda ready: ready[0])
    assert sorted(log, key=lambda entry: int(entry.split()[1])) == [
        f"{what} {start}" for start in (0, 10, 20, 30) for what in ("fill", "use")
    ]


def test_streams_are_joined_when_a_panel_fails() -> None:
    machine, done = Machine(), list[str]()

    def half() -> None:
        with Overlapped(machine.caller, machine.side, True, Event, machine.switch) as order, order.filling(0):
            machine.put_off(done.append)("half a panel")
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        half()
    machine.put_off(done.append)("memory is reused")
    machine.run(lambda ready: ready[0])
    assert done == ["half a panel", "memory is reused"]


def test_side_streams_belong_to_one_stream_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, int]] = []

    class Made:
        def __init__(self, device: Any, priority: int) -> None:
            made.append((device, priority))

    monkeypatch.setattr(torch.cuda, "Stream", Made)
    monkeypatch.setattr(expansion_turns, "Overlapped", lambda caller, side, fills_aside: SimpleNamespace(side=side))
    expansion_turns._beside.cache_clear()
    sides: dict[tuple[str, int], Any] = {}
    try:
        for device, number in (("cuda:0", 0), ("cuda:0", 3), ("cuda:1", 0), ("cuda:0", 0)):
            current = SimpleNamespace(stream_id=number)
            monkeypatch.setattr(torch.cuda, "current_stream", lambda asked, current=current: current)
            order: Any = turns(SimpleNamespace(device=torch.device(device)), 2, fills_aside=True)  # type: ignore[arg-type]
            assert order.side is sides.setdefault((device, number), order.side)
    finally:
        expansion_turns._beside.cache_clear()
    assert len(set(map(id, sides.values()))) == 3
    assert [(str(device), priority) for device, priority in made] == [("cuda:0", -1), ("cuda:0", -1), ("cuda:1", -1)]


def test_small_products_and_the_cpu_know_no_streams() -> None:
    like = torch.empty(1 << 13, 1)
    assert turns(like, 1, fills_aside=True) is IN_ORDER
    assert regimes._count(like, 1 << 12, 1 << 12, 4) == regimes._gradient_count(like, 1 << 12, 1 << 12, 4) == 1
