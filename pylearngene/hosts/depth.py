# SPDX-License-Identifier: Apache-2.0
"""Changing how many blocks a model has, with everything that records their number or their place.

Works on structure only: blocks are copied, numbers in attributes follow. The weights of the blocks are the caller's
business.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pylearngene.hosts.structure import BLOCK_LISTS, Blocks, ancestors

_INDEX_NAME = re.compile(r"(^|_)(idx|index)$|^(layer|block)_?(id|num|number)$")
# lists of a configuration with an entry per block, for instance `layer_types` and `no_rope_layers`
PER_BLOCK = re.compile(r"(^|_)layers?(_|$)")
_COUNT_NAME = re.compile(r"^(depth|(num|n)_?(hidden_)?(layers?|blocks?))$")


@torch.inference_mode(False)  # copies made by a caller who trains nothing may be trained later
def resize_blocks(model: nn.Module, path: str, depth: int, keep: Iterable[object] = ()) -> Blocks:
    """Give the list of blocks at `path` exactly `depth` blocks, in place.

    Block `l` is the old block at the same relative position, copied where one serves twice, so that settings which
    follow the depth (drop-path rates) keep their course. Attributes that number the blocks or count them follow.

    Args:
        model: the whole model.
        path: where its list of blocks is.
        depth: the new number of blocks, >= 1.
        keep: objects that copies of a block share with the original (for instance a gene bank).

    Returns:
        The list of blocks, the same object as before.
    """
    blocks = model.get_submodule(path)
    assert isinstance(blocks, BLOCK_LISTS)
    old = list(blocks)
    numbered = _index_attributes(old)
    shared = [model, *_holders(model, path), *keep]
    names = _names(blocks, depth)
    resized = _spread(old, depth, {id(item): item for item in shared})
    del blocks[:]
    for index, (name, block) in enumerate(zip(names, resized, strict=True)):
        blocks.add_module(name, block)
        for owner, attribute, offset in numbered:
            setattr(block.get_submodule(owner), attribute, offset + index)
    _recount(model, path, len(old), depth)
    return blocks


def positions(old: int, depth: int) -> list[int]:
    """For each of `depth` places the one of `old` places at the same relative position."""
    return [0 if depth == 1 else (2 * index * (old - 1) + depth - 1) // (2 * (depth - 1)) for index in range(depth)]


def _names(blocks: Blocks, depth: int) -> list[str]:
    """Names for `depth` blocks: numbers, behind what stands before the numbers of the blocks that are there."""
    first = next(iter(blocks._modules))
    prefix = first.rstrip("0123456789")
    start = int(first.removeprefix(prefix) or 0)
    numbered = list(blocks._modules) == [f"{prefix}{start + index}" for index in range(len(blocks))]
    return [f"{prefix}{start + index}" if numbered else str(index) for index in range(depth)]


def _spread(old: list[nn.Module], depth: int, memo: dict[int, object]) -> list[nn.Module]:
    """Choose for each new position the old block at the same relative position; a second use takes a copy."""
    used: set[int] = set()
    chosen = []
    for source in positions(len(old), depth):
        chosen.append(copy.deepcopy(old[source], dict(memo)) if source in used else old[source])
        used.add(source)
    return chosen


def _index_attributes(blocks: list[nn.Module]) -> list[tuple[str, str, int]]:
    """Find integer attributes that number the blocks, as (module inside the block, attribute, number of block 0).

    They grow by one per block; with fewer than 3 blocks their name must say so as well.
    """
    found = []
    for owner, module in blocks[0].named_modules():
        for name, first in vars(module).items():
            if type(first) is not int or name.startswith("_"):
                continue
            values = [vars(block.get_submodule(owner)).get(name) for block in blocks]
            named = _INDEX_NAME.search(name) is not None
            if values == list(range(first, first + len(blocks))) and (named or len(blocks) >= 3):
                found.append((owner, name, first))
    return found


def _holders(model: nn.Module, path: str) -> list[Any]:
    """Return what may record the depth: the modules above the blocks and their configurations.

    A configuration may hold that of a part (a tower of CLIP), perhaps as a copy.
    """
    above = ancestors(model, path)
    configs = [vars(module).get(name) for module in above for name in ("config", "cfg")]
    configs = [config for config in configs if hasattr(config, "__dict__")]
    parts = [part for config in configs for part in vars(config).values() if hasattr(part, "__dict__")]
    inner = [part for part in parts if any(type(part) is type(config) and part == config for config in configs)]
    return list({id(holder): holder for holder in [*above, *configs, *inner]}.values())


def _recount(model: nn.Module, path: str, old: int, depth: int) -> None:
    """Let attributes above the blocks that said `old` say `depth`."""
    for holder in _holders(model, path):
        for name, value in list(vars(holder).items()):
            if _COUNT_NAME.match(name) and type(value) is int and value == old:
                vars(holder)[name] = depth
            elif isinstance(value, list):
                vars(holder)[name] = _relisted(name, value, old, depth)
    taps = vars(model).get("feature_info")
    if isinstance(taps, list) and [tap.get("module") for tap in taps] == [f"{path}.{i}" for i in range(old)]:
        vars(model)["feature_info"] = [{**taps[0], "module": f"{path}.{i}"} for i in range(depth)]


def _relisted(name: str, value: list[Any], old: int, depth: int) -> list[Any]:
    """Let a list of a configuration follow the depth: a kind per block, the names of stages, the last stage."""
    if PER_BLOCK.search(name) and len(value) == old:
        return [value[index] for index in positions(old, depth)]
    stages = [f"stage{index}" for index in range(1, max(old, depth) + 1)]
    if value == ["stem", *stages[:old]]:
        return ["stem", *stages[:depth]]
    if value == [stages[old - 1]]:
        return [stages[depth - 1]]
    return [depth] if name.endswith("out_indices") and value == [old] else value
