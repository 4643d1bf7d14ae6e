# SPDX-License-Identifier: Apache-2.0
"""What a primitive states so that the contract can be run on it, and where the contract runs.

`Primitive` is the statement, `Place` one implementation on one device. The tests themselves are in the other
`contract_*` files; `contract.py` puts them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pylearngene as plg
from pylearngene import _backends

Given = dict[str, Any]  # arguments of a public function by name: tensors and lists of tensors
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)


class Sizes(NamedTuple):
    """M tokens, O out, I in."""

    tokens: int
    out: int
    inner: int


@dataclass(frozen=True)
class Place:
    """One implementation: a backend, its instruction level or its interpreter, a device, and one regime."""

    backend: str
    level: str
    device: str
    regime: str

    def __str__(self) -> str:
        return "-".join(part for part in (self.backend, self.level, self.device, self.regime) if part)

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @contextmanager
    def use(self) -> Iterator[None]:
        before = _backends.LEVEL
        with plg.use_backend(self.backend):
            if self.level:
                _backends.LEVEL = _backends._module.levels().index(self.level)
            plg.set_regime(self.regime)
            try:
                yield
            finally:
                _backends.LEVEL = before
                plg.set_regime("auto")


def _levels() -> list[str]:
    """The instruction levels that this machine can run, from the lowest."""
    if _backends._module is None:
        return []
    levels = list(_backends._module.levels())
    return levels[: levels.index(_backends.LEVEL_NAME) + 1]


def _with_cuda() -> bool:
    """Whether the C++ kernels for CUDA run beside those of Triton."""
    return torch.cuda.is_available() and _backends.cuda_for(torch.device("cuda", 0)) is not None


def places() -> Iterator[Place]:
    """Every implementation that is here; on a machine with a GPU those of the GPU too."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        yield Place("reference", "", device, "panel")
    for level in _levels():
        yield from (Place("cpp", level, "cpu", regime) for regime in ("rows", "panel"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with_triton = not _backends._why_no_triton()
    if with_triton:  # in its interpreter `rows` and `fused` are the same launch
        few = ["rows"] if device.type == "cuda" else []
        yield from (Place("triton", "", device.type, regime) for regime in (*few, "fused", "panel"))
    if _with_cuda():
        yield Place("cuda", "", "cuda", "rows")


PLACES = list(places())


def fastest(backends: Sequence[str]) -> list[Place]:
    """What runs where nobody chooses: per device the best implementation, and the regime of the plan."""
    native = "cpp" if _levels() and "cpp" in backends else "reference"
    found = [Place(native, "", "cpu", "auto")]
    if torch.cuda.is_available():
        gpu = "triton" if "triton" in backends and not _backends._why_no_triton() else "reference"
        gpu = "cuda" if "cuda" in backends and _with_cuda() else gpu
        found.append(Place(gpu, "", "cuda", "auto"))
    return found


class Primitive(ABC):
    """What a primitive states; `stem_linear` and `stem_weight` are found among the public functions by its stem.

    Attributes:
        stem: its name in every place.
        precise: arguments that stay in float32 (float64 for float64 genes) whatever the others are.
        backends: what computes it; contracts run at each that is here.
        forms_weight: whether products are made with a weight in full precision, rounded once, so that all
            implementations agree on its bits; False where the factors are contracted with x.
    """

    stem: str
    precise: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("reference", "cpp", "triton", "cuda")
    forms_weight = True

    @abstractmethod
    def arguments(self, sizes: Sizes, draw: Callable[..., Tensor]) -> Given:
        """All arguments of `stem_linear` by name, x first; `draw(*shape)` gives normal float64 values."""

    @abstractmethod
    def dense(self, **factors: Any) -> tuple[Tensor, Tensor | None]:
        """Weight `[O, I]` and bias, by plain PyTorch, from all arguments but x; differentiable."""

    @abstractmethod
    def layer(self, bank: plg.nn.GeneBank, inner: int, out: int, level: int, **options: Any) -> nn.Module:
        """The layer at one level of a network; all levels share genes."""

    def operators(self, given: Given) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Arguments of every registered operator of the primitive; of operators with accumulators, zeros for these."""
        yield from ()

    @abstractmethod
    def factors(self, layer: nn.Module) -> Given:
        """The arguments of `dense` that a layer stands for: its own tensors and the Parameters of its bank."""

    # What follows is the same for all.

    def linear(self, given: Given) -> Tensor:
        return getattr(plg.functional, f"{self.stem}_linear")(**given)

    def weight(self, given: Given) -> Tensor:
        return getattr(plg.functional, f"{self.stem}_weight")(**of_weight(given))

    def oracle(self, given: Given) -> Tensor:
        """The dense layer in float64."""
        wide = mapped(given, lambda name, tensor: tensor.double())
        return F.linear(wide.pop("x"), *self.dense(**wide))

    def composition(self, given: Given) -> Tensor:
        """The ruler: a weight in the work dtype, rounded to x's, then `F.linear` in x's dtype."""
        x = given["x"]
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = mapped({n: v for n, v in given.items() if n != "x"}, lambda name, tensor: tensor.to(work))
        weight, bias = self.dense(**wide)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def make(
        self, sizes: Sizes, dtype: torch.dtype, device: str = "cpu", gene_dtype: torch.dtype | None = None
    ) -> Given:
        """Arguments of some size: x in one dtype, genes in another, precise ones in the work dtype."""
        stored = gene_dtype or dtype
        work = torch.float64 if stored == torch.float64 else torch.float32

        def convert(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if name == "x" else work if name in self.precise else stored)

        return mapped(self.arguments(sizes, lambda *shape: torch.randn(*shape, dtype=torch.float64)), convert)


def mapped(given: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> Given:
    """Change every tensor; lists stay lists."""
    return {
        name: [change(name, tensor) for tensor in value] if isinstance(value, list) else change(name, value)
        for name, value in given.items()
    }


def of_weight(given: Given) -> Given:
    """The arguments that make the weight."""
    return {name: value for name, value in given.items() if name not in ("x", "bias")}


def leaves(given: Given) -> list[Tensor]:
    """Every tensor in the order of the arguments."""
    return [tensor for value in given.values() for tensor in (value if isinstance(value, list) else [value])]


def tracked(given: Given) -> Given:
    """The same values and layouts, each a leaf that requires a gradient."""
    return mapped(given, lambda name, tensor: tensor.detach().requires_grad_())


def gradients(fn: Callable[[Given], Tensor], given: Given, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Result and gradients of every argument for one upstream gradient."""
    inputs = tracked(given)
    y = fn(inputs)
    return y.detach(), list(torch.autograd.grad(y, leaves(inputs), dy.to(y.dtype)))


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error against the largest value: sums of many terms have no meaningful relative error each."""
    assert got.shape == expected.shape
    if expected.numel():
        error = (got.double() - expected.double()).abs().max().item()
        assert error <= tolerance * max(1.0, expected.abs().max().item()), error


class Base:
    """What the parts of the contract share; `primitive` is the subclass's."""

    primitive: Primitive
    # Triton's own: its interpreter turns arrays of one element into loop bounds.
    pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`place` runs over the primitive's implementations, `device` over those that run where nobody chooses."""
        backends = metafunc.cls.primitive.backends
        if "place" in metafunc.fixturenames:
            here = [place for place in PLACES if place.backend in backends]
            metafunc.parametrize("place", here, ids=str, indirect=True)
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", fastest(backends), ids=lambda place: place.device, indirect=True)

    @staticmethod
    def skip_truncation(place: Place, *dtypes: torch.dtype) -> None:
        if place.interpreted and torch.bfloat16 in dtypes:
            pytest.skip("Triton's interpreter truncates where the hardware rounds to bfloat16")

    @pytest.fixture
    def place(self, request: pytest.FixtureRequest) -> Iterator[Place]:
        with request.param.use():
            yield request.param

    @pytest.fixture
    def device(self, request: pytest.FixtureRequest) -> Iterator[str]:
        with request.param.use():
            yield request.param.device
