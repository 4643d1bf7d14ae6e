# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel around gene-backed networks: every way of wrapping gives the gradients of one process.

What the two processes do is in ddp_samples. A process that waits in vain ends after 15 seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ddp_samples
import pytest
from ddp_samples import ACCUMULATED, CHECKPOINTS, WRAPPINGS
from test_processes import by_hand

PROGRAM = Path(ddp_samples.__file__)
TOLERANCE = 1e-6
REENTRANT = (
    "ShardingError: checkpoint: expected use_reentrant=False around gene-backed layers (DistributedDataParallel also "
    "takes static_graph=True), got reentrant checkpoints: each gives the genes a gradient of its own"
)


def found(folder: Path, *jobs: str) -> dict[str, Any]:
    """What both processes found, since they have the same gradients."""
    for code, _, said in by_hand(PROGRAM, folder, *jobs):
        assert code == 0, said
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first.keys() == set(jobs)
    return first


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(tmp_path_factory.mktemp("ddp"), "matrix", "skipping", "one_region")


@pytest.mark.parametrize("coefficients", ["fixed", "learned"])
@pytest.mark.parametrize("accumulated", ACCUMULATED)
@pytest.mark.parametrize("recompute", CHECKPOINTS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_gradients(results: dict[str, Any], wrapping: str, recompute: str, accumulated: str, coefficients: str) -> None:
    result = results["matrix"][f"{wrapping}, {recompute}, {accumulated}, {coefficients}"]
    if recompute == "reentrant" and wrapping != "static":
        assert result == REENTRANT
    else:
        assert result <= TOLERANCE


def test_a_process_may_leave_a_block_out(results: dict[str, Any]) -> None:
    """Its genes are used by other blocks; its own coefficients need `find_unused_parameters`."""
    assert results["skipping"].keys() == {"plain", "unused"}
    assert max(results["skipping"].values()) <= TOLERANCE


def test_one_reentrant_checkpoint_is_enough_of_one(results: dict[str, Any]) -> None:
    assert results["one_region"] <= TOLERANCE


@pytest.mark.full
def test_compiled(tmp_path: Path) -> None:
    compiled = found(tmp_path, "compiled")["compiled"]
    assert len(compiled) == 2
    assert max(compiled.values()) <= TOLERANCE
