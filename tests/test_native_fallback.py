# SPDX-License-Identifier: Apache-2.0
"""What happens where the native module is missing, broken, foreign or of another version: the package stays whole.

They are loaded in processes of their own, since a broken module may do anything.
Names and contents of the wheel are tested in `test_packaging`.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pylearngene

PACKAGE = Path(pylearngene.__file__).parent
SUFFIXES = tuple(importlib.machinery.EXTENSION_SUFFIXES)


def native(folder: Path) -> Path:
    (found,) = (path for path in folder.glob("_C.*") if path.name.endswith(SUFFIXES))
    return found


def replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))

    return change


def foreign(path: Path) -> None:
    """A module of another package under our name."""
    (other,) = (p for p in Path(np.__file__).parent.glob("_core/_simd.*") if p.name.endswith(SUFFIXES))
    shutil.copy(other, path)


def of_another_processor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    assert content[:4] == b"\x7fELF"
    content[18] = 8  # e_machine: MIPS
    path.write_bytes(content)


VERSION = pylearngene.__version__.encode()
LOADS_NOT = "the native module pylearngene._C did not load: "
#: What is done to the module, and how the reason begins.
BREAKAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, LOADS_NOT + "No module named 'pylearngene._C'"),
    "of another Python": (
        lambda path: shutil.move(path, path.with_name("_C.cpython-310-x86_64-linux-gnu.so")),
        LOADS_NOT + "No module named 'pylearngene._C'",
    ),
    "empty": (lambda path: path.write_bytes(b""), LOADS_NOT),
    "text": (lambda path: path.write_text("not a module\n" * 100), LOADS_NOT),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:40]), LOADS_NOT),
    "of another processor": (of_another_processor, LOADS_NOT),
    "foreign": (foreign, LOADS_NOT + "dynamic module does not define module export function"),
    "without a version": (
        lambda path: (path.unlink(), path.with_name("_C.py").write_text("")),
        LOADS_NOT + "module 'pylearngene._C' has no attribute 'version'",
    ),
    "of an older version": (
        replace(b"\0" + VERSION + b"\0", b"\0" + b"0" * len(VERSION) + b"\0"),
        f"the native module pylearngene._C is of version {'0' * len(VERSION)}, "
        f"the package of {pylearngene.__version__}",
    ),
}  # fmt: skip

REASONS = """
import importlib, sys, pylearngene
from pylearngene import _backends
for folder in sys.argv[1:]:
    pylearngene.__path__[:] = [folder]
    sys.modules.pop("pylearngene._C", None)
    importlib.invalidate_caches()
    module, reason = _backends._load()
    print(module, reason, flush=True)
"""

EVERYTHING = """
import json, torch, torch.nn.functional as F, pylearngene as plg
from typer.testing import CliRunner
from pylearngene.cli import app
f = plg.functional
torch.manual_seed(0)
genes, coeffs = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)], torch.rand(2).double()
x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
weight = coeffs[0] * genes[0] + coeffs[1] * genes[1]
torch.testing.assert_close(f.expansion_weight(genes, coeffs), weight)
results = f.expansion_linear(x, genes, coeffs), x @ weight.T
torch.testing.assert_close(*results)
for got, expected in zip(*(torch.autograd.grad(y.square().sum(), [x, *genes]) for y in results)):
    torch.testing.assert_close(got, expected)
image, filters = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 3, 3, 3)
expected = F.conv2d(image, (coeffs.float()[:, None, None, None, None] * filters).sum(0))
torch.testing.assert_close(f.expansion_conv2d(image, filters, coeffs.float()), expected)
for backend in ("cpp", "reference"):
    try:
        plg.set_backend(backend)
    except plg.errors.BackendError as error:
        print(error)
print(json.dumps([CliRunner().invoke(app, ["env", *more]).output for more in ([], ["--json"])]))
"""


def output(code: str, folder: Path, *arguments: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYLEARNGENE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a missing module is said where it is asked for, not at every import"
    return done.stdout.splitlines()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the package in it, without its native module."""
    left_out = shutil.ignore_patterns("__pycache__", native(PACKAGE).name)
    shutil.copytree(PACKAGE, tmp_path / "bare" / "pylearngene", ignore=left_out)
    return tmp_path / "bare"


def test_every_broken_module_is_one_line_of_reason(bare: Path, tmp_path: Path) -> None:
    module = native(PACKAGE)
    for name, (damage, _) in BREAKAGES.items():
        (tmp_path / name).mkdir()
        damage(Path(shutil.copy(module, tmp_path / name)))
    lines = output(REASONS, bare, *(str(tmp_path / name) for name in BREAKAGES))
    for (name, (_, reason)), line in zip(BREAKAGES.items(), lines, strict=True):
        assert line.startswith(f"None {reason}"), name


@pytest.mark.parametrize("name", ["missing", "of an older version"])
def test_everything_works_without_the_module_and_env_says_why_once(name: str, bare: Path) -> None:
    BREAKAGES[name][0](Path(shutil.copy(native(PACKAGE), bare / "pylearngene")))
    refusal, shown = output(EVERYTHING, bare)
    assert refusal.startswith("backend: 'cpp' is not available here: the native module pylearngene._C")
    text, facts = json.loads(shown)
    (line,) = (line for line in text.splitlines() if "pylearngene._C" in line)
    assert line.split()[:3] == ["expansion", "cpu", "reference"]
    (row,) = (row for row in json.loads(facts)["backends"] if "pylearngene._C" in row["reason"])
    assert (row["op"], row["device"], row["backend"]) == ("expansion", "cpu", "reference")
    assert row["reason"] in line
    assert f"faster expansion on cpu: {row['command']}" in text
