# SPDX-License-Identifier: Apache-2.0
"""One ordinary gradient per gene and backward pass, however many layers use it.

A *tap* is an autograd node ahead of all layers that share a group of genes. Each layer's backward adds to one
accumulator per gene; the tap runs last and hands the sum to autograd. Accumulators live inside one backward pass,
keyed by the engine's graph-task id, so that nested, repeated and concurrent passes never mix; they are owned by the
engine's graph task, so that a pass that fails leaves none behind. autograd knows nothing of their dependencies, so on a
GPU every stream that adds to them waits here for the one before it.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, Variable

from pylearngene.functional._single_backward import anchor, single_backward

# What a tap depends on in each gene, besides its identity.
_TRAITS = attrgetter("shape", "dtype", "device", "requires_grad", "is_leaf")
# From as many passes on, those that have failed are forgotten.
_MANY_PASSES = 16
_queue_callback = Variable._execution_engine.queue_callback


class _Pass:
    """One backward pass in flight: the sums so far, and what they depend on (for `create_graph=True`).

    `reached` are genes that a layer has times 0: without a sum, their gradient is zeros. `last` tells the stream that
    added last, by number and itself.
    """

    __slots__ = ("__weakref__", "anchors", "last", "reached", "sums")

    def __init__(self, genes: int) -> None:
        self.sums: list[Tensor | None] = [None] * genes
        self.last: tuple[int | None, Any] = (None, None)
        self.anchors: list[Tensor] = []
        self.reached: set[int] | None = None

    def __call__(self) -> None:
        """Nothing to do at the end of the pass: it is a callback of the engine so that the engine owns it."""


def stream_on(device: torch.device) -> int | None:
    """The number of the current stream of a CUDA device; None elsewhere, and where tensors are no real ones."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    number: int = torch._C._cuda_getCurrentRawStream(device.index)
    return number


class Ledger:
    """The accumulators of one group of genes, per backward pass in flight.

    Args:
        genes: the tensors that get a gradient, all of them requiring one.
    """

    def __init__(self, genes: Sequence[Tensor]) -> None:
        self._like = [(gene.shape, gene.dtype, gene.device) for gene in genes]
        self._summed_as_they_are = all(gene.dtype in (torch.float32, torch.float64) for gene in genes)
        self._device = genes[0].device
        self._on_streams = stream_on(self._device) is not None
        # Weak: devices have threads of their own, so no thread tells whose pass it was and whether it still runs.
        self._open: dict[int, weakref.ref[_Pass]] = {}
        self._lock = threading.Lock()

    def sums(self, anchors: Sequence[Tensor | None] = (), unread: Sequence[int] = ()) -> list[Tensor | None]:
        """The running pass's sums, None for genes that no layer has added to: who writes the first one puts it there.

        `unread` are genes whose coefficient is 0 where these are used.
        """
        with self._lock:
            return self._running(anchors, unread).sums

    def buffers(
        self, slots: Sequence[int], anchors: Sequence[Tensor | None] = (), unread: Sequence[int] = ()
    ) -> list[Tensor]:
        """The running pass's accumulators of some genes, zeros at first; float32 (float64 for float64 genes)."""
        with self._lock:
            running = self._running(anchors, unread)
            return [self._sum(running, slot) for slot in slots]

    def _running(self, anchors: Sequence[Tensor | None], unread: Sequence[int]) -> _Pass:
        """The pass that runs here, opened where none of the layers has yet."""
        task = torch._C._current_graph_task_id()
        known = self._open.get(task)
        running = None if known is None else known()
        if running is None:
            if len(self._open) >= _MANY_PASSES:
                self._open = {number: each for number, each in self._open.items() if each() is not None}
            running = _Pass(len(self._like))
            self._open[task] = weakref.ref(running)
            _queue_callback(running)
        if anchors:
            running.anchors.extend(t for t in anchors if t is not None and t.requires_grad)
        if unread:
            running.reached = {*(running.reached or ()), *unread}
        if self._on_streams:
            self._follow(running)
        return running

    def _follow(self, running: _Pass) -> None:
        """Let the current stream begin after what another one has added."""
        number, (before, stream) = stream_on(self._device), running.last
        if number == before:
            return
        here = torch.cuda.current_stream(self._device)
        if before is not None:
            here.wait_stream(stream)
            for total in running.sums:
                if total is not None:
                    total.record_stream(here)
        running.last = (number, here)

    def _sum(self, running: _Pass, slot: int) -> Tensor:
        total = running.sums[slot]
        if total is None:
            shape, dtype, device = self._like[slot]
            work = torch.float64 if dtype == torch.float64 else torch.float32
            # Sizes one by one, which torch reads faster than a list of them.
            total = running.sums[slot] = torch.zeros(*shape, dtype=work, device=device)
        return total

    def take(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """Close the running pass: its sums in the genes' dtypes (None where no layer added), and their anchors."""
        with self._lock:
            known = self._open.pop(torch._C._current_graph_task_id(), None)
        done = None if known is None else known()
        if done is None:
            return [None] * len(self._like), []
        if self._on_streams:
            self._follow(done)
        for slot in done.reached or ():
            self._sum(done, slot)
        sums, anchors = done.sums, done.anchors
        done.sums, done.anchors = [], []  # the engine keeps the rest until the pass ends
        if self._summed_as_they_are:
            return sums, anchors
        return [
            total if total is None else total.to(dtype) for total, (_, dtype, _) in zip(sums, self._like, strict=True)
        ], anchors


class Tap:
    """A token that layers consume, and the ledger they add to.

    Args:
        genes: leaf tensors of one group, of which at least one requires a gradient.
        weights: how many of them, from the front, are weights; the others are biases.

    Attributes:
        wanted, bias_wanted: which weights and biases, among those that a layer is given, get a gradient.
        slots, bias_slots: where the ledger has their accumulators.
        places, bias_places: the same by weight and by bias, -1 for one that gets none.
        unread, bias_unread: slots of genes that the layer is not given, since it has them times 0.
    """

    def __init__(self, genes: Sequence[Tensor], weights: int) -> None:
        wanted = [k for k, gene in enumerate(genes) if gene.requires_grad]
        self.wanted = [k for k in wanted if k < weights]
        self.bias_wanted = [k - weights for k in wanted if k >= weights]
        self.slots = list(range(len(self.wanted)))
        self.bias_slots = list(range(len(self.wanted), len(wanted)))
        self.places = _places(self.wanted, self.slots, weights)
        self.bias_places = _places(self.bias_wanted, self.bias_slots, len(genes) - weights)
        self.unread: list[int] = []
        self.bias_unread: list[int] = []
        leaves = [genes[k] for k in wanted]
        self.ledger = Ledger(leaves)
        self.token = _tap(self.ledger, *leaves)
        self.node: Any = self.token.grad_fn
        self._genes, self._traits = tuple(genes), list(map(_TRAITS, genes))
        self._stream = stream_on(leaves[0].device)
        self._count = weights
        self._parts: dict[tuple[int, int, int], Tap] = {}

    def fits(self, genes: Sequence[Tensor]) -> bool:
        """Whether these are the tensors it was made of, and as they were then: asked in every call, hence in C.

        While a GPU captures a graph, also whether its node of autograd belongs to the stream that is captured.
        """
        if self._stream is not None and self.elsewhere() and torch.cuda.is_current_stream_capturing():
            return False
        same = len(genes) == len(self._genes) and all(map(is_, genes, self._genes))
        return same and list(map(_TRAITS, genes)) == self._traits

    def elsewhere(self) -> bool:
        """Whether it was made on another stream of a GPU than the current one: there its node of autograd runs."""
        return self._stream is not None and self._stream != stream_on(self._genes[0].device)

    def part(self, used: slice) -> Tap:
        """The tap for a layer that is given only some of the genes, those at `used` of weights and of biases."""
        chosen = range(self._count)[used]
        place = (chosen.start, chosen.stop, chosen.step)
        if place not in self._parts:
            part = self._parts[place] = copy.copy(self)
            part._parts = {}
            part.wanted, part.slots, part.unread = _choose(self.wanted, self.slots, chosen)
            part.bias_wanted, part.bias_slots, part.bias_unread = _choose(self.bias_wanted, self.bias_slots, chosen)
            part.places, part.bias_places = self.places[used], self.bias_places[used]
        return self._parts[place]


def _choose(wanted: list[int], slots: list[int], chosen: range) -> tuple[list[int], list[int], list[int]]:
    """Split slots by whether their gene is chosen; the chosen ones also as positions among the chosen genes."""
    pairs = list(zip(wanted, slots, strict=True))
    kept = [(chosen.index(k), slot) for k, slot in pairs if k in chosen]
    return [k for k, _ in kept], [slot for _, slot in kept], [slot for k, slot in pairs if k not in chosen]


def _places(wanted: Sequence[int], slots: Sequence[int], count: int) -> list[int]:
    """Slots by gene, -1 for those that are not wanted."""
    slot_of = dict(zip(wanted, slots, strict=True))
    return [slot_of.get(k, -1) for k in range(count)]


class _TapNode(Function):
    @staticmethod
    def forward(ctx: Any, ledger: Ledger, *genes: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.ledger = ledger
        return torch.zeros((), device=genes[0].device)

    @staticmethod
    @single_backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        sums, anchors = ctx.ledger.take()
        anchor(ctx, *anchors)
        return None, *sums


_tap: Callable[..., Tensor] = _TapNode.apply
