# SPDX-License-Identifier: Apache-2.0
"""Which wrappings of a model for several processes let its genes be trained, and what is said of the others.

FSDP and DDP count on seeing each parameter's gradient once and in one place; genes are used by all blocks. How genes
are sharded rightly is in `pylearngene.sharding`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from pylearngene.errors import ShardingError
from pylearngene.functional._tap import Tap

if TYPE_CHECKING:
    from pylearngene.nn.bank import GeneBank

EXPECTED = "gene_bank: expected genes sharded by plg.fully_shard_genes(model, mesh), which shards the root as well"
REENTRANT = (
    "checkpoint: expected use_reentrant=False around gene-backed layers (DistributedDataParallel also takes "
    "static_graph=True), got reentrant checkpoints: each gives the genes a gradient of its own"
)
# Banks whose last forward was that of a DDP which takes each gradient once, and the reentrant passes that gave one.
_counted: weakref.WeakKeyDictionary[GeneBank, dict[tuple[int, int], int]] = weakref.WeakKeyDictionary()


class Sharded:
    """Mark of the bank of a model that `plg.fully_shard_genes` has sharded."""

    reentrant: ClassVar[bool] = False


def managed(module: nn.Module) -> bool:
    """Whether FSDP, of either kind, has the parameters of a module."""
    return bool(vars(module).get("_is_fsdp_managed_module", False))


def check_bank(bank: GeneBank) -> None:
    """Refuse genes that FSDP has in any way but that of `plg.fully_shard_genes`.

    Raises:
        ShardingError: it has them in another group.
    """
    if managed(bank) and not isinstance(bank, Sharded):
        raise ShardingError(f"{EXPECTED}, got them in another group of FSDP")


def check_wrapping(model: nn.Module, bank: GeneBank) -> None:
    """Refuse a model whose genes would be trained wrongly, before its forward; and note what DDP expects.

    Raises:
        ShardingError: FSDP has the genes in another way, or other parts of the model and not the genes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    check_bank(bank)
    if not managed(bank) and any(managed(module) for module in model.modules()):
        raise ShardingError(f"{EXPECTED}, got parts of the model sharded and the genes left out")
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and torch.is_grad_enabled():
        if ddp.require_backward_grad_sync and not ddp.static_graph:
            _counted[bank] = {}
        else:
            _counted.pop(bank, None)


def recomputed(bank: GeneBank, tap: Tap) -> Tap:
    """The tap for a layer that is called inside a backward pass, by a checkpoint.

    The graph made there is run by reentrant checkpoints alone, which is refused where a gene gets a second gradient.
    """
    given = _counted.get(bank)
    if given is None and not isinstance(bank, Sharded):
        return tap
    guarded = copy.copy(tap)
    guarded._parts = {}
    guarded.token = _guard(given, (torch._C._current_graph_task_id(), id(tap.ledger)), tap.token)
    return guarded


class _Guard(Function):
    @staticmethod
    def forward(ctx: Any, given: dict[tuple[int, int], int] | None, key: tuple[int, int], token: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.given, ctx.key = given, key
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inner = torch._C._current_graph_task_id()
        if ctx.given is None or ctx.given.setdefault(ctx.key, inner) != inner:
            raise ShardingError(REENTRANT)
        return None, None, grads[0]


_guard: Callable[..., Tensor] = _Guard.apply
