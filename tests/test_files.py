# SPDX-License-Identifier: Apache-2.0
"""Files that lie about themselves, the round trip of tensors, and the proof that nothing read is executed.

Writing is tested in `test_files_writing.py`, gene folders in `test_learngene.py`.
"""

from __future__ import annotations

import ast
import json
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as plain_load

import pylearngene
from pylearngene import files
from pylearngene.errors import (
    ArgumentError,
    DTypeError,
    GeneFileError,
    NonFiniteError,
    TooLargeError,
)
from pylearngene.files import tensors as tensor_module


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A tensor file with this header, given as a JSON value, as text or as bytes."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


ONE = b"\0\0\x80?"
ENTRY = json.dumps(entry())
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "got 0"),
    "seven bytes": (b"1234567", "got 7"),
    "header of 2**63": (packed({}, length=2**63), "header of 9223372036854775808 bytes announced"),
    "header of 2**64-1": (packed({}, length=2**64 - 1), "truncated"),
    "header beyond the file": (packed({"a": entry()}, length=500), "header of 500 bytes announced"),
    "header of zero": (packed(b""), r"starts with '\{', got b''"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.", "no safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "no safetensors file"),
    "truncated data": (packed({"a": entry((2,), (0, 8))}, ONE), r"expected 8 bytes of tensor data, got 4 \(truncated"),
    "trailing byte": (packed({"a": entry()}, ONE + b"x"), r"expected 4 bytes of tensor data, got 5 \(trailing"),
    "trailing without tensors": (packed({}, b"x"), "trailing"),
    "leading space": (packed(" " + json.dumps({"a": entry()}), ONE), "starts with"),
    "no JSON": (packed("{hello"), "not valid JSON"),
    "JSON list": (packed("[]"), "starts with"),
    "text after the object": (packed("{} {}"), "not valid JSON"),
    "not UTF-8": (packed(b'{"a\xff": 1}'), "UTF-8 text, got byte 0xff"),
    "duplicate key": (packed(f'{{"a":{ENTRY},"a":{ENTRY}}}', ONE), "'a' appears twice"),
    "duplicate metadata": (packed('{"__metadata__":{},"__metadata__":{}}'), "appears twice"),
    "duplicate metadata key": (packed('{"__metadata__":{"b":"1","b":"2"}}'), "'b' appears twice"),
    "duplicate field": (packed('{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', ONE), "twice"),
    "nested deeply": (packed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "NaN in JSON": (packed('{"a": NaN}'), "NaN is not a JSON number"),
    "number out of range": (packed('{"a": 1e999}'), "out of range"),
    "number of 5000 digits": (packed('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "unknown dtype": (packed({"a": entry(dtype="F99")}, ONE), "'a': expected a dtype among F64, .* got 'F99'"),
    "dtype not allowed": (packed({"a": entry((4,), dtype="F8_E5M2")}, ONE), "got 'F8_E5M2'"),
    "dtype no text": (packed({"a": entry(dtype=["F32"])}, ONE), "expected a dtype"),
    "shape against size": (packed({"a": entry((2,))}, ONE), "needs 8 bytes"),
    "negative offset": (packed({"a": entry((1,), (-4, 0))}), "data_offsets"),
    "offsets reversed": (packed({"a": entry((1,), (4, 0))}, ONE), "give -4"),
    "offsets of fractions": (packed({"a": entry((1,), (0.0, 4.0))}, ONE), "data_offsets"),
    "three offsets": (packed({"a": entry((1,), (0, 4, 8))}, ONE), "two data_offsets"),
    "overlap": (packed({"a": entry((2,), (0, 8)), "b": entry((1,), (4, 8))}, ONE * 2), "'b' overlaps"),
    "hole": (packed({"a": entry(), "b": entry((1,), (8, 12))}, ONE * 3), "'b' leaves a hole"),
    "hole at the start": (packed({"a": entry((1,), (4, 8))}, ONE * 2), "'a' leaves a hole"),
    "size overflows": (packed({"a": entry((2**31 - 1,) * 9)}, ONE), "needs"),
    "empty tensor of absurd size": (packed({"a": entry((0, 2**40), (0, 0))}), "sizes up to 2147483647"),
    "negative size": (packed({"a": entry((-1,))}, ONE), "expected a shape"),
    "size True": (packed({"a": entry((True,))}, ONE), "expected a shape"),
    "hundred axes": (packed({"a": entry((1,) * 100)}, ONE), "at most 16 sizes"),
    "escape code in a name": (packed({"a\x1b[2J": entry()}, ONE), r"'a\\x1b\[2J' has characters"),
    "empty name": (packed({"": entry()}, ONE), "has characters or a length"),
    "long name": (packed({"a" * 257: entry()}, ONE), "has characters or a length"),
    "field missing": (packed({"a": {"dtype": "F32", "shape": [1]}}, ONE), "expected dtype, shape and data_offsets"),
    "field too many": (packed({"a": entry(code="x")}, ONE), "expected dtype, shape and data_offsets"),
    "entry no object": (packed({"a": 3}), "expected dtype, shape and data_offsets, got 3"),
    "metadata no object": (packed({"__metadata__": [1]}), "metadata of text by text"),
    "metadata no text": (packed({"__metadata__": {"a": 1}}), "metadata of text by text"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_at_once(case: str, tmp_path: Path) -> None:
    data, message = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(GeneFileError, match=message) as caught:
        files.read_tensors(path)
    assert time.perf_counter() - start < 1
    text = str(caught.value)
    assert "bad.safetensors" in text
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 1500


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(packed(b"{" + b" " * 2**24, length=2**24 + 1))
    with pytest.raises(TooLargeError, match="header of at most 16777216 bytes, got 16777217"):
        files.read_tensors(path)
    path.write_bytes(packed({"a": entry()}, ONE))
    with pytest.raises(TooLargeError, match="header of at most 10 bytes"):
        files.read_tensors(path, max_header=10)
    with pytest.raises(TooLargeError, match="at most 20 bytes"):
        files.read_tensors(path, max_bytes=20)
    assert list(files.read_tensors(path)[0]) == ["a"]
    path.write_bytes(packed({f"t{i}": entry((0,), (0, 0)) for i in range(100_001)}))
    with pytest.raises(TooLargeError, match="at most 100000 tensors, got 100001"):
        files.read_tensors(path)


def test_size_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(TooLargeError, match="at most 17179869184 bytes, got 1099511627776"):
        files.read_tensors(path)


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        cases = [
            ("fifo", "got a FIFO"),
            (".", "got a folder"),
            ("socket", "cannot be opened"),
            ("none", "nothing there"),
        ]
        for path, message in [*cases, ("/dev/zero", "got a device"), ("nul\0", "cannot be opened")]:
            start = time.perf_counter()
            with pytest.raises(GeneFileError, match=message):
                files.read_tensors(path)
            assert time.perf_counter() - start < 1


def test_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(files.save_tensors({"a": torch.ones(100_000)}))
    check = tensor_module._check_header

    def shrink(*args: Any) -> dict[str, str]:
        os.truncate(path, 1000)
        return check(*args)

    monkeypatch.setattr(tensor_module, "_check_header", shrink)
    with pytest.raises(GeneFileError, match="truncated"):
        files.read_tensors(path)


def test_file_that_is_replaced_inside_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(files.save_tensors({"a": torch.ones(100_000)}))
    check = tensor_module._check_header

    def rename(*args: Any) -> dict[str, str]:
        path.write_bytes(files.save_tensors({"b": torch.ones(100_000)}))
        return check(*args)

    monkeypatch.setattr(tensor_module, "_check_header", rename)
    with pytest.raises(GeneFileError, match="changed while it was read"):
        files.read_tensors(path)


def test_random_damage_never_ends_in_another_error(tmp_path: Path) -> None:
    good = files.save_tensors(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, {"k": "v"}
    )
    rng = random.Random(0)
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) - 32)] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            files.read_tensors(path)
        except (GeneFileError, TooLargeError):
            refused += 1
    assert refused > 300


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", tensor_module.DTYPES.values(), ids=files.dtype_name)
def test_round_trip_is_exact_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = {
        "odd": random_bits(dtype, 3, 5),
        "empty": torch.zeros(0, 7, dtype=dtype),
        "scalar": torch.tensor(1, dtype=dtype),
        "turned": random_bits(dtype, 4, 6).t(),
        "view": random_bits(dtype, 3, 4, 4)[1],
    }
    stored["same"] = stored["odd"]
    path = tmp_path / "all.safetensors"
    data = files.save_tensors(stored, {"note": "äöü \x1b"})
    files.write_atomic(path, data)
    back, metadata = files.read_tensors(path)
    assert metadata == {"format": "pt", "note": "äöü \x1b"}
    assert list(back) == sorted(stored)
    for name, tensor in stored.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (back[name], tensor)]
        assert torch.equal(*as_bytes)
        assert torch.equal(plain_load(data)[name].reshape(-1).view(torch.uint8), as_bytes[0])


def test_equal_input_gives_equal_bytes() -> None:
    a, b = torch.ones(3), torch.zeros(2, dtype=torch.float64)
    metadata = {key: key for key in "zyxwabcd"}
    first = files.save_tensors({"a": a, "b": b}, metadata)
    for _ in range(5):
        assert files.save_tensors({"b": b, "a": a}, dict(reversed(metadata.items()))) == first


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ArgumentError, match=r"256 of A-Z a-z 0-9 _ \. - /, got 'a b'"):
        files.save_tensors({"a b": torch.ones(1)})
    with pytest.raises(ArgumentError, match="got '__metadata__'"):
        files.save_tensors({"__metadata__": torch.ones(1)})
    with pytest.raises(ArgumentError, match=r"expected a dense tensor with values, got torch\.sparse_coo"):
        files.save_tensors({"a": torch.eye(2).to_sparse()})
    with pytest.raises(ArgumentError, match="on meta"):
        files.save_tensors({"a": torch.ones(1, device="meta")})
    with pytest.raises(ArgumentError, match="got list"):
        files.save_tensors({"a": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(DTypeError, match=r"tensors\['a'\]: expected one of float64, .*, got complex64"):
        files.save_tensors({"a": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ArgumentError, match="metadata: expected text by text, got 'k': int"):
        files.save_tensors({}, {"k": 1})  # type: ignore[dict-item]
    with pytest.raises(TooLargeError, match="metadata: expected a header of at most"):
        files.save_tensors({}, {"k": "x" * 2**24})


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null]}')
    assert files.read_json(path) == {"a": [1, 2.5, None]}
    for text, message in [
        ("[1]", "a JSON object, got list"),
        ('{"a": Infinity}', "Infinity"),
        ('{"a":1,"a":1}', "twice"),
    ]:
        path.write_text(text)
        with pytest.raises(GeneFileError, match=message):
            files.read_json(path)
    with pytest.raises(TooLargeError, match="at most 3 bytes"):
        files.read_json(path, max_bytes=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_check_finite(dtype: torch.dtype) -> None:
    good = {"x": torch.ones(3, 3, dtype=dtype), "n": torch.ones(2, dtype=torch.int64), "e": torch.ones(0, dtype=dtype)}
    files.check_finite(good, "gene")
    bad = torch.zeros(tensor_module._FINITE_CHUNK + 3, dtype=dtype)
    bad[0], bad[-1], bad[-2] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(NonFiniteError, match=f"gene 'y': expected finite values, got 1 NaN and 2 Inf among {len(bad)}"):
        files.check_finite({**good, "y": bad}, "gene")


def dangerous_calls(source: str) -> list[str]:
    """Names of calls in the source that unpickle, evaluate, or hand text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve")]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
                found.append(name)
            if name.split(".")[-1] in ("load", "loads") and name.split(".")[0] in (
                "torch",
                "pickle",
                "joblib",
                "np",
                "numpy",
            ):
                found.append(name)
            if any(key.arg in ("shell", "allow_pickle", "trust_remote_code") for key in node.keywords):
                found.append(f"{name}(shell or pickle)")
    return found


def test_package_never_unpickles_nor_evaluates() -> None:
    root = Path(pylearngene.__file__).parent
    sources = sorted(root.rglob("*.py"))
    assert len(sources) > 5
    assert {str(path): calls for path in sources if (calls := dangerous_calls(path.read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "yaml.load(f)",
        "r(shell=True)",
    ],
)
def test_search_for_dangerous_calls_finds(line: str) -> None:
    assert dangerous_calls(line)
    assert not dangerous_calls("model.eval(); json.loads(x); safetensors.torch.load(x); files.load_tensor_file(x)")
