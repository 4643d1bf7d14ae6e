# SPDX-License-Identifier: Apache-2.0
"""idx files good and bad, the order of the sources, downloads from a local server folder, and the digits."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pylearngene.data import DIGITS_BANNER, Dataset, Split, digits, fashion_mnist, load, read_idx, sources
from pylearngene.data.dataset import normalise
from pylearngene.errors import ArgumentError, GeneFileError, ShapeError, TooLargeError

# the function of the same name hides the module in the package
module = sys.modules["pylearngene.data.fashion_mnist"]
NAMES = list(module.SHA256)


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def arrays(train: int = 6, test: int = 4) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (count, 8, 8)) for count in (train, test)]
    return [images[0], np.arange(train) % 10, images[1], np.arange(test) % 10]


def write_folder(folder: Path, zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(NAMES, arrays(), strict=True):
        data = idx_bytes(array)
        (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(data) if zipped else data)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the machine's own data sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in (module, sources):
        monkeypatch.setattr(place, "SYSTEM_FOLDER", tmp_path / "system")


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_values(tmp_path: Path, zipped: bool) -> None:
    write_folder(tmp_path, zipped)
    path = module.find_file(tmp_path, NAMES[0])
    assert np.array_equal(read_idx(path, 3), arrays()[0])


GOOD = idx_bytes(np.arange(12).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected idx magic 00000803, got an empty file"),
        (b"\x00\x00\x08\x01" + GOOD[4:], "expected idx magic 00000803, got 00000801"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "expected idx magic 00000803, got 00000d03"),
        (GOOD[:10], "expected 3 sizes in the header, got 6 bytes"),
        (GOOD[:-1], r"expected 12 bytes of data for sizes \[3, 2, 2\], got 11"),
        (GOOD + b"x", r"expected 12 bytes of data for sizes \[3, 2, 2\], got more"),
        (gzip.compress(GOOD)[:-9], "expected a whole gzip file, got a damaged one"),
        (b"\x1f\x8b" + b"\x00" * 30, "cannot be read"),
        (gzip.compress(GOOD)[:12] + b"\xff\xff\xff" + gzip.compress(GOOD)[15:], "expected a whole gzip file|cannot be"),
    ],
)
def test_damaged_idx(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(GeneFileError, match=message):
        read_idx(path, 3)


def test_missing_idx(tmp_path: Path) -> None:
    with pytest.raises(GeneFileError, match="cannot be read"):
        read_idx(tmp_path / "none", 1)


def test_announced_size_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 2**31, 4))
    with pytest.raises(TooLargeError, match="expected at most 1073741824 bytes of data, got a header saying"):
        read_idx(path, 3)


@pytest.mark.parametrize("zipped", [True, False])
def test_folder(tmp_path: Path, zipped: bool) -> None:
    data = load(write_folder(tmp_path, zipped))
    assert (data.name, data.image_size, len(data.train), len(data.test)) == ("Fashion-MNIST", 8, 6, 4)
    assert data.train.images.shape == (6, 1, 8, 8)
    assert (data.train.images.dtype, data.train.labels.dtype) == (torch.float32, torch.int64)
    assert abs(float(data.train.images.mean())) < 1e-5
    assert float(data.train.images.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert str(tmp_path) in data.source


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="data: expected a folder, got"):
        load(tmp_path / "none")
    (write_folder(tmp_path) / f"{NAMES[2]}.gz").unlink()
    with pytest.raises(ArgumentError, match=f"got {tmp_path} without {NAMES[2]}"):
        fashion_mnist(tmp_path)


def test_order_of_sources(tmp_path: Path) -> None:
    assert load().name == "digits"
    with pytest.raises(ArgumentError, match=r"data: expected Fashion-MNIST in .* got neither"):
        load("fashion-mnist")
    write_folder(module.cache_folder())
    assert "cache" in load().source
    write_folder(tmp_path / "system")
    assert "system" in load("fashion-mnist").source
    assert load("digits").name == "digits"


def test_banner_is_short_and_loud() -> None:
    assert DIGITS_BANNER.startswith("STAND-IN DATA")


def test_digits() -> None:
    data = digits()
    assert (len(data.train), len(data.test), data.image_size, len(data.classes)) == (1400, 397, 8, 10)
    assert set(data.test.labels.tolist()) == set(range(10))
    assert torch.equal(data.train.images, digits().train.images)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArgumentError, match=r"scikit-learn is not installed .*pip install scikit-learn"):
        digits()


def test_take_is_fixed_and_checked() -> None:
    data = digits()
    assert torch.equal(data.take(train=50).train.images, data.take(train=50, test=3).train.images)
    assert torch.equal(data.train.take(50).labels, data.train.take(60).labels[:50])
    assert len(data.take(test=3).test) == 3
    assert data.train.take(None) is data.train
    for count in (0, 1401):
        with pytest.raises(ArgumentError, match=f"count: expected 1 to 1400 samples, got {count}"):
            data.train.take(count)


def test_arrays_are_checked() -> None:
    def build(**changes: Any) -> Dataset:
        names = ("train_images", "train_labels", "test_images", "test_labels")
        values = {**dict(zip(names, (a.astype(np.uint8) for a in arrays()), strict=True)), **changes}
        return normalise("x", tuple(values[name] for name in names), tuple("0123456789"), "here")  # type: ignore[arg-type]

    byte = np.uint8
    assert isinstance(build().test, Split)
    with pytest.raises(ShapeError, match=r"train images: expected \[N, 8, 8\], got \[6, 4, 8\]"):
        build(train_images=np.zeros((6, 4, 8), byte))
    with pytest.raises(ShapeError, match=r"test images: expected \[N, 8, 8\], got \[4, 6, 6\]"):
        build(test_images=np.zeros((4, 6, 6), byte))
    with pytest.raises(ShapeError, match=r"test labels: expected \[4\], got \[5\]"):
        build(test_labels=np.zeros(5, byte))
    with pytest.raises(ShapeError, match="train images: expected at least one, got 0"):
        build(train_images=np.zeros((0, 8, 8), byte), train_labels=np.zeros(0, byte))
    with pytest.raises(ArgumentError, match="train labels: expected 0 to 9, got 10"):
        build(train_labels=np.full(6, 10, byte))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A mirror in a folder, with its own digests in place of the real ones."""
    folder = write_folder(tmp_path / "mirror")
    digests = {name: hashlib.sha256(idx_bytes(array)).hexdigest() for name, array in zip(NAMES, arrays(), strict=True)}
    monkeypatch.setattr(module, "SHA256", digests)
    return (f"{folder.as_uri()}/",)


def test_download(mirror: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = module.download(mirrors=("file:///nowhere/at/all/", *mirror))
    assert folder == module.cache_folder()
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in NAMES)
    monkeypatch.setattr(module, "_fetch", None)
    assert module.download(mirrors=mirror) == folder
    assert len(load(fetch=True).train) == 6


def test_download_checks_the_unpacked_data(mirror: tuple[str, ...], tmp_path: Path) -> None:
    array = arrays()[0]
    array[0, 0, 0] ^= 1
    (tmp_path / "mirror" / f"{NAMES[0]}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    with pytest.raises(GeneFileError, match=f"{NAMES[0]}: expected sha256 [0-9a-f]* of the unpacked data, got"):
        module.download(mirrors=mirror)
    assert list(module.cache_folder().iterdir()) == []


def test_download_of_something_else(mirror: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "mirror" / f"{NAMES[0]}.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(GeneFileError, match=f"{NAMES[0]}: expected gzip data, got something else"):
        module.download(mirrors=mirror)


def test_download_without_an_answer() -> None:
    with pytest.raises(GeneFileError, match=f"{NAMES[0]}: expected a download, got no answer"):
        module.download(mirrors=("file:///nowhere/at/all/",))


@pytest.mark.parametrize(("limit", "what"), [(10, "got more"), (500, "unpacked, got more")])
def test_download_limits(mirror: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, limit: int, what: str) -> None:
    folder = Path(mirror[0].removeprefix("file://"))
    (folder / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(10_000)))
    monkeypatch.setattr(module, "MAX_DOWNLOAD", limit)
    with pytest.raises(TooLargeError, match=f"expected at most {limit} bytes.*{what}"):
        module.download(mirrors=mirror)


def test_real_digests_fit_the_real_files() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not module.is_complete(folder):
        pytest.skip("the system package dataset-fashion-mnist is not installed")
    for name, digest in module.SHA256.items():
        data = gzip.decompress((folder / f"{name}.gz").read_bytes())
        assert hashlib.sha256(data).hexdigest() == digest
    data = fashion_mnist(folder)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10


class Apt:
    """Stands in for subprocess.run: notes the commands, and can make the files appear."""

    def __init__(self, folder: Path | None, error: Exception | None = None) -> None:
        self.folder, self.error, self.commands = folder, error, []  # type: ignore[var-annotated]

    def __call__(self, command: list[str], **options: Any) -> None:
        self.commands.append(command)
        if self.error is not None:
            raise self.error
        if self.folder is not None and "update" in self.commands[-1]:
            write_folder(self.folder)


def fake(monkeypatch: pytest.MonkeyPatch, apt: Apt, found: dict[str, str | None], user: int = 0) -> None:
    monkeypatch.setattr(module.subprocess, "run", apt)
    monkeypatch.setattr(module.shutil, "which", found.get)
    monkeypatch.setattr(module.os, "geteuid", lambda: user)


def test_install_as_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apt = Apt(tmp_path / "system")
    fake(monkeypatch, apt, {"apt-get": "/bin/apt-get"})
    assert "system" in load(install=True).source
    assert apt.commands == [
        ["/bin/apt-get", "install", "-y", "dataset-fashion-mnist"],
        ["/bin/apt-get", "update"],
    ]


def test_install_through_sudo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apt = Apt(tmp_path / "system")
    fake(monkeypatch, apt, {"apt-get": "/bin/apt-get", "sudo": "/bin/sudo"}, user=1000)
    assert module.install_package()
    assert apt.commands[0][:2] == ["/bin/sudo", "--non-interactive"]


@pytest.mark.parametrize(
    ("found", "user", "error"),
    [
        ({}, 0, None),
        ({"apt-get": "/bin/apt-get"}, 1000, None),
        ({"apt-get": "/bin/apt-get"}, 0, None),
        ({"apt-get": "/bin/apt-get"}, 0, OSError("no")),
    ],
    ids=["no apt-get", "no rights", "not found", "cannot run"],
)
def test_install_that_fails_is_no_error(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str | None], user: int, error: Exception | None
) -> None:
    fake(monkeypatch, Apt(None, error), found, user)
    assert load(install=True).name == "digits"


def test_nothing_is_installed_or_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    apt = Apt(None)
    fake(monkeypatch, apt, {"apt-get": "/bin/apt-get"})
    monkeypatch.setattr(sources, "download", None)
    assert load().name == "digits"
    assert apt.commands == []
