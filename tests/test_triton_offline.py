# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, compiled for every chip and row of the launch table without a GPU: what it takes, what it uses.

One kernel in `make test`; all of them, with both versions of Triton, in `make test-full`. Values are tested in
`test_expansion_triton`.
"""

from __future__ import annotations

import ast
import csv
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
figures: Any = importlib.import_module("pylearngene.triton_kernels._figures")
FOLDER = Path(table.__file__).parent
OTHER = Path(sys.prefix) / "triton-other"
RECORDED = Path(__file__).with_name("offline_figures.csv")
RECORD = """
the compiled kernels differ from tests/offline_figures.csv. If they are meant to, write it anew, once per Triton:
  cd /tmp && .../.venv/bin/python -m pylearngene.triton_kernels.offline --csv .../tests/offline_figures.csv
  cd /tmp && PYTHONPATH=.../.venv/triton-other .../.venv/bin/python -m pylearngene.triton_kernels.offline --csv ...
"""
#: Shared memory that one program may take, from NVIDIA's tables of technical specifications per compute capability.
LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
#: What a recorded row is known by, what must stay as it is, and what may only shrink.
KEYS = ("triton", "kernel", "row", "chip", "form", "genes", "gene", "x")
EXACTLY = ("spills", "wgmma", "wgmma_register_a", "wgmma_wait", "tcgen05", "mma", "loads", "stores", "copies")
AT_MOST = ("registers", "shared")

ONE = """
import json
from pylearngene.triton_kernels.offline import compile_all, jobs
job = next(job for job in jobs(("sm_90",), ("fused",)) if job.row.tile == (128, 128, 64) and job.variant.form == "dx")
print(json.dumps(compile_all([job], 1)[0]))
"""

LAUNCHES = """
import json, re, torch
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
    ptx = kernel.asm["ptx"]
    narrow = len(re.findall(r"ld\\.global(?!\\S*\\.v4\\.b32)", ptx))
    print(json.dumps([self.__name__, kernel.metadata.shared, ptx.count("wgmma.mma_async"), narrow]))
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
x, genes, buffers = torch.zeros(4096, 768, dtype=half), [torch.zeros(768, 768)] * 2, [torch.zeros(768, 768)] * 2
launchers.gene_gradients(buffers, x, x, genes, c, True)
launchers.fill(torch.empty(384, 768, dtype=half), genes, c, row=384)
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
    everything = [json.loads(line) for line in result.stdout.splitlines()]
    assert everything[-4][0] == "finish", "the product of few tokens is split"
    seen = [entry for entry in everything if entry[0] != "finish"]
    regular, irregular, split = seen[:6], seen[6:-4], seen[-4:]
    assert [name for name, *_ in split] == ["fused", "gene_gradients", "accumulate", "synthesize"]
    assert [name for name, *_ in regular] == [name for name, *_ in irregular]
    # Coefficients alone are read by less than 16 bytes, and genes of 16 bits by the sums beside float32 accumulators.
    assert [(name, narrow) for name, _, _, narrow in split[1:]] == [
        ("gene_gradients", 0), ("accumulate", 2), ("synthesize", 2),
    ]  # fmt: skip
    assert [(name, narrow) for name, _, _, narrow in regular[4:5]] == [("synthesize", 4)]
    assert [shared for _, shared, *_ in regular[:3]] == [147456, 139264, 114688], (
        "other rows than those compiled offline"
    )
    assert all(products > 0 for name, _, products, _ in seen if name in ("fused", "gene_gradients"))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--chips", "sm_75"], {}, "expected names of sm_80, sm_89, sm_90, sm_100, sm_120, got sm_75"),
        (
            ["--kernels", "wavelet"],
            {},
            "expected names of gene_gradients, accumulate, synthesize, fused, finish, got wave",
        ),
        (["--csv", "f.csv", "--chips", "sm_90"], {}, "--csv: expected all chips and kernels, got some"),
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


def is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator) == "triton.jit"


def decorated() -> dict[str, str]:
    """The functions of our modules that carry `@triton.jit`, with their module, read off the source."""
    found = {}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(map(is_jit, node.decorator_list)):
                found[node.name] = path.stem
    return found


@pytest.mark.full
def test_every_kernel_row_and_chip_is_there(rows: list[dict[str, Any]]) -> None:
    launched = {name for name, module in decorated().items() if module.endswith("_kernels")}
    assert launched == {row.kernel for row in table.ROWS}
    thorough = rows[0]["triton"].startswith("3.6.")
    every = [(row, chip) for row in table.ROWS for chip in row.chips if chip in LIMITS]
    expected = [(row.kernel, row.name, chip) for row, chip in every if thorough or not row.candidate]
    assert len(set(expected)) == len(expected), "two rows of one name"
    assert {(row["kernel"], row["row"], row["chip"]) for row in rows} == set(expected)
    assert {chip for _, _, chip in expected} == set(LIMITS) == set(row_of.CHIPS)
    assert {row["genes"] for row in rows} >= {2, 4, 8}
    halves = {"bf16", "fp16"} if thorough else {"bf16"}
    assert {row["gene"] for row in rows if row["kernel"] == "fused"} == {*halves, "fp32"}
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


def bits_of(widths: str) -> dict[int, int]:
    """How many accesses there are of which width."""
    return {int(bits): int(count) for count, _, bits in (part.partition("x") for part in widths.split())}


@pytest.mark.full
def test_regular_layouts_are_read_and_written_16_bytes_at_a_time(rows: list[dict[str, Any]]) -> None:
    """Of 128 bits are all accesses but those of coefficients, one each, and of sums per gene.

    `accumulate` and `gene_gradients` take 4 columns a thread: 16 bytes of each float32 accumulator, gene and panel, and
    8 bytes where genes or the panel have 16 bits. Products copy 16 bytes at a time where x comes through shared memory.
    """
    seen = set()
    for row in rows:
        if row["irregular"] or row["kernel"] not in ("synthesize", "accumulate", "gene_gradients"):
            continue
        seen.add((row["kernel"], row["chip"], row["gene"], row["x"]))
        loads, stores, genes = bits_of(row["loads"]), bits_of(row["stores"]), row["genes"]
        if row["kernel"] == "synthesize":
            assert (set(loads), set(stores), loads[32]) == ({32, 128}, {128}, genes)
            elements = tile_elements(row["row"])
            assert loads[128] == genes * elements * (4 if row["gene"] == "fp32" else 2) // 16
            assert stores[128] == elements * (4 if row["x"] == "fp32" else 2) // 16
            continue
        if row["form"] == "split":
            assert (set(loads), set(stores)) == (set(), {128})
        else:
            narrow = 64 if "16" in row["gene"] + (row["x"] if row["kernel"] == "accumulate" else "") else 128
            assert set(loads) <= {32, narrow, 128}
            assert set(stores) <= {32, 128}
            assert (loads[32], stores.get(32, 0)) == (genes, genes if row["form"] == "dots" else 0)
            elements = 32 if row["kernel"] == "accumulate" else tile_elements(row["row"])
            assert stores[128] == genes * elements // 4
            assert loads[128] >= stores[128]
        if row["kernel"] == "gene_gradients":
            assert set(bits_of(row["copies"])) == {128}
    assert {(kernel, chip) for kernel, chip, _, _ in seen} >= {
        (kernel, chip) for kernel in ("synthesize", "accumulate", "gene_gradients") for chip in LIMITS
    }
    halves = {"bf16", "fp16"} if rows[0]["triton"].startswith("3.6.") else {"bf16"}
    assert {gene for kernel, chip, gene, _ in seen if (kernel, chip) == ("synthesize", "sm_90")} == {*halves, "fp32"}


def tile_elements(name: str) -> int:
    """Elements per thread of the output tile of a row such as `128x128x64-8w3s-32B` or `32x128-4w1s-64B`."""
    tile, _, rest = name.partition("-")
    out, inner = map(int, tile.split("x")[:2])
    return out * inner // (32 * int(rest.split("w")[0]))


@pytest.mark.full
def test_figures_are_those_recorded(rows: list[dict[str, Any]]) -> None:
    """Spills, widths and matrix instructions exactly; registers and shared memory at most as much."""
    with RECORDED.open(encoding="utf-8", newline="") as file:
        table = {tuple(row[name] for name in KEYS): row for row in csv.DictReader(file)}
    before = {key: row for key, row in table.items() if key[0] == rows[0]["triton"]}
    after = {tuple(str(row[name]) for name in KEYS): row for row in rows}
    assert len(after) == len(rows), "two rows of one name"
    assert sorted(set(after) ^ set(before)) == [], "rows that are missing or new: " + RECORD
    changed = []
    for key, row in after.items():
        known = before[key]
        changed += [(key, name, known[name], row[name]) for name in EXACTLY if str(row[name]) != known[name]]
        changed += [(key, name, known[name], row[name]) for name in AT_MOST if row[name] > int(known[name])]
    assert changed == [], RECORD


def test_recording_replaces_the_rows_of_one_version(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    names = (*KEYS, *EXACTLY, *AT_MOST)
    old, new = (dict.fromkeys(names, value) | {"triton": value} for value in ("1.0", "2.0"))
    figures.record(path, [new | {"genes": 16, "more": 1}, new | {"genes": 8}])
    figures.record(path, [old])
    figures.record(path, [new | {"genes": 4}])
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert [(row["triton"], row["genes"]) for row in reader] == [("1.0", "1.0"), ("2.0", "4")]
        assert set(reader.fieldnames or ()) == set(names)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.full
def test_both_versions_are_recorded() -> None:
    with RECORDED.open(encoding="utf-8", newline="") as file:
        versions = {row["triton"] for row in csv.DictReader(file)}
    assert versions == {"3.6.0", "3.8.0"}, RECORD
