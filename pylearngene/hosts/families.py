# SPDX-License-Identifier: Apache-2.0
"""Which family a model belongs to, and models of a family built anew at another depth.

A model belongs to a library's family only where a model rebuilt from the inferred description proves equal in every
tensor's shape and every module's settings; everything else is the user's own class.
"""

from __future__ import annotations

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
            found = _disproof(model, family, config, depth)
            if found is None:
                return HostSpec(family.NAME, config, path, depth, layers)
            why = f"{family.NAME} would build something else: {found}"
    return HostSpec(own.NAME, own.config_of(model, why), path, depth, layers)


def build(spec: HostSpec, depth: int, num_classes: int | None, prototype: nn.Module | None, seed: int) -> nn.Module:
    """Build a plain model of the host's family with `depth` blocks; the values of its tensors are not yet those wanted.

    Args:
        spec: what the model is.
        depth: number of blocks.
        num_classes: outputs of a new head, or None to keep the host's.
        prototype: a model to copy instead of asking the library; own classes need one.
        seed: of everything that the constructor draws, the new head included; the global generator is untouched.

    Raises:
        HostError: the family is unknown, its library is missing, or the library builds something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if prototype is not None or spec.family == own.NAME:
            return own.build(spec, depth, num_classes, prototype)
        if spec.family not in _LIBRARIES:
            raise HostError(f"host: expected one of the families {[*_LIBRARIES, own.NAME]}, got {spec.family!r}")
        try:
            model: nn.Module = _LIBRARIES[spec.family].build(spec.config, depth, num_classes)
        except ModuleNotFoundError as error:
            raise HostError(
                f"host: this learngene was made from a {spec.family} model; install {spec.family}, or pass model="
            ) from error
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise HostError(f"host: the installed {spec.family} cannot build the described model: {error}") from error
    return model


def _disproof(model: nn.Module, family: Any, config: dict[str, Any], depth: int) -> str | None:
    """Rebuild without memory for the tensors and say what differs, or return None."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            rebuilt = family.build(config, depth, None)
    except Exception as error:  # a constructor of a foreign library may raise anything
        return f"{type(error).__name__}: {error}"
    return difference(model, rebuilt)
