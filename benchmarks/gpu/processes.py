# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a process group of its own, with a time limit that ends the whole group."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def output(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> tuple[int | None, str]:
    """Exit code, None where the limit ended the program, and what it printed on both streams.

    Args:
        command: program and arguments.
        limit: seconds.
        environment: variables on top of those of this process.
        folder: where it runs.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, cwd=folder, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=max(1.0, limit))
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        _end(process)
        printed, _ = process.communicate()
        return None, printed
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
