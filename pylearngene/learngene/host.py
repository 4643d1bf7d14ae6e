# SPDX-License-Identifier: Apache-2.0
"""`HostSpec`: which kind of network a learngene belongs to, and the small checks its fields need.

How a network is found or built from a spec is not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pylearngene.errors import ArgumentError, GeneFileError
from pylearngene.files import is_tensor_name, shown

_FAMILIES = ("timm", "transformers", "own")
_MAX_DEPTH = 10_000
_kinds: list[str] = []


def register_layer_kind(name: str) -> None:
    """Allow hosts to have gene-backed layers of this kind; called by `pylearngene.hosts.kinds`."""
    if name not in _kinds:
        _kinds.append(name)


def require(fits: bool, argument: str, expected: str, got: object) -> None:
    """Raise ArgumentError with the usual message unless `fits`."""
    if not fits:
        raise ArgumentError(f"{argument}: expected {expected}, got {shown(got)}")


def is_count(value: object, low: int, high: int = 2**31 - 1) -> bool:
    """Say whether the value is an integer (and no bool) from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def differing_keys(got: Mapping[str, Any], wanted: set[str], what: str) -> None:
    """Raise GeneFileError unless the keys are exactly the wanted ones."""
    missing, extra = sorted(wanted - set(got)), sorted(set(got) - wanted)
    if missing or extra:
        faults = [f"{kind} {shown(keys)}" for kind, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise GeneFileError(f"{what}: expected the keys {', '.join(sorted(wanted))}; got {' and '.join(faults)}")


def _is_path(value: object) -> bool:
    return value == "" or is_tensor_name(value)


@dataclass(frozen=True)
class HostSpec:
    """Which kind of network a learngene belongs to, enough to build one of another depth.

    Args:
        family: who builds it: "timm", "transformers", or "own" (a model is handed to `descend`).
        config: what the family needs, JSON values (architecture and arguments, or class name and config).
        blocks: path of the list of repeated blocks, for instance "blocks" or "vit.encoder.layer".
        depth: number of blocks of the network it came from, 1 to 10,000.
        layers: (path inside a block, its kind, for instance "linear") of every gene-backed layer.

    Raises:
        ArgumentError: a field has another type or value; the message names it.
    """

    family: str
    config: dict[str, Any]
    blocks: str
    depth: int
    layers: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        require(self.family in _FAMILIES, "host.family", f"one of {', '.join(_FAMILIES)}", self.family)
        require(isinstance(self.config, dict), "host.config", "a dict", self.config)
        require(_is_path(self.blocks), "host.blocks", "a module path", self.blocks)
        require(is_count(self.depth, 1, _MAX_DEPTH), "host.depth", f"an integer from 1 to {_MAX_DEPTH}", self.depth)
        expected = f"pairs of a module path and one of {', '.join(_kinds)}"
        require(isinstance(self.layers, tuple), "host.layers", expected, self.layers)
        for pair in self.layers:
            fits = isinstance(pair, tuple) and len(pair) == 2 and _is_path(pair[0]) and pair[1] in _kinds
            require(fits, "host.layers", expected, pair)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "layers": [list(pair) for pair in self.layers]}

    @classmethod
    def from_dict(cls, data: object, what: str = "host") -> HostSpec:
        """Make a spec from the fields of `to_dict`.

        Raises:
            GeneFileError: keys are missing or unknown, or a field is malformed; `what` starts the message.
        """
        if not isinstance(data, dict):
            raise GeneFileError(f"{what}: expected a host of key and value, got {shown(data)}")
        differing_keys(data, {item.name for item in dataclasses.fields(cls)}, f"{what}: host")
        layers = data["layers"]
        if isinstance(layers, list):
            layers = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in layers)
        try:
            return cls(**{**data, "layers": layers})
        except ArgumentError as error:
            raise GeneFileError(f"{what}: {error}") from error
