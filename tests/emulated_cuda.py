# SPDX-License-Identifier: Apache-2.0
"""The CUDA module compiled for the processor: the very sources of csrc/cuda, with emulated threads and devices.

What of the runtime is emulated, and how, is in tests/emulation. Values are tested in `test_cuda_emulated`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import pybind11

import pylearngene

REPOSITORY = Path(__file__).resolve().parents[1]
KERNELS, RUNTIME = REPOSITORY / "csrc" / "cuda", REPOSITORY / "tests" / "emulation"
#: So few blocks at a time that every test sees them take turns.
BLOCKS = 3
DEVICE, STREAM = 1, 0x770
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DPYLEARNGENE_EMULATED", f"-DPYLEARNGENE_MOST_BLOCKS={BLOCKS}", "-DPYLEARNGENE_LEVELS=1"),
    f'-DPYLEARNGENE_VERSION="{pylearngene.__version__}"',
    *(f"-I{folder}" for folder in (RUNTIME, KERNELS, pybind11.get_include(), sysconfig.get_paths()["include"])),
]
SANITIZED = ["-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
SANITIZED += ["-fsanitize=address,undefined,float-cast-overflow"]


def build(folder: Path, sanitized: bool = False) -> Path:
    """The compiled module, in a folder."""
    flags = [os.environ.get("CXX", "g++"), *FLAGS, *(SANITIZED if sanitized else [])]
    jobs = {f"{x}.o": ["-x", "c++", f"-DPYLEARNGENE_X={x}", KERNELS / "expansion.cu"] for x in XS}
    jobs |= {"bindings.o": [KERNELS / "bindings.cpp"], "emulation.o": [RUNTIME / "emulation.cpp"]}
    for name, job in jobs.items():
        subprocess.run([*flags, *job, "-c", "-o", folder / name], check=True)
    module = folder / "_cuda.so"
    subprocess.run([*flags, "-shared", *(folder / name for name in jobs), "-o", module], check=True)
    return module


XS = ("FLOAT32", "BFLOAT16", "FLOAT16")


class Emulated:
    """The module, and what its pretended devices saw."""

    def __init__(self, path: Path) -> None:
        loader = ExtensionFileLoader("_cuda", str(path))
        spec = importlib.util.spec_from_loader("_cuda", loader)
        assert spec is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(path))

    def state(self) -> dict[str, int]:
        """Launches so far; where the last one was, the device that is current now, blocks, threads and stream."""
        names = ("launches", "launched_on", "current", "blocks", "threads", "stream")
        return {name: self.library.emulated_state(place) for place, name in enumerate(names)}

    def devices(self, count: int) -> None:
        self.library.emulated_devices(count)

    def fail(self, in_calls: int, error: int) -> None:
        """Let the runtime fail in its n-th call from now, counting from 1; 0 for never."""
        self.library.emulated_failure(in_calls, error)
