# SPDX-License-Identifier: Apache-2.0
"""A printable account of a gene-backed network: what is gene-backed, what it stores, what a plain model would.

Memory at run time is not estimated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pylearngene import _backends, plan
from pylearngene.hosts.backing import bank_of, notes_of
from pylearngene.hosts.kinds import KINDS, group_names
from pylearngene.learngene import HostSpec
from pylearngene.nn import GeneBank, GeneGroup

__all__ = ["LayerSummary", "Summary", "summary"]


@dataclass(frozen=True)
class LayerSummary:
    """One group of genes of the block, over all blocks: a layer has one, attention four.

    Attributes:
        name: of the group; the path of the layer inside the block, where it has one.
        kind: "linear", "layer_norm" ...
        shape: shape of the weight, which is that of one gene where genes are summed.
        genes: number of genes: K, or 2 for the directions U and V.
        gene_bytes: bytes of all genes, biases included.
        dense_bytes: bytes that the plain layers of all blocks would take.
        residual: relative residual of the fit, or None.
        regime: how products are computed for the tokens asked about, `factored` where no weight is formed; None for
            vectors, or where nothing was asked.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    genes: int
    gene_bytes: int
    dense_bytes: int
    residual: float | None
    regime: str | None


@dataclass(frozen=True)
class Summary:
    """What `summary` found; `print` shows it as a table.

    Attributes:
        model: class name of the network.
        method: the method, as it prints.
        host: family and class of the host.
        depth: number of blocks.
        layers: one entry per layer of a block.
        outside_bytes: bytes of all other parameters: those outside the blocks, and genes of layers no method made.
        parameters: number of stored parameters.
        dense_parameters: number of parameters of the plain model of the same depth.
        notes: how the genes came to be, and which tensors are freshly initialized.
    """

    model: str
    method: str
    host: str
    depth: int
    layers: tuple[LayerSummary, ...]
    outside_bytes: int
    parameters: int
    dense_parameters: int
    notes: tuple[str, ...]

    @property
    def gene_bytes(self) -> int:
        """Bytes of all genes."""
        return sum(layer.gene_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the plain blocks that the genes stand for."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times fewer parameters are stored than by the plain model."""
        return self.dense_parameters / self.parameters

    def __str__(self) -> str:
        head = ("layer", "kind", "gene", "K", "genes", f"plain x{self.depth}", "residual", "regime")
        rows = [head, *(_row(layer) for layer in self.layers)]
        rows.append(("blocks", "", "", "", _bytes(self.gene_bytes), _bytes(self.dense_bytes), "", ""))
        rows.append(("outside", "kept", "", "", _bytes(self.outside_bytes), _bytes(self.outside_bytes), "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [f"{self.model}, gene-backed by {self.method}, depth {self.depth}, host {self.host}"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines.append(
            f"stored {self.parameters:,} parameters; plain {self.dense_parameters:,} ({self.ratio:.2f} times as many)"
        )
        return "\n".join([*lines, *self.notes])


def summary(net: nn.Module, tokens: int | None = None) -> Summary:
    """Account for a gene-backed network: layers, bytes, ratio, residual of the fit, how the genes came to be.

    Args:
        net: a gene-backed network of any device, the meta device included.
        tokens: rows of x in one call (samples times tokens); where given, the account says which regime computes them.

    Returns:
        The account; `print` it.

    Raises:
        MethodError: `net` is a plain model.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> plg.summary(plg.auxiliary(model, plg.methods.TLEG())).ratio
        2.0
    """
    bank = bank_of(net)
    spec: HostSpec = bank.host
    residuals = notes_of(bank).get("residual", {})
    layers = tuple(
        _layer(bank.group(name), name, kind, spec.depth, residuals.get(name), tokens)
        for path, kind in spec.layers
        for name in group_names(path, kind)
    )
    genes = {id(gene): gene.numel() for layer in layers for gene in bank.group(layer.name).tensors()}
    outside = [parameter for parameter in net.parameters() if id(parameter) not in genes]
    kept = sum(parameter.numel() for parameter in outside)
    one_block = sum(math.prod(shape) for layer in layers for shape in bank.group(layer.name).plain_shapes())
    return Summary(
        model=type(net).__name__,
        method=repr(bank.method),
        host=f"{spec.family}: {spec.config.get('class', spec.config.get('architecture'))}",
        depth=spec.depth,
        layers=layers,
        outside_bytes=sum(parameter.nbytes for parameter in outside),
        parameters=kept + sum(genes.values()),
        dense_parameters=kept + one_block * spec.depth,
        notes=(
            *_notes(notes_of(bank), spec),
            *([] if tokens is None else _explained(bank, tokens)),
        ),
    )


def _product(group: GeneGroup) -> tuple[str, int, int, str, str]:
    """Who computes with a group, bytes of an element, how many genes, of which primitive, on what."""
    gene = group.tensors()[0]
    who, arch = _backends.implementation(gene.device), _backends.arch(gene.device)
    return who, gene.element_size(), group.num_genes, group.primitive, arch


def _explained(bank: GeneBank, tokens: int) -> Iterator[str]:
    """Say once per primitive which regime runs and why."""
    for group in {group.primitive: group for group in reversed(bank.groups.values())}.values():
        yield f"regime {plan.explain(tokens, *_product(group))}"


def _layer(
    group: GeneGroup, name: str, kind: str, depth: int, residual: float | None, tokens: int | None
) -> LayerSummary:
    entry, genes, shapes = KINDS[kind], group.tensors(), group.plain_shapes()
    dense = depth * sum(math.prod(shape) for shape in shapes) * genes[0].element_size()
    regime = None
    if tokens is not None and entry.products:
        regime = entry.regime or plan.choose(tokens, *_product(group))
    size = sum(gene.nbytes for gene in genes)
    return LayerSummary(name, kind, shapes[0], group.num_genes, size, dense, residual, regime)


def _notes(notes: Mapping[str, Any], spec: HostSpec) -> tuple[str, ...]:
    """Word what is worth telling: the genes' origin, a fresh head, why a library cannot rebuild the host."""
    lines = [f"genes: {notes['init']}"] if "init" in notes else []
    if notes.get("fresh"):
        lines.append(f"freshly initialized, with a fixed seed: {', '.join(notes['fresh'])}")
    if "why" in spec.config:
        lines.append(f"host is the user's own class: {spec.config['why']}")
    return tuple(lines)


def _row(layer: LayerSummary) -> tuple[str, ...]:
    shape = "x".join(map(str, layer.shape))
    residual = "" if layer.residual is None else f"{layer.residual:.2e}"
    sizes = _bytes(layer.gene_bytes), _bytes(layer.dense_bytes)
    return layer.name, layer.kind, shape, str(layer.genes), *sizes, residual, layer.regime or ""


def _bytes(count: int) -> str:
    """Show a number of bytes with a binary unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
