# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine, the versions and the state of the source, as they go in every report."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import pylearngene

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "timm", "triton", "scikit-learn", "matplotlib")


def versions() -> dict[str, str | None]:
    """Return the versions of this library, Python and the packages it can use; None for what is not installed."""
    found: dict[str, str | None] = {"pylearngene": pylearngene.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # the metadata leave out which build it is
    return found


def machine() -> dict[str, str | int | float]:
    """Return processor, cores, threads, memory, instruction level and GPU of this machine."""
    facts: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return facts


def commit() -> str | None:
    """Return the git commit of the source this package is in, with "+" if changed; None outside a checkout."""
    folder = Path(pylearngene.__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}{'+' if changed else ''}" if tracked else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10)
    return done.stdout.strip()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
