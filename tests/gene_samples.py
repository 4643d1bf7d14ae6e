# SPDX-License-Identifier: Apache-2.0
"""A made-up method and a small learngene of it, for the tests of learngenes, gene folders and the Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pylearngene.learngene import HostSpec, Learngene

TENSORS, CONFIG = "gene.safetensors", "gene_config.json"


@dataclass(frozen=True)
class Stub:
    """A method that grows the list of what it was asked for."""

    rate: float = 0.5
    name = "stub"

    def to_config(self) -> dict[str, Any]:
        return {"rate": self.rate, "table": ((1, 2), (3, 4))}

    def descend(self, lg: Learngene, **kwargs: Any) -> nn.Module:
        net = nn.Linear(1, 1)
        net.asked = (lg, kwargs)
        return net

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Stub:
        if set(config) != {"rate", "table"}:
            raise ValueError(f"expected rate and table, got {sorted(config)}")
        return cls(config["rate"])


def host(**changes: Any) -> HostSpec:
    layers = (("attn.qkv", "linear"), ("norm1", "layer_norm"))
    return replace(
        HostSpec("own", {"labels": {0: "cat", 10: "dog", 2: "cow"}, "sizes": (1, 2)}, "blocks", 12, layers), **changes
    )


def learngene(seed: int = 0, **changes: Any) -> Learngene:
    torch.manual_seed(seed)
    genes = {
        f"attn.qkv.{kind}.{k}": torch.randn(6, *rest) for kind, rest in (("weight", [4]), ("bias", [])) for k in (0, 1)
    }
    tensors = {
        "cls_token": torch.randn(1, 1, 4, dtype=torch.float64),
        "head.weight": torch.randn(3, 4).bfloat16(),
        "steps": torch.tensor(7),
    }
    fields: dict[str, Any] = {"genes": genes, "tensors": tensors, "method": Stub(), "host": host()}
    return Learngene(**{**fields, "coeffs": {"attn.qkv": torch.rand(12, 2).half()}, **changes})


def same(a: Learngene, b: Learngene) -> bool:
    groups = [(getattr(a, group), getattr(b, group)) for group in ("genes", "tensors", "coeffs")]
    return all(
        set(one) == set(two) and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)
        for one, two in groups
    )
