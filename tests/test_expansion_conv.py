# SPDX-License-Identifier: Apache-2.0
"""`expansion_conv2d`: values, every gradient, layouts, dtypes, panels, operators, refusals.

The oracle is `F.conv2d` with the dense weight in float64. Layers, banks, compiled graphs and memory are in
`test_expansion_conv_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pylearngene as plg
from pylearngene import _backends, plan
from pylearngene._ops.expansion_conv_panels import panels
from pylearngene.errors import ArgumentError, DeviceError, DoubleBackwardError, DTypeError, ShapeError
from pylearngene.reference import expansion as specification

HALVES = (torch.bfloat16, torch.float16)
conv2d = plg.functional.expansion_conv2d


@pytest.fixture(params=["rows", "whole", "one channel", "few channels"])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The regime `rows`, and panels of the whole weight, of one channel, and of a few."""
    sizes = {"one channel": 1, "few channels": 5000}
    monkeypatch.setattr(plan.panels, "PANEL_BYTES", sizes.get(request.param, plan.PANEL_BYTES))
    plg.set_regime("rows" if request.param == "rows" else "panel")
    yield str(request.param)
    plg.set_regime("auto")


def make(
    size: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype = torch.float64, genes: int = 2
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    scale = max(1, weight[1] * weight[2] * weight[3]) ** 0.5
    x = torch.randn(size, dtype=torch.float64).to(dtype)
    stored = [(torch.randn(weight, dtype=torch.float64) / scale).to(dtype) for _ in range(genes)]
    biases = [torch.randn(weight[0], dtype=torch.float64).to(dtype) for _ in range(genes)]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return x, stored, torch.randn(genes, dtype=torch.float64).to(work), biases


def dense(x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor], *settings: Any) -> Tensor:
    """The independent oracle: an einsum and `F.conv2d` in float64."""
    c = coeffs.double()
    weight = torch.einsum("k,k...->...", c, torch.stack([g.double() for g in genes]))
    bias = torch.einsum("k,ko->o", c, torch.stack([b.double() for b in biases])) if biases else None
    return F.conv2d(x.double(), weight, bias, *settings)


def ours(x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor], *settings: Any) -> Tensor:
    return conv2d(x, genes, coeffs, biases or None, *settings)


def gradients(
    fn: Callable[..., Tensor], tensors: tuple[Tensor, list[Tensor], Tensor, list[Tensor]], dy: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    x, genes, coeffs, biases = tensors
    leaves = [t.detach().requires_grad_() for t in (x, coeffs, *genes, *biases)]
    k = len(genes)
    y = fn(leaves[0], leaves[2 : 2 + k], leaves[1], leaves[2 + k :], *settings)
    return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))


def agree(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 1e-11) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def compare(tensors: tuple[Tensor, list[Tensor], Tensor, list[Tensor]], *settings: Any) -> None:
    dy = torch.randn_like(dense(*tensors, *settings))
    agree(gradients(ours, tensors, dy, *settings), gradients(dense, tensors, dy, *settings))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (3, 5)])
@pytest.mark.parametrize("channels", [(5, 7, 1), (18, 40, 1), (4, 6, 2), (6, 6, 6), (3, 6, 3), (40, 36, 2)])
def test_values_and_gradients_float64(kernel: tuple[int, int], channels: tuple[int, int, int], panel: str) -> None:
    inner, out, groups = channels
    for stride in (1, (2, 3)):
        for padding in (0, (2, 1)):
            for dilation in (1, (1, 2)):
                weight = (out, inner // groups, *kernel)
                compare(make((2, inner, 9, 10), weight), stride, padding, dilation, groups)


@pytest.mark.parametrize("backend", ["reference"] + (["cpp"] if _backends.native() is not None else []))
def test_every_backend_gives_the_same(backend: str, panel: str) -> None:
    with plg.use_backend(backend):
        compare(make((2, 6, 5, 7), (20, 3, 3, 3), genes=3), 1, 1, 1, 2)
        tensors = make((2, 6, 5, 7), (20, 6, 1, 1))
        compare((tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:]))


@pytest.mark.parametrize("side", [8, 9])
def test_patch_embeddings(side: int, panel: str) -> None:
    compare(make((2, 3, side, side), (20, 3, 4, 4)), 4)


@pytest.mark.parametrize("size", [(0, 5, 6, 6), (1, 5, 1, 1), (3, 5, 1, 1), (1, 5, 3, 3), (2, 5, 1, 7)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_edge_sizes(size: tuple[int, ...], kernel: int) -> None:
    compare(make(size, (4, 5, kernel, kernel)), 1, kernel // 2)


def test_same_and_valid_padding_and_images_without_a_batch() -> None:
    tensors = make((5, 6, 7), (4, 5, 2, 3))
    for padding in ("same", "valid"):
        torch.testing.assert_close(ours(*tensors, 1, padding, 2), dense(*tensors, 1, padding, 2))
    compare(tensors, 2, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda t: torch.stack([t, t], -1).flatten(3)[..., ::2],
    "repeated": lambda t: t[:, :1, :1].expand_as(t),
    "offset 1": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 2)])
def test_layouts_of_x_and_upstream_and_genes(layout: str, kernel: int, groups: int, panel: str) -> None:
    change = LAYOUTS[layout]
    x, genes, coeffs, biases = make((3, 4, 5, 6), (20, 4 // groups, kernel, kernel))
    tensors = (change(x), [change(gene) for gene in genes], coeffs, biases)
    settings = (1, kernel // 2, 1, groups)
    dy = change(torch.randn(3, 20, 5, 6, dtype=torch.float64))
    agree(gradients(ours, tensors, dy, *settings), gradients(dense, tensors, dy, *settings))


@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_format_of_results_is_that_of_x(kernel: int, panel: str) -> None:
    x, genes, coeffs, _ = make((2, 4, 5, 6), (20, 4, kernel, kernel))
    assert conv2d(x, genes, coeffs, padding="same").is_contiguous()
    assert conv2d(x[:, :, :1, :1], genes, coeffs, padding="same").is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    assert conv2d(last, genes, coeffs, padding="same").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gene_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 32)])
def test_error_is_at_most_twice_the_composition(
    dtype: torch.dtype, gene_dtype: torch.dtype, kernel: int, groups: int, panel: str
) -> None:
    """Ruler: the same-dtype PyTorch composition against float64; 2x forward, 3x gradients, plus 2 ulp.

    An ulp of dc is one of dW, added up at random over its dot with a gene.
    """
    x, genes, coeffs, biases = make((2, 32, 7, 6), (32, 32 // groups, kernel, kernel))
    stored = [gene.to(gene_dtype) for gene in genes], [bias.to(gene_dtype) for bias in biases]
    tensors = (x.to(dtype), stored[0], coeffs.float(), stored[1])
    settings = (1, kernel // 2, 1, groups)

    def composition(x: Tensor, genes: list[Tensor], coeffs: Tensor, biases: list[Tensor], *settings: Any) -> Tensor:
        weight = specification.weight(genes, coeffs, x.dtype)
        return F.conv2d(x, weight, specification.weight(biases, coeffs, x.dtype), *settings)

    dy = torch.randn(2, 32, 7, 6, dtype=torch.float64).to(dtype)
    mine, ruler, truth = (gradients(fn, tensors, dy, *settings) for fn in (ours, composition, dense))
    assert mine[0].dtype == dtype
    for index, (a, b, c) in enumerate(zip(mine, ruler, truth, strict=True)):
        assert a.dtype == b.dtype
        reference = c.double()
        ulp = torch.finfo(a.dtype).eps * reference.abs().max()
        if index == 2:
            dw, gene = truth[3].double() / coeffs[0].double(), genes[0]
            ulp = torch.finfo(dtype).eps * dw.norm() * gene.norm() / gene.numel() ** 0.5
        factor = 2 if index == 0 else 3
        assert (a.double() - reference).abs().max() <= factor * (b.double() - reference).abs().max() + 2 * ulp


def test_gradcheck(panel: str) -> None:
    x, genes, coeffs, biases = make((2, 4, 4, 3), (4, 2, 2, 3))
    tensors = [t.requires_grad_() for t in (x, coeffs, *genes, *biases)]

    def call(x: Tensor, coeffs: Tensor, *rest: Tensor) -> Tensor:
        return conv2d(x, rest[:2], coeffs, rest[2:], stride=(1, 2), padding=1, groups=2)

    assert torch.autograd.gradcheck(call, tensors)
    plain = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: conv2d(x, genes, coeffs, b, groups=2), plain)


def test_coefficients_dot_their_gradient() -> None:
    """`sum_k c_k dc_k == <dY, Y>` without a bias, since Y is linear in the coefficients."""
    x, genes, coeffs, _ = make((2, 4, 6, 5), (8, 4, 3, 3), genes=3)
    coeffs.requires_grad_()
    y = conv2d(x, genes, coeffs)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, coeffs, dy)
    torch.testing.assert_close((coeffs * grad).sum(), (dy * y).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_reach_exactly_their_positions(value: float, panel: str) -> None:
    x, genes, coeffs, _ = make((2, 3, 6, 6), (4, 3, 3, 3), torch.float32)
    x[1, 0, 0, 0] = value
    y = conv2d(x, genes, coeffs)
    assert y[0].isfinite().all()
    assert (~y[1].isfinite()).nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 0]]
    x[1, 0, 0, 0] = 0.0
    genes[1][2, 1, 0, 0] = value
    y = conv2d(x, genes, coeffs)
    assert (~y.isfinite()).any(0).any(1).any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("weight", "groups"),
    [((40, 18, 3, 3), 1), ((6, 1, 3, 3), 6), ((512, 512, 3, 3), 1), ((64, 512, 3, 3), 4), ((4096, 4096, 1, 1), 1)],
)
@pytest.mark.parametrize("by_output", [False, True])
def test_panels_cover_the_weight_once_and_keep_their_size(
    weight: tuple[int, ...], groups: int, by_output: bool
) -> None:
    seen = torch.zeros(weight[:2], dtype=torch.int)
    for part in panels(weight, groups, 4, by_output=by_output):
        window = seen[part.rows, part.inner]
        window += 1
        assert window.numel() * weight[2] * weight[3] * 4 <= plan.panels.PANEL_BYTES
        inside = part.rows.start * groups // weight[0] * weight[1]
        assert part.channels.start == inside + part.inner.start
        assert part.channels.stop - part.channels.start == part.groups * window.shape[1]
    assert (seen == 1).all()


@pytest.mark.parametrize("function", [plg.functional.expansion_linear, conv2d])
def test_documented_panels_are_those_of_the_plan(function: Callable[..., Tensor]) -> None:
    promise = f"at most {plan.PANEL_BYTES >> 20} MiB ({plan.GPU_PANEL_BYTES >> 20} MiB on a GPU)"
    assert promise in " ".join(str(function.__doc__).split())


def test_genes_as_one_tensor_and_autocast() -> None:
    x, genes, coeffs, biases = make((2, 4, 6, 5), (8, 4, 3, 3), torch.float32)
    listed = conv2d(x, genes, coeffs, biases)
    assert torch.equal(conv2d(x, torch.stack(genes), coeffs, torch.stack(biases)), listed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv2d(x.requires_grad_(), genes, coeffs, biases)
    assert y.dtype == torch.bfloat16
    wanted = specification.conv2d(x.bfloat16(), genes, coeffs, None, biases)
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)


def test_backward_inside_an_autocast_region_keeps_the_dtypes_of_the_forward() -> None:
    tensors = make((2, 4, 6, 5), (8, 4, 3, 3), torch.float32)
    dy = torch.randn(2, 8, 4, 3)
    x = tensors[0].requires_grad_()
    y = conv2d(x, tensors[1], tensors[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == torch.float32
    expected = gradients(dense, (*tensors[:3], []), dy)[1]
    torch.testing.assert_close(dx, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learn_x", [False, True])
def test_what_changes_before_the_backward_pass_is_refused_by_name(learn_x: bool, panel: str) -> None:
    for shape, text in (
        ((2, 18, 9, 8), r"dy: expected shape \[2, 20, 9, 8\] \(the result of x, .*\), got \[2, 20, 8, 8\]"),
        ((3, 18, 8, 8), r"dy: expected shape \[3, 20, 8, 8\]"),
        ((2, 19, 8, 8), r"x: expected shape \[B, C, H, W\] with C = 18, got \[2, 19, 8, 8\]"),
    ):
        x, genes, coeffs, _ = make((2, 18, 8, 8), (20, 18, 3, 3))
        y = conv2d(x.requires_grad_(learn_x), [gene.requires_grad_() for gene in genes], coeffs, padding=1)
        x.data = torch.randn(shape, dtype=torch.float64)
        with pytest.raises(ShapeError, match=text):
            y.sum().backward()


def test_operators_refuse_dilations_that_no_convolution_has(panel: str) -> None:
    x, genes, coeffs, _ = make((2, 18, 8, 8), (20, 18, 3, 3))
    for dilation in ((1, -1), (0, 1)):
        with pytest.raises(RuntimeError, match="dilation"):
            torch.ops.pylearngene.expansion_conv2d(x, genes, coeffs, None, [], (1, 1), (1, 1), dilation, 1)


def test_double_backward_raises() -> None:
    x, genes, coeffs, _ = make((1, 2, 4, 4), (3, 2, 3, 3))
    y = conv2d(x.requires_grad_(), [gene.requires_grad_() for gene in genes], coeffs)
    (dx, _) = torch.autograd.grad(y.sum(), (x, genes[0]), create_graph=True)
    with pytest.raises(DoubleBackwardError, match="double backward: expected one differentiation"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*batching rule.*:UserWarning")  # of torch's convolution under vmap
def test_functorch_transforms_equal_the_dense_convolution() -> None:
    x, genes, coeffs, biases = make((2, 2, 4, 4), (3, 2, 3, 3))

    def transformed(fn: Callable[..., Tensor]) -> list[Tensor]:
        def loss(g: Tensor) -> Tensor:
            return fn(x, [g, genes[1]], coeffs, biases, 1, 1).pow(2).sum()

        over_x = torch.func.vmap(lambda image: fn(image[None], genes, coeffs, biases, 2, 1)[0])(x)
        over_coeffs = torch.func.vmap(lambda c: fn(x, genes, c, biases))(torch.eye(2, dtype=torch.float64))
        tangents = torch.func.jvp(lambda g: fn(x, [g, genes[1]], coeffs, biases), (genes[0],), (genes[1],))
        return [over_x, over_coeffs, *tangents, torch.func.grad(loss)(genes[0])]

    agree(tuple(transformed(ours)), tuple(transformed(dense)))


def operator_samples() -> Iterator[tuple[str, tuple]]:
    x, genes, coeffs, biases = make((2, 4, 5, 6), (6, 2, 3, 3))
    settings = ([1, 2], [1, 0], [1, 1], 2)
    dy = torch.randn(dense(x, genes, coeffs, biases, *settings).shape, dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    for tensor in (x, coeffs, *genes, *biases):
        tensor.requires_grad_()
    yield "expansion_conv2d", (x, genes, coeffs, None, biases, *settings)
    yield "expansion_conv2d", (x[:0], genes, coeffs, torch.randn(6, dtype=torch.float64), [], *settings)
    yield "expansion_conv2d", (last, genes, coeffs, None, [], *settings)
    fixed, fixed_bias = [g.detach() for g in genes], [b.detach() for b in biases]
    c, image = coeffs.detach(), x.detach()
    ones = [torch.randn(6, 4, 1, 1, dtype=torch.float64) for _ in range(2)]
    yield "expansion_conv2d", (last, ones, c, None, [], [1, 1], [0, 0], [1, 1], 1)
    yield "expansion_conv2d", (image[:, :, :1, :1], ones, c, None, [], [1, 1], [0, 0], [1, 1], 1)
    yield "expansion_conv2d_dx", (dy, list(x.shape), fixed, c, *settings)
    yield "expansion_conv2d_wgrad", (dy, image, fixed, fixed_bias, c, [0, 1], [1], True, *settings)
    buffers = [torch.zeros(6, 2, 3, 3, dtype=torch.float64)]
    bias_buffers = [torch.zeros(6, dtype=torch.float64)]
    wanted = (fixed, fixed_bias, c, [1], [0], False)
    yield "expansion_conv2d_wgrad_", (buffers, bias_buffers, dy, image, *wanted, *settings)
    tap = (torch.zeros(()), buffers, bias_buffers, [0], [1])
    yield "expansion_conv2d_tapped", (image, fixed, c, None, fixed_bias, *settings, *tap)


@pytest.mark.parametrize("index", range(9))
@pytest.mark.filterwarnings("ignore")
def test_opcheck(index: int) -> None:
    name, arguments = list(operator_samples())[index]
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(getattr(torch.ops.pylearngene, name).default, arguments, test_utils=checks)


X, G, C = torch.zeros(1, 4, 5, 5), [torch.zeros(6, 2, 3, 3)] * 2, torch.ones(2)
E = [torch.zeros(6, 4, 2, 2)] * 2  # a kernel of even size
REFUSED: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "x list": (([1.0], G, C), {"groups": 2}, DTypeError, r"x: expected a torch.Tensor, got list"),
    "x ints": ((X.int(), G, C), {"groups": 2}, DTypeError, r"x: expected float32, .*, got int32"),
    "x double": ((X.double(), G, C), {"groups": 2}, DTypeError, r"x: expected float32 .*, got float64"),
    "x device": ((X.to("meta"), G, C), {"groups": 2}, DeviceError, r"x: expected device cpu \(that of genes\)"),
    "x axes": (
        (X[0, 0], G, C),
        {"groups": 2},
        ShapeError,
        r"x: expected shape \[B, C, H, W\] or \[C, H, W\] with C = 4, got \[5, 5\]",
    ),
    "x channels": ((X[:, :3], G, C), {"groups": 2}, ShapeError, r"x: expected .* with C = 4, got \[1, 3, 5, 5\]"),
    "x height": (
        (X[:, :, :2], G, C),
        {"groups": 2},
        ShapeError,
        r"x: expected H of at least 3 for this kernel, got \[1, 4, 2, 5\]",
    ),
    "x width": ((X, G, C), {"groups": 2, "dilation": (1, 3)}, ShapeError, r"x: expected W of at least 7 for this"),
    "x axes before padding": (
        (X[0, 0, 0], E, C),
        {"padding": "same"},
        ShapeError,
        r"x: expected shape \[B, C, H, W\] or \[C, H, W\] with C = 4, got \[5\]",
    ),
    "x channels before padding": ((X[:, :3], E, C), {"padding": "same"}, ShapeError, r"C = 4, got \[1, 3, 5, 5\]"),
    "x empty": (
        (X[:, :, :0], G, C),
        {"groups": 2, "padding": 2},
        ShapeError,
        r"x: expected H of at least 1 for this kernel, got \[1, 4, 0, 5\]",
    ),
    "gene axes": (
        (X, [torch.zeros(3, 4)] * 2, C),
        {},
        ShapeError,
        r"genes: expected K tensors \[O, C/groups, kh, kw\] of sizes above 0, got \[3, 4\]",
    ),
    "gene sizes": ((X, [torch.zeros(3, 4, 0, 1)] * 2, C), {}, ShapeError, r"genes: expected .*, got \[3, 4, 0, 1\]"),
    "coeffs": ((X, G, torch.ones(3)), {"groups": 2}, ShapeError, r"coeffs: expected shape \[K\] with K = 2 genes"),
    "bias": ((X, G, C, torch.zeros(4)), {"groups": 2}, ShapeError, r"bias: expected shape \[O\] = \[6\], got \[4\]"),
    "bias double": (
        (X, G, C, torch.zeros(6).double()),
        {"groups": 2},
        DTypeError,
        r"bias: expected float32 .*float64 does not mix.*, got float64",
    ),
    "groups": ((X, G, C), {"groups": 4}, ArgumentError, r"groups: expected a divisor of 8 and 6 channels, got 4"),
    "groups zero": ((X, G, C), {"groups": 0}, ArgumentError, r"groups: expected an int of at least 1, got 0"),
    "stride": ((X, G, C), {"stride": 0}, ArgumentError, r"stride: expected an int of at least 1, or two .*, got 0"),
    "stride three": ((X, G, C), {"stride": (1, 1, 1)}, ArgumentError, r"stride: expected .*, got \(1, 1, 1\)"),
    "padding": ((X, G, C), {"padding": -1}, ArgumentError, r"padding: expected an int of at least 0, .*, got -1"),
    "padding huge": (
        (X, G, C),
        {"padding": (2**40, 0)},
        ArgumentError,
        r"padding: expected an int of at most 1048576, or two of them, got \(1099511627776, 0\)",
    ),
    "stride huge": ((X, G, C), {"stride": 2**70}, ArgumentError, r"stride: expected an int of at most 1048576, or two"),
    "padding word": ((X, G, C), {"padding": "full"}, ArgumentError, r"padding: expected one of 'valid', 'same', got"),
    "padding same": (
        (X, G, C),
        {"padding": "same", "stride": 2},
        ArgumentError,
        r"padding: expected numbers or 'valid' with stride \(2, 2\), got 'same'",
    ),
    "dilation": ((X, G, C), {"dilation": 1.5}, ArgumentError, r"dilation: expected an int of at least 1, .*, got 1.5"),
    "no genes": ((X, [], C), {}, ArgumentError, r"genes: expected 1 to 64 genes, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str) -> None:
    arguments, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        conv2d(*arguments, **options)


def test_freed_storage_is_refused() -> None:
    genes = [torch.zeros(6, 2, 3, 3) for _ in range(2)]
    genes[1].untyped_storage().resize_(0)
    with pytest.raises(DeviceError, match="genes: expected a storage of at least 432 bytes, got 0"):
        conv2d(X, genes, C, groups=2)
