# SPDX-License-Identifier: Apache-2.0
"""The contract on layers that share genes: equal to the dense layer, one gradient per gene, copies, state, refusals.

The oracle is the same network of dense weights, made from the Parameters of the bank by plain autograd in float64.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from contract_base import DTYPES, Base, Given, Place, Primitive, Sizes, close, leaves, mapped, tracked
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pylearngene import _backends
from pylearngene.errors import DeviceError, DTypeError, PylearngeneError, ShapeError
from pylearngene.nn import GeneBank

WIDTH = 6


class Net(nn.Module):
    """L layers of a primitive that share genes, of odd shapes in between."""

    def __init__(
        self, primitive: Primitive, depth: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> None:
        super().__init__()
        bank = GeneBank()
        self.primitive, self.recompute = primitive, False
        self.layers = nn.ModuleList(
            primitive.layer(bank, WIDTH, WIDTH, level, dtype=dtype, device=device) for level in range(depth)
        )
        bank.attach(self)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = x + torch.tanh(y)
        return x

    def dense(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            factors = mapped(self.primitive.factors(layer), lambda name, tensor, to=x.dtype: tensor.to(to))
            x = x + torch.tanh(F.linear(x, *self.primitive.dense(**factors)))
        return x


def inputs(tokens: int = 3, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x, dy = (torch.randn(tokens, WIDTH, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return x, dy


def grads(net: Net, call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    net.zero_grad()
    call(x).backward(dy)
    return [parameter.grad.clone() for parameter in net.parameters()]


class Layers(Base):
    def net(self, **options: object) -> Net:
        return Net(self.primitive, **options)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layer_is_the_dense_layer(self, place: Place, dtype: torch.dtype) -> None:
        self.skip_truncation(place, dtype)
        layer = self.net(dtype=dtype, device=place.device).layers[1]
        x, _ = inputs(dtype=dtype, device=place.device)
        plain = layer.to_dense()
        assert type(plain) is nn.Linear
        assert torch.equal(layer.dense_weight(), plain.weight)
        assert plain.weight.dtype == dtype
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        close(layer(x), plain(x), tolerance)
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (plain.weight.shape, dtype, x.device)
        assert (layer.in_features, layer.out_features) == (WIDTH, WIDTH)
        assert "WeightView" not in repr(layer)

    def test_shared_genes_get_one_gradient_summed_over_layers(self, place: Place) -> None:
        net, (x, dy) = self.net(device=place.device), inputs(device=place.device)
        wanted = grads(net, net.dense, x, dy)
        hooked: list[int] = []
        for index, parameter in enumerate(net.parameters()):
            parameter.register_hook(lambda grad, index=index: hooked.append(index))
        for mine, theirs in zip(grads(net, net, x, dy), wanted, strict=True):
            close(mine, theirs, 1e-10)
        assert sorted(hooked) == list(range(len(list(net.parameters()))))

    def test_genes_are_the_banks_and_once_in_the_state(self) -> None:
        net = self.net()
        genes = dict(net.gene_bank.named_genes())
        own = [parameter for layer in net.layers for parameter in layer.parameters()]
        assert not {id(parameter) for parameter in own} & {id(gene) for gene in genes.values()}
        assert len(net.state_dict()) == len(list(net.parameters())) == len(genes) + len(own)
        deeper = self.net(depth=9)
        assert len(dict(deeper.gene_bank.named_genes())) == len(genes)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict", "assign from meta", "to_empty", "dtypes"])
    def test_sharing_survives(self, way: str) -> None:
        net, (x, dy) = self.net(), inputs()
        grads(net, net, x, dy)  # taps exist while copying
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}

        def on_meta() -> Net:
            with torch.device("meta"):
                return self.net()

        def loaded(other: Net, assign: bool = False) -> Net:
            other.load_state_dict(state, assign=assign)
            return other

        other = {
            "deepcopy": lambda: copy.deepcopy(net),
            "pickle": lambda: pickle.loads(pickle.dumps(net)),
            "state dict": lambda: loaded(self.net()),
            "assign from meta": lambda: loaded(on_meta(), assign=True),
            "to_empty": lambda: loaded(on_meta().to_empty(device="cpu")),
            "dtypes": lambda: copy.deepcopy(net).to(torch.float32).double(),
        }[way]()
        tolerance = 1e-5 if way == "dtypes" else 0.0
        torch.testing.assert_close(other(x), net(x), rtol=tolerance, atol=tolerance)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}
        for mine, theirs in zip(grads(other, other, x, dy), grads(other, other.dense, x, dy), strict=True):
            close(mine, theirs, 1e-10)

    def test_training_and_resuming_is_bit_exact(self, device: str) -> None:
        def steps(net: Net, optimizer: torch.optim.Optimizer, count: int) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                net(x).sub(dy).pow(2).mean().backward()
                optimizer.step()

        x, dy = inputs(dtype=torch.float32, device=device)
        net = self.net(dtype=torch.float32, device=device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        steps(net, optimizer, 3)
        assert len(optimizer.state) == len(list(net.parameters()))
        other = self.net(dtype=torch.float32, device=device)
        other.load_state_dict(net.state_dict())
        resumed = torch.optim.AdamW(other.parameters(), lr=0.01)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(net, optimizer, 3)
        steps(other, resumed, 3)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))

    def test_master_genes_under_autocast(self, device: str) -> None:
        """float32 gradients arrive at float32 genes, whether layers read copies or the masters."""
        for policy in ("auto", "param"):
            net = self.net(dtype=torch.float32, device=device)
            x, dy = inputs(33, torch.float32, device)
            net.gene_bank.compute_dtype = policy
            with torch.autocast(device, dtype=torch.bfloat16):
                y = net(x)
            y.backward(dy.to(y.dtype))
            got = [parameter.grad.clone() for parameter in net.parameters()]
            wide = copy.deepcopy(net).double()
            for mine, theirs in zip(got, grads(wide, wide.dense, x.double(), dy.double()), strict=True):
                assert mine.dtype == torch.float32
                close(mine, theirs, 6e-2)


class _Subclass(Tensor):
    """A tensor subclass without a meaning."""


class _Products(TorchDispatchMode):
    """Refuses matrix products, so that whoever computes before checking is seen."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "einsum")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func._opname not in self.NAMES, f"{func} ran before the refusal"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a kernel is asked for or a product formed."""

    def launched(*_: object) -> None:
        raise AssertionError("a kernel was asked for before the refusal")

    with monkeypatch.context() as patch, _Products():
        patch.setattr(_backends, "native", launched)
        patch.setattr(_backends, "triton_for", launched)
        yield


def freed(tensor: Tensor) -> Tensor:
    """A view whose storage is gone."""
    whole = tensor.detach().clone()
    whole.untyped_storage().resize_(0)
    return whole


def cut_short(tensor: Tensor) -> Tensor:
    """A view that reaches past its storage."""
    whole = tensor.detach().clone()
    whole.untyped_storage().resize_(whole.nbytes - whole.element_size())
    return whole


SPOILED: dict[str, tuple[Callable[[Tensor], object], tuple[type[PylearngeneError], ...]]] = {
    "no tensor": (lambda t: "seven", (DTypeError,)),
    "integers": (lambda t: t.long(), (DTypeError,)),
    "one too many": (lambda t: torch.cat([t, t[..., :1]], -1), (ShapeError,)),
    "a scalar": (lambda t: t.sum(), (ShapeError,)),
    "elsewhere": (lambda t: t.to("meta"), (DeviceError,)),
    "a subclass": (lambda t: t.as_subclass(_Subclass), (DTypeError,)),
    "sparse": (lambda t: t.to_sparse(), (DTypeError,)),
    "freed": (freed, (DeviceError,)),
    "cut short": (cut_short, (DeviceError,)),
}


class Refusals(Base):
    @pytest.mark.parametrize("kind", SPOILED)
    def test_bad_arguments_are_refused_by_name_before_any_launch(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil, errors = SPOILED[kind]
        given = self.primitive.make(Sizes(3, 5, 4), torch.float32)
        for train in (False, True):
            for name, value in given.items():
                arguments: Given = {**given, "x": given["x"].clone().requires_grad_(train)}
                if isinstance(value, list):
                    arguments[name] = [*value[:-1], spoil(value[-1])]
                else:
                    arguments[name] = spoil(value)
                with nothing_launches(monkeypatch), pytest.raises(errors, match=rf"^{name}\b.*expected"):
                    self.primitive.linear(arguments)

    @pytest.mark.parametrize("kind", SPOILED)
    def test_layers_refuse_a_bad_x(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil, errors = SPOILED[kind]
        layer = Net(self.primitive, dtype=torch.float32).layers[0]
        x = spoil(torch.randn(3, WIDTH))
        for train in (False, True):
            with (
                nothing_launches(monkeypatch),
                torch.set_grad_enabled(train),
                pytest.raises(errors, match=r"^x\b.*expected"),
            ):
                layer(x)

    def test_upstream_gradients_that_lie_nowhere_are_refused(self, device: str) -> None:
        if not self.primitive.forms_weight:
            pytest.skip("torch's own products take the upstream gradient")
        given = tracked(self.primitive.make(Sizes(3, 5, 4), torch.float32, device))
        for spoil in (freed, cut_short):
            y = self.primitive.linear(given)
            with pytest.raises(DeviceError, match="dy: expected a storage"):
                torch.autograd.grad(y, leaves(given), spoil(torch.ones_like(y)))
