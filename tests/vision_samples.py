# SPDX-License-Identifier: Apache-2.0
"""Tiny vision and two-tower models with random weights, and models of one's own around PyTorch's attention.

Each comes with the path of its blocks where the path must be said, and with what to feed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE: dict[str, Any] = {"image_size": 28, "patch_size": 7}
TEXT: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}


def randomized(model: nn.Module) -> nn.Module:
    """The model with weights in which no vector is constant, the same at every call."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
            parameter.copy_(1 + 0.5 * noise if parameter.dim() == 1 else 0.6 * noise)
    return model


def hugging_face(name: str, config: str, **settings: Any) -> nn.Module:
    import transformers

    return randomized(getattr(transformers, name)(getattr(transformers, config)(**settings)))


def clip_vision(depth: int = 3) -> nn.Module:
    return hugging_face("CLIPVisionModel", "CLIPVisionConfig", **SIZES, **IMAGE, num_hidden_layers=depth)


def clip_text(depth: int = 3) -> nn.Module:
    return hugging_face("CLIPTextModel", "CLIPTextConfig", **SIZES, **TEXT, num_hidden_layers=depth)


def clip(vision: int = 3, text: int = 3) -> nn.Module:
    towers = {
        "vision_config": {**SIZES, **IMAGE, "num_hidden_layers": vision},
        "text_config": {**SIZES, **TEXT, "num_hidden_layers": text},
    }
    return hugging_face("CLIPModel", "CLIPConfig", **towers, projection_dim=16)


def dinov2(depth: int = 3) -> nn.Module:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "mlp_ratio": 2, "num_hidden_layers": depth}
    return hugging_face("Dinov2Model", "Dinov2Config", **sizes, **IMAGE, layerscale_value=0.5)


def torchvision_vit(depth: int = 3) -> nn.Module:
    from torchvision.models import VisionTransformer

    return randomized(VisionTransformer(28, 7, depth, 4, 32, 48, num_classes=10))


def timm_vit(depth: int = 3) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 28, "patch_size": 7, "num_classes": 10, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2.0}
    return randomized(VisionTransformer(depth=depth, init_values=1e-2, **sizes))


class Encoder(nn.Module):
    """PyTorch's own encoder over tokens [B, T, 32], with a padding mask."""

    def __init__(self, depth: int = 3, **changes: Any) -> None:
        super().__init__()
        options = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True, **changes}
        layer = nn.TransformerEncoderLayer(32, 4, **options)
        nested = bool(options["batch_first"]) and not options.get("norm_first")
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=nested)
        self.head = nn.Linear(32, 10)
        randomized(self)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def padding() -> Tensor:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    return mask


def images() -> Tensor:
    return torch.linspace(-3, 3, 2 * 3 * 28 * 28, dtype=torch.float64).sin().reshape(2, 3, 28, 28)


def words() -> Tensor:
    return torch.tensor([[1, 7, 3, 12, 9, 2], [1, 11, 4, 49, 21, 2]])


@dataclass(frozen=True)
class Sample:
    """One host: how to build it, where its blocks are, and how to get one tensor out of it."""

    build: Callable[..., nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    blocks: str | None = None
    family: str = "transformers"
    config: Callable[[nn.Module], Any] = lambda net: net.config

    def inputs(self, net: nn.Module) -> Tensor:
        """Images, or tokens after their embedding, in the dtype of the network."""
        return images().to(next(net.parameters()).dtype)

    def output(self, net: nn.Module, x: Tensor | None = None) -> Tensor:
        """What the network makes of x."""
        x = self.inputs(net) if x is None else x
        before = torch.get_default_dtype()
        torch.set_default_dtype(x.dtype)  # in which transformers 4 makes the causal mask of CLIP's text tower
        try:
            return self.run(net, x)
        finally:
            torch.set_default_dtype(before)


def _pair(net: nn.Module, x: Tensor) -> Tensor:
    """The two towers of CLIP: all similarities of image and text."""
    return net(input_ids=words(), pixel_values=x).logits_per_image


def _tokens(net: nn.Module, x: Tensor) -> Tensor:
    """The first five rows of the images as tokens of 32 numbers, the last two of them padded."""
    tokens = x.flatten(1)[:, :160].reshape(2, 5, 32)
    return net(tokens, padding())[~padding()]


def _states(net: nn.Module, x: Tensor) -> Tensor:
    return net(pixel_values=x).last_hidden_state


VISION = {
    "clip_vision": Sample(clip_vision, _states),
    "clip_text": Sample(clip_text, lambda net, x: net(input_ids=words()).last_hidden_state * x.mean()),
    "clip, vision": Sample(clip, _pair, "vision_model.encoder.layers", config=lambda net: net.config.vision_config),
    "clip, text": Sample(
        lambda depth=3: clip(3, depth), _pair, "text_model.encoder.layers", config=lambda net: net.config.text_config
    ),
    "dinov2": Sample(dinov2, _states),
    "timm": Sample(timm_vit, lambda net, x: net(x), family="timm"),
    "torchvision": Sample(torchvision_vit, lambda net, x: net(x), family="own"),
    "encoder": Sample(Encoder, _tokens, family="own"),
    "encoder, norm first": Sample(lambda depth=3: Encoder(depth, norm_first=True, bias=False), _tokens, family="own"),
}
FOREIGN = tuple(name for name, sample in VISION.items() if sample.family == "transformers")
