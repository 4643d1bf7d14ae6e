# SPDX-License-Identifier: Apache-2.0
"""Networks of every family: equal to the plain model, free of dense weights, stored, grown, re-depthed, made plain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from host_samples import BUILDERS, OddNet, hugging_face, images, output, timm_vit
from torch import nn

import pylearngene as plg
from pylearngene.errors import ArgumentError, DTypeError, HostError, MethodError, NonFiniteError
from pylearngene.hosts import find_blocks
from pylearngene.learngene import HostSpec, Learngene
from pylearngene.methods import TLEG, Expansion, ShareInit
from pylearngene.networks import auxiliary, bake, descend, extract, set_depth
from pylearngene.summary import summary

HOSTS = list(BUILDERS)


def fitted(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A plain model and its TLEG network with fitted genes, both in evaluation mode."""
    model = BUILDERS[name]().to(dtype).eval()
    return model, auxiliary(model, TLEG(), init="fit")


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_identity_coefficients_reproduce_the_plain_model(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = BUILDERS[name]().to(dtype).eval()
    net = auxiliary(model, Expansion(torch.eye(3)), init="fit")
    assert not any(type(module) in (nn.Linear, nn.LayerNorm) for module in _blocks(net).modules())
    plain = model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in bake(net).state_dict().items())
    x = images(dtype)
    torch.testing.assert_close(output(net, x), output(model, x), rtol=tolerance, atol=tolerance)
    assert all(layer.residual < 1e-12 for layer in summary(net).layers)


def _blocks(net: nn.Module) -> nn.Module:
    return net.get_submodule(net.gene_bank.host.blocks)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("training", [True, False])
def test_no_dense_weight_is_built_in_forward_and_backward(name: str, training: bool) -> None:
    net = auxiliary(BUILDERS[name](), TLEG()).train(training)
    before = plg.nn.dense_syntheses()
    output(net, images()).square().sum().backward()
    assert plg.nn.dense_syntheses() == before
    assert all(gene.grad is not None for _, gene in net.gene_bank.named_genes())
    _ = [layer.weight.sum() for layer in _blocks(net).modules() if isinstance(layer, plg.nn.ExpansionLinear)]
    assert plg.nn.dense_syntheses() > before


@pytest.mark.parametrize("name", HOSTS)
def test_baked_equals_backed_and_is_plain(name: str) -> None:
    _, net = fitted(name)
    plain = bake(net)
    x = images(torch.float64)
    torch.testing.assert_close(output(plain, x), output(net, x), rtol=1e-10, atol=1e-10)
    assert not any(type(module).__module__.startswith("pylearngene") for module in plain.modules())
    assert "forward" not in vars(plain)
    assert plain.state_dict().keys() == BUILDERS[name]().state_dict().keys()
    assert not any(module.training for module in plain.modules())
    assert find_blocks(plain).spec.family == net.gene_bank.host.family
    assert isinstance(net.gene_bank, plg.nn.GeneBank)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_stored_and_grown_at_any_depth(name: str, depth: int, tmp_path: Path) -> None:
    _, net = fitted(name)
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    own = {"model": OddNet(2).double()} if name == "own" else {}
    x = images(torch.float64)
    y = output(net, x)
    backed, plain = lg.descend(depth=depth, **own).eval(), lg.descend(depth=depth, backed=False, **own).eval()
    assert len(_blocks(backed)) == depth
    assert backed.gene_bank.host.depth == depth
    torch.testing.assert_close(output(backed, x), output(plain, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output(set_depth(net, depth), x), output(backed, x), rtol=0, atol=0)
    assert torch.equal(output(backed, x), y) == (depth == 3)
    assert plain.state_dict().keys() == BUILDERS[name](depth).state_dict().keys()


@pytest.mark.parametrize("name", HOSTS)
def test_a_learngene_holds_everything_of_its_network(name: str, tmp_path: Path) -> None:
    _, net = fitted(name)
    lg = extract(net)
    assert lg.num_parameters == sum(value.numel() for value in net.state_dict().values())
    x = images(torch.float64)
    assert torch.equal(output(lg.descend().eval(), x), output(net, x))
    with torch.no_grad():
        before = output(lg.descend().eval(), x)
        for parameter in net.parameters():
            parameter.fill_(1.0)
        assert torch.equal(output(lg.descend().eval(), x), before)


def test_a_descendant_shares_no_memory_with_its_learngene() -> None:
    lg = extract(fitted("timm")[1])
    x = images(torch.float64)
    before = lg.descend().eval()(x)
    for backed in (True, False):
        net = lg.descend(backed=backed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
    assert torch.equal(lg.descend().eval()(x), before)


@pytest.mark.parametrize("name", HOSTS)
def test_gradients_of_genes_are_sums_over_the_blocks(name: str) -> None:
    _, net = fitted(name)
    plain, x = bake(net), images(torch.float64)
    upstream = torch.randn(output(plain, x).shape, dtype=torch.float64)  # squares behind a norm have a sum that stays
    for model in (net, plain):
        output(model, x).backward(upstream)
    spec, table = net.gene_bank.host, torch.tensor(TLEG().coefficients(3), dtype=torch.float64)
    for path, _ in spec.layers:
        layers = [block.get_submodule(path) for block in plain.get_submodule(spec.blocks)]
        dense = torch.stack([layer.weight.grad for layer in layers])
        found = torch.stack([gene.grad for gene in net.gene_bank.group(path).weight])
        torch.testing.assert_close(found, torch.tensordot(table.T, dense, 1), rtol=1e-9, atol=1e-12)
        assert found[1].abs().max() > 0
    for key, value in plain.named_parameters():
        if not key.startswith(f"{spec.blocks}.") and value.grad is not None:
            torch.testing.assert_close(net.get_parameter(key).grad, value.grad, rtol=1e-9, atol=1e-12)


def test_an_exported_descendant_loads_in_plain_timm() -> None:
    lg = extract(fitted("timm", torch.float32)[1])
    plain = lg.descend(depth=5, backed=False).eval()
    bare = timm_vit(5).eval()
    bare.load_state_dict(plain.state_dict())
    assert type(plain) is type(bare)
    torch.testing.assert_close(bare(images()), plain(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "ViTForImageClassification", "DeiTForImageClassification"])
def test_an_exported_descendant_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    lg = extract(auxiliary(hugging_face(name), TLEG()))
    plain = lg.descend(depth=5, backed=False).eval()
    plain.save_pretrained(tmp_path)
    bare = getattr(transformers, name).from_pretrained(tmp_path).eval()
    assert bare.config.num_hidden_layers == 5
    torch.testing.assert_close(output(bare, images()), output(plain, images()), rtol=1e-5, atol=1e-5)


def test_a_baked_network_saves_for_plain_transformers(tmp_path: Path) -> None:
    import transformers

    plain = bake(set_depth(fitted("vit_classifier", torch.float32)[1], 4))
    plain.save_pretrained(tmp_path)
    bare = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(bare, images()), output(plain, images()), rtol=1e-5, atol=1e-5)


def test_a_learngene_stored_under_other_transformers_names_is_read() -> None:
    lg = extract(fitted("vit_classifier")[1])
    old = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    names = {f"attention.{new}": f"attention.{before}" for new, before in old.items()}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    if lg.host.blocks == "vit.encoder.layer":
        names = {before: new for new, before in names.items()}
    other = "vit.layers" if lg.host.blocks == "vit.encoder.layer" else "vit.encoder.layer"
    layers = tuple((names.get(path, path), kind) for path, kind in lg.host.layers)
    genes = {}
    for key, gene in lg.genes.items():
        path, part, index = key.rsplit(".", 2)
        genes[f"{names.get(path, path)}.{part}.{index}"] = gene
    renamed = Learngene(genes, lg.tensors, TLEG(), HostSpec("transformers", lg.host.config, other, 3, layers))
    x = images(torch.float64)
    assert torch.equal(output(renamed.descend(4).eval(), x), output(lg.descend(4).eval(), x))


@pytest.mark.parametrize("name", HOSTS)
def test_the_model_stays_as_it_was_and_shares_nothing(name: str) -> None:
    model = BUILDERS[name]().eval()
    before, x = copy.deepcopy(model.state_dict()), images()
    y = output(model, x)
    net = auxiliary(model, TLEG(), init="fit")
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    output(net, x).square().sum().backward()
    optimizer.step()
    set_depth(net, 5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(output(model, x), y)


@pytest.mark.parametrize("name", HOSTS)
def test_copies_of_a_network_are_independent(name: str) -> None:
    _, net = fitted(name)
    twin, x = copy.deepcopy(net), images(torch.float64)
    before = output(net, x)
    assert torch.equal(output(twin, x), before)
    with torch.no_grad():
        for _, gene in twin.gene_bank.named_genes():
            gene.mul_(2)
    set_depth(twin, 2)
    assert torch.equal(output(net, x), before)
    assert not torch.equal(output(twin, x), before)


def test_own_class_in_memory_needs_no_model() -> None:
    model, net = fitted("own")
    lg = extract(net)
    assert all(parameter.is_meta for parameter in lg.prototype.body["steps"].parameters())
    assert lg.prototype.stem.weight is net.stem.weight
    deep = lg.descend(depth=6)
    assert [part.layer_idx for part in deep.body["steps"]] == list(range(6))
    assert deep.num_blocks == 6
    assert all(module.training for module in deep.modules())
    assert isinstance(deep, type(model))
    assert deep.stem.weight is not net.stem.weight


def test_own_class_from_disk_needs_its_model(tmp_path: Path) -> None:
    extract(fitted("own")[1]).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    with pytest.raises(
        ArgumentError, match=r"model: expected a model of class host_samples.OddNet .*got None; pass model="
    ):
        lg.descend(depth=2)
    with pytest.raises(HostError, match=r"blocks: expected the path of an nn.ModuleList .*got nothing at 'body.steps'"):
        lg.descend(depth=2, model=timm_vit())
    other = OddNet()
    other.body["steps"] = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))
    with pytest.raises(
        HostError, match=r"model: expected blocks with the layers before \(layer_norm\), .*got 0 \(linear\)"
    ):
        lg.descend(depth=2, model=other)
    with pytest.raises(
        ArgumentError, match=r"model: expected a plain model, got a gene-backed OddNet; plg.bake it first"
    ):
        lg.descend(depth=2, model=fitted("own")[1])


@pytest.mark.parametrize("name", ["timm", "vit_classifier", "own"])
def test_a_new_head_is_seeded_and_said(name: str) -> None:
    lg = extract(fitted(name, torch.float32)[1])
    state = torch.get_rng_state()
    net = lg.descend(depth=2, num_classes=4).eval()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    same = lg.descend(depth=2, num_classes=4).eval()
    assert output(net, images()).shape == (2, 4)
    assert torch.equal(output(net, images()), output(same, images()))
    head = {"timm": "head", "vit_classifier": "classifier", "own": "tail.1"}[name]
    assert f"freshly initialized, with a fixed seed: {head}.weight, {head}.bias" in str(summary(net))
    assert "freshly" not in str(summary(lg.descend(depth=2, num_classes=10)))
    assert output(lg.descend(depth=2, num_classes=0).eval(), images()).shape == (2, 32)


def test_a_head_is_refused_where_there_is_none() -> None:
    lg = extract(fitted("vit")[1])
    with pytest.raises(ArgumentError, match="num_classes: expected a host with a classification head, got ViTModel"):
        lg.descend(num_classes=7)
    headless = OddNet()
    headless.tail = nn.Identity()
    lg = extract(auxiliary(headless, TLEG()))
    with pytest.raises(
        HostError, match=r"num_classes: expected a model with an nn.Linear outside its blocks as the head"
    ):
        lg.descend(num_classes=7)


def test_dtypes_are_kept_or_changed_together() -> None:
    net = auxiliary(timm_vit(), TLEG()).bfloat16()
    net.pos_embed.data = net.pos_embed.data.float()
    lg = extract(net)
    kept = lg.descend(depth=2)
    assert (kept.pos_embed.dtype, kept.head.weight.dtype) == (torch.float32, torch.bfloat16)
    assert kept.gene_bank.group("mlp.fc1").weight[0].dtype == torch.bfloat16
    wide = lg.descend(depth=2, dtype=torch.float64)
    assert {value.dtype for value in wide.state_dict().values()} == {torch.float64}
    assert wide(images(torch.float64)).dtype == torch.float64


def test_a_network_descends_onto_another_device() -> None:
    net = extract(fitted("own")[1]).descend(depth=2, device="meta")
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("width", "heads", "parameters"), [(192, 3, 1_268_392), (384, 6, 4_305_256), (768, 12, 15_687_400)]
)
def test_stored_parameters_of_tleg_on_vit(width: int, heads: int, parameters: int) -> None:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(
            embed_dim=width, num_heads=heads, depth=12, num_classes=1000, class_token=False, global_pool="avg"
        )
    net = auxiliary(model, TLEG())
    assert extract(net).num_parameters == parameters
    told = summary(net)
    assert told.parameters == parameters
    assert told.dense_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_set_depth_keeps_genes_optimizers_and_modes() -> None:
    net = auxiliary(timm_vit(4), TLEG()).eval()
    genes = [gene for _, gene in net.gene_bank.named_genes()]
    assert set_depth(net, 6) is net
    assert [gene for _, gene in net.gene_bank.named_genes()] == genes
    assert not any(module.training for module in net.modules())
    assert all(layer.bank is net.gene_bank for layer in net.modules() if isinstance(layer, plg.nn.ExpansionLinear))
    torch.testing.assert_close(
        torch.stack([block.attn.qkv.coeffs for block in net.blocks]), torch.tensor(TLEG().coefficients(6))
    )
    y = net(images())
    assert torch.equal(set_depth(set_depth(net, 1), 6)(images()), y)
    output(net, images()).sum().backward()
    assert all(gene.grad is not None for gene in genes)


def test_transformers_leaves_genes_alone_when_it_initializes() -> None:
    net = fitted("vit_classifier", torch.float32)[1]
    before = {name: gene.clone() for name, gene in net.gene_bank.named_genes()}
    syntheses = plg.nn.dense_syntheses()
    net.init_weights()
    assert all(torch.equal(gene, before[name]) for name, gene in net.gene_bank.named_genes())
    assert plg.nn.dense_syntheses() == syntheses


def test_flags_of_the_model_are_kept() -> None:
    model = timm_vit().eval().requires_grad_(False)
    net = auxiliary(model, ShareInit())
    assert not net.training
    assert not any(layer.training for layer in net.modules())
    assert not net.head.weight.requires_grad
    assert all(gene.requires_grad for _, gene in net.gene_bank.named_genes())


def test_plain_models_are_refused_where_genes_are_needed() -> None:
    for call in (extract, bake, summary, lambda net: set_depth(net, 3)):
        with pytest.raises(MethodError, match=r"net: expected a gene-backed network .*, got a plain VisionTransformer"):
            call(timm_vit())


def test_arguments_of_auxiliary_are_checked() -> None:
    with pytest.raises(
        ArgumentError, match=r"method: expected an instance of a method, .*got the class TLEG; write TLEG()"
    ):
        auxiliary(timm_vit(), TLEG)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"method: expected an instance of a method, .*got 'tleg'"):
        auxiliary(timm_vit(), "tleg")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="init: expected one of 'method', 'fit', got 'random'"):
        auxiliary(timm_vit(), TLEG(), init="random")
    with pytest.raises(ArgumentError, match="model: expected a plain model, got a gene-backed VisionTransformer"):
        auxiliary(fitted("timm")[1], TLEG())
    with pytest.raises(ArgumentError, match=r"model: expected a torch.nn.Module, got int"):
        auxiliary(5, TLEG())  # type: ignore[arg-type]
    with pytest.raises(HostError, match="expected repeated blocks"):
        auxiliary(nn.Linear(2, 2), TLEG())


def test_another_method_is_refused_by_extract() -> None:
    net = fitted("timm")[1]
    assert extract(net, TLEG()).method == TLEG()
    with pytest.raises(
        MethodError, match=r"method: expected None or the method of the network, TLEG\(\), got ShareInit"
    ):
        extract(net, ShareInit())


@pytest.mark.parametrize(("axis", "size"), [("width", 64), ("heads", 4)])
def test_an_axis_that_cannot_change_names_methods_that_can(axis: str, size: int) -> None:
    lg = extract(fitted("timm")[1])
    with pytest.raises(MethodError) as caught:
        lg.descend(depth=2, **{axis: size})
    assert f"{axis}: expected None, got {size}: TLEG changes the depth only" in str(caught.value)
    assert "LeTs, LiGO, FRONT change width (not in this version yet)" in str(caught.value)


@pytest.mark.parametrize("depth", [0, -1, True, 2.0, "3"])
def test_a_depth_below_one_is_refused(depth: Any) -> None:
    net = fitted("timm")[1]
    with pytest.raises(ArgumentError, match=r"depth: expected an int(eger of at least 1| >= 1), got"):
        extract(net).descend(depth=depth)
    with pytest.raises(ArgumentError, match="depth: expected an int >= 1, got"):
        set_depth(net, depth)


def test_other_bad_requests_of_descend_are_refused() -> None:
    lg = extract(fitted("timm")[1])
    with pytest.raises(DTypeError, match="dtype: expected"):
        lg.descend(dtype=torch.int8)
    with pytest.raises(ArgumentError, match="num_classes: expected"):
        lg.descend(num_classes=-1)
    with pytest.raises(ArgumentError, match="lg: expected a Learngene, got dict"):
        descend({})  # type: ignore[arg-type]
    assert len(descend(lg, 2).blocks) == 2


@pytest.mark.parametrize("group", ["genes", "tensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(group: str, value: float) -> None:
    lg = extract(fitted("timm")[1])
    name, tensor = next(iter(getattr(lg, group).items()))
    tensor.view(-1)[0] = value
    with pytest.raises(NonFiniteError, match=name):
        lg.descend(depth=2)


def test_a_table_from_disk_asks_for_the_rule(tmp_path: Path) -> None:
    rule = Expansion(lambda index, depth: [1.0, (index / depth) ** 2])
    net = auxiliary(timm_vit(), rule)
    extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    assert torch.equal(lg.descend().eval()(images()), net.eval()(images()))
    with pytest.raises(MethodError, match=r"depth: expected 3, .*got 6; .*method=Expansion\(lambda l, L: ...\)"):
        lg.descend(depth=6)
    deep = Learngene.from_pretrained(tmp_path / "gene", method=rule).descend(depth=6).eval()
    assert torch.equal(deep(images()), set_depth(net, 6)(images()))
