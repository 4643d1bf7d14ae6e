# SPDX-License-Identifier: Apache-2.0
"""How launches look to the compiler: types, alignment and constants of every argument, per kernel and launch row.

Serves compilation without a GPU; a launch on a GPU derives the same from its arguments. Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl
from pylearngene.triton_kernels._table import GROUP, MOST_GENES, Row

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Variant:
    """One specialization of a launch row.

    Attributes:
        form: which use of the kernel: "forward" or "dx", "dots" or "no dots", "rows" or "transposed".
        genes: K.
        gene: dtype of the genes.
        x: dtype of x, or of what is written.
    """

    form: str
    genes: int
    gene: str
    x: str


@dataclass
class Signature:
    """What `ASTSource` asks for: types by name, values of constants, attributes by place."""

    types: dict[str, Any] = field(default_factory=dict)
    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)

    def argument(self, name: str, kind: str, aligned: bool = True) -> None:
        """A pointer or an integer."""
        self._set((len(self.types),), aligned)
        self.types[name] = kind

    def constant(self, name: str, value: Any) -> None:
        """A compile-time value."""
        self.constants[(len(self.types),)] = value
        self.types[name] = "constexpr"

    def tuple_of(self, name: str, kind: str, count: int, aligned: bool = True) -> None:
        """A tuple of `count` pointers or integers."""
        for k in range(count):
            self._set((len(self.types), k), aligned)
        self.types[name] = (kind,) * count

    def ones(self, name: str, count: int) -> None:
        """A tuple of strides that are 1, which the launcher turns into constants."""
        for k in range(count):
            self.constants[(len(self.types), k)] = 1
        self.types[name] = ("constexpr",) * count

    def _set(self, place: tuple[int, ...], aligned: bool) -> None:
        if aligned:
            self.attributes[place] = _ALIGNED


def variants(row: Row) -> Iterator[Variant]:
    """The specializations of a row that are compiled: its most genes in two dtypes, and each use of the kernel."""
    if row.kernel in ("synthesize", "accumulate"):
        for gene, out in (("bf16", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")):
            yield Variant("rows", MOST_GENES, gene, out)
        yield Variant("transposed", MOST_GENES, "fp32", "fp32" if row.kernel == "accumulate" else "bf16")
        return
    counts = [(min(MOST_GENES, row.weight_bytes // ITEMSIZE[gene]), gene) for gene in ("bf16", "fp32")]
    forms = ("forward", "dx") if row.kernel == "fused" else ("dots", "no dots")
    for form in forms[:1] if row.irregular else forms:
        for count, gene in counts:
            yield Variant(form, count, gene, "bf16")
    if row.weight_bytes == 8:
        yield Variant("forward", 2, "bf16", "bf16")


def signature(row: Row, variant: Variant) -> Signature:
    """The signature of one launch."""
    return _BY_KERNEL[row.kernel](row, variant)


def _strides(made: Signature, variant: Variant, across: bool, odd: bool = False) -> None:
    """Strides of the genes: `across` where columns are contiguous in memory, as in a transposed view."""
    count = variant.genes
    if odd:
        made.tuple_of("gene_rows", "i32", count, aligned=False)
        made.tuple_of("gene_cols", "i32", count, aligned=False)
    elif across:
        made.ones("gene_rows", count)
        made.tuple_of("gene_cols", "i32", count)
    else:
        made.tuple_of("gene_rows", "i32", count)
        made.ones("gene_cols", count)


def _pair(made: Signature, name: str, odd: bool) -> None:
    """Row and column stride of x or dy."""
    made.argument(f"{name}_row", "i32", aligned=not odd)
    if odd:
        made.argument(f"{name}_col", "i32", aligned=False)
    else:
        made.constant(f"{name}_col", 1)


def _fused(row: Row, variant: Variant) -> Signature:
    made, count, odd = Signature(), variant.genes, row.irregular
    made.argument("y", f"*{variant.x}")
    made.argument("x", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", count, aligned=not odd)
    made.argument("coeffs", "*fp32")
    biased = variant.form == "forward"
    made.tuple_of("biases", f"*{variant.gene if biased else 'fp32'}", count if biased else 1)
    made.argument("tokens", "i32", aligned=False)
    for name in ("outs", "inner"):
        made.argument(name, "i32", aligned=not odd)
    _pair(made, "x", odd)
    _strides(made, variant, variant.form == "dx", odd)
    activation = "gelu" if biased and row.activations else "relu" if biased else None
    values = (*row.tile, GROUP, "genes" if biased else None, activation, False)
    names = ("BLOCK_OUT", "BLOCK_TOKENS", "BLOCK_INNER", "GROUP", "BIAS", "ACTIVATION", "UPCAST")
    for name, value in zip(names, values, strict=True):
        made.constant(name, value)
    return made


def _gene_gradients(row: Row, variant: Variant) -> Signature:
    made, count, odd = Signature(), variant.genes, row.irregular
    made.argument("dy", f"*{variant.x}", aligned=not odd)
    made.argument("x", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", count, aligned=not odd)
    made.tuple_of("buffers", "*fp32", count)
    for name in ("coeffs", "dots"):
        made.argument(name, "*fp32")
    made.argument("tokens", "i32", aligned=False)
    for name in ("outs", "inner"):
        made.argument(name, "i32", aligned=not odd)
    _pair(made, "dy", odd)
    _pair(made, "x", odd)
    _strides(made, variant, False, odd)
    values = (*row.tile, GROUP, 2**count - 1, variant.form != "no dots", tl.int64 if odd else tl.int32, False)
    names = ("BLOCK_OUT", "BLOCK_INNER", "BLOCK_TOKENS", "GROUP", "WANTED", "DOTS", "INDEX", "UPCAST")
    for name, value in zip(names, values, strict=True):
        made.constant(name, value)
    return made


def _synthesize(row: Row, variant: Variant) -> Signature:
    made = Signature()
    made.argument("out", f"*{variant.x}")
    made.tuple_of("genes", f"*{variant.gene}", variant.genes)
    made.argument("coeffs", "*fp64" if variant.gene == "fp64" else "*fp32")
    for name in ("rows", "cols", "first_row", "first_col", "out_row"):
        made.argument(name, "i32")
    _strides(made, variant, variant.form == "transposed")
    for name, value in zip(("BLOCK_ROWS", "BLOCK_COLS"), row.tile, strict=True):
        made.constant(name, value)
    return made


def _accumulate(row: Row, variant: Variant) -> Signature:
    made, work = Signature(), "*fp64" if variant.gene == "fp64" else "*fp32"
    made.argument("panel", f"*{variant.x}")
    made.tuple_of("genes", f"*{variant.gene}", variant.genes)
    made.tuple_of("buffers", work, variant.genes)
    for name in ("coeffs", "dots"):
        made.argument(name, work)
    for name in ("rows", "cols", "first_row", "panel_row"):
        made.argument(name, "i32")
    _strides(made, variant, variant.form == "transposed")
    values = (*row.tile, 2**variant.genes - 1, True, tl.int64)
    for name, value in zip(("BLOCK_ROWS", "BLOCK_COLS", "WANTED", "DOTS", "INDEX"), values, strict=True):
        made.constant(name, value)
    return made


_BY_KERNEL: dict[str, Callable[[Row, Variant], Signature]] = {
    "fused": _fused,
    "gene_gradients": _gene_gradients,
    "synthesize": _synthesize,
    "accumulate": _accumulate,
}
