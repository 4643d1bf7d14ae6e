# SPDX-License-Identifier: Apache-2.0
"""Gradients that several layers add to one accumulator: on a GPU, every stream waits for the one that added before it.

The streams here only write down who waits for whom. What runs on real ones is in `test_running_streams`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pylearngene.functional import _tap
from pylearngene.nn import ExpansionLinear, GeneBank
from pylearngene.nn import bank as bank_module


class Streams:
    """Which stream is current is decided by the test; waits are written down."""

    def __init__(self) -> None:
        self.number = 1
        self.waits: list[tuple[int, int]] = []

    def current(self, device: torch.device) -> Streams:
        here = Streams()
        here.number, here.waits = self.number, self.waits
        return here

    def wait_stream(self, other: Streams) -> None:
        self.waits.append((self.number, other.number))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    made = Streams()
    monkeypatch.setattr(_tap, "stream_on", lambda device: made.number)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    return made


class On(torch.autograd.Function):
    """The backward pass of what comes before goes on on another stream."""

    @staticmethod
    def forward(ctx, x: Tensor, streams: Streams, number: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.streams, ctx.number = streams, number
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        ctx.streams.number = ctx.number
        return dy, None, None


def layers(count: int) -> list[ExpansionLinear]:
    bank = GeneBank()
    made = [ExpansionLinear(4, 4, bank=bank, name="fc", coeffs=[1.0, k / 3], bias=False) for k in range(1, count + 1)]
    for gene in bank.parameters():
        nn.init.normal_(gene)
    return made


def test_streams_wait_for_each_other_in_the_order_in_which_they_add(streams: Streams) -> None:
    first, second, third = layers(3)
    x = torch.randn(2, 4, requires_grad=True)
    first(x)  # the tap's node is older than what follows: it runs last, when the stream has changed once more
    y = first(On.apply(x, streams, 1))
    y = second(On.apply(y, streams, 3))
    y = third(On.apply(y, streams, 2))
    y.sum().backward()
    # The last layer adds on stream 1, the second on 2, the first on 3; the sum is handed over on 1 again.
    assert streams.waits == [(2, 1), (3, 2), (1, 3)]


def test_one_stream_waits_for_nobody(streams: Streams) -> None:
    first, second = layers(2)
    second(first(torch.randn(2, 4))).sum().backward()
    assert streams.waits == []


def test_a_pass_makes_taps_on_its_own_stream(streams: Streams) -> None:
    """Else autograd's nodes behind them would belong to another one, which a captured graph must not depend on."""

    class Net(nn.Module):
        def __init__(self, made: list[ExpansionLinear]) -> None:
            super().__init__()
            self.layers = nn.Sequential(*made)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    net = Net(layers(2))
    bank = net.layers[0].bank
    bank.attach(net)
    taps = []
    for number in (1, 1, 2, 2, 1):
        streams.number = number
        net(torch.randn(2, 4)).sum().backward()
        taps.append(bank.eager_tap("fc", bank.group("fc"), bank.group("fc").tensors()))
    assert taps[0] is taps[1]
    assert taps[2] is taps[3]
    assert len({id(tap) for tap in taps}) == 3
    assert streams.waits == []


@pytest.mark.parametrize("capturing", [False, True])
def test_layers_on_several_streams_share_a_tap_unless_one_is_captured(
    streams: Streams, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    (layer,) = layers(1)
    taps = []
    for number in (1, 1, 2):
        streams.number = number
        layer(torch.randn(2, 4)).sum().backward()
        taps.append(layer.bank.eager_tap("fc", layer.bank.group("fc"), layer.bank.group("fc").tensors()))
    assert taps[0] is taps[1]
    assert (taps[2] is taps[1]) == (not capturing)


def test_every_stream_has_low_precision_copies_of_its_own(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """One made on another stream may not be written yet, and may be freed before it was read."""
    monkeypatch.setattr(bank_module, "stream_on", lambda device: streams.number)
    (layer,) = layers(1)
    bank, genes = layer.bank, layer.bank.group("fc").tensors()
    before, made = bank.open_pass(), []
    for number in (1, 1, 2, 1):
        streams.number = number
        with torch.no_grad():
            made.append(bank.readable("fc", genes, torch.bfloat16, None))
    bank.close_pass(before)
    assert made[0] is made[1] is made[3]
    assert made[2] is not made[0]
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[2], strict=True))


def test_nothing_is_asked_of_streams_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: pytest.fail("the CPU has no streams"))
    (layer,) = layers(1)
    layer(torch.randn(2, 4)).sum().backward()
    assert _tap.stream_on(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert _tap.stream_on(torch.device("cuda", 0)) is None
