# SPDX-License-Identifier: Apache-2.0
"""`fully_shard_genes`: a gene-backed network with parameters, gradients and optimizer states split over processes.

Genes are gathered once per forward pass and kept until its backward has run; each then has one gradient, which is
reduced with all others in one message. Optimizers, checkpoints and everything outside the genes are torch's FSDP2.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.errors import ArgumentError, BackendError, MethodError, ShardingError
from pylearngene.nn import ExpansionModule, GeneBank, LowRankLinear
from pylearngene.nn._pass import Pass, plain_class
from pylearngene.nn._wrapping import EXPECTED, Sharded, managed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["fully_shard_genes"]


def fully_shard_genes(
    model: nn.Module, mesh: DeviceMesh | None = None, mp_policy: MixedPrecisionPolicy | None = None
) -> nn.Module:
    """Shard a gene-backed network by FSDP2 in place: its genes as one group, then everything not sharded yet.

    Each process keeps its part of every parameter as a DTensor. A forward pass gathers the genes once and keeps them
    until its backward has run (`reshard_after_forward=False`, as all blocks read them); the backward pass reduces one
    gradient per gene, all of them in one message.

    Large parameters of blocks may be sharded before, each block by `torch.distributed.fsdp.fully_shard`; the root is
    sharded here. Make the optimizer afterwards, and call the model, not its parts.

    Args:
        model: a gene-backed network, the same in all processes; may be on the meta device.
        mesh: one axis, or two for replicas of shards; None is all processes.
        mp_policy: dtypes of gathered parameters and of reduced gradients, of genes and of all others; None is theirs.
            Genes are gathered in `param_dtype`; their gradients, summed in float32, are rounded to it once.

    Returns:
        `model` itself.

    Raises:
        BackendError: this torch has no `torch.distributed.fsdp.fully_shard`.
        MethodError: `model` is a plain model.
        ShardingError: the model or its genes are sharded already; and at run time: the genes are resharded after a
            forward pass, a layer is called outside of one, or checkpoints are reentrant.
        ArgumentError: `mp_policy` is no policy, or has a `param_dtype` of 16 bits where layers learn coefficients or
            strengths; `mesh` is no mesh of one or two axes; or a parameter is a scalar.
        DTypeError: a gene is a tensor subclass.

    Numerics: gradients are those of one process up to the order of the sum over processes.

    Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023.

    Example:
        >>> import pylearngene as plg
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> def shard(net):  # in every process
        ...     plg.fully_shard_genes(net, init_device_mesh("cpu", (2,)))
        ...     return torch.optim.AdamW(net.parameters())
    """
    fsdp: Any = importlib.import_module("torch.distributed.fsdp") if dist.is_available() else None
    if not hasattr(fsdp, "fully_shard"):
        raise BackendError(f"torch: expected one with torch.distributed.fsdp.fully_shard, got {torch.__version__}")
    bank = _bank_of(model)
    if managed(model) or managed(bank):
        raise ShardingError(f"{EXPECTED}, got a model whose {'root' if managed(model) else 'bank'} is sharded already")
    for name, gene in bank.named_genes():
        _checks.tensor(gene, name)
    policy = fsdp.MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if not isinstance(policy, fsdp.MixedPrecisionPolicy):
        raise ArgumentError(f"mp_policy: expected a MixedPrecisionPolicy of FSDP2, or None, got {policy!r}")
    _check_policy(model, policy)
    _check_mesh(mesh)
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ArgumentError(
            f"model: expected parameters with axes, as FSDP2 takes no others, got the scalar {scalars[0]}"
        )
    plain = type(bank)
    # What FSDP's hooks do is not for compiled graphs: these end where genes are used.
    eager = {name: torch.compiler.disable(getattr(_ShardedBank, name)) for name in _ShardedBank.eager}
    bank.__class__ = type("GeneBank", (_ShardedBank, plain), {"__doc__": GeneBank.__doc__, **eager})
    # What the bank is given and returns is the layers' business: genes alone are cast.
    own = dataclasses.replace(policy, output_dtype=None, cast_forward_inputs=False)
    try:
        fsdp.fully_shard(bank, mesh=mesh, reshard_after_forward=False, mp_policy=own)
    except BaseException:
        bank.__class__ = plain
        raise
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _bank_of(model: nn.Module) -> GeneBank:
    bank = getattr(model, "gene_bank", None)
    if not isinstance(bank, GeneBank) or plain_class(model) is type(model):
        raise MethodError(f"model: expected one that a gene bank is attached to, got a plain {type(model).__name__}")
    return bank


def _check_mesh(mesh: object) -> None:
    """Refuse what is no mesh, or has axes that FSDP knows no use for."""
    if mesh is None:
        return
    device_mesh: Any = importlib.import_module("torch.distributed.device_mesh").DeviceMesh
    if not isinstance(mesh, device_mesh) or mesh.ndim not in (1, 2):
        raise ArgumentError(f"mesh: expected a DeviceMesh of one or two axes, or None, got {mesh!r}")


def _check_policy(model: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Refuse to round what layers keep in float32 whatever the model's dtype: coefficients and strengths they learn."""
    if policy.param_dtype not in _checks.HALF:
        return
    for path, layer in model.named_modules():
        if isinstance(layer, LowRankLinear) or (isinstance(layer, ExpansionModule) and layer.learn_coeffs):
            raise ArgumentError(
                f"mp_policy: expected param_dtype None or float32 where layers learn coefficients or strengths, which "
                f"stay in float32, got {_checks.short(policy.param_dtype)} and {path}"
            )


class _Sealed:
    """Arguments of the bank, out of FSDP's sight."""

    def __init__(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.inputs, self.options = inputs, options


class _ShardedBank(Sharded, GeneBank):
    """A bank whose genes are DTensors outside of forward passes.

    FSDP would reshard the genes and reduce what gradients there are once the backward pass reaches the inputs of any
    call of the bank that it sees to require gradients. It does so once, when the whole backward pass is over, where it
    sees none; by then the taps have handed over every gene's gradient.
    """

    eager: ClassVar = ("__call__", "open_pass", "close_pass")

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if self.current_pass() is None and torch._C._current_graph_task_id() == -1:
            raise ShardingError("layer: expected a call inside a forward pass of the sharded model, got one alone")
        result = super().__call__(_Sealed(inputs, options))
        gene = next(self.named_genes())[1]
        if type(gene) is not nn.Parameter:
            raise ShardingError(
                "reshard_after_forward: expected False for the gene bank, as plg.fully_shard_genes sets it (the next "
                "layer reads the same genes), got genes that are sharded again"
            )
        return result

    def forward(self, sealed: _Sealed) -> Any:  # type: ignore[override]
        """As `GeneBank.forward`; FSDP hangs its backward hook on the result, which views would lose in place."""
        result = super().forward(*sealed.inputs, **sealed.options)
        return result.clone() if isinstance(result, Tensor) and result._base is not None else result

    def open_pass(self) -> Pass | None:
        """Begin a pass; it gathers the genes anew, for those that a forward without a backward has left may be old."""
        if self.current_pass() is None:
            cast(Any, self).reshard()
        return super().open_pass()

    def close_pass(self, before: Pass | None) -> None:
        """End a pass; one without gradients lets the genes go, so that the model has its own parameters again."""
        super().close_pass(before)
        if before is None and not torch.is_grad_enabled():
            cast(Any, self).reshard()
