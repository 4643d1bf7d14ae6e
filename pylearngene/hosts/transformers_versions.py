# SPDX-License-Identifier: Apache-2.0
"""What versions 4 and 5 of transformers call differently: modules of a model, and settings of its configuration.

A learngene stored with one version is read with the other. Nothing here imports transformers.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

# version 4 to version 5, of ViT, DeiT and DINOv2
_RENAMED_LAYERS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_BACKWARDS = {after: before for before, after in _RENAMED_LAYERS.items()}
# ends of the path of the list of blocks, then the prefix that the towers of CLIP have lost
_RENAMED_BLOCKS = ("encoder.layer", "layers")
_PREFIXES = ("vision_model.", "text_model.")


def names_in(model: nn.Module, blocks: str, paths: list[str]) -> tuple[str, list[str]] | None:
    """Find the names that stored `blocks` and layer `paths` have in `model`, whichever major version wrote them.

    Returns:
        The path of the list of blocks and the layer paths in the same order, or None where they are not there.
    """
    modules = dict(model.named_modules())
    for found in _block_names(blocks):
        known = [_known(f"{found}.0", path, modules) for path in paths]
        if None not in known:
            return found, [path for path in known if path is not None]
    return None


def _known(block: str, path: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the first name of a layer that is there."""
    names = (path, _RENAMED_LAYERS.get(path, path), _BACKWARDS.get(path, path))
    return next((name for name in names if f"{block}.{name}" in modules), None)


def _block_names(blocks: str) -> list[str]:
    """The name itself, and those that another version may have."""
    names = [blocks]
    for end, other in (_RENAMED_BLOCKS, _RENAMED_BLOCKS[::-1]):
        if blocks.endswith(end):
            names.append(f"{blocks.removesuffix(end)}{other}")
    for prefix in _PREFIXES:
        names.append(blocks.removeprefix(prefix) if blocks.startswith(prefix) else f"{prefix}{blocks}")
    return names


def known_settings(settings: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Translate settings of version 5 that version 4 would overlook; version 5 itself reads those of version 4."""
    parameters = inspect.signature(config_class.__init__).parameters
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_parameters" in parameters or "rope_theta" not in parameters:
        return settings
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    known = {key: value for key, value in settings.items() if key != "rope_parameters"}
    return {**known, "rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
