# SPDX-License-Identifier: Apache-2.0
"""Networks of convolutions as hosts: every operation on a ResNet-like network of the user's own, and refusals.

Layers alone are in `test_expansion_conv_layers`, hosts of other kinds in `test_networks`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from host_samples import OddResNet, images
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.errors import HostError
from pylearngene.hosts import find_blocks
from pylearngene.learngene import Learngene
from pylearngene.methods import TLEG

KINDS = [("conv1", "conv2d"), ("norm1", "group_norm"), ("conv2", "conv2d"), ("norm2", "group_norm")]


def fitted(depth: int = 3) -> nn.Module:
    """A gene-backed network whose genes come from a plain one, moved off the fit."""
    net = plg.auxiliary(OddResNet(depth).double(), TLEG(), init="fit")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net.eval()


def test_blocks_and_kinds_are_found() -> None:
    host = find_blocks(OddResNet(4))
    assert (host.path, len(host.blocks), list(host.layers)) == ("stage", 4, KINDS)


def test_backed_equals_baked_without_a_full_weight() -> None:
    net = fitted()
    x = images(torch.float64)
    before = plg.nn.dense_syntheses()
    y = net(x)
    y.square().sum().backward()
    assert plg.nn.dense_syntheses() == before
    plain = plg.bake(net)
    torch.testing.assert_close(plain(x), y, rtol=1e-10, atol=1e-10)
    assert plain.state_dict().keys() == OddResNet().state_dict().keys()
    assert not any(type(module).__module__.startswith("pylearngene") for module in plain.modules())
    assert (plain.stage[0].conv2.padding, plain.stage[0].conv2.padding_mode) == ("same", "reflect")
    assert [type(layer) for layer in plain.stage[1].children()] == [nn.Conv2d, nn.GroupNorm] * 2


def test_gradients_of_genes_are_sums_over_the_blocks() -> None:
    net = fitted()
    plain, x = plg.bake(net), images(torch.float64)
    for model in (net, plain):
        model(x).square().sum().backward()
    table = torch.tensor(TLEG().coefficients(3), dtype=torch.float64)
    for path, _ in KINDS:
        dense = torch.stack([block.get_submodule(path).weight.grad for block in plain.stage])
        found = torch.stack([gene.grad for gene in net.gene_bank.group(path).weight])
        torch.testing.assert_close(found, torch.tensordot(table.T, dense, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_stored_and_grown_at_any_depth(depth: int, tmp_path: Path) -> None:
    net = fitted()
    plg.extract(net).save_pretrained(tmp_path / "gene")
    lg = Learngene.from_pretrained(tmp_path / "gene")
    x = images(torch.float64)
    y = net(x)
    backed = lg.descend(depth=depth, model=OddResNet(2).double()).eval()
    plain = lg.descend(depth=depth, backed=False, model=OddResNet(2).double()).eval()
    assert len(backed.stage) == len(plain.stage) == depth
    torch.testing.assert_close(backed(x), plain(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plg.set_depth(net, depth)(x), backed(x), rtol=0, atol=0)
    assert torch.equal(backed(x), y) == (depth == 3)


def test_genes_start_as_the_method_says_and_train() -> None:
    net = plg.auxiliary(OddResNet(3), TLEG())
    weight = net.gene_bank.group("conv1").weight[0]
    assert 0.018 < weight.std() < 0.022
    assert net.gene_bank.group("norm1").weight[0].eq(1).all()
    x, labels = images(), torch.tensor([3, 7])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_summary_names_the_regime_of_convolutions() -> None:
    account = plg.summary(plg.auxiliary(OddResNet(3), TLEG()), tokens=2)
    assert [(layer.kind, layer.regime) for layer in account.layers[:2]] == [("conv2d", "panel"), ("group_norm", None)]
    assert account.layers[0].shape == (16, 16, 3, 3)
    assert plg.summary(plg.auxiliary(OddResNet(3), TLEG())).layers[0].regime is None


class Separable(nn.Module):
    """Depthwise, then pointwise, on images that lie channels-last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.across = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.mix = nn.Conv2d(width, 2 * width, 1)
        self.back = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(F.gelu(self.mix(self.across(x))))


class Mixer(nn.Module):
    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.ModuleList(Separable(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def test_depthwise_and_pointwise_convolutions() -> None:
    net = plg.auxiliary(Mixer(4).double(), TLEG(), init="fit")
    x = images(torch.float64)
    y = net(x)
    y.sum().backward()
    plain = plg.bake(net)
    torch.testing.assert_close(plain(x), y, rtol=1e-10, atol=1e-10)
    plain(x).sum().backward()
    for path in ("across", "mix", "back"):
        dense = sum(block.get_submodule(path).weight.grad for block in plain.blocks)
        torch.testing.assert_close(net.gene_bank.group(path).weight[0].grad, dense, rtol=1e-9, atol=1e-12)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)


class Body(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(layer if k == 0 else type(layer)(4, 4, 3)) for k in range(3))


@pytest.mark.parametrize("layer", [Standardized, Padded])
def test_convolutions_that_compute_something_else_are_refused(layer: type[nn.Conv2d]) -> None:
    message = rf"model: expected 'blocks.0.0' to compute what nn.Conv2d computes, but its class .*{layer.__name__} over"
    with pytest.raises(HostError, match=message):
        plg.auxiliary(Body(layer(4, 4, 3)), TLEG())


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose2d])
def test_other_convolutions_are_no_hosts(layer: type[nn.Module]) -> None:
    with pytest.raises(HostError, match=r"nn.Conv2d \(conv2d\).*got 'blocks.0.0.weight' in a .*" + layer.__name__):
        plg.auxiliary(Body(layer(4, 4, 3)), TLEG())
