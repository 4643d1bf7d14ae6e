# SPDX-License-Identifier: Apache-2.0
"""What the native module needs from outside and shows to it, read from its ELF tables: no torch, no library of its own.

The wheel around it is tested in `test_packaging`.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pylearngene import _C, _backends

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the tables of Linux are read"),
    pytest.mark.skipif(hasattr(_C, "planted"), reason="the module of `make sanitize` needs the sanitizers"),
]
SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgomp.so.1", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
NEEDED, RPATH, RUNPATH = 1, 15, 29
DYNAMIC, DYNSYM = 6, 11  # kinds of sections
STACK, EXECUTABLE = 0x6474E551, 1


@dataclass
class Module:
    """Libraries that are needed, paths to search them, symbols that are missing and that are shown."""

    needed: set[str]
    paths: list[str]
    missing: set[str]
    shown: set[str]
    executable_stack: bool


def read(path: Path) -> Module:
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "64 bits, little endian"
    segments, sections = struct.unpack_from("<QQ", data, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", data, 54)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + n * section_size) for n in range(section_count)]

    def rows(kind: int, form: str) -> list[tuple[tuple[int, ...], bytes]]:
        (header,) = (header for header in headers if header[1] == kind)
        start, size, strings = header[4], header[5], headers[header[6]]
        names = data[strings[4] : strings[4] + strings[5]]
        return [(row, names) for row in struct.iter_unpack(form, data[start : start + size])]

    def name(names: bytes, place: int) -> str:
        return names[place : names.index(b"\0", place)].decode()

    module = Module(set(), [], set(), set(), False)
    for (tag, value), names in rows(DYNAMIC, "<QQ"):
        if tag == NEEDED:
            module.needed.add(name(names, value))
        elif tag in (RPATH, RUNPATH):
            module.paths.append(name(names, value))
    for (place, info, _, section, *_), names in rows(DYNSYM, "<IBBHQQ"):
        weak = info >> 4 == 2
        if place and section:
            module.shown.add(name(names, place))
        elif place and not weak:
            module.missing.add(name(names, place))
    for n in range(segment_count):
        kind, flags = struct.unpack_from("<II", data, segments + n * segment_size)
        module.executable_stack |= kind == STACK and bool(flags & EXECUTABLE)
    return module


@pytest.fixture(scope="module")
def module() -> Module:
    return read(Path(_C.__file__))


def test_only_system_libraries_are_needed_and_found_where_they_are(module: Module) -> None:
    assert "libgomp.so.1" in module.needed
    assert module.needed <= SYSTEM
    assert module.paths == []
    assert not module.executable_stack


def test_every_missing_symbol_is_in_python_or_a_needed_library(module: Module) -> None:
    libraries = [ctypes.CDLL(name) for name in sorted(module.needed)]
    python = ctypes.CDLL(None)
    foreign = {name for name in module.missing if not name.startswith(("Py", "_Py"))}
    assert {"GOMP_parallel", "omp_get_num_threads"} & foreign
    assert not [name for name in module.missing - foreign if not hasattr(python, name)]
    assert not [name for name in foreign if not any(hasattr(library, name) for library in libraries)]
    assert not [name for name in module.missing if any(part in name for part in ("c10", "2at", "torch"))]


def test_nothing_of_ours_is_shown_but_the_entry(module: Module) -> None:
    """Of two versions loaded together neither sees the other's kernels.

    What is left are templates of the library, and types of functions of nothing but numbers, which have no names.
    """
    theirs = r"_Z(T[ISV])?Z?(NK?)?(St|9__gnu_cxx)|_ZT[IS]P?F[a-z]+E$"
    ours = {name for name in module.shown if not re.match(theirs, name)}
    assert ours == {"PyInit__C"}


def test_module_for_cuda_needs_and_shows_as_little() -> None:
    """It has the CUDA runtime inside, which looks for the driver when it is first used."""
    loaded, reason = _backends._load_cuda()
    if loaded is None:
        pytest.skip(reason)
    cuda = read(Path(str(loaded.__file__)))
    assert cuda.needed <= SYSTEM | {"libdl.so.2", "libpthread.so.0", "librt.so.1"}
    assert cuda.paths == []
    assert not cuda.executable_stack
    assert not [name for name in cuda.missing if re.match(r"cu[A-Z]|cuda[A-Z]", name)]
    assert not [name for name in cuda.missing if any(part in name for part in ("c10", "2at", "torch"))]
    ours = {name for name in cuda.shown if not re.match(r"_Z(T[ISV])?Z?(NK?)?(St|9__gnu_cxx)", name)}
    assert ours == {"PyInit__cuda"}
