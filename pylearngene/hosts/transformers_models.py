# SPDX-License-Identifier: Apache-2.0
"""The `transformers` family: a model class, its configuration, and the constructor switches outside the configuration.

transformers is imported only to rebuild; the names of either major version are found by structure, never listed.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from pylearngene.errors import HostError

NAME = "transformers"
_SWITCHES = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}


def claims(model: nn.Module) -> bool:
    """Say whether the class of `model` comes from transformers."""
    return type(model).__module__.partition(".")[0] == "transformers" and hasattr(
        vars(model).get("config"), "to_json_string"
    )


def configs(model: nn.Module, depth: int, /) -> Iterator[dict[str, Any]]:
    """Yield the way to build `model` again, where its configuration counts the blocks that were found."""
    config = vars(model)["config"]
    if getattr(config, "num_hidden_layers", None) != depth:
        return
    settings = json.loads(config.to_json_string(use_diff=False))
    # A local path may stand in the name; it says nothing about the architecture.
    settings.pop("_name_or_path", None)
    settings.pop("num_hidden_layers", None)
    parameters = inspect.signature(type(model).__init__).parameters
    switches = {name: _present(model, path) for name, path in _SWITCHES.items() if name in parameters}
    yield {
        "class": type(model).__name__,
        "config_class": type(config).__name__,
        "config": settings,
        "model_args": switches,
    }


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
    built = _class(config["config_class"]).from_dict({**settings, "num_hidden_layers": depth})
    model = _class(config["class"])(built, **config["model_args"])
    if not isinstance(model, nn.Module):
        raise HostError(f"host: expected the class of a transformers model, got {config['class']!r}")
    return model.train()


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
