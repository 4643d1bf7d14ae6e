# SPDX-License-Identifier: Apache-2.0
"""Gene folders on the Hugging Face Hub, with a client made up for the test; nothing here uses the network."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from gene_samples import CONFIG, TENSORS, Stub, learngene, same

from pylearngene.errors import ArgumentError, GeneFileError, WriteError
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


def put_hub(monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(**names))


def test_fetched_from_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        snapshot = tmp_path / "cache" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        for name in (TENSORS, CONFIG):
            (snapshot / name).symlink_to(folder / name)
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    put_hub(monkeypatch, snapshot_download=snapshot_download)
    assert same(Learngene.from_pretrained("someone/genes", revision="v1"), learngene())
    assert asked == [("someone/genes", {"revision": "v1", "allow_patterns": [TENSORS, CONFIG]})]
    # a local folder of that name wins, a path is never looked up
    learngene(1).save_pretrained("someone/genes")
    assert same(Learngene.from_pretrained("someone/genes"), learngene(1))
    for place in (Path("someone/else"), "./someone/else", "a/b/c", "../x", "name"):
        with pytest.raises(GeneFileError, match="expected a folder, found nothing there"):
            Learngene.from_pretrained(place)
    assert len(asked) == 1


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to the Hub\nlong story")

    monkeypatch.chdir(tmp_path)
    put_hub(monkeypatch, snapshot_download=unreachable, HfApi=unreachable)
    message = "folder 'a/b': found nothing there, and nothing on the Hub: ConnectionError: no route to the Hub$"
    with pytest.raises(GeneFileError, match=message):
        Learngene.from_pretrained("a/b")
    with pytest.raises(WriteError, match="push_to_hub: repository 'a/b' was not written: ConnectionError: no route"):
        learngene().push_to_hub("a/b")
    with pytest.raises(ArgumentError, match="repo_id: expected owner/name, got 'genes'"):
        learngene().push_to_hub("genes")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GeneFileError, match="to look on the Hub, install huggingface_hub"):
        Learngene.from_pretrained("a/b")
    with pytest.raises(WriteError, match="push_to_hub: expected the package huggingface_hub, it is not installed"):
        learngene().push_to_hub("a/b")


@pytest.mark.parametrize("has_readme", [False, True])
def test_pushed_to_the_hub(has_readme: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("me/genes", True, True)

        def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
            assert (repo_id, name, revision) == ("me/genes", "README.md", "main")
            return has_readme

        def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
            assert options == {"repo_id": "me/genes", "revision": "main", "commit_message": "first"}
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return types.SimpleNamespace(commit_url="the address")

    put_hub(monkeypatch, HfApi=Api)
    options: dict[str, Any] = {"private": True, "revision": "main", "commit_message": "first", "token": "secret"}
    assert learngene().push_to_hub("me/genes", **options) == "the address"
    assert same(Learngene.from_pretrained(tmp_path), learngene())
    assert (tmp_path / "README.md").exists() != has_readme
    if not has_readme:
        text = (tmp_path / "README.md").read_text()
        for line in (
            "library_name: pylearngene",
            "# me/genes",
            "| `genes.attn.qkv.weight.0` | 6 x 4 | float32 | 96 |",
            "| `tensors.steps` | scalar | int64 | 8 |",
            "Not stated yet: add the licence under which you share these tensors.",
        ):
            assert f"\n{line}\n" in text


def test_the_real_client_takes_these_arguments() -> None:
    hub = pytest.importorskip("huggingface_hub")
    for function, names in (
        (hub.snapshot_download, {"revision", "allow_patterns"}),
        (hub.HfApi.create_repo, {"private", "exist_ok"}),
        (hub.HfApi.file_exists, {"revision"}),
        (hub.HfApi.upload_folder, {"repo_id", "folder_path", "revision", "commit_message"}),
    ):
        assert names <= set(inspect.signature(function).parameters)
