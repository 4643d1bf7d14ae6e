# SPDX-License-Identifier: Apache-2.0
"""Tiny language models of transformers with random weights, and what to feed them, for the tests of hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 50
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": VOCABULARY}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def language_model(name: str, config: str, depth: int, **changes: Any) -> nn.Module:
    """A model of transformers with random weights, in which no vector is constant."""
    import transformers

    model = getattr(transformers, name)(getattr(transformers, config)(**changes, **SPECIAL))
    assert len(next(part for part in model.modules() if isinstance(part, nn.ModuleList))) == depth
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.mul_(5.0)  # far enough from zero for attention to matter
    return model


def bert(depth: int = 3) -> nn.Module:
    return language_model("BertModel", "BertConfig", depth, **SIZES, num_hidden_layers=depth)


def gpt2(depth: int = 3) -> nn.Module:
    sizes = {"n_embd": 32, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    return language_model("GPT2LMHeadModel", "GPT2Config", depth, **sizes, n_layer=depth)


def llama(depth: int = 3) -> nn.Module:
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": depth, "rope_theta": 500.0}
    return language_model("LlamaForCausalLM", "LlamaConfig", depth, **sizes)


def qwen2(depth: int = 3) -> nn.Module:
    """Every second layer looks at a window of four tokens only."""
    windows = {"use_sliding_window": True, "sliding_window": 4}
    kinds = [("full_attention", "sliding_attention")[index % 2] for index in range(depth)]
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": depth, "tie_word_embeddings": True}
    return language_model("Qwen2ForCausalLM", "Qwen2Config", depth, **sizes, **windows, layer_types=kinds)


def qwen3(depth: int = 3) -> nn.Module:
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": depth}
    return language_model("Qwen3ForCausalLM", "Qwen3Config", depth, **sizes)


def smollm3(depth: int = 3) -> nn.Module:
    """The second of three layers has no positions, whatever the library's rule for a depth would say."""
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": depth}
    rotary = [1 - index % 2 for index in range(depth)]
    return language_model("SmolLM3ForCausalLM", "SmolLM3Config", depth, **sizes, no_rope_layers=rotary)


LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
}
GENERATIVE = ("gpt2", "llama", "qwen2", "qwen3", "smollm3")


def sentences(name: str) -> dict[str, Tensor]:
    """Two sentences, the first padded on the left (BERT: on the right, with token types)."""
    ids = torch.tensor([[0, 0, 7, 3, 12, 9, 30, 8], [5, 11, 4, 49, 21, 6, 13, 17]])
    mask = (ids != 0).long()
    if name == "bert":
        types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)
        return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), "token_type_ids": types}
    return {"input_ids": ids, "attention_mask": mask}


def embedded(net: nn.Module, fed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The output of a network at the tokens that are not padding, and the embeddings it was computed from."""
    inputs = dict(fed)
    embeddings = net.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    result = net(inputs_embeds=embeddings, **inputs)
    found = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found[fed["attention_mask"].bool()], embeddings
