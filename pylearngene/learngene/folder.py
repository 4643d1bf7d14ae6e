# SPDX-License-Identifier: Apache-2.0
"""The two files of a gene folder: their content, and the checks a reader makes before it believes them.

`gene.safetensors` holds the tensors and the whole config in its metadata, so it can stand alone; `gene_config.json` is
the same config to be read by people and tools, with the sha256 of the tensor file. Nothing here makes objects of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pylearngene.errors import ArgumentError, GeneFileError
from pylearngene.files import (
    TensorFile,
    dtype_name,
    load_tensor_file,
    parse_json,
    path_text,
    read_json,
    save_tensors,
    shown,
)
from pylearngene.learngene.host import differing_keys, is_count

FORMAT_VERSION = 1
TENSOR_FILE = "gene.safetensors"
CONFIG_FILE = "gene_config.json"
_EMBEDDED = "gene_config"
_KEYS = {"format_version", "pylearngene_version", "method", "host", "tensors", "content_sha256"}


def _canonical(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _tensor_list(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(tensors[name].shape), "dtype": dtype_name(tensors[name].dtype)}
        for name in sorted(tensors)
    ]


def _content_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return one sha256 over the config without its digest and over the values of all tensors in order of name."""
    digest = hashlib.sha256(_canonical({key: config[key] for key in config if key != "content_sha256"}))
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _own_version() -> str:
    try:
        return packages.version("pylearngene")
    except packages.PackageNotFoundError:
        return "unknown"


def _check_config(config: dict[str, Any], keys: set[str], what: str) -> None:
    """Check version, keys and the types of what the reader itself uses."""
    version = config.get("format_version")
    if "format_version" in config and not is_count(version, 1):
        raise GeneFileError(f"{what}: expected format_version {FORMAT_VERSION}, got {shown(version)}")
    if version is not None and version > FORMAT_VERSION:
        raise GeneFileError(
            f"{what}: expected format_version up to {FORMAT_VERSION}, got {shown(version)}: "
            "a newer pylearngene wrote it, upgrade to read it"
        )
    differing_keys(config, keys, what)
    for key in sorted(keys & {"pylearngene_version", "content_sha256", "sha256"}):
        if not isinstance(config[key], str):
            raise GeneFileError(f"{what}: {key}: expected text, got {shown(config[key])}")
    if not isinstance(config["method"], dict) or not isinstance(config["method"].get("name"), str):
        raise GeneFileError(f"{what}: method: expected a name and its config, got {shown(config['method'])}")


def _check_tensor_list(config: dict[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    listed, found = config["tensors"], _tensor_list(tensors)
    if listed == found:
        return
    if not isinstance(listed, list):
        raise GeneFileError(f"{what}: tensors: expected a list of name, shape and dtype, got {shown(listed)}")
    # the first difference is enough to say what is wrong
    for one, other in itertools.zip_longest(listed, found, fillvalue="nothing"):
        if one != other:
            raise GeneFileError(f"{what}: tensors: expected {shown(one)} by its config, got {shown(other)}")


def _agreed_config(config: dict[str, Any], content: TensorFile, folder: Path) -> dict[str, Any]:
    """Compare both files of a folder and return the config to go by, the one inside the tensor file.

    A save that was killed leaves a new tensor file beside an old config: that is recovered, with a warning.
    """
    what = f"file {path_text(folder / TENSOR_FILE)}"
    if _EMBEDDED not in content.metadata:
        raise GeneFileError(f"{what}: expected metadata '{_EMBEDDED}', got none (not written by pylearngene)")
    embedded = parse_json(content.metadata[_EMBEDDED].encode("utf-8", "replace"), f"{what}: metadata '{_EMBEDDED}'")
    _check_config(embedded, _KEYS, what)
    _check_tensor_list(embedded, content.tensors, what)
    outside = {key: value for key, value in config.items() if key != "sha256"}
    if config["sha256"] == content.sha256:
        if outside != embedded:
            changed = ", ".join(key for key in sorted(_KEYS) if outside[key] != embedded[key])
            where = f"file {path_text(folder / CONFIG_FILE)}"
            raise GeneFileError(f"{where}: expected the config that is inside {TENSOR_FILE}, got another {changed}")
        return embedded
    if _content_digest(embedded, content.tensors) != embedded["content_sha256"]:
        raise GeneFileError(f"{what}: its content does not match its sha256 (damaged)")
    warnings.warn(
        f"{what} is whole but newer than {CONFIG_FILE}: a save was interrupted; it is used, save again to repair",
        stacklevel=4,
    )
    return embedded


def pack(stored: Mapping[str, Tensor], method: dict[str, Any], host: dict[str, Any]) -> dict[str, bytes]:
    """Return the content of both files, in the order in which they are to be replaced.

    Raises:
        ArgumentError: a config holds other than JSON values, or a name is not allowed.
        DTypeError: a tensor has a dtype that is not stored.
        TooLargeError: names and configs exceed the limit for a header.
    """
    plain = {
        "format_version": FORMAT_VERSION,
        "pylearngene_version": _own_version(),
        "method": method,
        "host": host,
        "tensors": _tensor_list(stored),
    }
    try:
        # one way through JSON first: the digest must not depend on tuples or on the type of keys
        config = parse_json(json.dumps(plain, allow_nan=False).encode(), "config")
    except (TypeError, ValueError, RecursionError) as error:
        reason = shown(str(error))[1:-1]
        raise ArgumentError(f"method, host: expected configs of JSON values, got: {reason}") from error
    config["content_sha256"] = _content_digest(config, stored)
    data = save_tensors(stored, {_EMBEDDED: _canonical(config).decode()})
    config["sha256"] = hashlib.sha256(data).hexdigest()
    return {TENSOR_FILE: data, CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def unpack(folder: Path, max_bytes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files and return the config to go by and the tensors under their stored names.

    Raises:
        GeneFileError: a file is missing or damaged, of a newer format, or has missing or unknown keys.
        TooLargeError: a file exceeds its limit.
    """
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not os.path.lexists(folder / name)]
    if missing:
        raise GeneFileError(f"folder {path_text(folder)}: expected a gene folder, missing: {', '.join(missing)}")
    outside = read_json(folder / CONFIG_FILE)
    _check_config(outside, _KEYS | {"sha256"}, f"file {path_text(folder / CONFIG_FILE)}")
    content = load_tensor_file(folder / TENSOR_FILE, max_bytes=max_bytes)
    return _agreed_config(outside, content, folder), content.tensors
