# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: fixed seeds, uninitialised memory that is NaN, and a torchvision that imports.

On a GPU the BLAS is asked for results that repeat, as PyTorch wants of those who ask for NaN. Where no GPU is, Triton
kernels run in its interpreter. The package's own tests need no torchvision; timm does. No fixture with test data lives
here.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Read when kernels are decorated, so it is set before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Read when the BLAS begins; without it, PyTorch refuses products on a GPU while algorithms are to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Not in site-packages: there a torchvision that fails to import would break transformers too.
_TORCHVISION = Path(sys.prefix) / "torchvision-for-tests"
_libraries: list[torch.library.Library] = []  # operators live as long as this list


def _make_torchvision_importable() -> None:
    """The usual torchvision wheel is built for CUDA; beside a CPU torch it misses two operators when it is imported."""
    if _TORCHVISION.is_dir():
        sys.path.append(str(_TORCHVISION))
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")


_make_torchvision_importable()


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; tests that need one are skipped where none is."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, where a test shows that it says what it means, and the first GPU."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("gpu")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest value), so that an output left unwritten cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
