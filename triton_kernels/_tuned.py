# SPDX-License-Identifier: Apache-2.0
"""Where launch tables tuned on a user's own GPU lie, and how one reaches the launch table of the library.

A table is read once per device, when a kernel is first launched there; one that is wrong is left out whole, with one
warning. What it must hold is in `_tuned_table`, who measures is `tuning`; nothing here imports Triton or writes a file.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import lru_cache
from pathlib import Path

from pylearngene.triton_kernels import _table
from pylearngene.triton_kernels._row import INTERPRETER, Row
from pylearngene.triton_kernels._tuned_table import Launch, read

from pylearngene.errors import GeneFileError, TooLargeError

#: "off", or the file of a table; unset: the user's table for the device, else one that came with the package.
SETTING = "PYLEARNGENE_LAUNCHES"
#: Tables that come with the package lie here, if there are any.
SHIPPED = Path(__file__).parent / "tables"

_in_use: dict[str, Path] = {}
_rows: dict[_table.Key, Row] = {}


def file_name(chip: str, device: str, triton: str) -> str:
    """What a table of a device and a Triton version is called."""
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-") for word in (device, f"triton{triton}"))
    return "-".join(("launches", chip, *words)) + ".json"


def cache_folder() -> Path | None:
    """Where a user's tables lie; None for a user without a home."""
    if own := os.environ.get("PYLEARNGENE_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # noqa: PTH117  (the standard has other values ignored)
        return Path(shared) / "pylearngene"
    try:
        return Path.home() / ".cache" / "pylearngene"
    except RuntimeError:
        return None


def find(chip: str, device: str, triton: str) -> Path | None:
    """The table that is to be used on a device, if there is one; in the interpreter only one that is named."""
    setting = os.environ.get(SETTING, "")
    if setting:
        return None if setting == "off" else Path(setting)
    folder = cache_folder()
    places = (SHIPPED,) if folder is None else (folder, SHIPPED)
    name = file_name(chip, device, triton)
    if chip == INTERPRETER:
        return None
    # asked without pathlib, which raises where a folder is closed to us
    return next((place / name for place in places if os.path.isfile(place / name)), None)  # noqa: PTH113


def install(chip: str, device: str, triton: str) -> None:
    """Let the launch table know what was tuned for a device; a table that is of no use is left out, with a warning."""
    path = find(chip, device, triton)
    if path is None:
        return
    launches, problem = _read_once(path, chip, triton)
    if problem:
        return
    _in_use[chip] = path
    _rows.update({launch.bucket.key(chip): launch.row for launch in launches})
    _table.install(dict(_rows))


def in_use(chip: str) -> Path | None:
    """The table in use on a chip class, once a kernel was launched there."""
    return _in_use.get(chip)


@lru_cache(maxsize=64)
def _read_once(path: Path, chip: str, triton: str) -> tuple[tuple[Launch, ...], str]:
    """The launches of a table, or why it cannot be used, which is said the first time."""
    try:
        return read(path, chip, triton), ""
    except (GeneFileError, TooLargeError) as error:
        text = f"{SETTING}: tuned launches are not used: {error}; the library's own are"
        warnings.warn(text, stacklevel=2)
        return (), text
