# SPDX-License-Identifier: Apache-2.0
"""The tensors of a network outside its repeated blocks: embeddings, norms, heads and buffers.

A learngene stores them as they are, by the model's own key; genes and blocks are none of this module's business.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pylearngene.errors import ArgumentError, HostError
from pylearngene.learngene import HostSpec


def tensors(net: nn.Module, spec: HostSpec) -> dict[str, Tensor]:
    """Return the stored tensors outside blocks and bank, by key; parameters and buffers themselves, not copies.

    A tensor with several keys (an output layer tied to the embedding) is there once, under its first.
    """
    return {keys[0]: value for keys, value in _places(net, spec)}


def _places(net: nn.Module, spec: HostSpec) -> list[tuple[list[str], Tensor]]:
    """Return every tensor outside blocks and bank with all its keys."""
    inside = (f"{spec.blocks}.", "gene_bank.")
    places: dict[int, tuple[list[str], Tensor]] = {}
    for key, value in net.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not key.startswith(inside):
            places.setdefault(id(value), ([], value))[0].append(key)
    return list(places.values())


def renamed(stored: Mapping[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    """Give stored tensors the keys of a network whose blocks, and all else, lie deeper or less deep by a prefix.

    Args:
        stored: the tensors by key.
        before: path of the blocks that goes with those keys.
        after: path of the blocks in the network.
    """
    if before.endswith(f".{after}"):
        prefix = before.removesuffix(after)
        return {key.removeprefix(prefix): value for key, value in stored.items()}
    prefix = after.removesuffix(before) if after.endswith(f".{before}") else ""
    return {f"{prefix}{key}": value for key, value in stored.items()}


def load(
    net: nn.Module, spec: HostSpec, stored: Mapping[str, Tensor], dtype: torch.dtype | None, num_classes: int | None
) -> list[str]:
    """Copy stored tensors into a network; each keeps its dtype unless `dtype` says otherwise.

    Args:
        net: the network, on its device.
        spec: where its blocks are.
        stored: the tensors by key.
        dtype: dtype of the floating-point ones, or None.
        num_classes: where given, tensors that are absent or of another shape are a new head and stay as they are;
            with 0 the head is gone and what was stored of it is left over.

    Returns:
        The keys of the new head.

    Raises:
        HostError: tensors are missing, left over, or of another shape.
        ArgumentError: `num_classes` was asked of a network without a head.
    """
    places = _places(net, spec)
    extra = sorted(stored.keys() - {key for keys, _ in places for key in keys})
    targets = {next((key for key in keys if key in stored), keys[0]): value for keys, value in places}
    fresh = [key for key, value in targets.items() if key not in stored or stored[key].shape != value.shape]
    if (fresh and num_classes is None) or (extra and num_classes != 0):
        shapes = {key: tuple(targets[key].shape) for key in fresh}
        raise HostError(
            f"tensors: expected those outside the blocks of {type(net).__name__}, got none that fit for {shapes} "
            f"and unexpected {extra}"
        )
    if num_classes and not any(value.shape[:1] == (num_classes,) for value in targets.values()):
        raise ArgumentError(
            f"num_classes: expected a host with a classification head, got {type(net).__name__} without"
        )
    for key, value in targets.items():
        if key not in fresh:
            wanted = (dtype or stored[key].dtype) if stored[key].is_floating_point() else stored[key].dtype
            value.data = stored[key].detach().to(value.device, wanted, copy=True)
    return fresh
