# SPDX-License-Identifier: Apache-2.0
"""The forward of a model with a gene bank: it tells the bank where a pass begins and ends.

Eager passes need nothing. In a compiled graph the accumulators of the genes are made at the start of the pass and
belong to that graph alone, so the graph's id is kept with them: after a graph break layers fall back to ordinary
gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pylearngene.functional._expansion_calls import TracedTap

if TYPE_CHECKING:
    from pylearngene.nn.bank import GeneBank


@dataclass
class TracedPass:
    """The taps of one forward pass inside one compiled graph.

    Attributes:
        graph: which graph they belong to.
        taps: by group name.
    """

    graph: str
    taps: dict[str, TracedTap]


def _graph_id() -> str:
    return str(torch._guards.CompileContext.current_compile_id())


#: The compiled graph being traced; a constant inside it.
graph_id: Callable[[], str] = torch._dynamo.assume_constant_result(_graph_id)


class GeneBackedForward:
    """Calls the model's own forward between the begin and the end of the bank's pass.

    Stored as the instance's `forward`; it copies and pickles with the model, and shows the model's own signature.

    Args:
        model: the root model, whose `gene_bank` is the bank.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bank: GeneBank = self.model.gene_bank  # type: ignore[assignment]
        before = bank.open_pass()
        result = type(self.model).forward(self.model, *args, **kwargs)
        bank.close_pass(before)
        return result
