# SPDX-License-Identifier: Apache-2.0
"""`GeneGroup`: what the bank knows of the genes of one layer position, whatever their primitive.

Each primitive has a subclass, in a file of its stem, that says which tensors it holds and what is computed with them.
Taps, low-precision copies and passes are the bank's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pylearngene.errors import ArgumentError
from pylearngene.functional._tap import Tap

if TYPE_CHECKING:
    from pylearngene.nn.bank import GeneBank


class GeneGroup(nn.Module, ABC):
    """The genes of one layer position; a subclass per primitive, made of `sizes`, a device and a dtype.

    Attributes:
        primitive: stem of the primitive.
        letters: what each of `sizes` is, for messages.
        num_genes: how many genes the group has for each tensor of the plain layer.
    """

    primitive: ClassVar[str]
    letters: ClassVar[str]
    num_genes: int

    @property
    @abstractmethod
    def sizes(self) -> tuple[Any, ...]:
        """What the group was made with; layers that share it ask for the same."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All genes, in one order."""

    @abstractmethod
    def plain_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what the genes stand for in one plain layer: its weight, and its bias where they have it too."""

    @abstractmethod
    def named_genes(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every gene with its key inside the group."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fresh values for every gene, in place."""

    @abstractmethod
    def compute(self, bank: GeneBank, name: str, *inputs: Any, **options: Any) -> Any:
        """What layers call the bank for: apply the group, called `name` in `bank`, to inputs that are checked here."""

    def new_tap(self, genes: Sequence[Tensor]) -> Tap:
        """The tap of the group, whose genes these are."""
        return Tap(genes, len(genes))

    def traced_tap(self) -> Any:
        """What `compute` finds as the tap inside a compiled graph; None where gradients are ordinary ones there."""
        return None

    def grow(self, num_genes: int) -> None:
        """Add genes of zeros; only a sum of genes can have more of them.

        Raises:
            ArgumentError: always, where a subclass does not grow.
        """
        raise ArgumentError(f"name: expected a group of expansion for {num_genes!r} genes, got one of {self.primitive}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
