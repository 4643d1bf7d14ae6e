# SPDX-License-Identifier: Apache-2.0
"""What a data set is here: two splits of normalised images, and a note on where they came from.

Leaves out every source; those are in the modules beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pylearngene.errors import ArgumentError, ShapeError

SUBSET_SEED = 2312


@dataclass(frozen=True)
class Split:
    """Images with labels: `images` float32 [N, 1, H, W], `labels` int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, count: int | None) -> Split:
        """Return the first `count` samples of one fixed shuffle; all of them for None.

        Raises:
            ArgumentError: `count` is below 1 or above N.
        """
        if count is None or count == len(self):
            return self
        if not 1 <= count <= len(self):
            raise ArgumentError(f"count: expected 1 to {len(self)} samples, got {count}")
        index = torch.randperm(len(self), generator=torch.Generator().manual_seed(SUBSET_SEED))[:count]
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A named image set with a train and a test split, its class names and its source in words."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str

    @property
    def image_size(self) -> int:
        """Height of an image in pixels; images are square."""
        return int(self.train.images.shape[-1])

    def take(self, train: int | None = None, test: int | None = None) -> Dataset:
        """Return the set cut to `train` and `test` samples, always the same ones for a count."""
        return replace(self, train=self.train.take(train), test=self.test.take(test))


def normalise(name: str, arrays: tuple[NDArray[np.uint8], ...], classes: tuple[str, ...], source: str) -> Dataset:
    """Build a set from raw arrays, in units of the training split's mean and standard deviation.

    Args:
        name: shown in reports.
        arrays: train images uint8 [N, H, H], train labels [N], test images [T, H, H], test labels [T].
        classes: class names; labels index them.
        source: where the arrays came from, in words.

    Raises:
        ShapeError: the counts of images and labels differ, or the images are not square or of two sizes.
        ArgumentError: a label is not an index of `classes`.
    """
    _check_arrays(arrays, len(classes))
    splits = []
    scale = float(max(1, arrays[0].max()))
    mean, std = arrays[0].mean() / scale, max(arrays[0].std() / scale, 1e-6)
    for images, labels in (arrays[:2], arrays[2:]):
        pixels = torch.from_numpy(images).to(torch.float32).div_(scale).sub_(mean).div_(std).unsqueeze(1)
        splits.append(Split(pixels, torch.from_numpy(labels).to(torch.int64)))
    return Dataset(name, splits[0], splits[1], classes, source)


def _check_arrays(arrays: tuple[NDArray[np.uint8], ...], num_classes: int) -> None:
    size = arrays[0].shape[-1]
    for images, labels, which in ((arrays[0], arrays[1], "train"), (arrays[2], arrays[3], "test")):
        if images.ndim != 3 or images.shape[1:] != (size, size):
            raise ShapeError(f"{which} images: expected [N, {size}, {size}], got {list(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ShapeError(f"{which} labels: expected [{images.shape[0]}], got {list(labels.shape)}")
        if images.shape[0] == 0:
            raise ShapeError(f"{which} images: expected at least one, got 0")
        if int(labels.max()) >= num_classes:
            raise ArgumentError(f"{which} labels: expected 0 to {num_classes - 1}, got {int(labels.max())}")
