# SPDX-License-Identifier: Apache-2.0
"""`ExpansionConv2d`: drop-in for `nn.Conv2d`, shared genes, compiled graphs, autocast, and the memory promise.

Values and gradients of one convolution are in `test_expansion_conv`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene import plan
from pylearngene.nn import ExpansionConv2d, GeneBank
from pylearngene.training.memory import peak_bytes

MIB = 1 << 20
CHANNELS = 6


class Net(nn.Module):
    """L residual convolutions on one pair of genes; `groups` and `learn` as the layers take them."""

    def __init__(self, depth: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__()
        bank = GeneBank()
        self.layers = nn.ModuleList(
            ExpansionConv2d(
                CHANNELS, CHANNELS, 3, padding=1, bank=bank, name="conv", coeffs=[1.0, level / depth], dtype=dtype,
                **options,
            )
            for level in range(depth)
        )  # fmt: skip
        bank.attach(self)
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = x + torch.tanh(y)
        return x


def image(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, CHANNELS, 5, 4, dtype=torch.float64).to(dtype)


def unshared(net: Net, x: Tensor, dy: Tensor, **settings: Any) -> list[Tensor]:
    """Oracle: every layer gets its own copies of the genes, gradients are summed over copies in float64."""
    copies = []
    y = x.double()
    for layer in net.layers:
        own = [p.detach().double().requires_grad_() for p in net.gene_bank.parameters()]
        copies.append(own)
        c = layer.coeffs.detach().double()
        weight, bias = c[0] * own[0] + c[1] * own[1], c[0] * own[2] + c[1] * own[3]
        y = y + torch.tanh(F.conv2d(y, weight, bias, padding=1, **settings))
    y.backward(dy.double())
    return [sum(own[k].grad for own in copies) for k in range(4)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
def test_one_gradient_per_gene_is_the_sum_over_unshared_copies(groups: int, recompute: bool) -> None:
    net = Net(4, groups=groups)
    net.recompute = recompute
    x, dy = image(), image()
    calls: list[int] = []
    for gene in net.parameters():
        gene.register_hook(lambda grad: calls.append(1))
    for _ in range(2):
        net.zero_grad()
        net(x).backward(dy)
        for parameter, expected in zip(net.parameters(), unshared(net, x, dy, groups=groups), strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)
    assert len(calls) == 2 * 4


def settings() -> list[dict[str, Any]]:
    return [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "bias": False},
        {"kernel_size": 2, "padding": "same", "dilation": 3},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "groups": 2},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2},
        {"kernel_size": (3, 1), "padding": (1, 2), "padding_mode": "replicate", "groups": CHANNELS},
        {"kernel_size": 3, "padding": "valid"},
    ]


@pytest.mark.parametrize("index", range(7))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # of the plain layer
def test_layer_is_its_dense_form(index: int) -> None:
    options = settings()[index]
    layer = ExpansionConv2d(
        CHANNELS, 12, **options, dtype=torch.float64, bank=(bank := GeneBank()), name="c", coeffs=[1.0, 0.5]
    )
    plain = layer.to_dense()
    assert type(plain) is nn.Conv2d
    wanted = nn.Conv2d(CHANNELS, 12, **options)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(plain, name) == getattr(wanted, name), name
    x = torch.randn(2, CHANNELS, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), plain(x[0]), rtol=1e-12, atol=1e-12)
    assert layer.weight.shape == layer.dense_weight().shape == wanted.weight.shape == bank.group("c").weight[0].shape
    assert (layer.bias is None) == (plain.bias is None) == (options.get("bias") is False)


def test_representation_is_one_line() -> None:
    layer = ExpansionConv2d(3, 8, 3, bank=GeneBank(), name="stem", coeffs=[1.0, 0.25])
    assert repr(layer) == (
        "ExpansionConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), bias=True, name='stem', coeffs=[1, 0.25])"
    )
    layer = ExpansionConv2d(4, 8, 1, padding="same", groups=2, bias=False, bank=GeneBank(), name="c", coeffs=[1.0])
    assert "stride=(1, 1), padding='same', groups=2, bias=False" in repr(layer)
    assert repr(layer.bank.group("c")) == "ExpansionGroup(1 genes of 8x2x1x1)"


def test_fresh_genes_are_those_of_a_fresh_convolution() -> None:
    bank = GeneBank()
    layer = ExpansionConv2d(16, 32, 5, groups=4, bank=bank, name="c", coeffs=[1.0, 0.5])
    bound = 1 / (16 / 4 * 25) ** 0.5
    for gene in bank.parameters():
        assert 0.8 * bound < gene.abs().max() <= bound
    assert layer.weight.requires_grad


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "meta"])
def test_sharing_survives(way: str) -> None:
    net = Net()
    net(image()).sum().backward()
    if way == "meta":
        with torch.device("meta"):
            other = Net()
        assert other(image().to("meta")).is_meta
        other.load_state_dict(net.state_dict(), assign=True)
    else:
        other = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    x, dy = image(), image()
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    other.zero_grad()
    other(x).backward(dy)
    for parameter, expected in zip(other.parameters(), unshared(net, x, dy), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)


def test_channels_last_model_and_image() -> None:
    net = Net(learn_coeffs=True)
    x, dy = image(), image()
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    assert last.gene_bank.group("conv").weight[0].is_contiguous(memory_format=torch.channels_last)
    y = last(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(dy)
    net(x).backward(dy)
    for a, b in zip(last.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("backend", "recompute"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_fullgraph_gradients_equal_eager(backend: str, recompute: bool) -> None:
    torch._dynamo.reset()
    net = Net(3, torch.float32, learn_coeffs=recompute, groups=1 + recompute)
    net.recompute = recompute
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for batch in (2,) if backend == "inductor" else (2, 3, 5):
        x = image(batch, torch.float32)
        results = []
        for call in (net, compiled):
            net.zero_grad()
            leaf = x.clone().requires_grad_()
            call(leaf).pow(2).sum().backward()
            results.append([leaf.grad, *(p.grad for p in net.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_call_of_the_function_differentiates() -> None:
    torch._dynamo.reset()
    genes = [torch.randn(4, 3, 3, 3, requires_grad=True) for _ in range(2)]
    bias, coeffs = torch.randn(4, requires_grad=True), torch.tensor([1.0, 0.5], requires_grad=True)
    x = torch.randn(2, 3, 6, 5, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return plg.functional.expansion_conv2d(x, genes, coeffs, bias, stride=2, padding=1)

    leaves = [x, coeffs, bias, *genes]
    expected = torch.autograd.grad(call(x).pow(2).sum(), leaves)
    got = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(x).pow(2).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_image_sizes_memory_formats_and_export_do_not_break_the_graph() -> None:
    torch._dynamo.reset()
    net, counter = Net(4, torch.float32), CompileCounter()
    counted = torch.compile(net, backend=counter, fullgraph=True)
    for batch, height, width in ((2, 5, 4), (3, 5, 4), (7, 6, 9), (4, 11, 5)):
        counted(torch.randn(batch, CHANNELS, height, width))
    assert counter.frame_count <= 3  # sizes fixed, any batch, any sizes
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, CHANNELS, 5, 4).contiguous(memory_format=torch.channels_last)
    y = compiled(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, net(x))
    y.sum().backward()
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x))
    torch._dynamo.reset()


def test_autocast_gradients_reach_float32_masters() -> None:
    net = Net(3, torch.float32)
    x = image(4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.layers[0](x)
        net(x).sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter, truth in zip(net.parameters(), unshared(net, x, torch.ones_like(x)), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.double() - truth).norm() <= 0.05 * truth.norm() + 0.02


WIDE = 512
WEIGHT = WIDE * WIDE * 9 * 4  # 9 MiB in float32
# The workspace, the vendor's own copy of a panel, its dW, and images in the vendor's layout.
ALLOWED = 4 * plan.PANEL_BYTES


def materialized(x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, **settings: Any) -> Tensor:
    """The cheat that the bounds must catch: the full weight, by autograd."""
    return F.conv2d(x, sum(c * g for c, g in zip(coeffs, genes, strict=True)), **settings)


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]] = {
    "3x3": ((2, WIDE, 4, 4), (WIDE, WIDE, 3, 3), {"padding": 1}),
    "strided": ((2, WIDE, 6, 6), (WIDE, WIDE, 3, 3), {"stride": 2, "dilation": 2}),
    "1x1": ((2, 1536, 4, 4), (1536, 1536, 1, 1), {}),
    "1x1 of one pixel": ((2, 1536, 1, 1), (1536, 1536, 1, 1), {}),
    "groups": ((2, 2 * WIDE, 4, 4), (2 * WIDE, WIDE // 2, 3, 3), {"groups": 4, "padding": 1}),
    "patches": ((2, 64, 16, 16), (144, 64, 16, 16), {"stride": 16}),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_is_outputs_panels_and_gradients(shape: str, last: bool) -> None:
    size, weight, options = SHAPES[shape]
    excess = {}
    for fn in (plg.functional.expansion_conv2d, materialized):
        x = torch.randn(size)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        genes = [(torch.randn(weight) / 64).requires_grad_() for _ in range(2)]
        coeffs = torch.tensor([1.0, 0.5], requires_grad=True)
        kept: list[Tensor] = []
        forward = peak_bytes(lambda: kept.append(fn(x, genes, coeffs, **options)))  # noqa: B023
        dy = torch.ones_like(kept[0])
        backward = peak_bytes(lambda: kept[0].backward(dy))  # noqa: B023
        gradients = sum(gene.nbytes for gene in genes)
        excess[fn] = (forward - kept[0].nbytes, backward - x.nbytes - gradients)
    assert genes[0].nbytes >= 9 * MIB
    assert max(excess[plg.functional.expansion_conv2d]) <= ALLOWED
    assert min(excess[materialized]) >= 8 * MIB


@pytest.mark.parametrize("gene_format", [torch.contiguous_format, torch.channels_last])
def test_peak_does_not_grow_with_genes_in_any_layout(gene_format: torch.memory_format) -> None:
    """Of genes that are no matrices as they lie, at most a panel is copied at a time."""
    x, coeffs = torch.randn(1, 256, 4, 4), torch.ones(16)
    genes = [torch.randn(256, 256, 3, 3).contiguous(memory_format=gene_format) for _ in range(16)]
    settings = ([1, 1], [1, 1], [1, 1], 1)
    ops = torch.ops.pylearngene
    calls = {
        "y": lambda: ops.expansion_conv2d(x, genes, coeffs, None, [], *settings),
        "dx": lambda: ops.expansion_conv2d_dx(x, x.shape, genes, coeffs, *settings),
        "dc": lambda: ops.expansion_conv2d_wgrad(x, x, genes, [], coeffs, [], [], True, *settings),
    }
    peaks = {name: peak_bytes(call) - x.nbytes for name, call in calls.items()}
    assert max(peaks.values()) <= ALLOWED, peaks


def test_peak_does_not_grow_with_depth_times_weight() -> None:
    def step_peak(depth: int, cheat: bool) -> int:
        bank = GeneBank()
        layers = [
            ExpansionConv2d(128, 128, 3, padding=1, bank=bank, name="c", coeffs=[1.0, level / depth])
            for level in range(depth)
        ]
        x = torch.randn(1, 128, 2, 2)

        def step() -> None:
            y = x
            for layer in layers:
                genes = list(bank.group("c").weight)
                y = torch.tanh(materialized(y, genes, layer.coeffs, padding=1) if cheat else layer(y))
            y.sum().backward()

        return peak_bytes(step)

    weight = 128 * 128 * 9 * 4
    assert step_peak(12, False) - step_peak(6, False) < weight
    assert step_peak(12, True) - step_peak(6, True) >= 6 * weight


def test_nothing_weight_sized_is_saved_but_the_genes() -> None:
    net = Net(2)
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(image(1)).sum()
    genes = {gene.data_ptr() for gene in net.parameters()}
    assert [t for t in seen if t.numel() >= CHANNELS * CHANNELS * 9 and t.data_ptr() not in genes] == []


BANK = GeneBank()
C = {"bank": BANK, "name": "c", "coeffs": [1.0, 0.5]}
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "channels": (
        lambda: ExpansionConv2d(0, 3, 3, **C),
        "ArgumentError",
        "in_channels: expected an int of at least 1, got 0",
    ),
    "out": (lambda: ExpansionConv2d(3, 2.0, 3, **C), "ArgumentError", "out_channels: expected an int of at least 1"),
    "kernel": (
        lambda: ExpansionConv2d(3, 3, (3, 3, 3), **C),
        "ArgumentError",
        r"kernel_size: expected an int of at least 1, or two of them, got \(3, 3, 3\)",
    ),
    "groups": (
        lambda: ExpansionConv2d(6, 4, 3, groups=3, **C),
        "ArgumentError",
        "groups: expected a divisor of 6 and 4 channels, got 3",
    ),
    "mode": (
        lambda: ExpansionConv2d(3, 3, 3, padding_mode="mirror", **C),
        "ArgumentError",
        "padding_mode: expected one of 'zeros', 'reflect', 'replicate', 'circular', got 'mirror'",
    ),
    "x": (
        lambda: ExpansionConv2d(3, 3, 3, padding_mode="reflect", padding=1, **C)([1.0]),
        "DTypeError",
        "x: expected a torch.Tensor, got list",
    ),
    "x channels": (
        lambda: ExpansionConv2d(3, 3, 3, **C)(torch.zeros(1, 4, 5, 5)),
        "ShapeError",
        r"x: expected shape \[B, C, H, W\] or \[C, H, W\] with C = 3, got \[1, 4, 5, 5\]",
    ),
    "x axes before padding": (
        lambda: ExpansionConv2d(3, 3, 3, padding=1, padding_mode="reflect", **C)(torch.zeros(5)),
        "ShapeError",
        r"x: expected shape \[B, C, H, W\] or \[C, H, W\] with C = 3, got \[5\]",
    ),
    "x channels before padding": (
        lambda: ExpansionConv2d(3, 3, 3, padding=1, padding_mode="replicate", **C)(torch.zeros(1, 4, 5, 5)),
        "ShapeError",
        r"x: expected .* with C = 3, got \[1, 4, 5, 5\]",
    ),
    "x integers before padding": (
        lambda: ExpansionConv2d(3, 3, 3, padding=1, padding_mode="reflect", **C)(torch.zeros(1, 3, 5, 5).int()),
        "DTypeError",
        "x: expected float32, .*, got int32",
    ),
    "x empty": (
        lambda: ExpansionConv2d(3, 3, 3, padding=2, padding_mode="replicate", **C)(torch.zeros(1, 3, 0, 5)),
        "ShapeError",
        r"x: expected H of at least 1 for this kernel, got \[1, 3, 0, 5\]",
    ),
    "x below the reflection": (
        lambda: ExpansionConv2d(3, 3, 3, padding=(0, 5), padding_mode="reflect", **C)(torch.zeros(1, 3, 4, 5)),
        "ShapeError",
        r"x: expected W of at least 6 for this reflect padding, got \[1, 3, 4, 5\]",
    ),
    "x below the circle": (
        lambda: ExpansionConv2d(3, 3, 3, padding=(5, 0), padding_mode="circular", **C)(torch.zeros(1, 3, 4, 5)),
        "ShapeError",
        r"x: expected H of at least 5 for this circular padding, got \[1, 3, 4, 5\]",
    ),
    "group": (
        lambda: (ExpansionConv2d(3, 3, 3, **C), ExpansionConv2d(3, 3, 5, **C)),
        "ShapeError",
        r"c: expected \(genes, weight, bias\) = \(2, \(3, 3, 3, 3\), \(3,\)\) as in the bank, got \(2, \(3, 3, 5, 5\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(getattr(plg.errors, kind), match=message):
        make()
