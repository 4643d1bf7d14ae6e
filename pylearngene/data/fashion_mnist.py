# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST from a folder of its four idx files, and the three ways such a folder comes about.

A folder is the system package's, one given by the user, or the cache that `download` fills. Nothing is
installed or fetched unless asked.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import urllib.error
import urllib.request
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from tqdm import tqdm

from pylearngene.data.dataset import Dataset, normalise
from pylearngene.data.idx import read_idx
from pylearngene.errors import ArgumentError, GeneFileError, TooLargeError
from pylearngene.files import write_atomic

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SYSTEM_PACKAGE = "dataset-fashion-mnist"
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# Of the decompressed payload: gzip headers differ between distributors, the data does not.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MAX_DOWNLOAD = 64 << 20
CHUNK = 1 << 16


def fashion_mnist(folder: Path) -> Dataset:
    """Load the four idx files of a folder, each plain or with `.gz`: 60,000 + 10,000 images of 28x28.

    Any set in the same four files works (MNIST, KMNIST), as long as it has at most 10 classes.

    Raises:
        ArgumentError: the folder or one of the files is missing.
        GeneFileError: a file is damaged.

    Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017, arXiv 1708.07747.
    """
    missing = [name for name in SHA256 if find_file(folder, name) is None]
    if missing:
        raise ArgumentError(
            f"data: expected the files {', '.join(SHA256)} (plain or .gz), got {folder} without " + ", ".join(missing)
        )
    paths = [find_file(folder, name) for name in SHA256]
    train_images, train_labels, test_images, test_labels = (
        read_idx(path, 3 if "idx3" in path.name else 1) for path in paths if path is not None
    )
    arrays = (train_images, train_labels, test_images, test_labels)
    return normalise("Fashion-MNIST", arrays, CLASSES, f"idx files in {folder}")


def find_file(folder: Path, name: str) -> Path | None:
    """Return the plain or gzip form of `name` in the folder, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def is_complete(folder: Path) -> bool:
    """Tell whether the folder has all four files."""
    return all(find_file(folder, name) is not None for name in SHA256)


def cache_folder() -> Path:
    """Return the folder that `download` fills, under XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "pylearngene" / "fashion-mnist"


def install_package() -> bool:
    """Install the system package by apt-get, as root or through sudo without a password.

    Returns:
        Whether the files are there afterwards. Never raises and never asks: a machine without apt-get,
        rights or network simply gets False.
    """
    apt = shutil.which("apt-get")
    prefix: list[str] = []
    if apt is None:
        return False
    if os.geteuid() != 0:
        sudo = shutil.which("sudo")
        if sudo is None:
            return False
        prefix = [sudo, "--non-interactive"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["install", "-y", SYSTEM_PACKAGE], ["update"], ["install", "-y", SYSTEM_PACKAGE]):
        if is_complete(SYSTEM_FOLDER):
            break
        try:
            subprocess.run([*prefix, apt, *arguments], env=environment, check=False, capture_output=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired):
            return False
    return is_complete(SYSTEM_FOLDER)


def download(folder: Path | None = None, mirrors: tuple[str, ...] = MIRRORS) -> Path:
    """Fetch the four files into the cache folder; each appears only after its sha256 agreed.

    Args:
        folder: where to; None is `cache_folder()`. Files already there are kept.
        mirrors: base addresses, tried in order.

    Returns:
        The folder.

    Raises:
        GeneFileError: no mirror answered, or the data had another sha256.
        TooLargeError: a mirror sent more than 64 MiB for one file, packed or unpacked.
        WriteError: the folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in SHA256.items():
        if find_file(folder, name) is None:
            packed = _fetch(name, mirrors)
            got = hashlib.sha256(_unpack(packed, name)).hexdigest()
            if got != digest:
                raise GeneFileError(f"{name}: expected sha256 {digest} of the unpacked data, got {got}")
            write_atomic(folder / f"{name}.gz", packed)
    return folder


def _fetch(name: str, mirrors: tuple[str, ...]) -> bytes:
    reasons = []
    for base in mirrors:
        try:
            with urllib.request.urlopen(f"{base}{name}.gz", timeout=30) as answer:
                total = int(answer.headers.get("Content-Length") or 0)
                with tqdm(desc=name, total=total or None, unit="B", unit_scale=True, disable=None) as bar:
                    return _read_all(cast(BinaryIO, answer), bar, name)
        except (urllib.error.URLError, OSError, ValueError) as error:
            if isinstance(error, TooLargeError):
                raise
            reasons.append(f"{base}: {getattr(error, 'reason', error)}")
    raise GeneFileError(f"{name}: expected a download, got no answer ({'; '.join(reasons)})")


def _read_all(answer: BinaryIO, bar: tqdm[None], name: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := answer.read(CHUNK):
        size += len(part)
        if size > MAX_DOWNLOAD:
            raise TooLargeError(f"{name}: expected at most {MAX_DOWNLOAD} bytes, got more")
        parts.append(part)
        bar.update(len(part))
    return b"".join(parts)


def _unpack(packed: bytes, name: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=BytesIO(packed)) as stream:
            data = stream.read(MAX_DOWNLOAD + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise GeneFileError(f"{name}: expected gzip data, got something else ({error})") from error
    if len(data) > MAX_DOWNLOAD:
        raise TooLargeError(f"{name}: expected at most {MAX_DOWNLOAD} bytes unpacked, got more")
    return data
