# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs here, and why not a faster one.

Loads the native CPU module once, chooses its instruction level, finds Triton and the C++ module for CUDA when they are
first needed, and answers `plg.backends()`. It holds no kernel and prints nothing; a failed load is kept as the reason
it reports.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from pylearngene import plan
from pylearngene._checks import choice
from pylearngene._version import __version__
from pylearngene.errors import ArgumentError, BackendError

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_REINSTALL = "pip install --force-reinstall --no-deps pylearngene (needs a C++ compiler)"
_REBUILD = "pip install --force-reinstall --no-deps --no-binary pylearngene pylearngene (needs nvcc)"
_INSTALL_TRITON = "pip install triton"
_BACK = "plg.set_backend('auto')"
#: Primitives whose products are PyTorch's own on every device.
THROUGH_PYTORCH = ("low_rank",)
_PRODUCTS = "products of PyTorch; there are no kernels of its own yet"
#: Compute capability from which the kernels for GPUs are compiled and checked.
OLDEST_GPU = (8, 0)


def _load(name: str = "_C") -> tuple[ModuleType | None, str]:
    """A native module, or in one line why it is not used; the package stays whole without it."""
    try:
        module = importlib.import_module(f"pylearngene.{name}")
        version = module.version
    except Exception as error:  # a broken or foreign file may raise anything when it is loaded
        return None, f"the native module pylearngene.{name} did not load: {' '.join(str(error).split())}"
    if version != __version__:
        return None, f"the native module pylearngene.{name} is of version {version}, the package of {__version__}"
    return module, ""


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

    A backend computes on its own kind of device: `"cpp"` on the CPU, `"triton"` and `"cuda"` on CUDA; on the other kind
    `"auto"` holds. `"cuda"` prefers the C++ kernels wherever there is one, and takes Triton's for the rest. With
    TRITON_INTERPRET=1 in the environment `"triton"` also computes CPU tensors, slowly, for tests.

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
    if backend == "triton" and (reason := _why_no_triton()):
        raise BackendError(f"backend: 'triton' is not available here: {reason}")
    if backend == "cuda" and (reason := _why_no_cuda()):
        raise BackendError(f"backend: 'cuda' is not available here: {reason}")
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


@lru_cache(maxsize=1)
def _load_triton() -> tuple[ModuleType | None, str]:
    """The Triton launchers, imported when they are first needed, or why they did not load."""
    try:
        return importlib.import_module("pylearngene.triton_kernels.expansion"), ""
    except ImportError as error:
        return None, f"the Triton kernels did not load: {error}; to get them: {_INSTALL_TRITON}"


@lru_cache(maxsize=64)
def _why_no_triton_on(device: torch.device) -> str:
    """Why Triton does not compute on this CUDA device; empty where it does."""
    if torch.version.hip is not None:
        return "the Triton kernels are checked for NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    return _load_triton()[1]


def _interpreted() -> bool:
    module = _load_triton()[0]
    return module is not None and bool(module.INTERPRETED)


def _why_no_triton() -> str:
    """Why Triton can be chosen neither for CUDA tensors nor, in its interpreter, for CPU tensors; empty if it can."""
    module, reason = _load_triton()
    if module is None or module.INTERPRETED:
        return reason
    if torch.cuda.is_available():
        return _why_no_triton_on(torch.device("cuda", torch.cuda.current_device()))
    return "no CUDA device was found (TRITON_INTERPRET=1, set before the start, computes on the CPU, for tests)"


@lru_cache(maxsize=1)
def _load_cuda() -> tuple[ModuleType | None, str]:
    """The C++ module for CUDA, imported when it is first needed, or why it did not load."""
    return _load("_cuda")


@lru_cache(maxsize=64)
def _why_no_cuda_on(device: torch.device) -> str:
    """Why the C++ kernels do not compute on this CUDA device; empty where they do."""
    module, reason = _load_cuda()
    if module is None:
        return f"{reason}; to get it: {_REBUILD}"
    if torch.version.hip is not None:
        return "the CUDA kernels are for NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    count, error = module.devices()  # the module has a runtime of its own, which may be newer than the driver
    return "" if count else f"pylearngene._cuda finds no device: {error or 'there is none'}"


def _why_no_cuda() -> str:
    """Why the C++ kernels cannot be chosen; empty if they can."""
    module, reason = _load_cuda()
    if module is None:
        return f"{reason}; to get it: {_REBUILD}"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    device = torch.device("cuda", torch.cuda.current_device())
    return _why_no_cuda_on(device) or _why_no_triton_on(device)


def chosen() -> str:
    """What `set_backend` was told last."""
    return _chosen


def native() -> ModuleType | None:
    """The native CPU module if it is to be used, else None."""
    if _chosen == "reference" or (_chosen == "triton" and _interpreted()):
        return None
    return _module


def triton_for(device: torch.device) -> ModuleType | None:
    """The Triton launchers if they are to be used on a device, else None."""
    if device.type == "cpu":
        return _load_triton()[0] if _chosen == "triton" and _interpreted() else None
    if device.type != "cuda" or _chosen == "reference" or _why_no_triton_on(device):
        return None
    return _load_triton()[0]


def cuda_for(device: torch.device) -> ModuleType | None:
    """The C++ module for CUDA if it is to be used on a device, else None; beside Triton, never without it."""
    if device.type != "cuda" or _chosen not in ("auto", "cuda") or _why_no_cuda_on(device):
        return None
    return _load_cuda()[0] if triton_for(device) is not None else None


def implementation(device: torch.device) -> str:
    """Who computes on a device: `"cpp"`, `"triton"`, `"cuda"` (C++ beside Triton) or `"reference"`."""
    if triton_for(device) is not None:
        return "triton" if cuda_for(device) is None else "cuda"
    return "cpp" if device.type == "cpu" and native() is not None else "reference"


def arch(device: torch.device) -> str:
    """By what plans differ: the class of a GPU, the instruction level of a CPU whose native kernels run."""
    return LEVEL_NAME if device.type == "cpu" and implementation(device) == "cpp" else _gpu_class(device)


@lru_cache(maxsize=64)
def _gpu_class(device: torch.device) -> str:
    """The class of a GPU; the usual one of devices that are none."""
    return plan.chip_of(torch.cuda.get_device_capability(device)) if device.type == "cuda" else plan.USUAL_CHIP


def backends() -> list[BackendReport]:
    """Per operation and device: what runs, why not a faster one, and the command that would get it.

    Example:
        >>> import pylearngene as plg
        >>> plg.backends()[0].op
        'expansion'
    """
    reports = [BackendReport("expansion", "cpu", *_on_cpu()), BackendReport("expansion", "cuda", *_on_cuda())]
    for op in THROUGH_PYTORCH:
        reports += [BackendReport(op, device, "reference", _PRODUCTS, "") for device in ("cpu", "cuda")]
    return reports


def _on_cpu() -> tuple[str, str, str]:
    if _chosen == "triton" and _interpreted():
        return "triton", "TRITON_INTERPRET=1: Triton's interpreter, for tests", _BACK
    if native() is not None:
        return "cpp", f"native kernels at level {LEVEL_NAME}", ""
    if _module is not None:
        return "reference", "chosen by set_backend", _BACK
    return "reference", _reason, _REINSTALL


def _on_cuda() -> tuple[str, str, str]:
    if _chosen == "reference":
        return "reference", "chosen by set_backend", _BACK
    if importlib.util.find_spec("triton") is None:
        return "reference", "triton is not installed", _INSTALL_TRITON
    if not torch.cuda.is_available():
        module, reason = _load_cuda()
        few = "C++ kernels for few tokens beside them" if module is not None else reason
        where = "Triton kernels for GPUs of compute capability 8.0 or newer; none was found here"
        return "triton", f"{where}; {few}", "" if module is not None else _REBUILD
    device = torch.device("cuda", torch.cuda.current_device())
    reason = _why_no_triton_on(device)
    if reason:
        return "reference", reason, ""
    launches = importlib.import_module("pylearngene.triton_kernels._launch").described(device)
    kernels = f"Triton kernels on {torch.cuda.get_device_name()}; {launches}"
    if cuda_for(device) is not None:
        return "cuda", f"C++ kernels for few tokens, for which tokens is not yet measured; beside them {kernels}", ""
    if _chosen == "triton":
        return "triton", kernels, ""
    return "triton", f"{kernels}; no C++ kernels for few tokens: {_why_no_cuda_on(device)}", ""


def _from_environment() -> None:
    wanted = os.environ.get("PYLEARNGENE_BACKEND")
    if wanted:
        try:
            set_backend(wanted)
        except (ArgumentError, BackendError) as error:
            raise type(error)(f"PYLEARNGENE_BACKEND (environment): {error}") from error


_from_environment()
