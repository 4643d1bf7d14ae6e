# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs here, and why not a faster one.

Loads the native CPU module once, chooses its instruction level, and answers `plg.backends()`.
It holds no kernel and prints nothing; a failed load is kept as the reason it reports.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from pylearngene._checks import choice
from pylearngene.errors import ArgumentError, BackendError

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_REINSTALL = "pip install --force-reinstall --no-deps pylearngene (needs a C++ compiler)"


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("pylearngene._C"), ""
    except ImportError as error:  # the package stays usable without its native module
        return None, f"the native module pylearngene._C did not load: {error}"


_module, _reason = _load()


def _best_level() -> str:
    """The instruction level torch itself uses, plus the bfloat16 check, both capped by ATEN_CPU_CAPABILITY."""
    level = torch.backends.cpu.get_cpu_capability()
    capped = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    if level == "AVX512" and capped in ("", "avx512_bf16") and torch.cpu._is_avx512_bf16_supported():
        return "AVX512_BF16"
    return level if level in ("AVX512", "AVX2") else "DEFAULT"


LEVEL_NAME = _best_level()
LEVEL = 0
if _module is not None:
    _levels = _module.levels()
    LEVEL_NAME = LEVEL_NAME if LEVEL_NAME in _levels else "DEFAULT"
    LEVEL = _levels.index(LEVEL_NAME)

_chosen = "auto"


@dataclass(frozen=True)
class BackendReport:
    """What runs for one operation on one kind of device.

    Attributes:
        op: name of the operation.
        device: "cpu" or "cuda".
        backend: what runs there.
        reason: why not a faster one, or what makes this the fastest.
        command: what would get a faster one; empty where there is none.
    """

    op: str
    device: str
    backend: str
    reason: str
    command: str


def set_backend(backend: str) -> None:
    """Choose the implementation for every later call, in all threads; `PYLEARNGENE_BACKEND` does it from outside.

    Args:
        backend: `"auto"` (the fastest that is here), `"cpp"`, `"reference"`, `"triton"` or `"cuda"`.

    Raises:
        ArgumentError: `backend` is none of these.
        BackendError: it is not available here; the message says why.

    Example:
        >>> import pylearngene as plg
        >>> plg.set_backend("reference")
        >>> plg.set_backend("auto")
    """
    global _chosen
    choice(backend, "backend", BACKENDS)
    if backend == "cpp" and _module is None:
        raise BackendError(f"backend: 'cpp' is not available here: {_reason}; to get it: {_REINSTALL}")
    if backend in ("triton", "cuda"):
        raise BackendError(f"backend: {backend!r} has no kernel in this version; 'auto', 'cpp' and 'reference' run")
    _chosen = backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block; errors as `set_backend`.

    Example:
        >>> import pylearngene as plg
        >>> with plg.use_backend("reference"):
        ...     pass
    """
    before = _chosen
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def native() -> ModuleType | None:
    """The native CPU module if it is to be used, else None."""
    return None if _chosen == "reference" else _module


def backends() -> list[BackendReport]:
    """Per operation and device: what runs, why not a faster one, and the command that would get it.

    Example:
        >>> import pylearngene as plg
        >>> plg.backends()[0].op
        'expansion'
    """
    if native() is not None:
        cpu = BackendReport("expansion", "cpu", "cpp", f"native kernels at level {LEVEL_NAME}", "")
    elif _module is not None:
        cpu = BackendReport("expansion", "cpu", "reference", "chosen by set_backend", "plg.set_backend('auto')")
    else:
        cpu = BackendReport("expansion", "cpu", "reference", _reason, _REINSTALL)
    gpu = BackendReport("expansion", "cuda", "reference", "this version has no Triton or CUDA kernel for it", "")
    return [cpu, gpu]


def _from_environment() -> None:
    wanted = os.environ.get("PYLEARNGENE_BACKEND")
    if wanted:
        try:
            set_backend(wanted)
        except (ArgumentError, BackendError) as error:
            raise type(error)(f"PYLEARNGENE_BACKEND (environment): {error}") from error


_from_environment()
