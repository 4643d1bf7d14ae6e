# SPDX-License-Identifier: Apache-2.0
"""The 8x8 handwritten digits that ship inside scikit-learn: the set that is there when nothing else is.

It is far too small for conclusions, which is why every user of it shows a banner.
"""

from __future__ import annotations

import numpy as np

from pylearngene.data.dataset import Dataset, normalise
from pylearngene.errors import ArgumentError

TEST_COUNT = 397
SHUFFLE_SEED = 2312


def digits() -> Dataset:
    """Load scikit-learn's digits: 1,400 training and 397 test images of 8x8 in 10 classes.

    Raises:
        ArgumentError: scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ArgumentError(
            "data: no image set found and scikit-learn is not installed for its digits; "
            "install it with `pip install scikit-learn`, or use --install-data, --download or --data FOLDER"
        ) from error
    bunch = load_digits()
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(bunch.target))
    images = bunch.images[order].astype(np.uint8)
    labels = bunch.target[order].astype(np.uint8)
    arrays = (images[:-TEST_COUNT], labels[:-TEST_COUNT], images[-TEST_COUNT:], labels[-TEST_COUNT:])
    names = tuple(str(digit) for digit in range(10))
    return normalise("digits", arrays, names, "scikit-learn's digits, 8x8 pixels")
