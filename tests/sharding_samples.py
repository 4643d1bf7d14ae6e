# SPDX-License-Identifier: Apache-2.0
"""What the two processes of test_sharding do: this file is the program that they are started with.

`python sharding_samples.py FOLDER` does every job below, one after the other in one pair of processes, since starting
takes longer than most jobs; what a process found goes to FOLDER/<rank>.json. What is expected is said in the test.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_networks import (
    RANK,
    WORLD,
    adamw,
    apart,
    batch,
    compared,
    difference,
    full,
    loss_of,
    mesh,
    mine,
    network,
    sharded,
    steps,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import pylearngene as plg
from pylearngene.errors import PylearngeneError

JOBS: dict[str, Callable[[Path], Any]] = {}


def job(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    JOBS[function.__name__] = function
    return function


def with_blocks(net: nn.Module) -> None:
    for block in net.blocks:
        fully_shard(block, mesh=mesh())
    plg.fully_shard_genes(net, mesh())


def helper(net: nn.Module) -> None:
    plg.fully_shard_genes(net, mesh())


def with_replicas(net: nn.Module) -> None:
    plg.fully_shard_genes(net, init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replica", "shard")))


def recomputing(net: nn.Module) -> None:
    net.recompute = False


@job
def training(_: Path) -> Any:
    """Every way that is promised, against one process."""
    return {
        f"{'learned' if learn else 'fixed'}, {'checkpoint' if change else 'plain'}, {way.__name__}": compared(
            way, learn, change
        )
        for learn in (False, True)
        for change in (None, recomputing)
        for way in (helper, with_blocks)
    }


@job
def variants(_: Path) -> Any:
    def frozen(net: nn.Module) -> None:
        plg.freeze(net, genes=[0])

    return {
        "accumulation": compared(helper, parts=2),
        "accumulation, checkpoint": compared(helper, True, recomputing, parts=2),
        "genes alone": compared(helper, stem=False),
        "frozen": compared(helper, True, frozen),
        "one block": compared(helper, depth=1),
        "replicas": compared(with_replicas),
        "low rank": compared(helper, low_rank=True),
        "low rank, checkpoint, blocks": compared(with_blocks, False, recomputing, low_rank=True),
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count messages of FSDP and gradients that reach a gene while the block runs."""
    names: tuple[str, ...] = ("all_gather_single", "reduce_scatter_single")
    if not hasattr(dist, names[0]):
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    found: dict[str, int] = {}
    before = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            kind = name.split("_")[1]
            found[kind] = found.get(kind, 0) + 1
            return before[name](*arguments, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name in names:
            setattr(dist, name, before[name])


@job
def messages(_: Path) -> Any:
    """How often genes are gathered, reduced and given a gradient in one step, for two depths."""
    found = {}
    for depth in (2, 6):
        for change in (None, recomputing):
            net = sharded(depth=depth, stem=False)
            if change is not None:
                change(net)
            loss_of(net, batch(0)).backward()
            gradients = []

            def watch(layer: nn.Module, _: Any, __: Any, gradients: list[int] = gradients) -> None:
                if not gradients:
                    gradients.append(0)
                    for gene in layer.bank.parameters():
                        gene.register_post_accumulate_grad_hook(lambda _: gradients.append(1))

            net.blocks[0][0].register_forward_hook(watch)
            with counted() as seen:
                loss_of(net, batch(0)).backward()
            found[f"{depth}, {change is not None}"] = {**seen, "gradients": sum(gradients)}
    return {"genes": len(list(net.gene_bank.parameters())), "seen": found}


@job
def passes(_: Path) -> Any:
    """Passes in other orders than forward, backward, step."""

    def gradients(act: Callable[[nn.Module, Callable[[Tensor], Tensor]], None]) -> float:
        found = []
        for alone in (True, False):
            net = network() if alone else sharded()
            act(net, lambda x, alone=alone, net=net: loss_of(net, mine(x, alone)))
            assert all(isinstance(p.grad, DTensor) != alone for p in net.parameters())
            found.append({name: whole(p.grad) for name, p in net.named_parameters()})
        return apart(*found)

    def two_forwards(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        first, second = loss(batch(0)), loss(batch(1))
        first.backward()
        second.backward()

    def evaluated(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        first = loss(batch(0))
        with torch.no_grad():
            loss(batch(1))
        first.backward()

    def retained(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        first = loss(batch(0))
        first.backward(retain_graph=True)
        first.backward()

    ways = (two_forwards, evaluated, retained)
    return {way.__name__: gradients(way) for way in ways}


@job
def stale(_: Path) -> Any:
    """A forward between backward and step, with and without gradients: the next forward reads the new genes."""
    found = {}
    for gradient in (False, True):
        results = []
        for alone in (True, False):
            net = network(stem=False) if alone else sharded(stem=False)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            loss_of(net, mine(batch(0), alone)).backward()
            with torch.set_grad_enabled(gradient):
                net(mine(batch(0), alone))
            optimizer.step()
            results.append(net(batch(1)).detach())
        found[str(gradient)] = difference(*results)
    return found


@job
def skipped(_: Path) -> Any:
    """One process leaves a block out; its genes are used by the others, so that nothing is missing."""
    one, two = network(), sharded()
    for rank in range(WORLD):
        one.skipped = 2 if rank == 1 else None
        (loss_of(one, batch(0).tensor_split(WORLD)[rank]) / WORLD).backward()
    two.skipped = 2 if RANK == 1 else None
    loss_of(two, mine(batch(0), False)).backward()
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(difference(p.grad, whole(q.grad)) for p, q in pairs)


@job
def resumed(folder: Path) -> Any:
    """Five steps after loading against the same steps without a break, to the last bit."""
    net = sharded(learn=True)
    optimizer = adamw(net)
    steps(net, False, range(3), optimizer)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    steps(net, False, range(3, 8), optimizer)
    again = plg.fully_shard_genes(network(learn=True, seed=7), mesh())
    fresh = adamw(again)
    model_state, optimizer_state = get_state_dict(again, fresh)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(again, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(again, False, range(3, 8), fresh)
    slots = sum(name.startswith("gene_bank.") for name in optimizer_state["state"])
    return {"state": apart(full(net), full(again)), "slots": [slots, len(list(net.gene_bank.parameters()))]}


@job
def whole_state(_: Path) -> Any:
    """The way from a sharded network to one that is not, and from the meta device to a sharded one."""
    net = sharded()
    steps(net, False, range(2))
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    plain, trained = network(seed=3), full(net)
    if RANK == 0:  # the others are given nothing
        plain.load_state_dict(state)
    made = plg.fully_shard_genes(network(seed=5).to("meta"), mesh())
    made.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(made, state if RANK == 0 else {}, options=options)
    return {
        "plain": apart(full(plain), trained) if RANK == 0 else 0.0,
        "made": apart(full(made), trained),
        "ties": len(list(made.parameters())) == len(list(plain.parameters())),
        "norms": [steps(it, False) for it in (made, net)],
    }


@job
def mixed(_: Path) -> Any:
    """Genes gathered in bfloat16 and reduced in float32; masters and states stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net, exact, half = plg.fully_shard_genes(network(), mesh(), policy), network(), network().bfloat16()
    seen: set[str] = set()
    net.blocks[1][1].register_forward_hook(lambda layer, _, y: seen.add(f"{layer.first_gene.dtype}, {y.dtype}"))
    loss_of(net, mine(batch(0), False)).backward()
    loss_of(exact, batch(0)).backward()
    loss_of(half, batch(0).bfloat16()).backward()
    errors = []
    for other in (net, half):
        pairs = zip(exact.parameters(), other.parameters(), strict=True)
        errors.append(max(float((whole(q.grad).float() - p.grad).norm() / p.grad.norm()) for p, q in pairs))
    dtypes = {str(tensor.dtype) for p in net.parameters() for tensor in (p, p.grad)}
    return {"errors": errors, "seen": sorted(seen), "dtypes": sorted(dtypes)}


@job
def compiled(_: Path) -> Any:
    """Compiled parts end at each gene-backed layer, whether blocks are compiled or all."""
    found = {}
    for part in ("model", "blocks"):
        one, two = network(), sharded()
        for module in two.blocks if part == "blocks" else [two]:
            module.compile(backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about itself
            for net in (one, two):
                loss_of(net, mine(batch(0), net is one)).backward()
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        found[part] = max(difference(p.grad, whole(q.grad)) for p, q in pairs)
    return found


def bank_first(again: bool) -> Callable[[nn.Module], None]:
    def wrap(net: nn.Module) -> None:
        fully_shard(net.gene_bank, mesh=mesh(), reshard_after_forward=again)
        fully_shard(net, mesh=mesh())

    return wrap


def blocks_and_root(net: nn.Module) -> None:
    for block in net.blocks:
        fully_shard(block, mesh=mesh())
    fully_shard(net, mesh=mesh())


def blocks_compiled(net: nn.Module) -> None:
    for block in net.blocks:
        fully_shard(block, mesh=mesh())
    net.compile(backend="eager")


def resharding(net: nn.Module) -> None:
    helper(net)
    net.set_reshard_after_forward(True)


def root_first(net: nn.Module) -> None:
    fully_shard(net, mesh=mesh())
    helper(net)


def twice(net: nn.Module) -> None:
    helper(net)
    helper(net)


def reentrant(net: nn.Module) -> None:
    helper(net)
    net.recompute = True


def in_half(net: nn.Module) -> None:
    plg.fully_shard_genes(net, mesh(), MixedPrecisionPolicy(param_dtype=torch.bfloat16))


WRONG: dict[str, Callable[[nn.Module], Any]] = {
    "root alone": lambda net: fully_shard(net, mesh=mesh()),
    "blocks and root": blocks_and_root,
    "blocks alone": lambda net: [fully_shard(block, mesh=mesh()) for block in net.blocks],
    "blocks alone, later": lambda net: (net(batch(0)), [fully_shard(block, mesh=mesh()) for block in net.blocks]),
    "bank, resharded": bank_first(True),
    "bank, not resharded": bank_first(False),
    "blocks alone, compiled": blocks_compiled,
    "helper, then resharded": resharding,
    "root first": root_first,
    "twice": twice,
    "reentrant": reentrant,
    "half": in_half,
    "layer alone": lambda net: (helper(net), net.blocks[0](batch(0))),
    "weight alone": lambda net: (helper(net), net.blocks[0][1].dense_weight()),
    "FSDP1": lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
    "extracted": lambda net: (helper(net), plg.extract(net)),
    "baked": lambda net: (helper(net), plg.bake(net)),
    "plain": lambda net: helper(nn.Linear(2, 2)),
}


@job
def wrong(_: Path) -> Any:
    """What is said of every other way."""
    said = {}
    for name, wrap in WRONG.items():
        net = network(learn=True)
        try:
            made = wrap(net)
            made = made if isinstance(made, nn.Module) else net
            loss_of(made, batch(0).requires_grad_()).backward()
            said[name] = "nothing"
        except PylearngeneError as error:
            said[name] = f"{type(error).__name__}: {error}"
        except Exception as error:
            said[name] = f"not ours: {type(error).__name__}: {str(error)[:200]}"
    return said


if __name__ == "__main__":
    target = Path(sys.argv[1])
    warnings.simplefilter("error")
    torch.use_deterministic_algorithms(True)
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=15))
    answers = {name: act(target) for name, act in JOBS.items() if not sys.argv[2:] or name in sys.argv[2:]}
    (target / f"{RANK}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()
