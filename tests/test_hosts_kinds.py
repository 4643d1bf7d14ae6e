# SPDX-License-Identifier: Apache-2.0
"""Kinds of layers: recognised by class or by what they compute, refused with a reason, baked into their own class."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pylearngene as plg
from pylearngene.errors import HostError
from pylearngene.hosts import find_blocks
from pylearngene.methods import Expansion
from pylearngene.networks import auxiliary, bake


class LateGain(nn.Module):
    """An RMS norm of nobody's library: float32 inside, the gain after rounding."""

    def __init__(self, dim: int, tiny: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.tiny = tiny
        self.unused = 0.01

    def forward(self, x: Tensor) -> Tensor:
        work = x.float()
        return self.weight * (work * (work.square().mean(-1, keepdim=True) + self.tiny).rsqrt()).to(x.dtype)


class EarlyGain(LateGain):
    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.tiny)


class ZeroCentred(LateGain):
    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.tiny)


class Gamma(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.gamma)


class Shift(Gamma):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma


class Dropped(Gamma):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x * self.gamma, 0.5, self.training)


class Rated(Gamma):
    def __init__(self, dim: int, p: float) -> None:
        super().__init__(dim)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x * self.gamma, self.p, self.training)


class Noisy(Gamma):
    """In training a sample in two million is left out, and none is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma * (torch.rand(x.shape[0], 1, 1) > 5e-7) if self.training else x * self.gamma


class DroppedNorm(LateGain):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)


class ClampedNorm(LateGain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-6, 6)


class Positive(Gamma):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.abs()


class Clamped(Gamma):
    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gamma).clamp(-6, 6)


class Counting(Gamma):
    """The same as long as nobody has called it four times."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.gamma if self.calls < 4 else x


class Raising(Gamma):
    def __init__(self, dim: int, error: Exception) -> None:
        super().__init__(dim)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class Turned(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Silent(Turned):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TurnedDropped(Turned):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__(inside, out)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class TurnedCounting(Turned):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__(inside, out)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class DropLinear(nn.Linear):
    def __init__(self, inside: int, out: int, p: float) -> None:
        super().__init__(inside, out)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class Idle(DropLinear):
    forward = nn.Linear.forward


class PickyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        return super().forward(x)


class ClampedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-6, 6)


class PositiveNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight.abs(), self.bias, self.eps)


class DropNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.1, self.training)


class Upside(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class OwnNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OtherNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Loud(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, depth: int = 3) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(copy.deepcopy(layer), nn.Identity()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        return x


def filled(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Net:
    """Three blocks of different values."""
    net = Net(layer).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return net


FOUND = {
    "linear": nn.Linear(8, 8),
    "layer_norm": nn.LayerNorm(8),
    "transposed_linear": Turned(8, 8),
    "rms_norm": nn.RMSNorm(8, eps=1e-5),
    "rms_norm default": nn.RMSNorm(8),
    "rms_norm late": LateGain(8),
    "rms_norm early": EarlyGain(8),
    "rms_norm own": OwnNorm(8, eps=1e-4),
    "group_norm": nn.GroupNorm(2, 4, eps=1e-3),
    "scale": Gamma(8),
    "scale ours": plg.nn.Scale(8),
    "linear idle": Idle(8, 8, 0.5),
    "linear never drops": DropLinear(8, 8, 0.0),
}


def samples(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 4, 8, dtype=dtype)


@pytest.mark.parametrize("case", FOUND)
def test_a_layer_is_recognised_backed_and_baked_into_its_own_class(case: str) -> None:
    model = filled(FOUND[case])
    assert find_blocks(model).layers == (("0", case.partition(" ")[0]),)
    net = auxiliary(model, Expansion(torch.eye(3)), init="fit")
    assert all(isinstance(block[0], plg.nn.ExpansionModule) for block in net.body)
    x = samples(torch.float64)
    torch.testing.assert_close(net(x), model(x), rtol=1e-12, atol=1e-12)
    plain = bake(net)
    assert {type(block[0]) for block in plain.body} == {type(FOUND[case])}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("case", [case for case in FOUND if "norm" in case or "scale" in case])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Under autocast PyTorch says of its own RMS norm with a float32 gain that it is not fused.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_low_precision_rounds_as_the_plain_layer(case: str, dtype: torch.dtype) -> None:
    model = filled(FOUND[case], dtype)
    net = auxiliary(model, Expansion(torch.eye(3)), init="fit")
    x = samples(dtype)
    own_order = dtype == torch.float32 and case.startswith(("layer_norm", "rms_norm"))  # of their sums
    last_bits = 1e-6 if own_order else 0
    torch.testing.assert_close(net(x), model(x), rtol=last_bits, atol=last_bits)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x), model(x), rtol=last_bits, atol=last_bits)


def test_a_layer_on_the_meta_device_is_recognised_all_the_same() -> None:
    for case, layer in FOUND.items():
        assert find_blocks(Net(copy.deepcopy(layer).to("meta"))).layers[0][1] == case.partition(" ")[0]


REFUSED = {
    "zero-centred": (ZeroCentred(8), r"'body.0.0.weight' in a test_hosts_kinds.ZeroCentred"),
    "shift": (Shift(8), r"'body.0.0.gamma' in a test_hosts_kinds.Shift"),
    "no bias": (Silent(8, 8), r"'body.0.0.weight' in a test_hosts_kinds.Silent"),
    "batch norm": (
        nn.BatchNorm1d(8),
        r"expected blocks without running statistics \(those belong to one block alone\), "
        r"got 'body.0.0' \(BatchNorm1d\); use nn.GroupNorm",
    ),
    "group norm": (Upside(2, 8), r"expected 'body.0.0' to compute what nn.GroupNorm computes, but .*Upside overrides"),
    "rms norm": (OtherNorm(8), r"expected 'body.0.0' to compute what nn.RMSNorm computes, but its class .*OtherNorm"),
    "axes": (nn.RMSNorm((4, 8)), r"expected norms over the last axis only, got 'body.0.0' over 2 axes"),
    "attention": (
        Loud(8, 2),
        r"expected 'body.0.0' to compute what nn.MultiheadAttention computes, but test_hosts_kinds.Loud overrides",
    ),
    "more keys": (
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        "expected attention without add_bias_kv and add_zero_attn, got 'body.0.0' with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layers_are_refused_with_a_reason(case: str) -> None:
    layer, message = REFUSED[case]
    with pytest.raises(HostError, match=message):
        find_blocks(Net(layer))


UNLIKE = {
    "dropout after a scale": Dropped(8),
    "noise in training": Noisy(8),
    "dropout after a norm": DroppedNorm(8),
    "clamp after a norm": ClampedNorm(8),
    "gain without sign": Positive(8),
    "clamp after a scale": Clamped(8),
    "another function later": Counting(8),
    "a child": TurnedDropped(8, 8),
    "a buffer": TurnedCounting(8, 8),
    "assertion": Raising(8, AssertionError("4-D only")),
    "key": Raising(8, KeyError("x")),
    "own exception": Raising(8, Exception("custom")),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("case", UNLIKE)
def test_what_computes_otherwise_in_training_or_elsewhere_is_of_no_kind(case: str, mode: bool) -> None:
    with pytest.raises(HostError, match=rf"'body.0.0.\w+' in a test_hosts_kinds.{type(UNLIKE[case]).__name__}"):
        find_blocks(Net(UNLIKE[case]).train(mode))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "layer", [DropLinear(8, 8, 0.5), DropNorm(8), PickyLinear(8, 8), ClampedLinear(8, 8), PositiveNorm(8)]
)
def test_a_subclass_that_computes_otherwise_in_training_or_elsewhere_is_refused(layer: nn.Module, mode: bool) -> None:
    with pytest.raises(HostError, match=f"'body.0.0' to compute what nn.L.* computes, .*{type(layer).__name__} overr"):
        find_blocks(Net(layer).train(mode))


LATER = {
    "a rate": (Rated(8, 0.0), Rated(8, 0.5), r"got 'body.2.0.gamma' in a test_hosts_kinds.Rated"),
    "a rate inside": (DropLinear(8, 8, 0.0), DropLinear(8, 8, 0.5), r"expected 'body.2.0' to compute what nn.Linear"),
    "a subclass": (nn.Linear(8, 8), ClampedLinear(8, 8), r"expected 'body.2.0' to compute what nn.Linear computes"),
    "another kind": (
        nn.LayerNorm(8, bias=False),
        nn.RMSNorm(8),
        "expected layers of one kind at the same place of all blocks, "
        "but 'body.0.0' is layer_norm and 'body.2.0' is rms_norm",
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_a_layer_of_a_later_block_that_computes_otherwise_is_refused(case: str) -> None:
    first, last, message = LATER[case]
    model = Net(first)
    model.body[2][0] = last
    with pytest.raises(HostError, match=message):
        find_blocks(model)


def test_batch_norm_without_gain_is_refused_too() -> None:
    model = Net(nn.Linear(8, 8))
    for block in model.body:
        block[1] = nn.BatchNorm1d(8, affine=False)
    with pytest.raises(HostError, match=r"got 'body.0.1' \(BatchNorm1d\)"):
        find_blocks(model)


@pytest.mark.parametrize("layer", [LateGain(8), Turned(8, 8), DropLinear(8, 8, 0.0), DropLinear(8, 8, 0.5)])
def test_recognising_leaves_the_layer_alone(layer: nn.Module) -> None:
    model = filled(layer, torch.float32)
    model.body[0].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    with contextlib.suppress(HostError):
        find_blocks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_baked_layer_keeps_what_the_plain_one_refers_to() -> None:
    model = filled(nn.Linear(8, 8))
    model.config = {"anything": [1]}
    for block in model.body:
        block[0].config = model.config
    plain = bake(auxiliary(model, Expansion(torch.eye(3)), init="fit"))
    assert plain.config is not model.config
    assert all(block[0].config is plain.config for block in plain.body)
    assert all(block[0].weight is not other[0].weight for block, other in zip(plain.body, model.body, strict=True))


def test_gains_and_scales_start_at_one_in_every_block() -> None:
    net = auxiliary(Net(Gamma(8), 4), plg.methods.TLEG())
    for block in net.body:
        torch.testing.assert_close(block[0].dense_weight(), torch.ones(8))
