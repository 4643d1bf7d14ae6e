# SPDX-License-Identifier: Apache-2.0
"""Putting gene-backed layers in the place of a host's plain ones, and plain layers back.

Which coefficients a layer gets and which values the genes start from is decided by the methods.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pylearngene.errors import MethodError
from pylearngene.hosts.kinds import KINDS, group_names, with_memory, without_values
from pylearngene.hosts.structure import BLOCK_LISTS, Blocks
from pylearngene.learngene import HostSpec
from pylearngene.nn import ExpansionModule, GeneBank
from pylearngene.nn._layer import write_dense

Table = Sequence[Sequence[float]]


def bank_of(net: nn.Module, argument: str = "net") -> GeneBank:
    """Return the gene bank of a gene-backed network.

    Raises:
        MethodError: `net` is a plain model.
    """
    bank = getattr(net, "gene_bank", None)
    if not isinstance(bank, GeneBank) or bank.host is None:
        raise MethodError(
            f"{argument}: expected a gene-backed network (from plg.auxiliary or Learngene.descend), "
            f"got a plain {type(net).__name__}"
        )
    return bank


def blocks_of(net: nn.Module, spec: HostSpec) -> Blocks:
    """Return the list of blocks that `spec` names.

    Raises:
        MethodError: something else has been put there.
    """
    blocks = net.get_submodule(spec.blocks)
    if not isinstance(blocks, BLOCK_LISTS):
        raise MethodError(f"net: expected a list of blocks at '{spec.blocks}', got {type(blocks).__name__}")
    return blocks


def expansion_layers(net: nn.Module, spec: HostSpec) -> Iterator[tuple[int, str, ExpansionModule]]:
    """Yield every gene-backed layer of a network as (block, path inside the block, layer).

    Raises:
        MethodError: something else has been put where one was.
    """
    for index, block in enumerate(blocks_of(net, spec)):
        for path, _ in spec.layers:
            layer = block.get_submodule(path)
            if not isinstance(layer, ExpansionModule):
                raise MethodError(
                    f"net: expected the gene-backed layer '{path}' in block {index}, got {type(layer).__name__}"
                )
            yield index, path, layer


def check_layers(net: nn.Module, spec: HostSpec) -> None:
    """Refuse genes and gene-backed layers that a method has not put there: they are not taken along.

    Raises:
        MethodError: there are some, or something else has been put where the method's were.
    """
    own = [name for path, kind in spec.layers for name in group_names(path, kind)]
    known = {id(part) for _, _, layer in expansion_layers(net, spec) for part in layer.modules()}
    others = [path for path, module in net.named_modules() if "_bank" in vars(module) and id(module) not in known]
    genes = [name for name in bank_of(net).groups if name not in own]
    if others or genes:
        raise MethodError(
            f"net: expected gene-backed layers in its blocks alone, of genes {own}, "
            f"got {f'one at {others[0]!r}' if others else f'genes {genes[0]!r}'} as well"
        )


def notes_of(bank: GeneBank) -> dict[str, Any]:
    """Return what is worth telling about a bank's genes: how they came to be, the residual of a fit, new heads."""
    notes: dict[str, Any] = vars(bank).setdefault("notes", {})
    return notes


def back_blocks(
    net: nn.Module,
    spec: HostSpec,
    bank: GeneBank,
    tables: Mapping[str, Table],
    *,
    learn: bool = False,
    device: torch.device | None = None,
) -> None:
    """Replace the plain layers of every block by gene-backed ones on `bank`, and attach the bank to `net`.

    Args:
        net: a plain model, changed in place.
        spec: where its blocks are and what they hold.
        bank: the bank; groups of genes are created in it, their values are not set here.
        tables: per layer path the coefficients, [L, K].
        learn: let the coefficients be parameters.
        device: of the genes; None is the device of the plain layers.
    """
    for index, block in enumerate(blocks_of(net, spec)):
        for path, kind in spec.layers:
            old = block.get_submodule(path)
            options = {"bank": bank, "name": path, "coeffs": tables[path][index], "learn_coeffs": learn}
            _put(block, path, _expanded(old, kind, device, options))
    bank.attach(net)
    bank.train(net.training)
    # A foreign `_init_weights` pass must leave genes and gene-backed layers alone.
    for module in [*bank.modules(), *(layer for _, _, layer in expansion_layers(net, spec))]:
        vars(module)["_is_hf_initialized"] = True


def plain_blocks(net: nn.Module, spec: HostSpec) -> None:
    """Replace the gene-backed layers by plain ones with the same weights and drop the bank, in place.

    Raises:
        MethodError: as `check_layers`.
    """
    check_layers(net, spec)
    blocks, backed = blocks_of(net, spec), list(expansion_layers(net, spec))
    for path, kind in spec.layers:
        layers = [layer for _, where, layer in backed if where == path]
        for block, plain in zip(blocks, _baked(layers, kind), strict=True):
            _put(block, path, plain)
    _detach(net)


def prototype_of(net: nn.Module, spec: HostSpec) -> nn.Module:
    """Copy the structure of a gene-backed network: plain layers without values in its blocks, other tensors shared."""
    tensors = [*net.parameters(), *net.buffers()]
    clone = copy.deepcopy(net, {id(item): item for item in [*tensors, bank_of(net)]})
    for index, path, layer in list(expansion_layers(clone, spec)):
        _put(blocks_of(clone, spec)[index], path, with_memory(layer.origin[0], None, layer.first_gene.dtype))
    _detach(clone)
    return clone


def _detach(net: nn.Module) -> None:
    """Undo `GeneBank.attach`."""
    bank_of(net).detach(net)


def _expanded(old: nn.Module, kind: str, device: torch.device | None, options: dict[str, Any]) -> ExpansionModule:
    """Make the gene-backed layer of the same sizes, dtype and mode as `old`."""
    like = next(old.parameters())
    options |= {"device": like.device if device is None else device, "dtype": like.dtype}
    layer = KINDS[kind].expanded(old, options)
    layer.origin = (without_values(old),)
    layer.train(old.training)
    return layer


def _baked(layers: list[ExpansionModule], kind: str) -> list[nn.Module]:
    """Make the plain layers with the same function, of the classes that were there before, from one path's layers."""
    like = layers[0].first_gene
    plain = [with_memory(layer.origin[0], like.device, like.dtype).train(layer.training) for layer in layers]
    parts = [KINDS[kind].parts(layer) for layer in plain]
    for group, targets in zip(group_names(layers[0].name, kind), zip(*parts, strict=True), strict=True):
        write_dense(layers, group, [weight for weight, _ in targets], [bias for _, bias in targets])
    return plain


def _put(block: nn.Module, path: str, layer: nn.Module) -> None:
    """Register `layer` at `path` inside `block`, in the place of what is there."""
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, layer)
