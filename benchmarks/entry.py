# SPDX-License-Identifier: Apache-2.0
"""What `pytest benchmarks` runs: every case checked, then timed once by pytest-benchmark.

One call each is too few for figures to rely on; those are `benchmarks.run`'s.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.run import all_cases


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_case(case: Case, benchmark: Any) -> None:
    case.check((case.check_on or case.make)())
    inputs = case.make()
    benchmark.group = case.kind
    benchmark.pedantic(case.run, args=(case.ours, inputs), rounds=1)
