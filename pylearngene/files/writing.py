# SPDX-License-Identifier: Apache-2.0
"""Outputs that appear whole or not at all: one file, or a new folder of files.

A file is written under a temporary name beside its destination, flushed to disk and renamed. Temporary names carry the
process that made them, so that the next writer can remove what a killed one left. Locks between writers are not here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from pylearngene.errors import ArgumentError, WriteError
from pylearngene.files.reading import path_text, shown

_MARK = ".pylearngene-"
_STALE = re.compile(r"([0-9a-f]{8})-([0-9]{1,10})-[0-9a-f]{16}")
_DAY = 24 * 3600.0
_WRITE_FLAGS = (
    os.O_WRONLY
    | os.O_CREAT
    | os.O_EXCL
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def _machine() -> str:
    """Return eight digits for this machine and process namespace: only here do our process ids mean anything."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _owner_mark() -> str:
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(8)}"


def _alive(pid: int) -> bool:
    if os.name != "posix":  # signal 0 is no harmless question elsewhere
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _stale(path: Path, mark: str) -> bool:
    """Say whether the temporary output at `path` was left by a process that is gone."""
    found = _STALE.fullmatch(mark)
    if found is None:
        return False
    if found[1] == _machine() and not _alive(int(found[2])):
        return True
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > _DAY
    return False


def _sweep_files(folder: Path) -> None:
    """Remove temporary files of dead processes from the folder; failures to do so are no one's concern."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            name = entry.name
            if name.startswith(_MARK) and name.endswith(".tmp") and _stale(entry, name[len(_MARK) : -len(".tmp")]):
                with contextlib.suppress(OSError):
                    entry.unlink()


def _remove_folder(folder: Path) -> None:
    """Remove a folder of plain files and nothing deeper; a link is never followed."""
    with contextlib.suppress(OSError):
        if folder.is_symlink():
            return
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()


def _sweep_partials(folder: Path) -> None:
    """Remove what killed writers of this very folder left beside it."""
    start = f"{folder.name}.partial-"
    with contextlib.suppress(OSError):
        for entry in folder.parent.iterdir():
            if entry.name.startswith(start) and _stale(entry, entry.name[len(start) :]):
                _remove_folder(entry)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, where the file system can."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def _in_hub_cache(path: Path) -> bool:
    """Say whether the path lies in a Hugging Face cache, whose files are shared and named by their content."""
    parts = path.parts
    return any(
        one in ("blobs", "snapshots", "refs") and before.startswith(("models--", "datasets--", "spaces--"))
        for before, one in itertools.pairwise(parts)
    )


def _check_place(path: Path, what: str, expected: Callable[[int], bool], kind: str) -> os.stat_result | None:
    """Refuse links, foreign kinds and hub caches; return the status of what is there, None for nothing."""
    try:
        if _in_hub_cache(Path(os.path.realpath(path.parent)) / path.name):
            raise WriteError(f"{what} {path_text(path)}: expected a place of your own, got one in a Hugging Face cache")
        info = path.lstat()
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WriteError(f"{what} {path_text(path)}: cannot be written: {error}") from error
    if stat.S_ISLNK(info.st_mode):
        raise WriteError(f"{what} {path_text(path)}: expected a real {kind}, got a symbolic link (name its target)")
    if not expected(info.st_mode):
        raise WriteError(f"{what} {path_text(path)}: expected a {kind}, something else is there")
    return info


@contextlib.contextmanager
def _as_write_error(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"{what} {path_text(path)}: cannot be written: {reason}") from error


def _write_new(path: Path, data: bytes | Callable[[BinaryIO], None], mode: int | None) -> None:
    """Write a file that must not exist yet and flush it to disk; `mode` None leaves it to the umask."""
    # closed to others until the wanted mode is set: the bytes of a private file are never readable in between
    fd = os.open(path, _WRITE_FLAGS, 0o666 if mode is None else 0o600)
    with os.fdopen(fd, "wb") as file:
        if mode is not None and hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), mode)
        if callable(data):
            data(file)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace_all(folder: Path, files: Mapping[str, bytes | Callable[[BinaryIO], None]]) -> None:
    """Put files into an existing folder: all are on disk under temporary names before the first is renamed."""
    ready: list[tuple[Path, Path]] = []
    try:
        for name, data in files.items():
            path = folder / name
            info = _check_place(path, "file", stat.S_ISREG, "regular file")
            ready.append((folder / f"{_MARK}{_owner_mark()}.tmp", path))
            _write_new(ready[-1][0], data, None if info is None else stat.S_IMODE(info.st_mode) & 0o777)
        for temporary, path in ready:
            temporary.replace(path)
    except BaseException:
        for temporary, _ in ready:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise
    _sync_folder(folder)


def write_atomic(path: str | os.PathLike[str], data: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that at every moment the old or the new content is there, whole.

    Args:
        path: the destination; an existing file keeps its permissions, a new one gets `0666 & ~umask`.
        data: the content, or a function that writes it into the opened file it is given.

    Raises:
        WriteError: the folder is missing or closed, the disk is full, the path is a link, a folder or a device, or
            lies in a Hugging Face cache. The old content is unchanged and nothing is left over.

    Example:
        >>> write_atomic("results.json", b"{}")  # doctest: +SKIP
    """
    path = Path(path)
    with _as_write_error("file", path):
        _sweep_files(path.parent)
        _replace_all(path.parent, {path.name: data})


def _check_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}", name, re.ASCII) is None:
            raise ArgumentError(f"files: expected bare file names, got {shown(name)}")


def _write_new_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep_partials(folder)
    partial = folder.parent / f"{folder.name}.partial-{_owner_mark()}"
    try:
        partial.mkdir()
        for name, data in files.items():
            _write_new(partial / name, data, None)
        _sync_folder(partial)
        partial.rename(folder)
    except BaseException:
        _remove_folder(partial)
        raise
    _sync_folder(folder.parent)


def write_folder(folder: str | os.PathLike[str], files: Mapping[str, bytes], *, overwrite: bool = False) -> None:
    """Write several files that belong together.

    A new folder appears whole, by one rename. In a folder that exists all new files are on disk before the first
    old one is replaced, then each is renamed in the order given: between two of the renames a killed process leaves
    a mixture, so put the file first that can stand without the others. Other files in the folder are left alone.

    Args:
        folder: the destination; missing parents are made.
        files: content by bare file name.
        overwrite: replace files of these names; without it they are an error.

    Raises:
        ArgumentError: a name in `files` is not a bare file name.
        WriteError: one of the files exists and `overwrite` is False; the folder is a link or a file, or lies in a
            Hugging Face cache; it cannot be written. Nothing temporary is left over.

    Example:
        >>> write_folder("genes", {"a.json": b"{}"})  # doctest: +SKIP
    """
    _check_names(files)
    # an absolute path has a last part, the name under which the partial folder is made
    folder = Path(folder).absolute()
    with _as_write_error("folder", folder):
        if _check_place(folder, "folder", stat.S_ISDIR, "folder") is None:
            _write_new_folder(folder, files)
            return
        there = [name for name in files if os.path.lexists(folder / name)]
        if there and not overwrite:
            names = ", ".join(there)
            raise WriteError(f"overwrite: folder {path_text(folder)} holds {names}; overwrite=True replaces it")
        _sweep_files(folder)
        _replace_all(folder, files)
