# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every family, and a user's own network that the library has never seen, for the tests of hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class OddMixer(nn.Module):
    """A block of no known library: gated mixing over tokens, then over channels, with a drop rate."""

    def __init__(self, dim: int, tokens: int, layer_idx: int, rate: float) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.before = nn.LayerNorm(dim, eps=0.03)
        self.gate = nn.Linear(tokens, tokens)
        self.up = nn.Sequential(nn.Linear(dim, 2 * dim, bias=False), nn.GELU())
        self.down = nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        assert self.up[0].weight.dtype == self.gate.weight.dtype
        assert self.up[0].weight.device == x.device
        y = self.before(x)
        y = y * self.gate(y.transpose(1, 2)).transpose(1, 2).sigmoid()
        return x + self.drop(self.down(self.up(y)))


class OddNet(nn.Module):
    """Image [B, 1, 28, 28] to logits, through a list of blocks that it counts itself."""

    def __init__(self, depth: int = 3, dim: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.num_blocks = depth
        self.stem = nn.Conv2d(1, dim, 7, 7)
        self.body = nn.ModuleDict({"steps": nn.ModuleList(OddMixer(dim, 16, index, 0.0) for index in range(depth))})
        self.tail = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for index in range(self.num_blocks):
            x = self.body["steps"][index](x)
        return self.tail(x.mean(1))


class OddResidual(nn.Module):
    """A residual block of convolutions: 3x3, group norm, ReLU, 3x3, group norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same", padding_mode="reflect")
        self.norm2 = nn.GroupNorm(4, width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class OddResNet(nn.Module):
    """Image [B, 1, 28, 28] to logits: a stem, one stage of equal residual blocks, a head."""

    def __init__(self, depth: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 7, 4, 3), nn.ReLU())
        self.stage = nn.Sequential(*(OddResidual(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def timm_vit(depth: int = 3, **changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "num_heads": 2}
    return VisionTransformer(depth=depth, **{**sizes, "class_token": False, "global_pool": "avg", **changes})


def hugging_face(name: str, depth: int = 3, **changes: Any) -> nn.Module:
    import transformers

    config = "DeiTConfig" if name.startswith("DeiT") else "ViTConfig"
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28, "patch_size": 7}
    settings = getattr(transformers, config)(
        num_hidden_layers=depth, num_channels=1, num_labels=10, **{**sizes, **changes}
    )
    return getattr(transformers, name)(settings)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "timm": timm_vit,
    "vit": lambda depth=3: hugging_face("ViTModel", depth),
    "deit": lambda depth=3: hugging_face("DeiTModel", depth),
    "vit_classifier": lambda depth=3: hugging_face("ViTForImageClassification", depth),
    "own": OddNet,
}


def output(net: nn.Module, x: Tensor) -> Tensor:
    """The tensor that a network of any family computes."""
    result = net(x)
    if isinstance(result, Tensor):
        return result
    found = result.logits if hasattr(result, "logits") else result.last_hidden_state
    assert isinstance(found, Tensor)
    return found


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    """Two made-up images, without the random generator."""
    return torch.linspace(-3, 3, 2 * 28 * 28, dtype=dtype).sin().reshape(2, 1, 28, 28)
