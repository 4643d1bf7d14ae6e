# SPDX-License-Identifier: Apache-2.0
"""Panels that take turns in one workspace: in order on the caller's stream, or two at once on two CUDA streams.

A panel is filled, then used. On a GPU one of the two runs on a stream beside the caller's, so that the next panel is
filled while one is in use; events order the rest, and nothing is remembered between calls. What fills and uses a panel
is in `expansion_regimes`, how many panels take turns in `plan`. Graphs, the compiler's among them, take all this as it
is: what leaves the caller's stream inside an operator comes back to it inside the same operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


class Turns:
    """One panel after the other, on the stream of the caller; entered before the first and left after the last.

    Attributes:
        slots: how many panels the workspace holds.
    """

    slots = 1

    def panels(self, lines: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(slot, first line, line after the last) of every panel."""
        for index, start in enumerate(range(0, lines, length)):
            yield index % self.slots, start, min(lines, start + length)

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def filling(self, slot: int) -> AbstractContextManager[Any]:
        """Around the work that writes the panel in a slot."""
        return _NOTHING

    def using(self, slot: int) -> AbstractContextManager[Any]:
        """Around the work that reads it."""
        return _NOTHING


IN_ORDER = Turns()


class Overlapped(Turns):
    """Two panels, filled on one stream and used on another; one of the two is the caller's.

    Once entered, the side stream begins after all work that the caller has queued, since genes may just have been
    written there, and the workspace marked; so both are made before. When left, the caller's stream goes on after all
    work of the side stream, so that the memory of the workspace may be given to others, and a graph that is being
    captured ends where it began; likewise when the work in between raises.

    Args:
        caller: the stream of the caller.
        side: the other.
        fills_aside: whether panels are filled on the side stream, or used there.
        event: makes an event.
        switch: makes a stream the current one, inside a `with` block.
    """

    slots = 2

    def __init__(
        self,
        caller: Any,
        side: Any,
        fills_aside: bool,
        event: Callable[[], Any] = torch.cuda.Event,
        switch: Callable[[Any], AbstractContextManager[Any]] = torch.cuda.stream,
    ) -> None:
        self._caller, self._side, self._switch = caller, side, switch
        self._filler, self._user = (side, caller) if fills_aside else (caller, side)
        self._fork, self._join = event(), event()
        self._filled, self._free = [event(), event()], [event(), event()]
        self._used = [False, False]

    def __enter__(self) -> Turns:
        self._fork.record(self._caller)
        self._side.wait_event(self._fork)
        return self

    def __exit__(self, *error: object) -> None:
        self._join.record(self._side)
        self._caller.wait_event(self._join)

    @contextmanager
    def filling(self, slot: int) -> Iterator[None]:
        """On the filling stream, after the last use of the slot."""
        if self._used[slot]:
            self._filler.wait_event(self._free[slot])
        with self._on(self._filler):
            yield
        self._filled[slot].record(self._filler)

    @contextmanager
    def using(self, slot: int) -> Iterator[None]:
        """On the using stream, after the slot was filled."""
        self._user.wait_event(self._filled[slot])
        with self._on(self._user):
            yield
        self._free[slot].record(self._user)
        self._used[slot] = True

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return _NOTHING if stream is self._caller else self._switch(stream)


@lru_cache(maxsize=256)
def _beside(device: torch.device, caller: int) -> torch.cuda.Stream:
    """The side stream of one of a device's streams, of high priority: what is filled there is waited for next.

    Each stream has its own: while one captures a graph, another that shared it would be captured with it.
    """
    return torch.cuda.Stream(device, priority=-1)


def turns(like: Tensor, panels: int, *, fills_aside: bool) -> Turns:
    """The order of panels on the device of a tensor: `panels` as `plan.turns` says, 1 for one after the other."""
    if panels < 2:
        return IN_ORDER
    caller = torch.cuda.current_stream(like.device)
    return Overlapped(caller, _beside(like.device, caller.stream_id), fills_aside)
