# SPDX-License-Identifier: Apache-2.0
"""The contract that every primitive keeps, as tests to inherit.

A primitive states how its arguments and its dense weight are made (`Primitive`), and its test file has one class:

    class TestContract(Contract):
        primitive = Expansion()

Everything in the `contract_*` files then runs for it, at every implementation that is here.
"""

from __future__ import annotations

from contract_autograd import Autograd, Memory
from contract_base import Primitive, Sizes
from contract_graphs import Graphs
from contract_layers import Layers, Refusals
from contract_running import Running
from contract_values import Values, Weights

__all__ = ["Contract", "Primitive", "Sizes"]


class Contract(Values, Weights, Autograd, Memory, Layers, Refusals, Graphs, Running):
    """All parts."""
