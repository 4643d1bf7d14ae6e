# SPDX-License-Identifier: Apache-2.0
"""Values for the genes of an expansion: a method's own start, a least-squares fit, and the genes of a learngene.

Everything here writes into an existing bank; which coefficients the layers have is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.hosts import Host
from pylearngene.hosts.backing import Table
from pylearngene.hosts.kinds import KINDS, Tensors, group_names
from pylearngene.learngene import HostSpec
from pylearngene.nn import GeneBank, GeneGroup

LINEAR_STD = 0.02


def start(bank: GeneBank, spec: HostSpec, table: Table, generator: torch.Generator) -> None:
    """Give the genes a start from which every layer of every depth trains like a fresh one.

    Matrices are truncated normal of standard deviation .02 (cut at 2), as in TLEG; biases are 0. Gains (of norms and
    scales) are the scalars `s` nearest to `sum_k c[l,k] s[k] = 1` for all `l`: (1, 0) for TLEG.
    """
    gains = torch.linalg.pinv(torch.tensor(table, dtype=torch.float64)).sum(dim=1)
    for path, kind in spec.layers:
        for name in group_names(path, kind):
            group = bank.group(name)
            for gene, gain in zip(group.weight, gains.tolist(), strict=True):
                if KINDS[kind].products:
                    _assign(gene, _truncated_normal(gene, generator))
                else:
                    _assign(gene, torch.full(gene.shape, round(gain, 12)))
            for gene in group.bias or ():
                _assign(gene, torch.zeros(gene.shape))


def fit(bank: GeneBank, host: Host, table: Table) -> dict[str, float]:
    """Fit the genes to the blocks of a plain model by least squares in fp64: min over G of `||C G - W||`.

    Args:
        bank: the bank whose genes are overwritten.
        host: the plain model with its L blocks.
        table: the coefficients C, [L, K].

    Returns:
        Per group of genes the relative residual `||C G - W|| / ||W||` over weights and biases of all blocks.

    Raises:
        ArgumentError: the model has no values (it is on the meta device).
    """
    matrix = torch.tensor(table, dtype=torch.float64)
    inverse = torch.linalg.pinv(matrix)
    residuals = {}
    for name, targets_of in _targets(host):
        error, norm = 0.0, 0.0
        for genes, targets in _parts(bank.group(name), targets_of):
            if targets[0].is_meta:
                raise ArgumentError("model: expected a model with values for init='fit', got one on the meta device")
            for gene, row in zip(genes, inverse, strict=True):
                _assign(gene, _combine(row, targets))
            for target, row in zip(targets, matrix, strict=True):
                error += float((_combine(row, genes) - target.detach().double()).square().sum())
                norm += float(target.detach().double().square().sum())
        residuals[name] = math.sqrt(error / norm) if norm else math.sqrt(error)
    return residuals


def load(bank: GeneBank, genes: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Copy stored genes into a bank; each keeps its dtype unless `dtype` says otherwise.

    Raises:
        ArgumentError: genes are missing or left over.
        ShapeError: a gene has another shape than the host's layer.
    """
    own = dict(bank.named_genes())
    missing, extra = sorted(own.keys() - genes.keys()), sorted(genes.keys() - own.keys())
    if missing or extra:
        raise ArgumentError(
            f"genes: expected the keys of method and host, got missing {missing} and unexpected {extra}"
        )
    for name, gene in own.items():
        if genes[name].shape != gene.shape:
            raise ShapeError(f"genes[{name!r}]: expected shape {tuple(gene.shape)}, got {tuple(genes[name].shape)}")
        gene.data = genes[name].detach().to(gene.device, dtype or genes[name].dtype, copy=True)


def renamed(genes: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Give genes the keys of a network whose layers are named differently: stored path to path."""
    split = [(key.rsplit(".", 2), gene) for key, gene in genes.items()]
    return {".".join([names.get(parts[0], parts[0]), *parts[1:]]): gene for parts, gene in split}


def _targets(host: Host) -> Iterator[tuple[str, list[Tensors]]]:
    """Yield every group's name with weight and bias of the L plain layers."""
    for path, kind in host.layers:
        layers = [KINDS[kind].parts(block.get_submodule(path)) for block in host.blocks]
        for name, targets in zip(group_names(path, kind), zip(*layers, strict=True), strict=True):
            yield name, list(targets)


def _parts(group: GeneGroup, targets: list[Tensors]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the weights, then the biases, of a group: its K genes and the L tensors of the plain blocks."""
    yield group.weights(), [weight for weight, _ in targets]
    if group.bias is not None:
        yield group.biases(), [bias for _, bias in targets if bias is not None]


def _combine(row: Tensor, tensors: list[Tensor]) -> Tensor:
    """Compute `sum_k row[k] * tensors[k]` in fp64."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for coefficient, tensor in zip(row.tolist(), tensors, strict=True):
        total.add_(tensor.detach().double(), alpha=coefficient)
    return total


def _truncated_normal(gene: Tensor, generator: torch.Generator) -> Tensor:
    """Draw on the CPU in fp32, so that every device and dtype starts from the same values."""
    return nn.init.trunc_normal_(torch.empty(gene.shape), std=LINEAR_STD, generator=generator)


def _assign(gene: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        gene.copy_(value)
