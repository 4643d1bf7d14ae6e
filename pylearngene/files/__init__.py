# SPDX-License-Identifier: Apache-2.0
"""Safe reading and writing of files; nothing here knows what a learngene is.

`reading` opens untrusted files, `tensors` turns them into named tensors and back, and `writing` makes outputs that
appear whole or not at all. Nothing is ever unpickled, memory-mapped or executed.
"""

from __future__ import annotations

from pylearngene.files.reading import MAX_FILE, MAX_HEADER, parse_json, path_text, read_bytes, read_json, shown
from pylearngene.files.tensors import (
    TensorFile,
    check_finite,
    dtype_name,
    is_tensor_name,
    load_tensor_file,
    read_tensors,
    save_tensors,
)
from pylearngene.files.writing import write_atomic, write_folder

__all__ = [
    "MAX_FILE",
    "MAX_HEADER",
    "TensorFile",
    "check_finite",
    "dtype_name",
    "is_tensor_name",
    "load_tensor_file",
    "parse_json",
    "path_text",
    "read_bytes",
    "read_json",
    "read_tensors",
    "save_tensors",
    "shown",
    "write_atomic",
    "write_folder",
]
