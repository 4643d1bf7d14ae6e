# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters for optimizers: every trainable one once, with its own rate, and what decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from host_samples import OddNet, images, timm_vit
from torch import nn

import pylearngene as plg
from pylearngene.errors import ArgumentError
from pylearngene.methods import TLEG, Expansion


def named(net: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Names of the parameters by group; no parameter may come twice."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def learned() -> nn.Module:
    return plg.auxiliary(OddNet(), Expansion(TLEG().coefficients(3), learn=True))


def test_five_groups_with_rates_and_decay() -> None:
    net = learned()
    groups = plg.param_groups(net, lr=0.1, gene_lr=0.01, weight_decay=0.3)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("genes", 0.01, 0.3),
        ("genes_no_decay", 0.01, 0.0),
        ("coeffs", 0.1, 0.0),
        ("rest", 0.1, 0.3),
        ("rest_no_decay", 0.1, 0.0),
    ]
    found = named(net, groups)
    weights = {f"gene_bank.genes.{layer}.weight.{k}" for layer in ("gate", "up.0", "down") for k in (0, 1)}
    flat = {f"gene_bank.genes.{layer}.bias.{k}" for layer in ("gate", "down", "before") for k in (0, 1)}
    assert found["genes"] == weights
    assert found["genes_no_decay"] == flat | {f"gene_bank.genes.before.weight.{k}" for k in (0, 1)}
    assert found["coeffs"] == {
        f"body.steps.{block}.{layer}.coeffs" for block in range(3) for layer in ("before", "gate", "up.0", "down")
    }
    assert found["rest"] == {"stem.weight", "tail.1.weight"}
    assert found["rest_no_decay"] == {"stem.bias", "tail.0.weight", "tail.0.bias", "tail.1.bias"}
    assert set().union(*found.values()) == {name for name, _ in net.named_parameters()}


def test_genes_follow_the_common_rate_by_default() -> None:
    assert {group["lr"] for group in plg.param_groups(learned(), 0.1)} == {0.1}
    assert {group["weight_decay"] for group in plg.param_groups(learned(), 0.1)} == {0.0}


def test_plain_models_and_timm_lists() -> None:
    from timm.optim import param_groups_weight_decay

    model = timm_vit(class_token=True, global_pool="token")
    skip = model.no_weight_decay()
    assert "dist_token" in skip
    groups = plg.param_groups(model, 0.1, weight_decay=0.2, no_decay=skip)
    theirs = param_groups_weight_decay(model, 0.2, no_weight_decay_list=skip)
    by_decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    assert by_decay == {group["weight_decay"]: {id(p) for p in group["params"]} for group in theirs}
    assert named(model, groups).keys() == {"rest", "rest_no_decay"}
    assert "pos_embed" in named(model, plg.param_groups(model, 0.1, weight_decay=0.2))["rest"]


def test_frozen_parameters_are_left_out_and_tied_ones_come_once() -> None:
    net = learned()
    net.tail[1].weight = net.gene_bank.group("gate").weight[0]
    assert "tail.1.weight" not in named(net, plg.param_groups(net, 0.1))["rest"]
    plg.freeze(net, genes=True, coeffs=True)
    assert named(net, plg.param_groups(net, 0.1)).keys() == {"rest", "rest_no_decay"}
    assert plg.param_groups(net.requires_grad_(False), 0.1) == []


def test_layers_of_ours_without_genes_are_not_coefficients() -> None:
    net = nn.Sequential(nn.Linear(3, 3), plg.nn.expansion_norm.Scale(3))
    assert named(net, plg.param_groups(net, 0.1)) == {"rest": {"0.weight"}, "rest_no_decay": {"0.bias", "1.weight"}}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_take_the_groups_and_keep_their_names(kind: Any) -> None:
    net = learned()
    optimizer = kind(plg.param_groups(net, 0.1, gene_lr=0.0, weight_decay=0.1))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net(images()).square().sum().backward()
    optimizer.step()
    assert optimizer.param_groups[2]["name"] == "coeffs"
    changed = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if not name.startswith("gene_bank.")}
    other = kind(plg.param_groups(net, 0.5, weight_decay=0.1))
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.0, 0.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr: expected a finite number of at least 0, got nan"),
        ({"gene_lr": math.inf}, "gene_lr: expected a finite number of at least 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number of at least 0, got -0.1"),
        ({"no_decay": "pos_embed"}, "no_decay: expected a collection of names, got the text 'pos_embed'"),
        ({"lr": "a"}, "lr: expected a finite number of at least 0, got 'a'"),
        ({"lr": None}, "lr: expected a finite number of at least 0, got None"),
        ({"gene_lr": True}, "gene_lr: expected a finite number of at least 0, got True"),
        ({"weight_decay": [0.1]}, r"weight_decay: expected a finite number of at least 0, got \[0.1\]"),
        ({"no_decay": None}, "no_decay: expected a collection of names, got None"),
        ({"no_decay": 3}, "no_decay: expected a collection of names, got 3"),
        ({"no_decay": b"stem"}, "no_decay: expected a collection of names, got b'stem'"),
        ({"net": [torch.zeros(1)]}, "net: expected a module, got list"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plg.param_groups(**{"net": OddNet(), "lr": 0.1, **options})
