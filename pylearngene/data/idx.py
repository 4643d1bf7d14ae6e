# SPDX-License-Identifier: Apache-2.0
"""The idx format of the MNIST family: a magic number, big-endian sizes, then bytes; plain or gzip.

Every field is checked before it is believed. Leaves out element types other than unsigned bytes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pylearngene.errors import GeneFileError, TooLargeError

UNSIGNED_BYTE = 0x08
MAX_PAYLOAD = 1 << 30
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzip or plain (told by its first bytes, not its name).

    layout = 0x00 0x00 0x08 dims | dims sizes, 4 bytes each, big-endian | product(sizes) bytes

    Args:
        path: the file.
        dims: number of axes expected, 3 for images and 1 for labels.

    Returns:
        uint8 array with `dims` axes.

    Raises:
        GeneFileError: the file is missing, damaged, shorter or longer than its header says, or of another kind.
        TooLargeError: the header announces more than 1 GiB.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == GZIP_MAGIC
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            return _parse(cast(BinaryIO, stream), dims, path)
    except (EOFError, zlib.error) as error:
        raise GeneFileError(f"{path}: expected a whole gzip file, got a damaged one ({error})") from error
    except OSError as error:
        raise GeneFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parse(stream: BinaryIO, dims: int, path: Path) -> NDArray[np.uint8]:
    magic = stream.read(4)
    expected = bytes((0, 0, UNSIGNED_BYTE, dims))
    if magic != expected:
        raise GeneFileError(f"{path}: expected idx magic {expected.hex()}, got {magic.hex() or 'an empty file'}")
    header = stream.read(4 * dims)
    if len(header) != 4 * dims:
        raise GeneFileError(f"{path}: expected {dims} sizes in the header, got {len(header)} bytes")
    sizes = struct.unpack(f">{dims}I", header)
    count = prod(sizes)
    if count > MAX_PAYLOAD:
        raise TooLargeError(f"{path}: expected at most {MAX_PAYLOAD} bytes of data, got a header saying {count}")
    payload = stream.read(count + 1)
    if len(payload) != count:
        got = "more" if len(payload) > count else str(len(payload))
        raise GeneFileError(f"{path}: expected {count} bytes of data for sizes {list(sizes)}, got {got}")
    values: NDArray[np.uint8] = np.frombuffer(payload, dtype=np.uint8).reshape(sizes).copy()
    return values
