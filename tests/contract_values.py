# SPDX-License-Identifier: Apache-2.0
"""The contract on numbers: values, every gradient, layouts, sizes, dtypes, values that are not finite, guard buffers.

The oracle is the primitive's dense weight in float64. Objects, graphs and processes are in the other parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from contract_base import (
    DTYPES,
    HALVES,
    PLACES,
    Base,
    Given,
    Place,
    Sizes,
    close,
    gradients,
    leaves,
    mapped,
    of_weight,
    tracked,
)
from torch import Tensor

EDGES = [Sizes(*s) for s in ((0, 5, 3), (3, 0, 5), (3, 5, 0), (1, 1, 1), (2, 7, 13), (37, 31, 17), (16, 64, 48))]
#: More than one panel of rows and of columns, in float64.
LONG = Sizes(5, 600, 513)
USUAL = Sizes(6, 11, 9)
MARK = 7.0
GUARD = 64
DRAWS = 4

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "scalar": lambda t: t[:1, :1].expand_as(t),
    "row of ones": lambda t: t[:1].expand_as(t),
    "column of ones": lambda t: t[:, :1].expand_as(t),
    "cut of a cat": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "every second": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "rows apart": lambda t: torch.cat([t, t[:, :1]], 1)[:, : t.shape[1]],
}


def shifted(offset: int) -> Callable[[Tensor], Tensor]:
    """A view that begins some elements into its storage."""
    return lambda t: torch.cat([t.new_zeros(offset), t.reshape(-1)])[offset:].view_as(t)


@contextmanager
def guarded() -> Iterator[list[Tensor]]:
    """What Python allocates inside lies between marks; gives the buffers with their marks."""
    made: list[Tensor] = []

    def between(plain: Tensor) -> Tensor:
        if plain.numel() == 0 or not plain.is_contiguous():
            return plain
        whole = torch._C._TensorBase.new_empty(plain, plain.numel() + 2 * GUARD).fill_(MARK)
        inside = whole[GUARD : GUARD + plain.numel()].view(plain.shape)
        made.append(whole)
        return inside.copy_(plain)

    patch = pytest.MonkeyPatch()
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")),
        (torch.Tensor, ("new_empty", "new_zeros")),
    ):
        for name in names:
            original = getattr(owner, name)

            def replacement(*args: Any, _original: Callable[..., Tensor] = original, **kwargs: Any) -> Tensor:
                return between(_original(*args, **kwargs))

            patch.setattr(owner, name, replacement)
    try:
        yield made
    finally:
        patch.undo()


class Values(Base):
    def compare(self, given: Given, dy: Tensor) -> None:
        """Result and every gradient against the oracle."""
        y, got = gradients(self.primitive.linear, given, dy)
        expected, wanted = gradients(self.primitive.oracle, given, dy)
        assert y.dtype == given["x"].dtype
        for mine, theirs, like in zip((y, *got), (expected, *wanted), (y, *leaves(given)), strict=True):
            assert mine.dtype == like.dtype
            close(mine, theirs, 1e-12 if mine is y else 1e-11)

    @pytest.mark.parametrize("sizes", [*EDGES, LONG], ids=str)
    def test_values_and_gradients_of_edge_sizes(self, place: Place, sizes: Sizes) -> None:
        if sizes == LONG and place.interpreted:
            sizes = Sizes(5, 130, 150)
        given = self.primitive.make(sizes, torch.float64, place.device)
        self.compare(given, torch.randn(sizes[:2], dtype=torch.float64, device=place.device))

    @hypothesis.settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=20,
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.differing_executors,  # every class and place is one
            hypothesis.HealthCheck.too_slow,
        ],
    )
    @hypothesis.given(
        sizes=st.tuples(st.integers(0, 40), st.integers(0, 70), st.integers(0, 70)),
        seed=st.integers(0, 2**31),
        frozen=st.integers(0, 2**6),
        layout=st.sampled_from(sorted(LAYOUTS)),
    )
    def test_any_size_layout_and_set_of_trained_arguments(
        self, place: Place, sizes: tuple[int, int, int], seed: int, frozen: int, layout: str
    ) -> None:
        """Gradients that are asked for are right whichever others are."""
        torch.manual_seed(seed)
        sizes = Sizes(*sizes)
        if place.interpreted:
            sizes = Sizes(*(min(n, 20) for n in sizes))
        given = self.primitive.make(sizes, torch.float64, place.device)
        given["x"] = LAYOUTS[layout](given["x"])
        dy = torch.randn(sizes[:2], dtype=torch.float64, device=place.device)
        results = []
        for fn in (self.primitive.linear, self.primitive.oracle):
            inputs = tracked(given)
            wanted = [leaf for index, leaf in enumerate(leaves(inputs)) if not frozen >> index & 1]
            for index, leaf in enumerate(leaves(inputs)):
                leaf.requires_grad_(not frozen >> index & 1)
            y = fn(inputs)
            results.append((y.detach(), *(torch.autograd.grad(y, wanted, dy) if wanted else ())))
        for mine, theirs in zip(*results, strict=True):
            close(mine, theirs, 1e-11)

    def test_gradcheck(self, place: Place) -> None:
        given = tracked(self.primitive.make(Sizes(3, 5, 4), torch.float64, place.device))

        def call(*tensors: Tensor) -> Tensor:
            flat = iter(tensors)
            return self.primitive.linear(mapped(given, lambda name, tensor: next(flat)))

        assert torch.autograd.gradcheck(call, leaves(given))

    @pytest.mark.parametrize("layout", [*LAYOUTS, 1, 3, 5, 7])
    @pytest.mark.parametrize("tokens", [6, 40])
    def test_layouts_of_every_argument(self, place: Place, layout: str | int, tokens: int) -> None:
        """All matrices in one layout, the upstream gradient among them; vectors and lists follow where they can."""
        change = LAYOUTS[layout] if isinstance(layout, str) else shifted(layout)
        sizes = USUAL._replace(tokens=tokens)
        given = self.primitive.make(sizes, torch.float64, place.device)

        def arranged(name: str, tensor: Tensor) -> Tensor:
            if tensor.dim() == 2:
                return change(tensor)
            return change(tensor) if isinstance(layout, int) else torch.stack([tensor, tensor], -1)[:, 0]

        dy = torch.randn(sizes[:2], dtype=torch.float64, device=place.device)
        self.compare(mapped(given, arranged), change(dy))

    @pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, 2.0**-10])
    def test_gradients_follow_the_upstream_scale(self, place: Place, scale: float) -> None:
        given = self.primitive.make(USUAL, torch.float64, place.device)
        dy = torch.randn(USUAL[:2], dtype=torch.float64, device=place.device)
        one, scaled = (gradients(self.primitive.linear, given, dy * s)[1] for s in (1.0, scale))
        for a, b in zip(one, scaled, strict=True):
            close(b, a * scale, 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize("gene_dtype", [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize("tokens", [4, 70])
    def test_error_is_at_most_twice_the_composition(
        self, place: Place, dtype: torch.dtype, gene_dtype: torch.dtype, tokens: int
    ) -> None:
        """Ruler: the same-dtype PyTorch composition against float64; 2x forward, 3x gradients, plus 2 ulp.

        Largest errors over a few draws: a gradient of few numbers is now and then exact by luck.
        """
        self.skip_truncation(place, dtype, gene_dtype)
        sizes = Sizes(tokens, *((40, 56) if place.interpreted else (96, 160)))
        largest: dict[int, list[float]] = {}
        for _ in range(DRAWS):
            given = self.primitive.make(sizes, dtype, place.device, gene_dtype)
            dy = torch.randn(sizes[:2], device=place.device).to(dtype)
            calls = (self.primitive.linear, self.primitive.composition, self.primitive.oracle)
            results = [(y, *grads) for y, grads in (gradients(fn, given, dy) for fn in calls)]
            assert results[0][0].dtype == dtype
            for index, (mine, ruler, truth) in enumerate(zip(*results, strict=True)):
                assert mine.dtype == ruler.dtype
                errors = [(found.double() - truth.double()).abs().max().item() for found in (mine, ruler)]
                found = (*errors, torch.finfo(mine.dtype).eps * truth.abs().max().item())
                largest[index] = [max(pair) for pair in zip(found, largest.get(index, found), strict=True)]
        for index, (error, ruler, ulp) in largest.items():
            assert error <= (2 if index == 0 else 3) * ruler + 2 * ulp, index

    # numpy's, in Triton's interpreter
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite_reach_exactly_their_rows(self, place: Place, value: float) -> None:
        given = self.primitive.make(USUAL, torch.float32, place.device)
        given["x"][2, 1] = value
        inputs = tracked(given)
        y = self.primitive.linear(inputs)
        assert (~y.isfinite()).any(1).tolist() == [row == 2 for row in range(USUAL.tokens)]
        dy = torch.zeros(USUAL[:2], device=place.device)
        dy[4, 3] = value
        (dx,) = torch.autograd.grad(y, inputs["x"], dy)
        assert (~dx.isfinite()).any(1).tolist() == [row == 4 for row in range(USUAL.tokens)]

    def test_leading_axes_of_x(self, place: Place) -> None:
        given = self.primitive.make(Sizes(12, 5, 7), torch.float64, place.device)
        flat = self.primitive.linear(given)
        x = given["x"]
        for shape in ((2, 3, 2), (12, 1), (1, 12)):
            assert torch.equal(self.primitive.linear({**given, "x": x.view(*shape, 7)}), flat.view(*shape, 5))
        close(self.primitive.linear({**given, "x": x[3]}), flat[3], 1e-13)
        empty = self.primitive.linear({**given, "x": x.new_empty(2, 0, 7)})
        assert empty.shape == (2, 0, 5)

    def test_native_code_writes_inside_its_outputs(self, place: Place) -> None:
        for sizes in (Sizes(3, 7, 5), Sizes(33, 31, 17)):
            for dtype in (torch.float32, torch.float16):
                given = self.primitive.make(sizes, dtype, place.device)
                dy = torch.randn(sizes[:2], device=place.device).to(dtype)
                plain = gradients(self.primitive.linear, given, dy)
                with guarded() as buffers:
                    y, grads = gradients(self.primitive.linear, given, dy)
                assert buffers or not self.primitive.forms_weight
                for whole in buffers:
                    assert (torch.cat([whole[:GUARD], whole[-GUARD:]]) == MARK).all()
                for a, b in zip((y, *grads), (plain[0], *plain[1]), strict=True):
                    assert torch.equal(a, b)


class Weights(Base):
    """The weight alone, and that products are made with that very weight."""

    def test_weight_and_its_gradients(self, place: Place) -> None:
        given = tracked(self.primitive.make(Sizes(1, 4, 3), torch.float64, place.device))
        factors = of_weight(given)

        def call(*tensors: Tensor) -> Tensor:
            flat = iter(tensors)
            return self.primitive.weight(mapped(factors, lambda name, tensor: next(flat)))

        close(call(*leaves(factors)), self.primitive.dense(**factors)[0], 1e-13)
        assert torch.autograd.gradcheck(call, leaves(factors))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_weight_is_one_ulp_from_exact(self, place: Place, dtype: torch.dtype) -> None:
        """Of the work dtype per step, and rounded once to the genes' dtype."""
        self.skip_truncation(place, dtype)
        given = self.primitive.make(Sizes(1, 33, 65), dtype, place.device)
        factors = of_weight(given)
        got = self.primitive.weight(given)
        exact = self.primitive.dense(**mapped(factors, lambda name, tensor: tensor.double()))[0]
        steps = self.primitive.dense(**mapped(factors, lambda name, tensor: tensor.double().abs()))[0]
        work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert got.dtype == dtype
        bound = torch.finfo(dtype).eps * exact.abs() + 8 * work * steps + torch.finfo(dtype).tiny
        assert ((got.double() - exact).abs() <= bound).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_products_are_made_with_the_weight(self, place: Place, dtype: torch.dtype) -> None:
        """x = 1 gives W^T and dy = 1 gives W, both to the bit: every other term of the sums is 0."""
        if not self.primitive.forms_weight:
            pytest.skip("factors are contracted with x, no weight is formed")
        self.skip_truncation(place, dtype)
        given = self.primitive.make(Sizes(1, 33, 31), dtype, place.device)
        weight = self.primitive.weight(given)
        one = torch.eye(31, dtype=dtype, device=place.device).requires_grad_()
        y = self.primitive.linear({**given, "bias": None, "x": one})
        assert torch.equal(y.t(), weight)
        dy = torch.zeros_like(y)
        dy[:, :] = torch.eye(33, dtype=dtype, device=place.device)[:31]
        (dx,) = torch.autograd.grad(y, one, dy)
        assert torch.equal(dx, weight[:31])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_native_weights_have_the_same_bits_everywhere(self, dtype: torch.dtype) -> None:
        """Among native implementations; the specification is at most one ulp away (float64: of what is summed)."""
        given = self.primitive.make(Sizes(1, 67, 45), dtype)
        here = [p for p in PLACES if p.backend in self.primitive.backends and p.device == "cpu" and not p.interpreted]
        found = {}
        for place in here:
            with place.use():
                found[str(place)] = self.primitive.weight(given)
        native = [weight for name, weight in found.items() if name.startswith("cpp")]
        for weight in native[1:]:
            assert torch.equal(weight, native[0])
        reference = found["reference-cpu-panel"].double()
        if dtype == torch.float64:
            factors = of_weight(given)
            summed = self.primitive.dense(**mapped(factors, lambda name, tensor: tensor.abs()))[0]
        else:
            summed = reference.abs()
        for weight in native[:1]:
            bound = torch.finfo(dtype).eps * summed + torch.finfo(dtype).tiny
            assert ((weight.double() - reference).abs() <= bound).all()
