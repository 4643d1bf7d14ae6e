# SPDX-License-Identifier: Apache-2.0
"""What can be done with networks: back them by genes, take the genes out, grow others, change depth, make them plain.

Each function states the contract; a method's own way to fulfil it is in `pylearngene.methods`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from pylearngene.errors import ArgumentError, MethodError
from pylearngene.hosts.backing import bank_of, plain_blocks
from pylearngene.learngene import Learngene
from pylearngene.methods import ExpansionMethod
from pylearngene.nn._wrapping import check_whole

__all__ = ["auxiliary", "bake", "descend", "extract", "set_depth"]


def auxiliary(
    model: nn.Module, method: ExpansionMethod, init: str = "method", seed: int = 0, blocks: str | None = None
) -> nn.Module:
    """Build the gene-backed copy of a model, the auxiliary network of the learngene papers.

    W[l] = sum_k c[l,k] G[k] for every layer that holds parameters in the repeated blocks; the rest is copied as it is.

    Args:
        model: a plain model with repeated blocks, found by structure; it is not changed and stays usable as teacher.
        method: an instance, for instance `TLEG()`.
        init: "method" for the method's own start of the genes, "fit" for the least-squares fit to the model's blocks,
            whose residual per layer `summary` reports.
        seed: of the start; the global random state is untouched.
        blocks: path of the list of blocks, if known; needed where it holds one block only.

    Returns:
        A new model with `gene_bank` at its root. Outside the blocks it is a copy, with mode (train or eval) and
        `requires_grad` as in `model`; genes require gradients.

    Raises:
        ArgumentError: `model` is no plain module, `method` is no method, `init` is unknown, `seed` is no int, or
            nothing is there to fit.
        HostError: the model has no repeated blocks, or blocks that cannot be gene-backed.
        MethodError: the method's table is for another depth.

    Numerics:
        The fit is solved in fp64 by the SVD of the coefficients and rounded once to the genes' dtype.

    Source:
        Transformer as Linear Expansion of Learngene, AAAI 2024, arXiv 2312.05614; the fit is ours.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> net = plg.auxiliary(model, plg.methods.TLEG())
        >>> sorted(key for key in net.state_dict() if "1.weight" in key)
        ['gene_bank.genes.1.weight.0', 'gene_bank.genes.1.weight.1']
    """
    return _method("method", method).auxiliary(model, init=init, seed=seed, blocks=blocks)


def extract(net: nn.Module, method: ExpansionMethod | None = None) -> Learngene:
    """Take the learngene out of a gene-backed network: its genes, and copies of all tensors outside its blocks.

    Args:
        net: a gene-backed network; it is not changed and shares no memory with the result.
        method: None, or the method that `net` follows.

    Returns:
        The learngene, on the devices and in the dtypes of `net`.

    Raises:
        MethodError: `net` is a plain model, follows another method, or has gene-backed layers that no method made.
        ShardingError: `net` is sharded over processes.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> plg.extract(plg.auxiliary(model, plg.methods.TLEG()))
        Learngene(tleg, 8 genes, 176 parameters, host own of depth 4)
    """
    check_whole(bank_of(net))
    own = _method("net.gene_bank.method", bank_of(net).method)
    if method is not None and method != own:
        raise MethodError(f"method: expected None or the method of the network, {own!r}, got {method!r}")
    return own.extract(net)


def descend(lg: Learngene, depth: int | None = None, **options: Any) -> nn.Module:
    """Grow a network of any depth from a learngene; the same as `lg.descend(depth, **options)`.

    Args:
        lg: the learngene.
        depth: number of blocks, an int >= 1; None is the depth of the network that it was taken from.
        **options: `backed` (True: gene-backed; False: a plain model of the host's family), `model` (a plain model of
            your own class, for learngenes read from disk), `num_classes` (a new head, freshly initialized with a fixed
            seed where the size differs; 0 for none), `dtype`, `device`; `width` and `heads` cannot be changed.

    Returns:
        A new network in training mode that shares no memory with `lg`.

    Raises:
        ArgumentError: `lg` is no learngene, a number is below 1, or an own class is needed and was not given.
        DTypeError: `dtype` is no floating-point dtype.
        HostError: the host cannot be built, or its tensors do not fit.
        MethodError: the method cannot change the axis asked for, or cannot reach that depth.
        NonFiniteError: genes, coefficients or tensors hold NaN or Inf.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> lg = plg.extract(plg.auxiliary(model, plg.methods.TLEG()))
        >>> len(plg.descend(lg, 7).body), len(lg.descend(depth=2, backed=False).body)
        (7, 2)
    """
    if not isinstance(lg, Learngene):
        raise ArgumentError(f"lg: expected a Learngene, got {type(lg).__name__}")
    return lg.descend(depth, **options)


def set_depth(net: nn.Module, depth: int) -> nn.Module:
    """Change the depth of a gene-backed network in place: the genes stay, the coefficients follow the new depth.

    Blocks keep no weights of their own, so nothing is learned or lost; settings such as drop-path rates are those of
    the block at the same relative position. Optimizers over the genes stay valid.

    Args:
        net: a gene-backed network.
        depth: number of blocks, an int >= 1.

    Returns:
        `net` itself.

    Raises:
        ArgumentError: `depth` is no int >= 1.
        MethodError: `net` is a plain model, its coefficients are learned or a table for another depth, or something
            else is where a gene-backed layer was.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> net = plg.auxiliary(model, plg.methods.TLEG())
        >>> len(plg.set_depth(net, 6).body)
        6
    """
    return _method("net.gene_bank.method", bank_of(net).method).set_depth(net, depth)


def bake(net: nn.Module) -> nn.Module:
    """Make a plain model with the same function: every gene-backed layer becomes what it was before.

    Args:
        net: a gene-backed network; it is not changed.

    Returns:
        A new model without genes, in the mode of `net`.

    Raises:
        MethodError: `net` is a plain model, or has gene-backed layers that no method made.
        ShardingError: `net` is sharded over processes.

    Numerics:
        Weights are what `dense_weight()` shows, rounded once to the genes' dtype.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> plain = plg.bake(plg.auxiliary(model, plg.methods.TLEG()))
        >>> type(plain.body[0][1]).__name__
        'Linear'
    """
    check_whole(bank_of(net))
    plain = copy.deepcopy(net)
    plain_blocks(plain, bank_of(plain).host)
    return plain


def _method(name: str, method: object) -> ExpansionMethod:
    """Refuse what is no instance of a method."""
    if not isinstance(method, ExpansionMethod):
        got = f"the class {method.__name__}; write {method.__name__}()" if isinstance(method, type) else repr(method)
        raise ArgumentError(f"{name}: expected an instance of a method, for instance plg.methods.TLEG(), got {got}")
    return method
