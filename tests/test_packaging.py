# SPDX-License-Identifier: Apache-2.0
"""What is installed and how it imports: names, contents of the wheel, and what happens when parts are missing.

Each check of an import runs in a process of its own, on a search path put together for it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.machinery
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import pylearngene
from pylearngene import _C

REPOSITORY = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])


def installed() -> importlib.metadata.Distribution:
    """The installed wheel; an editable install or a source tree on the path is not what is tested here."""
    try:
        distribution = importlib.metadata.distribution("pylearngene")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pylearngene is not installed; `make test` installs the wheel first")
    if not any(path.name == "__init__.py" for path in distribution.files or []):
        pytest.skip("pylearngene is installed in editable mode; `make test` installs the wheel")
    return distribution


def native_module(folder: Path) -> Path:
    (found,) = (
        path for path in folder.glob("_C*") if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    )
    return found


@pytest.fixture(scope="module")
def package() -> Path:
    return Path(str(installed().locate_file("pylearngene")))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with everything that is installed here, except for pylearngene and triton."""
    folder = tmp_path_factory.mktemp("others")
    for entry in SITE.iterdir():
        if not re.match(r"_?(pylearngene|triton|__pycache__)", entry.name):
            (folder / entry.name).symlink_to(entry)
    return folder


def process(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 900}
    result = subprocess.run(command, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run(code: str, *search_path: Path, **environment: str) -> str:
    """Prints of `code` in a fresh process that sees the standard library and the given folders."""
    start = "import sys, site\nfor folder in sys.argv[1:]: site.addsitedir(folder)\n"
    command = [sys.executable, "-S", "-c", start + code, *map(str, search_path)]
    return process(command, search_path[0], environment).strip()


SEARCH = """
import importlib.util, pylearngene, pylearngene.triton_kernels
print(importlib.util.find_spec("triton_kernels"))
"""


def test_wheel_installs_one_name(package: Path, others: Path, tmp_path: Path) -> None:
    files = installed().files or []
    tops = {path.parts[0] for path in files if path.parts[0] != ".."}
    assert tops == {"pylearngene", f"pylearngene-{installed().version}.dist-info"}
    assert "pylearngene/triton_kernels/__init__.py" in map(str, files)
    assert {"pylearngene/py.typed", "pylearngene/_C.pyi"} <= set(map(str, files))
    (tmp_path / "pylearngene").symlink_to(package)
    assert run(SEARCH, tmp_path, others) == "None"


def test_wheel_holds_the_sources_and_one_module(package: Path) -> None:
    """Nothing is left out, nothing comes along, and every file is the one that RECORD says."""
    sources = {f"pylearngene/{path.relative_to(REPOSITORY / 'pylearngene')}" for path in tracked("pylearngene")}
    sources |= {f"pylearngene/{path.relative_to(REPOSITORY)}" for path in tracked("triton_kernels")}
    # The module for CUDA is there where nvcc was.
    found = [
        path.name
        for path in package.glob("_cuda*")
        if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    ]
    native = {f"pylearngene/{name}" for name in (native_module(package).name, *found)}
    assert len(native) <= 2
    record = {str(path): path for path in installed().files or []}
    caches = {name for name in record if "__pycache__" in name}
    outside = {name for name in record if ".dist-info/" in name or name.startswith(("..", "bin/"))}
    assert record.keys() - caches - outside == sources | native
    for path in (record[name] for name in sources | native):
        digest = base64.urlsafe_b64encode(hashlib.new(path.hash.mode, path.read_binary()).digest()).decode()
        assert path.hash.value == digest.rstrip("=")


def tracked(folder: str) -> list[Path]:
    files = (REPOSITORY / folder).rglob("*")
    return [path for path in files if path.suffix in (".py", ".pyi", ".typed") and "__pycache__" not in path.parts]


def test_editable_install_leaks_no_name(others: Path, tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    build = "import sys; from scikit_build_core.build import build_editable; build_editable(sys.argv[1])"
    process([sys.executable, "-c", build, str(tmp_path)], REPOSITORY)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert run(SEARCH, tmp_path / "site", others) == "None"
    where = run("import pylearngene; print(pylearngene.__file__)", tmp_path / "site", others)
    assert Path(where) == REPOSITORY / "pylearngene" / "__init__.py"


@pytest.mark.parametrize("foreign_first", [True, False])
def test_foreign_triton_kernels_stays_itself(package: Path, others: Path, tmp_path: Path, foreign_first: bool) -> None:
    foreign, ours = tmp_path / "foreign", tmp_path / "ours"
    (foreign / "triton_kernels").mkdir(parents=True)
    (foreign / "triton_kernels" / "__init__.py").write_text("MARK = 'foreign'\n")
    ours.mkdir()
    (ours / "pylearngene").symlink_to(package)
    code = """
import pylearngene, sys
assert "triton_kernels" not in sys.modules
import triton_kernels, pylearngene.triton_kernels
assert not hasattr(pylearngene.triton_kernels, "MARK")
print(triton_kernels.MARK, len(pylearngene.backends()) > 0)
"""
    order = (foreign, ours) if foreign_first else (ours, foreign)
    assert run(code, *order, others) == "foreign True"


def test_native_module_is_free_of_torch_and_vendors_nothing(package: Path) -> None:
    names = native_module(package).read_bytes()
    assert b"libgomp.so.1" in names or b"libomp" in names  # the search below does look into the right file
    assert not re.findall(rb"_ZN?K?(?:2at|3c10|5torch)|libtorch|libc10", names)
    assert [str(path) for path in installed().files or [] if "gomp" in path.name or ".libs" in str(path)] == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime(package: Path, others: Path, tmp_path: Path) -> None:
    (tmp_path / "pylearngene").symlink_to(package)
    code = """
import torch, pylearngene
from pylearngene import _C
torch.set_num_threads(2)
x, genes, coeffs = torch.randn(8, 512), torch.randn(2, 512, 512), torch.randn(2)
for tokens in (8, 64):  # our parallel region, then the one of a vendor's product
    pylearngene.functional.expansion_linear(x.repeat(tokens // 8, 1), genes, coeffs)
lines = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}))
"""
    assert run(code, tmp_path, others) == "1"


def test_versions_agree() -> None:
    assert pylearngene.__version__ == _C.version == installed().version
    (script,) = (entry for entry in installed().entry_points if entry.group == "console_scripts")
    assert (script.name, script.value) == ("pylearngene", "pylearngene.cli:main")


def test_import_without_native_module_and_triton(package: Path, others: Path, tmp_path: Path) -> None:
    shutil.copytree(
        package, tmp_path / "pylearngene", ignore=shutil.ignore_patterns("_C*.so", "_C*.pyd", "__pycache__")
    )
    code = """
import torch, pylearngene as plg
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
x, genes, coeffs = torch.randn(3, 5), torch.randn(2, 4, 5), torch.randn(2)
y = plg.functional.expansion_linear(x, genes, coeffs)
torch.testing.assert_close(y, x @ (coeffs[:, None, None] * genes).sum(0).T)
for report in plg.backends():
    if (report.op, report.device) == ("expansion", "cpu"):
        print(report.backend, "pylearngene._C" in report.reason, bool(report.command))
"""
    lines = run(code, tmp_path, others).splitlines()
    assert lines
    assert set(lines) == {"reference True True"}


def test_level_follows_torch(package: Path, others: Path, tmp_path: Path) -> None:
    """One machine runs every level: torch's own switch caps ours, and all levels give the same weight."""
    (tmp_path / "pylearngene").symlink_to(package)
    code = """
import torch, pylearngene as plg
from pylearngene import _C, _backends
genes = (torch.arange(3 * 17 * 23) * 37 % 101 / 7).view(3, 17, 23)
weight = plg.functional.expansion_weight(genes, torch.arange(3) / 3)
print(_C.levels()[_backends.LEVEL], torch.backends.cpu.get_cpu_capability(), weight.view(torch.int32).sum().item())
"""
    weights = set()
    for cap in ("default", "avx2", "avx512", ""):
        environment = {"ATEN_CPU_CAPABILITY": cap} if cap else {}
        level, capability, weight = run(code, tmp_path, others, **environment).split()
        assert level == capability or (level, capability, cap) == ("AVX512_BF16", "AVX512", "")
        assert cap == "" or level.lower() == cap or cap.upper() not in _C.supported_levels()
        weights.add(weight)
    assert len(weights) == 1
