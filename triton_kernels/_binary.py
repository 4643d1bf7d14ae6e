# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel takes, which matrix instructions and how wide accesses it uses, read from its machine code.

Uses the tools that Triton brings along; needs neither a GPU nor a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WGMMA = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{|\S)")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
#: Suffixes of a load or store that say how many bits one thread moves; 32 where there is none.
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _widths(opcode: str, machine_code: str) -> str:
    """How often each width of an opcode occurs, such as `8x32 64x128`: 8 of 32 bits, 64 of 128 bits."""
    found = re.findall(rf"\b{opcode}\b((?:\.\w+)*)", machine_code)
    counts = Counter(max((_BITS[part] for part in suffix.split(".") if part in _BITS), default=32) for suffix in found)
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items()))


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [str(_TOOLS / "cuobjdump"), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def figures(compiled: Any) -> dict[str, Any]:
    """Registers, stack, spills, shared memory and matrix instructions of a compiled kernel.

    Args:
        compiled: what `triton.compile` returns.

    Returns:
        `registers` per thread; `stack` and `local` bytes; `spills`: loads and stores of local memory; `shared` bytes;
        `wgmma`, of which `wgmma_register_a` take the first operand from registers, `wgmma_wait`: how many groups stay
        in flight at most while the next is prepared; `tcgen05`; `mma`; `loads` and `stores` of global memory and
        `copies` from there into shared memory: how many of which bits, such as `8x32 64x128`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, machine_code = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    products = _WGMMA.findall(ptx)
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers.get("LOCAL", 0),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", machine_code)),
        "shared": int(compiled.metadata.shared),
        "wgmma": len(products),
        "wgmma_register_a": products.count("{"),
        "wgmma_wait": max((int(wait) for wait in _WAIT.findall(ptx)), default=0),
        "tcgen05": len(re.findall(r"\btcgen05\.mma\b", ptx)),
        "mma": len(re.findall(r"\bmma\.sync\b", ptx)),
        "loads": _widths("LDG", machine_code),
        "stores": _widths("STG", machine_code),
        "copies": _widths("LDGSTS", machine_code),
    }
