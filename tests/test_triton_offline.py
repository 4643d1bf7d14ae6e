# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, compiled for every chip and row of the launch table without a GPU: what it takes, what it uses.

One kernel in `make test`; all of them, with both versions of Triton, in `make test-full`. Values are tested in
`test_expansion_triton`.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
row_of: Any = importlib.import_module("pylearngene.triton_kernels._row")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")
FOLDER = Path(table.__file__).parent
OTHER = Path(sys.prefix) / "triton-other"
#: Shared memory that one program may take, from NVIDIA's tables of technical specifications per compute capability.
LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}

ONE = """
import json
from pylearngene.triton_kernels.offline import compile_all, jobs
job = next(job for job in jobs(("sm_90",), ("fused",)) if job.row.tile == (128, 128, 64) and job.variant.form == "dx")
print(json.dumps(compile_all([job], 1)[0]))
"""

LAUNCHES = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
driver.set_active(Driver())
import pylearngene.triton_kernels.expansion as launchers
from pylearngene.triton_kernels import _launch
_launch.chip = lambda device: "sm_90"
_launch.multiprocessors = lambda device: 132
launch = jit.JITFunction.run
def compile_only(self, *arguments, grid, warmup, **options):
    kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
    print(json.dumps([self.__name__, kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async")]))
jit.JITFunction.run = compile_only
half = torch.bfloat16
for tokens, out, inner, count in ((300, 256, 128, 4), (7, 33, 17, 2)):
    x, dy, c = torch.randn(tokens, inner).to(half), torch.randn(tokens, out).to(half), torch.randn(count)
    genes = [torch.randn(out, inner).to(half) for _ in range(count)]
    biases = [torch.randn(out).to(half) for _ in range(count)]
    launchers.product(torch.empty_like(dy), x, genes, c)
    launchers.product(torch.empty_like(x), dy, [gene.t() for gene in genes], c)
    launchers.product(torch.empty_like(dy), x, genes, c, None, biases, "gelu")
    buffers = [None] + [torch.zeros(out, inner) for _ in range(count - 1)]
    launchers.gene_gradients(buffers, dy, x, genes, c, True)
    launchers.fill(torch.empty(out, inner), genes, c)
    launchers.accumulate(torch.empty(out, inner), genes, c, buffers, 0, True)
x, genes, c = torch.randn(5, 4096).to(half), [torch.randn(64, 4096).to(half) for _ in range(2)], torch.randn(2)
launchers.product(x.new_empty(5, 64), x, genes, c, genes[0][:, 0].contiguous(), (), "silu")
"""


def run(folder: Path, *arguments: str, front: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """A process without the interpreter, away from the source folder; `front` comes first on its search path."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    if front is not None:
        paths = [str(front), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    options: dict[str, Any] = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *arguments], check=False, timeout=3000, **options)


def sound(row: dict[str, Any]) -> None:
    assert row["error"] == ""
    assert (row["stack"], row["local"], row["spills"]) == (0, 0, 0)
    assert row["shared"] <= row["shared_estimate"] <= LIMITS[row["chip"]]


def overlaps_on_hopper(row: dict[str, Any]) -> None:
    """Every product takes the synthesized operand from registers, with others in flight while it is made.

    With one stage, which few tokens have, other programs fill the time instead.
    """
    assert row["wgmma"] == row["wgmma_register_a"] > 0
    assert "1s-" in row["row"] or row["wgmma_wait"] > 0


def test_one_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    result = run(tmp_path, "-c", ONE)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    sound(row)
    overlaps_on_hopper(row)


@pytest.mark.full
def test_launches_compile_as_the_launchers_make_them(tmp_path: Path) -> None:
    """With a driver that only names a chip: arguments are bound and compiled as on a GPU, nothing is launched."""
    result = run(tmp_path, "-c", LAUNCHES, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    seen = [json.loads(line) for line in result.stdout.splitlines()]
    regular, irregular, split = seen[:6], seen[6:-2], seen[-2:]
    assert [name for name, *_ in split] == ["fused", "finish"]
    assert [name for name, *_ in regular] == [name for name, *_ in irregular]
    assert [shared for _, shared, _ in regular[:3]] == [147456, 139264, 114688], (
        "other rows than those compiled offline"
    )
    assert all(products > 0 for name, _, products in seen if name in ("fused", "gene_gradients"))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--chips", "sm_75"], {}, "expected names of sm_80, sm_89, sm_90, sm_100, sm_120, got sm_75"),
        (["--kernels", "wavelet"], {}, "expected names of synthesize, fused, gene_gradients, accumulate, got wavelet"),
        (["--workers", "0"], {}, "--workers: expected at least 1, got 0"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET: expected it unset, got 1"),
    ],
)
@pytest.mark.full
def test_wrong_arguments(tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str) -> None:
    result = run(tmp_path, "-m", "pylearngene.triton_kernels.offline", *arguments, **environment)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.full
def test_table_for_readers(tmp_path: Path) -> None:
    arguments = (
        "-m",
        "pylearngene.triton_kernels.offline",
        "--chips",
        "sm_80",
        "--kernels",
        "synthesize",
        "--workers",
        "1",
    )
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.split()[:7] == ["kernel", "row", "chip", "form", "K", "gene", "regs"]
    assert {line.split()[0] for line in lines} == {"synthesize"}


@pytest.fixture(scope="module", params=["installed", "other"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All rows of the report, once per version of Triton."""
    front = OTHER if request.param == "other" else None
    if front is not None and not front.is_dir():
        pytest.skip(f"{front} is not there; `make test-full` makes it")
    folder = tmp_path_factory.mktemp("offline")
    result = run(folder, "-m", "pylearngene.triton_kernels.offline", "--json", front=front)
    assert result.returncode == 0, result.stderr + result.stdout[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def decorated() -> dict[str, str]:
    """The functions of our modules that carry `@triton.jit`, with their module, read off the source."""
    found = {}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                found[node.name] = path.stem
    return found


@pytest.mark.full
def test_every_kernel_row_and_chip_is_there(rows: list[dict[str, Any]]) -> None:
    launched = {name for name, module in decorated().items() if module != "_tiles"}
    assert launched == {row.kernel for row in table.ROWS}
    expected = [(row.kernel, row.name, chip) for row in table.ROWS for chip in row.chips if chip in LIMITS]
    assert len(set(expected)) == len(expected), "two rows of one name"
    assert {(row["kernel"], row["row"], row["chip"]) for row in rows} == set(expected)
    assert {chip for _, _, chip in expected} == set(LIMITS) == set(row_of.CHIPS)
    assert {row["genes"] for row in rows} >= {2, 4, 8}
    assert {row["gene"] for row in rows if row["kernel"] == "fused"} == {"bf16", "fp16", "fp32"}
    forms = {(row["row"], row["chip"]): set() for row in rows if row["kernel"] == "fused" and not row["irregular"]}
    for row in rows:
        if (row["row"], row["chip"]) in forms and row["kernel"] == "fused":
            forms[row["row"], row["chip"]].add(row["form"])
    assert all(found == {"forward", "dx", "forward split", "dx split"} for found in forms.values())


@pytest.mark.full
def test_no_row_spills_or_takes_too_much_shared_memory(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        sound(row)


@pytest.mark.full
def test_products_use_the_matrix_units(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kernel"] not in ("fused", "gene_gradients"):
            continue
        assert row[{"sm_90": "wgmma", "sm_100": "tcgen05"}.get(row["chip"], "mma")] > 0
        if row["chip"] == "sm_90" and row["kernel"] == "fused":
            overlaps_on_hopper(row)
