# SPDX-License-Identifier: Apache-2.0
"""What every expansion layer shares: its coefficients, its reference to the bank, and the dense views.

Genes, gradients and low-precision copies are the bank's; what a layer computes with its tensors is in the layer's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene._ops.expansion import write_stack
from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.functional._context import autocast_enabled, check_pair, check_storages
from pylearngene.nn._view import WeightView, count_synthesis
from pylearngene.nn.bank import GeneBank


class ExpansionModule(nn.Module):
    """Coefficients and bank reference of a gene-backed layer; what it computes is the subclass's.

    Genes whose fixed coefficient is 0 are not read, as far as those that are read lie evenly (one alone, every second):
    a NaN in them does not show, and sums of nothing but -0 keep their sign. Their gradient is zeros. Which those are is
    known of coefficients that the layer was given; where something else stands in the place of `coeffs`, or has been
    written into it, all genes are read. Writes through `.data` are not seen, for torch does not count them, and
    compiled graphs know what was so when they were traced: there, fixed coefficients change by `set_coeffs`. Genes that
    are results of other tensors are all read while they are trained.

    Attributes:
        name: of the layer's genes in the bank.
        group_names: names of its groups in the bank: `name` itself, where there is one.
        coefficient_names: which of its own tensors say how genes are combined; what else it has is outside.
        origin: the plain layer in whose place a host has put this one, without values, in a tuple; or empty.
    """

    coeffs: Tensor
    coefficient_names: ClassVar[tuple[str, ...]] = ("coeffs",)
    origin: tuple[nn.Module, ...] = ()
    _made: tuple[Tensor | None, int] = (None, -1)

    def __init__(self, bank: GeneBank, name: str, coeffs: Sequence[float] | Tensor, learn_coeffs: bool) -> None:
        super().__init__()
        if not isinstance(bank, GeneBank):
            raise ArgumentError(f"bank: expected a GeneBank, got {type(bank).__name__}")
        self._bank = (bank,)  # in a tuple: the bank is registered once, at the model's root, not in every layer
        self.name = name
        self.group_names: tuple[str, ...] = (name,)
        self.learn_coeffs = learn_coeffs
        self._take(finite_values(coeffs))

    def _take(self, values: tuple[float, ...]) -> None:
        """Remember the coefficients, and which genes they leave anything of."""
        self._values = values
        self._used = None if self.learn_coeffs else used_genes(values)

    def _from_bank(self, group: str, x: Tensor | None = None, **options: Any) -> Any:
        """What the bank makes of one of the layer's groups with the layer's coefficients."""
        bank, coeffs = self._bank[0], self._ready_coeffs()
        # A graph that several layers share must not depend on which genes one of them has times 0.
        used = None if torch.compiler.is_compiling() and not bank.in_one_graph() else self._used
        if used is not None:
            buffer = self._buffers.get("coeffs")
            if buffer is None or (coeffs is buffer and not self._as_made()):
                used = None
        call = bank.forward if bank.unhooked() else bank
        return call(group, coeffs, x, used, **options)

    def _coeffs_at_once(self) -> Tensor | None:
        """The coefficients where the short way may be asked: the bank is called as it is, all genes are read."""
        if torch.compiler.is_compiling():  # first: a graph must not depend on what differs between layers
            return None
        if self._used is not None or not self._bank[0].plain():
            return None
        return (self._parameters if self.learn_coeffs else self._buffers).get("coeffs")

    def _as_made(self) -> bool:
        """Whether `coeffs` is the buffer that was made of the remembered coefficients, and holds them still."""
        buffer, version = self._made
        if buffer is None or self._buffers.get("coeffs") is not buffer:
            return False
        return not buffer.requires_grad and unwritten(buffer, version)

    def _hold(self, buffer: Tensor) -> None:
        """Take a buffer that holds the remembered coefficients."""
        self._buffers["coeffs"] = buffer
        self._made = (buffer, -1 if buffer.is_inference() else buffer._version)

    def _place_coeffs(self) -> None:
        like = self.first_gene
        value = self._coeff_tensor(like.dtype, like.device)
        if self.learn_coeffs:
            self.coeffs = nn.Parameter(value)
        else:
            self.register_buffer("coeffs", value, persistent=False)
            self._hold(value)

    @property
    def first_gene(self) -> Tensor:
        """A gene of the layer, for the dtype and device of them all."""
        bank, name = self._bank[0], self.group_names[0]
        group: Any = bank._groups.get(name)
        gene: Tensor = (bank.group(name) if group is None else group).first
        return gene

    def _coeff_tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        work = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor(self._values, dtype=work, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = self.coeffs.detach().clone() if self.learn_coeffs else None
        if exact is None and not self.coeffs.is_meta and not self._as_made():
            self._take(tuple(self.coeffs.tolist()))  # written into by others: now these are the layer's
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is None:  # fixed coefficients are structure, not state: exact in every dtype, never empty
            with torch.inference_mode(False):
                self._hold(self._coeff_tensor(self.coeffs.dtype, self.coeffs.device))
        elif self.coeffs.dtype in _checks.HALF:  # learned ones stay in float32 while genes go to 16 bits
            self.coeffs.data = exact.to(self.coeffs.device, torch.float32)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "coeffs" or self.learn_coeffs:
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and (value.is_meta or self.coeffs.is_meta):
            # Loaders fill buffers that no file holds with empty memory.
            self._hold(self._coeff_tensor(value.dtype, value.device))
        elif isinstance(value, Tensor) and value.requires_grad:
            raise ArgumentError(
                "coeffs: expected values, as for set_coeffs (learn_coeffs=True makes a Parameter of them), "
                "got a tensor that requires a gradient"
            )
        else:
            self.set_coeffs(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": (self._made[0] if self._as_made() else None, -1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._made[0] is not None:  # a copy counts its own writes
            self._hold(self._made[0])

    def reset_parameters(self) -> None:
        """Give the coefficients the values the layer was made with (after `to_empty`, for instance)."""
        self.set_coeffs(self._values)

    def _ready_coeffs(self) -> Tensor:
        """The coefficients where the genes are: loading with `assign=True` moves genes off the meta device alone."""
        found = self._buffers.get("coeffs")  # quicker than to ask the module
        coeffs = self.coeffs if found is None else found
        if not self.learn_coeffs:
            device = self.first_gene.device
            if coeffs.device != device and (coeffs.is_meta or self._as_made()):
                coeffs = self._coeff_tensor(coeffs.dtype, device)
                # An inference tensor would be of no use to training, one of a graph to nobody.
                if not torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():
                    self._hold(coeffs)
        return coeffs

    @property
    def bank(self) -> GeneBank:
        """The bank that owns this layer's genes."""
        return self._bank[0]

    def set_coeffs(self, coeffs: Sequence[float] | Tensor) -> None:
        """Replace the coefficients in place.

        Args:
            coeffs: K numbers, one for each of the layer's genes.

        Raises:
            ShapeError: there are not K of them.
            ArgumentError: one of them is NaN or infinite, or they are no numbers.
        """
        values = finite_values(coeffs)
        genes = self._bank[0].group(self.group_names[0]).num_genes
        if len(values) != genes:
            raise ShapeError(f"coeffs: expected {genes} numbers, got {len(values)}")
        self._take(values)
        # Also where the caller trains nothing, what is made here must be of use to training.
        with torch.inference_mode(False), torch.no_grad():
            fresh = self._coeff_tensor(self.coeffs.dtype, self.coeffs.device)
            keeps = len(self.coeffs) == genes and not self.coeffs.is_inference()
            if keeps:
                self.coeffs.copy_(fresh)
            if not self.learn_coeffs:
                self._hold(self.coeffs if keeps else fresh)
            elif not keeps:
                self.coeffs = nn.Parameter(fresh, self.coeffs.requires_grad)

    def dense(self, group: str) -> tuple[Tensor, Tensor | None]:
        """The full weight and bias of one of the layer's groups, in the genes' dtype and orientation."""
        count_synthesis()
        pair: tuple[Tensor, Tensor | None] = self._from_bank(group)
        return pair

    def _coeff_repr(self) -> str:
        shown = self._values if self.coeffs.is_meta or self._as_made() else self.coeffs.detach().tolist()
        return f"name={self.name!r}, coeffs=[{', '.join(f'{c:.4g}' for c in shown)}]"


class ExpansionLayer(ExpansionModule):
    """A gene-backed layer with one group of genes: a weight, and perhaps a bias."""

    @property
    def weight(self) -> WeightView:
        """Reads like the plain layer's weight; shape, dtype and device are free, use synthesizes."""
        return WeightView(self.dense_weight, self._bank[0].group(self.name).weights())

    @property
    def bias(self) -> WeightView | None:
        """Reads like the plain layer's bias; None where there is none."""
        genes = self._bank[0].group(self.name).biases()
        return WeightView(self._dense_bias, genes) if genes else None

    def dense_weight(self) -> Tensor:
        """The full weight `sum_k c_k G_k`, in the genes' dtype; differentiable."""
        count_synthesis()
        weight: Tensor = self._from_bank(self.name, part="weight")
        return weight

    def dense_bias(self) -> Tensor | None:
        """The full bias `sum_k c_k b_k`, or None."""
        bias: Tensor | None = self._from_bank(self.name, part="bias")
        return bias

    def _dense_bias(self) -> Tensor:
        bias = self.dense_bias()
        assert bias is not None
        return bias

    def _fill(self, plain: nn.Module) -> None:
        """Copy the dense tensors into a plain layer."""
        with torch.no_grad():
            plain.weight.copy_(self.dense_weight())  # type: ignore[operator]
            bias = self.dense_bias()
            if bias is not None:
                plain.bias.copy_(bias)  # type: ignore[operator]


class ExpansionVectors(ExpansionLayer):
    """A layer whose genes are vectors over the channels of x: they are expanded whole."""

    def _expanded(self, x: Tensor, channels: int, axis: int) -> tuple[Tensor, Tensor | None]:
        """The gain and the bias for x, in its dtype unless autocast decides."""
        check_channels(x, self.first_gene, channels, axis)
        gain, bias = self._from_bank(self.name)
        if gain.dtype != x.dtype and not autocast_enabled(x):
            gain, bias = gain.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return gain, bias


def check_channels(x: Tensor, gene: Tensor, channels: int, axis: int) -> None:
    """Refuse what a layer with a number per channel cannot be given; channels are the last axis, or axis 1."""
    _checks.tensor(x, "x")
    _checks.floating(x, "x")
    if axis == -1:
        _checks.last_dim(x, "x", channels, "N")
    elif x.dim() < 2 or x.shape[1] != channels:
        raise ShapeError(f"x: expected shape [B, C, *] with C = {channels}, got {list(x.shape)}")
    check_storages(x=x)
    _checks.same_device(x, "x", gene, "the genes")
    check_pair(x, gene)


@torch.no_grad()
def write_dense(
    layers: Sequence[ExpansionModule], group: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """Write the full weights and biases of layers that share a group of genes; each gene is read once for all of them.

    Args:
        layers: L layers of one bank.
        group: one of their groups.
        weights: L tensors in the shape of the genes.
        biases: L tensors, or None where nothing is to be written.
    """
    genes = layers[0].bank.group(group)
    coeffs = torch.stack([layer._ready_coeffs() for layer in layers])
    write_stack(weights, genes.weights(), coeffs)
    wanted = [index for index, bias in enumerate(biases) if bias is not None]
    if genes.biases() and wanted:
        write_stack([bias for bias in biases if bias is not None], genes.biases(), coeffs[wanted])
    for _ in layers:
        count_synthesis()


def finite_values(coeffs: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Coefficients as floats; none at all, NaN, Inf and what is no list of numbers are refused."""
    expected = "coeffs: expected a sequence of numbers, one per gene"
    given: Any = coeffs
    if isinstance(coeffs, Tensor):
        if coeffs.dim() != 1 or coeffs.is_complex() or coeffs.is_meta:
            kind = f"{_checks.short(coeffs.dtype)} on {coeffs.device}"
            raise ArgumentError(f"{expected}, got a tensor of shape {list(coeffs.shape)}, {kind}")
        coeffs = coeffs.detach().double().cpu().tolist()
    if isinstance(given, str | bytes) or (isinstance(given, list | tuple) and any(isinstance(c, str) for c in given)):
        raise ArgumentError(f"{expected}, got text: {given!r}")
    try:
        values = tuple(float(value) for value in coeffs)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"{expected}, got {type(coeffs).__name__} ({error})") from error
    if not values:
        raise ArgumentError("coeffs: expected at least one coefficient, got none")
    for k, value in enumerate(values):
        if not math.isfinite(value):
            raise ArgumentError(f"coeffs[{k}]: expected a finite number, got {value}")
    return values


def unwritten(tensor: Tensor, version: int) -> bool:
    """Whether a tensor has this version; False where writes are not counted."""
    return not tensor.is_inference() and tensor._version == version


# Answered once, while a graph is traced: it can hold no version.
unwritten._dynamo_marked_constant = True  # type: ignore[attr-defined]


def used_genes(values: Sequence[float]) -> slice | None:
    """The smallest even selection of genes that holds all with a coefficient other than 0; None where that is all."""
    used = [k for k, value in enumerate(values) if value != 0] or [0]
    step = math.gcd(*(k - used[0] for k in used)) or 1
    chosen = slice(used[0], used[-1] + 1, step)
    return None if len(range(len(values))[chosen]) == len(values) else chosen


def size(value: int, name: str) -> int:
    """A size of a layer: an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"{name}: expected an int of at least 0, got {value!r}")
    return value


def normalized_size(normalized_shape: int | Sequence[int], elementwise_affine: bool) -> int:
    """The one size N over which a norm with a gain works."""
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if len(sizes) != 1:
        raise ArgumentError(f"normalized_shape: expected one size, got {list(sizes)}")
    if not elementwise_affine:
        raise ArgumentError("elementwise_affine: expected True (there is nothing to expand otherwise), got False")
    return size(sizes[0], "normalized_shape")
