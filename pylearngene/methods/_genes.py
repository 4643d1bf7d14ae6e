# SPDX-License-Identifier: Apache-2.0
"""Values for the genes of an expansion: a method's own start, a least-squares fit, and the genes of a learngene.

Everything here writes into an existing bank; which coefficients the layers have is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.hosts import Host
from pylearngene.hosts.backing import Table
from pylearngene.hosts.kinds import KINDS, Tensors, group_names
from pylearngene.learngene import HostSpec
from pylearngene.nn import ExpansionGroup, GeneBank

LINEAR_STD = 0.02
#: Relative size of singular values below which gains do not follow them.
ALIKE = 1e-6
#: Condition times rounding from which a fit is remarked on.
INEXACT = 1e-3
#: Elements of every block that a fit reads at a time, or one row where that is longer.
STRETCH = 1 << 18


def nearest_to_one(table: Table) -> list[float]:
    """Return the scalars `s` nearest to `sum_k c[l,k] s[k] = 1` for all `l`, the smallest ones: (1, 0) for TLEG.

    Directions that the table hardly tells apart are left out; they would make scalars large.
    """
    gains = torch.linalg.pinv(torch.tensor(table, dtype=torch.float64), rtol=ALIKE).sum(dim=1)
    return [round(gain, 12) for gain in gains.tolist()]


def start(bank: GeneBank, spec: HostSpec, gains: Sequence[float], generator: torch.Generator) -> None:
    """Give the genes a start from which every layer of every depth trains like a fresh one.

    Matrices, and kernels of convolutions alike, are truncated normal of standard deviation .02 (cut at 2), as in TLEG
    and ConvNeXt; biases are 0. Gains (of norms and scales) are what the method says, one number per gene.
    """
    for path, kind in spec.layers:
        for name in group_names(path, kind):
            group = bank.group(name)
            for gene, gain in zip(group.weight, gains, strict=True):
                if KINDS[kind].products:
                    draw(gene, generator)
                else:
                    _assign(gene, torch.full(gene.shape, gain))
            for gene in group.bias or ():
                _assign(gene, torch.zeros(gene.shape))


def fit(bank: GeneBank, host: Host, table: Table) -> dict[str, float]:
    """Fit the genes to the blocks of a plain model by least squares in fp64: min over G of `||C G - W||`.

    Solved with the factors of the SVD of C one after the other, never with its inverse: genes that C hardly tells
    apart then still give the blocks back, up to their own rounding. Directions of C that are below the rounding
    of the genes' dtype are left out.

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
    residuals = {}
    for name, targets_of in _targets(host):
        error, norm = 0.0, 0.0
        for genes, targets in _parts(bank.group(name), targets_of):
            if targets[0].is_meta:
                raise ArgumentError("model: expected a model with values for init='fit', got one on the meta device")
            _solve(matrix, genes, targets)
            for target, row in zip(targets, matrix, strict=True):
                error += float((_combine(row, genes) - target.detach().double()).square().sum())
                norm += float(target.detach().double().square().sum())
        residuals[name] = math.sqrt(error / norm) if norm else math.sqrt(error)
    return residuals


def caution(bank: GeneBank, table: Table) -> str:
    """Return a remark on coefficients that make fitted genes inexact in their dtype, or nothing."""
    dtype = next(bank.parameters()).dtype
    values = torch.linalg.svdvals(torch.tensor(table, dtype=torch.float64))
    values = values[_kept(values, len(table[0]), torch.float64)]
    condition = float(values[0] / values[-1]) if len(values) else 1.0
    if condition * torch.finfo(dtype).eps < INEXACT:
        return ""
    return (
        f"; the coefficients are ill-conditioned ({condition:.1e}): fitted genes are large and cancel, and what "
        f"{_checks.short(dtype)} cannot hold of them is left out; fewer genes, or float64, lose less"
    )


def _kept(values: Tensor, genes: int, dtype: torch.dtype) -> Tensor:
    """Say which singular values are above the rounding of `dtype`."""
    return values > values[0] * max(len(values), genes) * torch.finfo(dtype).eps


def _solve(matrix: Tensor, genes: list[Tensor], targets: list[Tensor]) -> None:
    """Write the smallest least-squares solution of `C G = W` into the genes, a stretch of rows at a time."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = _kept(values, matrix.shape[1], genes[0].dtype)
    left, values, right = left[:, kept], values[kept], right[kept]
    # By rows, also of a view the other way round: flattening one would copy it whole.
    step = max(1, STRETCH // max(1, genes[0][:1].numel()))
    for start_at in range(0, genes[0].shape[0], step):
        rows = slice(start_at, start_at + step)
        blocks = torch.stack([target.detach()[rows].double() for target in targets]).flatten(1)
        parts = (left.T.to(blocks.device) @ blocks) / values.to(blocks.device)[:, None]
        for gene, solved in zip(genes, right.T.to(blocks.device) @ parts, strict=True):
            _assign(gene[rows], solved.view(gene[rows].shape))


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


def _parts(group: ExpansionGroup, targets: list[Tensors]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
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


def draw(gene: Tensor, generator: torch.Generator) -> None:
    """Give a matrix its start; drawn on the CPU in fp32, so that every device and dtype starts from the same values."""
    _assign(gene, nn.init.trunc_normal_(torch.empty(gene.shape), std=LINEAR_STD, generator=generator))


def _assign(gene: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        gene.copy_(value)
