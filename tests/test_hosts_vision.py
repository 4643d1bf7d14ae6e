# SPDX-License-Identifier: Apache-2.0
"""Vision towers and PyTorch's own encoder as hosts: CLIP, DINOv2, timm, torchvision, `nn.TransformerEncoder`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vision_samples import FOREIGN, VISION, Encoder, clip, dinov2, padding, torchvision_vit

import pylearngene as plg
from pylearngene.hosts import find_blocks
from pylearngene.learngene import HostSpec, Learngene
from pylearngene.methods import TLEG, Expansion, ShareInit
from pylearngene.networks import auxiliary, bake, extract, set_depth

# The plain `nn.TransformerEncoder` warns that the nested tensors of its fast path are a prototype.
pytestmark = [pytest.mark.hosts, pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")]
HOSTS = list(VISION)


def fitted(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A plain model and its TLEG network with fitted genes, both in evaluation mode."""
    model = VISION[name].build().to(dtype).eval()
    return model, auxiliary(model, TLEG(), init="fit", blocks=VISION[name].blocks)


def output(net: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return VISION[name].output(net)


def with_gradients(net: nn.Module, name: str) -> list[Tensor]:
    """Output, and the gradients of its squares by the input and by everything outside the blocks."""
    x = VISION[name].inputs(net).requires_grad_()
    found = VISION[name].output(net, x)
    found.square().sum().backward()
    path = find_blocks(VISION[name].build(), VISION[name].blocks).path
    outside = {key: value.grad for key, value in net.named_parameters() if not key.startswith((path, "gene_bank"))}
    return [found.detach(), x.grad, *(outside[key] for key in sorted(outside) if outside[key] is not None)]


@pytest.mark.parametrize("name", HOSTS)
def test_backed_equals_plain_and_baked_with_gradients(name: str) -> None:
    model = VISION[name].build().double().eval()
    for rule in (Expansion(torch.eye(3)), TLEG()):
        net = auxiliary(model, rule, init="fit", blocks=VISION[name].blocks)
        assert net.gene_bank.host.family == VISION[name].family
        baked = bake(net)
        assert [type(part) for part in baked.modules()] == [type(part) for part in model.modules()]
        assert baked.state_dict().keys() == model.state_dict().keys()
        for one, other in zip(with_gradients(net, name), with_gradients(baked, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        if rule != TLEG():
            torch.testing.assert_close(output(net, name), output(model, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("training", [True, False])
def test_no_dense_weight_is_built(name: str, training: bool) -> None:
    net = auxiliary(VISION[name].build(), TLEG(), blocks=VISION[name].blocks).train(training)
    before = plg.nn.dense_syntheses()
    with_gradients(net, name)
    output(net, name)
    if name in FOREIGN:
        net.init_weights()
    assert plg.nn.dense_syntheses() == before
    assert all(gene.grad is not None for _, gene in net.gene_bank.named_genes())


@pytest.mark.parametrize("name", HOSTS)
def test_a_fit_says_how_well_few_genes_serve(name: str) -> None:
    model = VISION[name].build().double()
    few = plg.summary(auxiliary(model, ShareInit(), init="fit", blocks=VISION[name].blocks))
    assert all(0.01 < layer.residual < 1.0 for layer in few.layers)
    exact = auxiliary(VISION[name].build(2).double(), TLEG(), init="fit", blocks=VISION[name].blocks)
    assert all(layer.residual < 1e-12 for layer in plg.summary(exact).layers)
    assert few.dense_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", HOSTS)
def test_stored_and_grown_at_any_depth(name: str, tmp_path: Path) -> None:
    sample, (_, net) = VISION[name], fitted(name)
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    own = {"model": sample.build(2).double()} if sample.family == "own" else {}
    for depth in (1, 3, 5):
        backed, plain = lg.descend(depth=depth, **own).eval(), lg.descend(depth=depth, backed=False, **own).eval()
        torch.testing.assert_close(output(backed, name), output(plain, name), rtol=1e-10, atol=1e-10)
        moved = set_depth(copy.deepcopy(net), depth)
        torch.testing.assert_close(output(moved, name), output(backed, name), rtol=0, atol=0)
        assert plain.state_dict().keys() == sample.build(depth).state_dict().keys()
        if sample.family == "transformers":
            assert [sample.config(found).num_hidden_layers for found in (moved, backed, plain)] == [depth] * 3


@pytest.mark.parametrize("name", FOREIGN)
def test_baked_networks_are_files_of_their_own_library(name: str, tmp_path: Path) -> None:
    _, net = fitted(name, torch.float32)
    grown = extract(net).descend(depth=5, backed=False).eval()
    for index, plain in enumerate((bake(net), bake(set_depth(net, 2)), grown)):
        plain.save_pretrained(tmp_path / str(index))
        again = type(plain).from_pretrained(tmp_path / str(index)).eval()
        assert VISION[name].config(again).num_hidden_layers == (3, 2, 5)[index]
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


def test_one_tower_changes_and_the_other_stays() -> None:
    for tower, other in (("vision", "text"), ("text", "vision")):
        net = auxiliary(clip(3, 3), TLEG(), blocks=f"{tower}_model.encoder.layers")
        for found in (set_depth(net, 5), extract(net).descend(depth=5)):
            assert len(found.get_submodule(f"{tower}_model.encoder.layers")) == 5
            assert len(found.get_submodule(f"{other}_model.encoder.layers")) == 3
            counts = {side: getattr(found.config, f"{side}_config").num_hidden_layers for side in (tower, other)}
            assert counts == {tower: 5, other: 3}
            part = found.get_submodule(f"{tower}_model")
            assert part.config.num_hidden_layers == part.encoder.config.num_hidden_layers == 5


def test_towers_of_unequal_depth_are_told_apart() -> None:
    spec = find_blocks(clip(2, 4), "vision_model.encoder.layers").spec
    assert (spec.family, spec.depth, spec.config["count"]) == ("transformers", 2, "vision_config.num_hidden_layers")


def test_stages_of_dinov2_follow_the_depth() -> None:
    net = auxiliary(dinov2(3), TLEG())
    for depth in (2, 5, 1):
        for found in (set_depth(net, depth), extract(net).descend(), bake(net)):
            config = found.config
            assert config.stage_names == type(config)(num_hidden_layers=depth).stage_names
            assert (list(config.out_features), list(config.out_indices)) == ([f"stage{depth}"], [depth])


@pytest.mark.parametrize("name", FOREIGN)
def test_a_learngene_stored_under_the_names_of_the_other_version_is_read(name: str) -> None:
    _, net = fitted(name)
    lg = extract(net)
    new = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    table = {f"attention.attention.{old}": f"attention.{now}" for old, now in new.items()}
    table["attention.output.dense"] = "attention.o_proj"
    table |= {now: old for old, now in table.items()}
    names = [table.get(path, path) if name == "dinov2" else path for path, _ in lg.host.layers]
    tensors, blocks = lg.tensors, lg.host.blocks
    if name in ("clip_vision", "clip_text"):
        prefix = f"{name.removeprefix('clip_')}_model."
        inside = blocks.startswith(prefix)
        blocks = blocks.removeprefix(prefix) if inside else f"{prefix}{blocks}"
        tensors = {key.removeprefix(prefix) if inside else f"{prefix}{key}": value for key, value in tensors.items()}
    paths = dict(zip([path for path, _ in lg.host.layers], names, strict=True))
    genes = {".".join([paths[key.rsplit(".", 2)[0]], *key.rsplit(".", 2)[1:]]): gene for key, gene in lg.genes.items()}
    layers = tuple((path, kind) for path, (_, kind) in zip(names, lg.host.layers, strict=True))
    other = Learngene(genes, tensors, TLEG(), HostSpec("transformers", lg.host.config, blocks, 3, layers))
    assert torch.equal(output(other.descend(4).eval(), name), output(lg.descend(4).eval(), name))


def test_torchvision_keeps_the_names_of_its_blocks() -> None:
    net = auxiliary(torchvision_vit(3), TLEG())
    assert list(set_depth(net, 4).encoder.layers._modules) == [f"encoder_layer_{index}" for index in range(4)]
    torchvision_vit(4).load_state_dict(bake(net).state_dict())


def quiet(net: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return net(*inputs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_fast_path_of_pytorch_gives_way(batch_first: bool, masked: bool) -> None:
    model = Encoder(batch_first=batch_first).eval()
    net = auxiliary(model, Expansion(torch.eye(3)), init="fit")
    x = torch.randn(2, 5, 32) if batch_first else torch.randn(5, 2, 32)
    mask = padding() if masked else None
    before = plg.nn.dense_syntheses()
    found = quiet(net, x, mask)
    with torch.inference_mode():
        assert torch.equal(net(x, mask), found)
    assert plg.nn.dense_syntheses() == before
    kept = ~padding() if masked and batch_first else slice(None)
    torch.testing.assert_close(found[kept], quiet(model, x, mask)[kept], rtol=1e-4, atol=1e-4)
    assert torch.overrides.has_torch_function((net.encoder.layers[0].self_attn.in_proj_weight,))


def test_the_plain_encoder_would_have_taken_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fast(*args))
    model = Encoder().eval()
    quiet(model, torch.randn(2, 5, 32), padding())
    assert len(taken) == 3
    quiet(auxiliary(model, TLEG()), torch.randn(2, 5, 32), padding())
    assert len(taken) == 3
