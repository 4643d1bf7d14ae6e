# SPDX-License-Identifier: Apache-2.0
"""Language models of transformers as hosts: equal to the plain model, grown, generating, saved by their own library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from language_samples import GENERATIVE, LANGUAGE, embedded, sentences
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.learngene import Learngene
from pylearngene.methods import TLEG, Expansion, ShareInit
from pylearngene.networks import auxiliary, bake, extract, set_depth

pytestmark = pytest.mark.hosts
HOSTS = list(LANGUAGE)


def fitted(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A plain model and its TLEG network with fitted genes, both in evaluation mode."""
    model = LANGUAGE[name]().to(dtype).eval()
    return model, auxiliary(model, TLEG(), init="fit")


def output(net: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return embedded(net, sentences(name))[0]


def with_gradient(net: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of its squares by the input embeddings."""
    found, embeddings = embedded(net, sentences(name))
    found.square().sum().backward()
    assert embeddings.grad is not None
    return found.detach(), embeddings.grad


@pytest.mark.parametrize("name", HOSTS)
def test_backed_equals_plain_and_baked_with_gradients(name: str) -> None:
    model = LANGUAGE[name]().double().eval()
    for rule in (Expansion(torch.eye(3)), TLEG()):
        net = auxiliary(model, rule, init="fit")
        baked = bake(net)
        assert [type(part) for part in baked.modules()] == [type(part) for part in model.modules()]
        assert baked.state_dict().keys() == model.state_dict().keys()
        found, expected = with_gradient(net, name), with_gradient(baked, name)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        if rule != TLEG():
            torch.testing.assert_close(found[0], output(model, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("training", [True, False])
def test_no_dense_weight_is_built(name: str, training: bool) -> None:
    net = auxiliary(LANGUAGE[name](), TLEG()).train(training)
    before = plg.nn.dense_syntheses()
    with_gradient(net, name)
    net.init_weights()
    assert plg.nn.dense_syntheses() == before
    assert all(gene.grad is not None for _, gene in net.gene_bank.named_genes())


@pytest.mark.parametrize("name", HOSTS)
def test_a_fit_says_how_well_few_genes_serve(name: str) -> None:
    model = LANGUAGE[name]().double()
    few = auxiliary(model, ShareInit(), init="fit")
    for found in plg.summary(few).layers:
        layers = [block.get_submodule(found.name) for block in model.get_submodule(few.gene_bank.host.blocks)]
        tensors = [torch.cat([tensor.flatten() for tensor in layer.parameters()]) for layer in layers]
        stack = torch.stack(tensors)
        expected = (stack - stack.mean(0)).norm() / stack.norm()
        assert found.residual == pytest.approx(expected.item(), rel=1e-9)
    exact = auxiliary(LANGUAGE[name](2).double(), TLEG(), init="fit")
    assert all(found.residual < 1e-12 for found in plg.summary(exact).layers)


@pytest.mark.parametrize("name", HOSTS)
def test_stored_and_grown_at_any_depth(name: str, tmp_path: Path) -> None:
    _, net = fitted(name)
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    assert lg.num_parameters == sum(parameter.numel() for parameter in net.parameters())
    for depth in (2, 3, 5):
        backed, plain = lg.descend(depth=depth).eval(), lg.descend(depth=depth, backed=False).eval()
        torch.testing.assert_close(output(backed, name), output(plain, name), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            output(set_depth(copy.deepcopy(net), depth), name), output(backed, name), rtol=0, atol=0
        )
        assert plain.state_dict().keys() == LANGUAGE[name](depth).state_dict().keys()
        assert backed.config.num_hidden_layers == plain.config.num_hidden_layers == depth


@pytest.mark.parametrize("name", HOSTS)
def test_baked_networks_are_files_of_their_own_library(name: str, tmp_path: Path) -> None:
    _, net = fitted(name, torch.float32)
    grown = extract(net).descend(depth=5, backed=False).eval()
    for index, plain in enumerate((bake(net), bake(set_depth(net, 2)), grown)):
        plain.save_pretrained(tmp_path / str(index))
        again = type(plain).from_pretrained(tmp_path / str(index)).eval()
        assert again.config.num_hidden_layers == (3, 2, 5)[index]
        torch.testing.assert_close(output(again, name), output(plain, name), rtol=0, atol=0)


@pytest.mark.parametrize("name", HOSTS)
def test_copies_and_state_dicts(name: str) -> None:
    _, net = fitted(name)
    expected = output(net, name)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(output(net, name), expected)
    assert not torch.equal(output(twin, name), expected)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(output(twin, name), expected)


@pytest.mark.parametrize("name", GENERATIVE)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    _, net = fitted(name)
    whole = sentences(name)
    positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = net(**whole, position_ids=positions).logits[0, 2:]
        alone = net(input_ids=whole["input_ids"][:1, 2:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


def test_masks_and_token_types_of_bert_matter_and_are_kept() -> None:
    _, net = fitted("bert")
    fed, baked = sentences("bert"), bake(net)
    expected = output(net, "bert")
    for changes in ({"token_type_ids": torch.zeros_like(fed["token_type_ids"])}, {"attention_mask": None}):
        with torch.no_grad():
            found, plain = (model(**{**fed, **changes}).last_hidden_state for model in (net, baked))
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(found[fed["attention_mask"].bool()], expected, atol=1e-3)


def generated(net: nn.Module, **options: Any) -> Tensor:
    """Eight tokens after two sentences, chosen greedily."""
    fed = sentences("llama")
    return net.generate(**fed, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_equals_that_of_the_baked_model_at_every_depth(name: str) -> None:
    _, net = fitted(name)
    for depth in (3, 5, 2):
        set_depth(net, depth)
        before = plg.nn.dense_syntheses()
        found = generated(net)
        assert plg.nn.dense_syntheses() == before
        assert torch.equal(found, generated(net, use_cache=False))
        assert torch.equal(found, generated(bake(net)))
        assert torch.equal(found, generated(extract(net).descend(depth=depth).eval()))
        assert found.shape == (2, 16)


def test_tied_embeddings_stay_tied_and_are_stored_once() -> None:
    _, net = fitted("gpt2")
    lg = extract(net)
    assert len({"lm_head.weight", "transformer.wte.weight"} & lg.tensors.keys()) == 1
    for found in (net, lg.descend(depth=4), lg.descend(depth=4, backed=False), bake(net), copy.deepcopy(net)):
        assert found.lm_head.weight is found.transformer.wte.weight
    both = Learngene(lg.genes, {**lg.tensors}, TLEG(), lg.host)
    both.tensors["lm_head.weight"] = both.tensors["transformer.wte.weight"] = next(
        lg.tensors[key] for key in ("lm_head.weight", "transformer.wte.weight") if key in lg.tensors
    )
    assert torch.equal(output(both.descend().eval(), "gpt2"), output(net, "gpt2"))


def test_kinds_of_layers_follow_the_depth() -> None:
    kinds = {1: ["full"], 2: ["full", "full"], 3: ["full", "sliding", "full"]}
    kinds[5] = ["full", "sliding", "sliding", "full", "full"]
    for depth, expected in kinds.items():
        _, net = fitted("qwen2")
        grown = extract(net).descend(depth)
        for found in (grown, set_depth(net, depth), extract(net).descend()):
            assert [kind.partition("_")[0] for kind in found.config.layer_types] == expected
            layers = found.model.layers
            assert [layer.self_attn.sliding_window is not None for layer in layers] == [
                k == "sliding" for k in expected
            ]


def test_a_list_that_the_library_would_make_anew_follows_the_blocks() -> None:
    model = LANGUAGE["smollm3"](4)
    model.config.no_rope_layers = [1, 1, 1, 0]  # what SmolLM3 makes of four layers
    for layer, rotary in zip(model.model.layers, model.config.no_rope_layers, strict=True):
        layer.self_attn.use_rope = rotary
    net = auxiliary(model, TLEG())
    assert net.gene_bank.host.family == "transformers"
    for depth, expected in {2: [1, 0], 8: [1, 1, 1, 1, 1, 1, 0, 0]}.items():
        for found in (extract(net).descend(depth), set_depth(copy.deepcopy(net), depth)):
            assert found.config.no_rope_layers == expected
            assert [layer.self_attn.use_rope for layer in found.model.layers] == expected


def test_gpt2_keeps_its_class_and_the_shape_of_its_weights() -> None:
    model, net = fitted("gpt2")
    layer, plain = net.transformer.h[1].attn.c_attn, model.transformer.h[1].attn.c_attn
    before = plg.nn.dense_syntheses()
    assert layer.weight.shape == plain.weight.shape == (32, 96)
    assert layer.weight.size(1) == 96
    assert plg.nn.dense_syntheses() == before
    assert net.gene_bank.group("attn.c_attn").weight[0].shape == (96, 32)
    baked = bake(net)
    torch.testing.assert_close(layer.weight + 0, baked.transformer.h[1].attn.c_attn.weight)
    assert type(baked.transformer.h[1].attn.c_attn).__name__ == "Conv1D"
    assert net.config.n_layer == 3
    assert set_depth(net, 4).config.n_layer == 4


def test_settings_of_rotary_positions_reach_the_other_version() -> None:
    from pylearngene.hosts.transformers_versions import known_settings

    class Old:
        def __init__(self, rope_theta: float = 1e4, rope_scaling: Any = None) -> None: ...

    class New:
        def __init__(self, rope_parameters: Any = None) -> None: ...

    plain = {"a": 1, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    assert known_settings(plain, Old) == {"a": 1, "rope_theta": 5.0, "rope_scaling": None}
    assert known_settings(plain, New) == plain
    scaled = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}}
    expected = {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert known_settings(scaled, Old) == expected
    assert known_settings(expected, Old) == expected
    _, net = fitted("llama")
    grown = extract(net).descend(depth=2)
    assert torch.equal(grown.model.rotary_emb.inv_freq, LANGUAGE["llama"]().model.rotary_emb.inv_freq)
