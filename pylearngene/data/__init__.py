# SPDX-License-Identifier: Apache-2.0
"""Image sets small enough for a laptop: Fashion-MNIST in its usual places, scikit-learn's digits otherwise.

`load` picks the source and says which one it took. No augmentation and no loader processes: a set is two
tensors in memory.
"""

from __future__ import annotations

from pylearngene.data.dataset import Dataset, Split
from pylearngene.data.digits import digits
from pylearngene.data.fashion_mnist import fashion_mnist
from pylearngene.data.idx import read_idx
from pylearngene.data.sources import DIGITS_BANNER, load

__all__ = ["DIGITS_BANNER", "Dataset", "Split", "digits", "fashion_mnist", "load", "read_idx"]
