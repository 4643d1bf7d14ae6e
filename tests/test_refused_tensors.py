# SPDX-License-Identifier: Apache-2.0
"""Tensors whose memory must not be read as it seems to lie there are refused by name before anything runs.

Those are tensor subclasses, of which DTensor is one, empty storages, and storages smaller than their view. Outputs, on
the other hand, may be written in place like those of plain layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import pylearngene as plg
from pylearngene.errors import DeviceError, DTypeError, PylearngeneError, ShapeError


class Tagged(torch.Tensor):
    """A made-up subclass."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of this process alone, which DTensors need."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(tensor: Tensor) -> Tensor:
    return distribute_tensor(tensor.detach(), init_device_mesh("cpu", (1,)))


def resized(tensor: Tensor, share: float) -> Tensor:
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(int(tensor.untyped_storage().nbytes() * share))
    return tensor


SUBCLASS = (DTypeError, "expected a plain torch.Tensor, got the subclass {}")
STORAGE = (DeviceError, "expected a storage of at least {} bytes, got {}")
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[type[PylearngeneError], str]]] = {
    "DTensor": (distributed, SUBCLASS),
    "Tagged": (lambda tensor: tensor.detach().as_subclass(Tagged), SUBCLASS),
    "empty": (lambda tensor: resized(tensor, 0), STORAGE),
    "short": (lambda tensor: resized(tensor, 0.5), STORAGE),
}


def said(act: Callable[[], Any]) -> str:
    """What the library says; as text, for pytest would read the tensors to show them."""
    try:
        act()
    except PylearngeneError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"not ours: {type(error).__name__}"
    return "nothing"


def refused(kind: str, name: str, act: Callable[[], Any], need: int) -> None:
    """Check that `act` says what is wrong with the argument, of `need` bytes."""
    error, text = KINDS[kind][1]
    got = text.format(kind) if error is DTypeError else text.format(need, 0 if kind == "empty" else need // 2)
    answer = said(act)
    assert re.match(rf"{error.__name__}: {name}(\[\d\])?: {got}", answer), answer


def arguments(function: str) -> dict[str, Any]:
    image = function == "expansion_conv2d"
    shape = (3, 2, 3, 3) if image else (3, 4)
    found: dict[str, Any] = {
        "x": torch.randn(*((2, 2, 5, 5) if image else (2, 4))),
        "genes": [torch.randn(shape) for _ in range(2)],
        "coeffs": torch.tensor([1.0, 0.5]),
    }
    if function == "expansion_weight":
        del found["x"]
    elif function == "low_rank_linear":
        found = {"x": found["x"], "u": torch.randn(3, 2), "s": torch.ones(2), "v": torch.randn(4, 2)}
        found |= {"gate": torch.ones(2), "bias": torch.randn(3)}
    else:
        found["bias"] = torch.randn(3)
    return found


FUNCTIONS = ("expansion_linear", "expansion_conv2d", "expansion_weight", "low_rank_linear")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: str, grad: bool, kind: str) -> None:
    """Each argument in turn; genes also as a stack, bias also as genes."""
    run = getattr(plg.functional, function)
    for name in arguments(function):
        given = arguments(function)
        if grad:
            next(value for value in given.values() if isinstance(value, Tensor)).requires_grad_()
        value = given[name]
        if isinstance(value, list):
            bad = value[1] = KINDS[kind][0](value[1])
        else:
            bad = given[name] = KINDS[kind][0](value)
        refused(kind, name, lambda given=given: run(**given), bad.nbytes)
    if function == "expansion_linear":
        given = {**arguments(function), "bias": [torch.randn(3), KINDS[kind][0](torch.randn(3))]}
        refused(kind, "bias", lambda: run(**given), given["bias"][1].nbytes)
        given = arguments(function)
        given["genes"] = KINDS[kind][0](torch.stack(given["genes"]))
        error, _ = KINDS[kind][1]
        answer = said(lambda: run(**given))
        assert re.match(rf"{error.__name__}: genes(\[\d\])?: expected", answer), answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS[:3])
def test_upstream_gradients_of_functions(function: str, kind: str) -> None:
    given = arguments(function)
    for value in given.values():
        for tensor in value if isinstance(value, list) else [value]:
            tensor.requires_grad_()
    y = getattr(plg.functional, function)(**given)
    dy = KINDS[kind][0](torch.randn_like(y))
    refused(kind, "d[yw]", lambda: y.backward(dy), dy.nbytes)


def layers(bank: plg.nn.GeneBank) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Layers, and the shapes of their inputs."""
    expanded: dict[str, Any] = {"bank": bank, "coeffs": [1.0, 0.5]}
    padding: dict[str, Any] = {"padding": 1, "padding_mode": "reflect"}
    return {
        "linear": (plg.nn.ExpansionLinear(4, 3, name="linear", **expanded), (2, 4)),
        "layer norm": (plg.nn.ExpansionLayerNorm(4, name="layer_norm", **expanded), (2, 4)),
        "rms norm": (plg.nn.ExpansionRMSNorm(4, name="rms_norm", **expanded), (2, 4)),
        "group norm": (plg.nn.ExpansionGroupNorm(2, 4, name="group_norm", **expanded), (2, 4, 3)),
        "scale": (plg.nn.ExpansionScale(4, name="scale", **expanded), (2, 4)),
        "convolution": (plg.nn.ExpansionConv2d(2, 3, 3, name="conv", **expanded), (2, 2, 5, 5)),
        "padded": (plg.nn.ExpansionConv2d(2, 3, 3, name="padded", **padding, **expanded), (2, 2, 5, 5)),
        "low rank": (plg.nn.LowRankLinear(4, 3, rank=2, bank=bank, name="low_rank"), (2, 4)),
    }


LAYERS = tuple(layers(plg.nn.GeneBank()))
PRODUCTS = ("linear", "convolution", "padded")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_inputs_and_tensors_of_layers(layer: str, kind: str, grad: bool) -> None:
    def made() -> tuple[plg.nn.GeneBank, nn.Module, Tensor]:
        bank = plg.nn.GeneBank()
        module, shape = layers(bank)[layer]
        return bank, module, torch.randn(shape)

    bank, module, x = made()
    x = KINDS[kind][0](x)
    with torch.set_grad_enabled(grad):
        refused(kind, "x", lambda: module(x), x.nbytes)
        for number in range(len(bank.group(module.name).tensors())):
            bank, module, x = made()
            name, gene = list(bank.group(module.name).named_genes())[number]
            owner, _, key = name.rpartition(".")
            bad = KINDS[kind][0](gene)
            bank.group(module.name).get_submodule(owner)._parameters[key] = bad
            refused(kind, "(genes|bias|u|v)", lambda module=module, x=x: module(x), bad.nbytes)
        if layer != "low rank":
            _, module, x = made()
            bad = module._buffers["coeffs"] = KINDS[kind][0](module.coeffs)
            refused(kind, "coeffs", lambda: module(x), bad.nbytes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", PRODUCTS)
def test_upstream_gradients_of_layers(layer: str, kind: str) -> None:
    bank = plg.nn.GeneBank()
    module, shape = layers(bank)[layer]
    y = module(torch.randn(shape))
    dy = KINDS[kind][0](torch.randn_like(y))
    refused(kind, "dy", lambda: y.backward(dy), dy.nbytes)
    assert all(gene.grad is None for gene in bank.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_attention(kind: str) -> None:
    bank = plg.nn.GeneBank()
    attention = plg.nn.ExpansionMultiheadAttention(4, 2, bank=bank, name="attn", coeffs=[1.0, 0.5], batch_first=True)
    for place, name in enumerate(("query", "key", "value")):
        given = [torch.randn(2, 3, 4) for _ in range(3)]
        given[place] = KINDS[kind][0](given[place])
        refused(kind, f"({name}|x)", lambda given=given: attention(*given), given[place].nbytes)


@pytest.mark.parametrize("layer", [name for name in LAYERS if name not in ("low rank",)])
def test_outputs_may_be_written_in_place(layer: str) -> None:
    """As by `nn.ReLU(inplace=True)` after the layer."""
    bank = plg.nn.GeneBank()
    module, shape = layers(bank)[layer]
    for x in (torch.randn(shape), torch.randn(*shape, requires_grad=True)):
        plain = torch.relu(module(x)).square().sum()
        plain.backward()
        expected = [gene.grad.clone() for gene in module.bank.group(module.name).tensors()]
        bank.zero_grad()
        written = torch.relu_(module(x)).square().sum()
        written.backward()
        torch.testing.assert_close([gene.grad for gene in module.bank.group(module.name).tensors()], expected)
        bank.zero_grad()


@pytest.mark.parametrize("tokens", [2, 40])
def test_what_changes_before_the_backward_pass_is_refused_by_name(tokens: int) -> None:
    genes, coeffs = [torch.randn(7, 9, requires_grad=True) for _ in range(2)], torch.ones(2)
    x = torch.ones(tokens, 9, requires_grad=True)
    for wrong, error, text in (
        (torch.ones(1, 9), ShapeError, r"x: expected shape \[\d+, 9\] \(tokens of dy\), got \[1, 9\]"),
        (torch.ones(tokens, 1), ShapeError, r"x: expected shape \[\*, I\] with I = 9, got"),
        (torch.ones(tokens, 9).bfloat16(), DTypeError, r"x: expected float32 \(that of dy\), got bfloat16"),
    ):
        pack = lambda t, wrong=wrong: wrong if t.shape == x.shape else t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = plg.functional.expansion_linear(x, genes, coeffs)
        with pytest.raises(error, match=text):
            (y * y.detach()).sum().backward()


@pytest.mark.parametrize("tokens", [2, 5000])
@pytest.mark.parametrize("learn", [False, True])
def test_bias_genes_that_change_before_the_backward_pass_are_refused_by_name(tokens: int, learn: bool) -> None:
    genes, coeffs = [torch.randn(64, 9, requires_grad=True) for _ in range(2)], torch.ones(2, requires_grad=learn)
    for wrong, error, text in (
        (torch.ones(8), ShapeError, r"bias: expected shape \[O\] = \[64\], got \[8\]"),
        (torch.ones(64).double(), DTypeError, "bias: expected float32, got float64"),
    ):
        biases = [torch.randn(64, requires_grad=True) for _ in range(2)]
        y = plg.functional.expansion_linear(torch.ones(tokens, 9), genes, coeffs, biases)
        for bias in biases:
            bias.data = wrong.clone()
        with pytest.raises(error, match=text):
            y.sum().backward()


def test_operators_refuse_what_does_not_fit_before_they_take_an_address() -> None:
    x, genes, coeffs = torch.ones(2, 9), [torch.randn(7, 9) for _ in range(2)], torch.ones(2)
    biases = [torch.ones(7) for _ in range(2)]
    operators, dy = torch.ops.pylearngene, torch.ones(2, 7)

    def add(buffer: Tensor, dy: Tensor = dy) -> None:
        operators.expansion_linear_wgrad_.default([buffer], [], dy, x, genes, [], coeffs, [0], [], False)

    def add_bias(buffer: Tensor) -> None:
        operators.expansion_linear_wgrad_.default([], [buffer], dy, x, genes, biases, coeffs, [], [0], False)

    def product(x: Tensor, bias: Tensor | None = None, bias_genes: Any = ()) -> None:
        operators.expansion_linear.default(x, genes, coeffs, bias, bias_genes, None)

    short = [bias[:1] for bias in biases]
    for act, error, text in (
        (lambda: product(x[:, :2]), ShapeError, r"x: expected shape \[\*, I\]"),
        (lambda: product(x.double()), DTypeError, "x: expected float32, got float64"),
        (lambda: product(x, biases[0][:1]), ShapeError, r"bias: expected shape \[O\] = \[7\]"),
        (lambda: product(x, None, short), ShapeError, r"bias: expected shape \[O\] = \[7\]"),
        (lambda: operators.expansion_linear_dx.default(x[:, :2], genes, coeffs), ShapeError, r"dy: expected shape"),
        (lambda: add(torch.zeros(7, 9), dy[:, :2]), ShapeError, r"dy: expected shape"),
        (lambda: add(torch.zeros(2, 9)), ShapeError, r"buffers: expected shape that of the genes = \[7, 9\]"),
        (lambda: add(torch.zeros(7, 9).bfloat16()), DTypeError, "buffers: expected float32, got bfloat16"),
        (lambda: add_bias(torch.zeros(2)), ShapeError, r"bias_buffers: expected shape that of the genes = \[7\]"),
        (lambda: add_bias(torch.zeros(7).half()), DTypeError, "bias_buffers: expected float32, got float16"),
    ):
        with pytest.raises(error, match=text):
            act()
