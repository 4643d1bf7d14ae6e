# SPDX-License-Identifier: Apache-2.0
"""The sanitizers of `make sanitize` see what they are there for: mistakes on purpose end a process with a report.

Without the module that `make sanitize` builds, every test here is skipped. That the suite itself has no report is seen
by running it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pylearngene import _C

pytestmark = pytest.mark.skipif(not hasattr(_C, "planted"), reason="`make sanitize` builds the module that this needs")
LEVELS = [_C.levels().index(name) for name in _C.supported_levels()]

# The module alone, without torch, and memory from the C library.
START = """
import ctypes, importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("pylearngene._C", sys.argv[1])
_C = importlib.util.module_from_spec(importlib.util.spec_from_loader("pylearngene._C", loader))
loader.exec_module(_C)
calloc = ctypes.CDLL(None).calloc
calloc.restype, calloc.argtypes = ctypes.c_size_t, (ctypes.c_size_t, ctypes.c_size_t)
"""
PLANTED = """
print(_C.planted(int(sys.argv[2]), int(sys.argv[3]), calloc(64, 1), 64))
"""
#: Number of each mistake that is compiled in, and how its report begins.
MISTAKES = {
    0: "AddressSanitizer: heap-buffer-overflow",
    1: "AddressSanitizer: heap-use-after-free",
    2: "runtime error: index 64 out of bounds for type 'char [8]'",
    3: "runtime error: load of misaligned address",
    4: "runtime error: signed integer overflow",
    5: "runtime error: shift exponent 128 is too large",
    6: "runtime error: 6.4e+11 is outside the range of representable values",
}  # fmt: skip

OVERFLOW = """
kernel, level, excess = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rows, cols, tokens = 4, 61, 2
gene, out, x, dy, y = (calloc(n, 4) for n in (rows * cols, rows * cols, tokens * cols, tokens * rows, tokens * rows))
genes = ([(gene, cols, 1)], 0, calloc(1, 4))
start, wide, k = (level, 1), cols + excess, _C.expansion
ends = (*genes, [(out, wide)], calloc(rows, 8))
calls = {
    "synthesize": lambda: k.synthesize(*start, out, 0, rows, wide, wide, *genes),
    "synthesize_stack": lambda: k.synthesize_stack(*start, [(out, wide)], 0, rows, wide, False, *genes),
    "rows_forward": lambda: k.rows_forward(
        *start, y, x, 0, tokens, wide, rows, wide, rows, *genes, 0, [], 0),
    "rows_dx": lambda: k.rows_dx(
        *start, x, dy, 0, tokens, wide, rows, rows, wide, *genes),
    "accumulate": lambda: k.accumulate(*start, out, 0, rows, wide, wide, *ends),
    "rows_wgrad": lambda: k.rows_wgrad(
        *start, dy, x, 0, tokens, wide, rows, rows, wide, *ends),
    "column_sums": lambda: k.column_sums(*start, gene, x, 0, tokens, wide, wide),
}
calls[kernel]()
"""
KERNELS = ("synthesize", "synthesize_stack", "rows_forward", "rows_dx", "accumulate", "rows_wgrad", "column_sums")


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    options = {name: os.environ.get(name, "") + ":symbolize=0" for name in ("ASAN_OPTIONS", "UBSAN_OPTIONS")}
    command = [sys.executable, "-P", "-c", START + code, str(_C.__file__), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options}, check=False)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("level", LEVELS)
def test_planted_mistake_is_reported(level: int, mistake: int) -> None:
    done = run(PLANTED, level, mistake)
    assert done.returncode != 0
    assert MISTAKES[mistake] in done.stderr
    assert done.stdout == "", "the process ended where the mistake was made"


def test_no_mistake_no_report() -> None:
    done = run(PLANTED, LEVELS[0], len(MISTAKES))
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0\n", "")


@pytest.mark.parametrize("kernel", KERNELS)
def test_column_too_many_is_reported_in_every_kernel(kernel: str) -> None:
    assert run(OVERFLOW, kernel, LEVELS[0], 0).stderr == ""
    for level in LEVELS:
        done = run(OVERFLOW, kernel, level, 1)
        assert done.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
