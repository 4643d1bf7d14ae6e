# SPDX-License-Identifier: Apache-2.0
"""Which image set is taken: the order of the sources, and the banner of the last one."""

from __future__ import annotations

from pathlib import Path

from pylearngene.data.dataset import Dataset
from pylearngene.data.digits import digits
from pylearngene.data.fashion_mnist import (
    SYSTEM_FOLDER,
    SYSTEM_PACKAGE,
    cache_folder,
    download,
    fashion_mnist,
    install_package,
    is_complete,
)
from pylearngene.errors import ArgumentError

DIGITS_BANNER = (
    "STAND-IN DATA: Fashion-MNIST was not found, these are scikit-learn's 1,797 digits of 8x8 pixels. "
    "The numbers show that everything runs, not how good a method is."
)


def load(source: str | Path | None = None, *, fetch: bool = False, install: bool = False) -> Dataset:
    """Load an image set and say in its `source` where it came from.

    Args:
        source: None takes the system package's folder, else the download cache, else digits; "fashion-mnist"
            the same without digits; "digits"; any other value is a folder with the four idx files.
        fetch: download Fashion-MNIST when it is nowhere else.
        install: install the system package (apt-get) when it is missing; silently goes on where that fails.

    Raises:
        ArgumentError: the folder is missing or incomplete, or the set asked for by name is not there.
        GeneFileError: a file is damaged, or a download failed.

    Example:
        >>> load("digits").train.images.shape
        torch.Size([1400, 1, 8, 8])
    """
    if source == "digits":
        return digits()
    if source not in (None, "fashion-mnist"):
        return fashion_mnist(_existing(Path(source)))
    if install and not is_complete(SYSTEM_FOLDER):
        install_package()
    if not is_complete(SYSTEM_FOLDER) and fetch:
        download()
    for folder in (SYSTEM_FOLDER, cache_folder()):
        if is_complete(folder):
            return fashion_mnist(folder)
    if source == "fashion-mnist":
        raise ArgumentError(
            f"data: expected Fashion-MNIST in {SYSTEM_FOLDER} or {cache_folder()}, got neither; "
            f"`apt-get install {SYSTEM_PACKAGE}`, --download or --data FOLDER get it"
        )
    return digits()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ArgumentError(f"data: expected a folder, got {folder}")
    return folder
