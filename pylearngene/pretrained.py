# SPDX-License-Identifier: Apache-2.0
"""What `save_pretrained` and `push_to_hub` do on a gene-backed model of transformers: they write and upload its genes.

A folder so written is a gene folder, and a checkpoint that the Trainer of transformers resumes from. transformers is
not imported; reading a gene folder is `Learngene.from_pretrained`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pylearngene.errors import ArgumentError
from pylearngene.files import save_tensors, write_folder
from pylearngene.networks import extract
from pylearngene.nn._pass import plain_class, replace_methods

_BASE = ("transformers.modeling_utils", "PreTrainedModel")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# transformers takes this setting for the name of the weight file, finds that it is none, and shows it.
_NOTICE = (
    "this is a learngene, which plain transformers cannot load; use pylearngene.Learngene.from_pretrained(folder)"
    ".descend(), or pylearngene.bake(net).save_pretrained(folder) to write a plain model"
)
_EXPECTED: dict[str, Any] = {
    "safe_serialization": True,
    "variant": None,
    "push_to_hub": False,
    "distributed_checkpoint": False,
    "create_pr": False,
}
_WITHOUT_EFFECT = {
    "max_shard_size", "save_peft_format", "save_original_format", "save_function", "save_jinja_files", "token",
    "use_temp_dir", "commit_description", "tags",
}  # fmt: skip


def save_pretrained(
    net: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write a gene-backed model of transformers into a folder, whole or not at all.

    `gene.safetensors` and `gene_config.json` are the learngene: `Learngene.from_pretrained(folder).descend()` gives the
    network back. `model.safetensors` is the network's state dict, from which the Trainer resumes. `config.json` is the
    model's configuration, with a notice that plain transformers shows where it is asked to load the folder.
    A model whose own constructor makes its gene bank is saved as its class does it.

    Args:
        net: the model; as a method, `net.save_pretrained(folder)`.
        save_directory: the folder; files of these names in it are replaced, others left alone.
        is_main_process: False writes nothing.
        state_dict: tensors to write in place of the network's own, by the same keys.
        **options: those of transformers. What changes the form of files may only have the value that is written here:
            `safe_serialization=True`, `variant=None`, `push_to_hub=False`, `distributed_checkpoint=False`; the size of
            shards, PEFT and tokens are passed over.

    Raises:
        ArgumentError: an option has another value or is unknown, or `state_dict` is of another network.
        NonFiniteError: a tensor holds NaN or Inf.
        WriteError: the folder cannot be written.

    Example:
        >>> net = plg.auxiliary(transformers.BertModel(config), plg.methods.TLEG())  # doctest: +SKIP
        >>> net.save_pretrained("genes")  # doctest: +SKIP
        >>> same = plg.Learngene.from_pretrained("genes").descend()  # doctest: +SKIP
    """
    if net.gene_bank.host is None:
        _plain(net).save_pretrained(net, save_directory, is_main_process, state_dict, **options)
        return
    _check_options(options)
    if is_main_process:
        # the caller's name of the folder may be a link; files in it may not
        write_folder(os.path.realpath(save_directory), _files(net, state_dict), overwrite=True)


def push_to_hub(
    net: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Any:
    """Upload the learngene of a gene-backed model of transformers, with a card that says how to load it.

    Args:
        net: the model; as a method, `net.push_to_hub("owner/name")`.
        repo_id: `owner/name`; made if it does not exist.
        private: visibility of a new repository; None takes the default of the account.
        revision: branch to upload to.
        commit_message: message of the commit.
        token: access token, or None for the stored login.
        **options: those of transformers, as in `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        ArgumentError: `repo_id` is not of the form `owner/name`, or an option is refused.
        NonFiniteError: a tensor holds NaN or Inf.
        WriteError: huggingface_hub is missing, or the Hub cannot be reached or refuses.
    """
    named: dict[str, Any] = {"private": private, "revision": revision, "commit_message": commit_message, "token": token}
    if net.gene_bank.host is None:
        return _plain(net).push_to_hub(net, repo_id, **named, **options)
    _check_options(options)
    return extract(net).push_to_hub(repo_id, **named)


def saves_genes(net: nn.Module) -> bool:
    """Whether `net.save_pretrained` writes a gene folder."""
    bank = getattr(net, "gene_bank", None)
    return getattr(type(net), "save_pretrained", None) is save_pretrained and getattr(bank, "host", None) is not None


def _plain(net: nn.Module) -> Any:
    """The class whose methods these replace."""
    return plain_class(net)


def _files(net: nn.Module, state: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Content of all files, in the order in which they are to be replaced."""
    if state is not None:
        net = copy.deepcopy(net)
        try:
            net.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ArgumentError(f"state_dict: expected the tensors of the network, got others ({error})") from error
    config: Any = net.config
    settings = json.loads(config.to_json_string())
    settings |= {"architectures": [type(net).__name__], "transformers_weights": _NOTICE}
    tensors = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    return {
        **extract(net).to_files(),
        WEIGHTS: save_tensors(tensors),
        CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode(),
    }


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _EXPECTED and value != _EXPECTED[name]:
            cure = "; `net.push_to_hub` uploads" if name == "push_to_hub" else ""
            raise ArgumentError(f"{name}: expected {_EXPECTED[name]} for a gene-backed model, got {value!r}{cure}")
        if name not in _EXPECTED and name not in _WITHOUT_EFFECT:
            known = ", ".join(sorted([*_EXPECTED, *_WITHOUT_EFFECT]))
            raise ArgumentError(f"{name}: expected an option of transformers ({known}), got an unknown one")


def _is_transformers(plain: type[nn.Module]) -> bool:
    """Whether a class derives from the base of transformers' models, found without importing it."""
    return any((kind.__module__, kind.__name__) == _BASE for kind in plain.__mro__)


replace_methods(_is_transformers, {"save_pretrained": save_pretrained, "push_to_hub": push_to_hub})
