# SPDX-License-Identifier: Apache-2.0
"""`ExpansionGroup`: the K genes of one layer position of `expansion`, and what the bank computes with them.

The layers that hold the coefficients are in `expansion.py` and beside it; kernels and autograd are below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene._ops import expansion_direct as _direct
from pylearngene._ops.expansion import accumulator
from pylearngene._ops.expansion_products import Conv2d
from pylearngene.errors import ArgumentError
from pylearngene.functional import _expansion_calls as _calls
from pylearngene.functional._context import autocast, autocast_enabled, check_pair
from pylearngene.functional._expansion_conv import check_image, convolve
from pylearngene.functional._tap import Tap
from pylearngene.functional.expansion import MAX_GENES, check_coeffs
from pylearngene.nn._group import GeneGroup

if TYPE_CHECKING:
    from pylearngene.nn.bank import GeneBank

# The keys of K genes, for every K.
_KEYS = [tuple(map(str, range(count))) for count in range(MAX_GENES + 1)]


class ExpansionGroup(GeneGroup):
    """The K genes of one layer position: weights, and biases where the layer has one.

    Args:
        num_genes: K, from 1 to 64.
        weight_shape: `[O, I]`, `[O, C/groups, kh, kw]` for a convolution, or `[N]` for a norm.
        bias_shape: `[O]`, or None.
        device, dtype: of the genes.

    Attributes:
        weight: K Parameters.
        bias: K Parameters, or None.

    Raises:
        ArgumentError: K is not in 1..64.
    """

    primitive = "expansion"
    letters = "(genes, weight, bias)"

    def __init__(
        self,
        num_genes: int,
        weight_shape: Sequence[int],
        bias_shape: Sequence[int] | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_count(num_genes, 1)

        def parameters(shape: Sequence[int]) -> nn.ParameterList:
            return nn.ParameterList(
                nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype)) for _ in range(num_genes)
            )

        self.num_genes = num_genes
        self.weight = parameters(weight_shape)
        self.bias = None if bias_shape is None else parameters(bias_shape)
        self.reset_parameters()

    @property
    def sizes(self) -> tuple[Any, ...]:
        """K and the shapes of weight and bias."""
        bias = None if self.bias is None else tuple(self.bias[0].shape)
        return self.num_genes, tuple(self.weight[0].shape), bias

    def reset_parameters(self) -> None:
        """Each gene like a fresh layer's: uniform for products; ones then zeros, and zeros, for a norm."""
        for k, gene in enumerate(self.weight):
            if gene.dim() == 1:
                nn.init.constant_(gene, 1.0 if k == 0 else 0.0)
            elif gene.numel():
                nn.init.kaiming_uniform_(gene, a=math.sqrt(5))
        fan_in = math.prod(self.weight[0].shape[1:]) if self.weight[0].dim() > 1 else 0
        for gene in self.bias or ():
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(gene, -bound, bound)

    @property
    def first(self) -> Tensor:
        """The first weight gene."""
        gene: Tensor | None = self._modules["weight"]._parameters.get("0")  # type: ignore[union-attr]
        return self.weights()[0] if gene is None else gene

    def weights(self) -> list[Tensor]:
        """The weight genes in order (quicker than iterating over the ParameterList)."""
        return _in_order(self._modules["weight"], self.num_genes)

    def biases(self) -> list[Tensor]:
        """The bias genes; none where the layer has no bias."""
        biases = self._modules.get("bias")
        return [] if biases is None else _in_order(biases, self.num_genes)

    def tensors(self) -> list[Tensor]:
        """All genes, weights first."""
        return self.weights() + self.biases()

    def plain_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of a weight gene and of a bias gene."""
        _, weight, bias = self.sizes
        return [weight] if bias is None else [weight, bias]

    def named_genes(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every gene as `("weight.0", Parameter)`, weights first."""
        for part, genes in (("weight", self.weight), ("bias", self.bias or ())):
            for k, gene in enumerate(genes):
                yield f"{part}.{k}", gene

    def grow(self, num_genes: int) -> None:
        """Add genes of zeros after those it has, so that there are `num_genes`.

        Raises:
            ArgumentError: `num_genes` is no int, below what the group has or above 64.
        """
        _check_count(num_genes, self.num_genes)
        with torch.inference_mode(False):  # a caller who trains nothing now may train them later
            for genes in (self.weight, self.bias):
                if genes is not None:
                    genes.extend(nn.Parameter(torch.zeros_like(genes[0])) for _ in range(num_genes - self.num_genes))
        self.num_genes = num_genes

    def compute(
        self,
        bank: GeneBank,
        name: str,
        coeffs: Tensor,
        x: Tensor | None = None,
        used: slice | None = None,
        part: str = "both",
        conv: Conv2d | None = None,
    ) -> Any:
        """Apply the group to x, or expand its tensors.

        Args:
            bank: the bank that owns the group.
            name: what it is called there.
            coeffs: `[K]`.
            x: `[*, I]`, for a convolution `[B, C, H, W]` or `[C, H, W]`; None asks for the expanded tensors instead.
            used: the genes to read, where all others have coefficient 0; None for all. All are read where nothing
                else would tell autograd of the others.
            part: which of them: "weight", "bias" or "both".
            conv: settings of a convolution, for genes `[O, C/groups, kh, kw]`.

        Returns:
            `[*, O]`, or the image; or the weight, the bias (None where there is none), or the pair of them.

        Raises:
            ArgumentError: there is no such part.
            DTypeError: x is not a plain floating tensor, or float64 is mixed with another dtype.
            ShapeError: x does not have I columns or C channels, is smaller than the kernel, or coeffs is not `[K]`.
            DeviceError: x or the coefficients are not where the genes are.
        """
        weights, biases = self.weights(), self.biases()
        first = weights[0]
        if conv is None and isinstance(x, Tensor) and x.dtype == first.dtype:
            y = self._at_once(bank, name, coeffs, x, used, weights, biases)
            if y is not None:
                return y
        for gene in self.tensors():
            _checks.tensor(gene, "genes")
        check_coeffs(coeffs, weights)
        if x is None:
            return self._expand(bank, name, coeffs, part, used)
        _checks.tensor(x, "x")
        _checks.floating(x, "x")
        if conv is None:
            _checks.last_dim(x, "x", first.shape[1], "I")
        else:
            check_image(x, first.shape, conv)
        _checks.same_device(x, "x", first, "the genes")
        x = autocast(x)
        check_pair(x, first)
        tap = bank.tap(name, self)
        weights = bank.readable(name, weights, x.dtype, tap)
        if used is not None and self._may_choose(tap):
            weights, biases, coeffs, tap = weights[used], biases[used], coeffs[used], tap and tap.part(used)
        if conv is None:
            return _calls.linear(x, weights, coeffs, None, biases, None, tap)
        return convolve(conv, x, weights, coeffs, None, biases, tap)

    def at_once(self, bank: GeneBank, name: str, coeffs: Tensor, x: Any) -> Tensor | None:
        """What `compute` makes of x, of all genes, where the short way is open; else None. Nothing has been checked."""
        weights, biases = self._modules["weight"]._parameters, self._modules.get("bias")  # type: ignore[union-attr]
        first = weights.get("0")
        if first is None or not isinstance(x, Tensor):
            return None
        if x.dtype != first.dtype or _direct.casting():
            return self._cast_at_once(bank, name, coeffs, x)
        if torch.is_grad_enabled():
            return self._at_once(bank, name, coeffs, x, None, self.weights(), self.biases())
        return _direct.forward(x, weights, coeffs, None, () if biases is None else biases._parameters)

    def _at_once(
        self,
        bank: GeneBank,
        name: str,
        coeffs: Tensor,
        x: Tensor,
        used: slice | None,
        weights: list[Tensor],
        biases: list[Tensor],
    ) -> Tensor | None:
        """A product the short way, of genes that are read as they are; nothing has been checked yet."""
        genes, tap = weights + biases, None
        if used is not None:
            tap = bank.tap(name, self)
            if self._may_choose(tap):
                weights, biases, coeffs, tap = weights[used], biases[used], coeffs[used], tap and tap.part(used)
        y = _direct.forward(x, weights, coeffs, None, biases)
        if y is None or not torch.is_grad_enabled():
            return y
        if used is None:
            tap = bank.eager_tap(name, self, genes)
        return _calls.recorded(y, x, weights, coeffs, None, biases, tap)

    def _cast_at_once(self, bank: GeneBank, name: str, coeffs: Tensor, x: Tensor) -> Tensor | None:
        """As `at_once` where x or the genes are to be cast: under autocast, or of two dtypes."""
        weights, biases = self.weights(), self.biases()
        if not _direct.after_casts(x) or not x.is_floating_point():
            return None
        dtype = torch.get_autocast_dtype("cpu") if autocast_enabled(x) and x.dtype != torch.float64 else x.dtype
        if not _direct.few(x, len(weights), dtype):  # before anything is cast in vain
            return None
        x, grad = x.to(dtype), torch.is_grad_enabled()
        tap = bank.eager_tap(name, self, weights + biases) if grad else None
        weights = bank.readable(name, weights, dtype, tap)
        y = _direct.forward(x, weights, coeffs, None, biases, True)
        if y is None or not grad:
            return y
        return _calls.recorded(y, x, weights, coeffs, None, biases, tap)

    def _expand(self, bank: GeneBank, name: str, coeffs: Tensor, part: str, used: slice | None) -> Any:
        _checks.choice(part, "part", ("weight", "bias", "both"))
        tap = bank.tap(name, self)
        weights, biases = self.weights(), self.biases()
        if used is not None and self._may_choose(tap):
            weights, biases, coeffs, tap = weights[used], biases[used], coeffs[used], tap and tap.part(used)
        weight = bias = None
        if part != "bias":
            weight = _calls.weight(weights, coeffs, None, tap)
        if part != "weight" and biases:
            bias = _calls.weight(biases, coeffs, None, tap, True)
        return {"weight": weight, "bias": bias, "both": (weight, bias)}[part]

    def _may_choose(self, tap: _calls.AnyTap) -> bool:
        """Whether genes may be left out: without a tap, those that are trained would get no gradient, not even 0."""
        trained = tap is None and torch.is_grad_enabled()
        return not (trained and any(gene.requires_grad for gene in self.tensors()))

    def new_tap(self, genes: Sequence[Tensor]) -> Tap:
        """The tap of the group: it tells weights from biases."""
        return Tap(genes, self.num_genes)

    def traced_tap(self) -> _calls.TracedTap | None:
        """The tap inside a compiled graph, with its accumulators; None where no gene is trained."""
        weights, biases = self.weights(), self.biases()
        wanted = [k for k, gene in enumerate(weights) if gene.requires_grad]
        bias_wanted = [k for k, gene in enumerate(biases) if gene.requires_grad]
        if not wanted and not bias_wanted:
            return None
        genes = [weights[k] for k in wanted] + [biases[k] for k in bias_wanted]
        buffers = [accumulator(gene) for gene in genes]
        token = torch.ops.pylearngene.gene_tap(genes, buffers)
        return _calls.TracedTap(token, buffers[: len(wanted)], buffers[len(wanted) :], wanted, bias_wanted)

    def extra_repr(self) -> str:
        """Number and shape of the genes, in one line."""
        shape = "x".join(str(n) for n in self.weight[0].shape)
        return f"{self.num_genes} genes of {shape}{'' if self.bias is None else ' with bias'}"


def _check_count(num_genes: object, least: int) -> None:
    if type(num_genes) is not int or not least <= num_genes <= MAX_GENES:
        raise ArgumentError(f"num_genes: expected {least} to {MAX_GENES}, got {num_genes!r}")


def _in_order(genes: Any, count: int) -> list[Tensor]:
    """Gene k under its own number, also where pruning or a parametrization has put a plain tensor in its place."""
    have = genes._parameters
    try:
        return [have[key] for key in _KEYS[count]]
    except KeyError:
        return [genes[k] for k in range(count)]
