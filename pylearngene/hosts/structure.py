# SPDX-License-Identifier: Apache-2.0
"""Finding the list of repeated blocks in a model, by structure alone.

A list of blocks is an `nn.ModuleList` or `nn.Sequential` of equal children; no model class is imported to recognise it.
What the blocks may hold is in `layers.py`; which library can rebuild the model is in `families.py`.
"""

from __future__ import annotations

from torch import nn

from pylearngene.errors import ArgumentError, HostError

Blocks = nn.ModuleList | nn.Sequential
BLOCK_LISTS = (nn.ModuleList, nn.Sequential)
SOUGHT = (
    "an nn.ModuleList or nn.Sequential of at least 2 children of equal type with equal parameter names, "
    "shapes, dtypes and devices"
)


def find_container(model: nn.Module, path: str | None = None) -> tuple[str, Blocks]:
    """Find the list of repeated blocks: of all lists that qualify the one with most parameters, the outermost first.

    Args:
        model: any module.
        path: name of the list inside `model`, where it is known; then a list of one block is accepted too.

    Returns:
        The list's path and the list.

    Raises:
        ArgumentError: `model` is no `nn.Module`.
        HostError: nothing qualifies; the message lists what was looked for and every list that was seen.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if path is not None:
        return path, _named_container(model, path)
    seen = [(name, module) for name, module in model.named_modules() if isinstance(module, BLOCK_LISTS)]
    qualified = [(name, module) for name, module in seen if name and why_not(module) is None]
    if not qualified:
        raise HostError(_nothing_found(model, seen))
    return max(qualified, key=lambda item: _num_parameters(item[1]))


def why_not(blocks: Blocks, least: int = 2) -> str | None:
    """Say in words why `blocks` is no list of repeated blocks of at least `least` children, or return None."""
    children = list(blocks)
    if len(children) < least:
        return f"has fewer than {least} children"
    if len({id(child) for child in children}) < len(children):
        return "holds one and the same module more than once"
    first = children[0]
    for index, child in enumerate(children):
        if type(child) is not type(first):
            return f"children 0 and {index} differ in type: {type(first).__name__}, {type(child).__name__}"
        difference = _difference(_signature(first), _signature(child))
        if difference is not None:
            return f"children 0 and {index} differ in {difference}"
    if not _signature(first):
        return "has children without parameters"
    bare = not list(first.children())
    return f"has bare {type(first).__name__} children: wrap each in a module of its own" if bare else None


def ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules on the way to `path`, the model itself first, the module at `path` left out."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]


def _named_container(model: nn.Module, path: str) -> Blocks:
    """Return the list at `path`, or say why it is none."""
    found = dict(model.named_modules()).get(path)
    if not path or not isinstance(found, BLOCK_LISTS):
        got = "nothing" if found is None else type(found).__name__
        raise HostError(f"blocks: expected the path of an nn.ModuleList or nn.Sequential, got {got} at {path!r}")
    reason = why_not(found, least=1)
    if reason is not None:
        raise HostError(f"blocks: expected equal blocks at {path!r}, but the list {reason}")
    return found


def _signature(module: nn.Module) -> dict[str, str]:
    """Describe every parameter of `module` by its shape, dtype and device."""
    described = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shape = "uninitialized" if nn.parameter.is_lazy(parameter) else str(tuple(parameter.shape))
        described[name] = f"{shape} {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
    return described


def _difference(first: dict[str, str], other: dict[str, str]) -> str | None:
    """Name the first parameter in which two signatures differ."""
    for name in [*first, *other]:
        if first.get(name) != other.get(name):
            return f"parameter {name!r}: {first.get(name, 'absent')}, {other.get(name, 'absent')}"
    return None


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _nothing_found(model: nn.Module, seen: list[tuple[str, Blocks]]) -> str:
    """Word the error for a model in which no list qualifies."""
    lines = [f"model: expected repeated blocks ({SOUGHT}), got {type(model).__name__} with none. Lists seen:"]
    for name, module in seen:
        reason = why_not(module) or "is the model itself: wrap it in a module of its own"
        lines.append(f"  {name or 'the model'!r} ({type(module).__name__} of {len(module)}): {reason}")
    if not seen:
        lines.append("  none at all")
    return "\n".join(lines)
