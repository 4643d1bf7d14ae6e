# SPDX-License-Identifier: Apache-2.0
"""`Expansion`: block weights as linear combinations of genes, by a table or a rule of the caller's.

TLEG, LDR, SWS and share-init are instances, by way of `FixedExpansion`. What a method does with a network is in
`_base.py`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from pylearngene.errors import ArgumentError, GeneFileError, MethodError
from pylearngene.learngene import register_method
from pylearngene.methods._base import ExpansionMethod

Rule = Callable[[int, int], Sequence[float]]


@dataclass(frozen=True)
class Expansion(ExpansionMethod):
    """The weight of block `l` of `L` is `sum_k c[l,k] G[k]`, for linear weights, biases and layer norms alike.

    Args:
        coeffs: a table [L, K] (nested sequences or a tensor), or a rule `(l, L) -> K numbers` with `l` from 0. A table
            serves its own depth only. A rule is stored with a learngene as its table for the depth at hand.
        learn: let every layer train its own coefficients, starting from `coeffs`; then the depth is fixed too.

    Raises:
        ArgumentError: `coeffs` is no table and no rule, is empty, ragged, or holds a value that is not finite.

    Source:
        The form of TLEG (arXiv 2312.05614), LDR and SWS; none of its own.

    Example:
        >>> Expansion([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]).num_genes
        2
        >>> Expansion(lambda l, L: [1.0, (l / L) ** 2]).coefficients(2)
        [[1.0, 0.0], [1.0, 0.25]]
    """

    name: ClassVar[str] = "expansion"
    coeffs: Any
    learn: bool = False
    stored_depth: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.coeffs):
            table = self.coeffs.tolist() if isinstance(self.coeffs, Tensor) else self.coeffs
            object.__setattr__(self, "coeffs", _checked_table(table))
        if not isinstance(self.learn, bool):
            raise ArgumentError(f"learn: expected True or False, got {self.learn!r}")

    @property
    def num_genes(self) -> int:
        """The number K of genes per weight."""
        return len(self.coefficients(1 if callable(self.coeffs) else len(self.coeffs))[0])

    @property
    def learns_coefficients(self) -> bool:
        """Whether the coefficients are trained with the genes."""
        return self.learn

    def coefficients(self, depth: int) -> list[list[float]]:
        """Return the table [L, K] for `depth` blocks.

        Raises:
            MethodError: `coeffs` is a table for another depth.
        """
        if callable(self.coeffs):
            return [list(row) for row in _checked_table([self.coeffs(index, depth) for index in range(depth)])]
        if len(self.coeffs) != depth:
            raise MethodError(
                f"depth: expected {len(self.coeffs)}, the number of rows of the method's table, got {depth}; for other "
                "depths pass a rule: `Learngene.from_pretrained(folder, method=Expansion(lambda l, L: ...))`"
            )
        return [list(row) for row in self.coeffs]

    def bound(self, depth: int, /) -> Expansion:
        """Return the method with the depth whose table is stored."""
        return replace(self, stored_depth=depth)

    def to_config(self) -> dict[str, Any]:
        """Return the table and whether it is learned.

        Raises:
            MethodError: the method is a rule that was not extracted from a network, so that no depth is known.
        """
        if callable(self.coeffs) and self.stored_depth is None:
            raise MethodError(
                "coeffs: expected a table, or a rule bound to a network's depth by plg.extract, got a rule"
            )
        depth = self.stored_depth if callable(self.coeffs) else len(self.coeffs)
        assert depth is not None
        return {"coeffs": self.coefficients(depth), "learn": self.learn}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Expansion:
        """Build the method from stored settings; raises GeneFileError where they are not those of `to_config`."""
        if config.keys() != {"coeffs", "learn"}:
            raise GeneFileError(f"method: expected the settings coeffs and learn, got {sorted(config)}")
        try:
            return cls(coeffs=config["coeffs"], learn=config["learn"])
        except ArgumentError as error:
            raise GeneFileError(f"method: {error}") from error


@dataclass(frozen=True)
class FixedExpansion(Expansion):
    """An expansion whose rule is the paper's own and serves every depth; subclasses state `row` and their settings.

    Settings are the fields that a subclass adds; they are what is stored.
    """

    coeffs: Any = field(default=None, init=False, repr=False, compare=False)
    learn: bool = field(default=False, init=False, repr=False)
    stored_depth: int | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coeffs", self.row)

    @abstractmethod
    def row(self, index: int, depth: int, /) -> Sequence[float]:
        """Return the coefficients of block `index` of `depth`."""

    def bound(self, _depth: int, /) -> FixedExpansion:
        """Return the method itself: it serves every depth."""
        return self

    def to_config(self) -> dict[str, Any]:
        """Return the settings."""
        return {name: getattr(self, name) for name in _settings(type(self))}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FixedExpansion:
        """Build the method from stored settings; raises GeneFileError where they are not those of `to_config`."""
        wanted = _settings(cls)
        if config.keys() != set(wanted):
            expected = f"the settings {', '.join(wanted)}" if wanted else "no settings"
            raise GeneFileError(f"method: expected {expected} for {cls.name}, got {sorted(config)}")
        try:
            return cls(**config)
        except ArgumentError as error:
            raise GeneFileError(f"method: {error}") from error


def _settings(method: type[FixedExpansion]) -> list[str]:
    return [item.name for item in fields(method) if item.init]


def _checked_table(rows: Any) -> tuple[tuple[float, ...], ...]:
    """Return rows of equal length as floats."""
    try:
        table = tuple(tuple(float(value) for value in row) for row in rows)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"coeffs: expected a table [L, K] of numbers or a rule (l, L) -> K numbers, got {rows!r}"
        ) from error
    if not table or not table[0]:
        raise ArgumentError(f"coeffs: expected at least one row and one gene, got {rows!r}")
    for index, row in enumerate(table):
        if len(row) != len(table[0]):
            raise ArgumentError(f"coeffs: expected {len(table[0])} numbers in every row, got {len(row)} in row {index}")
        if not all(math.isfinite(value) for value in row):
            raise ArgumentError(f"coeffs: expected finite numbers, got {row} in row {index}")
    return table


register_method(Expansion.name, Expansion.from_config)
