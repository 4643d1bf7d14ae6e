# SPDX-License-Identifier: Apache-2.0
"""The account of a gene-backed network: bytes, ratio, residuals, regimes, and what it says about its origin."""

from __future__ import annotations

import torch
from host_samples import timm_vit
from torch import nn

from pylearngene import _backends, plan
from pylearngene.methods import TLEG
from pylearngene.networks import auxiliary, bake, set_depth
from pylearngene.summary import summary

CPU = torch.device("cpu")


def test_summary_counts_bytes_and_prints_a_table() -> None:
    net = auxiliary(timm_vit(), TLEG(), init="fit")
    told = summary(net, tokens=1_000_000)
    fc1 = next(layer for layer in told.layers if layer.name == "mlp.fc1")
    assert (fc1.kind, fc1.shape, fc1.genes) == ("linear", (128, 32), 2)
    assert (fc1.gene_bytes, fc1.dense_bytes) == (2 * 4 * (128 * 32 + 128), 3 * 4 * (128 * 32 + 128))
    assert told.gene_bytes == sum(gene.nbytes for _, gene in net.gene_bank.named_genes())
    assert told.dense_bytes == sum(parameter.nbytes for parameter in bake(net).blocks.parameters())
    assert told.outside_bytes == sum(parameter.nbytes for parameter in net.parameters()) - told.gene_bytes
    assert told.ratio == told.dense_parameters / told.parameters > 1
    regime = plan.choose(1_000_000, _backends.implementation(CPU), 4, 2, arch=_backends.arch(CPU))
    assert fc1.regime == regime != "auto"
    assert told.notes[-1].startswith(f"regime {regime}: ")
    text = str(told)
    assert text.startswith(
        "VisionTransformer, gene-backed by TLEG(), depth 3, host timm: timm.models.vision_transformer"
    )
    for part in ("mlp.fc1", "33.0 KiB", "stored 27,914 parameters", "genes: fitted by least squares to the blocks"):
        assert part in text
    assert summary(net).layers[0].regime is None


def test_summary_says_why_a_host_is_the_users_own() -> None:
    model = timm_vit()
    model.blocks[0].mlp.act = nn.ReLU()
    assert "host is the user's own class: timm would build something else" in str(summary(auxiliary(model, TLEG())))


def test_residuals_are_those_of_the_depth_that_was_fitted() -> None:
    net = auxiliary(timm_vit(), TLEG(), init="fit")
    assert summary(net).layers[1].residual > 0
    assert summary(set_depth(net, 3)).layers[1].residual > 0
    assert summary(set_depth(net, 4)).layers[1].residual is None
    assert summary(auxiliary(timm_vit(), TLEG())).layers[1].residual is None
