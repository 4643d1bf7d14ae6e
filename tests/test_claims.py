# SPDX-License-Identifier: Apache-2.0
"""The studies of papers' claims: the tables and pictures they write, and every study once at a size of seconds.

What the full sizes measure lies in docs/claims; here only the machinery is tested.
"""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # last, so that an installed pylearngene is the one under test

from benchmarks.claims import study, tables

CLAIMS = Path(__file__).parents[1] / "docs" / "claims"
STEMS = ("tleg", "ldr", "sws")


def row(stem: str, part: str, arm: str, line: int, seed: int, accuracy: float) -> dict[str, str]:
    values = {"study": stem, "part": part, "arm": arm, "depth": line, "genes": line, "seed": seed, "accuracy": accuracy}
    facts = {"data": "digits", "train_images": 1400, "test_images": 397, "width": 16, "threads": 1, "commit": "abc"}
    return {**dict.fromkeys(study.COLUMNS, "x"), **{key: str(value) for key, value in {**values, **facts}.items()}}


def rows() -> list[dict[str, str]]:
    found = [row("tleg", "ancestry", "ancestry", 6, seed, 0.5) for seed in (0, 1)]
    for seed, accuracy in ((0, 0.80), (1, 0.84)):
        found += [row("tleg", "depths", "learngene, tuned", depth, seed, accuracy) for depth in (10, 2)]
    return found


def test_page_has_means_and_spreads_in_the_order_of_depth() -> None:
    page = tables.page(rows())
    assert page.index("| ancestry | 50.0 ± 0.0 |") < page.index("| 2 | 82.0 ± 2.8 |")  # stdev of 80 and 84
    assert page.index("| 2 | 82.0 ± 2.8 |") < page.index("| 10 | 82.0 ± 2.8 |")
    assert "2 seeds" in page
    assert "1,400 training and 397 test images" in page


def test_files_are_written_together(tmp_path: Path) -> None:
    study.write("tleg", rows(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tleg.csv", "tleg.md", "tleg.png"]
    assert (tmp_path / "tleg.md").read_text() == tables.page(rows())
    assert (tmp_path / "tleg.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stem", STEMS)
def test_committed_page_is_what_its_rows_say(stem: str) -> None:
    with (CLAIMS / f"{stem}.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len({one["seed"] for one in found}) >= 3
    assert {one["data"] for one in found} == {"Fashion-MNIST"}
    assert all(one["commit"] and not one["commit"].endswith("+") for one in found)
    assert (CLAIMS / f"{stem}.md").read_text() == tables.page(found)


@pytest.mark.full
@pytest.mark.parametrize("stem", STEMS)
def test_study_runs(stem: str, tmp_path: Path) -> None:
    program = importlib.import_module(f"benchmarks.claims.{stem}")
    assert study.run(stem, program.study, ["--tiny", "--data", "digits", "--out", str(tmp_path)]) == 0
    with (tmp_path / f"{stem}.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {one["seed"] for one in found} == {"0", "1"}
    assert all(0.0 <= float(one["accuracy"]) <= 1.0 for one in found)
