# SPDX-License-Identifier: Apache-2.0
"""Whole models: ViT-S forward at batch 1, and a training step (forward, backward, AdamW) at batch 32.

Checked is a step of two images; timed steps go on training. The networks are in `vit`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import vit
from benchmarks.cases import Case
from benchmarks.expansion_products import regime


@dataclass(frozen=True)
class Sizes:
    """The network, its name, and the images of a training step, of its check, and of a forward pass."""

    name: str = "ViT-S"
    shape: vit.Shape = field(default_factory=vit.Shape)
    batch: int = 32
    checked: int = 2


FULL = Sizes()
TINY = Sizes("ViT-tiny", vit.Shape(32, 3, 2, 8, 4, 5), 3, 2)


def cases(sizes: Sizes) -> list[Case]:
    """Forward passes in both dtypes, training steps in float32 and under bfloat16 autocast."""
    dtypes = (torch.float32, torch.bfloat16)
    return [make(sizes, dtype) for make in (_forward_case, _step_case) for dtype in dtypes]


class Inputs:
    """The three forms of a network, their optimizers, images and labels.

    Args:
        shape: of the network.
        batch: images.
        dtype: of the network and the images; in training bfloat16 means float32 parameters under autocast.
        train: whether there are optimizers.
    """

    def __init__(self, shape: vit.Shape, batch: int, dtype: torch.dtype, train: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        stored = torch.float32 if train else dtype
        net = vit.gene_backed(shape).to(stored)
        self.nets = {form: each.train(train) for form, each in vit.forms(net).items()}
        self.shape, self.autocast = shape, train and dtype != torch.float32
        self.images = torch.randn(batch, 3, shape.side, shape.side, generator=generator).to(stored)
        self.labels = torch.randint(shape.classes, (batch,), generator=generator)
        self.optimizers = (
            {form: torch.optim.AdamW(net.parameters(), lr=1e-4) for form, net in self.nets.items()} if train else {}
        )


def _forward(inputs: Inputs, form: str) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad():
        yield "y", inputs.nets[form](inputs.images)


def _forward_reference(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    yield "y", _double(inputs)(inputs.images.double())


def _double(inputs: Inputs) -> nn.Module:
    """The eager form in float64."""
    return vit.eager(copy.deepcopy(inputs.nets["ours"]).double())


def _step(inputs: Inputs, form: str) -> Iterator[tuple[str, Tensor]]:
    """One step: the logits and the gradients that came of them, before the update; dense weights' are not given."""
    net, optimizer = inputs.nets[form], inputs.optimizers[form]
    optimizer.zero_grad()
    with torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16) if inputs.autocast else nullcontext():
            y = net(inputs.images)
            loss = F.cross_entropy(y, inputs.labels)
        loss.backward()
    yield "y", y
    yield from _gradients(net)
    optimizer.step()


def _gradients(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients of the genes, by one name in all forms, and of the positions."""
    found = dict(net.named_parameters())
    yield "d positions", found["positions"].grad
    for name, parameter in found.items():
        key = re.sub(r"^blocks\.0\.(\w+)\.genes\.", r"gene_bank.genes.\1.weight.", name)
        key = re.sub(r"^blocks\.0\.(\w+)\.biases\.", r"gene_bank.genes.\1.bias.", key)
        if key.startswith("gene_bank."):
            yield f"d {key.removeprefix('gene_bank.genes.')}", parameter.grad


def _step_reference(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    net = _double(inputs)
    with torch.enable_grad():
        y = net(inputs.images.double())
        F.cross_entropy(y, inputs.labels).backward()
    yield "y", y
    yield from _gradients(net)


def _forward_case(sizes: Sizes, dtype: torch.dtype) -> Case:
    shape = sizes.shape
    return Case(
        "expansion", "model", regime("y", shape.width, shape.tokens, 2, dtype), f"{sizes.name} forward, batch 1",
        shape.tokens, 2, dtype, make=partial(Inputs, shape, 1, dtype, train=False),
        ours=partial(_forward, form="ours"), reference=_forward_reference,
        baselines={form: partial(_forward, form=form) for form in ("dense", "eager")},
        tolerance=1e-4 if dtype == torch.float32 else 6e-2, one_set=True,
    )  # fmt: skip


def _step_case(sizes: Sizes, dtype: torch.dtype) -> Case:
    shape = sizes.shape
    tokens = sizes.batch * shape.tokens
    return Case(
        "expansion", "model", regime("y", shape.width, tokens, 2, dtype), f"{sizes.name} step, batch {sizes.batch}",
        tokens, 2, dtype, make=partial(Inputs, shape, sizes.batch, dtype, train=True),
        check_on=partial(Inputs, shape, sizes.checked, dtype, train=True),
        ours=partial(_step, form="ours"), reference=_step_reference,
        baselines={form: partial(_step, form=form) for form in ("dense", "eager")},
        tolerance=1e-3 if dtype == torch.float32 else 2e-1, one_set=True,  # gradients passed through up to 12 blocks
    )  # fmt: skip
