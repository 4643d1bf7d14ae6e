# SPDX-License-Identifier: Apache-2.0
"""The estimate of a training step's memory: against the allocator's own events, against what it must leave untouched.

The oracle on the CPU is PyTorch's profiler, on a GPU its caching allocator; the resident set is read in a process.
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene.memory.account import Times, account, readable
from pylearngene.memory.ledger import Ledger, rounded
from pylearngene.memory.workspace import blas_workspaces
from pylearngene.training.memory import peak_bytes

WITHIN = 0.1
MIB = 1 << 20


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Blocks and a head; blocks are recomputed where asked."""

    def __init__(self, width: int, depth: int, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head, self.recompute = nn.Linear(width, 10), recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean(1))


def made(kind: str, width: int, depth: int, recompute: bool = False) -> nn.Module:
    """A dense network, one with a gene less or more than two, or one backed by two genes."""
    net = Vit(width, depth, recompute)
    if kind == "dense":
        return net
    if kind == "shared":
        return plg.auxiliary(net, plg.methods.SWS(stages=(1,) * depth))
    return plg.auxiliary(net, plg.methods.TLEG())


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def all_at_once(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as it runs on a GPU by default."""
    return torch.optim.AdamW(parameters, foreach=True)


def measured(net: nn.Module, x: Tensor, optimizer: Any, autocast: torch.dtype | None = None) -> int:
    """The peak of a step that is not the first: what is held before it, and the events of the step."""
    update = optimizer(net.parameters()) if optimizer is not None else None

    def step() -> None:
        with torch.autocast(x.device.type, autocast, autocast is not None):
            loss = net(x).sum()
        loss.backward()
        if update is not None:
            update.step()

    step()
    net.zero_grad()
    states = update.state.values() if update is not None else ()
    state = sum(value.nbytes for each in states for value in each.values() if isinstance(value, Tensor))
    held = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])
    return held + state + x.nbytes + peak_bytes(step, x.device)


CASES = [
    # kind, width, depth, batch, tokens, recomputed, optimizer, autocast
    ("dense", 64, 4, 2, 16, False, torch.optim.AdamW, None),
    ("genes", 64, 4, 2, 16, False, torch.optim.AdamW, None),
    ("genes", 64, 4, 1, 8, False, torch.optim.AdamW, None),  # regime rows
    ("genes", 128, 6, 4, 65, False, torch.optim.AdamW, None),
    ("genes", 128, 6, 4, 65, False, momentum, None),
    ("dense", 128, 6, 1, 17, False, all_at_once, None),
    ("genes", 128, 6, 1, 17, False, all_at_once, None),
    ("genes", 128, 6, 4, 65, False, None, None),
    ("genes", 128, 6, 4, 65, True, torch.optim.AdamW, None),
    ("genes", 128, 6, 4, 65, False, torch.optim.AdamW, torch.bfloat16),
    ("dense", 128, 6, 4, 65, False, torch.optim.AdamW, torch.bfloat16),
    ("dense", 128, 6, 4, 65, True, torch.optim.SGD, None),
    ("shared", 128, 6, 4, 33, False, torch.optim.AdamW, None),
    *(pytest.param("genes", 256, depth, batch, 65, again, torch.optim.AdamW, None, marks=pytest.mark.full)
      for depth in (6, 24) for batch in (1, 16) for again in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "width", "depth", "batch", "tokens", "again", "optimizer", "autocast"), CASES)
def test_estimates_are_what_the_allocator_sees(
    kind: str, width: int, depth: int, batch: int, tokens: int, again: bool, optimizer: Any, autocast: Any
) -> None:
    net, x = made(kind, width, depth, again), torch.randn(batch, tokens, width)
    estimate = plg.estimate_memory(net, x, optimizer=optimizer, autocast=autocast)
    peak = measured(net, x, optimizer, autocast)
    assert abs(estimate.peak / peak - 1) <= WITHIN
    native = plg.backends()[0].backend == "cpp"  # the specification has temporaries in float64 beside a panel
    if autocast is None and native:  # float32 is computed as it is written down: what differs are scalars
        assert abs(estimate.peak / peak - 1) <= 0.01
    assert sum(estimate.at_peak.values()) == estimate.peak


@pytest.mark.parametrize("kind", ["dense", "genes"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads the caching allocator of a GPU")
@pytest.mark.parametrize("again", [False, True])
def test_estimates_on_a_gpu(kind: str, again: bool) -> None:
    net, x = made(kind, 512, 8, again).cuda(), torch.randn(16, 197, 512, device="cuda")
    estimate = plg.estimate_memory(net, x, autocast=torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(x).sum()
        loss.backward()
        optimizer.step()
    assert abs(estimate.peak / torch.cuda.max_memory_allocated() - 1) <= WITHIN


RESIDENT = """
import gc, sys, torch
sys.path.insert(0, sys.argv[1])
import test_estimate_memory as t
from pylearngene.training.memory import resident_bytes
def train(net, x):
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()
kind, again = sys.argv[2], sys.argv[3] == "again"
train(t.made(kind, 256, 2, again), torch.randn(8, 65, 256))  # libraries and threads take what they keep
net, x = t.made(kind, 256, 12, again), torch.randn(8, 65, 256)
gc.collect()  # the dense network of which genes are made
open("/proc/self/clear_refs", "w").write("5")
before = resident_bytes() - sum(tensor.nbytes for tensor in (x, *net.parameters(), *net.buffers()))
train(net, x)
print(resident_bytes() - before)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "again"), [("dense", ""), ("genes", ""), ("genes", "again")])
def test_resident_set_grows_as_estimated(kind: str, again: str) -> None:
    command = [sys.executable, "-c", RESIDENT, str(Path(__file__).parent), kind, again]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the resident set
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(3)]
    least = min(int(run.stdout) for run in runs)  # whatever else happens in a process only adds to it
    estimate = plg.estimate_memory(made(kind, 256, 12, again == "again"), (8, 65, 256))
    assert abs(estimate.peak / least - 1) <= WITHIN


def test_a_gene_backed_step_holds_the_dense_one_less_its_weights() -> None:
    """Less weights and optimizer state, with the gradients that live at the peak, plus one panel: nothing else."""
    x = torch.randn(4, 65, 128)
    nets = [made(kind, 128, 6) for kind in ("dense", "genes")]
    dense, genes = (plg.estimate_memory(net, x) for net in nets)
    assert dense.moment == genes.moment == "backward"
    less = dense.weights + dense.optimizer - genes.weights - genes.optimizer
    less += dense.at_peak["gradients"] - genes.at_peak["gradients"]
    peaks = [measured(net, x, torch.optim.AdamW) for net in nets]
    assert peaks[1] <= peaks[0] - less + MIB
    assert genes.activations - dense.activations <= MIB // 16  # coefficients and tokens


def test_what_is_held_is_told_apart() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    found = plg.estimate_memory(net, (5, 32))
    weights = sum(parameter.nbytes for parameter in net.parameters())
    assert (found.device, found.weights, found.gradients, found.inputs) == ("cpu", weights, weights, 5 * 32 * 4)
    assert found.optimizer == 2 * weights + 4 * 4  # two moments, and a step number per parameter
    assert found.activations == 5 * 64 * 4 + 4  # tanh's result, the loss; nobody needs the products
    assert found.workspace == 0
    assert found.elsewhere == ()
    whole = 256 * 64 * 4  # fc1 and fc2 are smaller than a panel of 1 MiB
    native = plg.backends()[0].backend == "cpp"
    slow = 0 if native else 24 * 256 * 64  # the specification's temporaries
    norms = 2 * 2 * 64 * 4  # in two pieces of the tokens, the gradients of gain and bias
    for regime, panel in (("panel", whole + slow), ("rows", norms if native else whole + slow)):
        plg.set_regime(regime)
        try:
            assert plg.estimate_memory(made("genes", 64, 2), (2, 16, 64)).workspace == panel
        finally:
            plg.set_regime("auto")
    text = str(found)
    for part in ("memory of one step on cpu", "activations", "1.3 KiB", "peak", "in the optimizer's step"):
        assert part in text


def test_a_forward_pass_alone_holds_no_gradients() -> None:
    net = made("genes", 64, 4)
    found = plg.estimate_memory(net, (2, 16, 64), train=False)
    assert (found.gradients, found.optimizer, found.moment) == (0, 0, "forward")
    assert found.activations == 2 * 10 * 4
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        held = sum(parameter.nbytes for parameter in net.parameters()) + x.nbytes
        assert abs(found.peak / (held + peak_bytes(lambda: net.eval()(x))) - 1) <= 0.01


def test_models_of_the_meta_device_and_of_any_size() -> None:
    """500 GiB of weights: nothing is allocated, and the numbers are those of the CPU."""
    with torch.device("meta"):
        huge = nn.Sequential(*(nn.Linear(1 << 17, 1 << 17, bias=False) for _ in range(8)))
        small = Vit(64, 3)
    assert plg.estimate_memory(huge, (1, 1 << 17), optimizer="sgd").peak > 2 * 8 * (1 << 36)
    for net in (small, plg.auxiliary(small, plg.methods.TLEG())):
        real = net.to_empty(device="cpu") if net is small else made("genes", 64, 3)
        assert plg.estimate_memory(net, (2, 9, 64)) == plg.estimate_memory(real, (2, 9, 64))


def test_batches_are_what_a_model_is_called_with() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor, scale: Tensor, twice: bool = False) -> Any:
            y = self.out(self.embed(ids)) * scale
            return SimpleNamespace(loss=(y + y if twice else y).sum())

    ids, net = torch.zeros(3, 7, dtype=torch.long, device="meta"), Two()
    one = plg.estimate_memory(net, (ids, (3, 7, 1)))
    assert one == plg.estimate_memory(net, {"ids": ids, "scale": torch.ones(3, 7, 1)})
    assert one.inputs == 3 * 7 * 8 + 3 * 7 * 4
    assert plg.estimate_memory(net, {"ids": ids, "scale": (3, 7, 1), "twice": True}).peak >= one.peak


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["dense", "genes"])
def test_the_model_is_left_as_it_was(kind: str, fails: bool) -> None:
    net, called = made(kind, 32, 3).eval(), []
    net.register_buffer("seen", torch.zeros(1))
    hook = net.blocks[0].register_forward_hook(lambda module, args, y: called.append(type(y).__name__))
    x = torch.randn(2, 5, 32)
    net(x).sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    before, states = copy.deepcopy(net.state_dict()), (torch.get_rng_state(), random.getstate())
    drawn = np.random.get_state()[2]
    tensors = {name: (id(t), t.data_ptr(), t._version) for name, t in net.state_dict(keep_vars=True).items()}

    def loss(y: Tensor) -> Tensor:
        torch.rand(3)
        random.random()
        np.random.rand()
        return F.dropout(y).sum() if not fails else y

    if fails:
        with pytest.raises(plg.errors.ArgumentError, match=r"^loss: expected a function that returns a scalar"):
            plg.estimate_memory(net, x, loss=loss)
    else:
        plg.estimate_memory(net, x, loss=loss, optimizer=torch.optim.SGD(net.parameters(), lr=1.0))
    assert tensors == {name: (id(t), t.data_ptr(), t._version) for name, t in net.state_dict(keep_vars=True).items()}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is grads[name] for name, parameter in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[2] == drawn
    assert not any(module.training for module in net.modules())
    assert list(net.blocks[0]._forward_hooks) == [hook.id]
    assert called == ["Tensor", "FakeTensor"]  # hooks are part of the step
    again = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    net(x).sum().backward()
    assert all(torch.equal(parameter.grad, again[name]) for name, parameter in net.named_parameters())


def test_shared_storages_count_once() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    tied["b"].weight = tied["a"].weight
    tied.forward = lambda x: tied["b"](tied["a"](x))
    tied["a"].register_buffer("view", tied["a"].weight.detach()[:7])
    assert plg.estimate_memory(tied, (2, 64)).weights == 64 * 64 * 4


def test_tensors_that_are_no_parameters_count() -> None:
    net = nn.Linear(8, 8, bias=False)
    net.tables, net.forward = [torch.ones(8, 8)], lambda x: x @ net.tables[0]
    assert plg.estimate_memory(net, (2, 8)).weights == 2 * 8 * 8 * 4


def test_modes_are_those_of_training_and_of_no_region_of_the_caller() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1)).eval()
    wanted = plg.estimate_memory(net, (4, 8))
    assert wanted.activations == 2 * (4 * 64 * 4) + 4  # the mask, what it leaves, the loss
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert plg.estimate_memory(net, (4, 8)) == wanted
    with torch.inference_mode():
        assert plg.estimate_memory(net, (4, 8)) == wanted


def test_instances_of_optimizers_count_with_their_settings() -> None:
    net = nn.Linear(64, 64, bias=False)
    size = net.weight.nbytes
    plain, momenta = torch.optim.SGD(net.parameters()), momentum(net.parameters())
    adam = torch.optim.AdamW(net.parameters(), amsgrad=True)
    found = [plg.estimate_memory(net, (2, 64), optimizer=each).optimizer for each in (None, plain, momenta, adam)]
    assert found == [0, 0, size, 3 * size + 4]
    assert not adam.state
    net.weight.requires_grad_(False)
    assert plg.estimate_memory(net, (2, 64)).optimizer == 0


def test_rounding_and_workspaces_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [rounded(size, gpu) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert rounded(513, cpu) == 513
    assert blas_workspaces(cpu) == 0
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for capability, each in (((9, 0), 32 * MIB), ((8, 0), 8 * MIB + MIB // 8)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert blas_workspaces(gpu) == 2 * each
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8:4096:2")
    assert blas_workspaces(gpu) == 2 * (16 * 8 + 4096 * 2) * 1024
    found = account([], Times(0, 0, 0), gpu, 5)
    assert (found.device, found.peak, found.workspace, found.at_peak["workspace"]) == ("cuda:0", 5, 5, 5)


def test_a_ledger_follows_storages_to_their_end() -> None:
    with Ledger() as ledger:
        kept = torch.empty(10)
        view = kept[2:].view(2, 4)
        gone = kept + 1
        del gone
    assert [added for _, added in ledger.events] == [40, 40, -40]
    del view
    assert len(ledger.blocks) == 1
    del kept
    assert not ledger.blocks


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")])
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable(size) == text


class Reads(nn.Linear):
    """A model whose step depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.sum() > 0 else 1)


class Locked(nn.Linear):
    """A model that cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("it holds a lock")


def refused() -> dict[str, tuple[Any, dict[str, Any], type[Exception], str]]:
    """What is refused: model, options, error, message."""
    argument, net = plg.errors.ArgumentError, nn.Linear(4, 4)
    other = torch.optim.SGD(nn.Linear(4, 4).parameters())
    subclass = nn.Linear(4, 4)
    seeded = nn.Linear(4, 4)
    seeded.generator = torch.Generator()
    subclass.weight = nn.Parameter(torch.ones(4, 4).as_subclass(type("Sharded", (Tensor,), {})))
    return {
        "module": (3, {}, argument, r"^model: expected a module, got int$"),
        "lazy": (
            nn.LazyLinear(4),
            {},
            argument,
            r"^model: expected parameters with shapes, got weight, which has none",
        ),
        "copy": (
            Locked(4, 4),
            {},
            argument,
            r"^model: expected one that can be copied, got Locked \(it holds a lock\)",
        ),
        "generator": (seeded, {}, argument, r"^model: expected one that can be copied, got Linear"),
        "compiled": (
            torch.compile(net, backend="eager"),
            {},
            argument,
            r"^model: expected one that is not compiled, got a compiled one",
        ),
        "values": (Reads(4, 4), {}, argument, r"^model: expected a step that does not depend on values of tensors"),
        "name": (net, {"optimizer": "adam"}, argument, r"^optimizer: expected one of 'adamw', 'sgd', got 'adam'$"),
        "optimizer": (net, {"optimizer": 3}, argument, r"^optimizer: expected a name, a class or an instance, got 3$"),
        "made": (net, {"optimizer": list}, argument, r"^optimizer: expected one of torch.optim, got list$"),
        "others": (net, {"optimizer": other}, argument, r"^optimizer: expected one of the model's parameters, got one"),
        "loss": (net, {"loss": len}, argument, r"^loss: expected a function that returns a scalar, got one of int"),
        "none": (
            nn.Identity(),
            {"batch": {"input": None}},
            argument,
            r"^loss: expected one for a model that returns no",
        ),
        "autocast": (net, {"autocast": torch.float32}, argument, r"^autocast: expected bfloat16, float16 or None, got"),
        "subclass": (subclass, {}, plg.errors.DTypeError, r"^weight: expected a plain torch.Tensor, got the subclass"),
        "device": (net, {"device": "nowhere"}, plg.errors.DeviceError, r"^device: expected a device like 'cpu'"),
        "absent": (
            net,
            {"device": "xla"},
            plg.errors.DeviceError,
            r"^device: expected the CPU or a CUDA device of this",
        ),
    }


@pytest.mark.parametrize("case", refused())
def test_refusals_name_the_argument(case: str) -> None:
    model, options, error, message = refused()[case]
    with pytest.raises(error, match=message):
        plg.estimate_memory(model, **{"batch": (2, 4), **options})
