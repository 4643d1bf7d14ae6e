# SPDX-License-Identifier: Apache-2.0
"""More genes for a gene-backed network, fewer for a learngene: the order of genes is an order of use.

Which methods allow that, and what a caller may ask for, is checked by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pylearngene.errors import ArgumentError
from pylearngene.hosts.backing import bank_of, expansion_layers, notes_of
from pylearngene.hosts.kinds import KINDS, group_names
from pylearngene.learngene import HostSpec, Learngene
from pylearngene.methods import _genes

if TYPE_CHECKING:
    from pylearngene.methods._base import ExpansionMethod


def grow(net: nn.Module, method: ExpansionMethod, freeze: bool, seed: int | None) -> None:
    """Give a network the number of genes of `method`, in place; genes that are there keep place and values.

    Args:
        net: a gene-backed network whose method is `method` with as many genes or fewer.
        method: the method from now on.
        freeze: let the present genes need no gradient.
        seed: of the new genes' start by the method; None for zeros.
    """
    bank = bank_of(net)
    spec: HostSpec = bank.host
    table = method.coefficients(spec.depth)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if freeze:
        for _, gene in bank.named_genes():
            gene.requires_grad_(False)
            gene.grad = None
    for path, kind in spec.layers:
        for name in group_names(path, kind):
            before = bank.group(name).num_genes
            group = bank.grow_group(name, method.num_genes)
            if generator is not None and KINDS[kind].products:
                for new in group.weights()[before:]:
                    _genes.draw(new, generator)
    for index, _, layer in expansion_layers(net, spec):
        layer.set_coeffs(table[index])
    bank.method = method
    notes_of(bank).pop("residual", None)


def first_genes(lg: Learngene, method: ExpansionMethod) -> Learngene:
    """Return the learngene of the first genes of every weight, as many as `method` has; tensors are shared."""
    for key in lg.genes:
        if not key.rpartition(".")[2].isdecimal():
            raise ArgumentError(f"genes: expected keys that end in the number of a gene, got {key!r}")
    kept = {key: gene for key, gene in lg.genes.items() if int(key.rpartition(".")[2]) < method.num_genes}
    fewer = Learngene(kept, dict(lg.tensors), method, lg.host)
    fewer.prototype = lg.prototype
    return fewer
