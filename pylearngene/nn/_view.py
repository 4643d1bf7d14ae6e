# SPDX-License-Identifier: Apache-2.0
"""What `.weight` of a gene-backed layer reads as: cheap questions are free, real use synthesizes.

Model code asks layers for `weight.dtype` or `weight.device`; those must not build a weight. A counter tells tests how
many full weights were built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pylearngene.errors import ArgumentError

_syntheses = 0


def dense_syntheses() -> int:
    """How many full weights gene-backed layers have built in this process (`dense_weight`, uses of `.weight`).

    Example:
        >>> import pylearngene as plg
        >>> before = plg.nn.dense_syntheses()
        >>> plg.nn.dense_syntheses() - before
        0
    """
    return _syntheses


def count_synthesis() -> None:
    """Record that one full weight is being built."""
    global _syntheses
    _syntheses += 1


class WeightView:
    """A weight that is not there: shape, dtype and device are known, values are synthesized when used.

    `view.dtype`, `.device`, `.shape`, `.ndim`, `.size()`, `.numel()`, `.dim()` and `.requires_grad` cost nothing. As
    the argument of a torch function, in arithmetic, or for any other tensor attribute, the full weight is built and
    then dropped. Writing into it is refused: the genes are what can be changed.

    Args:
        synthesize: makes the full tensor.
        genes: what it is made of, for dtype, device and `requires_grad`.
        shape: of the weight, where it is not that of a gene.

    Raises:
        ArgumentError: an in-place operation was asked for.
    """

    __slots__ = ("_genes", "_like", "_shape", "_synthesize")

    def __init__(
        self, synthesize: Callable[[], Tensor], genes: Sequence[Tensor], shape: Sequence[int] | None = None
    ) -> None:
        self._synthesize = synthesize
        self._genes = genes
        self._like = genes[0]
        self._shape = genes[0].shape if shape is None else torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """The genes' dtype."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The genes' device."""
        return self._like.device

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self._shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._shape)

    @property
    def requires_grad(self) -> bool:
        """Whether any of the genes is trained."""
        return any(gene.requires_grad for gene in self._genes)

    @property
    def data(self) -> WeightView:
        """The view itself: there is nothing behind it to write to."""
        return self

    @property
    def is_cuda(self) -> bool:
        """Whether the genes are on a CUDA device."""
        return self._like.is_cuda

    @property
    def is_meta(self) -> bool:
        """Whether the genes hold no data."""
        return self._like.is_meta

    def size(self, dim: int | None = None) -> Any:
        """As `Tensor.size`."""
        return self._shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        """As `Tensor.dim`."""
        return len(self._shape)

    def numel(self) -> int:
        """As `Tensor.numel`."""
        return self._shape.numel()

    def is_floating_point(self) -> bool:
        """True."""
        return True

    def dense(self) -> Tensor:
        """The full weight, synthesized now."""
        return self._synthesize()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        _refuse_writes(name)
        return getattr(self._synthesize(), name)

    def __len__(self) -> int:
        return self._shape[0]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense().detach().numpy().__array__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"WeightView(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _refuse_writes(getattr(function, "__name__", ""))
        dense = torch.utils._pytree.tree_map(lambda v: v.dense() if isinstance(v, WeightView) else v, (args, kwargs))
        return function(*dense[0], **(dense[1] or {}))


def _refuse_writes(name: str) -> None:
    if name.endswith("_") and not name.endswith("__"):
        raise ArgumentError(f"weight: expected a change of the genes or of the coefficients, got {name} on their sum")


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: WeightView, *others: Any) -> Any:
        return getattr(self.dense(), name)(*(o.dense() if isinstance(o, WeightView) else o for o in others))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg", "getitem"):
    setattr(WeightView, f"__{_name}__", _operator(f"__{_name}__"))
