# SPDX-License-Identifier: Apache-2.0
"""`Learngene`: the shared tensors of a family of networks, with the method and the host they belong to.

It stores itself, comes back, and hands itself to its method to grow a network. Methods are not here: they enter by
`register_method`, and a stored name that is not registered is never executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pylearngene.errors import ArgumentError, DTypeError, GeneFileError, MethodError, ShapeError
from pylearngene.files import MAX_FILE, check_finite, is_tensor_name, path_text, shown, write_folder
from pylearngene.learngene.folder import CONFIG_FILE, TENSOR_FILE, pack, unpack
from pylearngene.learngene.host import HostSpec, is_count, require
from pylearngene.learngene.hub import card, find_folder, upload

# what the tensors are called in messages, by the attribute that holds them and the prefix of their stored names
_GROUPS = {"genes": "gene", "tensors": "tensor", "coeffs": "coefficients of"}


class Method(Protocol):
    """What a method owes to be stored and to grow networks."""

    @property
    def name(self) -> str:
        """The registered name."""

    def to_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal method: JSON values, without the name."""

    def descend(self, lg: Learngene, /, *args: Any, **kwargs: Any) -> nn.Module:
        """Return a network grown from `lg`; the keywords are those of `Learngene.descend`."""

    def first_genes(self, lg: Learngene, num_genes: int, /) -> Learngene:
        """Return the learngene of the first genes of every weight, or raise where there is no such thing."""


_METHODS: dict[str, Callable[[dict[str, Any]], Method]] = {}


def register_method(name: str, from_config: Callable[[dict[str, Any]], Method]) -> None:
    """Allow gene folders to name this method.

    Args:
        name: letters, digits, `_` and `-`.
        from_config: makes the method from what its `to_config` returned; raises ValueError, TypeError or KeyError
            for anything else.

    Raises:
        ArgumentError: the name has other characters, or is taken by another function.
    """
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9_\-]{1,64}", name, re.ASCII) is None:
        raise ArgumentError(f"name: expected letters, digits, _ and -, got {name!a}")
    if _METHODS.setdefault(name, from_config) != from_config:
        raise ArgumentError(f"name: expected a free method name, '{name}' is registered already")


def _make_method(config: dict[str, Any], given: Method | None, what: str) -> Method:
    settings = dict(config)
    name = settings.pop("name")
    if given is not None:
        if given.name != name:
            raise MethodError(f"method: expected '{shown(name)[1:-1]}' (as stored in {what}), got '{given.name}'")
        return given
    if name not in _METHODS:
        known = ", ".join(sorted(_METHODS)) or "none"
        raise GeneFileError(f"{what}: method {shown(name)} is unknown; known are: {known}")
    try:
        return _METHODS[name](settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GeneFileError(f"{what}: config of method '{name}' is malformed: {shown(str(error))[1:-1]}") from error


@dataclass(repr=False, eq=False)
class Learngene:
    """The tensors that networks of one kind share, with the method that makes weights of them.

    Args:
        genes: tensors by key, for instance "attn.qkv.weight.0" of shape [O, I].
        tensors: everything outside the repeated blocks by the model's own key, for instance "cls_token".
        method: the recipe, an instance of a registered method.
        host: the kind of network.
        coeffs: learned coefficient tables [L, K] by layer path; empty where a rule gives them.

    Attributes:
        prototype: for hosts of family "own", the structure to copy, without block weights; set by `plg.extract`, not
            stored.

    Raises:
        ArgumentError: a field is not of its type, or a name is not allowed.
        ShapeError: a coefficient table is not [L, K].

    Example:
        >>> lg = Learngene.from_pretrained("runs/tleg/learngene")  # doctest: +SKIP
        >>> net = lg.descend(depth=6)  # doctest: +SKIP
    """

    genes: dict[str, Tensor]
    tensors: dict[str, Tensor]
    method: Method
    host: HostSpec
    coeffs: dict[str, Tensor] = field(default_factory=dict)
    prototype: nn.Module | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require(isinstance(self.host, HostSpec), "host", "a HostSpec", self.host)
        for group in _GROUPS:
            stored = getattr(self, group)
            require(isinstance(stored, dict), group, "a dict of tensors by name", type(stored).__name__)
            for name, tensor in stored.items():
                require(is_tensor_name(name), group, "names of A-Z a-z 0-9 _ . - /", name)
                require(isinstance(tensor, Tensor), f"{group}[{name!r}]", "a tensor", type(tensor).__name__)
        for name, table in self.coeffs.items():
            if table.ndim != 2:
                raise ShapeError(f"coeffs[{name!r}]: expected a table [L, K], got shape {list(table.shape)}")

    @property
    def num_parameters(self) -> int:
        """Number of values stored: genes, other tensors and coefficients."""
        return sum(tensor.numel() for tensor in self._stored().values())

    def __repr__(self) -> str:
        """Return one line."""
        return (
            f"Learngene({self.method.name}, {len(self.genes)} genes, {self.num_parameters:,} parameters, "
            f"host {self.host.family} of depth {self.host.depth})"
        )

    def _stored(self) -> dict[str, Tensor]:
        return {f"{group}.{name}": tensor for group in _GROUPS for name, tensor in getattr(self, group).items()}

    def _check_finite(self, where: str = "") -> None:
        for group, word in _GROUPS.items():
            check_finite(getattr(self, group), where + word)

    def to_files(self) -> dict[str, bytes]:
        """Return the content of both files by name, in the order in which they are to be replaced."""
        self._check_finite()
        method = {**self.method.to_config(), "name": self.method.name}
        return pack(self._stored(), method, self.host.to_dict())

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Store everything in a folder, `gene.safetensors` and `gene_config.json`; equal content gives equal bytes.

        Args:
            folder: a new folder appears whole or not at all; missing parents are made.
            overwrite: replace a learngene that is there; at every moment the folder can be read as the old or the new.

        Raises:
            NonFiniteError: a tensor holds NaN or Inf (what cannot be loaded is not written).
            ArgumentError: the config of the method or host holds other than JSON values.
            DTypeError: a tensor has a dtype that is not stored.
            TooLargeError: names and configs exceed the limit for a header.
            WriteError: a learngene is there and `overwrite` is False, or the folder cannot be written.
        """
        write_folder(folder, self.to_files(), overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        *,
        method: Method | None = None,
        revision: str | None = None,
        max_bytes: int = MAX_FILE,
    ) -> Learngene:
        """Read a learngene from a folder, or from the Hugging Face Hub where no such folder exists.

        Nothing stored is executed or unpickled. The sha256 of the tensor file is checked, every value is finite.

        Args:
            folder_or_repo_id: a folder, or `owner/name` on the Hub if huggingface_hub is installed.
            method: use this instance instead of making one from the stored config; its name must be the stored one.
            revision: branch, tag or commit on the Hub.
            max_bytes: largest tensor file accepted.

        Raises:
            GeneFileError: missing, truncated, damaged, of a newer format, with missing or unknown keys, or naming an
                unknown method.
            NonFiniteError: a tensor holds NaN or Inf; the message names it and says how many.
            TooLargeError: a file exceeds its limit.
            MethodError: `method` is not the stored one.
        """
        folder = find_folder(folder_or_repo_id, revision)
        config, stored = unpack(folder, max_bytes)
        where, source = (f"file {path_text(folder / name)}" for name in (CONFIG_FILE, TENSOR_FILE))
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
        for name, tensor in stored.items():
            group, _, key = name.partition(".")
            if group not in groups or not key:
                raise GeneFileError(f"{source}: tensor {name!r}: expected a name that starts with {', '.join(_GROUPS)}")
            groups[group][key] = tensor
        host = HostSpec.from_dict(config["host"], where)
        try:
            result = cls(method=_make_method(config["method"], method, where), host=host, **groups)
        except ShapeError as error:
            raise GeneFileError(f"{where}: {error}") from error
        result._check_finite(f"{source}: ")
        return result

    def descend(
        self,
        depth: int | None = None,
        *,
        model: nn.Module | None = None,
        backed: bool = True,
        num_classes: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> nn.Module:
        """Grow a network by the method of this learngene.

        Args:
            depth: number of blocks; None as in the network it came from.
            model: for hosts of family "own": a model of the wanted size to take the place of.
            backed: True computes with the genes; False gives plain layers, loadable without this library.
            num_classes: size of the head; another than stored makes a new head; 0 for none.
            heads: number of attention heads.
            width: embedding width, where the method can change it.
            dtype: floating dtype of the network.
            device: device of the network.

        Returns:
            A module of the host's kind.

        Raises:
            ArgumentError: `depth`, `heads` or `width` below 1, `num_classes` below 0, `model` no module.
            DTypeError: `dtype` is not a floating dtype.
            NonFiniteError: a gene, coefficient or other tensor holds NaN or Inf.
            MethodError: the method cannot change what was asked for.
        """
        for name, value in (("depth", depth), ("heads", heads), ("width", width)):
            require(value is None or is_count(value, 1), name, "an integer of at least 1", value)
        require(num_classes is None or is_count(num_classes, 0), "num_classes", "an integer >= 0", num_classes)
        require(model is None or isinstance(model, nn.Module), "model", "a module", type(model).__name__)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise DTypeError(f"dtype: expected a floating torch.dtype, got {dtype}")
        self._check_finite()
        return self.method.descend(
            self,
            depth=depth,
            model=model,
            backed=backed,
            num_classes=num_classes,
            heads=heads,
            width=width,
            dtype=dtype,
            device=device,
        )

    def first_genes(self, num_genes: int) -> Learngene:
        """Keep the first genes of every weight, for methods whose genes are ordered (LDR): a smaller learngene.

        Args:
            num_genes: how many, from 1 to those that there are.

        Returns:
            A learngene whose tensors are shared with this one.

        Raises:
            ArgumentError: `num_genes` is no int >= 1, or above the number of genes; or a gene's key holds no number.
            MethodError: the method needs all its genes.
        """
        return self.method.first_genes(self, num_genes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload both files to the Hugging Face Hub, with a README card where the repository has none.

        Args:
            repo_id: `owner/name`; made if it does not exist.
            private: visibility of a new repository; None takes the default of the account.
            revision: branch to upload to.
            commit_message: message of the commit.
            token: access token, or None for the stored login.

        Returns:
            The address of the commit.

        Raises:
            ArgumentError: `repo_id` is not of the form `owner/name`.
            NonFiniteError: a tensor holds NaN or Inf.
            WriteError: huggingface_hub is missing, or the Hub cannot be reached or refuses.
        """
        return upload(
            repo_id,
            self.to_files(),
            card(repo_id, self.method.name, self.host, self._stored()),
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
        )
