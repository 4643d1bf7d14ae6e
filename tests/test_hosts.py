# SPDX-License-Identifier: Apache-2.0
"""Hosts: blocks found by structure, families proven by rebuilding, depth changed in place, and every refusal."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_samples import BUILDERS, OddNet, hugging_face, images, timm_vit
from torch import Tensor, nn

from pylearngene.errors import ArgumentError, HostError
from pylearngene.hosts import families, find_blocks
from pylearngene.hosts.depth import resize_blocks
from pylearngene.hosts.fingerprint import difference
from pylearngene.learngene import HostSpec


def block(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(layers or (nn.LayerNorm(8), nn.Linear(8, 8))))


class Body(nn.Module):
    """A model whose only content is what it is given, by name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def body(*layers: nn.Module, depth: int = 3) -> Body:
    """A model with a list of copies of one block."""
    return Body(body=nn.ModuleList(copy.deepcopy(block(*layers)) for _ in range(depth)))


@pytest.mark.parametrize(
    ("name", "path", "layers"),
    [
        ("timm", "blocks", ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]),
        ("own", "body.steps", ["before", "gate", "up.0", "down"]),
    ],
)
def test_finds_blocks_and_layers_by_structure(name: str, path: str, layers: list[str]) -> None:
    host = find_blocks(BUILDERS[name]())
    assert (host.path, len(host.blocks), [layer for layer, _ in host.layers]) == (path, 3, layers)
    assert dict(host.layers)[layers[0]] == "layer_norm"
    assert dict(host.layers)[layers[-1]] == "linear"
    assert host.spec == HostSpec(name, host.spec.config, path, 3, host.layers)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "ViTForImageClassification"])
def test_finds_transformers_blocks_under_the_names_of_either_version(name: str) -> None:
    model = hugging_face(name)
    host = find_blocks(model)
    assert host.path.removeprefix("vit.") in ("layers", "encoder.layer")
    assert len(host.layers) == 8
    assert host.spec.family == "transformers"
    assert host.spec.config["class"] == name
    assert "_name_or_path" not in host.spec.config["config"]


def test_version_4_names_are_found_without_the_library() -> None:
    layer = Body(attention=Body(attention=Body(query=nn.Linear(8, 8))), intermediate=Body(dense=nn.Linear(8, 16)))
    model = Body(vit=Body(encoder=Body(layer=nn.ModuleList(copy.deepcopy(layer) for _ in range(2)))))
    host = find_blocks(model)
    assert host.path == "vit.encoder.layer"
    assert host.layers == (("attention.attention.query", "linear"), ("intermediate.dense", "linear"))


def test_the_list_with_most_parameters_wins_and_the_outermost_of_equals() -> None:
    pair = nn.ModuleList(block() for _ in range(2))
    nested = nn.ModuleList([Body(inner=pair), Body(inner=copy.deepcopy(pair))])
    assert find_blocks(Body(outer=nested)).path == "outer"
    assert find_blocks(Body(few=nn.ModuleList(block() for _ in range(2)), many=nested)).path == "many"
    only = Body(outer=nn.ModuleList([Body(inner=pair)]))
    assert find_blocks(only).path == "outer.0.inner"


def test_a_list_of_one_block_is_accepted_by_its_path_only() -> None:
    model = body(depth=1)
    with pytest.raises(HostError, match=r"'body' .*has fewer than 2 children"):
        find_blocks(model)
    assert len(find_blocks(model, "body").blocks) == 1


def test_a_model_without_blocks_is_told_what_was_seen() -> None:
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    same = block()
    model = Body(
        one=nn.ModuleList([block()]),
        types=nn.Sequential(linear, norm),
        shapes=nn.ModuleList([block(), block(nn.LayerNorm(8), nn.Linear(8, 4))]),
        names=nn.ModuleList([block(), block(nn.LayerNorm(8, bias=False), nn.Linear(8, 8))]),
        dtypes=nn.ModuleList([block(), block().double()]),
        shared=nn.ModuleList([same, same]),
        empty=nn.ModuleList([nn.ReLU(), nn.ReLU()]),
        bare=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
    )
    with pytest.raises(HostError) as caught:
        find_blocks(model)
    text = str(caught.value)
    assert "expected repeated blocks (an nn.ModuleList or nn.Sequential of at least 2 children of equal type" in text
    assert "got Body with none. Lists seen:" in text
    for line in (
        "'one' (ModuleList of 1): has fewer than 2 children",
        "'types' (Sequential of 2): children 0 and 1 differ in type: Linear, LayerNorm",
        "'shapes' (ModuleList of 2): children 0 and 1 differ in parameter '1.weight': (8, 8) float32 on cpu, (4, 8)",
        "'names' (ModuleList of 2): children 0 and 1 differ in parameter '0.bias': (8,) float32 on cpu, absent",
        "'dtypes' (ModuleList of 2): children 0 and 1 differ in parameter '0.weight': (8,) float32 on cpu, (8,) f",
        "'shared' (ModuleList of 2): holds one and the same module more than once",
        "'empty' (ModuleList of 2): has children without parameters",
        "'bare' (ModuleList of 2): has bare Linear children: wrap each in a module of its own",
    ):
        assert line in text


def test_a_model_without_any_list_and_a_model_that_is_the_list() -> None:
    with pytest.raises(HostError, match=r"got Linear with none. Lists seen:\n  none at all"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(HostError, match=r"'the model' .*is the model itself: wrap it"):
        find_blocks(nn.Sequential(block(), block()))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"model: expected a torch.nn.Module, got str"):
        find_blocks("vit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "got nothing at 'nowhere'"), ("body.0.1", "got Linear at 'body.0.1'"), ("", "got Body at ''")],
)
def test_a_wrong_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(HostError, match=f"blocks: expected the path of an nn.ModuleList or nn.Sequential, {message}"):
        find_blocks(body(), path)


def test_a_path_to_unequal_blocks_is_refused() -> None:
    model = Body(body=nn.ModuleList([block(), block(nn.Linear(8, 8))]))
    with pytest.raises(HostError, match="expected equal blocks at 'body', but the list children 0 and 1 differ in"):
        find_blocks(model, "body")


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))


class Negated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Renamed(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ByChannel(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Conv1d(3, 3, 1), "'body.0.1.weight' in a torch.nn.modules.conv.Conv1d"),
        (Scale(), "'body.0.1.gamma' in a test_hosts.Scale"),
        (nn.Embedding(8, 8), "'body.0.1.weight' in a torch.nn.modules.sparse.Embedding"),
        (nn.PReLU(), "'body.0.1.weight' in a torch.nn.modules.activation.PReLU"),
    ],
)
def test_other_holders_of_parameters_are_refused_by_name(layer: nn.Module, named: str) -> None:
    with pytest.raises(HostError) as caught:
        find_blocks(body(nn.Linear(8, 8), layer))
    assert named in str(caught.value)
    assert "held by nn.Linear (linear), nn.LayerNorm (layer_norm), " in str(caught.value)


def test_norms_over_several_axes_are_refused() -> None:
    with pytest.raises(HostError, match=r"expected norms over the last axis only, got 'body.0.0' over 2 axes"):
        find_blocks(body(nn.LayerNorm((4, 8)), nn.Linear(8, 8)))


@pytest.mark.parametrize("layer", [Negated(8, 8), ByChannel(8)])
def test_subclasses_that_compute_something_else_are_refused(layer: nn.Module) -> None:
    with pytest.raises(
        HostError, match=r"expected 'body.0.1' to compute what nn\.\w+ computes, but its class test_hosts"
    ):
        find_blocks(body(nn.Linear(8, 8), layer))


def test_subclasses_that_compute_the_same_are_accepted() -> None:
    assert find_blocks(body(Renamed(8), nn.Linear(8, 8))).layers == (("0", "layer_norm"), ("1", "linear"))


def test_shared_parameters_are_refused() -> None:
    model = body()
    model.head = nn.Linear(8, 8)
    model.head.weight = model.body[1][1].weight
    with pytest.raises(
        HostError, match=r"every block parameter in one place, but 'body.1.1.weight' is also 'head.weight'"
    ):
        find_blocks(model)


def test_buffers_that_differ_between_blocks_are_refused() -> None:
    model = body()
    for index, part in enumerate(model.body):
        part.register_buffer("count", torch.tensor(index // 2), persistent=True)
        part.register_buffer("scratch", torch.tensor(index), persistent=False)
    with pytest.raises(
        HostError, match=r"expected equal buffers in all blocks, but 'body.0.count' and 'body.2.count' differ"
    ):
        find_blocks(model)
    model.body[2].count.zero_()
    assert find_blocks(model).path == "body"


def test_finding_leaves_model_and_random_state_alone() -> None:
    model = timm_vit()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find_blocks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": True, "global_pool": "token", "reg_tokens": 2, "no_embed_class": True},
        {"img_size": (28, 14), "mlp_ratio": 2.9, "qkv_bias": False, "proj_bias": False, "num_classes": 0},
        {"qk_norm": True, "scale_mlp_norm": True, "pre_norm": True, "final_norm": False},
        {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.4, "drop_path_rate": 0.5},
        {"init_values": 1e-3},
        {"pos_embed": "none", "patch_drop_rate": 0.2, "dynamic_img_size": True},
    ],
)
def test_timm_arguments_are_inferred(changes: dict[str, Any]) -> None:
    model = timm_vit(**changes)
    spec = find_blocks(model).spec
    assert spec.family == "timm"
    rebuilt, _ = families.build(spec, 3, None, None, 0)
    assert difference(model, rebuilt) is None


def test_a_timm_architecture_serves_where_arguments_do_not() -> None:
    import timm

    model = timm.create_model("vit_base_patch32_clip_224", embed_dim=32, num_heads=2, depth=3)
    spec = find_blocks(model).spec
    assert (spec.family, spec.config["architecture"]) == ("timm", "vit_base_patch32_clip_224")
    rebuilt, _ = families.build(spec, 3, None, None, 0)
    assert difference(model, rebuilt) is None


def test_a_timm_model_that_cannot_be_expressed_is_the_users_own() -> None:
    model = timm_vit()
    model.blocks[1].mlp.act = nn.ReLU()
    spec = find_blocks(model).spec
    assert spec.family == "own"
    assert spec.config["class"] == "timm.models.vision_transformer.VisionTransformer"
    assert "timm would build something else: module 'blocks.1.mlp.act'" in spec.config["why"]


def test_a_transformers_model_with_another_count_is_the_users_own() -> None:
    model = hugging_face("ViTModel")
    model.config.num_hidden_layers = 7
    spec = find_blocks(model).spec
    assert (spec.family, spec.config["why"]) == ("own", "transformers counts its blocks elsewhere")


def test_transformers_switches_outside_the_configuration_are_inferred() -> None:
    import transformers

    plain = transformers.ViTModel(hugging_face("ViTModel").config, add_pooling_layer=False, use_mask_token=True)
    spec = find_blocks(plain).spec
    assert (spec.family, spec.config["model_args"]) == (
        "transformers",
        {"add_pooling_layer": False, "use_mask_token": True},
    )


def test_difference_names_tensors_and_settings() -> None:
    first, other = OddNet(), OddNet()
    assert difference(first, other) is None
    other.body["steps"][1].drop.p = 0.25
    assert difference(first, other) == "module 'body.steps.1.drop.p': 0.0 became 0.25"
    other = OddNet(classes=4)
    assert difference(first, other) == "tensor 'tail.1.weight': (10, 32) became (4, 32)"


def test_a_spec_cannot_name_a_class_outside_its_library() -> None:
    spec = HostSpec("timm", {"class": "subprocess.Popen", "model_args": {}}, "blocks", 3, (("a", "linear"),))
    with pytest.raises(HostError, match=r"expected the class of a timm model, got 'subprocess.Popen'"):
        families.build(spec, 3, None, None, 0)
    spec = HostSpec(
        "timm", {"class": "timm.models.vision_transformer.partial_", "model_args": {}}, "blocks", 3, (("a", "linear"),)
    )
    with pytest.raises(HostError, match="installed timm has no model class"):
        families.build(spec, 3, None, None, 0)
    config = {"class": "os.system", "config_class": "ViTConfig", "config": {}, "model_args": {}}
    spec = HostSpec("transformers", config, "layers", 3, (("a", "linear"),))
    with pytest.raises(HostError, match=r"installed transformers has no class 'os.system'"):
        families.build(spec, 3, None, None, 0)


def test_a_library_that_cannot_build_or_names_otherwise_is_reported() -> None:
    spec = find_blocks(timm_vit()).spec
    broken = {**spec.config, "model_args": {**spec.config["model_args"], "unheard_of": 1}}
    with pytest.raises(HostError, match=r"installed timm cannot build the described model: .*unheard_of"):
        families.build(HostSpec("timm", broken, "blocks", 3, spec.layers), 3, None, None, 0)
    with pytest.raises(HostError, match="expected blocks at 'layers' with the layers"):
        families.build(HostSpec("timm", spec.config, "layers", 3, spec.layers), 3, None, None, 0)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_blocks(timm_vit()).spec

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("pylearngene.hosts.timm_models.importlib", SimpleNamespace(import_module=absent))
    with pytest.raises(HostError, match="made from a timm model; install timm, or pass model="):
        families.build(spec, 3, None, None, 0)
    assert importlib.import_module("timm")


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_resizing_renumbers_counts_and_still_runs(depth: int) -> None:
    model = OddNet(3)
    model.head_index = 3  # an attribute that is no count
    blocks = resize_blocks(model, "body.steps", depth)
    assert blocks is model.body["steps"]
    assert [part.layer_idx for part in blocks] == list(range(depth))
    assert (model.num_blocks, model.head_index, len(set(map(id, blocks)))) == (depth, 3, depth)
    assert model(images()).shape == (2, 10)


def test_resizing_keeps_the_course_of_drop_rates() -> None:
    model = timm_vit(5, drop_path_rate=0.4)
    resize_blocks(model, "blocks", 3)
    assert [getattr(part.drop_path1, "drop_prob", 0.0) for part in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    assert [tap["module"] for tap in model.feature_info] == ["blocks.0", "blocks.1", "blocks.2"]


def test_resizing_finds_index_attributes_by_name_or_by_their_growth() -> None:
    model = body(depth=4)
    for index, part in enumerate(model.body):
        part.place, part.first_layer, part.heads, part.flag = index + 1, 0, 2, True
    resize_blocks(model, "body", 6)
    assert [(part.place, part.first_layer, part.heads) for part in model.body] == [(i + 1, 0, 2) for i in range(6)]
    model = body(depth=2)
    for index, part in enumerate(model.body):
        part.layer_idx, part.shift = index, index
    resize_blocks(model, "body", 3)
    assert [part.layer_idx for part in model.body] == [0, 1, 2]
    assert [part.shift for part in model.body] == [0, 1, 1]


def test_resizing_shares_the_configuration_and_updates_it() -> None:
    model = hugging_face("ViTModel")
    host = find_blocks(model)
    resize_blocks(model, host.path, 5)
    assert model.config.num_hidden_layers == 5
    assert all(part.config is model.config for part in model.modules() if hasattr(part, "config"))
