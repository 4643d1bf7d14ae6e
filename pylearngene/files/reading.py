# SPDX-License-Identifier: Apache-2.0
"""Opening files that may be hostile: regular files only, never larger than stated, JSON without surprises.

Every failure is one `GeneFileError` or `TooLargeError` that names the file and what is wrong with it. The tensor
format is not known here (see `tensors`).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from pylearngene.errors import GeneFileError, TooLargeError

MAX_HEADER = 16 * 2**20
MAX_FILE = 16 * 2**30

# O_NONBLOCK keeps the open of a FIFO from waiting for a writer, O_NOCTTY keeps a terminal from becoming ours.
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def shown(value: object, limit: int = 200) -> str:
    """Return `repr(value)` in printable ASCII (escape codes cannot reach a terminal), shortened to `limit`."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def path_text(path: str | os.PathLike[str]) -> str:
    """Return the path quoted and printable, for error messages."""
    return shown(os.fspath(path), 1000)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str], max_bytes: int = MAX_FILE) -> Iterator[tuple[BinaryIO, int]]:
    """Yield the opened file and its size in bytes; every check is made on the opened file itself.

    Raises:
        GeneFileError: the path does not exist, cannot be read, or is not a regular file.
        TooLargeError: the file is larger than `max_bytes`.
    """
    try:
        fd = os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        raise GeneFileError(f"file {path_text(path)}: expected a file, found nothing there") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise GeneFileError(f"file {path_text(path)}: cannot be opened: {reason}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise GeneFileError(f"file {path_text(path)}: expected a regular file, got {_kind(info.st_mode)}")
        if info.st_size > max_bytes:
            raise TooLargeError(f"file {path_text(path)}: expected at most {max_bytes} bytes, got {info.st_size}")
    except BaseException:
        os.close(fd)
        raise
    with os.fdopen(fd, "rb") as file:
        yield file, info.st_size


def read_at(file: BinaryIO, count: int, offset: int, path: str | os.PathLike[str]) -> bytes:
    """Read `count` bytes at `offset` past the buffer of the file, so that a later reading sees the disk again."""
    try:
        data = os.pread(file.fileno(), count, offset)
    except OSError as error:
        raise GeneFileError(f"file {path_text(path)}: cannot be read: {error.strerror or error}") from error
    if len(data) != count:
        raise GeneFileError(f"file {path_text(path)}: expected {count} bytes, got {len(data)} (truncated)")
    return data


def read_exactly(file: BinaryIO, count: int, path: str | os.PathLike[str]) -> bytes:
    """Read `count` bytes, or say that the file shrank or that the disk failed while it was read."""
    try:
        data = file.read(count)
    except OSError as error:
        raise GeneFileError(f"file {path_text(path)}: cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise TooLargeError(f"file {path_text(path)}: {count} bytes do not fit into memory") from None
    if len(data) != count:
        raise GeneFileError(f"file {path_text(path)}: expected {count} more bytes, got {len(data)} (truncated)")
    return data


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE) -> bytes:
    """Read a whole regular file of at most `max_bytes` bytes.

    Raises:
        GeneFileError: nothing there, not a regular file, not readable.
        TooLargeError: larger than `max_bytes`.
    """
    with open_regular(path, max_bytes) as (file, size):
        return read_exactly(file, size, path)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shown(key)} appears twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"number {shown(text)} is out of range")
    return value


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object, refusing duplicate keys, NaN, Infinity and deep nesting; `what` starts the message.

    Raises:
        GeneFileError: `data` is not UTF-8, not JSON, not an object, or holds one of the above.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise GeneFileError(f"{what}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from error
    except RecursionError:
        raise GeneFileError(f"{what}: JSON is nested too deeply") from None
    except ValueError as error:
        raise GeneFileError(f"{what}: not valid JSON: {shown(str(error))[1:-1]}") from error
    if not isinstance(value, dict):
        raise GeneFileError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_HEADER) -> dict[str, Any]:
    """Read a file that holds one JSON object; the rules are those of `parse_json`.

    Raises:
        GeneFileError: the file cannot be read or is not such an object.
        TooLargeError: larger than `max_bytes`.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), f"file {path_text(path)}")
