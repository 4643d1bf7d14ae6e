# SPDX-License-Identifier: Apache-2.0
"""How one launch looks to the compiler: types, alignment and constants of its arguments.

Serves compilation without a GPU; a launch on a GPU derives the same from its arguments. What each kernel takes is in
`_expansion_signatures` and `_expansion_gradient_signatures`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


def gene_strides(made: Signature, variant: Variant, across: bool, odd: bool = False) -> None:
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


def two_strides(made: Signature, name: str, odd: bool) -> None:
    """Row and column stride of x or dy."""
    made.argument(f"{name}_row", "i32", aligned=not odd)
    if odd:
        made.argument(f"{name}_col", "i32", aligned=False)
    else:
        made.constant(f"{name}_col", 1)
