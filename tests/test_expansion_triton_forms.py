# SPDX-License-Identifier: Apache-2.0
"""The forms of the fused product of `expansion`: split sums that `finish` adds, programs that walk over tiles.

Each against dense PyTorch in float64 and against each other, on a CUDA device or in Triton's interpreter. Which form
a call gets is tested in `test_triton_table`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_samples import DEVICE, PRODUCTS, draw, genes_of, guarded, guards_hold, near, total

pytest.importorskip("triton")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")
launch: Any = importlib.import_module("pylearngene.triton_kernels._launch")
programs: Any = importlib.import_module("pylearngene.triton_kernels._programs")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that calls got, as they come."""
    found: list[Any] = []
    choose = programs.programs_for

    def noted(*arguments: Any) -> Any:
        found.append(choose(*arguments))
        return found[-1]

    monkeypatch.setattr(launchers, "programs_for", noted)
    return found


def pin(row: Any, tokens: int, genes: int, itemsize: int, regular: bool) -> None:
    chip = launch.chip(torch.device(DEVICE))
    table.install({table.bucket_key("fused", chip, tokens, genes, itemsize, False, regular): row})


@pytest.fixture
def pinned() -> Iterator[Any]:
    yield pin
    table.install({})


@pytest.mark.skipif(DEVICE == "cuda", reason="the sizes are made for the interpreter's multiprocessors")
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("bias", ["none", "plain", "genes"])
@pytest.mark.parametrize(("tokens", "out", "inner", "splits"), [(3, 37, 131, 3), (1, 64, 64, 2), (64, 31, 200, 7)])
def test_split_sums(
    dtype: torch.dtype, bias: str, tokens: int, out: int, inner: int, splits: int, seen: list[Any]
) -> None:
    x, genes = draw(tokens, inner).to(dtype), genes_of(2, out, inner, dtype)
    coeffs, biases = draw(2, dtype=torch.float32), [draw(out).to(dtype) for _ in range(2)]
    added = {"none": None, "plain": biases[0].double(), "genes": total(biases, coeffs)}[bias]
    for activation in (None, "gelu"):
        y, whole = guarded(tokens, out, dtype)
        end = (biases[0] if bias == "plain" else None, biases if bias == "genes" else (), activation)
        launchers.product(y, x, genes, coeffs, *end)
        expected = F.linear(x.double(), total(genes, coeffs), added)
        near(y, expected if activation is None else F.gelu(expected), dtype)
        assert guards_hold(whole)
        again = torch.empty_like(y)
        launchers.product(again, x, genes, coeffs, *end)
        assert torch.equal(again, y), "bit for bit"
    assert {found.splits for found in seen} == {splits}


@pytest.mark.skipif(DEVICE == "cuda", reason="the sizes are made for the interpreter's multiprocessors")
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("tokens", "out", "inner"), [(70, 31, 77), (128, 32, 64)])
def test_split_sums_of_rows_that_walk(dtype: torch.dtype, tokens: int, out: int, inner: int, seen: list[Any]) -> None:
    """Few tiles of a row whose programs walk over tiles: where a sum is split there is one program per part."""
    x, genes, coeffs = draw(tokens, inner).to(dtype), genes_of(2, out, inner, dtype), draw(2, dtype=torch.float32)
    y, whole = guarded(tokens, out, dtype)
    launchers.product(y, x, genes, coeffs)
    near(y, F.linear(x.double(), total(genes, coeffs)), dtype)
    assert guards_hold(whole)
    assert seen[0].splits == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="too many steps for the interpreter")
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize(("tokens", "out", "inner"), [(1, 64, 4096), (33, 72, 4099), (200, 768, 3072)])
def test_split_sums_of_many_steps(
    dtype: torch.dtype, count: int, tokens: int, out: int, inner: int, seen: list[Any]
) -> None:
    """Few tiles and long sums, as any GPU splits them; bit for bit the same each time."""
    x, genes, coeffs = draw(tokens, inner).to(dtype), genes_of(count, out, inner, dtype), draw(count).float()
    y, whole = guarded(tokens, out, dtype)
    launchers.product(y, x, genes, coeffs, None, (), "silu")
    near(y, F.silu(F.linear(x.double(), total(genes, coeffs))), dtype)
    assert guards_hold(whole)
    assert seen[0].splits > 1
    again = torch.empty_like(y)
    for _ in range(20):
        launchers.product(again, x, genes, coeffs, None, (), "silu")
        assert torch.equal(again, y)


@pytest.mark.skipif(DEVICE == "cuda", reason="the sizes are made for the interpreter's multiprocessors")
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_split_input_gradient_of_transposed_genes(dtype: torch.dtype, seen: list[Any]) -> None:
    dy, genes, coeffs = draw(5, 131).to(dtype), genes_of(2, 131, 33, dtype), draw(2, dtype=torch.float32)
    dx, whole = guarded(5, 33, dtype)
    launchers.product(dx, dy, [gene.t() for gene in genes], coeffs)
    near(dx, dy.double() @ total(genes, coeffs), dtype)
    assert guards_hold(whole)
    assert seen[0].splits == 3


@pytest.mark.skipif(DEVICE == "cuda", reason="the sizes are made for the interpreter's multiprocessors")
def test_the_workspace_is_poisoned_and_bounded(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    """Only torch.empty is asked for memory, once; nothing that was in it shows."""
    made: list[Tensor] = []
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        made.append(empty(*arguments, **options).fill_(float("nan")))
        return made[-1]

    x, genes, coeffs = draw(7, 99).half(), genes_of(2, 33, 99, torch.float16), draw(2, dtype=torch.float32)
    y = x.new_empty(7, 33)
    monkeypatch.setattr(torch, "empty", poisoned)
    launchers.product(y, x, genes, coeffs)
    near(y, F.linear(x.double(), total(genes, coeffs)), torch.float16)
    assert [tensor.shape for tensor in made] == [(seen[0].splits, 7, 33)]
    assert made[0].dtype == torch.float32
    assert made[0].is_contiguous()
    assert bool(made[0].isfinite().all()), "every partial sum is written"


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("regular", [False, True])
def test_programs_that_walk_over_tiles(dtype: torch.dtype, regular: bool, seen: list[Any]) -> None:
    """More tiles than programs, with an odd rest, against the same product in rows of few tokens."""
    tokens, out, inner = (330, 96, 64) if regular else (333, 71, 45)
    x, genes = draw(tokens, inner).to(dtype), genes_of(2, out, inner, dtype)
    coeffs, bias = draw(2, dtype=torch.float32), draw(out).to(dtype)
    y, whole = guarded(tokens, out, dtype)
    launchers.product(y, x, genes, coeffs, bias, (), "relu")
    near(y, F.linear(x.double(), total(genes, coeffs), bias.double()).relu(), dtype)
    assert guards_hold(whole)
    if DEVICE == "cpu":
        assert seen[0] == (4, 1, 2), "18 tiles, four programs"


@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize(("tokens", "out", "inner"), [(5, 48, 64), (70, 33, 61), (300, 64, 96)])
def test_every_row_that_tuning_may_choose(dtype: torch.dtype, tokens: int, out: int, inner: int, pinned: Any) -> None:
    x, genes, coeffs = draw(tokens, inner).to(dtype), genes_of(2, out, inner, dtype), draw(2, dtype=torch.float32)
    chip, itemsize = launch.chip(x.device), genes[0].element_size()
    regular = launch.regular(out, inner, x, *genes)
    expected = F.linear(x.double(), total(genes, coeffs))
    rows = table.candidates("fused", chip, tokens, 2, itemsize, False, regular, launch.VERSION)
    assert len(rows) > 1 or not (regular or DEVICE == "cpu"), "GPUs have one row for irregular layouts"
    for row in rows:
        pinned(row, tokens, 2, itemsize, regular)
        y, whole = guarded(tokens, out, dtype)
        launchers.product(y, x, genes, coeffs)
        near(y, expected, dtype)
        assert guards_hold(whole)


@pytest.mark.parametrize(("tokens", "regular"), [(48, True), (40, False)])
def test_contiguous_tokens_are_read_16_bytes_at_a_time_only_where_all_are_there(
    tokens: int, regular: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    choose = table.row_for

    def noted(*arguments: Any) -> Any:
        asked.extend(arguments[6:7])
        return choose(*arguments)

    monkeypatch.setattr(launchers, "row_for", noted)
    x, genes, coeffs = draw(64, tokens).half().t(), genes_of(1, 32, 64, torch.float16), draw(1, dtype=torch.float32)
    y = x.new_empty(tokens, 32)
    if not regular:  # rows of x as far apart as in a wider matrix
        x = draw(64, 48).half().t()[:tokens]
    launchers.product(y, x, genes, coeffs)
    near(y, F.linear(x.double(), total(genes, coeffs)), torch.float16)
    assert asked == [regular]
