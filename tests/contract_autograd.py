# SPDX-License-Identifier: Apache-2.0
"""The contract on differentiation: second derivatives, checkpoints, repeated passes, autocast, functorch, memory.

It is about the public functions; gradients of shared genes are in `contract_layers`, numbers in `contract_values`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_base import DTYPES, Base, Given, Place, Sizes, close, gradients, leaves, mapped, tracked
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pylearngene as plg
from pylearngene.training.memory import peak_bytes

USUAL = Sizes(5, 8, 6)
MIB = 1 << 20
SIDE = {"cpu": 1536, "cuda": 6144}  # one float32 weight is 9 MiB, 144 MiB
ALLOWED = {"cpu": 2 * MIB + MIB // 2, "cuda": 49 * MIB}  # panels, coefficients, row dots
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def run_autocast(fn: Callable[[Given], Tensor], given: Given, recompute: bool, autocast: bool, device: str) -> Tensor:
    """The call with or without autocast to bfloat16, recomputed in the backward pass or not."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        return checkpoint(fn, given, use_reentrant=False) if recompute else fn(given)


def unless_refused(error: type[Exception], text: str, call: Callable[[], Any]) -> Any:
    """What a call gives, or None where it is refused with these words."""
    try:
        return call()
    except error as refusal:
        if text not in str(refusal):
            raise
        return None


class Autograd(Base):
    def test_second_derivatives_are_right_or_refused(self, place: Place) -> None:
        given = tracked(self.primitive.make(USUAL, torch.float64, place.device))
        first = torch.autograd.grad(self.primitive.linear(given).pow(2).sum(), leaves(given), create_graph=True)
        expected = torch.autograd.grad(self.primitive.oracle(given).pow(2).sum(), leaves(given), create_graph=True)
        for mine, theirs in zip(first, expected, strict=True):
            close(mine, theirs, 1e-11)
        for mine, theirs in zip(first, expected, strict=True):
            wanted = torch.autograd.grad(theirs.pow(2).sum(), leaves(given), retain_graph=True, allow_unused=True)
            second = unless_refused(
                plg.errors.DoubleBackwardError,
                "double backward: expected one differentiation",
                lambda mine=mine: torch.autograd.grad(
                    mine.pow(2).sum(), leaves(given), retain_graph=True, allow_unused=True
                ),
            )
            for a, b in zip(second or wanted, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    close(a, b, 1e-10)

    def test_every_argument_dots_its_gradient_to_the_same(self, place: Place) -> None:
        """`<t, dt> = <dY, Y - b>` for every argument that the weight is linear in, so that W is all of."""
        given = self.primitive.make(Sizes(9, 12, 8), torch.float64, place.device)
        given = {name: value for name, value in given.items() if name != "bias"}
        dy = torch.randn(9, 12, dtype=torch.float64, device=place.device)
        y, grads = gradients(self.primitive.linear, given, dy)
        found, dots = iter(grads), {}
        for name, value in given.items():
            tensors = value if isinstance(value, list) else [value]
            dots[name] = sum((tensor * next(found)).sum() for tensor in tensors)
        for name, dot in dots.items():
            torch.testing.assert_close(dot, (dy * y).sum(), rtol=1e-12, atol=1e-12, msg=name)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints(self, place: Place, reentrant: bool) -> None:
        given = tracked(self.primitive.make(USUAL, torch.float64, place.device))
        dy = torch.randn(USUAL[:2], dtype=torch.float64, device=place.device)

        def call(*tensors: Tensor) -> Tensor:
            flat = iter(tensors)
            return self.primitive.linear(mapped(given, lambda name, tensor: next(flat)))

        checkpoint(call, *leaves(given), use_reentrant=reentrant).backward(dy)
        for leaf, wanted in zip(leaves(given), gradients(self.primitive.oracle, given, dy)[1], strict=True):
            close(leaf.grad, wanted, 1e-11)

    def test_repeated_partial_and_interleaved_passes(self, place: Place) -> None:
        given = tracked(self.primitive.make(USUAL, torch.float64, place.device))
        dy = [torch.randn(USUAL[:2], dtype=torch.float64, device=place.device) for _ in range(2)]
        one, two = (self.primitive.linear(given) for _ in range(2))
        wanted = [gradients(self.primitive.oracle, given, upstream)[1] for upstream in dy]
        for index, leaf in enumerate(leaves(given)):  # each alone, while the others wait
            close(torch.autograd.grad(one, leaf, dy[0], retain_graph=True)[0], wanted[0][index], 1e-11)
        one.backward(dy[0], retain_graph=True)
        two.backward(dy[1])
        one.backward(dy[0])
        for leaf, a, b in zip(leaves(given), *wanted, strict=True):
            close(leaf.grad, 2 * a + b, 1e-11)

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_grid_of_dtypes(self, place: Place, autocast: bool, recompute: bool) -> None:
        """x's dtype, or autocast's, comes out; float64 mixed with another is refused; all else works."""
        dtypes = [d for d in DTYPES if not (place.interpreted and d == torch.bfloat16)]
        if place.interpreted and autocast:
            self.skip_truncation(place, torch.bfloat16)
        for x_dtype, gene_dtype, precise in itertools.product(dtypes, repeat=3):
            given = self.primitive.make(USUAL, x_dtype, place.device, gene_dtype)
            given = mapped(given, lambda name, t, to=precise: t.to(to) if name in self.primitive.precise else t)
            inputs = tracked(given)
            if (x_dtype == torch.float64) != (gene_dtype == torch.float64):
                with pytest.raises(plg.errors.DTypeError, match="float64 does not mix"):
                    run_autocast(self.primitive.linear, inputs, recompute, autocast, place.device)
                continue
            y = run_autocast(self.primitive.linear, inputs, recompute, autocast, place.device)
            wanted_dtype = torch.bfloat16 if autocast and x_dtype != torch.float64 else x_dtype
            assert y.dtype == wanted_dtype
            dy = torch.randn(USUAL[:2], device=place.device).to(y.dtype)
            expected, grads = gradients(self.primitive.oracle, given, dy.double())
            worst = max(TOLERANCE[wanted_dtype], TOLERANCE[gene_dtype], TOLERANCE[precise])
            close(y, expected, worst)
            for leaf, got, wanted in zip(
                leaves(inputs), torch.autograd.grad(y, leaves(inputs), dy), grads, strict=True
            ):
                assert got.dtype == leaf.dtype
                close(got, wanted, 4 * worst)

    # torch's own, on the first use of forward mode
    @pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
    def test_functorch_is_right_or_refused(self, place: Place) -> None:
        given = self.primitive.make(Sizes(3, 5, 4), torch.float64, place.device)
        flat = leaves(given)

        def with_leaf(fn: Callable[[Given], Tensor], index: int, value: Tensor) -> Tensor:
            position = itertools.count()
            return fn(mapped(given, lambda name, t: value if next(position) == index else t))

        def over(fn: Callable[[Given], Tensor], index: int) -> list[Tensor]:
            leaf = flat[index]
            batch = torch.stack([leaf, 2 * leaf, leaf - 1])
            along = batch.movedim(0, -1).contiguous()

            def call(value: Tensor) -> Tensor:
                return with_leaf(fn, index, value)

            return [
                torch.func.vmap(call)(batch),
                torch.func.vmap(call, in_dims=-1, out_dims=1)(along),
                torch.func.grad(lambda value: call(value).pow(2).sum())(leaf),
                torch.func.jvp(call, (leaf,), (torch.ones_like(leaf),))[1],
                torch.func.vmap(torch.func.grad(lambda value: call(value).pow(2).sum()))(batch),
            ]

        for index in range(len(flat)):
            wanted = over(self.primitive.oracle, index)
            got = unless_refused(
                plg.errors.BackendError, "expected", lambda index=index: over(self.primitive.linear, index)
            )
            for mine, theirs in zip(got or wanted, wanted, strict=True):
                close(mine, theirs, 1e-10)


class Memory(Base):
    """No tensor of `O*I` elements is made or saved; the composition, which makes one, shows that the bounds bind."""

    def excess(self, fn: Callable[[Given], Tensor], device: str) -> tuple[int, int]:
        """Bytes at the peak of forward and backward above the result and the gradients."""
        side = SIDE[device]
        given = tracked(self.primitive.make(Sizes(4, side, side), torch.float32, device))
        y, dy = fn(given), torch.ones(4, side, device=device)
        if device == "cuda":  # a BLAS takes a workspace in the first product of every thread, and autograd has its own
            torch.autograd.grad(y, leaves(given), dy, retain_graph=True)
        forward = peak_bytes(lambda: fn(given), device) - dy.nbytes
        owed = sum(leaf.nbytes for leaf in leaves(given))
        # What the graph saved stays: freed during the pass, it would make room for what must not be there.
        return forward, peak_bytes(lambda: y.backward(dy, retain_graph=True), device) - owed

    def test_peaks_hold_no_weight(self, device: str) -> None:
        assert max(self.excess(self.primitive.linear, device)) <= ALLOWED[device]
        assert min(self.excess(self.primitive.composition, device)) > ALLOWED[device]

    @pytest.mark.parametrize("cheat", [False, True])
    def test_only_arguments_are_saved(self, cheat: bool) -> None:
        given = tracked(self.primitive.make(Sizes(3, 64, 64), torch.float32))
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves(given)}
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            (self.primitive.composition if cheat else self.primitive.linear)(given)
        foreign = [t for t in seen if t.numel() >= 64 * 64 and t.untyped_storage().data_ptr() not in own]
        assert bool(foreign) == cheat
