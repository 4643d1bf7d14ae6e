# SPDX-License-Identifier: Apache-2.0
"""Named tensors in the safetensors format: bytes out, checked tensors in, and the search for NaN and Inf.

The safetensors library packs and unpacks; this module first checks what the library lets pass (duplicate keys, absurd
sizes of empty tensors, unprintable names). What the tensors mean is not known here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pylearngene.errors import ArgumentError, DTypeError, GeneFileError, NonFiniteError, TooLargeError
from pylearngene.files.reading import (
    MAX_FILE,
    MAX_HEADER,
    open_regular,
    parse_json,
    path_text,
    read_at,
    read_exactly,
    shown,
)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,256}", re.ASCII)
_METADATA = "__metadata__"
_MAX_RANK = 16
_MAX_DIM = 2**31 - 1
_MAX_TENSORS = 100_000
_FINITE_CHUNK = 2**22


@dataclass(frozen=True)
class TensorFile:
    """What one tensor file holds: tensors by name, text metadata, and the sha256 of its bytes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def is_tensor_name(name: object) -> bool:
    """Say whether `name` may name a stored tensor: 1 to 256 characters of `A-Z a-z 0-9 _ . - /`."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, for instance `float32`."""
    return str(dtype).removeprefix("torch.")


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the tensors and return contiguous CPU copies or views, none sharing memory with another."""
    packed: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not is_tensor_name(name) or name == _METADATA:
            raise ArgumentError(f"tensors: expected names of 1 to 256 of A-Z a-z 0-9 _ . - /, got {shown(name)}")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            got = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"tensors[{shown(name)}]: expected a dense tensor with values, got {got}")
        if tensor.dtype not in DTYPES.values():
            known = ", ".join(dtype_name(dtype) for dtype in DTYPES.values())
            raise DTypeError(f"tensors[{shown(name)}]: expected one of {known}, got {dtype_name(tensor.dtype)}")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # the library refuses tensors that share memory; two names for one tensor are two copies on disk
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    return packed


def _with_sorted_header(raw: bytes) -> bytes:
    """Write the header again in a fixed order: the library's order of the metadata changes from run to run."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[_METADATA] = dict(sorted(header[_METADATA].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(raw)[8 + length :]))


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Pack named tensors and text metadata into the bytes of a safetensors file.

    Equal input gives equal bytes, whatever the order of the names.

    Args:
        tensors: dense tensors of any shape and device, by name (`is_tensor_name`); float64, float32, float16,
            bfloat16, int64, int32, int16, int8, uint8 or bool. Views and shared tensors are written out in full.
        metadata: text by text; `format: pt` is added.

    Raises:
        ArgumentError: a name is not allowed, a tensor is sparse or holds no values, metadata is not text.
        DTypeError: a tensor has another dtype.
        TooLargeError: names and metadata would exceed the header limit that `read_tensors` sets by default.

    Example:
        >>> data = save_tensors({"weight": torch.zeros(2, 3)}, {"note": "example"})
        >>> data[8:20]
        b'{"__metadata'
    """
    texts = {"format": "pt", **(metadata or {})}
    for key, value in texts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ArgumentError(f"metadata: expected text by text, got {shown(key)}: {type(value).__name__}")
    data = _with_sorted_header(save(_packed(tensors), texts))
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise TooLargeError(f"metadata: expected a header of at most {MAX_HEADER} bytes, got {length}")
    return data


def _read_header(file: BinaryIO, size: int, limit: int, path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    """Return the first bytes of the file as they are, and the header parsed from them."""
    what = f"file {path_text(path)}"
    if size < 8:
        raise GeneFileError(f"{what}: expected at least 8 bytes, got {size} (empty or truncated)")
    prefix = read_at(file, 8, 0, path)
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise GeneFileError(
            f"{what}: header of {length} bytes announced, {size - 8} left (truncated or no safetensors file)"
        )
    if length > limit:
        raise TooLargeError(f"{what}: expected a header of at most {limit} bytes, got {length}")
    text = read_at(file, length, 8, path)
    if not text.startswith(b"{"):
        raise GeneFileError(f"{what}: expected a header that starts with '{{', got {shown(text[:8])}")
    return prefix + text, parse_json(text, f"{what}: header")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**63 - 1


def _check_entry(what: str, name: str, entry: object) -> tuple[int, int]:
    """Check one tensor entry of the header and return where its bytes begin and end."""
    if not is_tensor_name(name):
        raise GeneFileError(f"{what}: tensor name {shown(name)} has characters or a length that are not allowed")
    what = f"{what}: tensor '{name}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise GeneFileError(f"{what}: expected dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise GeneFileError(f"{what}: expected a dtype among {', '.join(DTYPES)}, got {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise GeneFileError(f"{what}: expected a shape of at most {_MAX_RANK} sizes, got {shown(shape)}")
    if max(shape, default=0) > _MAX_DIM:
        raise GeneFileError(f"{what}: expected sizes up to {_MAX_DIM}, got shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise GeneFileError(f"{what}: expected two data_offsets, got {shown(offsets)}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise GeneFileError(f"{what}: {dtype} {shape} needs {needed} bytes, data_offsets {offsets} give {end - begin}")
    return begin, end


def _check_header(what: str, header: dict[str, Any], data_bytes: int) -> dict[str, str]:
    """Check every entry and that together they cover the data exactly; return the metadata."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise GeneFileError(f"{what}: expected metadata of text by text, got {shown(metadata)}")
    if len(header) > _MAX_TENSORS:
        raise TooLargeError(f"{what}: expected at most {_MAX_TENSORS} tensors, got {len(header)}")
    spans = sorted((*_check_entry(what, name, entry), name) for name, entry in header.items())
    reached = 0
    for begin, end, name in spans:
        if begin != reached:
            fault = "overlaps the one before it" if begin < reached else "leaves a hole before it"
            raise GeneFileError(f"{what}: tensor '{name}' {fault} (begins at {begin}, expected {reached})")
        reached = end
    if reached != data_bytes:
        fault = "truncated" if reached > data_bytes else "trailing bytes"
        raise GeneFileError(f"{what}: expected {reached} bytes of tensor data, got {data_bytes} ({fault})")
    return metadata


def load_tensor_file(
    path: str | os.PathLike[str], *, max_header: int = MAX_HEADER, max_bytes: int = MAX_FILE
) -> TensorFile:
    """Read a safetensors file; tensors, metadata and digest come from one and the same reading of its bytes.

    The header is checked against the size of the file before any tensor data is read, and nothing is memory-mapped
    (a mapped file that another process shortens kills the reader). Memory: up to twice the size of the file.

    Args:
        path: a regular file, or a link to one.
        max_header: largest header accepted, in bytes.
        max_bytes: largest file accepted, in bytes.

    Returns:
        A `TensorFile` with CPU tensors.

    Raises:
        GeneFileError: nothing there, not a regular file, or any damage; the message says what is wrong.
        TooLargeError: the file, its header or its number of tensors exceeds a limit.
    """
    what = f"file {path_text(path)}"
    with open_regular(path, max_bytes) as (file, size):
        start, header = _read_header(file, size, max_header, path)
        metadata = _check_header(what, header, size - len(start))
        data = read_exactly(file, size, path)
    if data[: len(start)] != start:
        raise GeneFileError(f"{what}: changed while it was read")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise GeneFileError(f"{what}: refused by safetensors: {shown(str(error))[1:-1]}") from error
    return TensorFile({name: tensors[name] for name in sorted(tensors)}, metadata, hashlib.sha256(data).hexdigest())


def read_tensors(
    path: str | os.PathLike[str], *, max_header: int = MAX_HEADER, max_bytes: int = MAX_FILE
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and return its tensors by name and its metadata; see `load_tensor_file`.

    Raises:
        GeneFileError: nothing there, not a regular file, or any damage.
        TooLargeError: the file, its header or its number of tensors exceeds a limit.
    """
    content = load_tensor_file(path, max_header=max_header, max_bytes=max_bytes)
    return content.tensors, content.metadata


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise when a tensor holds NaN or Inf; works in pieces, so the extra memory stays small.

    Args:
        tensors: tensors of any shape, dtype and device by name; integer and bool ones always pass.
        what: what the tensors are, the first word of the message ("gene").

    Raises:
        NonFiniteError: names the first such tensor, with the number of NaN and of Inf.

    Example:
        >>> check_finite({"attn.qkv.weight.0": torch.ones(4, 4)}, "gene")
    """
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
            continue
        flat = tensor.detach().reshape(-1)
        pieces = [flat[start : start + _FINITE_CHUNK] for start in range(0, flat.numel(), _FINITE_CHUNK)]
        if all(bool(torch.isfinite(piece).all()) for piece in pieces):
            continue
        nans = sum(int(torch.isnan(piece).sum().item()) for piece in pieces)
        infs = sum(int(torch.isinf(piece).sum().item()) for piece in pieces)
        raise NonFiniteError(
            f"{what} {shown(name)}: expected finite values, got {nans} NaN and {infs} Inf among {flat.numel()}"
        )
