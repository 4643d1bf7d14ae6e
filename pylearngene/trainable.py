# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a network train, and how they are grouped for an optimizer: `freeze` and `param_groups`.

Three roles: genes, the coefficients that gene-backed layers learn themselves, and everything outside. Optimizers and
schedules are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from pylearngene.errors import ArgumentError
from pylearngene.hosts.backing import bank_of
from pylearngene.nn import GeneBank

__all__ = ["freeze", "param_groups"]


@dataclass(frozen=True)
class _Owned:
    """A parameter with its role ("genes", "coeffs" or "outside"), the layer path of its genes, and which gene it is."""

    name: str
    parameter: nn.Parameter
    role: str
    layer: str = ""
    index: int | None = None


def freeze(
    net: nn.Module,
    genes: bool | Sequence[int] | slice | None = True,
    coeffs: bool | None = None,
    outside: bool | None = None,
    layers: Sequence[str] | None = None,
) -> nn.Module:
    """Freeze or unfreeze parts of a gene-backed network in place, by `requires_grad`.

    Each part is frozen with True, trained with False, and left as it is with None. Frozen genes cost no gradient work.
    Gradients of what is frozen are dropped, so that an optimizer that already holds it leaves it alone.

    Args:
        net: a gene-backed network.
        genes: True, False or None for all genes; or which of each layer's K genes to freeze, as indices (negative ones
            count from the end) or a slice, while the others are trained.
        coeffs: the coefficients that layers learn themselves; networks with fixed ones have none.
        outside: all other parameters: embeddings, heads, norms outside the blocks.
        layers: restricts `genes` and `coeffs` to these paths inside a block, for instance "attn.qkv", or "attn" for
            all below it; None is every layer, an empty sequence none.

    Returns:
        `net` itself.

    Raises:
        ArgumentError: a part is not one of these, an index is beyond every selected layer's K, or no layer has such a
            path.
        MethodError: `net` is a plain model.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> net = plg.freeze(plg.auxiliary(model, plg.methods.TLEG()), genes=[0])
        >>> [name for name, gene in net.gene_bank.named_genes() if gene.requires_grad][:2]
        ['0.weight.1', '0.bias.1']
    """
    bank_of(net)
    for argument, value in (("coeffs", coeffs), ("outside", outside)):
        if value is not None and not isinstance(value, bool):
            raise ArgumentError(f"{argument}: expected True, False or None, got {value!r}")
    owned = list(_owned(net))
    chosen = _in_layers(owned, layers)
    frozen = _chosen_genes([item for item in chosen if item.role == "genes"], genes)
    if coeffs is not None:
        frozen += [(item.parameter, coeffs) for item in chosen if item.role == "coeffs"]
    if outside is not None:
        frozen += [(item.parameter, outside) for item in owned if item.role == "outside"]
    for parameter, still in frozen:
        parameter.requires_grad_(not still and (parameter.is_floating_point() or parameter.is_complex()))
        if still:
            parameter.grad = None
    return net


def param_groups(
    net: nn.Module,
    lr: float,
    gene_lr: float | None = None,
    weight_decay: float = 0.0,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group the trainable parameters of any network for a torch optimizer.

    Every parameter that requires a gradient comes once, a tied one too, in the order of `net.named_parameters()`.
    Tensors with one axis do not decay: biases, gains of norms, their genes and learned coefficients. All others do,
    embeddings and position tables among them, as in timm and transformers.

    Args:
        net: a gene-backed network or a plain model.
        lr: learning rate.
        gene_lr: learning rate of the genes; None is `lr`. A gene sums the gradients of all its layers, so it may need
            a smaller one than a dense weight.
        weight_decay: of whatever decays.
        no_decay: names of further parameters that do not, for instance `net.no_weight_decay()` of a timm model; names
            that the network lacks are passed over.

    Returns:
        Up to five groups with the keys "name" ("genes", "genes_no_decay", "coeffs", "rest", "rest_no_decay"),
        "params", "lr" and "weight_decay"; empty ones are left out.

    Raises:
        ArgumentError: `net` is no module, a rate or the decay is no number, negative or not finite, or `no_decay` is
            one text or no collection of names.

    Example:
        >>> import pylearngene as plg
        >>> model = nn.Module()
        >>> model.body = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)))
        >>> net = plg.auxiliary(model, plg.methods.TLEG())
        >>> groups = plg.param_groups(net, lr=1e-3, gene_lr=5e-4, weight_decay=0.05)
        >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
        [('genes', 2, 0.05), ('genes_no_decay', 6, 0.0)]
    """
    if not isinstance(net, nn.Module):
        raise ArgumentError(f"net: expected a module, got {type(net).__name__}")
    if isinstance(no_decay, str):
        raise ArgumentError(f"no_decay: expected a collection of names, got the text {no_decay!r}")
    if not isinstance(no_decay, Collection) or not all(isinstance(name, str) for name in no_decay):
        raise ArgumentError(f"no_decay: expected a collection of names, got {no_decay!r}")
    gene_lr = lr if gene_lr is None else gene_lr
    for argument, value in (("lr", lr), ("gene_lr", gene_lr), ("weight_decay", weight_decay)):
        if not _is_rate(value):
            raise ArgumentError(f"{argument}: expected a finite number of at least 0, got {value!r}")
    found: dict[str, list[nn.Parameter]] = {}
    for item in _owned(net):
        if item.parameter.requires_grad:
            flat = item.parameter.ndim < 2 or item.role == "coeffs" or item.name in no_decay
            found.setdefault(_group_of(item.role, flat), []).append(item.parameter)
    rate = {"genes": gene_lr, "genes_no_decay": gene_lr}
    return [
        {
            "name": name,
            "params": found[name],
            "lr": rate.get(name, lr),
            "weight_decay": weight_decay if name in ("genes", "rest") else 0.0,
        }
        for name in ("genes", "genes_no_decay", "coeffs", "rest", "rest_no_decay")
        if name in found
    ]


def _is_rate(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0.0 <= float(value) < math.inf


def _group_of(role: str, flat: bool) -> str:
    if role == "coeffs":
        return role
    return ("genes" if role == "genes" else "rest") + ("_no_decay" if flat else "")


def _owned(net: nn.Module) -> Iterator[_Owned]:
    """Every parameter of a network once, with its role."""
    roles: dict[int, tuple[str, str, int | None]] = {}
    for module in net.modules():
        if isinstance(module, GeneBank):
            for layer, group in module.groups.items():
                for key, gene in group.named_parameters():
                    last = key.rpartition(".")[2]
                    roles[id(gene)] = "genes", layer, int(last) if last.isdigit() else None
        for own in getattr(module, "coefficient_names", ()):
            parameter = module._parameters.get(own)
            if parameter is not None:
                roles.setdefault(id(parameter), ("coeffs", str(module.name), None))
    for name, parameter in net.named_parameters():
        yield _Owned(name, parameter, *roles.get(id(parameter), ("outside", "", None)))


def _in_layers(owned: Sequence[_Owned], layers: Sequence[str] | None) -> list[_Owned]:
    """Genes and coefficients of the layers at or below the given paths."""
    if layers is None:
        return list(owned)
    have = sorted({item.layer for item in owned if item.role == "genes"})
    several = isinstance(layers, Collection) and not isinstance(layers, str)
    if not several or not all(isinstance(path, str) for path in layers):
        raise ArgumentError(f"layers: expected a sequence of paths, some of {have}, got {layers!r}")
    for path in layers:
        if not any(_below(layer, path) for layer in have):
            raise ArgumentError(f"layers: expected some of {have}, or what they begin with, got {path!r}")
    return [item for item in owned if item.layer and any(_below(item.layer, path) for path in layers)]


def _below(layer: str, path: str) -> bool:
    return layer == path or layer.startswith(f"{path}.")


def _chosen_genes(
    items: Sequence[_Owned], genes: bool | Sequence[int] | slice | None
) -> list[tuple[nn.Parameter, bool]]:
    """Which genes to freeze (True) or to train (False)."""
    if genes is None or isinstance(genes, bool):
        return [] if genes is None else [(item.parameter, genes) for item in items]
    counts: dict[str, int] = {}
    for item in items:
        if item.index is not None:
            counts[item.layer] = max(counts.get(item.layer, 0), item.index + 1)
    _check_indices(genes, max(counts.values(), default=None))
    frozen = {layer: _indices(genes, count) for layer, count in counts.items()}
    return [(item.parameter, item.index in frozen.get(item.layer, ())) for item in items]


def _check_indices(genes: Sequence[int] | slice, most: int | None) -> None:
    """Refuse what is no slice and no indices, or an index beyond the largest K; `most` is None where no layer is."""
    if isinstance(genes, slice):
        try:
            genes.indices(1)
        except (TypeError, ValueError):
            raise ArgumentError(f"genes: expected a slice of ints with a step other than 0, got {genes!r}") from None
        return
    fine = isinstance(genes, Sequence) and not isinstance(genes, str)
    if not fine or any(isinstance(k, bool) or not isinstance(k, int) for k in genes):
        raise ArgumentError(f"genes: expected True, False, None, a slice or a sequence of indices, got {genes!r}")
    for k in genes:
        if most is not None and not -most <= k < most:
            raise ArgumentError(f"genes: expected indices below K = {most}, got {k}")


def _indices(genes: Sequence[int] | slice, count: int) -> set[int]:
    """Indices as numbers from 0 to K - 1."""
    if isinstance(genes, slice):
        return set(range(count)[genes])
    return {k % count for k in genes if -count <= k < count}
