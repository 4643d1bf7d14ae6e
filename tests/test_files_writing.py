# SPDX-License-Identifier: Apache-2.0
"""Outputs that are interrupted, full disks, permissions, links, and what killed writers leave behind.

Real kills of a saving process are in `test_learngene.py`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from pylearngene import files
from pylearngene.errors import ArgumentError, WriteError
from pylearngene.files import writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions(mask: int, expected: int, tmp_path: Path) -> None:
    with umask(mask):
        files.write_atomic(tmp_path / "new", b"1")
        files.write_folder(tmp_path / "folder", {"a": b"1"})
        assert mode(tmp_path / "new") == mode(tmp_path / "folder" / "a") == expected
        assert mode(tmp_path / "folder") == 0o777 & ~mask
        for kept in (0o600, 0o664, 0o444):
            (tmp_path / "new").chmod(kept)
            files.write_atomic(tmp_path / "new", b"22")
            assert mode(tmp_path / "new") == kept
    assert (tmp_path / "new").read_bytes() == b"22"


def chunks(data: bytes) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])

    return write


@pytest.mark.parametrize("limit", [0, 1, 4095, 4096, 8192, 99_999])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_full_disk_leaves_the_old_file(limit: int, in_pieces: bool, tmp_path: Path) -> None:
    data = bytes(100_000)
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with file_limit(limit), pytest.raises(WriteError, match=r"file '.*out': cannot be written: File too large"):
        files.write_atomic(path, chunks(data) if in_pieces else data)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out"]
    with file_limit(len(data)):
        files.write_atomic(path, chunks(data) if in_pieces else data)
    assert path.read_bytes() == data


@pytest.mark.parametrize("limit", [0, 50, 150, 199])
def test_full_disk_and_folders(limit: int, tmp_path: Path) -> None:
    new = {"first": bytes(100), "second": bytes(200)}
    with file_limit(limit), pytest.raises(WriteError, match="File too large"):
        files.write_folder(tmp_path / "folder", new)
    assert names(tmp_path) == []
    old = {"first": b"1", "second": b"2"}
    files.write_folder(tmp_path / "folder", old)
    with file_limit(limit), pytest.raises(WriteError, match="File too large"):
        files.write_folder(tmp_path / "folder", new, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == old


def test_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def interrupted(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, interrupted)
    monkeypatch.setattr(Path, "replace", interrupt)
    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    with pytest.raises(KeyboardInterrupt):
        files.write_folder(tmp_path / "folder", {"a": b"1"})
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_flushed_before_the_rename_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def note_fsync(fd: int) -> None:
        target = Path(f"/proc/self/fd/{fd}").readlink()
        steps.append(("fsync", target.name if target.is_dir() else "file"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append(("rename", to.name)), replace(self, to))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (steps.append(("rename", to.name)), rename(self, to))[1])
    files.write_atomic(tmp_path / "out", b"1")
    assert steps == [("fsync", "file"), ("rename", "out"), ("fsync", tmp_path.name)]
    steps.clear()
    files.write_folder(tmp_path / "folder", {"a": b"1", "b": b"2"})
    partial = steps[2][1]
    assert partial.startswith("folder.partial-")
    assert steps == [*[("fsync", "file")] * 2, ("fsync", partial), ("rename", "folder"), ("fsync", tmp_path.name)]
    steps.clear()
    files.write_folder(tmp_path / "folder", {"b": b"3", "a": b"4"}, overwrite=True)
    assert steps == [*[("fsync", "file")] * 2, ("rename", "b"), ("rename", "a"), ("fsync", "folder")]


def test_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here, tail = writing._machine(), "0123456789abcdef"
    dead, alive = f"{here}-{child.pid}-{tail}", f"{here}-{os.getpid()}-{tail}"
    elsewhere, aged = f"00000000-{child.pid}-{tail}", f"00000001-{child.pid}-{tail}"
    keep = [".pylearngene-notes.tmp", f".pylearngene-{alive}.tmp", f".pylearngene-{elsewhere}.tmp"]
    for name in [*keep, f".pylearngene-{dead}.tmp", f".pylearngene-{aged}.tmp"]:
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / f".pylearngene-{aged}.tmp", (0, 0))
    files.write_atomic(tmp_path / "out", b"1")
    assert names(tmp_path) == sorted(["out", *keep])
    folders = [f"genes.partial-{alive}", f"genes.partial-{dead}", f"other.partial-{dead}", "genes.partial-mine"]
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"x")
    files.write_folder(tmp_path / "genes", {"a": b"1"})
    folders.remove(f"genes.partial-{dead}")
    assert names(tmp_path) == sorted(["out", "genes", *keep, *folders])


def test_sweeping_does_not_follow_links(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_bytes(b"x")
    (tmp_path / f"genes.partial-{writing._machine()}-{child.pid}-0123456789abcdef").symlink_to(tmp_path / "precious")
    files.write_folder(tmp_path / "genes", {"a": b"1"})
    assert (tmp_path / "precious" / "a").read_bytes() == b"x"


def test_links_and_other_things_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "to_folder").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "inside").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dangling", "folder/inside"):
        with pytest.raises(WriteError, match=f"{name}': expected a real regular file, got a symbolic link"):
            files.write_atomic(tmp_path / name, b"new")
    for name in ("folder", "fifo"):
        with pytest.raises(WriteError, match="expected a regular file, something else is there"):
            files.write_atomic(tmp_path / name, b"new")
    for name in ("to_folder", "to_folder/", "dangling"):
        with pytest.raises(WriteError, match="expected a real folder, got a symbolic link"):
            files.write_folder(f"{tmp_path}/{name}", {"a": b"new"}, overwrite=True)
    with pytest.raises(WriteError, match="inside': expected a real regular file, got a symbolic link"):
        files.write_folder(tmp_path / "folder", {"a": b"new", "inside": b"new"}, overwrite=True)
    with pytest.raises(WriteError, match="target': expected a folder, something else is there"):
        files.write_folder(tmp_path / "target", {"a": b"new"})
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert names(tmp_path / "folder") == ["inside"]
    assert not (tmp_path / "nothing").exists()


def test_hub_cache_is_not_written(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    with pytest.raises(WriteError, match="in a Hugging Face cache"):
        files.write_atomic(snapshot / "x", b"1")
    with pytest.raises(WriteError, match="in a Hugging Face cache"):
        files.write_folder(snapshot / "new", {"x": b"1"})
    assert names(snapshot) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    for path, message in [
        ("none/out", "No such file"),
        ("file/out", "Not a directory"),
        ("nul\0", "cannot be written"),
    ]:
        with pytest.raises(WriteError, match=message):
            files.write_atomic(tmp_path / path, b"1")
    with pytest.raises(WriteError, match="cannot be written"):
        files.write_folder(tmp_path / "file" / "folder", {"a": b"1"})
    for name in ("", "a/b", "..", ".hidden", "a\0b", "x" * 200):
        with pytest.raises(ArgumentError, match="files: expected bare file names, got"):
            files.write_folder(tmp_path / "folder", {name: b"1"})
    assert names(tmp_path) == ["file"]


def test_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "er" / "folder"
    files.write_folder(folder, {"a": b"1", "b": b"2"})
    (folder / "other").write_bytes(b"mine")
    with pytest.raises(WriteError, match=r"overwrite: folder '.*folder' holds b; overwrite=True replaces it"):
        files.write_folder(folder, {"b": b"3", "c": b"4"})
    assert names(folder) == ["a", "b", "other"]
    files.write_folder(folder, {"c": b"4"})
    files.write_folder(folder, {"b": b"3", "c": b"5"}, overwrite=True)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"a": b"1", "b": b"3", "c": b"5", "other": b"mine"}
    monkeypatch.chdir(folder)
    files.write_folder(".", {"d": b"6"})
    files.write_folder("sub", {"d": b"6"})
    assert (folder / "d").read_bytes() == (folder / "sub" / "d").read_bytes() == b"6"
