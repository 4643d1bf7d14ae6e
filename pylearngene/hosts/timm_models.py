# SPDX-License-Identifier: Apache-2.0
"""The `timm` family: constructor arguments inferred from a model, and models rebuilt from them.

timm is imported only to rebuild. Whether the inferred arguments are right is decided by `families.py`, which compares
the rebuilt model with the given one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from torch import nn

from pylearngene.errors import HostError

NAME = "timm"


def claims(model: nn.Module) -> bool:
    """Say whether the class of `model` comes from timm."""
    return type(model).__module__.partition(".")[0] == "timm"


def configs(model: nn.Module, _depth: int, /) -> Iterator[dict[str, Any]]:
    """Yield ways to build `model` again: by its class and inferred arguments, then by its registered architecture."""
    known = _infer(model)
    names = _parameters(type(model))
    arguments = {name: value for name, value in known.items() if name in names}
    yield {"class": f"{type(model).__module__}.{type(model).__qualname__}", "model_args": arguments}
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if isinstance(architecture, str):
        yield {"architecture": architecture, "model_args": arguments}


def build(config: dict[str, Any], depth: int, num_classes: int | None) -> nn.Module:
    """Build the plain model that `config` describes, with `depth` blocks.

    Raises:
        HostError: the class is none of timm's models.
    """
    arguments = {**config["model_args"], "depth": depth}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if "architecture" in config:
        model = importlib.import_module("timm").create_model(config["architecture"], pretrained=False, **arguments)
        assert isinstance(model, nn.Module)
        return model
    return _model_class(config["class"])(**arguments)


def names_in(model: nn.Module, blocks: str, paths: list[str]) -> tuple[str, list[str]] | None:
    """Return the stored names, or None where `model` has other ones."""
    modules = dict(model.named_modules())
    return (blocks, paths) if all(f"{blocks}.0.{path}" in modules for path in paths) else None


def _model_class(path: str) -> type[nn.Module]:
    """Import a model class of timm, and nothing else."""
    module, _, name = path.rpartition(".")
    if not module.startswith("timm.models."):
        raise HostError(f"host: expected the class of a timm model, got {path!r}")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise HostError(f"host: the installed timm has no model class {path!r}")
    return found


def _parameters(cls: type) -> set[str]:
    """Collect the constructor arguments of a class, following `**kwargs` to its bases."""
    names: set[str] = set()
    for base in inspect.getmro(cls):
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _present(path: str) -> Callable[[nn.Module], bool]:
    """Say whether the module at `path` is there and is no identity."""

    def read(model: nn.Module) -> bool:
        found = attrgetter(path)(model)
        return found is not None and not isinstance(found, nn.Identity)

    return read


def _mlp_ratio(model: nn.Module) -> float:
    """Return a ratio that timm's `int(dim * ratio)` turns into the hidden width exactly."""
    layer = attrgetter("blocks.0.mlp.fc1")(model)
    ratio: float = layer.out_features / layer.in_features
    return ratio if int(layer.in_features * ratio) == layer.out_features else ratio + 0.5 / layer.in_features


def _num_classes(model: nn.Module) -> int:
    head = attrgetter("head")(model)
    return head.out_features if isinstance(head, nn.Linear) else 0


def _pair(path: str) -> Callable[[nn.Module], Any]:
    """Return a size as one number where both sides are equal."""

    def read(model: nn.Module) -> Any:
        size = attrgetter(path)(model)
        return size[0] if size[0] == size[1] else list(size)

    return read


_READERS: dict[str, Callable[[nn.Module], Any]] = {
    "img_size": _pair("patch_embed.img_size"),
    "patch_size": _pair("patch_embed.patch_size"),
    "in_chans": attrgetter("patch_embed.proj.in_channels"),
    "num_classes": _num_classes,
    "global_pool": attrgetter("global_pool"),
    "embed_dim": attrgetter("embed_dim"),
    "num_heads": attrgetter("blocks.0.attn.num_heads"),
    "mlp_ratio": _mlp_ratio,
    "qkv_bias": _present("blocks.0.attn.qkv.bias"),
    "qk_norm": _present("blocks.0.attn.q_norm"),
    "scale_attn_norm": _present("blocks.0.attn.norm"),
    "scale_mlp_norm": _present("blocks.0.mlp.norm"),
    "proj_bias": _present("blocks.0.attn.proj.bias"),
    "init_values": attrgetter("blocks.0.ls1.init_values"),
    "class_token": _present("cls_token"),
    "pos_embed": lambda model: "learn" if _present("pos_embed")(model) else "none",
    "no_embed_class": attrgetter("no_embed_class"),
    "reg_tokens": attrgetter("num_reg_tokens"),
    "pre_norm": _present("norm_pre"),
    "final_norm": lambda model: _present("norm")(model) or _present("fc_norm")(model),
    "fc_norm": _present("fc_norm"),
    "pool_include_prefix": attrgetter("pool_include_prefix"),
    "dynamic_img_size": attrgetter("dynamic_img_size"),
    "dynamic_img_pad": attrgetter("patch_embed.dynamic_img_pad"),
    "drop_rate": attrgetter("head_drop.p"),
    "pos_drop_rate": attrgetter("pos_drop.p"),
    "patch_drop_rate": lambda model: getattr(attrgetter("patch_drop")(model), "prob", 0.0),
    "proj_drop_rate": attrgetter("blocks.0.attn.proj_drop.p"),
    "attn_drop_rate": attrgetter("blocks.0.attn.attn_drop.p"),
    "drop_path_rate": lambda model: getattr(attrgetter("blocks")(model)[-1].drop_path1, "drop_prob", 0.0),
}


def _infer(model: nn.Module) -> dict[str, Any]:
    """Read every constructor argument that the instance still shows."""
    known = {}
    for name, read in _READERS.items():
        try:
            known[name] = read(model)
        except (AttributeError, TypeError, IndexError):
            continue
    return known
