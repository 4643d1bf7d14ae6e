# SPDX-License-Identifier: Apache-2.0
"""`python -O` takes no check away: an assert in the library only tells a type checker what holds anyway.

Input is refused by errors of the library; the refusals themselves are tested with what they protect.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from torch import nn
from vision_samples import Encoder, randomized

import pylearngene as plg
from pylearngene.errors import MethodError
from pylearngene.methods import TLEG

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("pylearngene", "triton_kernels") for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def narrows(test: ast.expr) -> bool:
    """Whether a condition is about a type alone: `x is not None`, `isinstance(x, T)`, or these joined."""
    if isinstance(test, ast.BoolOp):
        return all(narrows(value) for value in test.values)
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.Is | ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) in ("isinstance", "issubclass")


def test_asserts_only_narrow_types() -> None:
    checks = []
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        asserts = [node for node in nodes if isinstance(node, ast.Assert)]
        checks += [f"{path}:{node.lineno}: {ast.unparse(node.test)}" for node in asserts if not narrows(node.test)]
    assert not checks


def test_native_code_has_no_asserts() -> None:
    """They are compiled out of a release build."""
    sources = [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<!static_)\bassert\s*\(|<cassert>|<assert\.h>", text), path


def test_layers_and_blocks_that_were_put_aside_are_named() -> None:
    net = plg.auxiliary(randomized(Encoder()), TLEG())
    spec = net.gene_bank.host
    path, _ = spec.layers[0]
    block = net.get_submodule(spec.blocks)[1]
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, nn.Identity())
    for change in (plg.bake, plg.extract, lambda net: plg.set_depth(net, 4)):
        with pytest.raises(MethodError, match=f"net: expected the gene-backed layer '{path}' in block 1, got Identity"):
            change(net)
    parent, _, name = spec.blocks.rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Identity())
    with pytest.raises(MethodError, match=f"net: expected a list of blocks at '{spec.blocks}', got Identity"):
        plg.bake(net)
