# SPDX-License-Identifier: Apache-2.0
"""The `transformers` family: a model class, its configuration, and the constructor switches outside the configuration.

transformers is imported only to rebuild. Names inside a model are found by structure; the one table here translates the
names of stored learngenes between the major versions 4 and 5.
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
# version 4 to version 5, of ViT and DeiT
_RENAMED_LAYERS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_RENAMED_BLOCKS = ("encoder.layer", "layers")


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


def names_in(model: nn.Module, blocks: str, paths: list[str]) -> tuple[str, list[str]] | None:
    """Find the names that stored `blocks` and layer `paths` have in `model`, whichever major version wrote them.

    Returns:
        The path of the list of blocks and the layer paths in the same order, or None where they are not there.
    """
    old, new = _RENAMED_BLOCKS
    backwards = {after: before for before, after in _RENAMED_LAYERS.items()}
    for end, other, table in (("", "", {}), (old, new, _RENAMED_LAYERS), (new, old, backwards)):
        if not blocks.endswith(end):
            continue
        found = f"{blocks.removesuffix(end)}{other}"
        renamed = [table.get(path, path) for path in paths]
        modules = dict(model.named_modules())
        if all(f"{found}.0.{path}" in modules for path in renamed):
            return found, renamed
    return None


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
