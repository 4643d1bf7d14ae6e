# SPDX-License-Identifier: Apache-2.0
"""What the plan says of a call: the regime, its reason with modelled and measured costs, panels, how they take turns.

Thresholds of a GPU are held against the model that they come from. Nothing runs on a GPU here; how the table of a CPU
is made has tests of its own, and what the regimes compute is in those of the primitives.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pylearngene as plg
from pylearngene import _backends, plan
from pylearngene._ops import expansion_regimes
from pylearngene.errors import ArgumentError


@pytest.fixture
def pin() -> Iterator[Callable[[str], None]]:
    yield plg.set_regime
    plg.set_regime("auto")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An instruction level of its own, whose limits are known."""
    limits = {"y": (7, 32, 5, 0, 9), "dx": (1, 2, 3, 4, 6), "dw": (plan.cpu_rows.ALWAYS,) * 5}
    monkeypatch.setitem(plan.ROWS_UP_TO, "table", {"fp32": limits, "bf16": limits, "fp16": limits})
    monkeypatch.setitem(plan.cpu_rows.RATES, "table", {"fp32": (0.5, 0.25), "bf16": (1.0, 2.0), "fp16": (0.5, 0.1)})
    yield
    plan.cpu.rows_up_to.cache_clear()


MODELLED = "(modelled, not yet measured)"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, "triton", 2, 2), "rows: 1 tokens are at most 64 for 2 genes; "),
        ((64, "triton", 2, 8), "rows: 64 tokens are at most 64 for 8 genes; "),
        ((65, "triton", 2, 2), "fused: 65 tokens are at most 1536 for 2 genes; "),
        ((1536, "triton", 2, 2), "fused: 1536 tokens are at most 1536 for 2 genes; "),
        ((1537, "triton", 2, 2), "panel: 1537 tokens are more than 1536 for 2 genes; "),
        ((1536, "triton", 2, 4), "panel: 1536 tokens are more than 768 for 4 genes; "),
        ((64, "triton", 4, 2), "panel: 32 bits wide; only products of 16 bits are fused on a GPU; "),
        ((4, "triton", 8, 2), "panel: 64 bits wide; only products of 16 bits are fused on a GPU; "),
        ((4, "cuda", 8, 2), "panel: 64 bits wide; only products of 16 bits are fused on a GPU; "),
        ((16, "cuda", 4, 2), "rows: 16 tokens of 32 bits are at most 16; "),
        ((17, "cuda", 4, 2), "panel: 17 tokens of 32 bits are more than 16; "),
        ((64, "triton", 2, 9), "panel: 9 genes are more than 8; "),
        ((64, "reference", 2, 2), "panel: no kernels are in use, panels are synthesized by PyTorch"),
        ((10**6, "cpp", 4, 2), "rows: at this instruction level faster than panels for any number of tokens"),
        ((32, "cpp", 4, 2, "expansion", "table"), "rows: 32 tokens are at most 32 for 2 genes; "),
        ((33, "cpp", 4, 2, "expansion", "table"), "panel: 33 tokens are more than 32 for 2 genes; "),
        ((33, "cpp", 4, 3, "expansion", "table"), "panel: 33 tokens are more than 5 for 3 genes; "),
    ],
)
def test_regime_and_reason(table: None, arguments: tuple[Any, ...], expected: str) -> None:
    told = plan.explain(*arguments)
    assert told.startswith(expected)
    assert plan.choose(*arguments) == expected.split(":", maxsplit=1)[0]
    assert told.endswith(MODELLED) == (arguments[1] in ("triton", "cuda"))


def test_a_reason_names_costs_and_chip() -> None:
    assert plan.explain(4000, "triton", 2, 2) == (
        "panel: 4000 tokens are more than 1536 for 2 genes; 10.1 us of products and 1.23 us of gene traffic per "
        f"million weights on H200 {MODELLED}"
    )
    assert f"weights on L40 {MODELLED}" in plan.explain(4000, "triton", 2, 2, arch="sm_89")


def test_pinned_regimes(pin: Callable[[str], None]) -> None:
    calls = [("cpp", 4, 999), ("triton", 2, 8), ("triton", 2, 65), ("triton", 4, 8), ("cuda", 4, 8), ("cuda", 4, 17)]
    for name, expected in {
        "rows": ["rows", "rows", "panel", "panel", "rows", "panel"],
        "fused": ["panel", "fused", "fused", "panel", "panel", "panel"],
        "panel": ["panel"] * 6,
    }.items():
        pin(name)
        assert [plan.choose(tokens, who, size) for who, size, tokens in calls] == expected
        assert [plan.choose(8, "triton", 2, 9), plan.choose(8, "reference", 2)] == ["panel", "panel"]
        assert f": pinned by set_regime('{name}')" in plan.explain(8, "triton", 2)
        assert plan.most_rows("AVX2", 4) == (2**63 - 1 if name == "rows" else 0)


def test_rows_on_a_cpu_differ_by_level_dtype_product_and_genes(table: None) -> None:
    def most(level: str, itemsize: int, float16: bool = False, genes: int = 2) -> list[int]:
        return [plan.most_rows(level, itemsize, float16, product, genes) for product in ("y", "dx", "dw")]

    assert [most("table", 4, genes=genes)[:2] for genes in (1, 2, 3, 4, 5, 8, 9, 64)] == [
        [7, 1], [32, 2], [5, 3], [5, 3], [0, 4], [0, 4], [9, 6], [9, 6]
    ]  # fmt: skip
    assert most("table", 8) == most("table", 4) == most("table", 2) == most("table", 2, True)
    assert most("unheard of", 4) == most("AVX512", 4)
    for level, itemsize, genes in itertools.product(plan.ROWS_UP_TO, (2, 4), (1, 2, 4, 8, 64)):
        for product, limit in zip(("y", "dx", "dw"), most(level, itemsize, genes=genes), strict=True):
            arguments: dict[str, Any] = {"itemsize": itemsize, "genes": genes, "arch": level, "product": product}
            regimes = [plan.choose(tokens, "cpp", **arguments) for tokens in (0, limit, limit + 1)]
            assert regimes == ["rows", "rows", "panel"]


def test_costs_on_a_cpu_are_rates_and_what_is_read(table: None) -> None:
    """By hand: half a TFLOP/s in `rows`, a quarter in panels; genes at 0.19 TB/s, a panel twice at 0.4."""
    told = plan.explain(8, "cpp", 4, 2, arch="table")
    assert told == (
        "rows: 8 tokens are at most 32 for 2 genes; 32 us of products and 42.1 us of gene traffic per million weights "
        f"on {plan.cpu_rows.MEASURED_ON} (modelled)"
    )
    assert plan.cpu.cpu_costs("rows", 8, 4, 2, "table") == pytest.approx((2 * 8 / 0.5, 2 * 4 / 0.19))
    assert plan.cpu.cpu_costs("panel", 8, 4, 2, "table") == pytest.approx((2 * 8 / 0.25, 2 * 4 / 0.19 + 2 * 4 / 0.4))
    assert plan.cpu.cpu_costs("panel", 8, 8, 2, "table")[0] == pytest.approx(2 * 8 / 0.125)
    assert plan.cpu.cpu_costs("panel", 8, 2, 1, "table", True) == pytest.approx((2 * 8 / 0.1, 2 / 0.19 + 4 / 0.4))


def test_measured_costs_stand_beside_the_model(pin: Callable[[str], None], table: None) -> None:
    seen = []
    found = plan.measure(lambda: seen.append(plan.pinned()), 1000, rounds=3)
    assert seen == ["rows", "panel"] * 4
    assert plan.pinned() == "auto"
    assert set(found) == {"rows", "panel"}
    assert min(found.values()) > 0
    told = plan.explain(8, "cpp", 4, 2, arch="table", measured={"rows": 31.26, "panel": 1234.5})
    assert told.endswith("(modelled); rows 31.3 us, panel 1.23e+03 us per million weights (measured)")
    pin("panel")
    with pytest.raises(ZeroDivisionError):
        plan.measure(lambda: 1 // 0, 1000)
    assert plan.pinned() == "panel"


@pytest.mark.parametrize("arguments", [(0, 3), (5, 0)])
def test_measuring_needs_weights_and_rounds(arguments: tuple[int, int]) -> None:
    name = "weights" if arguments[0] == 0 else "rounds"
    with pytest.raises(ArgumentError, match=f"^{name}: expected at least 1, got 0$"):
        plan.measure(lambda: None, *arguments)


@pytest.mark.parametrize("chip", plan.CHIPS)
def test_fused_stops_where_the_model_has_panels_faster(chip: str) -> None:
    """A fused product takes the longer of multiplying and reading, a panel both after each other."""

    def faster(tokens: int, genes: int) -> bool:
        together, apart = (plan.costs(regime, tokens, 2, genes, chip) for regime in ("fused", "panel"))
        return max(together) <= sum(apart)

    found = []
    for genes in (2, 4, 8):
        steps = range(64, plan.FUSED_AT_MOST + 1, 64)
        found.append(max(tokens for tokens in steps if faster(tokens, genes)))
        assert plan.choose(found[-1], "triton", 2, genes, arch=chip) == "fused"
        assert plan.choose(found[-1] + 1, "triton", 2, genes, arch=chip) == "panel"
    assert found == sorted(found, reverse=True), "more genes are more to read for every tile"
    assert tuple(found) == plan.CHIPS[chip].fused_up_to


def test_costs_are_those_of_the_chip() -> None:
    """By hand: an H200 multiplies 790e12 and reads 9.7e12 bytes from its cache and 3.89e12 from memory a second."""
    product, synthesis = plan.costs("panel", 16384, 2, 4, "sm_90")
    assert product == pytest.approx(2 * 16384 * 1e6 / 790e12 * 1e6)
    assert synthesis == pytest.approx((4 * 2 / 3.89e12 + 2 / 9.7e12) * 1e6 * 1e6)
    assert plan.costs("panel", 16384, 4, 4, "sm_90")[0] == pytest.approx(2 * 16384 / 54)
    assert plan.costs("rows", 1, 2, 2, "sm_90")[1] == pytest.approx(4 / 3.89)
    assert plan.adding(4, 2, "sm_90") == pytest.approx(4 / 9.7 + 16 / 3.89)


def test_chips_are_those_of_the_launch_table() -> None:
    table = pytest.importorskip("pylearngene.triton_kernels._table")
    for capability in itertools.product(range(8, 14), range(10)):
        assert plan.chip_of(capability) == table.chip_of(capability)
    assert plan.chip_of((7, 5)) == "sm_80"
    row = importlib.import_module("pylearngene.triton_kernels._row")
    assert tuple(plan.CHIPS) == row.CHIPS
    assert plan.FUSED_GENES == row.MOST_GENES
    assert _backends.arch(torch.device("cpu")) == _backends.LEVEL_NAME


def test_panels_on_a_gpu_are_24_mib_of_whole_lines() -> None:
    assert plan.panel_length(1 << 20, 1, 100) == 1
    assert plan.panel_length(1 << 20, 1, 96, "cuda") == 24
    assert plan.panel_length(768, 2, 3072, "cuda") == 3072


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 100, 768, 4096, 11008, 100_000, 10_000_000])
def test_panels_on_a_gpu_fit_and_begin_at_whole_lines(width: int, turns: int) -> None:
    for limit, itemsize in itertools.product((0, 1, 63, 64, 65, 200, 768, 1000, 3072, 50257), (2, 4, 8)):
        length = plan.panel_length(width, itemsize, limit, "cuda", turns)
        assert 1 <= length <= max(1, limit)
        held = min(turns, 2) * length * width * itemsize
        assert held <= plan.GPU_PANEL_BYTES or length == 1
        if length < limit and (plan.GPU_PANEL_BYTES // min(turns, 2)) // (width * itemsize) >= 64 < limit / turns:
            assert length % plan.GPU_LINES == 0


def test_large_products_take_turns() -> None:
    def count(tokens: int, out: int, inner: int, genes: int, itemsize: int = 2) -> int:
        beside = plan.costs("panel", tokens, itemsize, genes)[1]
        return plan.turns((tokens, out, inner), out * inner, itemsize, beside)

    assert count(16384, 4096, 4096, 4) > 1
    assert count(64, 4096, 4096, 4) == 1, "the host would be slower than the products"
    assert count(16384, 64, 4096, 4) == 1, "a panel is too small"
    assert count(0, 4096, 4096, 2) == count(5, 0, 7, 2) == count(5, 7, 0, 2) == 1
    for tokens, out, inner, genes in itertools.product(
        (512, 4096, 16384, 65536), (192, 768, 3072, 50257), (768, 4096), (2, 8)
    ):
        found, size = count(tokens, out, inner, genes), out * inner * 2
        length = plan.panel_length(inner, 2, out, "cuda", found)
        if found > 1:
            assert size >= found * plan.TURN_BYTES
            assert math.ceil(out / length) >= 2, "one panel alone has nobody to take turns with"
            assert found <= max(plan.MOST_TURNS, math.ceil(2 * size / plan.GPU_PANEL_BYTES))


def test_regimes_are_asked_for_the_chip_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, genes = torch.ones(1000, 4, dtype=torch.bfloat16), [torch.ones(3, 4)] * 2
    monkeypatch.setattr(_backends, "implementation", lambda device: "triton")
    monkeypatch.setattr(_backends, "arch", lambda device: "sm_100")
    assert expansion_regimes.regime_of(x, genes) == "panel"
    monkeypatch.setattr(_backends, "arch", lambda device: "sm_90")
    assert expansion_regimes.regime_of(x, genes) == "fused"
