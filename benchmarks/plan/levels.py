# SPDX-License-Identifier: Apache-2.0
"""Instruction levels below the best one of this processor: processes whose libraries are kept from better instructions.

What runs in them is the caller's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pylearngene
from pylearngene import _backends

LEVELS = ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16")
#: What keeps torch, oneDNN and MKL from instructions above each level.
LIMITED = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}


def here() -> tuple[str, ...]:
    """The levels that this processor has, the best one first."""
    return LEVELS[LEVELS.index(_backends.LEVEL_NAME) :: -1]


def run(level: str, program: str, *arguments: str) -> None:
    """Run a program with arguments at a level, with the same package.

    Raises:
        CalledProcessError: it failed.
    """
    limited = {} if level == _backends.LEVEL_NAME else LIMITED[level]
    package = str(Path(pylearngene.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **limited, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-P", program, *arguments], check=True, env=environment)
