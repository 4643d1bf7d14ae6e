# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel takes and which matrix instructions it uses, read from its PTX and its machine code.

Uses the tools that Triton brings along; needs neither a GPU nor a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WGMMA = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{|\S)")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [str(_TOOLS / "cuobjdump"), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def figures(compiled: Any) -> dict[str, int]:
    """Registers, stack, spills, shared memory and matrix instructions of a compiled kernel.

    Args:
        compiled: what `triton.compile` returns.

    Returns:
        `registers` per thread; `stack` and `local` bytes; `spills`: loads and stores of local memory; `shared` bytes;
        `wgmma`, of which `wgmma_register_a` take the first operand from registers, `wgmma_wait`: how many groups stay
        in flight at most while the next is prepared; `tcgen05`; `mma`; `async_copies`.
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
        "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
    }
