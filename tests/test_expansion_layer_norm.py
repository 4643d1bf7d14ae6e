# SPDX-License-Identifier: Apache-2.0
"""Layer and RMS norms in training: gain and bias combined inside the norm, and whatever must go another way.

Oracle: `F.layer_norm` and `F.rms_norm` in float64 with the dense vectors. Kernels alone are in `test_native_norm.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from norm_samples import COEFFS, KINDS, SIZE, WAYS, Norm, Watched, dense, layer_of, native, per_kind, twins
from torch import Tensor, nn
from torch.autograd.gradcheck import gradgradcheck
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene.nn import ExpansionLayerNorm, GeneBank


@pytest.mark.parametrize("way", WAYS)
@per_kind
@pytest.mark.parametrize("coeffs", [COEFFS, [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("learn", [True, False])
def test_values_and_all_gradients(way: str, kind: str, coeffs: list[float], learn: bool) -> None:
    layer = layer_of(coeffs=coeffs, kind=kind, learn_coeffs=learn)
    view, context = WAYS[way]
    x, (c, genes) = torch.randn(2, 4, SIZE, dtype=torch.float64).requires_grad_(), twins(layer)
    twin = x.detach().clone().requires_grad_()
    with context():
        y = layer(view(x))
        dy = torch.randn_like(y)
        y.backward(dy)
    expected = dense(view(twin), c, genes, kind)
    expected.backward(dy)
    found = [y, x.grad, *(gene.grad for gene in layer.bank.group("norm").tensors())]
    exact = [expected, twin.grad, *(gene.grad for gene in genes)]
    if learn:
        found.append(layer.coeffs.grad)
        exact.append(c.grad)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("genes", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["plain", "watched", "reference"])
@pytest.mark.parametrize("kind", ["layer", "rms", "gain last"])
def test_low_precision(dtype: torch.dtype, genes: torch.dtype, way: str, kind: str) -> None:
    layer, x = layer_of(genes, kind=kind, learn_coeffs=True), torch.randn(3, 5, SIZE).to(dtype).requires_grad_()
    c, leaves = twins(layer)
    twin = x.detach().double().requires_grad_()
    with WAYS[way][1]():
        y = layer(x)
        dy = torch.randn(y.shape).to(dtype)
        y.backward(dy)
    expected = dense(twin, c, leaves, kind)
    expected.backward(dy.double())
    assert y.dtype == dtype
    coarse = max(torch.finfo(dtype).eps, torch.finfo(genes).eps)
    for one, other in (
        (y, expected),
        (x.grad, twin.grad),
        (layer.coeffs.grad, c.grad),
        *((g.grad, leaf.grad) for g, leaf in zip(layer.bank.group("norm").tensors(), leaves, strict=True)),
    ):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        tolerance = 8 * coarse * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=0.0, atol=tolerance)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_synthesized_is_saved(kind: str) -> None:
    """What a recorded call keeps are x, the genes and coefficients, all of which exist, and two numbers per token."""
    layer, x = layer_of(torch.float32, kind=kind), torch.randn(5, SIZE, requires_grad=True)
    y = layer(x)
    assert y.grad_fn is not None
    assert "NormFunction" in y.grad_fn.name()
    have = {t.data_ptr() for t in (x, layer.coeffs, *layer.bank.parameters())}
    new = [t for t in y.grad_fn.saved_tensors if t.data_ptr() not in have]  # type: ignore[attr-defined]
    assert [t.shape for t in new] == [(10,)]
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        assert layer(x).grad_fn is None


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_the_way_do_not_show(threads: int, kind: str) -> None:
    layer = layer_of(torch.float32, [1.0, 0.3], kind, 512)
    x = torch.randn(300, 512, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            x.grad = None
            layer.bank.zero_grad()
            y = layer(x)
            y.backward(torch.ones_like(y) * x.detach())
            assert x.grad is not None
            results.append([y.detach(), x.grad, *(gene.grad for gene in layer.bank.parameters())])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_genes_of_several_layers_and_passes() -> None:
    bank = GeneBank()
    layers = [layer_of(bank=bank, coeffs=[1.0, c, 0.0 if c > 1 else 1.0]) for c in (0.3, 0.6, 1.2)]
    x, genes = torch.randn(4, SIZE, dtype=torch.float64), None
    for _ in range(2):
        y, expected = x, x
        for layer in layers:
            y = torch.tanh(layer(y))
        genes = genes or twins(layers[0])[1]
        for layer in layers:
            expected = torch.tanh(dense(expected, layer.coeffs.double(), genes))
        for retain in (True, False):
            y.sum().backward(retain_graph=retain)
            expected.sum().backward(retain_graph=retain)
        found = [gene.grad for gene in bank.group("norm").tensors()]
        torch.testing.assert_close(found, [gene.grad for gene in genes], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["genes", "gains", "one", "x"])
def test_frozen_parts(frozen: str) -> None:
    layer, x = layer_of(), torch.randn(3, SIZE, dtype=torch.float64, requires_grad=frozen != "x")
    group, (c, genes) = layer.bank.group("norm"), twins(layer)
    still = {
        "genes": group.tensors(),
        "gains": group.weights(),
        "one": [group.weights()[1], group.biases()[0]],
        "x": [],
    }
    for gene in still[frozen]:
        gene.requires_grad_(False)
    twin = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    dense(twin, c, genes).square().sum().backward()
    for one, other in zip([x, *group.tensors()], [twin, *genes], strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
        else:
            assert one.grad is None


@per_kind
def test_second_derivatives(kind: str) -> None:
    """dx may be differentiated again, also towards genes and coefficients; what genes get may not."""
    layer = layer_of(kind=kind, learn_coeffs=True)
    x, (c, genes) = torch.randn(3, SIZE, dtype=torch.float64).requires_grad_(), twins(layer)
    assert gradgradcheck(layer, (x,))
    twin = x.detach().clone().requires_grad_()
    for y, at in ((layer(x), x), (dense(twin, c, genes, kind), twin)):
        (dx,) = torch.autograd.grad(y.square().sum(), at, create_graph=True)
        dx.square().sum().backward()
    found = [x.grad, layer.coeffs.grad, *(gene.grad for gene in layer.bank.group("norm").tensors())]
    torch.testing.assert_close(found, [twin.grad, c.grad, *(gene.grad for gene in genes)], rtol=1e-9, atol=1e-9)
    for of in (layer.coeffs, layer.bank.group("norm").weights()[0]):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), of, create_graph=True)
        with pytest.raises(plg.errors.DoubleBackwardError, match="double backward"):
            grad.sum().backward()


# Forward-mode differentiation of PyTorch's own norm scripts its formula.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@per_kind
def test_jacobians(kind: str) -> None:
    layer, x = layer_of(kind=kind), torch.randn(2, SIZE, dtype=torch.float64)
    c, genes = twins(layer)
    exact = torch.autograd.functional.jacobian(lambda it: dense(it, c, genes, kind), x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), exact)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), exact)
    torch.testing.assert_close(torch.func.vmap(layer)(x), dense(x, c, genes, kind))
    torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x, vectorize=True), exact)
    y = layer(x)
    with pytest.raises(plg.errors.BackendError, match="is_grads_batched"):
        torch.autograd.grad(y, layer.bank.group("norm").weights()[0], torch.randn(3, *y.shape), is_grads_batched=True)


class OnCpu(torch.overrides.TorchFunctionMode):
    """A mode around a forward pass that its repetition in the backward pass is without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [nullcontext, OnCpu, Watched])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_checkpoints(context: Callable[[], Any], reentrant: bool, kind: str) -> None:
    layer, x = layer_of(kind=kind), torch.randn(3, SIZE, dtype=torch.float64).requires_grad_()
    with context():
        y = checkpoint(lambda it: torch.tanh(layer(it)), x, use_reentrant=reentrant)
    y.sum().backward()
    found = [x.grad, *(gene.grad for gene in layer.bank.parameters())]
    x.grad = None
    layer.bank.zero_grad()
    torch.tanh(layer(x)).sum().backward()
    torch.testing.assert_close(found, [x.grad, *(gene.grad for gene in layer.bank.parameters())])


@native
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_norm_alone(kind: str) -> None:
    """As PyTorch does on the CPU: float32 stays, by the same kernels."""
    layer, x = layer_of(torch.float32, kind=kind, size=511), torch.randn(9, 511, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    grads = [gene.grad.clone() for gene in layer.bank.parameters() if gene.grad is not None]
    layer.bank.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        again = layer(x)
        again.sum().backward()  # this pass, too, may be begun under autocast
    assert again.dtype == torch.float32
    assert torch.equal(again, y)
    assert all(map(torch.equal, [gene.grad for gene in layer.bank.parameters()], grads))


@pytest.mark.parametrize("grad", [True, False])
def test_float32_vectors_keep_their_digits_under_autocast(grad: bool) -> None:
    """As PyTorch's layer norm does of 16 bits and float32 vectors: these are not rounded to x's dtype."""
    layer, x = layer_of(torch.float32, [1.0]), torch.randn(50, SIZE).bfloat16()
    with torch.no_grad():
        for gene in layer.bank.group("norm").weights():
            gene.fill_(1.0035)  # no number of bfloat16: the nearest is 1
    plain = layer.to_dense()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, plain(x))
    assert not torch.equal(y, layer(x))


def hooked(layer: Norm) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """Who watches the bank, or the layer, and whether they were called."""
    seen: list[str] = []
    for module in (layer.bank, layer):
        handle = module.register_forward_hook(lambda *_: seen.append("here"))
        yield module, lambda: bool(seen)
        handle.remove()
        seen.clear()


def test_hooks_see_every_use() -> None:
    layer, x = layer_of(), torch.randn(3, SIZE, dtype=torch.float64)
    expected = layer(x)
    for _, was_seen in hooked(layer):
        assert torch.equal(layer(x), expected)
        assert was_seen()


def test_parametrized_genes_get_ordinary_gradients() -> None:
    layer, x = layer_of(), torch.randn(3, SIZE, dtype=torch.float64)
    c, genes = twins(layer)

    class Double(nn.Module):
        def forward(self, gene: Tensor) -> Tensor:
            return 2 * gene

    weights = layer.bank.group("norm").weight
    nn.utils.parametrize.register_parametrization(weights, "1", Double())
    layer(x).square().sum().backward()
    dense(x, c, [2 * gene if k == 1 else gene for k, gene in enumerate(genes)]).square().sum().backward()
    found = weights.parametrizations["1"].original.grad
    torch.testing.assert_close(found, genes[1].grad)


def test_copies_and_inference() -> None:
    layer, x = layer_of(), torch.randn(3, SIZE, dtype=torch.float64)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    twin(x).sum().backward()
    assert all(gene.grad is None for gene in layer.bank.parameters())
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    torch.testing.assert_close(layer.to_dense()(x), y)


REFUSED: dict[str, tuple[Tensor, str, str]] = {
    "width": (torch.zeros(2, 5).double(), "ShapeError", r"x: expected shape \[\*, N\] with N = 6, got \[2, 5\]"),
    "ints": (torch.zeros(2, 6).int(), "DTypeError", "x: expected float32, .* got int32"),
    "mixed": (torch.zeros(2, 6), "DTypeError", "x: expected float64"),
    "device": (torch.zeros(2, 6, device="meta"), "DeviceError", "x: expected device cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(case: str, grad: bool) -> None:
    x, kind, message = REFUSED[case]
    with torch.set_grad_enabled(grad), pytest.raises(getattr(plg.errors, kind), match=message):
        layer_of()(x)


def test_bank_is_called_as_it_is() -> None:
    layer, x = layer_of(), torch.randn(2, SIZE, dtype=torch.float64)
    layer.bank.forward = lambda *_, **__: "another"  # type: ignore[method-assign]
    assert layer(x) == "another"
    del layer.bank.forward
    assert isinstance(layer(x), Tensor)

    class Own(GeneBank):
        def forward(self, name: str, *inputs: Any, **options: Any) -> Any:
            return "own"

    assert layer_of(bank=Own())(x) == "own"


@pytest.mark.parametrize("first", [plg.nn.ExpansionRMSNorm, ExpansionLayerNorm])
def test_norms_of_one_name_share_genes_in_any_order(first: type[nn.Module]) -> None:
    bank = GeneBank()
    options: dict[str, Any] = {"bank": bank, "name": "norm", "coeffs": COEFFS}
    if first is ExpansionLayerNorm:
        layer_of(bias=False, **options)
        plg.nn.ExpansionRMSNorm(SIZE, dtype=torch.float64, **options)
    else:
        plg.nn.ExpansionRMSNorm(SIZE, dtype=torch.float64, **options)
        layer_of(bias=False, **options)
    assert len(list(bank.parameters())) == len(COEFFS)


@pytest.mark.parametrize("grad", [True, False])
def test_genes_times_zero_are_not_read(grad: bool) -> None:
    layer, x = layer_of(coeffs=[1.0, 0.5, 0.0]), torch.randn(2, SIZE, dtype=torch.float64)
    genes = list(layer.bank.group("norm").tensors())
    with torch.no_grad():
        genes[2].fill_(float("nan"))
        genes[5].fill_(float("inf"))
    expected = dense(x, torch.tensor([1.0, 0.5], dtype=torch.float64), [genes[k].detach() for k in (0, 1, 3, 4)])
    with torch.set_grad_enabled(grad):
        y = layer(x)
    torch.testing.assert_close(y.detach(), expected)
    if grad:
        y.sum().backward()
        assert not genes[2].grad.any()  # type: ignore[union-attr]
        assert not genes[5].grad.any()  # type: ignore[union-attr]
