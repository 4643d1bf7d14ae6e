# SPDX-License-Identifier: Apache-2.0
"""`LowRankLinear`: a drop-in layer whose directions are shared and whose strengths are its own, and its group of genes.

The group holds U and V; strengths, gate and bias belong to the layer. Products and their autograd are PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.errors import ArgumentError
from pylearngene.functional._context import autocast, check_pair, check_storages
from pylearngene.functional._low_rank_functions import factored, synthesized
from pylearngene.functional._tap import Tap
from pylearngene.functional._tapped import TracedReads, tapped, traced_reads
from pylearngene.functional.low_rank import check_samples, check_strengths, strengths
from pylearngene.nn._group import GeneGroup
from pylearngene.nn._layer import size
from pylearngene.nn._view import WeightView, count_synthesis
from pylearngene.nn.bank import GeneBank


class LowRankGroup(GeneGroup):
    """The two genes of one layer position: the directions U and V.

    Args:
        out_features: O.
        in_features: I.
        rank: R.
        device, dtype: of the genes.

    Attributes:
        u: Parameter `[O, R]`.
        v: Parameter `[I, R]`.
        num_genes: 2.
    """

    primitive = "low_rank"
    letters = "(out, in, rank)"
    num_genes = 2

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def sizes(self) -> tuple[Any, ...]:
        """O, I and R."""
        return len(self.u), len(self.v), self.u.shape[1]

    def tensors(self) -> list[Tensor]:
        """U and V."""
        return [self.u, self.v]

    def plain_shapes(self) -> list[tuple[int, ...]]:
        """`[O, I]`; biases are the layers' own."""
        return [(len(self.u), len(self.v))]

    def named_genes(self) -> Iterator[tuple[str, nn.Parameter]]:
        """U as `("u", Parameter)`, then V."""
        yield from (("u", self.u), ("v", self.v))

    def reset_parameters(self) -> None:
        """Normal columns of length one on average, so that with equal strengths W has their size in all directions."""
        for gene in (self.u, self.v):
            if gene.numel():
                nn.init.normal_(gene, std=len(gene) ** -0.5)

    def compute(
        self,
        bank: GeneBank,
        name: str,
        s: Tensor,
        x: Tensor | None = None,
        gate: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Apply the group to x, or synthesize the weight.

        Args:
            bank: the bank that owns the group.
            name: what it is called there.
            s: `[R]`.
            x: `[*, I]`; None asks for the weight instead.
            gate: None, `[R]`, or `[B, R]`.
            bias: None or `[O]`.

        Returns:
            `[*, O]`, or the weight.

        Raises:
            DTypeError: a gene is a tensor subclass; x, s or gate is not a plain floating tensor, or float64 is mixed
                with another dtype.
            ShapeError: x does not have I columns, s not R numbers, or gate is neither `[R]` nor `[B, R]`.
            DeviceError: x, s or gate is not where the genes are, or a tensor reaches past its storage.
        """
        u, v = genes = self.tensors()
        for gene in genes:
            _checks.tensor(gene, "genes")
        check_strengths(s, gate, u, u.shape[1])
        dtype = u.dtype
        if x is not None:
            _checks.tensor(x, "x")
            _checks.floating(x, "x")
            _checks.last_dim(x, "x", len(v), "I")
            _checks.same_device(x, "x", u, "the genes")
            check_samples(gate, x)
            x = autocast(x)
            check_pair(x, u)
            dtype = x.dtype
        check_storages(x=x, u=u, v=v, s=s, gate=gate, bias=bias)
        tap = bank.tap(name, self)
        strength = strengths(u, s, gate)
        if isinstance(tap, TracedReads):
            u, v = tap.read(dtype)
        else:
            genes = genes if x is None else bank.readable(name, genes, dtype, tap)
            u, v = tapped(tap, genes) if isinstance(tap, Tap) else genes
        return synthesized(u, strength, v) if x is None else factored(x, u, strength, v, bias)

    def traced_tap(self) -> TracedReads | None:
        """The genes of a compiled graph, where their sums would be in 16 bits."""
        return traced_reads(self.tensors())

    def extra_repr(self) -> str:
        """Shapes of U and V, in one line."""
        out_features, in_features, rank = self.sizes
        return f"u of {out_features}x{rank}, v of {in_features}x{rank}"


class LowRankLinear(nn.Module):
    """A Linear layer whose directions are shared with other layers, and whose strengths are its own.

    `y = ((x V) * s * gate) U^T + b`, which is `x W^T + b` with `W = U diag(s * gate) V^T`.

    The `[O, I]` weight is never built, in neither pass. U and V are genes and live in the bank, once; `s`, the gate and
    the bias are Parameters of the layer, as the papers have them. `parameters()` and `.to()` of the layer reach these
    alone: for the genes use those of the model, where the bank is registered.

    Args:
        in_features: I.
        out_features: O.
        bias: whether the layer has a bias of its own.
        device, dtype: of genes that this call creates, and of the bias.
        bank: the bank that owns the genes.
        name: the group in the bank; layers with one name share genes. Created if absent.
        rank: R.
        gate: whether the layer has a gate of its own, of ones at first; another one can come with every call.

    Attributes:
        s: Parameter `[R]`, in float32 (float64 for float64 genes) whatever the model's dtype.
        gate: Parameter `[R]` in the same dtype, or None.
        bias: Parameter `[O]`, or None.
        coefficient_names: which of these say how genes are combined, for `plg.freeze` and `plg.param_groups`.

    Raises:
        ArgumentError: not a bank, a size below 0, or a name that belongs to a group of another primitive.
        ShapeError: the group exists with other sizes.

    Numerics, backends and source: as `plg.functional.low_rank_linear`. Gradients of U and V are summed over layers in
    float32 and rounded once; they cannot be differentiated again (DoubleBackwardError), all others can.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> layers = [plg.nn.LowRankLinear(4, 3, bank=bank, name="fc", rank=2) for _ in range(6)]
        >>> x = torch.ones(2, 4)
        >>> torch.allclose(layers[5](x), layers[5].to_dense()(x), atol=1e-6), len(list(bank.parameters()))
        (True, 2)
    """

    coefficient_names: ClassVar[tuple[str, ...]] = ("s", "gate")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bank: GeneBank,
        name: str,
        rank: int,
        gate: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(bank, GeneBank):
            raise ArgumentError(f"bank: expected a GeneBank, got {type(bank).__name__}")
        self.in_features = size(in_features, "in_features")
        self.out_features = size(out_features, "out_features")
        self.rank = size(rank, "rank")
        self._bank = (bank,)  # in a tuple: the bank is registered once, at the model's root, not in every layer
        self.name = name
        like = bank.add_group(name, LowRankGroup, out_features, in_features, rank, device=device, dtype=dtype).u
        work = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.s = nn.Parameter(torch.empty(rank, device=like.device, dtype=work))
        self.gate = nn.Parameter(torch.empty_like(self.s)) if gate else None
        self.bias = nn.Parameter(torch.empty(out_features, device=like.device, dtype=like.dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Strengths for which W starts with the variance of a fresh `nn.Linear`, a gate of ones, and its bias."""
        nn.init.constant_(self.s, math.sqrt(self.out_features / (3 * max(1, self.rank))))
        if self.gate is not None:
            nn.init.ones_(self.gate)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Apply the layer: x `[*, I]` -> `[*, O]`.

        Args:
            x: the input.
            gate: `[R]`, or `[B, R]` with one row per sample, in place of the layer's own.
        """
        y: Tensor = self._bank[0](self.name, self.s, x, self._chosen(gate), self.bias)
        return y

    def _chosen(self, gate: Tensor | None) -> Tensor | None:
        return self.gate if gate is None else gate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: own.detach().clone() for name, own in (("s", self.s), ("gate", self.gate)) if own is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            own = getattr(self, name)
            if own.dtype in _checks.HALF:  # they stay in float32 beside 16-bit genes
                own.data = value.to(own.device, torch.float32)
        return self

    @property
    def bank(self) -> GeneBank:
        """The bank that owns this layer's genes."""
        return self._bank[0]

    @property
    def weight(self) -> WeightView:
        """Reads like the plain layer's weight; shape, dtype and device are free, use synthesizes."""
        genes: list[Tensor] = self._bank[0].group(self.name).tensors()
        return WeightView(self.dense_weight, genes, (self.out_features, self.in_features))

    def dense_weight(self, gate: Tensor | None = None) -> Tensor:
        """The full weight `U diag(s * gate) V^T`, in the genes' dtype; differentiable.

        Args:
            gate: `[R]`, or `[B, R]` for the weights `[B, O, I]` of the samples, in place of the layer's own.
        """
        count_synthesis()
        weight: Tensor = self._bank[0](self.name, self.s, None, self._chosen(gate))
        return weight

    def to_dense(self) -> nn.Linear:
        """A plain `nn.Linear` with the same function, for the layer's own gate."""
        like = self.weight
        plain = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=like.device, dtype=like.dtype
        )
        with torch.no_grad():
            plain.weight.copy_(self.dense_weight())
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain

    def extra_repr(self) -> str:
        """Sizes and group, in one line."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, rank={self.rank}, gate={self.gate is not None}, name={self.name!r}"
