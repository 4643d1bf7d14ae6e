# SPDX-License-Identifier: Apache-2.0
"""Which family a model belongs to, and models of a family built anew at another depth.

A model belongs to a library's family only where a model rebuilt from the inferred description proves equal in every
tensor's shape and every module's settings; everything else is the user's own class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pylearngene.errors import HostError
from pylearngene.hosts import own, timm_models, transformers_models
from pylearngene.hosts.fingerprint import difference
from pylearngene.learngene import HostSpec

_LIBRARIES = {timm_models.NAME: timm_models, transformers_models.NAME: transformers_models}


def describe(model: nn.Module, path: str, depth: int, layers: tuple[tuple[str, str], ...]) -> HostSpec:
    """Describe a host so that it can be built again, by the first family that proves able to."""
    why = None
    for family in _LIBRARIES.values():
        if not family.claims(model):
            continue
        why = f"{family.NAME} counts its blocks elsewhere"
        for config in family.configs(model, depth):
            found = _disproof(model, family, config, path, depth)
            if found is None:
                return HostSpec(family.NAME, config, path, depth, layers)
            why = f"{family.NAME} would build something else: {found}"
    return HostSpec(own.NAME, own.config_of(model, why), path, depth, layers)


def build(
    spec: HostSpec, depth: int, num_classes: int | None, prototype: nn.Module | None, seed: int
) -> tuple[nn.Module, HostSpec]:
    """Build a plain model of the host's family with `depth` blocks; the values of its tensors are not yet those wanted.

    Args:
        spec: what the model is.
        depth: number of blocks.
        num_classes: outputs of a new head, or None to keep the host's.
        prototype: a model to copy instead of asking the library; own classes need one.
        seed: of everything that the constructor draws, the new head included; the global generator is untouched.

    Returns:
        The model, and `spec` with the new depth and with the names that blocks and layers have in the model, in the
        order of `spec`: the installed version of a library may have other names than the one that stored it.

    Raises:
        ArgumentError: an own class was not given.
        HostError: the library is missing, or builds something else.
    """
    if prototype is not None or spec.family == own.NAME:
        with _seeded(seed):
            return own.build(spec, depth, num_classes, prototype), replace(spec, depth=depth)
    family = _LIBRARIES[spec.family]
    try:
        with _seeded(seed):
            model: nn.Module = family.build(spec.config, depth, num_classes)
    except HostError:
        raise
    except ModuleNotFoundError as error:
        raise HostError(
            f"host: this learngene was made from a {spec.family} model; install {spec.family}, or pass model="
        ) from error
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise HostError(f"host: the installed {spec.family} cannot build the described model: {error}") from error
    names = family.names_in(model, spec.blocks, [path for path, _ in spec.layers])
    if names is None:
        raise HostError(
            f"host: expected blocks at {spec.blocks!r} with the layers {[path for path, _ in spec.layers]}, "
            f"which the {type(model).__name__} of the installed {spec.family} does not have"
        )
    layers = tuple((path, kind) for path, (_, kind) in zip(names[1], spec.layers, strict=True))
    return model, replace(spec, blocks=names[0], depth=depth, layers=layers)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what is drawn inside and give the global generator its state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _disproof(model: nn.Module, family: Any, config: dict[str, Any], path: str, depth: int) -> str | None:
    """Rebuild without memory for the tensors, also one block deeper, and say what differs, or return None."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            rebuilt, deeper = (family.build(config, count, None) for count in (depth, depth + 1))
        found = len(deeper.get_submodule(path))
    except Exception as error:  # a constructor of a foreign library may raise anything
        return f"{type(error).__name__}: {error}"
    if found != depth + 1:
        return f"{found} blocks where {depth + 1} are asked for"
    return difference(model, rebuilt)
