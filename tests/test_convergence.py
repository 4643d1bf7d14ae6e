# SPDX-License-Identifier: Apache-2.0
"""Training over many steps: gene-backed against materialized weights, and what is left alive in memory.

A backward pass that is wrong only in composition shows here. The reference is a plain transformer whose weights are
written out as sums of genes before every step, by PyTorch alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import pylearngene as plg

WIDTH, HEADS, DEPTH, TOKENS, BATCH, WORDS = 32, 4, 6, 12, 8, 17
STEPS, LOSS, PARAMETERS = 32, 1e-5, 5e-3
CENSUS_STEPS = 10


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model over a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, WORDS)
        self.recompute = False

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def text(step: int) -> Tensor:
    """Sequences in which each word follows from its place and the first, but for some: the loss stays near 1."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(WORDS, (BATCH, 1), generator=generator)
    strange = torch.randint(WORDS, (BATCH, TOKENS + 1), generator=generator)
    chosen = torch.rand(BATCH, TOKENS + 1, generator=generator) < 0.2
    return torch.where(chosen, strange, (first + 3 * torch.arange(TOKENS + 1)) % WORDS)


def loss_of(run: Callable[[Tensor], Tensor], step: int) -> Tensor:
    words = text(step)
    return F.cross_entropy(run(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def network(learn: bool, recompute: bool) -> nn.Module:
    torch.manual_seed(0)
    method = plg.methods.Expansion(coeffs=lambda l, L: [1.0, l / L], learn=learn)  # noqa: E741
    net = plg.auxiliary(Transformer(), method)
    net.recompute = recompute
    return net


class Materialized:
    """A plain transformer with copies of a network's parameters, by the same names, whose blocks are written out."""

    def __init__(self, net: nn.Module) -> None:
        self.plain = Transformer()
        layers = ((name, it) for name, it in net.named_modules() if isinstance(it, plg.nn.ExpansionModule))
        self.fixed = {name: layer.coeffs for name, layer in layers}
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}

    def __call__(self, words: Tensor) -> Tensor:
        values = {}
        for name in self.plain.state_dict():
            if name in self.parameters:
                values[name] = self.parameters[name]
                continue
            layer, part = name.rsplit(".", 1)
            coeffs = self.parameters.get(f"{layer}.coeffs", self.fixed[layer])
            genes = [self.parameters[f"gene_bank.genes.{layer.split('.', 2)[2]}.{part}.{k}"] for k in range(2)]
            values[name] = coeffs[0] * genes[0] + coeffs[1] * genes[1]
        return functional_call(self.plain, values, (words,))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("learn", [False, True])
def test_losses_are_those_of_materialized_weights(learn: bool, recompute: bool) -> None:
    net = network(learn, recompute)
    plain = Materialized(net)
    trained = {"ours": list(net.parameters()), "plain": list(plain.parameters.values())}
    optimizers = {name: torch.optim.AdamW(parameters, lr=3e-3) for name, parameters in trained.items()}
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    for step in range(STEPS):
        for name, run in (("ours", net), ("plain", plain)):
            optimizers[name].zero_grad()
            loss = loss_of(run, step)
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())
    assert losses["plain"][-1] < 0.8 * losses["plain"][0]
    assert losses["ours"] == pytest.approx(losses["plain"], rel=LOSS, abs=0)
    torch.testing.assert_close(trained["ours"], trained["plain"], rtol=0, atol=PARAMETERS)


def census() -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes of every living storage, once."""
    gc.collect()
    living = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout is torch.strided:  # fake ones hold nothing
            living[thing.untyped_storage().data_ptr()] = (tuple(thing.shape), thing.untyped_storage().nbytes())
    return list(living.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_grows_and_no_weight_lives_over_checkpointed_steps(autocast: bool) -> None:
    before = census()
    net = network(learn=True, recompute=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    seen = []
    for step in range(2 + CENSUS_STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        del loss
        if step in (1, 1 + CENSUS_STEPS):  # the first step makes the moments
            seen.append(census())
    first, last = (sum(size for _, size in living) for living in seen)
    assert last - first == 0
    weights = {(WIDTH, WIDTH): 4, (3 * WIDTH, WIDTH): 1, (WIDTH, 3 * WIDTH): 1}
    for shape, layers in weights.items():
        # two genes per layer: each with its gradient and two moments
        assert sum(it == shape for it, _ in seen[-1]) - sum(it == shape for it, _ in before) == 2 * 4 * layers
