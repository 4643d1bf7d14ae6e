# SPDX-License-Identifier: Apache-2.0
"""Tables of tuned launches: where they are looked for, what is refused, and that they change what is launched.

Who makes them is tested in `test_tuning`.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pylearngene as plg
from pylearngene import _backends
from pylearngene.errors import GeneFileError, TooLargeError

pytest.importorskip("triton")
launch: Any = importlib.import_module("pylearngene.triton_kernels._launch")
launchers: Any = importlib.import_module("pylearngene.triton_kernels.expansion")
rows: Any = importlib.import_module("pylearngene.triton_kernels._row")
table: Any = importlib.import_module("pylearngene.triton_kernels._table")
tuned: Any = importlib.import_module("pylearngene.triton_kernels._tuned")
tuned_table: Any = importlib.import_module("pylearngene.triton_kernels._tuned_table")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
GPU = ("sm_90", "NVIDIA H200", "3.6.0")
ENTRY = {
    "kernel": "fused", "size": 512, "genes": 2, "itemsize": 2, "regular": True,
    "tile": [128, 64, 32], "warps": 8, "stages": 3, "irregular": False, "programs": 1, "persistent": True,
    "stay": False, "registers": None, "microseconds": 12.5, "library": 14.0,
}  # fmt: skip
TABLE = {"format": 1, "pylearngene": plg.__version__, "triton": "3.6.0", "chip": "sm_90", "device": "NVIDIA H200"}


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No table is known, and caches are empty, before and after each test."""
    for name in ("PYLEARNGENE_LAUNCHES", "PYLEARNGENE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _forget()
    yield
    _forget()


def _forget() -> None:
    tuned._in_use.clear()
    tuned._rows.clear()
    tuned._read_once.cache_clear()
    launch.chip.cache_clear()
    table.install({})


def write(path: Path, *entries: Any, **head: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**TABLE, "launches": [{**ENTRY, **entry} for entry in entries], **head}))
    return path


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = [
        tuned_table.Launch(
            tuned_table.Bucket("fused", 16, 2, 2, True),
            rows.Row("fused", ("sm_90",), (64, 16, 64), 4, 1, programs=4, stay=True, registers=255), 3.25, 4.5
        ),
        tuned_table.Launch(
            tuned_table.Bucket("synthesize", 16, 12, 4, False),
            rows.Row("synthesize", ("sm_90",), (32, 128), 4, 1, irregular=True), 0.125, 0.125
        ),
    ]  # fmt: skip
    path = tmp_path / "t.json"
    path.write_text(json.dumps(tuned_table.table_of(made, *GPU)))
    assert list(tuned_table.read(path, "sm_90", "3.6.0")) == made
    text = json.loads(path.read_text())
    assert {name: text[name] for name in TABLE} == TABLE
    assert set(text["launches"][0]) == set(ENTRY)


def test_every_row_of_the_library_can_stand_in_a_table() -> None:
    """What tuning may choose, reading must not refuse."""
    for row in table.ROWS:
        if row.kernel not in tuned_table.KERNELS:
            continue
        for chip in row.chips:
            bucket = tuned_table.Bucket(row.kernel, 64, 1, 2, not row.irregular)
            made = tuned_table.table_of([tuned_table.Launch(bucket, row, 1.0, 1.0)], chip, "any", "3.6.0")
            (read,) = tuned_table.parse(json.loads(json.dumps(made)), chip, "3.6.0", "file")
            launched = ("tile", "warps", "stages", "irregular", "programs", "persistent", "stay", "registers")
            assert all(getattr(read.row, name) == getattr(row, name) for name in launched)


BROKEN = {
    "kernel": (
        {"kernel": "flash"},
        "kernel: expected one of fused, gene_gradients, synthesize, accumulate, got 'flash'",
    ),
    "size": ({"size": 500}, "size: expected 512, the bucket that it is in, got 500"),
    "size 0": ({"size": 0}, "size: expected 1 to 1099511627776, got 0"),
    "genes": ({"genes": 65}, "genes: expected 1 to 64, got 65"),
    "genes true": ({"genes": True}, "genes: expected 1 to 64, got True"),
    "itemsize": ({"itemsize": 3}, "itemsize: expected 2, 4 or 8, got 3"),
    "regular": ({"regular": 1}, "regular: expected true or false, got 1"),
    "tile": ({"tile": [128, 48, 32]}, r"tile: expected powers of two, got [128, 48, 32]"),
    "tile text": ({"tile": "128"}, "tile: expected powers of two, got '128'"),
    "sides": ({"tile": [128, 64]}, "tile: expected 32..128 x 16..256 x 16..64, got [128, 64]"),
    "bounds": ({"tile": [128, 512, 32]}, "tile: expected 32..128 x 16..256 x 16..64, got [128, 512, 32]"),
    "warps": ({"warps": 3}, "warps: expected 1, 2, 4, 8 or 16, got 3"),
    "warps 4.0": ({"warps": 4.0}, "warps: expected 1, 2, 4, 8 or 16, got 4.0"),
    "stages": ({"stages": 9}, "stages: expected 1 to 8, got 9"),
    "programs": ({"programs": 0}, "programs: expected 1 to 32, got 0"),
    "registers": ({"registers": 300}, "registers: expected null or 24 to 255, got 300"),
    "time": ({"microseconds": -1}, "microseconds: expected 0 to 1099511627776, got -1"),
    "long time": ({"library": 10**400}, "library: expected 0 to 1099511627776, got 1000"),
    "irregular": ({"regular": False}, "irregular: expected true where regular is false, got False"),
    "memory": (
        {"tile": [128, 256, 64], "genes": 8, "stages": 4},
        "tile, stages: expected at most 232448 bytes of shared memory on sm_90, got ",
    ),
    "too many names": ({"seed": 1}, "expected the names genes, irregular, itemsize, kernel, library, microseconds, "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_entries_are_refused(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    path = write(tmp_path / "t.json", {}, change)
    with pytest.raises(GeneFileError) as caught:
        tuned_table.read(path, "sm_90", "3.6.0")
    text = str(caught.value)
    assert text.startswith(f"file '{path}': launches[1]: {message}"), text


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"format": 2}, "format: expected 1, got 2"),
        ({"format": True}, "format: expected 1, got True"),
        ({"pylearngene": "0.0.9"}, f"pylearngene: expected '{plg.__version__}', got '0.0.9'"),
        ({"triton": "3.8.0"}, "triton: expected '3.6.0', got '3.8.0'"),
        ({"chip": "sm_80"}, "chip: expected 'sm_90', got 'sm_80'"),
        ({"device": None}, "device: expected a name, got None"),
        ({"launches": {}}, "launches: expected a list of at most 4096, got {}"),
        ({"launches": [ENTRY] * 4097}, "launches: expected a list of at most 4096, got [{"),
        ({"launches": [3]}, "launches[0]: expected an object, got 3"),
        (
            {"launches": [ENTRY, ENTRY]},
            "launches[1]: expected one entry per bucket, got a second Bucket(kernel='fused'",
        ),
        ({"author": "me"}, "expected the names chip, device, format, launches, pylearngene, triton, got 'author, chip"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, head: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "t.json", **head)
    with pytest.raises(GeneFileError) as caught:
        tuned_table.read(path, "sm_90", "3.6.0")
    text = str(caught.value).removeprefix(f"file '{path}': ")
    assert text.startswith(message), text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file, found nothing there"),
        (b"launch all", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"format": 1, "format": 1}', "key 'format' appears twice"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b"\xff", "expected UTF-8 text"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GeneFileError, match=message):
        tuned_table.read(path, "sm_90", "3.6.0")


def test_tables_are_small(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(b" " * (1 + (1 << 20)))
    with pytest.raises(TooLargeError, match="expected at most 1048576 bytes, got 1048577"):
        tuned_table.read(path, "sm_90", "3.6.0")


def test_names_of_files() -> None:
    assert tuned.file_name(*GPU) == "launches-sm_90-NVIDIA-H200-triton3.6.0.json"
    hostile = tuned.file_name("sm_90", "../../GPU of /x\n", "3.6.0+git1")
    assert hostile == "launches-sm_90-..-..-GPU-of-x-triton3.6.0-git1.json"


def test_where_a_table_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = tuned.file_name(*GPU)
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    assert tuned.find(*GPU) is None
    shipped = write(tmp_path / "shipped" / name)
    assert tuned.find(*GPU) == shipped
    places = {"PYLEARNGENE_CACHE": tmp_path / "own", "XDG_CACHE_HOME": tmp_path / "xdg"}
    home = write(tmp_path / "home" / ".cache" / "pylearngene" / name)
    assert tuned.find(*GPU) == home
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")  # of no effect: only an absolute path is one
    assert tuned.find(*GPU) == home
    monkeypatch.setenv("XDG_CACHE_HOME", str(places["XDG_CACHE_HOME"]))
    assert tuned.find(*GPU) == shipped
    xdg = write(places["XDG_CACHE_HOME"] / "pylearngene" / name)
    assert tuned.find(*GPU) == xdg
    monkeypatch.setenv("PYLEARNGENE_CACHE", str(places["PYLEARNGENE_CACHE"]))
    own = write(places["PYLEARNGENE_CACHE"] / name)
    assert tuned.find(*GPU) == own
    monkeypatch.setenv("PYLEARNGENE_LAUNCHES", "/there/t.json")
    assert tuned.find(*GPU) == Path("/there/t.json")
    monkeypatch.setenv("PYLEARNGENE_LAUNCHES", "off")
    assert tuned.find(*GPU) is None


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert tuned.cache_folder() is None
    assert tuned.find(*GPU) is None


def test_the_interpreter_takes_a_table_only_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = ("interpreter", "interpreter", "3.6.0")
    monkeypatch.setenv("PYLEARNGENE_CACHE", str(tmp_path))
    path = write(tmp_path / tuned.file_name(*place), chip="interpreter")
    assert tuned.find(*place) is None
    monkeypatch.setenv("PYLEARNGENE_LAUNCHES", str(path))
    assert tuned.find(*place) == path


def test_a_table_changes_its_buckets_and_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = {
        "tuned": ("fused", "sm_90", 257, 2, 2, False, True),
        "largest": ("fused", "sm_90", 512, 2, 2, False, True),
        "more tokens": ("fused", "sm_90", 513, 2, 2, False, True),
        "fewer tokens": ("fused", "sm_90", 256, 2, 2, False, True),
        "genes": ("fused", "sm_90", 512, 1, 2, False, True),
        "itemsize": ("fused", "sm_90", 512, 1, 4, False, True),
        "activation": ("fused", "sm_90", 512, 2, 2, True, True),
        "irregular": ("fused", "sm_90", 512, 2, 2, False, False),
        "chip": ("fused", "sm_80", 512, 2, 2, False, True),
        "kernel": ("gene_gradients", "sm_90", 512, 2, 2, False, True),
    }
    before = {name: table.row_for(*call) for name, call in calls.items()}
    monkeypatch.setenv("PYLEARNGENE_LAUNCHES", str(write(tmp_path / "t.json", {})))
    tuned.install(*GPU)
    after = {name: table.row_for(*call) for name, call in calls.items()}
    changed = {name for name in calls if before[name] != after[name]}
    assert changed == {"tuned", "largest"}
    assert (after["tuned"].tile, after["tuned"].warps, after["tuned"].persistent) == ((128, 64, 32), 8, True)
    assert tuned.in_use("sm_90") == tmp_path / "t.json"
    assert tuned.in_use("sm_80") is None


def test_chips_of_one_machine_keep_their_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYLEARNGENE_CACHE", str(tmp_path))
    write(tmp_path / tuned.file_name(*GPU), {})
    write(tmp_path / tuned.file_name("sm_80", "A100", "3.6.0"), {"tile": [64, 64, 32]}, chip="sm_80", device="A100")
    for chip, device in (("sm_90", "NVIDIA H200"), ("sm_80", "A100"), ("sm_120", "B")):
        tuned.install(chip, device, "3.6.0")
    tiles = {chip: table.row_for("fused", chip, 512, 2, 2, False, True).tile for chip in ("sm_90", "sm_80")}
    assert tiles == {"sm_90": (128, 64, 32), "sm_80": (64, 64, 32)}


def test_a_table_of_no_use_is_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {}, {"size": 256, "warps": 3})
    monkeypatch.setenv("PYLEARNGENE_LAUNCHES", str(path))
    before = table.row_for("fused", "sm_90", 512, 2, 2, False, True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tuned.install(*GPU)
        tuned.install(*GPU)
    (warning,) = seen
    assert str(warning.message) == (
        f"PYLEARNGENE_LAUNCHES: tuned launches are not used: file '{path}': launches[1]: warps: "
        "expected 1, 2, 4, 8 or 16, got 3; the library's own are"
    )
    assert table.row_for("fused", "sm_90", 512, 2, 2, False, True) == before
    assert tuned.in_use("sm_90") is None


class Programs:
    """Stands before a kernel and notes how many programs it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.counts = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.counts.append(grid[0])
        return self.kernel[grid]  # type: ignore[no-any-return]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is the interpreter's table that is asked")
def test_what_is_launched_is_the_tuned_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """32 x 64 tokens are one tile of the library's row and four of the tuned one; the table is read once."""
    genes = [torch.randn(32, 32) for _ in range(2)]
    x, coeffs = torch.randn(64, 32), torch.tensor([1.0, 0.5])
    entry = {"size": 64, "itemsize": 4, "tile": [32, 16, 32], "warps": 4, "stages": 1, "irregular": True}
    path = write(
        tmp_path / "t.json", {**entry, "persistent": False}, chip="interpreter", triton=launch.triton.__version__
    )
    reads: list[Path] = []
    real, read = launchers._kernels.fused, tuned.read
    monkeypatch.setattr(tuned, "read", lambda path, *rest: reads.append(path) or read(path, *rest))

    def programs(setting: str) -> list[int]:
        _forget()
        monkeypatch.setenv("PYLEARNGENE_LAUNCHES", setting)
        spy = Programs(real)
        monkeypatch.setattr(launchers._kernels, "fused", spy)
        for _ in range(3):
            y = torch.empty(64, 32)
            launchers.product(y, x, genes, coeffs)
            torch.testing.assert_close(y, x @ (genes[0] + 0.5 * genes[1]).t())
        return spy.counts

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert programs("off") == [1, 1, 1]
        assert programs(str(path)) == [4, 4, 4]
    assert reads == [path]


def test_backends_say_which_launches_a_gpu_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        _forget()
        (report,) = [report for report in plg.backends() if (report.op, report.device) == ("expansion", "cuda")]
        return report.reason

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(_backends, "_why_no_triton_on", lambda device: "")
    monkeypatch.setattr(_backends, "_why_no_cuda_on", lambda device: "there are none here")
    for name, value in (
        ("is_available", True), ("current_device", 0), ("get_device_capability", (9, 0)), ("get_device_name", GPU[1])
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    assert reason().startswith("Triton kernels on NVIDIA H200; tiles and thresholds are modelled, not tuned")
    version = launch.triton.__version__
    monkeypatch.setenv("PYLEARNGENE_CACHE", str(tmp_path))
    path = write(tmp_path / tuned.file_name("sm_90", GPU[1], version), {}, triton=version)
    assert reason().startswith(f"Triton kernels on NVIDIA H200; launches tuned here: {path}")
    assert table.row_for("fused", "sm_90", 512, 2, 2, False, True).tile == (128, 64, 32)
