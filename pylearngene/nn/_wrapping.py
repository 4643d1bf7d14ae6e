# SPDX-License-Identifier: Apache-2.0
"""Which wrappings of a model for several processes let its genes be trained, and what is said of the others.

FSDP and DDP count on seeing each parameter's gradient once and in one place; genes are used by all blocks. How genes
are sharded rightly is in `pylearngene.sharding`.
"""

from __future__ import annotations

import copy
import sys
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pylearngene.errors import ShardingError
from pylearngene.functional._tap import Ledger, Tap

if TYPE_CHECKING:
    from pylearngene.nn.bank import GeneBank

EXPECTED = "gene_bank: expected genes sharded by plg.fully_shard_genes(model, mesh), which shards the root as well"
REENTRANT = (
    "checkpoint: expected use_reentrant=False around gene-backed layers (DistributedDataParallel also takes "
    "static_graph=True), got reentrant checkpoints: each gives the genes a gradient of its own"
)
# Banks whose last forward was that of a DDP which takes each gradient once, and which reentrant pass gave each. Where
# DDP looks for unused parameters it takes none from such passes, so None stands for all.
_Given = dict[tuple[int, int], int] | None
_counted: weakref.WeakKeyDictionary[GeneBank, _Given] = weakref.WeakKeyDictionary()


class Sharded:
    """Mark of the bank of a model that `plg.fully_shard_genes` has sharded."""


def managed(module: nn.Module) -> bool:
    """Whether FSDP, of either kind, has the parameters of a module."""
    return bool(vars(module).get("_is_fsdp_managed_module", False))


def in_group() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized()


def wrongly_wrapped(model: nn.Module, bank: GeneBank) -> str:
    """What FSDP has of a model that keeps its genes from being trained; empty where nothing does."""
    if isinstance(bank, Sharded):
        return ""
    if managed(bank):
        return f"{EXPECTED}, got them in another group of FSDP"
    if any(managed(module) for module in model.modules()):
        return f"{EXPECTED}, got parts of the model sharded and the genes left out"
    return ""


# Answered once, while a graph is traced.
wrongly_wrapped._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_bank(bank: GeneBank) -> None:
    """Refuse genes that FSDP has in any way but that of `plg.fully_shard_genes`.

    Raises:
        ShardingError: it has them in another group.
    """
    if managed(bank) and not isinstance(bank, Sharded):
        raise ShardingError(wrongly_wrapped(bank, bank))


def check_whole(bank: GeneBank) -> None:
    """Refuse genes of which each process has a part.

    Raises:
        ShardingError: they are sharded.
    """
    if isinstance(bank, Sharded):
        raise ShardingError(
            "net: expected a network that is not sharded, got one whose genes are; load its full state dict "
            "(torch.distributed.checkpoint.state_dict) into a network of its kind"
        )


def check_wrapping(model: nn.Module, bank: GeneBank) -> None:
    """Refuse a model whose genes would be trained wrongly, before its forward; and note what DDP expects.

    Raises:
        ShardingError: FSDP has the genes in another way, or other parts of the model and not the genes.
    """
    if not in_group():
        return
    check_bank(bank)
    if "torch.distributed.fsdp" in sys.modules:  # looked up every time: blocks may be sharded later
        wrong = wrongly_wrapped(model, bank)
        if wrong:
            raise ShardingError(wrong)
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and torch.is_grad_enabled():
        if ddp.require_backward_grad_sync and not ddp.static_graph:
            _counted[bank] = None if ddp.find_unused_parameters else {}
        else:
            _counted.pop(bank, None)


def recomputed(bank: GeneBank, tap: Tap) -> Tap:
    """The tap for a layer that is called inside a backward pass, by a checkpoint.

    The graph made there is run by reentrant checkpoints alone, which is refused where a gene gets a second gradient.
    """
    if bank not in _counted and not isinstance(bank, Sharded):
        return tap
    guarded = copy.copy(tap)
    guarded._parts = {}
    guarded.ledger = cast(Ledger, _Guarded(tap.ledger, _counted.get(bank)))
    return guarded


class _Guarded:
    """A ledger that opens for one reentrant pass of the backward pass at hand, or for none."""

    def __init__(self, ledger: Ledger, given: _Given) -> None:
        self._ledger, self._given = ledger, given
        self._key = torch._C._current_graph_task_id(), id(ledger)

    def sums(self, *arguments: Any) -> list[Tensor | None]:
        """As `Ledger.sums`."""
        self._check()
        return self._ledger.sums(*arguments)

    def buffers(self, *arguments: Any) -> list[Tensor]:
        """As `Ledger.buffers`."""
        self._check()
        return self._ledger.buffers(*arguments)

    def _check(self) -> None:
        inner = torch._C._current_graph_task_id()
        if self._given is None or self._given.setdefault(self._key, inner) != inner:
            raise ShardingError(REENTRANT)
