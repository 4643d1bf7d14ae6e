# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels without a GPU: no warning, no spill, no local memory, reads of 16 bytes.

Registers are compared with those that were read when the kernels were last changed. Values are tested in
`test_cuda_emulated`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_cuda import KERNELS, XS

NVCC = shutil.which("nvcc")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found on PATH"),
]
CHIPS = ("sm_80", "sm_90a", "sm_100", "sm_120")
STRICT = ["-Xptxas=-v,-warn-spills,-warn-lmem-usage", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
#: Version of nvcc that the figures below are of.
VERSION = "13.0"
#: Most registers of the kernels of one token, and of all, by chip and dtype of x.
REGISTERS = {
    ("sm_80", "FLOAT32"): (110, 118),
    ("sm_80", "BFLOAT16"): (109, 111),
    ("sm_80", "FLOAT16"): (109, 111),
    ("sm_90a", "FLOAT32"): (109, 120),
    ("sm_90a", "BFLOAT16"): (106, 112),
    ("sm_90a", "FLOAT16"): (106, 110),
    ("sm_100", "FLOAT32"): (128, 128),
    ("sm_100", "BFLOAT16"): (122, 128),
    ("sm_100", "FLOAT16"): (123, 128),
    ("sm_120", "FLOAT32"): (128, 128),
    ("sm_120", "BFLOAT16"): (122, 128),
    ("sm_120", "FLOAT16"): (122, 128),
}
#: Registers with which two blocks of the most threads run on a multiprocessor.
LIMIT = 65536 // (2 * 8 * 32)
KERNEL = re.compile(
    r"Compiling entry function '\w*rows_kernelI(?P<name>\w+?)EEEv\w+' for '(?P<chip>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compiled(chip: str, x: str, kind: str, folder: Path) -> tuple[str, Path]:
    """What the compiler says of the kernels for one chip and dtype of x, and the file that it writes."""
    assert NVCC is not None
    out = folder / f"{chip}_{x}.{kind}"
    target = f"-gencode=arch={chip.replace('sm', 'compute')},code={chip}"
    if kind == "ptx":
        target = f"-arch={chip.replace('sm', 'compute')}"
    command = [NVCC, "-std=c++17", "-O3", f"-{kind}", target, *STRICT, f"-DPYLEARNGENE_X={x}", "-o", out]
    done = subprocess.run(
        [*map(str, command), str(KERNELS / "expansion.cu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, out


@pytest.fixture(scope="module", params=[(chip, x) for chip in CHIPS for x in XS], ids="-".join)
def listing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    return compiled(*request.param, "cubin", tmp_path_factory.mktemp("compiled"))


def disassembler() -> str | None:
    """Of CUDA, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    folders = (
        [Path(folder) / "backends/nvidia/bin" for folder in triton.submodule_search_locations or []] if triton else []
    )
    return shutil.which("nvdisasm") or next(
        (found for f in folders if (found := shutil.which("nvdisasm", path=f))), None
    )


def test_no_kernel_warns_spills_or_uses_local_memory(listing: tuple[str, Path], request: pytest.FixtureRequest) -> None:
    chip, x = request.node.callspec.params["listing"]
    text, _ = listing
    assert "warning" not in text
    kernels = [match.groupdict() for match in KERNEL.finditer(text)]
    # Tokens 1, 4, 8 and 16 with 2, 4 and 8 genes, and one for odd addresses, per dtype of the genes.
    assert len(kernels) == 13 * (3 if x == "FLOAT32" else 2)
    for kernel in kernels:
        assert kernel["chip"] == chip
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel["name"]
        assert int(kernel["registers"]) <= LIMIT
    one = max(int(kernel["registers"]) for kernel in kernels if re.search(r"Li1ELi\dELi\dELb1$", kernel["name"]))
    most = max(int(kernel["registers"]) for kernel in kernels)
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {VERSION}," in version:
        assert (one, most) == REGISTERS[chip, x]


def test_genes_are_read_16_bytes_at_a_time_and_kept(listing: tuple[str, Path]) -> None:
    """Past L1, read-only; in machine code, where the hint of the instruction is a number, and in PTX by name."""
    tool = disassembler()
    if tool is None:
        pytest.skip("nvdisasm was not found")
    code = subprocess.run([tool, str(listing[1])], capture_output=True, text=True, check=True).stdout
    assert "LDG.E.NA.128.CONSTANT" in code
    assert not re.search(r"\b(LDL|STL)\b", code)


def test_hint_that_keeps_genes_in_l2(tmp_path: Path) -> None:
    text = compiled("sm_80", "BFLOAT16", "ptx", tmp_path)[1].read_text()
    reads = text.count("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32")
    # 4 rows of 2 genes, 2 of 4 and 1 of 8 are 8 reads, with 8 and 16 tokens 4 at 2 genes; all for two dtypes of genes.
    assert reads == 2 * (4 * 3 * 8 - 2 * 4)
    # The kernels for odd addresses read element by element.
    assert text.count("createpolicy.fractional.L2::evict_last.b64") == text.count(".entry") - 2
