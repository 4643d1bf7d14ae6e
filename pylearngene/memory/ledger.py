# SPDX-License-Identifier: Apache-2.0
"""A ledger of storages: which are made, how large they are and when they are let go, while operators run on fakes.

It sees what operators return; what they hold inside themselves is told by `workspace`. Nothing is computed here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylearngene.errors import ArgumentError
from pylearngene.memory.workspace import workspace_of

#: Multiples of bytes that the caching allocator of CUDA hands out.
CUDA_BLOCK = 512


@dataclass(eq=False)
class Block:
    """One storage.

    Attributes:
        device: where it lies.
        size: bytes, as its allocator counts them.
        made: number of its first event in the ledger.
        label: what it is for; empty as long as nobody said.
        alive: refers to the storage; None for what an operator holds inside itself.
    """

    device: torch.device
    size: int
    made: int
    label: str = ""
    alive: weakref.ref[Any] | None = None


class Ledger(TorchDispatchMode):
    """Writes down every storage that is made and let go, in order, while it is entered (inside a fake mode).

    Attributes:
        events: (block, added bytes), the bytes negative where the block is let go.
        blocks: those that live, by the address of their storage's record.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[Block, int]] = []
        self.blocks: dict[int, Block] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        if func.namespace == "pylearngene":
            device, size = workspace_of(func, args)
            inside = Block(device, rounded(size, device), len(self.events), "workspace")
            self.events += [(inside, inside.size), (inside, -inside.size)]
        return result

    def see(self, tensor: Tensor) -> None:
        """Write down a tensor's storage, unless it is known; the meta device has none.

        Raises:
            ArgumentError: it is sparse.
        """
        if tensor.device.type == "meta":
            return
        if tensor.layout is not torch.strided:
            raise ArgumentError(f"model: expected a step of dense tensors, got one with {tensor.layout}")
        storage = tensor.untyped_storage()
        place = storage._cdata
        size = rounded(storage.nbytes(), tensor.device)
        block = self.blocks.get(place)
        if block is None:
            alive = weakref.ref(storage, partial(self._gone, place))
            block = self.blocks[place] = Block(tensor.device, 0, len(self.events), alive=alive)
        if size != block.size:  # a new one, or one that was resized
            self.events.append((block, size - block.size))
            block.size = size

    def _gone(self, place: int, _reference: Any) -> None:
        block = self.blocks.pop(place)
        self.events.append((block, -block.size))

    def label(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of these tensors are for, where nobody has."""
        for tensor in tensors:
            self.see(tensor)
            block = self.blocks.get(tensor.untyped_storage()._cdata)
            if block is not None:
                block.label = block.label or name

    def label_since(self, name: str, event: int) -> None:
        """Say what all storages that live and were made since an event are for, where nobody has."""
        for block in self.blocks.values():
            if block.made >= event:
                block.label = block.label or name


def rounded(size: int, device: torch.device) -> int:
    """Bytes that the allocator of a device takes for `size` bytes."""
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK if device.type == "cuda" else size
