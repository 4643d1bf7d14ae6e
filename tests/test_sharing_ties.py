# SPDX-License-Identifier: Apache-2.0
"""Which layer reads which gene is the same before and after every way of copying, moving, saving and loading.

The map is read off by identity of Parameters. Copies with coefficients and dtypes of their own are in test_sharing.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_samples import hugging_face
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.nn import ExpansionModule, GeneBank, LowRankLinear

WIDTH, DEPTH = 6, 5
RESUMED, AFTER = 3, 5


class Plain(nn.Module):
    """Blocks with a norm, attention and a linear layer; no Parameter is shared by modules, which torch would untie."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "attn": nn.MultiheadAttention(WIDTH, 2, batch_first=True),
                    "fc": nn.Linear(WIDTH, WIDTH),
                }
            )
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 9)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for block in self.blocks:
            y = block["norm"](x)
            x = x + block["attn"](y, y, y, need_weights=False)[0]
            x = x + torch.tanh(block["fc"](x))
        return self.head(x)


class Strengths(nn.Module):
    """Layers of the other primitive with a bank."""

    def __init__(self) -> None:
        super().__init__()
        bank = GeneBank()
        self.words = nn.Embedding(9, WIDTH)
        self.layers = nn.ModuleList(LowRankLinear(WIDTH, WIDTH, rank=2, bank=bank, name="fc") for _ in range(DEPTH))
        bank.attach(self)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def coefficients(layer: int, depth: int) -> list[float]:
    return [1.0, layer / depth]


def expanded(learn: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    method = plg.methods.Expansion(coeffs=coefficients, learn=learn)
    net = plg.auxiliary(Plain(), method)
    for gene in net.gene_bank.parameters():
        nn.init.normal_(gene, std=0.3)
    return net


def low_rank(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Strengths()


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "expansion": expanded,
    "learned": lambda **options: expanded(learn=True, **options),
    "low_rank": low_rank,
}


def ties(net: nn.Module) -> dict[str, list[str]]:
    """For each layer the names of the Parameters that it reads through the bank, by identity."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {}
    for path, module in net.named_modules():
        held = getattr(module, "_bank", None)
        if held is not None:
            assert held[0] is net.gene_bank
            groups = module.group_names if isinstance(module, ExpansionModule) else (module.name,)
            found[path] = [names[id(gene)] for group in groups for gene in held[0].group(group).tensors()]
    return found


def batch(step: int = 0) -> Tensor:
    return torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(step))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        optimizer.step()


Way = Callable[[nn.Module, Callable[..., nn.Module], Path], nn.Module]


def from_meta(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
    other = make(seed=1).to("meta")
    other.load_state_dict(net.state_dict(), assign=True)
    return other


def emptied(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
    other = make(seed=1).to("meta").to_empty(device="cpu")
    other.load_state_dict(net.state_dict())
    return other


def loaded(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
    other = make(seed=1)
    missing, unexpected = other.load_state_dict(net.state_dict())
    assert (missing, unexpected) == ([], [])
    return other


def by_torch_file(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = make(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def by_model_file(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
    save_model(net, folder / "net.safetensors")
    other = make(seed=1)
    assert load_model(other, folder / "net.safetensors") == (set(), [])
    return other


def by_tensor_file(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
    save_file(net.state_dict(), folder / "net.safetensors")
    other = make(seed=1)
    other.load_state_dict(load_file(folder / "net.safetensors"))
    return other


def flagged(name: str) -> Way:
    def convert(net: nn.Module, make: Callable[..., nn.Module], folder: Path) -> nn.Module:
        change = getattr(torch.__future__, f"set_{name}_module_params_on_conversion")
        other = copy.deepcopy(net)
        change(True)
        try:
            return other.double().float()
        finally:
            change(False)

    return convert


WAYS: dict[str, Way] = {
    "deepcopy": lambda net, make, folder: copy.deepcopy(net),
    "pickle": lambda net, make, folder: pickle.loads(pickle.dumps(net)),
    "dtype": lambda net, make, folder: copy.deepcopy(net).to(torch.float64).to(torch.float32),
    "overwritten": flagged("overwrite"),
    "swapped": flagged("swap"),
    "assign from meta": from_meta,
    "to_empty": emptied,
    "state dict": loaded,
    "torch file": by_torch_file,
    "safetensors model": by_model_file,
    "safetensors tensors": by_tensor_file,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_ties_and_values_survive(kind: str, way: str, tmp_path: Path) -> None:
    make = NETWORKS[kind]
    net = make()
    net(batch()).sum().backward()  # taps are there
    net.zero_grad()
    before, count = ties(net), len(list(net.parameters()))
    assert len(before) == {"expansion": 3, "learned": 3, "low_rank": 1}[kind] * DEPTH
    other = WAYS[way](net, make, tmp_path)
    assert ties(other) == before == ties(net)
    assert len(list(other.parameters())) == count
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}
    assert other.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(other(batch()), net(batch()))
    assert len({tuple(genes) for genes in before.values()}) == len(before) / DEPTH


@pytest.mark.parametrize("learn", [False, True])
def test_ties_survive_a_gene_folder(learn: bool, tmp_path: Path) -> None:
    net = expanded(learn)
    plg.extract(net).save_pretrained(tmp_path)
    other = plg.Learngene.from_pretrained(tmp_path).descend(depth=DEPTH, model=Plain())
    assert ties(other) == ties(net)
    assert len(list(other.parameters())) == len(list(net.parameters()))
    assert torch.equal(other(batch()), net(batch()))
    stored = load_file(tmp_path / "gene.safetensors")
    genes = [name for name, _ in net.gene_bank.named_genes()]
    assert sum(any(name.endswith(gene) for gene in genes) for name in stored) == len(genes)
    assert json.loads((tmp_path / "gene_config.json").read_text())


def test_ties_survive_the_folder_of_a_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = plg.auxiliary(hugging_face("ViTModel"), plg.methods.TLEG())
    net.save_pretrained(tmp_path)
    other = plg.Learngene.from_pretrained(tmp_path).descend()
    assert ties(other) == ties(net)
    for (name, one), (_, two) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_slot_per_gene_and_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Three steps, a file, five steps: as eight steps without a break."""
    make = NETWORKS[kind]
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, range(RESUMED))
    genes = [gene for _, gene in net.gene_bank.named_genes()]
    assert all(gene in optimizer.state for gene in genes)
    assert len(optimizer.state) == len(list(net.parameters())) == len({id(p) for p in net.parameters()})
    save_model(net, tmp_path / "net.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(net, optimizer, range(RESUMED, RESUMED + AFTER))
    again = make(seed=4)
    load_model(again, tmp_path / "net.safetensors")
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, fresh, range(RESUMED, RESUMED + AFTER))
    for (name, one), (_, two) in zip(net.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    moments = zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(one[key], two[key]) for one, two in moments for key in one)


def test_a_copy_of_the_mean_of_steps_has_its_own_ties() -> None:
    net = expanded()
    mean = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, range(2))
    mean.update_parameters(net)
    assert ties(mean.module) == ties(net)
    assert torch.equal(mean(batch()), net(batch()))  # the first update copies


def test_functional_call_reaches_every_layer_by_the_one_key() -> None:
    net = expanded()
    key = "gene_bank.genes.fc.weight.1"
    given = {key: torch.zeros(WIDTH, WIDTH)}
    called = torch.func.functional_call(net, given, (batch(),))
    with torch.no_grad():
        net.get_parameter(key).zero_()
    assert torch.equal(called, net(batch()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batched attention on the CPU
@pytest.mark.parametrize("kind", NETWORKS)
def test_an_ensemble_under_vmap(kind: str) -> None:
    """Several networks as one call, with their gradients."""
    nets = [NETWORKS[kind](seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    empty, words = copy.deepcopy(nets[0]).to("meta"), batch()

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(empty, (parameters, buffers), (words,)).square().mean()

    losses = torch.func.vmap(loss)(parameters, buffers)
    gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    for number, net in enumerate(nets):
        alone = net(words).square().mean()
        alone.backward()
        torch.testing.assert_close(losses[number], alone, rtol=1e-5, atol=1e-6)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(gradients[name][number], parameter.grad, rtol=1e-4, atol=1e-5)
