# SPDX-License-Identifier: Apache-2.0
"""Which way calls of norms go: to the kernels whatever the strides, to autograd where it is to see every gene.

Oracle: PyTorch's norms in float64 with the dense vectors, and the bits of the same call on tensors that lie evenly.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_samples import KINDS, SIZE, WAYS, dense, layer_of, native, per_kind, twins
from torch import Tensor, nn

import pylearngene as plg
from pylearngene._ops import expansion_norm as _kernels
from pylearngene.reference import expansion_norm as specification


@pytest.mark.parametrize("way", ["plain", "watched"])
def test_vectors_are_rounded_to_x_by_every_way(way: str) -> None:
    """So that y and dx are those of vectors of ones, rounded once, which here and there falls otherwise."""
    layer, x = layer_of(torch.float32, [1.0]), torch.randn(500, SIZE).bfloat16().requires_grad_()
    twin, dy, ones = x.detach().double().requires_grad_(), torch.randn(500, SIZE).bfloat16(), torch.ones(SIZE).double()
    with torch.no_grad():
        for gene in layer.bank.parameters():
            gene.fill_(1.0035)
    with WAYS[way][1]():
        y = layer(x)
        y.backward(dy)
    expected = F.layer_norm(twin, (SIZE,), ones, ones, 1e-3)
    expected.backward(dy.double())
    for one, other in ((y, expected), (x.grad, twin.grad)):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        assert (one == other.bfloat16()).float().mean() > 0.98


@native
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_any_stride_go_by_the_kernels(kind: str) -> None:
    """Of a sum, for instance, whose gradient is one number: the same bits as where all lies side by side."""
    layer, x, ones = layer_of(torch.float32, kind=kind, size=511), torch.randn(40, 511), torch.ones(40, 511)
    found = []
    turned_ones = ones.t().contiguous().t()
    for turned, dy in ((False, ones), (True, ones), (False, ones[:1, :1].expand(40, 511)), (True, turned_ones)):
        layer.bank.zero_grad()
        leaf = (x.t().contiguous().t() if turned else x).detach().requires_grad_()
        assert leaf.is_contiguous() != turned
        y = layer(leaf)
        y.backward(dy)
        found.append([y, leaf.grad, *(gene.grad for gene in layer.bank.parameters())])
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@native
@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_of_genes_goes_by_the_kernels(kind: str) -> None:
    """Every second coefficient is no row that lies side by side: the same bits as of a layer without the others."""
    one, two = (layer_of(torch.float32, c, kind, 511) for c in ([1.0, 0.0, 0.5], [1.0, 0.5]))
    genes = one.bank.group("norm").tensors()
    with torch.no_grad():
        for k, gene in enumerate(two.bank.group("norm").tensors()):
            gene.copy_(genes[[0, 2, 3, 5][k]])
    x, grads = torch.randn(40, 511), []
    for layer in (one, two):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        grads.append([y, leaf.grad])
    assert all(map(torch.equal, *grads))
    with torch.no_grad():
        assert torch.equal(one(x), grads[0][0])


@native
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_genes_change_no_bits(kind: str) -> None:
    """What is left out of the accumulators changes nothing of the rest; of no genes at all, nothing of dx."""
    layer, x, found = layer_of(torch.float32, kind=kind, size=511), torch.randn(40, 511), []
    genes = layer.bank.group("norm").tensors()
    for frozen in ([], genes[1:2], genes):
        layer.bank.zero_grad()
        layer.bank.requires_grad_()
        for gene in frozen:
            gene.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        assert "NormFunction" in y.grad_fn.name()
        y.square().sum().backward()
        found.append((y, leaf.grad, genes[0].grad))
    for y, dx, grad in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])
        assert grad is None or torch.equal(grad, found[0][2])


# Forward-mode differentiation of PyTorch's own norm scripts its formula.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@per_kind
def test_jacobians_with_frozen_genes(kind: str) -> None:
    """Transforms see operators of PyTorch, also where no gene is trained."""
    layer, x = layer_of(kind=kind), torch.randn(2, SIZE, dtype=torch.float64)
    layer.bank.requires_grad_(False)
    c, genes = twins(layer)
    exact = torch.autograd.functional.jacobian(lambda it: dense(it, c, genes, kind), x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), exact)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), exact)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(layer))(x[None])[0], exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_the_specification_says(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype, kind=kind), torch.randn(4, SIZE).to(dtype)
    group, coeffs = layer.bank.group("norm"), layer.coeffs
    if kind.startswith("layer"):
        expected = specification.layer_norm(x, group.weights(), group.biases(), coeffs, 1e-3)
    else:
        expected = specification.rms_norm(x, group.weights(), coeffs, 1e-3, gain_last=kind == "gain last")
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_specification_is_plain_autograd(kind: str) -> None:
    layer, x = layer_of(torch.float32, kind=kind), torch.randn(2, SIZE, requires_grad=True)
    with plg.use_backend("reference"):
        y = layer(x)
    assert "NormFunction" not in y.grad_fn.name()


@per_kind
def test_genes_that_are_results_get_ordinary_gradients(kind: str) -> None:
    """As `functional_call` puts them in the place of parameters: of such genes autograd is to see every use."""
    layer, x = layer_of(kind=kind), torch.randn(3, SIZE, dtype=torch.float64)
    net = nn.ModuleDict({"bank": layer.bank, "layer": layer})
    c, genes = twins(layer)
    leaves = {name: gene.detach().clone().requires_grad_() for name, gene in net.named_parameters()}
    results = {name: 2 * leaf for name, leaf in leaves.items()}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, it: Tensor) -> Tensor:
            return layer(it)

    y = torch.func.functional_call(Whole(), {f"net.{name}": value for name, value in results.items()}, x)
    y.square().sum().backward()
    dense(x, c, [2 * gene for gene in genes], kind).square().sum().backward()
    found = sorted(str(leaf.grad) for leaf in leaves.values())
    assert found == sorted(str(gene.grad) for gene in genes)


@pytest.mark.parametrize("way", ["plain", "watched", "empty"])
@pytest.mark.parametrize("grad", [True, False])
def test_bias_genes_of_another_dtype(way: str, grad: bool) -> None:
    layer, x = layer_of(torch.float32), torch.randn(2, 4, SIZE)
    layer.bank.group("norm").bias.bfloat16()
    view, context = WAYS[way]
    c, genes = twins(layer)
    with context(), torch.set_grad_enabled(grad):
        y = layer(view(x))
    expected = dense(view(x).double(), c, genes)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    if grad:
        y.sum().backward()
        expected.sum().backward()
        for one, other in zip(layer.bank.group("norm").tensors(), genes, strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", ["plain", "watched"])
@pytest.mark.parametrize(("kind", "equal"), [("gain last", True), ("rms", False)])
def test_the_gradient_of_a_last_gain_is_of_what_it_multiplied(way: str, kind: str, equal: bool) -> None:
    """Of one token, so that nothing is summed, and a gain of ones: y itself where the gain found it rounded."""
    layer, x = layer_of(torch.float32, [1.0], kind, 333), torch.randn(40, 333).bfloat16()
    (gene,) = layer.bank.parameters()
    nn.init.ones_(gene)
    dy = torch.zeros(40, 333).bfloat16()
    dy[3] = 1
    with WAYS[way][1]():
        y = layer(x)
        y.backward(dy)
    assert torch.equal(gene.grad, y[3].float()) == equal


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_gene_that_is_a_result_under_autocast(kind: str) -> None:
    """Then the list has no Parameter of its own."""
    layer, x = layer_of(torch.float32, [1.0], kind), torch.randn(5, SIZE).bfloat16()
    nn.utils.parametrize.register_parametrization(layer.bank.group("norm").weight, "0", nn.Identity())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.double(), dense(x.double(), *twins(layer), kind), rtol=2e-2, atol=2e-2)


@native
@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_without_the_table_by_which_tensors_are_read(error: type[Exception]) -> None:
    """Of another torch, for instance: then PyTorch computes the norm."""

    def calls(*_: Any) -> None:
        raise error

    assert _kernels._calls_of.__wrapped__(SimpleNamespace(expansion_norm=SimpleNamespace(Calls=calls)), 0) is None
