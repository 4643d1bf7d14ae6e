# SPDX-License-Identifier: Apache-2.0
"""The forward of a model with a gene bank: it tells the bank where a pass begins and ends.

Low-precision copies of genes live for one pass. In a compiled graph the accumulators of the genes are made at the
start of the pass and belong to that graph alone, so the graph's id is kept with them: after a graph break layers fall
back to ordinary gradients. The model keeps its class but for a subclass of the same name with this forward, and with
the methods that other parts of the library have put there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pylearngene.errors import ShardingError
from pylearngene.functional._expansion_calls import TracedTap
from pylearngene.nn._wrapping import check_wrapping, in_group, wrongly_wrapped


@dataclass
class Pass:
    """One forward pass of an attached model.

    Attributes:
        graph: the compiled graph it belongs to; empty in eager mode.
        taps: of a compiled graph, by group name.
        copies: of an eager pass: by group name and stream the dtype, the genes copied, and their copies.
    """

    graph: str = ""
    taps: dict[str, TracedTap] = field(default_factory=dict)
    copies: dict[tuple[str, int | None], tuple[torch.dtype, list[Tensor], list[Tensor]]] = field(default_factory=dict)


def graph_id() -> str:
    """The compiled graph being traced; a constant inside it."""
    return str(torch._guards.CompileContext.current_compile_id())


def exporting() -> bool:
    """Whether the graph being traced is for `torch.export`; asked directly, old compilers fold the answer to True."""
    return bool(torch.compiler.is_exporting())


def inside_region() -> bool:
    """Whether what is being traced is a region of a graph, like a checkpoint: it may write nothing outside itself."""
    translator = sys.modules.get("torch._dynamo.symbolic_convert")
    current = getattr(getattr(translator, "tls", None), "current_tx", None)
    return current is not None and current.output.current_tracer.parent is not None


# What `torch.compiler.assume_constant_result` sets; calling it would import the compiler (2 s) with the package.
for _asked_while_tracing in (graph_id, exporting, inside_region):
    _asked_while_tracing._dynamo_marked_constant = True  # type: ignore[union-attr]


_made: dict[type[nn.Module], type[nn.Module]] = {}
_replaced: list[tuple[Callable[[type[nn.Module]], bool], dict[str, Callable[..., Any]]]] = []


def replace_methods(where: Callable[[type[nn.Module]], bool], methods: Mapping[str, Callable[..., Any]]) -> None:
    """Let gene-backed models of some plain classes have these methods in place of their own.

    Args:
        where: says whether a plain class is meant.
        methods: functions of the model by name; `plain_class` gives them what they replace.
    """
    _replaced.append((where, dict(methods)))


def gene_backed_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a model's class whose forward opens and closes a pass, one per plain class."""
    if plain not in _made:
        _made[plain] = _subclass(plain)
    return _made[plain]


class _LeftAlone:
    """Names of what DDP does not broadcast: fixed coefficients, which a write would make unknown to their layers.

    An attribute of the model itself goes before it.
    """

    name = "_ddp_params_and_buffers_to_ignore"

    def __init__(self, plain: Iterable[str]) -> None:
        self.plain = list(plain)

    def __get__(self, model: nn.Module | None, _owner: type) -> list[str]:
        layers = () if model is None else model.named_modules()
        return [*self.plain, *(f"{path}.coeffs" for path, it in layers if vars(it).get("learn_coeffs") is False)]


def _subclass(plain: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bank = self.gene_bank
        if not torch.compiler.is_compiling():
            check_wrapping(self, bank)
        elif in_group() and wrongly_wrapped(self, bank):  # the graph ends here, and what is not compiled says so
            raise ShardingError
        elif inside_region():  # the pass around it goes on; without one, gradients are ordinary ones
            return plain.forward(self, *args, **kwargs)
        before = bank.open_pass()
        if torch.compiler.is_compiling():
            result = plain.forward(self, *args, **kwargs)
            bank.close_pass(before)
            return result
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            bank.close_pass(before)

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:  # by the plain class: this one has no name to import
        return _remake, (plain,), self.__getstate__()

    names: dict[str, Any] = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
    names[_LeftAlone.name] = _LeftAlone(getattr(plain, _LeftAlone.name, ()))
    for where, methods in _replaced:
        names.update(methods if where(plain) else {})
    return type(plain.__name__, (plain,), {**names, "forward": forward, "__reduce_ex__": reduce, "plain_class": plain})


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model has without a gene bank."""
    found: type[nn.Module] = getattr(type(model), "plain_class", type(model))
    return found


def _remake(plain: type[nn.Module]) -> nn.Module:
    """For copying and unpickling: an empty instance, whose state follows."""
    made = gene_backed_class(plain)
    return made.__new__(made)
