# SPDX-License-Identifier: Apache-2.0
"""Output folders that appear whole or not at all, one writer at a time, and JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import typer

from pylearngene.errors import BusyError, WriteError

try:
    import fcntl
except ImportError:  # no advisory locks here; a second writer is then not noticed
    fcntl = None  # type: ignore[assignment]


def print_json(value: object) -> None:
    """Print one JSON document on stdout; NaN and Inf become null."""
    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """Return the value with strings as keys, and None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def whole_folder(target: Path, mark: str) -> Iterator[Path]:
    """Yield a hidden folder beside `target` that becomes `target` when the block ends well.

    Args:
        target: the folder to appear; one that exists is replaced only if it holds `mark`.
        mark: name of a file that every folder of this kind holds.

    Raises:
        WriteError: `target` is something else, or the place cannot be written; what was there is unchanged.
        BusyError: another process is writing the same folder.
    """
    target = target.absolute()
    partial, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    with _as_write_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target), _as_write_error(target):
        _recover(target, old)
        check_replaceable(target, mark)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            _recover(target, old)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(target: Path, mark: str) -> None:
    """Raise WriteError when something is at `target` that this program did not put there."""
    if target.is_symlink() or (target.exists() and not (target / mark).is_file()):
        raise WriteError(f"out: expected a new folder or one with a {mark}, got {target}, which is something else")


def _recover(target: Path, old: Path) -> None:
    """Put the former folder back when a writer died between the two renames."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    with _as_write_error(target):
        file = path.open("a")
    with file:
        if fcntl is not None:
            _acquire(file, target)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _acquire(file: IO[str], target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())  # not a removed one
    except OSError as error:
        raise BusyError(f"out: {target} is being written by another process") from error
    if not same:
        raise BusyError(f"out: {target} is being written by another process")


@contextlib.contextmanager
def _as_write_error(target: Path) -> Iterator[None]:
    try:
        yield
    except (WriteError, BusyError):
        raise
    except OSError as error:
        raise WriteError(f"out: {target} cannot be written: {error.strerror or error}") from error
