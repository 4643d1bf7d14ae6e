# SPDX-License-Identifier: Apache-2.0
"""The `transformers` family: a model class, its configuration, and the constructor switches outside the configuration.

transformers is imported only to rebuild. Names inside a model are found by structure; what its versions 4 and 5 call
differently is in `transformers_versions.py`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from pylearngene.errors import HostError
from pylearngene.hosts.depth import PER_BLOCK, positions
from pylearngene.hosts.transformers_versions import known_settings, names_in

__all__ = ["NAME", "build", "claims", "configs", "names_in"]

NAME = "transformers"
_SWITCHES = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}
_COUNT = re.compile(r"(layers?|depth)$")
_USUAL_COUNT = "num_hidden_layers"


def claims(model: nn.Module) -> bool:
    """Say whether the class of `model` comes from transformers."""
    return type(model).__module__.partition(".")[0] == "transformers" and hasattr(
        vars(model).get("config"), "to_json_string"
    )


def configs(model: nn.Module, depth: int, /) -> Iterator[dict[str, Any]]:
    """Yield ways to build `model` again, one for every number in its configuration that may count the blocks."""
    config = vars(model)["config"]
    settings = _settings(config)
    # A local path may stand in the name; it says nothing about the architecture.
    settings.pop("_name_or_path", None)
    parameters = inspect.signature(type(model).__init__).parameters
    switches = {name: _present(model, path) for name, path in _SWITCHES.items() if name in parameters}
    for count in _counts(settings, depth):
        described = {
            "class": type(model).__name__,
            "config_class": type(config).__name__,
            "config": _without_derived(type(config), settings, count, depth),
            "model_args": switches,
        }
        yield described if count == _USUAL_COUNT else {**described, "count": count}


def build(config: dict[str, Any], depth: int, num_classes: int | None) -> nn.Module:
    """Build the plain model that `config` describes, with `depth` blocks.

    Raises:
        HostError: the installed transformers has no such class.
    """
    settings = dict(config["config"])
    if num_classes is not None and num_classes != len(settings.get("id2label") or ()):
        settings.pop("id2label", None)
        settings.pop("label2id", None)
        settings["num_labels"] = num_classes
    config_class = _class(config["config_class"])
    settings = known_settings(_counting(settings, config.get("count", _USUAL_COUNT), depth), config_class)
    model = _class(config["class"])(config_class.from_dict(settings), **config["model_args"])
    if not isinstance(model, nn.Module):
        raise HostError(f"host: expected the class of a transformers model, got {config['class']!r}")
    return model.train()


def _settings(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def _counts(settings: dict[str, Any], depth: int) -> list[str]:
    """List the settings that may count the blocks, as dotted paths; which one does is proven by rebuilding."""
    nested = [(f"{key}.", value) for key, value in settings.items() if isinstance(value, dict)]
    return [
        f"{place}{key}"
        for place, inner in [("", settings), *nested]
        for key, value in inner.items()
        if _COUNT.search(key) and type(value) is int and value == depth
    ]


def _counting(settings: dict[str, Any], count: str, depth: int) -> dict[str, Any]:
    """Return settings that count `depth` blocks; lists with an entry per block follow, as the blocks do."""
    place, _, key = count.rpartition(".")
    inner = {**(settings[place] if place else settings), key: depth}
    for name, value in inner.items():
        if PER_BLOCK.search(name) and isinstance(value, list) and value:
            inner[name] = [value[index] for index in positions(len(value), depth)]
    return {**settings, place: inner} if place else inner


def _without_derived(config_class: Any, settings: dict[str, Any], count: str, depth: int) -> dict[str, Any]:
    """Leave out the count, and lists that the configuration makes from it (names of stages), but for entries per block.

    Those would be made anew for another depth by the library's rule, while blocks keep their settings by position.
    """
    place, _, key = count.rpartition(".")
    inner = dict(settings[place] if place else settings)
    lists = {name: len(value) for name, value in inner.items() if isinstance(value, list)}
    for name in [name for name, length in lists.items() if length != depth or not PER_BLOCK.search(name)]:
        less = {other: value for other, value in inner.items() if other != name}
        if _reads_back(config_class, {**settings, place: less} if place else less, settings):
            inner = less
    del inner[key]
    return {**settings, place: inner} if place else inner


def _reads_back(config_class: Any, less: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Say whether fewer settings make the same configuration."""
    try:
        return _settings(config_class.from_dict(less)) == _settings(config_class.from_dict(settings))
    except (TypeError, ValueError, KeyError, AttributeError):
        return False


def _class(name: str) -> Any:
    """Fetch a public class of transformers by its name."""
    found = getattr(importlib.import_module("transformers"), name, None) if name.isidentifier() else None
    if not isinstance(found, type):
        raise HostError(f"host: the installed transformers has no class {name!r}")
    return found


def _present(model: nn.Module, path: str) -> bool:
    """Say whether the tensor or module at `path` is there."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None
