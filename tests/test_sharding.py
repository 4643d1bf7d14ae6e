# SPDX-License-Identifier: Apache-2.0
"""Genes sharded by FSDP2 in two processes: equal to one process, gathered and reduced once, other ways refused.

What the processes do is in sharding_samples; they are started twice, for what is quick and for the rest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sharded_networks
import sharding_samples
import torch
import torch.distributed.fsdp
from test_processes import by_hand
from torch import nn

import pylearngene as plg
from pylearngene.errors import ArgumentError, BackendError, DTypeError, MethodError

PROGRAM = Path(sharding_samples.__file__)
TOLERANCE = 1e-6
FIRST = ("training", "messages", "wrong")
MARGIN = 1.5  # over the error of the same network in bfloat16


def found(folder: Path, jobs: list[str]) -> dict[str, Any]:
    """What the first process found; the second has found the same, where it is not about its own part."""
    for code, _, said in by_hand(PROGRAM, folder, *jobs):
        assert code == 0, said
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first.keys() == second.keys() == set(jobs)
    return first


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory.mktemp("quick"), [*FIRST])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory.mktemp("others"), [name for name in sharding_samples.JOBS if name not in FIRST])


def check_training(results: dict[str, Any], count: int) -> None:
    assert len(results) == count
    for way, result in results.items():
        assert result["moved"] > 0.04, way
        assert result["state"] <= TOLERANCE, way
        assert result["norms"] <= TOLERANCE, way
        assert len(set(result["parameters"])) == 1, way


def test_five_steps_are_those_of_one_process(quick: dict[str, Any]) -> None:
    """Fixed and learned coefficients, with and without checkpoints, with and without blocks of their own group."""
    check_training(quick["training"], 8)


def test_one_message_each_way_and_one_gradient_per_gene(quick: dict[str, Any]) -> None:
    messages = quick["messages"]
    expected = {"gather": 1, "scatter": 1, "gradients": messages["genes"]}
    assert len(messages["seen"]) == 4
    assert all(seen == expected for seen in messages["seen"].values()), messages["seen"]


HELPER = (
    "ShardingError: gene_bank: expected genes sharded by plg.fully_shard_genes(model, mesh), "
    "which shards the root as well, got"
)
SAID = {
    "root alone": "them in another group of FSDP",
    "blocks and root": "them in another group of FSDP",
    "blocks alone": "parts of the model sharded and the genes left out",
    "blocks alone, compiled": "parts of the model sharded and the genes left out",
    "blocks alone, later": "parts of the model sharded and the genes left out",
    "bank, resharded": "them in another group of FSDP",
    "bank, not resharded": "them in another group of FSDP",
    "FSDP1": "them in another group of FSDP",
    "root first": "a model whose root is sharded already",
    "twice": "a model whose root is sharded already",
}
ALSO = {
    "helper, then resharded": "ShardingError: reshard_after_forward: expected False for the gene bank",
    "reentrant": "ShardingError: checkpoint: expected use_reentrant=False around gene-backed layers",
    "half": "ArgumentError: mp_policy: expected param_dtype None or float32 where layers learn coefficients",
    "layer alone": "ShardingError: layer: expected a call inside a forward pass of the sharded model, got one alone",
    "weight alone": "ShardingError: layer: expected a call inside a forward pass of the sharded model, got one alone",
    "extracted": "ShardingError: net: expected a network that is not sharded, got one whose genes are",
    "baked": "ShardingError: net: expected a network that is not sharded, got one whose genes are",
    "plain": "MethodError: model: expected one that a gene bank is attached to, got a plain Linear",
}


@pytest.mark.parametrize("way", sharding_samples.WRONG)
def test_other_ways_are_refused(quick: dict[str, Any], way: str) -> None:
    said = quick["wrong"][way]
    assert said.startswith(ALSO[way]) if way in ALSO else said == f"{HELPER} {SAID[way]}"


@pytest.mark.full
def test_five_steps_of_variants(others: dict[str, Any]) -> None:
    check_training(others["variants"], 8)


@pytest.mark.full
def test_passes_in_other_orders(others: dict[str, Any]) -> None:
    differences = [*others["passes"].values(), *others["stale"].values(), *others["compiled"].values()]
    assert len(differences) == 7
    assert max(*differences, others["skipped"]) <= TOLERANCE


@pytest.mark.full
def test_resume_bit_for_bit(others: dict[str, Any]) -> None:
    assert others["resumed"]["state"] == 0
    assert len(set(others["resumed"]["slots"])) == 1


@pytest.mark.full
def test_states_leave_and_enter(others: dict[str, Any]) -> None:
    result = others["whole_state"]
    assert (result["plain"], result["made"], result["ties"]) == (0, 0, True)
    assert result["norms"][0] == result["norms"][1]


@pytest.mark.full
def test_mixed_precision(others: dict[str, Any]) -> None:
    result = others["mixed"]
    assert result["errors"][0] <= MARGIN * result["errors"][1]
    assert result["seen"] == ["torch.bfloat16, torch.bfloat16"]
    assert result["dtypes"] == ["torch.float32"]


def test_what_is_no_network_with_plain_genes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tagged(torch.Tensor):
        pass

    net = sharded_networks.network()
    with pytest.raises(MethodError, match="model: expected one that a gene bank is attached to, got a plain Linear"):
        plg.fully_shard_genes(nn.Linear(2, 2))
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(BackendError, match=r"torch: expected one with torch.distributed.fsdp.fully_shard, got "):
        plg.fully_shard_genes(net)
    monkeypatch.undo()
    genes = net.gene_bank.group("1").weight
    genes[1] = nn.Parameter(genes[1].detach().as_subclass(Tagged))
    with pytest.raises(DTypeError, match=r"1.weight.1: expected a plain torch.Tensor, got the subclass Tagged"):
        plg.fully_shard_genes(net)
    assert not any(isinstance(module, torch.distributed.fsdp.FSDPModule) for module in net.modules())


def test_a_refusal_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of torch's own, in the middle."""

    def fails(*_: object, **__: object) -> None:
        raise ValueError("torch's own")

    net = sharded_networks.network()
    for options, message in (
        ({"mesh": "cpu"}, "mesh: expected a DeviceMesh of one or two axes, or None, got 'cpu'"),
        (
            {"mp_policy": torch.bfloat16},
            "mp_policy: expected a MixedPrecisionPolicy of FSDP2, or None, got torch.bfloat16",
        ),
    ):
        with pytest.raises(ArgumentError, match=f"^{message}"):
            plg.fully_shard_genes(net, **options)
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", fails)
    with pytest.raises(ValueError, match="torch's own"):
        plg.fully_shard_genes(net)
    assert type(net.gene_bank) is plg.nn.GeneBank
    net.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ArgumentError, match=r"^model: expected parameters with axes, .* got the scalar scale$"):
        plg.fully_shard_genes(net)
