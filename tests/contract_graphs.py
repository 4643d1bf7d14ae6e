# SPDX-License-Identifier: Apache-2.0
"""The contract on graphs: registered operators, `torch.compile` without breaks or recompiles, `torch.export`.

Graphs are captured with aot_eager, which runs the same operators; Inductor's own work is tested for `expansion` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from contract_base import Base, Given, Sizes, close, gradients, leaves, mapped, tracked
from contract_layers import Net, grads, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

# torch's own, while it traces; a mark of the class would hold for all parts of the contract
while_tracing = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Graphs(Base):
    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @while_tracing
    @pytest.mark.parametrize("sizes", [Sizes(3, 5, 4), Sizes(1, 1, 1), Sizes(0, 5, 4), Sizes(33, 7, 2)], ids=str)
    def test_opcheck(self, sizes: Sizes) -> None:
        """Schema, fake kernel and autograd registration of every operator that begins with the primitive's stem."""
        given = tracked(self.primitive.make(sizes, torch.float64))
        checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
        for name, arguments in self.primitive.operators(given):
            torch.library.opcheck(getattr(torch.ops.pylearngene, name).default, arguments, test_utils=checks)

    def test_every_operator_is_checked(self) -> None:
        given = tracked(self.primitive.make(Sizes(3, 5, 4), torch.float64))
        shown = {name for name, _ in self.primitive.operators(given)}
        stem = self.primitive.stem
        names = {schema.name.removeprefix("pylearngene::") for schema in torch._C._jit_get_all_schemas()}
        registered = {name for name in names if name.startswith((f"{stem}_linear", f"{stem}_weight"))}
        assert shown >= registered

    @while_tracing
    @pytest.mark.parametrize("recompute", [False, True])
    def test_compiled_functions_give_equal_gradients(self, device: str, recompute: bool) -> None:
        def call(given: Given) -> Tensor:
            if recompute:
                return torch.tanh(checkpoint(self.primitive.linear, given, use_reentrant=False))
            return torch.tanh(self.primitive.linear(given))

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for sizes in (Sizes(3, 5, 4), Sizes(7, 5, 4)):
            given = self.primitive.make(sizes, torch.float64, device)
            dy = torch.randn(sizes[:2], dtype=torch.float64, device=device)
            results = [
                gradients(fn, given, dy) for fn in (compiled, lambda given: torch.tanh(self.primitive.oracle(given)))
            ]
            for mine, theirs in zip(*((y, *found) for y, found in results), strict=True):
                close(mine, theirs, 1e-11)

    @while_tracing
    @pytest.mark.parametrize("recompute", [False, True])
    def test_compiled_networks_give_equal_gradients(self, device: str, recompute: bool) -> None:
        net, (x, dy) = Net(self.primitive, device=device), inputs(device=device)
        net.recompute = recompute
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        wanted = grads(net, net.dense, x, dy)
        for _ in range(2):
            for mine, theirs in zip(grads(net, compiled, x, dy), wanted, strict=True):
                close(mine, theirs, 1e-10)
        with torch.no_grad():
            close(compiled(x), net.dense(x), 1e-10)

    @while_tracing
    def test_compiled_autocast(self, device: str) -> None:
        net = Net(self.primitive, dtype=torch.float32, device=device)
        x, dy = inputs(dtype=torch.float32, device=device)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        found = []
        for call in (net, compiled):
            with torch.autocast(device, dtype=torch.bfloat16):
                found.append(grads(net, call, x, dy))
        for mine, theirs in zip(*found, strict=True):
            close(mine, theirs, 3e-2)

    @while_tracing
    def test_twelve_layers_and_five_batch_sizes_make_two_graphs(self, device: str) -> None:
        counter = CompileCounter()
        compiled = torch.compile(Net(self.primitive, depth=12, device=device), backend=counter, fullgraph=True)
        for tokens in (2, 3, 17, 40, 5):
            compiled(inputs(tokens, device=device)[0])
        assert counter.frame_count <= 2

    @while_tracing
    def test_layers_compiled_one_by_one_share_their_graphs(self, device: str) -> None:
        """Nothing that differs between layers is a constant of the graph."""
        counter = CompileCounter()
        net = Net(self.primitive, depth=12, device=device)
        for layer in net.layers:
            layer.compile(backend=counter, fullgraph=True)
        for tokens in (2, 3, 17):
            net(inputs(tokens, device=device)[0].requires_grad_())
        assert counter.frame_count <= 2

    @while_tracing
    def test_export(self, device: str) -> None:
        net = Net(self.primitive, depth=3, device=device).eval()
        x, _ = inputs(device=device)
        tokens = torch.export.Dim("tokens", min=2, max=64)
        exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: tokens}})
        for count in (3, 21):
            x, _ = inputs(count, device=device)
            close(exported.module()(x), net.dense(x), 1e-11)
        assert len(exported.state_dict) == len(list(net.parameters()))

    def test_fake_tensors_give_shapes_and_dtypes(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        for dtype, gene_dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
            given = self.primitive.make(Sizes(3, 5, 4), dtype, gene_dtype=gene_dtype)
            real = self.primitive.linear(given)
            with FakeTensorMode() as mode:
                inputs = tracked(mapped(given, lambda name, tensor: mode.from_tensor(tensor)))
                y = self.primitive.linear(inputs)
                found = torch.autograd.grad(y.sum(), leaves(inputs))
            assert (y.shape, y.dtype, y.stride()) == (real.shape, real.dtype, real.stride())
            for grad, leaf in zip(found, leaves(inputs), strict=True):
                assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
