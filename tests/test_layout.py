# SPDX-License-Identifier: Apache-2.0
"""The house rules, read off the disk: one stem per primitive, imports that run down, documented names, a true map.

Run as a program, this file redraws the tree in docs/architecture.md. What the code computes is tested elsewhere.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "pylearngene"
MAP = REPOSITORY / "docs" / "architecture.md"
FOLDERS = ("benchmarks", "csrc", "examples", "pylearngene", "tests", "triton_kernels")
CODE = {".py", ".pyi", ".h", ".cuh", ".cpp", ".cu"}

# A part of the package may import parts in lines above its own, and parts in its own line as long as there is no cycle.
ORDER = """
errors _version
_checks
files
maps reference triton_kernels _C _cuda
plan _backends _ops
functional
nn
learngene
hosts
methods
memory networks pretrained sharding summary trainable
data training
pylearngene
cli
__main__
"""
RANK = {part: rank for rank, line in enumerate(ORDER.split("\n")) for part in line.split()}
IMPORTED_WHERE_USED = {"huggingface_hub", "matplotlib", "sklearn", "timm", "transformers", "triton"}

PLACES = (
    "pylearngene/reference/{}.py",
    "pylearngene/functional/{}.py",
    "pylearngene/nn/{}.py",
    "triton_kernels/{}.py",
    "csrc/{}.h",
    "csrc/{}.cpp",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "tests/test_{}.py",
    "benchmarks/{}.py",
)
STEMS = sorted(path.stem for path in (PACKAGE / "reference").glob("*.py") if not path.stem.startswith("_"))
PUBLIC = ("", "functional", "nn", "methods", "training", "data", "hosts")


def code_files() -> list[Path]:
    files = (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.suffix in CODE)
    return sorted(path for path in files if "__pycache__" not in path.parts)


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def python_files(folder: Path) -> list[Path]:
    return [path for path in code_files() if path.suffix == ".py" and folder in path.parents]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Modules named by import statements; `from package import name` is `package.name` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def without_types(tree: ast.Module) -> ast.Module:
    """The module without what only a type checker imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def import_graph(types: bool = True) -> dict[str, set[str]]:
    trees = {module_name(path): parse(path) for path in python_files(PACKAGE)}
    if not types:
        trees = {name: without_types(tree) for name, tree in trees.items()}
    known = {*trees, "pylearngene._C", "pylearngene._cuda"}
    graph = {name: set(imported_modules(tree, known)) for name, tree in trees.items()}
    return {name: {other for other in others if other.split(".")[0] == "pylearngene"} for name, others in graph.items()}


def roots(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names}


def part(module: str) -> str:
    return [*module.split("."), "pylearngene"][1]


def summary_of(path: Path) -> str:
    """First sentence of a file: of its docstring, or of the comment at its head."""
    if path.suffix in (".py", ".pyi"):
        return (ast.get_docstring(parse(path)) or "").split("\n")[0]
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    head = []
    while lines and lines[0].startswith("//"):
        head.append(lines.pop(0).removeprefix("//").strip())
    return re.split(r"(?<=\.)\s", " ".join(head))[0]


def draw(folder: Path, depth: int = 1) -> Iterator[str]:
    below = [path for path in code_files() if folder in path.parents]
    for path in below:
        if path.parent == folder:
            yield f"{'  ' * depth + path.name:<34}{summary_of(path)}".rstrip()
    for name in sorted({path.relative_to(folder).parts[0] for path in below if path.parent != folder}):
        yield "  " * depth + name + "/"
        yield from draw(folder / name, depth + 1)


def drawn_tree() -> str:
    lines = []
    for folder in FOLDERS:
        if any(REPOSITORY / folder in path.parents for path in code_files()):
            lines += [folder + "/", *draw(REPOSITORY / folder)]
    return "```text\n" + "\n".join(lines) + "\n```"


def map_with(tree: str) -> str:
    return re.sub(r"```text\n.*?```", lambda _: tree, MAP.read_text(encoding="utf-8"), count=1, flags=re.DOTALL)


@pytest.mark.parametrize("stem", STEMS)
def test_stem_is_in_every_place_or_says_why_not(stem: str) -> None:
    docstring = ast.get_docstring(parse(PACKAGE / "reference" / f"{stem}.py")) or ""
    excused = dict(re.findall(r"^Absent: (\S+), because (.+)$", docstring, flags=re.MULTILINE))
    places = {place.format(stem) for place in PLACES}
    missing = {place for place in places if not (REPOSITORY / place).exists()}
    assert set(excused) <= places, "Absent: names a place that no primitive has"
    assert missing == set(excused), f"reference/{stem}.py must say `Absent: <place>, because ...` for exactly these"


def test_build_knows_every_stem() -> None:
    (primitives,) = re.findall(r"set\(PRIMITIVES ([^)]*)\)", (REPOSITORY / "CMakeLists.txt").read_text())
    native = {path.stem for path in (REPOSITORY / "csrc" / "cpu").glob("*.cpp")}
    assert sorted(primitives.split()) == sorted(native)
    assert native <= set(STEMS)


def test_imports_run_down() -> None:
    graph = import_graph()
    unknown = {part(name) for name in graph} - set(RANK)
    assert not unknown, "give the new part of the package its line in ORDER"
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if part(name) != part(other) and RANK[part(other)] > RANK[part(name)]
    ]
    assert not wrong


def test_no_import_cycle() -> None:
    graph = {name: others - {name} for name, others in import_graph(types=False).items()}
    size = 0
    while size != len(graph):  # leave out what imports nothing that is left, or is imported by nothing that is left
        size = len(graph)
        wanted = set().union(*graph.values())
        graph = {name: others & set(graph) for name, others in graph.items() if others & set(graph) and name in wanted}
    assert not graph, "these import each other"


def test_imports_stand_at_the_top() -> None:
    hidden = []
    for path in python_files(PACKAGE):
        functions = (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        names = {name for function in functions for name in imported_modules(function, {"pylearngene._C"})}
        allowed = {name for name in names if name.split(".")[0] in IMPORTED_WHERE_USED or name == "pylearngene._C"}
        hidden += [f"{relative(path)} imports {name} inside a function" for name in names - allowed]
    assert not hidden


def test_nobody_imports_the_bare_triton_kernels() -> None:
    paths = (path for folder in FOLDERS for path in python_files(REPOSITORY / folder))
    importers = [relative(path) for path in paths if "triton_kernels" in roots(path)]
    assert not importers, "the bare name belongs to another package; ours is pylearngene.triton_kernels"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(f"pylearngene.{name}".rstrip("."))
    bare = []
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.ismodule(value) or callable(value):
            text = inspect.getdoc(value) or ""
            inherited = inspect.isclass(value) and "__doc__" not in vars(value)
            if not text or inherited or text.startswith(f"{public}("):  # a dataclass writes its signature
                bare.append(public)
    assert not bare


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_file_has_licence_purpose_and_length(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    mark = "# " if path.suffix in (".py", ".pyi") else "// "
    assert lines[0] == mark + "SPDX-License-Identifier: Apache-2.0"
    assert summary_of(path), "the file opens with what it holds"
    assert len(lines) <= 451, "split the file by meaning"


def test_map_is_true() -> None:
    drawn, current = (
        drawn_tree().split("\n"),
        re.findall(r"```text\n.*?```", MAP.read_text(encoding="utf-8"), re.DOTALL),
    )
    assert current, "docs/architecture.md has no tree"
    old = current[0].split("\n")
    difference = [f"+ {line}" for line in drawn if line not in old] + [f"- {line}" for line in old if line not in drawn]
    message = "the tree in docs/architecture.md is not the disk; redraw it: python tests/test_layout.py\n"
    assert old == drawn, message + "\n".join(difference)


if __name__ == "__main__":
    MAP.write_text(map_with(drawn_tree()), encoding="utf-8")
