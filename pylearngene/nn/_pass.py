# SPDX-License-Identifier: Apache-2.0
"""The forward of a model with a gene bank: it tells the bank where a pass begins and ends.

Eager passes need nothing. In a compiled graph the accumulators of the genes are made at the start of the pass and
belong to that graph alone, so the graph's id is kept with them: after a graph break layers fall back to ordinary
gradients.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from dataclasses import dataclass
from types import CodeType
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


def graph_id() -> str:
    """The compiled graph being traced; a constant inside it."""
    return str(torch._guards.CompileContext.current_compile_id())


# What `torch.compiler.assume_constant_result` sets; calling it would import the compiler (2 s) with the package.
graph_id._dynamo_marked_constant = True  # type: ignore[attr-defined]


class GeneBackedForward:
    """Calls the model's own forward between the begin and the end of the bank's pass.

    Stored as the instance's `forward`; it copies and pickles with the model, and shows the model's own signature.

    Args:
        model: the root model, whose `gene_bank` is the bank.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)  # a strong reference would be a cycle, and keep a dropped model's memory

    @property
    def model(self) -> torch.nn.Module:
        """The root model."""
        model = self._model()
        assert model is not None, "a model's forward cannot outlive the model"
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> GeneBackedForward:
        return GeneBackedForward(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unset, (), {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])

    @property
    def __code__(self) -> CodeType:
        """Read by `torch.export`; passed through decorators as Python's own `inspect` does."""
        code: CodeType = inspect.unwrap(type(self.model).forward).__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        bank: GeneBank = model.gene_bank  # type: ignore[union-attr, assignment]
        before = bank.open_pass()
        result = type(model).forward(model, *args, **kwargs)  # type: ignore[union-attr]
        bank.close_pass(before)
        return result


def _unset() -> GeneBackedForward:
    """For unpickling: the model is set once it exists."""
    return GeneBackedForward.__new__(GeneBackedForward)
