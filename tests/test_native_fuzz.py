# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments, drawn at random, to every compiled kernel of `expansion`: refused by name, and nothing is written.

Messages and their wording are in `test_native_refusals`; right arguments are in the other tests of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_native import KERNELS, LEVELS
from torch import Tensor

ROWS, COLS, TOKENS, COUNT = 3, 17, 2, 2
#: Integers that are no size, stride or address; integers that are no argument; what is no list; what is no integer.
BEYOND = [-(2**63), 2**57, 2**62, 2**63 - 1]
OVERSIZE = [2**63, 2**64, -(2**64), 2**70]
NO_LIST = [None, 5, "genes", ()]
NO_INT = [None, 1.5, "8", [8], 2**64, -(2**70)]
OUTPUTS = {"synthesize": "dst", "rows_forward": "y", "rows_dx": "dx"}


class Call:
    """A call that is right, and the memory that it would write."""

    def __init__(self, kernel: str, level: int) -> None:
        self.kernel = kernel
        self.made: list[Tensor] = []
        genes = [(self.address(ROWS, COLS), COLS, 1) for _ in range(COUNT)]
        arguments: dict[str, Any] = {"level": level, "threads": 1, "genes": genes, "gene_dtype": 0}
        arguments["coeffs"] = self.address(2, COUNT)
        panel, sizes = {"rows": ROWS, "cols": COLS}, {"M": TOKENS, "I": COLS, "O": ROWS}
        x, dy = {"x": self.address(TOKENS, COLS), "x_row_stride": COLS}, {"dy": self.address(TOKENS, ROWS)}
        dy["dy_row_stride"] = ROWS
        grads = {
            "buffers": [(self.address(ROWS, COLS), COLS) for _ in range(COUNT)],
            "dots": self.address(ROWS, 2 * COUNT),
        }
        bias = {"bias": 0, "bias_genes": [(self.address(ROWS, 1), 1, 0) for _ in range(COUNT)], "bias_dtype": 0}
        special = {
            "synthesize": {"dst": self.address(ROWS, COLS), "dst_dtype": 0, **panel, "dst_row_stride": COLS},
            "synthesize_stack": {
                "dst": [(self.address(ROWS, COLS), COLS) for _ in range(2)], "dst_dtype": 0, **panel, "add": False
            },
            "rows_forward": {"y": self.address(TOKENS, ROWS), "y_row_stride": ROWS, **x, "x_dtype": 0, **sizes, **bias},
            "rows_dx": {"dx": self.address(TOKENS, COLS), "dx_row_stride": COLS, **dy, "dy_dtype": 0, **sizes},
            "accumulate": {"dw": self.address(ROWS, COLS), "dw_dtype": 0, **panel, "dw_row_stride": COLS, **grads},
            "rows_wgrad": {**dy, **x, "x_dtype": 0, **sizes, **grads},
        }  # fmt: skip
        self.arguments = arguments | special[kernel]

    def address(self, rows: int, cols: int) -> int:
        self.made.append(torch.full((rows, cols), 0.25))
        return self.made[-1].data_ptr()

    def run(self, **changed: Any) -> None:
        getattr(KERNELS, self.kernel)(**{**self.arguments, **changed})

    def untouched(self) -> bool:
        return all(bool((memory == 0.25).all()) for memory in self.made)


def wrong_item(draw: st.DrawFn, item: Sequence[int], name: str) -> Any:
    """A tuple of a list with one thing wrong; the row stride of what is written must reach over a row."""
    place = draw(st.integers(0, 1 if name == "bias_genes" else len(item) - 1))  # of one column, the stride says nothing
    values = [*BEYOND, *NO_INT, -1] + ([0, 1, COLS - 1] if name in ("buffers", "dst") and place == 1 else [])
    spoiled = (*item[:place], draw(st.sampled_from(values)), *item[place + 1 :])
    return draw(st.sampled_from([spoiled, item[1:], (*item, 0), list(item), None, 7]))


def wrong(draw: st.DrawFn, name: str, call: Call) -> Any:
    """A wrong value of an argument."""
    value = call.arguments[name]
    if name in ("genes", "buffers", "bias_genes") or isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        item = wrong_item(draw, value[place], name)
        spoiled = [*value[:place], item, *value[place + 1 :]]
        empty = [] if name == "bias_genes" else [[]]  # where no bias is
        return draw(st.sampled_from([spoiled, spoiled, spoiled, *empty, value * 33, *NO_LIST]))
    choices = [*OVERSIZE, None, "1", 1.5]
    if name in ("level", "threads") or name.endswith("dtype"):
        choices += [-1, 5000, 2**31 - 1, 2**31, -(2**31)] + ([1] if name.endswith("dtype") else [])
    elif name in ("M", "I", "O", "rows", "cols"):
        choices += [-1, *BEYOND]
    elif name.endswith("_stride"):
        choices += [-1, *BEYOND]
        choices += [0, call.arguments[name] - 1] if name.startswith(OUTPUTS.get(call.kernel, "-")) else []
    else:
        choices += [-1, 2**57, 2**63 - 1, 2**64 - 1] + ([0] if name not in ("bias", "dots") else [])
    return draw(st.sampled_from(choices))


@pytest.mark.parametrize("kernel", [*OUTPUTS, "synthesize_stack", "accumulate", "rows_wgrad"])
@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_arguments_are_refused_by_name(kernel: str, data: st.DataObject) -> None:
    call = Call(kernel, data.draw(st.sampled_from(LEVELS)))
    name = data.draw(st.sampled_from([name for name in call.arguments if name != "add"]))
    value = data.draw(st.composite(lambda draw: wrong(draw, name, call))())
    with pytest.raises((ValueError, TypeError)) as caught:
        call.run(**{name: value})
    if caught.type is ValueError:  # TypeError is of pybind11, which shows every argument with its type
        related = {"gene_dtype": "_dtype: expected float64 exactly where gene_dtype is", "bias": "bias_genes: "}
        start = f"{name.removesuffix('_row_stride')}: "
        assert str(caught.value).startswith(start) or related.get(name, "none") in str(caught.value)
    assert call.untouched(), "something was written before the call was refused"


@pytest.mark.parametrize("kernel", [*OUTPUTS, "synthesize_stack", "accumulate", "rows_wgrad"])
def test_the_calls_that_are_spoiled_are_right(kernel: str) -> None:
    call = Call(kernel, 0)
    call.run()
    assert not call.untouched()


GOOD = torch.ones(2, 3)
#: Tensors and other things, none of which fits where a gene [2, 3], or its coefficient, belongs.
ODD: list[Any] = [
    None, 5, "genes", torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3, device="meta"), torch.empty(0, 3),
    torch.ones(()), torch.ones(3, 4), torch.ones(1, 1).expand(2**62, 1), torch.ones(1).expand(2**62),
    torch.ones(2, 3).to_sparse(),
    torch.ones(2, 3, dtype=torch.complex64), torch.nn.Buffer(torch.ones(1, 3, 5)), torch.ones([1] * 9),
]  # fmt: skip
FREED = torch.ones(2, 3)
FREED.untyped_storage().resize_(4)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data())
def test_calls_on_tensors_take_nothing_odd(data: st.DataObject) -> None:
    """The calls that read tensors themselves answer None, or false, and write nothing."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch shows its tensors in another way")
    exchange = torch.Tensor.__dlpack_c_exchange_api__
    calls = KERNELS.Calls(1 << 17, exchange, (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))
    right = {"x": torch.ones(4, 3), "genes": [GOOD, GOOD], "coeffs": torch.ones(2), "sums": [torch.ones(2, 3)] * 2}
    right["dy"] = torch.ones(4, 2)
    name = data.draw(st.sampled_from(list(right)))
    odd = data.draw(st.sampled_from([*ODD, FREED]))
    lists = st.sampled_from([[odd, GOOD], [GOOD, odd], [odd], [], [GOOD] * 65, (), odd])
    wrong = data.draw(lists) if isinstance(right[name], list) else odd
    if name == "sums" and isinstance(wrong, list) and (wrong[2:] or (odd is None and wrong[1:])):
        return  # None is right there, and so are sums of other genes
    given_ = {**right, name: wrong}
    level = data.draw(st.sampled_from(LEVELS))
    x, genes, coeffs, sums, dy = (given_[key] for key in ("x", "genes", "coeffs", "sums", "dy"))
    if name in ("x", "genes", "coeffs"):
        assert calls.forward(level, 1, 16, x, genes, coeffs, None, []) is None
    if name in ("dy", "genes", "coeffs"):
        assert calls.input_gradient(level, 1, 16, dy, genes, coeffs) is None
    assert calls.gradients(level, 1, 16, dy, x, genes, coeffs, [0, 1], [], [], sums, True) is None
    assert (right["sums"][0] == 1).all()
