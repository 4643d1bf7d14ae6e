# SPDX-License-Identifier: Apache-2.0
"""What every method of the form `W[l] = sum_k c[l,k] G[k]` shares: building, extracting, descending, changing depth.

A method states its coefficients; the rest is here. Gene values are in `_genes.py`, what lies outside the blocks in
`_outside.py`, the blocks' layers in `pylearngene.hosts.backing`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pylearngene.errors import ArgumentError, MethodError, ShapeError
from pylearngene.hosts import find_blocks
from pylearngene.hosts.backing import (
    Table,
    back_blocks,
    bank_of,
    check_layers,
    expansion_layers,
    notes_of,
    plain_blocks,
    prototype_of,
)
from pylearngene.hosts.depth import resize_blocks
from pylearngene.hosts.families import build
from pylearngene.hosts.kinds import group_names
from pylearngene.learngene import HostSpec, Learngene
from pylearngene.methods import _genes, _outside, _phases
from pylearngene.methods._requests import check_choice, check_number, check_seed, refuse_axes, refuse_backed
from pylearngene.nn import GeneBank

HEAD_SEED = 0


@dataclass(frozen=True)
class ExpansionMethod(ABC):
    """Base of the methods whose block weights are linear combinations of K genes of the same shape."""

    name: ClassVar[str]
    compute_dtype: ClassVar[str] = "auto"
    axes: ClassVar[frozenset[str]] = frozenset({"depth"})

    @abstractmethod
    def coefficients(self, depth: int) -> list[list[float]]:
        """Return the coefficients of a network of `depth` blocks, [L, K]."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return the method's settings in a form that JSON can hold."""

    @property
    @abstractmethod
    def num_genes(self) -> int:
        """The number K of genes per weight."""

    @property
    def learns_coefficients(self) -> bool:
        """Whether the coefficients are trained with the genes."""
        return False

    def bound(self, _depth: int, /) -> ExpansionMethod:
        """Return the method as it is stored with a learngene of a network of that depth."""
        return self

    def init_genes(self, bank: GeneBank, generator: torch.Generator) -> None:
        """Give the genes of a bank the method's own start: weights truncated normal of std .02, biases 0, gains 1."""
        spec: HostSpec = bank.host
        _genes.start(bank, spec, self.start_gains(spec.depth), generator)

    def start_gains(self, depth: int) -> list[float]:
        """Return what the gain genes start from, [K]: here what brings the gain of every block nearest to 1."""
        return _genes.nearest_to_one(self.coefficients(depth))

    def with_genes(self, num_genes: int) -> ExpansionMethod:
        """Return the method with another number of genes, where the order of genes is an order of use.

        Raises:
            MethodError: the method needs all its genes.
        """
        raise MethodError(
            f"num_genes: expected the {self.num_genes} genes of {type(self).__name__}, got {num_genes!r}; "
            "LDR serves with any number of its first genes"
        )

    def first_genes(self, lg: Learngene, num_genes: int) -> Learngene:
        """Keep the first genes of every weight; `Learngene.first_genes` states the contract."""
        method = self.with_genes(check_number("num_genes", num_genes))
        if method.num_genes > self.num_genes:
            raise ArgumentError(f"num_genes: expected at most the present {self.num_genes}, got {num_genes}")
        return _phases.first_genes(lg, method)

    def auxiliary(self, model: nn.Module, init: str = "method", seed: int = 0, blocks: str | None = None) -> nn.Module:
        """Build the gene-backed copy of a plain model; `pylearngene.auxiliary` states the contract."""
        refuse_backed(model, "model")
        check_choice("init", init, ("method", "fit"))
        seed = check_seed(seed)
        host = find_blocks(model, blocks)
        table = self.coefficients(host.spec.depth)
        net = copy.deepcopy(model)
        bank = self._back(net, host.spec, dict.fromkeys(_paths(host.spec), table))
        if init == "fit":
            notes_of(bank)["residual"] = _genes.fit(bank, host, table)
            notes_of(bank)["init"] = f"fitted by least squares to the blocks of the model{_genes.caution(bank, table)}"
        else:
            self.init_genes(bank, torch.Generator().manual_seed(seed))
            notes_of(bank)["init"] = f"initialized by the method, seed {seed}"
        return net

    def extract(self, net: nn.Module) -> Learngene:
        """Copy genes and plain tensors out of a gene-backed network; `pylearngene.extract` states the contract."""
        bank = bank_of(net)
        spec: HostSpec = bank.host
        check_layers(net, spec)
        learngene = Learngene(
            genes={name: gene.detach().clone() for name, gene in bank.named_genes()},
            tensors={name: value.detach().clone() for name, value in _outside.tensors(net, spec).items()},
            method=self.bound(spec.depth),
            host=spec,
            coeffs=_learned(net, spec) if self.learns_coefficients else {},
        )
        if spec.family == "own":
            learngene.prototype = prototype_of(net, spec)
        return learngene

    def descend(
        self,
        lg: Learngene,
        depth: int | None = None,
        *,
        model: nn.Module | None = None,
        backed: bool = True,
        num_classes: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> nn.Module:
        """Build a network of any depth from a learngene; `pylearngene.descend` states the contract."""
        refuse_axes(type(self).__name__, width=width, heads=heads)
        refuse_backed(model, "model")
        depth = lg.host.depth if depth is None else depth
        tables = self._tables(lg, depth)
        like = next(iter(lg.genes.values()), torch.empty(0))
        device = like.device if device is None else torch.device(device)
        net, spec = build(lg.host, depth, num_classes, lg.prototype if model is None else model, HEAD_SEED)
        names = dict(zip(_paths(lg.host), _paths(spec), strict=True))
        bank = self._back(net, spec, {names[path]: table for path, table in tables.items()}, device)
        net.to(device, dtype or like.dtype)
        _genes.load(bank, _genes.renamed(lg.genes, dict(zip(_groups(lg.host), _groups(spec), strict=True))), dtype)
        kept = _outside.renamed(lg.tensors, lg.host.blocks, spec.blocks)
        fresh = _outside.load(net, spec, kept, dtype, num_classes)
        notes_of(bank).update(init="descended from a learngene", fresh=fresh)
        if not backed:
            plain_blocks(net, spec)
        return net.train()

    def set_depth(self, net: nn.Module, depth: int) -> nn.Module:
        """Change the depth of a gene-backed network in place; `pylearngene.set_depth` states the contract."""
        bank = bank_of(net)
        spec: HostSpec = bank.host
        depth = check_number("depth", depth)
        if self.learns_coefficients and depth != spec.depth:
            raise MethodError(_learned_for(spec.depth, depth))
        table = self.coefficients(depth)
        # Refuses what is no gene-backed layer, before anything changes.
        list(expansion_layers(net, spec))
        resize_blocks(net, spec.blocks, depth, keep=[bank])
        bank.host = replace(spec, depth=depth)
        if depth != spec.depth:
            notes_of(bank).pop("residual", None)
        if not self.learns_coefficients:
            for index, _, layer in expansion_layers(net, bank.host):
                layer.set_coeffs(table[index])
        return net

    def _back(
        self, net: nn.Module, spec: HostSpec, tables: Mapping[str, Table], device: torch.device | None = None
    ) -> GeneBank:
        """Make the blocks of a plain network gene-backed, with genes of any values."""
        bank = GeneBank(self.compute_dtype)
        bank.method, bank.host = self, spec
        # New genes draw from the global generators before their values are set.
        places = {device, *(parameter.device for parameter in net.parameters())}
        with torch.random.fork_rng(devices=[place for place in places if place is not None and place.type == "cuda"]):
            back_blocks(net, spec, bank, tables, learn=self.learns_coefficients, device=device)
        return bank

    def _tables(self, lg: Learngene, depth: int) -> Mapping[str, Table]:
        """Return the coefficients of every layer path, [L, K]: learned ones where the method learns them."""
        if not (self.learns_coefficients and lg.coeffs):
            return dict.fromkeys(_paths(lg.host), self.coefficients(depth))
        if depth != lg.host.depth:
            raise MethodError(_learned_for(lg.host.depth, depth))
        if lg.coeffs.keys() != set(_paths(lg.host)):
            raise ArgumentError(f"coeffs: expected one table for each of {_paths(lg.host)}, got {sorted(lg.coeffs)}")
        wanted = (depth, self.num_genes)
        for path, table in lg.coeffs.items():
            if table.shape != wanted:
                raise ShapeError(f"coeffs[{path!r}]: expected shape {wanted} (depth, genes), got {tuple(table.shape)}")
        return {path: table.tolist() for path, table in lg.coeffs.items()}


def _paths(spec: HostSpec) -> list[str]:
    return [path for path, _ in spec.layers]


def _groups(spec: HostSpec) -> list[str]:
    return [name for path, kind in spec.layers for name in group_names(path, kind)]


def _learned(net: nn.Module, spec: HostSpec) -> dict[str, Tensor]:
    """Stack the learned coefficients of every layer path, [L, K]."""
    rows: dict[str, list[Tensor]] = {path: [] for path in _paths(spec)}
    for _, path, layer in expansion_layers(net, spec):
        rows[path].append(layer.coeffs.detach())
    return {path: torch.stack(table) for path, table in rows.items()}


def _learned_for(depth: int, got: int) -> str:
    return (
        f"depth: expected {depth}, for which the coefficients were learned, got {got}; "
        "for another depth pass a fixed rule: `Learngene.from_pretrained(folder, method=Expansion(rule))`"
    )
