# SPDX-License-Identifier: Apache-2.0
"""Which regime, and which rows of the launch table, a call really took: seen from outside, while it runs.

It reads the results of functions by their names and changes nothing; where a name is gone, a column stays empty.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from pylearngene import plan


@dataclass
class Seen:
    """Regimes and launches in the order of their first use, without repetitions."""

    regimes: list[str] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)

    def regime(self, name: Any) -> None:
        """Note the answer of the plan."""
        if str(name) not in self.regimes:
            self.regimes.append(str(name))

    def row(self, row: Any) -> None:
        """Note a row of the launch table."""
        name = f"{getattr(row, 'kernel', '')} {getattr(row, 'name', row)}".strip()
        if name not in self.launches:
            self.launches.append(name)

    def native(self, taken: Any) -> None:
        """Note that the CUDA module took a call."""
        if taken is True and "cuda rows" not in self.launches:
            self.launches.append("cuda rows")


@contextmanager
def watching() -> Iterator[Seen]:
    """What calls inside the block take."""
    seen = Seen()
    undo = [_listen(plan, "choose", seen.regime)]
    for name, module in list(sys.modules.items()):
        if name.startswith("pylearngene.") and isinstance(module, ModuleType):
            if name.startswith("pylearngene.triton_kernels.") and not name.endswith("._table"):
                undo.append(_listen(module, "row_for", seen.row))
            undo.append(_listen(module, "rows_forward", seen.native))
    try:
        yield seen
    finally:
        for back in reversed(undo):
            back()


def _listen(module: ModuleType, name: str, note: Callable[[Any], None]) -> Callable[[], None]:
    """Let a function of a module tell its results; returns what undoes that."""
    original = vars(module).get(name)
    if not isinstance(original, FunctionType | functools._lru_cache_wrapper):
        return lambda: None

    @functools.wraps(original)
    def told(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        note(result)
        return result

    setattr(module, name, told)
    return lambda: setattr(module, name, original)
