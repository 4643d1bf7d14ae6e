# SPDX-License-Identifier: Apache-2.0
"""The small vision transformer of the demo and of `train`: the class of transformers, a configuration of ours.

transformers is optional and loaded on use, with a clear error where it is missing.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import nn

from pylearngene.errors import ArgumentError, GeneFileError

PATCHES_PER_SIDE = 4


def transformers() -> ModuleType:
    """Import transformers.

    Raises:
        ArgumentError: it is not installed; the message holds the command that installs it.
    """
    try:
        import transformers as module
    except ImportError as error:
        raise ArgumentError(
            "transformers: expected to be installed for this command; `pip install pylearngene[hf]` installs it"
        ) from error
    module.utils.logging.disable_progress_bar()
    return cast(ModuleType, module)


def small_vit(image_size: int, classes: int, *, depth: int, dim: int = 64, heads: int = 4, seed: int = 0) -> nn.Module:
    """Build a fresh `ViTForImageClassification` for one-channel images, cut in 4 x 4 patches.

    Args:
        image_size: height of the square images, a multiple of 4.
        classes: number of classes.
        depth: number of blocks.
        dim: width, a multiple of `heads`; the hidden layer of the MLP has four times as many units.
        heads: attention heads.
        seed: of the start; the caller's random state is untouched.

    Raises:
        ArgumentError: a size does not fit, or transformers is not installed.
    """
    for name, value in (("depth", depth), ("width", dim), ("heads", heads), ("classes", classes)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    if dim % heads:
        raise ArgumentError(f"width: expected a multiple of heads={heads}, got {dim}")
    if image_size % PATCHES_PER_SIDE:
        raise ArgumentError(f"image_size: expected a multiple of {PATCHES_PER_SIDE}, got {image_size}")
    module = transformers()
    config = module.ViTConfig(
        image_size=image_size,
        patch_size=image_size // PATCHES_PER_SIDE,
        num_channels=1,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(nn.Module, module.ViTForImageClassification(config))


def load_classifier(folder: Path) -> nn.Module:
    """Load an image classifier that transformers saved in a local folder; only safetensors are read.

    Raises:
        ArgumentError: no such folder.
        GeneFileError: the folder holds no image classifier that can be loaded.
    """
    if not folder.is_dir():
        raise ArgumentError(f"teacher: expected a folder, got {folder}")
    loader = transformers().AutoModelForImageClassification
    try:
        return cast(nn.Module, loader.from_pretrained(folder, local_files_only=True, use_safetensors=True))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GeneFileError(f"teacher: {folder} holds no image classifier that can be loaded ({reason})") from error
