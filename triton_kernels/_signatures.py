# SPDX-License-Identifier: Apache-2.0
"""Which variants of a launch row are compiled offline, and their signatures, whatever kernel the row is of.

What each kernel takes stands beside its rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from pylearngene.triton_kernels import _expansion_gradient_signatures, _expansion_signatures
from pylearngene.triton_kernels._row import Row
from pylearngene.triton_kernels._signature import ITEMSIZE, Signature, Variant

__all__ = ["ITEMSIZE", "Signature", "Variant", "signature", "variants"]

_FILES = (_expansion_signatures, _expansion_gradient_signatures)


def variants(row: Row) -> Iterator[Variant]:
    """The specializations of a row that are compiled."""
    for file in _FILES:
        if row.kernel in file.SIGNATURES:
            yield from file.variants(row)


def signature(row: Row, variant: Variant) -> Signature:
    """The signature of one launch."""
    (made,) = (file.SIGNATURES[row.kernel] for file in _FILES if row.kernel in file.SIGNATURES)
    return made(row, variant)
