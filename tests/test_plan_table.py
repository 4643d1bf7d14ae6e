# SPDX-License-Identifier: Apache-2.0
"""How the table of a CPU's limits is made: known crossings are found, the same points give the same file, cases hold.

Times are synthetic, but for one tiny point per product; what the plan does with the table is tested with the plan.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # last, so that an installed pylearngene is the one under test

from benchmarks.cases import WrongResultError
from benchmarks.plan import __main__ as command
from benchmarks.plan import held_out, levels, points, search, table
from benchmarks.plan.points import Point, Series
from pylearngene import _backends, plan
from pylearngene.plan import cpu_rows

FACTS = {"device": "abacus", "threads": 2, "torch": "2.0", "pylearngene": "0.1", "commit": "0123456789ab"}
needs_kernels = pytest.mark.skipif(_backends.native() is None, reason="there is one regime without native kernels")


def crossing(at: float, steepness: float = 0.2) -> Callable[[int], tuple[float, float]]:
    """Times of two regimes that are equal at so many tokens."""
    return lambda tokens: (10.0 * (tokens / at) ** steepness, 10.0)


def series(level: str = "AVX2", product: str = "y", genes: int = 2, **changes: Any) -> Series:
    return Series(level, changes.get("dtype", "fp32"), product, genes, changes.get("shape", (64, 48)))


def found(of: Series, at: float, steepness: float = 0.2) -> list[Point]:
    return [Point(of, *point) for point in search.search(crossing(at, steepness))]


def everything(level: str = "AVX2") -> list[Point]:
    """Crossings that are known: at 100 tokens for y, 20 for dx, never for dw, and later for more genes."""
    where = {"y": 100, "dx": 20, "dw": 1e9}
    return [
        point
        for dtype in points.DTYPES
        for product, at in where.items()
        for genes in table.GENES
        for point in found(series(level, product, genes, dtype=dtype), at * genes)
    ]


@pytest.mark.parametrize("at", [1.5, 5, 13, 40, 130, 700, 1600])
def test_a_crossing_is_found_and_confirmed(at: float) -> None:
    asked: list[int] = []

    def measure(tokens: int) -> tuple[float, float]:
        asked.append(tokens)
        return crossing(at, 0.5)(tokens)

    taken = search.search(measure)
    assert [tokens for tokens, *_ in taken] == sorted(set(asked))
    below = max(tokens for tokens in search.TOKENS if tokens <= at)
    above = min(tokens for tokens in search.TOKENS if tokens > at)
    assert {below, above} <= {tokens for tokens in asked if asked.count(tokens) > 1}, "both sides are measured again"
    assert table.limit([Point(series(), *point) for point in taken]) == below


def test_no_crossing_is_always_or_never() -> None:
    assert table.limit(found(series(), 1e6)) == table.ALWAYS
    assert table.limit(found(series(), 0.1)) == 0
    assert len(found(series(), 1e6)) == len(search.PROBES) - 1


def test_ties_go_to_rows() -> None:
    even = [Point(series(), *point) for point in search.search(lambda tokens: (10.1, 10.0))]
    assert table.limit(even) == table.ALWAYS


def test_what_is_out_of_the_question_is_not_measured() -> None:
    taken = search.search(lambda tokens: (1.0, 2_000.0 * tokens))
    assert [tokens for tokens, *_ in taken] == [16, 64]
    assert table.limit([Point(series(), *point) for point in taken]) == table.ALWAYS


def test_two_clear_probes_answer_for_the_last() -> None:
    for rows, limit in ((1.0, table.ALWAYS), (4.0, 0)):
        taken = search.search(lambda tokens, rows=rows: (rows, 2.0))
        assert max(tokens for tokens, *_ in taken) == 1024
        assert table.limit([Point(series(), *point) for point in taken]) == limit


def test_one_disturbed_measurement_does_not_move_a_crossing() -> None:
    for disturbed in range(1, 9):
        count = 0

        def measure(tokens: int, disturbed: int = disturbed) -> tuple[float, float]:
            nonlocal count
            count += 1
            rows, panel = crossing(100)(tokens)
            return (rows, panel * 20) if count == disturbed and tokens in (96, 128) else (rows, panel)

        taken = search.search(measure)
        assert table.limit([Point(series(), *point) for point in taken]) == 96


def test_a_limit_loses_least_over_shapes() -> None:
    steep, flat = found(series(shape=(8, 8)), 60, 2.0), found(series(shape=(80, 8)), 300, 0.1)
    alone = [table.limit(points) for points in (steep, flat)]
    assert alone == [48, 256]
    both = table.limit([*steep, *flat])
    assert both == 64, "the shape that loses more decides"
    assert table.loss([*steep, *flat], both) <= min(table.loss([*steep, *flat], most) for most in (0, *alone))


def test_known_crossings_give_a_known_table() -> None:
    limits = table.limits(everything())
    assert list(limits) == ["AVX2"]
    for products in limits["AVX2"].values():
        always = (table.ALWAYS,) * 5
        assert products == {"y": (96, 192, 384, 768, 1024), "dx": (16, 32, 64, 128, 256), "dw": always}


def test_genes_between_measured_ones_share_their_points() -> None:
    some = [point for point in everything() if point.series.genes in (2, 8)]
    limits = table.limits(some)["AVX2"]["fp32"]["y"]
    assert (limits[0], limits[1], limits[3]) == (192, 192, 768)
    assert 192 <= limits[2] <= 768


def loaded(text: str, path: Path) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_points_table_and_back(tmp_path: Path) -> None:
    """Points as CSV give the same limits as themselves, and the file says what was found, always in the same words."""
    path, out = tmp_path / "points.csv", tmp_path / "rows.py"
    path.write_text(table.points_csv(everything(), FACTS))
    read, facts = table.read_points(path)
    assert (read, facts) == (everything(), {name: str(value) for name, value in FACTS.items()})
    command.write_table(path, out)
    first = out.read_text()
    command.write_table(path, out)
    assert out.read_text() == first
    module = loaded(first, tmp_path / "again.py")
    assert {**cpu_rows.ROWS_UP_TO, **table.limits(read)} == module.ROWS_UP_TO
    assert list(module.ROWS_UP_TO) == list(table.LEVELS)
    assert module.GENES == cpu_rows.GENES == table.GENES
    assert module.MEASURED_ON == "abacus, 2 threads"
    assert "abacus, 2 threads, with torch 2.0 and pylearngene 0.1, commit 0123456789ab" in ast.get_docstring(
        ast.parse(first), clean=True
    ).replace("\n", " ")
    flops = 2e-6 * 64 * 48 * 2048
    assert module.RATES["AVX2"]["fp32"][1] == float(f"{flops / 10:.2g}")


@pytest.mark.parametrize("long", ["", "with a name as long as those that processors have nowadays " * 2])
def test_the_file_is_as_the_formatter_writes_it(tmp_path: Path, long: str) -> None:
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("ruff is not installed")
    out = tmp_path / "rows.py"
    facts = {**FACTS, "device": f"abacus {long}".strip()}
    out.write_text(table.text(table.limits(everything()), table.rates(everything()), facts))
    for words in (["check"], ["format", "--check"]):
        config = ["--config", str(command.REPOSITORY / "pyproject.toml")]
        done = subprocess.run([ruff, *words, *config, str(out)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("tokens,", "token,", 1), "expected the columns level, dtype, "),
        (lambda text: text.split("\n")[0] + "\n", "and rows below them"),
        (lambda text: text.replace("AVX2", "AVX3", 1), "expected a level, a dtype, a product and times above 0"),
        (lambda text: text.replace(",y,", ",z,", 1), "expected a level, a dtype, a product and times above 0"),
        (lambda text: text.replace("fp32", "fp64", 1), "expected a level, a dtype, a product and times above 0"),
        (lambda text: text.replace(",10.0,", ",-1,", 1), "expected a level, a dtype, a product and times above 0"),
        (lambda text: text.replace(",10.0,", ",nan,", 1), "expected a level, a dtype, a product and times above 0"),
        (lambda text: text.replace(",10.0,", ",quick,", 1), "expected numbers, got "),
        (lambda text: text.replace(",0123456789ab\n", "\n", 1), "expected a level, a dtype, "),
        (lambda text: text.replace("ab\n", "ab,1\n", 1), "expected the columns level, dtype, "),
    ],
)
def test_points_are_read_strictly(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(change(table.points_csv(everything(), FACTS)))
    with pytest.raises(ValueError, match="points.csv: .*" + message):
        table.read_points(path)


def test_the_table_of_the_package_comes_from_the_points_beside_it(tmp_path: Path) -> None:
    (kept,) = command.RESULTS.glob("plan-*.csv")
    command.write_table(kept, tmp_path / "rows.py")
    assert (tmp_path / "rows.py").read_text() == command.TABLE.read_text()


def test_runs_go_on_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measured = tmp_path / "points.csv", []
    level = _backends.LEVEL_NAME
    monkeypatch.setattr(command, "all_series", lambda *_: [series(level, genes=genes) for genes in (1, 2, 4)])

    def times(of: Series, tokens: int) -> tuple[float, float]:
        measured.append(of.genes)
        if of.genes == 4 and tokens == 64:
            raise KeyboardInterrupt
        return crossing(1e9)(tokens)

    monkeypatch.setattr(command, "_times", times)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--level", level, "--points", str(path)])
    assert {point.series.genes for point in table.read_points(path)[0]} == {1, 2}
    monkeypatch.setattr(command, "_times", lambda of, tokens: crossing(1e9)(tokens))
    assert command.main(["--level", level, "--points", str(path)]) == 0
    assert {point.series.genes for point in table.read_points(path)[0]} == {1, 2, 4}
    assert command.main(["--level", level, "--points", str(path), "--seconds", "0"]) == 0
    assert command.main(["--level", "DEFAULT" if level != "DEFAULT" else "AVX2", "--points", str(path)]) == 2


@needs_kernels
@pytest.mark.parametrize("product", points.PRODUCTS)
@pytest.mark.parametrize("dtype", points.DTYPES)
def test_points_are_checked_then_timed(monkeypatch: pytest.MonkeyPatch, product: str, dtype: str) -> None:
    monkeypatch.setattr(points, "SECONDS", 0.001)
    of = series(_backends.LEVEL_NAME, product, 3, dtype=dtype)
    point = points.measure(of, 5)
    assert min(point.rows, point.panel) > 0
    assert plan.pinned() == "auto"
    right = points.Call.run
    monkeypatch.setattr(points.Call, "run", lambda self: right(self) * (1 + 0.1 * (plan.pinned() == "panel")))
    with pytest.raises(WrongResultError, match="5 tokens, panel: expected an error of at most"):
        points.measure(of, 5)


def test_levels_below_the_best_one_are_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = levels.here()[0]
    assert best == _backends.LEVEL_NAME
    assert levels.here()[::-1] == levels.LEVELS[: len(levels.here())]
    assert set(levels.LIMITED) == set(levels.LEVELS[:-1])
    program, told = tmp_path / "a" / "b" / "program.py", tmp_path / "told"
    program.parent.mkdir(parents=True)
    program.write_text(
        "import sys, pathlib, pylearngene\nfrom pylearngene import _backends\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{_backends.LEVEL_NAME} {pylearngene.__file__}')"
    )
    levels.run("DEFAULT", str(program), str(told))
    assert told.read_text() == f"DEFAULT {plan.__file__.replace('/plan/__init__', '/__init__')}"


def test_held_out_calls_are_no_calls_of_the_grid() -> None:
    cases = held_out.cases("AVX2")
    assert len(cases) == len({(of, tokens) for of, tokens in cases}) == 40
    assert cases == held_out.cases("AVX2")
    assert not {of.shape for of, _ in cases} & set(command.SHAPES)
    for name, values in {"product": points.PRODUCTS, "dtype": points.DTYPES}.items():
        assert {getattr(of, name) for of, _ in cases} == set(values)
    assert {of.genes for of, _ in cases} >= {1, 2, 3, 4, 8, 12}
    assert sum(of.shape[0] % 2 or of.shape[1] % 2 for of, _ in cases) >= 10
    assert min(tokens for _, tokens in cases) < 8
    assert max(tokens for _, tokens in cases) > 1000


def test_the_summary_counts_choices_that_lose_little() -> None:
    of = series("DEFAULT", "y", 2)
    limit = plan.most_rows("DEFAULT", 4)
    good = [Point(of, limit or 1, 10.0, 20.0) if limit else Point(of, 1, 20.0, 10.0)] * 3
    bad = Point(of, 10**6, 10.0, 10.5 if limit == plan.cpu_rows.ALWAYS else 25.0)
    expected = "3 of 4 choices (75%) within 10% of the better regime; the worst takes 2.50 times as long: y fp32 K2 "
    assert held_out.summary([*good, bad]).startswith(expected)
