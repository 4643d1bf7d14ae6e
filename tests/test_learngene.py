# SPDX-License-Identifier: Apache-2.0
"""`Learngene` as an object: fields, descend, round trip through a folder, overwriting and saves that are killed.

Folders that are damaged or hostile are in `test_gene_folder.py`, the Hub in `test_hub.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gene_samples import CONFIG, TENSORS, Stub, host, learngene, same
from torch import nn

from pylearngene.errors import ArgumentError, DTypeError, ShapeError, WriteError
from pylearngene.files import load_tensor_file
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


def test_round_trip(folder: Path) -> None:
    before, after = learngene(), Learngene.from_pretrained(folder)
    assert same(before, after)
    assert after.method == Stub()
    assert after.host == host(config={"labels": {"0": "cat", "10": "dog", "2": "cow"}, "sizes": [1, 2]})
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, CONFIG]
    assert before.num_parameters == after.num_parameters == 2 * 24 + 2 * 6 + 4 + 12 + 1 + 24
    assert repr(after) == "Learngene(stub, 4 genes, 101 parameters, host own of depth 12)"


def test_config_is_readable_and_stored_twice(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    assert config["format_version"] == 1
    assert config["method"] == {"name": "stub", "rate": 0.5, "table": [[1, 2], [3, 4]]}
    assert config["host"]["layers"] == [["attn.qkv", "linear"], ["norm1", "layer_norm"]]
    assert config["tensors"][0] == {"name": "coeffs.attn.qkv", "shape": [12, 2], "dtype": "float16"}
    assert [item["name"] for item in config["tensors"][1:3]] == ["genes.attn.qkv.bias.0", "genes.attn.qkv.bias.1"]
    content = load_tensor_file(folder / TENSORS)
    assert config.pop("sha256") == content.sha256
    assert json.loads(content.metadata["gene_config"]) == config
    assert content.metadata["format"] == "pt"


def test_equal_content_gives_equal_bytes(folder: Path, tmp_path: Path) -> None:
    again = learngene()
    again.genes = dict(reversed(again.genes.items()))
    again.save_pretrained(tmp_path / "again")
    Learngene.from_pretrained(folder).save_pretrained(tmp_path / "third")
    for name in (TENSORS, CONFIG):
        assert len({(tmp_path / place / name).read_bytes() for place in ("genes", "again", "third")}) == 1


def test_parameters_and_shared_tensors_are_stored_as_values(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4))
    lg = learngene(genes={"a.weight.0": weight[0], "a.weight.1": weight[1].t(), "b.weight.0": weight[0]})
    lg.save_pretrained(tmp_path / "genes")
    back = Learngene.from_pretrained(tmp_path / "genes")
    assert torch.equal(back.genes["a.weight.1"], weight[1].t())
    assert torch.equal(back.genes["b.weight.0"], weight[0])
    assert not any(tensor.requires_grad for tensor in back.genes.values())


def test_wrong_fields() -> None:
    with pytest.raises(ArgumentError, match="host: expected a HostSpec, got 'vit'"):
        learngene(host="vit")
    with pytest.raises(ArgumentError, match="genes: expected a dict of tensors by name, got 'list'"):
        learngene(genes=[torch.ones(1)])
    with pytest.raises(ArgumentError, match=r"tensors: expected names of A-Z a-z 0-9 _ . - /, got 'a b'"):
        learngene(tensors={"a b": torch.ones(1)})
    with pytest.raises(ArgumentError, match=r"genes\['a'\]: expected a tensor, got 'float'"):
        learngene(genes={"a": 1.0})
    with pytest.raises(ShapeError, match=r"coeffs\['attn.qkv'\]: expected a table \[L, K\], got shape \[2\]"):
        learngene(coeffs={"attn.qkv": torch.ones(2)})


def test_registering_methods() -> None:
    register_method("stub", Stub.from_config)
    with pytest.raises(ArgumentError, match="name: expected a free method name, 'stub' is registered already"):
        register_method("stub", lambda config: Stub())
    with pytest.raises(ArgumentError, match="name: expected letters, digits, _ and -, got 'a/b'"):
        register_method("a/b", Stub.from_config)


def test_descend_hands_over_and_checks() -> None:
    lg = learngene()
    model = nn.Identity()
    asked = {
        "depth": 3,
        "model": model,
        "backed": False,
        "num_classes": 0,
        "heads": 2,
        "width": 8,
        "dtype": torch.float16,
        "device": "cpu",
    }
    assert lg.descend(**asked).asked == (lg, asked)
    assert lg.descend().asked[1]["depth"] is None
    for name in ("depth", "heads", "width"):
        for value in (0, -1, 2.0, True):
            with pytest.raises(ArgumentError, match=f"{name}: expected an integer of at least 1, got {value}"):
                lg.descend(**{name: value})
    with pytest.raises(ArgumentError, match="num_classes: expected an integer >= 0, got -1"):
        lg.descend(num_classes=-1)
    with pytest.raises(ArgumentError, match="model: expected a module, got 'str'"):
        lg.descend(model="vit")
    with pytest.raises(DTypeError, match=r"dtype: expected a floating torch.dtype, got torch.int32"):
        lg.descend(dtype=torch.int32)


def test_overwriting(folder: Path) -> None:
    with pytest.raises(
        WriteError, match=r"overwrite: folder .* holds gene.safetensors, gene_config.json; overwrite=True"
    ):
        learngene(1).save_pretrained(folder)
    assert same(Learngene.from_pretrained(folder), learngene(0))
    learngene(1).save_pretrained(folder, overwrite=True)
    assert same(Learngene.from_pretrained(folder), learngene(1))


def test_saving_over_what_was_loaded(folder: Path) -> None:
    lg = Learngene.from_pretrained(folder)
    lg.save_pretrained(folder, overwrite=True)
    assert same(Learngene.from_pretrained(folder), learngene())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="method, host: expected configs of JSON values, got: Object of type set"):
        learngene(host=host(config={"a": {1}})).save_pretrained(tmp_path / "x")
    with pytest.raises(ArgumentError, match="method, host: expected configs of JSON values"):
        learngene(host=host(config={"a": float("nan")})).save_pretrained(tmp_path / "x")
    with pytest.raises(ArgumentError, match="key '1' appears twice"):
        learngene(host=host(config={"1": 0, 1: 0})).save_pretrained(tmp_path / "x")
    with pytest.raises(DTypeError, match=r"tensors\['tensors.x'\]: expected one of"):
        learngene(tensors={"x": torch.ones(1, dtype=torch.complex64)}).save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_overwrite_is_recovered(folder: Path, tmp_path: Path) -> None:
    learngene(1).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / TENSORS).replace(folder / TENSORS)
    with pytest.warns(
        UserWarning, match="gene.safetensors' is whole but newer than gene_config.json: a save was inter"
    ):
        back = Learngene.from_pretrained(folder)
    assert same(back, learngene(1))
    back.save_pretrained(folder, overwrite=True)
    assert same(Learngene.from_pretrained(folder), learngene(1))


KILLS = """
import os, random, signal, sys, time, types, warnings
from pathlib import Path
import torch
from pylearngene.learngene import HostSpec, Learngene, register_method

torch.set_num_threads(1)
method = types.SimpleNamespace(name="stub", to_config=dict)
register_method("stub", lambda config: method)
host = HostSpec("own", {}, "blocks", 2, ())
learngenes = [Learngene({"w": torch.full((300, 400), float(i))}, {}, method, host) for i in (1, 2)]
root = Path(sys.argv[1])
learngenes[0].save_pretrained(root / "kept")
rng, found = random.Random(0), []

def check(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = Learngene.from_pretrained(folder).genes["w"].unique().tolist()
    assert values in ([1.0], [2.0]), values
    return values[0] + 0.5 * len(caught)

for kill in range(10):
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            learngenes[step % 2].save_pretrained(root / "kept", overwrite=True)
            learngenes[step % 2].save_pretrained(root / f"new-{kill}-{step}")
    time.sleep(rng.uniform(0.02, 0.3))
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found.append(check(root / "kept"))
    for folder in root.glob("new-*"):
        if ".partial-" not in folder.name:
            check(folder)
made = [path for path in root.glob("new-*") if ".partial-" not in path.name]
learngenes[0].save_pretrained(root / "kept", overwrite=True)
assert check(root / "kept") == 1.0
assert sorted(os.listdir(root / "kept")) == ["gene.safetensors", "gene_config.json"]
print(len(made), found)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) >= 1
