# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` and `push_to_hub` of gene-backed models of transformers: what they write, refuse and upload."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from host_samples import OddNet, hugging_face, images, output
from safetensors.torch import load_file
from torch import nn

import pylearngene as plg
from pylearngene.errors import ArgumentError, NonFiniteError, WriteError
from pylearngene.methods import TLEG, Expansion

pytestmark = pytest.mark.hosts
FILES = {"gene.safetensors", "gene_config.json", "model.safetensors", "config.json"}
NAMES = ["ViTModel", "DeiTForImageClassification"]


def network(name: str = "ViTForImageClassification", learn: bool = False) -> nn.Module:
    method = Expansion(TLEG().coefficients(3), learn=True) if learn else TLEG()
    return plg.auxiliary(hugging_face(name), method).eval()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", NAMES)
def test_the_folder_gives_the_network_back(name: str, learn: bool, tmp_path: Path) -> None:
    net = network(name, learn)
    net.save_pretrained(tmp_path)
    assert content(tmp_path).keys() == FILES
    again = plg.Learngene.from_pretrained(tmp_path).descend().eval()
    assert type(again).__name__ == name
    assert torch.equal(output(again, images()), output(net, images()))
    other = plg.extract(network(name, learn)).descend().eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(output(other, images()), output(net, images()))


def test_a_network_of_another_depth_is_saved_as_it_is(tmp_path: Path) -> None:
    net = plg.set_depth(network(), 5)
    net.save_pretrained(tmp_path / "new")
    again = plg.Learngene.from_pretrained(tmp_path / "new").descend().eval()
    assert torch.equal(output(again, images()), output(net, images()))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["num_hidden_layers"] == 5


def test_equal_networks_give_equal_bytes(tmp_path: Path) -> None:
    net = network()
    for folder in ("a", "b"):
        net.save_pretrained(tmp_path / folder)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("auto", [False, True])
def test_plain_transformers_says_what_the_folder_is(auto: bool, tmp_path: Path) -> None:
    import transformers

    kind = transformers.AutoModelForImageClassification if auto else transformers.ViTForImageClassification
    net = network()
    plg.bake(net).save_pretrained(tmp_path)
    assert torch.isfinite(output(kind.from_pretrained(tmp_path).eval(), images())).all()
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this is a learngene, .* use pylearngene.Learngene.from_pretrained"):
        kind.from_pretrained(tmp_path)


def test_a_given_state_is_written_in_place_of_the_networks_own(tmp_path: Path) -> None:
    net, other = network(learn=True), network(learn=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before = output(net, images())
    net.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    other.save_pretrained(tmp_path / "own")
    assert content(tmp_path / "given") == content(tmp_path / "own")
    assert torch.equal(output(net, images()), before)
    lacking = other.state_dict()
    del lacking["classifier.bias"]
    with pytest.raises(
        ArgumentError, match=r"state_dict: expected the tensors of the network, got others .*\s.*classifier\.bias"
    ):
        net.save_pretrained(tmp_path / "lacking", state_dict=lacking)
    assert not (tmp_path / "lacking").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"safe_serialization": False}, "safe_serialization: expected True for a gene-backed model, got False"),
        ({"variant": "fp16"}, "variant: expected None for a gene-backed model, got 'fp16'"),
        ({"push_to_hub": True}, "push_to_hub: expected False .* got True; `net.push_to_hub` uploads"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint: expected False for a gene-backed model, got True"),
        ({"shard": 1}, r"shard: expected an option of transformers \(.*, max_shard_size, .*\), got an unknown one"),
    ],
)
def test_options_that_would_change_the_files_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        network().save_pretrained(tmp_path, **options)
    assert not content(tmp_path)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path, is_main_process=False, max_shard_size="5GB", safe_serialization=True)
    assert not content(tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    net = network()
    net.save_pretrained(tmp_path)
    before = content(tmp_path)
    with torch.no_grad():
        net.classifier.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"classifier\.bias"):
        net.save_pretrained(tmp_path)
    assert content(tmp_path) == before
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WriteError, match="expected a folder, something else is there"):
        network().save_pretrained(tmp_path / "file")


def test_the_folder_may_be_named_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    network().save_pretrained(os.fspath(tmp_path / "link"))
    assert content(tmp_path / "real").keys() == FILES


def test_the_learngene_is_uploaded_with_its_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: dict[str, Any] = {}

    class HfApi:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            sent.update(repo_id=repo_id, **options)

        def file_exists(self, *_: Any, **__: Any) -> bool:
            return False

        def upload_folder(self, folder_path: str, **options: Any) -> Any:
            sent["files"] = content(Path(folder_path))
            return types.SimpleNamespace(commit_url="https://example.org/commit")

    net = network()
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    address = net.push_to_hub("someone/genes", private=True, token="secret", max_shard_size="5GB", tags=["vit"])
    assert address == "https://example.org/commit"
    assert (sent["repo_id"], sent["private"], sent["token"]) == ("someone/genes", True, "secret")
    files = sent["files"]
    assert files.keys() == {"gene.safetensors", "gene_config.json", "README.md"}
    assert b'plg.Learngene.from_pretrained("someone/genes")' in files.pop("README.md")
    net.save_pretrained(tmp_path)
    assert all(data == (tmp_path / name).read_bytes() for name, data in files.items())
    with pytest.raises(ArgumentError, match="create_pr: expected False for a gene-backed model, got True"):
        net.push_to_hub("someone/genes", create_pr=True)
    with pytest.raises(ArgumentError, match="repo_id: expected owner/name, got 'genes'"):
        net.push_to_hub("genes")


def banked() -> Any:
    """A user's own class of transformers' kind, whose constructor makes the bank."""
    import transformers

    class Config(transformers.PretrainedConfig):
        model_type = "banked"

    class Banked(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            bank = plg.nn.GeneBank()
            self.layers = nn.ModuleList(
                plg.nn.ExpansionLinear(4, 4, bank=bank, name="fc", coeffs=[1.0, 1 / 3]) for _ in range(2)
            )
            bank.attach(self)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Banked, Config


def test_a_class_that_makes_its_own_bank_is_saved_by_its_class(tmp_path: Path) -> None:
    kind, config = banked()
    net, x = kind(config()), torch.ones(2, 4)
    net.save_pretrained(tmp_path)
    assert content(tmp_path).keys() == {"config.json", "model.safetensors"}
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(again(x), net(x))
    low = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(low.layers[1].coeffs, net.layers[1].coeffs)


def test_models_of_other_kinds_keep_their_methods() -> None:
    class Saves(OddNet):
        def save_pretrained(self, folder: str) -> str:
            return folder

    assert plg.auxiliary(Saves(), TLEG()).save_pretrained("here") == "here"
    assert not hasattr(plg.auxiliary(OddNet(), TLEG()), "save_pretrained")
