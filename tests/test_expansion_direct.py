# SPDX-License-Identifier: Apache-2.0
"""The short way into the native kernels: the same bits as the long way, and closed wherever that would not be so.

What the long way computes and refuses is tested in the other files of `expansion`; what calls cost is a benchmark.
"""

from __future__ import annotations

import datetime
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pylearngene as plg
from pylearngene import _backends
from pylearngene._ops import expansion_direct as direct
from pylearngene.errors import ArgumentError, DeviceError, DTypeError

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__") or _backends._module is None,
    reason="the short way needs the native module and torch 2.10",
)
ROWS, COLS, K = 7, 9, 3
OPERATOR = torch.ops.pylearngene.expansion_linear.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sample(dtype: torch.dtype = torch.float32, genes: torch.dtype | None = None, tokens: Any = (2,)) -> list[Any]:
    """x, genes, coefficients, no bias, bias genes."""
    make = torch.Generator().manual_seed(0)
    stored = genes or dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.randn(*tokens, COLS, generator=make).to(dtype),
        [torch.randn(ROWS, COLS, generator=make).to(stored) for _ in range(K)],
        torch.tensor([0.5, -2.0, 1.0], dtype=work),
        None,
        [torch.randn(ROWS, generator=make).to(stored) for _ in range(K)],
    ]


LAYOUTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "as made": lambda a: a,
    "no bias": lambda a: [*a[:4], []],
    "plain bias": lambda a: [*a[:3], a[4][0].to(a[0].dtype), []],
    "genes in a tuple": lambda a: [a[0], tuple(a[1]), *a[2:]],
    "one gene": lambda a: [a[0], a[1][:1], a[2][:1], None, a[4][:1]],
    "transposed genes": lambda a: [a[0], [g.t().contiguous().t() for g in a[1]], *a[2:]],
    "every second": lambda a: [
        a[0].repeat_interleave(2, 0)[::2],
        [g.repeat_interleave(2, 1)[:, ::2] for g in a[1]],
        *a[2:4],
        [b.repeat_interleave(2)[::2] for b in a[4]],
    ],
    "offset": lambda a: [torch.cat([a[0].flatten()[:1], a[0].flatten()])[1:].view(a[0].shape), *a[1:]],
    "expanded": lambda a: [a[0][:1].expand(4, COLS), *a[1:]],
    "a part of a stack": lambda a: [a[0], list(torch.stack(a[1]).unbind(0)), *a[2:]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_operator(dtype: torch.dtype, layout: str) -> None:
    arguments = LAYOUTS[layout](sample(dtype))
    short, long = direct.forward(*arguments), OPERATOR(*arguments, None)
    assert short is not None
    assert short.is_contiguous()
    torch.testing.assert_close(short, long, rtol=0, atol=0)


def test_genes_by_name() -> None:
    x, genes, coeffs, _, biases = sample()
    expected = direct.forward(x, genes, coeffs, None, biases)
    named = {str(k): gene for k, gene in enumerate(genes)}
    turned = {str(k): biases[k] for k in (2, 0, 1)}
    torch.testing.assert_close(direct.forward(x, named, coeffs, None, turned), expected, rtol=0, atol=0)
    for other in ({**named, "3": genes[0]}, {"0": genes[0], "1": genes[1], "two": genes[2]}, {**named, "1": None}):
        assert direct.forward(x, other, coeffs, None, turned) is None


@pytest.fixture
def rows() -> Iterator[None]:
    """The regime of the native kernels, also where panels are faster."""
    plg.set_regime("rows")
    yield
    plg.set_regime("auto")


@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (2, 1, 4), (16,), (300,)])
@pytest.mark.parametrize("genes", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_mixed_dtypes(tokens: tuple[int, ...], genes: torch.dtype, rows: None) -> None:
    arguments = sample(torch.float32, genes, tokens)
    short = direct.forward(*arguments)
    assert short is not None
    torch.testing.assert_close(short, OPERATOR(*arguments, None), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_gradients_are_those_of_the_operators(dtype: torch.dtype, tokens: int, rows: None) -> None:
    x, genes, coeffs, _, biases = sample(dtype, tokens=(tokens,))
    dy = torch.randn(tokens, ROWS, generator=torch.Generator().manual_seed(1)).to(dtype)
    dx = direct.input_gradient(dy, genes, coeffs)
    assert dx is not None
    torch.testing.assert_close(dx, torch.ops.pylearngene.expansion_linear_dx.default(dy, genes, coeffs), rtol=0, atol=0)
    buffers, bias_buffers = ([torch.ones(g.shape, dtype=coeffs.dtype) for g in part] for part in (genes, biases))
    expected = [t.clone() for t in (*buffers, *bias_buffers)]
    places, sums = ([0, 1, -1], [-1, 4, 5]), [*buffers, *bias_buffers]
    both = direct.gradients(dy, x, genes, coeffs, biases, places, sums, True)
    torch.testing.assert_close(both, dx, rtol=0, atol=0)
    torch.ops.pylearngene.expansion_linear_wgrad_.default(
        expected[:2], expected[K + 1 :], dy, x, genes, biases, coeffs, [0, 1], [1, 2], False
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for got, want in zip([*buffers, *bias_buffers], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(dtype: torch.dtype) -> None:
    _, genes, coeffs, _, biases = sample(dtype)
    for part in (genes, biases, [g.t() for g in genes]):
        short = direct.weight(part, coeffs)
        assert short is not None
        torch.testing.assert_close(short, plg.reference.expansion.weight(part, coeffs, None), rtol=2**-7, atol=1e-6)
        operator = torch.ops.pylearngene.expansion_weight.default(part, coeffs, None)
        torch.testing.assert_close(short, operator, rtol=0, atol=0)


class Subclass(Tensor):
    """A tensor that behaves like any other, and yet may not be read as one."""


def freed(tensor: Tensor, left: int = 0) -> Tensor:
    kept = tensor.clone()
    kept.untyped_storage().resize_(left)
    return kept


UNUSUAL: dict[str, Callable[[Tensor], Any]] = {
    "freed": freed,
    "cut": lambda t: freed(t, t.nbytes - 1),
    "subclass": lambda t: t.as_subclass(Subclass),
    "negated by a bit": torch._neg_view,
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "mkldnn": lambda t: t.to_mkldnn(),
    "functional": torch._to_functional_tensor,
    "int": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "another dtype": lambda t: t.double(),
    "empty": lambda t: t[..., :0],
    "longer": lambda t: torch.cat([t, t], -1),
    "one axis more": lambda t: t[..., None],
    "no tensor": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("place", ["x", "gene", "coeffs", "bias gene"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_take_the_long_way(kind: str, place: str) -> None:
    arguments = sample()
    if place in ("gene", "bias gene"):
        arguments[1 if place == "gene" else 4][1] = UNUSUAL[kind](arguments[1 if place == "gene" else 4][1])
    else:
        arguments[0 if place == "x" else 2] = UNUSUAL[kind](arguments[0 if place == "x" else 2])
    assert direct.forward(*arguments) is None


def test_what_the_long_way_makes_of_them() -> None:
    x, genes, coeffs, _, biases = sample()
    plain = plg.functional.expansion_linear(-x, genes, coeffs, biases)
    negated = plg.functional.expansion_linear(torch._neg_view(x), genes, coeffs, biases)
    torch.testing.assert_close(negated, plain)
    with pytest.raises(DeviceError, match=r"genes\[?.*: expected a storage of at least"):
        plg.functional.expansion_linear(x, [freed(genes[0]), *genes[1:]], coeffs, biases)
    with pytest.raises(DTypeError, match="got the subclass Subclass"):
        plg.functional.expansion_linear(x.as_subclass(Subclass), genes, coeffs, biases)


class Seen(TorchDispatchMode):
    """Names of the operators that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """The same for what functions modes see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, Called])
def test_modes_see_the_operators(mode: Any) -> None:
    x, genes, coeffs, _, biases = sample()
    for gene in genes:
        gene.requires_grad_()
    with mode() as seen:
        y = plg.functional.expansion_linear(x, genes, coeffs, biases)
        y.sum().backward()
    wanted = ["expansion_linear"] + (["expansion_linear_wgrad"] if mode is Seen else [])
    for name in wanted:
        assert any(f"pylearngene.{name}." in each for each in seen.names), name


def test_profiler_sees_the_operator() -> None:
    arguments = sample()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        plg.functional.expansion_linear(*arguments[:3], arguments[4])
    assert "pylearngene::expansion_linear" in {event.key for event in profile.key_averages()}


def test_closed_while_anything_transforms() -> None:
    asked: dict[str, bool] = {"nothing": direct.unobserved()}
    with torch.no_grad():
        asked["no_grad"] = direct.unobserved()
    with torch.inference_mode():
        asked["inference"] = direct.unobserved()
    with torch.autocast("cpu", torch.bfloat16):
        asked["autocast"] = direct.unobserved()
    with forward_ad.dual_level():
        asked["dual numbers"] = direct.unobserved()

    def ask(name: str) -> Callable[[Tensor], Tensor]:
        def asking(x: Tensor) -> Tensor:
            asked[name] = direct.unobserved()
            return x.sum()

        return asking

    one = torch.ones(2)
    torch.func.vmap(ask("vmap"))(torch.ones(2, 2))
    torch.func.grad(ask("grad"))(one)
    torch.func.functionalize(ask("functionalize"))(one)
    torch.fx.experimental.proxy_tensor.make_fx(ask("make_fx"))(one)
    assert [name for name, is_open in asked.items() if is_open] == ["nothing", "no_grad", "inference"]


def test_results_in_inference_mode_are_inference_tensors() -> None:
    with torch.inference_mode():
        y = plg.functional.expansion_linear(*sample()[:3])
    assert y.is_inference()


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Per call that asks for the short way, whether it was had."""
    taken: list[bool] = []
    forward = direct.forward

    def watched(*arguments: Any) -> Tensor | None:
        y = forward(*arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(direct, "forward", watched)
    return taken


def test_tokens_and_settings_decide(way: list[bool]) -> None:
    _, genes, coeffs, _, biases = sample()
    sizes = (1, 16, 17, 300)

    def ask(tokens: int) -> bool:
        plg.functional.expansion_linear(torch.ones(tokens, COLS), genes, coeffs, biases)
        return way[-1]

    try:
        for regime in ("auto", "rows", "panel"):
            plg.set_regime(regime)
            chosen = [plg.plan.choose(tokens, "cpp", 4, K, arch=_backends.LEVEL_NAME) for tokens in sizes]
            assert [ask(tokens) for tokens in sizes] == [each == "rows" for each in chosen], regime
    finally:
        plg.set_regime("auto")
    with plg.use_backend("reference"):
        assert not ask(1)


def test_no_bias_genes_are_refused_as_on_the_long_way() -> None:
    x, genes, coeffs, _, _ = sample()
    for none in ([], ()):
        with pytest.raises(ArgumentError, match="bias: expected 1 to 64 genes, got 0"):
            plg.functional.expansion_linear(x, genes, coeffs, none)


def test_threads_at_once() -> None:
    arguments = sample(tokens=(4,))
    expected = direct.forward(*arguments)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(500):
            if not torch.equal(direct.forward(*arguments), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_genes_live_until_the_kernel_is_done() -> None:
    x, weights, coeffs, _, biases = sample()
    lists = {str(k): gene for k, gene in enumerate(weights)}, {str(k): gene for k, gene in enumerate(biases)}
    expected, held = direct.forward(x, weights, coeffs, None, biases), [weakref.ref(gene) for gene in weights]
    del weights, biases
    found: list[int] = []

    class Meanwhile(Tensor):
        def new_empty(self, *sizes: int) -> Tensor:  # here other threads may run, and assign to parameters
            lists[0].clear()
            found.append(sum(gene() is not None for gene in held))
            return torch.empty(*sizes)

    calls = _backends._module.expansion.Calls(1, Tensor.__dlpack_c_exchange_api__, (Meanwhile, Tensor))
    y = calls.forward(_backends.LEVEL, 1, 2, x, lists[0], coeffs, None, lists[1])
    assert found == [K]
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert all(gene() is None for gene in held)


def test_without_the_exchange_table_all_takes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    native: Any = _backends._module
    arguments = sample()
    expected = direct.forward(*arguments)
    for table in (None, 7, datetime.datetime_CAPI):
        monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", table)
        assert direct._calls_of.__wrapped__(native) is None
    direct._calls_of.cache_clear()
    try:
        assert direct.forward(*arguments) is None
        y = plg.functional.expansion_linear(*arguments[:3], arguments[4])
    finally:
        direct._calls_of.cache_clear()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"exchange: expected dlpack_exchange_api, got datetime\.datetime_CAPI"):
        native.expansion.Calls(1, datetime.datetime_CAPI, (Tensor,))
