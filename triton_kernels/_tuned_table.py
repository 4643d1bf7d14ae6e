# SPDX-License-Identifier: Apache-2.0
"""What a table of tuned launches is: buckets and their launches, as JSON that is checked name by name.

Tiles, warps and stages stay within what the library's own rows have, shared memory within the chip's. Where tables lie
is in `_tuned`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from pylearngene.triton_kernels import _table
from pylearngene.triton_kernels._row import CHIPS, SHARED_BYTES, Row

from pylearngene._version import __version__
from pylearngene.errors import GeneFileError
from pylearngene.files.reading import path_text, read_json, shown

FORMAT = 1
#: Kernels that are tuned.
KERNELS = ("fused", "gene_gradients", "synthesize", "accumulate")
MOST_BYTES, MOST_LAUNCHES = 1 << 20, 4096
_MOST_GENES, _MOST_SIZE = 64, 1 << 40
_HEAD = ("format", "pylearngene", "triton", "chip", "device", "launches")


@dataclass(frozen=True)
class Bucket:
    """The calls that one entry of a table is for.

    Attributes:
        kernel: its name.
        size: what the kernel's rows are chosen by, rounded as the launch table rounds it.
        genes: K.
        itemsize: bytes of an element of a gene.
        regular: whether the call can load 16 bytes at a time.
    """

    kernel: str
    size: int
    genes: int
    itemsize: int
    regular: bool

    def key(self, chip: str) -> _table.Key:
        """Where the launch table looks for it."""
        return _table.bucket_key(self.kernel, chip, self.size, self.genes, self.itemsize, False, self.regular)

    def rounded(self) -> Bucket:
        """The bucket that a call of any size falls into."""
        return replace(self, size=self.key("")[2])


@dataclass(frozen=True)
class Launch:
    """One entry: the launch of a bucket, and what was measured when it was tuned.

    Attributes:
        bucket: for which calls.
        row: the launch.
        microseconds: the launch's median.
        library: the same for the launch that the library would have chosen.
    """

    bucket: Bucket
    row: Row
    microseconds: float
    library: float


def read(path: Path, chip: str, triton: str) -> tuple[Launch, ...]:
    """Read and check a table.

    Raises:
        GeneFileError: it is no table, one of another chip or version, or an entry is wrong; the message names it.
        TooLargeError: it is larger than 1 MiB.
    """
    return parse(read_json(path, max_bytes=MOST_BYTES), chip, triton, f"file {path_text(path)}")


def parse(table: Mapping[str, Any], chip: str, triton: str, what: str) -> tuple[Launch, ...]:
    """The launches of a table; `what` starts every message."""
    _names(table, _HEAD, what)
    wanted = {"format": FORMAT, "pylearngene": __version__, "triton": triton, "chip": chip}
    for name, value in wanted.items():
        if table[name] != value or isinstance(table[name], bool):
            _refuse(f"{what}: {name}", shown(value), table[name])
    if not isinstance(table["device"], str):
        _refuse(f"{what}: device", "a name", table["device"])
    entries = table["launches"]
    if not isinstance(entries, list) or len(entries) > MOST_LAUNCHES:
        _refuse(f"{what}: launches", f"a list of at most {MOST_LAUNCHES}", entries)
    found: dict[Bucket, Launch] = {}
    for index, entry in enumerate(entries):
        launch = _entry(entry, chip, f"{what}: launches[{index}]")
        if launch.bucket in found:
            raise GeneFileError(
                f"{what}: launches[{index}]: expected one entry per bucket, got a second {launch.bucket}"
            )
        found[launch.bucket] = launch
    return tuple(found.values())


def table_of(launches: Iterable[Launch], chip: str, device: str, triton: str) -> dict[str, Any]:
    """A table as JSON holds it."""
    return {
        "format": FORMAT,
        "pylearngene": __version__,
        "triton": triton,
        "chip": chip,
        "device": device,
        "launches": [
            {
                **vars(launch.bucket),
                **{name: getattr(launch.row, name) for name in _LAUNCH},
                "microseconds": round(launch.microseconds, 3),
                "library": round(launch.library, 3),
            }
            for launch in launches
        ],
    }


def _entry(entry: Any, chip: str, what: str) -> Launch:
    if not isinstance(entry, dict):
        _refuse(what, "an object", entry)
    _names(entry, tuple(_CHECKS), what)
    for name, (right, expected) in _CHECKS.items():
        if not right(entry[name]):
            _refuse(f"{what}: {name}", expected, entry[name])
    tile, bounds = entry["tile"], _bounds(entry["kernel"])
    if len(tile) != len(bounds) or not all(low <= side <= high for side, (low, high) in zip(tile, bounds, strict=True)):
        _refuse(f"{what}: tile", " x ".join(f"{low}..{high}" for low, high in bounds), tile)
    bucket = Bucket(**{name: entry[name] for name in Bucket.__annotations__})
    if bucket.rounded() != bucket:
        _refuse(f"{what}: size", f"{bucket.rounded().size}, the bucket that it is in", bucket.size)
    row = Row(bucket.kernel, (chip,), tuple(tile), **{name: entry[name] for name in _LAUNCH if name != "tile"})
    if not (row.irregular or bucket.regular):
        _refuse(f"{what}: irregular", "true where regular is false", row.irregular)
    taken = _table.shared_bytes(row, chip, bucket.genes, bucket.itemsize)
    if chip in CHIPS and taken > SHARED_BYTES[chip]:
        _refuse(f"{what}: tile, stages", f"at most {SHARED_BYTES[chip]} bytes of shared memory on {chip}", taken)
    return Launch(bucket, row, float(entry["microseconds"]), float(entry["library"]))


@lru_cache(maxsize=16)
def _bounds(kernel: str) -> list[tuple[int, int]]:
    """The least and the greatest of each side of a kernel's tiles that the library itself knows."""
    tiles = [row.tile for row in _table.ROWS if row.kernel == kernel]
    return [(min(sides), max(sides)) for sides in zip(*tiles, strict=True)]


def _names(found: Mapping[str, Any], expected: tuple[str, ...], what: str) -> None:
    """Refuse a name too many or too few."""
    if set(found) != set(expected):
        _refuse(what, f"the names {', '.join(sorted(expected))}", ", ".join(sorted(found)))


def _refuse(what: str, expected: str, got: Any) -> NoReturn:
    raise GeneFileError(f"{what}: expected {expected}, got {shown(got)}")


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_power(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high and value & (value - 1) == 0


def _is_one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _is_tile(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_power(1, _MOST_SIZE), value))


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MOST_SIZE


_FLAG = (_is_one_of(True, False), "true or false")
_TIME = (_is_time, f"0 to {_MOST_SIZE}")
# Per name of an entry: what it may be, and how to say so.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kernel": (_is_one_of(*KERNELS), f"one of {', '.join(KERNELS)}"),
    "size": (_is_whole(1, _MOST_SIZE), f"1 to {_MOST_SIZE}"),
    "genes": (_is_whole(1, _MOST_GENES), f"1 to {_MOST_GENES}"),
    "itemsize": (_is_one_of(2, 4, 8), "2, 4 or 8"),
    "regular": _FLAG,
    "tile": (_is_tile, "powers of two"),
    "warps": (_is_one_of(1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"),
    "stages": (_is_whole(1, 8), "1 to 8"),
    "irregular": _FLAG,
    "programs": (_is_whole(1, 32), "1 to 32"),
    "persistent": _FLAG,
    "stay": _FLAG,
    "registers": (lambda value: value is None or _is_whole(24, 255)(value), "null or 24 to 255"),
    "microseconds": _TIME,
    "library": _TIME,
}
_LAUNCH = ("tile", "warps", "stages", "irregular", "programs", "persistent", "stay", "registers")
