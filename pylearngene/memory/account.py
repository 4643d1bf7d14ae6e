# SPDX-License-Identifier: Apache-2.0
"""`MemoryEstimate`: what one step holds on one device, by what it is for, and at its peak; it prints as a table.

How the numbers come to be is in `estimate` and `ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch

from pylearngene.memory.ledger import Block

#: What a block can be for, in the order of the table, and what that means.
KINDS = {
    "weights": "parameters and buffers",
    "gradients": "of all parameters that are trained",
    "optimizer": "its state",
    "activations": "what the forward pass leaves for the backward pass",
    "inputs": "the batch",
    "workspace": "panels inside operators, workspaces of libraries",
    "transients": "everything else that lives at the peak",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate_memory` found for one device, in bytes; `print` shows it as a table.

    Attributes:
        device: where.
        weights: parameters and buffers of the model.
        gradients: of all parameters that get one, when the backward pass is done.
        optimizer: state of the optimizer, from the first step on.
        activations: what the forward pass makes and leaves for the backward pass; results and the loss are in it.
        inputs: the batch.
        workspace: the most that operators of this library hold inside themselves, and what the BLAS keeps on a GPU.
        transients: whatever else lives at the peak: temporaries, gradients of activations, recomputed activations.
        peak: the most that is held at once; it need not be the sum, since not everything lives at that time.
        moment: "forward", "backward" or "optimizer": when the peak is reached.
        at_peak: bytes of each of these kinds that live at the peak; they add up to it.
        elsewhere: the same of other devices, for a model that is spread over several.
    """

    device: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    inputs: int
    workspace: int
    transients: int
    peak: int
    moment: str
    at_peak: Mapping[str, int] = field(repr=False)
    elsewhere: tuple[MemoryEstimate, ...] = ()

    def __str__(self) -> str:
        rows = [("", "held", "at the peak", "")]
        for kind, meaning in KINDS.items():
            rows.append((kind, readable(getattr(self, kind)), readable(self.at_peak[kind]), meaning))
        when = "in the optimizer's step" if self.moment == "optimizer" else f"in the {self.moment} pass"
        rows.append(("peak", "", readable(self.peak), when))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"memory of one step on {self.device}"]
        for name, held, then, meaning in rows:
            numbers = f"{held.rjust(widths[1])}  {then.rjust(widths[2])}"
            lines.append(f"  {name.ljust(widths[0])}  {numbers}  {meaning}".rstrip())
        return "\n".join([*lines, *map(str, self.elsewhere)])


@dataclass(frozen=True)
class Times:
    """Numbers of events in a ledger: where the forward pass, the backward pass and the optimizer's step begin."""

    forward: int
    backward: int
    optimizer: int

    def moment(self, event: int) -> str:
        """The part of the step that an event belongs to."""
        return "forward" if event < self.backward else "backward" if event < self.optimizer else "optimizer"


def account(events: list[tuple[Block, int]], times: Times, device: torch.device, constant: int) -> MemoryEstimate:
    """Sum up what a ledger has of one device.

    Args:
        events: all of the ledger, with every block labelled that has a purpose.
        times: of the step.
        device: which.
        constant: bytes that libraries hold there all the time.
    """
    mine = [(number, block, added) for number, (block, added) in enumerate(events) if block.device == device]
    held: dict[str, int] = dict.fromkeys(KINDS, 0)
    for block in {id(block): block for _, block, _ in mine}.values():
        kind = block.label or "transients"
        held[kind] = max(held[kind], block.size) if kind == "workspace" else held[kind] + block.size
    # In every step but the first the optimizer's state is there from the beginning.
    state = [(number, block, added) for number, block, added in mine if block.label == "optimizer" and added > 0]
    early = {number for number, _, _ in state}
    mine = [*((times.forward, block, added) for _, block, added in state), *(e for e in mine if e[0] not in early)]
    mine.sort(key=lambda event: event[0])
    totals = list(accumulate((added for _, _, added in mine), initial=0))
    peak = max(totals)
    top = totals.index(peak)
    at_peak = dict.fromkeys(KINDS, 0)
    for _, block, added in mine[:top]:
        at_peak[block.label or "transients"] += added
    held["workspace"] += constant
    at_peak["workspace"] += constant
    held["transients"] = at_peak["transients"]
    moment = times.moment(mine[top - 1][0]) if top else "forward"
    kinds: dict[str, Any] = held
    return MemoryEstimate(str(device), **kinds, peak=peak + constant, moment=moment, at_peak=MappingProxyType(at_peak))


def readable(count: int) -> str:
    """Show a number of bytes with a binary unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
