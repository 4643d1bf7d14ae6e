# SPDX-License-Identifier: Apache-2.0
"""Gradients of shared genes in compiled graphs: the table of cases, with aot_eager and Inductor, without graph breaks.

What a graph holds, and how many are made, is in `test_compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from expansion_samples import Net, close, gene_grads, unshared
from gradient_samples import CASES, LAYERS, check_sum_of_coefficients, check_sums_in_float32, draw, expect, genes_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
QUICK = ("hooks run once per pass", "retain_graph and two backwards")  # the others take long with Inductor
MANY = ("each gene and each coefficient frozen in turn", "only one gene, only x, only coefficients trained")  # graphs


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Room for a graph per frozen gene; no graphs from earlier tests or from the disk, which may take one pass only."""
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=64),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def compiled(backend: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda fn: torch.compile(fn, backend=backend, fullgraph=True)


@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_aot_eager(name: str, recompute: bool | None) -> None:
    net = Net(3, learn=recompute is None)
    net.recompute = recompute
    CASES[name](net, compiled("aot_eager"))


@pytest.mark.parametrize("recompute", [None, pytest.param(False, marks=pytest.mark.full)], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in CASES if n not in MANY]
)
def test_inductor(name: str, recompute: bool | None) -> None:
    net = Net(3, learn=recompute is not None)
    net.recompute = recompute
    CASES[name](net, compiled("inductor"))


@pytest.mark.parametrize("keywords", [{"retain_graph": True}, {"create_graph": True}], ids=str)
def test_a_graph_made_for_one_pass_refuses_two(keywords: dict[str, bool]) -> None:
    """torch compiles a backward at its first pass; one that need not be kept may overwrite what was saved for it."""
    net = Net(2)
    x, dy = draw()
    call = compiled("aot_eager")(net)
    call(x).backward(dy)
    y = call(2 * x)
    with pytest.raises(RuntimeError, match="donated buffers which requires create_graph=False and retain_graph=False"):
        y.backward(dy, **keywords)
    expect(net, (x, dy))
    y.backward(dy)
    expect(net, (x, dy), (2 * x, dy))


@pytest.mark.parametrize("depth", [1, 2, 12, pytest.param(48, marks=pytest.mark.full)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_sums_over_layers(depth: int, dtype: torch.dtype, tolerance: float) -> None:
    net = Net(depth, dtype=dtype)
    x, dy = draw(dtype)
    compiled("aot_eager")(net)(x).backward(dy)
    for mine, theirs in zip(gene_grads(net), unshared(net, x, dy), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("tokens", [4, 96])
def test_bfloat16_genes_are_summed_in_float32(tokens: int) -> None:
    check_sums_in_float32(12, tokens, compiled("aot_eager"))


@pytest.mark.parametrize("kind", LAYERS)
def test_coefficients_dot_their_gradients_to_the_outputs(kind: str) -> None:
    check_sum_of_coefficients(kind, compiled("aot_eager"))


class Wrapped(nn.Module):
    """A gene-backed network that is itself the region of a checkpoint, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(2, learn=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.net, x, use_reentrant=False)
        return x


def test_a_whole_network_inside_a_checkpoint() -> None:
    model, (x, dy) = Wrapped(), draw()
    compiled("aot_eager")(model)(x).backward(dy)
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).backward(dy)
    close(mine, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
def test_blocks_compiled_alone_give_one_gradient_per_gene(recompute: bool | None) -> None:
    """Each returns gradients of its own; autograd adds them up before any hook sees them."""
    net = Net(4, learn=True)
    for block in net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    net.recompute = recompute
    counts = dict.fromkeys(genes_of(net), 0)
    for name, gene in genes_of(net).items():
        gene.register_hook(lambda grad, name=name: counts.update({name: counts[name] + 1}))
    first, second = draw(), draw()
    y = net(first[0])
    y.backward(first[1], retain_graph=True)
    assert set(counts.values()) == {1}
    y.backward(first[1])
    net(second[0]).backward(second[1])
    expect(net, first, first, second)
    assert set(counts.values()) == {3}


def test_graph_breaks_keep_one_gradient_per_gene() -> None:
    net = Net(4)
    net.blocks[1].register_forward_pre_hook(lambda block, inputs: torch._dynamo.graph_break())
    counts: list[int] = []
    for gene in genes_of(net).values():
        gene.register_hook(lambda grad: counts.append(1))
    x, dy = draw()
    y = torch.compile(net, backend="aot_eager")(x)
    torch.autograd.grad(y, x, dy, retain_graph=True)
    y.backward(dy)
    expect(net, (x, dy))
    assert len(counts) == len(genes_of(net))


def test_batched_upstream_gradients_are_refused() -> None:
    """A vectorized jacobian of a compiled graph: torch itself says that the operators have no batching rule."""
    net = Net(2)
    x, _ = draw()
    y = compiled("aot_eager")(net)(x)
    upstream = torch.randn(4, *y.shape, dtype=torch.float64)
    genes = list(genes_of(net).values())
    with pytest.raises(RuntimeError, match="Batching rule not implemented for pylearngene"):
        torch.autograd.grad(y, genes, upstream, is_grads_batched=True)


def test_an_unread_gene_gets_zeros_of_its_own() -> None:
    """Gradients that nothing was added to are no views of what the graph keeps for its next pass."""
    net = Net(3)
    x, dy = draw()
    keep = (True, False, False)  # the first block has its second genes times 0
    other, upstream = draw()
    call = compiled("aot_eager")(net)
    y = call(x, keep)
    y.backward(dy, retain_graph=True)
    assert any(not grad.any() for grad in gene_grads(net))
    call(other).backward(upstream)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    expect(net, *[(x, dy, keep)] * 3, (other, upstream))
