# SPDX-License-Identifier: Apache-2.0
"""Gene folders that are damaged, of another format, or made by someone hostile: each its own clear error."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gene_samples import CONFIG, TENSORS, Stub, host, learngene

from pylearngene.errors import ArgumentError, GeneFileError, MethodError, NonFiniteError, TooLargeError
from pylearngene.files import load_tensor_file, save_tensors
from pylearngene.learngene import Learngene, register_method


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pylearngene.learngene.gene._METHODS", {})
    register_method("stub", Stub.from_config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "genes"
    learngene().save_pretrained(path)
    return path


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, both: bool = True) -> None:
    """Change the config as a hostile author would: in both files, with all digests made right."""
    content = load_tensor_file(folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    if both:
        config.pop("sha256", None)
        (folder / TENSORS).write_bytes(save_tensors(content.tensors, {"gene_config": json.dumps(config)}))
        sha = load_tensor_file(folder / TENSORS).sha256
        if "sha256" in json.loads((folder / CONFIG).read_text()):
            (folder / CONFIG).write_text(json.dumps({**config, "sha256": sha}))


def put_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors and the list of tensors with them, again with all digests made right."""
    content = load_tensor_file(folder / TENSORS)
    change(content.tensors)
    (folder / TENSORS).write_bytes(save_tensors(content.tensors, content.metadata))
    listed = [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
        for name, tensor in sorted(content.tensors.items())
    ]
    edit(folder, lambda config: config.update(tensors=listed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "keras"}, "host.family: expected one of timm, transformers, own, got 'keras'"),
        ({"config": None}, "host.config: expected a dict, got None"),
        ({"blocks": "a b"}, "host.blocks: expected a module path, got 'a b'"),
        ({"depth": 0}, "host.depth: expected an integer from 1 to 10000, got 0"),
        ({"depth": True}, "host.depth: expected an integer"),
        ({"layers": "ab"}, "host.layers: expected pairs"),
        ({"layers": (("a", "conv"),)}, "host.layers: expected pairs of a module path and one of linear, layer_norm"),
    ],
)
def test_wrong_host(change: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        host(**change)
    edit(
        folder,
        lambda config: config["host"].update(
            {key: list(v) if isinstance(v, tuple) else v for key, v in change.items()}
        ),
    )
    with pytest.raises(GeneFileError, match=f"gene_config.json': {message}"):
        Learngene.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("group", "key", "name"),
    [
        ("genes", "attn.qkv.weight.1", "gene 'attn.qkv.weight.1'"),
        ("coeffs", "attn.qkv", "coefficients of 'attn.qkv'"),
        ("tensors", "head.weight", "tensor 'head.weight'"),
    ],
)
def test_bad_values(value: float, group: str, key: str, name: str, folder: Path, tmp_path: Path) -> None:
    lg = learngene()
    getattr(lg, group)[key][0, :2] = value
    counts = "2 NaN and 0 Inf" if value != value else "0 NaN and 2 Inf"
    message = f"{name}: expected finite values, got {counts} among"
    with pytest.raises(NonFiniteError, match=message):
        lg.descend()
    with pytest.raises(NonFiniteError, match=message):
        lg.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    put_tensors(folder, lambda tensors: tensors.update({f"{group}.{key}": getattr(lg, group)[key]}))
    with pytest.raises(NonFiniteError, match=f"gene.safetensors': {message}") as caught:
        Learngene.from_pretrained(folder)
    assert caught.value.exit_code == 3


def rename(config: dict[str, Any], old: str, new: str) -> None:
    config[new] = config.pop(old)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (
        lambda c: c.update(format_version=2, shiny=1),
        "expected format_version up to 1, got 2: a newer pylearngene",
    ),
    "no number": (lambda c: c.update(format_version="1"), "expected format_version 1, got '1'"),
    "version 0": (lambda c: c.update(format_version=0), "expected format_version 1, got 0"),
    "version null": (lambda c: c.update(format_version=None), "expected format_version 1, got None"),
    "version missing": (lambda c: c.pop("format_version"), r"got missing \['format_version'\]"),
    "missing": (lambda c: c.pop("host"), r"expected the keys content_sha256, .* got missing \['host'\]"),
    "unknown": (lambda c: c.update({"run\x1b": "x"}), r"got unknown \['run\\x1b'\]"),
    "renamed": (lambda c: rename(c, "host", "hosts"), r"got missing \['host'\] and unknown \['hosts'\]"),
    "sha missing": (lambda c: c.pop("sha256"), r"got missing \['sha256'\]"),
    "sha no text": (lambda c: c.update(content_sha256=5), "content_sha256: expected text, got 5"),
    "method no object": (lambda c: c.update(method="stub"), "method: expected a name and its config, got 'stub'"),
    "method without name": (lambda c: c["method"].pop("name"), "method: expected a name"),
    "method unknown": (
        lambda c: c["method"].update(name="os.system"),
        "method 'os.system' is unknown; known are: stub",
    ),
    "method malformed": (lambda c: c["method"].update(x=1), "config of method 'stub' is malformed: expected rate"),
    "host no object": (lambda c: c.update(host=[1]), r"expected a host of key and value, got \[1\]"),
    "host unknown key": (lambda c: c["host"].update(code="x"), r"host: expected the keys .* got unknown \['code'\]"),
    "host missing key": (lambda c: c["host"].pop("depth"), r"got missing \['depth'\]"),
    "host huge": (lambda c: c["host"].update(depth=10**9), "host.depth: expected an integer from 1 to 10000"),
    "tensors no list": (lambda c: c.update(tensors={}), "tensors: expected a list of name, shape and dtype"),
    "tensor extra": (
        lambda c: c["tensors"].pop(),
        "tensors: expected 'nothing' by its config, got {'name': 'tensors.steps'",
    ),
    "tensor missing": (
        lambda c: c["tensors"].append({"name": "x"}),
        "expected {'name': 'x'} by its config, got 'nothing'",
    ),
    "tensor shape": (lambda c: c["tensors"][0].update(shape=[9]), r"'shape': \[9\].* got .*'shape': \[12, 2\]"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_malformed_config(case: str, folder: Path) -> None:
    change, message = CONFIGS[case]
    edit(folder, change)
    with pytest.raises(GeneFileError, match=message) as caught:
        Learngene.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2


def test_malformed_tensors(folder: Path) -> None:
    put_tensors(folder, lambda tensors: tensors.update({"coeffs.attn.qkv": torch.ones(3)}))
    with pytest.raises(GeneFileError, match=r"coeffs\['attn.qkv'\]: expected a table \[L, K\], got shape \[3\]"):
        Learngene.from_pretrained(folder)
    put_tensors(folder, lambda tensors: (tensors.pop("coeffs.attn.qkv"), tensors.update({"code.x": torch.ones(3)})))
    with pytest.raises(
        GeneFileError, match=r"tensor 'code.x': expected a name that starts with genes, tensors, coeffs"
    ):
        Learngene.from_pretrained(folder)


def test_damaged_files(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(
        GeneFileError, match=r"gene.safetensors': expected \d+ bytes of tensor data, got \d+ \(truncated"
    ):
        Learngene.from_pretrained(folder)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    (folder / TENSORS).write_bytes(flipped)
    with pytest.raises(GeneFileError, match=r"its content does not match its sha256 \(damaged\)"):
        Learngene.from_pretrained(folder)
    (folder / TENSORS).write_bytes(save_tensors({"a": torch.ones(1)}))
    with pytest.raises(GeneFileError, match="expected metadata 'gene_config', got none"):
        Learngene.from_pretrained(folder)
    (folder / TENSORS).write_bytes(save_tensors({"a": torch.ones(1)}, {"gene_config": "{"}))
    with pytest.raises(GeneFileError, match="metadata 'gene_config': not valid JSON"):
        Learngene.from_pretrained(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(GeneFileError, match=r"gene_config.json': not valid JSON"):
        Learngene.from_pretrained(folder)
    (folder / CONFIG).write_text(" " * 2**24 + "{}")
    with pytest.raises(TooLargeError, match=r"gene_config.json': expected at most"):
        Learngene.from_pretrained(folder)


def test_config_edited_by_hand(folder: Path) -> None:
    edit(folder, lambda config: config["method"].update(rate=0.1), both=False)
    with pytest.raises(GeneFileError, match=r"expected the config that is inside gene.safetensors, got another method"):
        Learngene.from_pretrained(folder)


def test_missing_parts(folder: Path, tmp_path: Path) -> None:
    (folder / CONFIG).rename(tmp_path / "kept")
    with pytest.raises(GeneFileError, match=r"genes': expected a gene folder, missing: gene_config.json"):
        Learngene.from_pretrained(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(GeneFileError, match=r"missing: gene_config.json, gene.safetensors"):
        Learngene.from_pretrained(folder)
    with pytest.raises(GeneFileError, match="none': expected a folder, found nothing there"):
        Learngene.from_pretrained(tmp_path / "none")
    with pytest.raises(GeneFileError, match="kept': expected a folder, got something else"):
        Learngene.from_pretrained(tmp_path / "kept")


def test_limit_and_given_method(folder: Path) -> None:
    with pytest.raises(TooLargeError, match="expected at most 100 bytes"):
        Learngene.from_pretrained(folder, max_bytes=100)
    assert Learngene.from_pretrained(folder, method=Stub(0.25)).method == Stub(0.25)
    other = types.SimpleNamespace(name="other")
    with pytest.raises(MethodError, match=r"method: expected 'stub' \(as stored in .*\), got 'other'"):
        Learngene.from_pretrained(folder, method=other)  # type: ignore[arg-type]
